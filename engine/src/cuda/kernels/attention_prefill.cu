// Causal attention of prompt chunks over paged KV with mma.sync: for devices before Hopper (compute capability 8.0 and up),
// and the second opinion on the Hopper kernel. FlashAttention-2's loop (Dao 2023): a warp keeps 16 queries in
// registers and walks tiles of 64 keys that the block shares.

DEVICE void copy16(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from),
                 "r"(there ? 16 : 0));
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;"); }
template <int LEFT>
DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT));
}
DEVICE void load_4x8x8(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(row)));
}
DEVICE void load_4x8x8_transposed(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(row)));
}

struct Task {
    int row, count, position, table;
};

constexpr int QUERIES = 64, KEYS = 64, THREADS = 128;

// A tile's rows are padded by 16 bytes, so that eight rows of one column fall into different banks.
template <int DIM>
struct Tile {
    u16 at[KEYS][DIM + 8];
};

template <int DIM>
DEVICE void fetch(Tile<DIM> &tile, const u16 *pool_layer, const int *table, int value, int kv_head, int kv_heads,
                  int block_tokens, int first, int keys) {
    for (int i = threadIdx.x; i < KEYS * DIM / 8; i += THREADS) {
        int row = i / (DIM / 8), column = i % (DIM / 8) * 8, key = first + row;
        bool there = key < keys;
        int block = there ? table[key / block_tokens] : 0;
        size_t at = (((size_t)block * 2 + value) * kv_heads + kv_head) * block_tokens + key % block_tokens;
        copy16(&tile.at[row][column], pool_layer + at * DIM + column, there);
    }
}

// Grid: (heads, tasks). Shared memory: four tiles.
template <int DIM>
DEVICE void prefill_attention(u16 *out, const u16 *q, const u16 *pool_layer, const Task *tasks, const int *tables, int q_stride,
                              int heads, int kv_heads, int block_tokens, int window, float scale) {
    let_next_start();
    wait_for_input();
    extern __shared__ __align__(16) char raw[];
    Tile<DIM> *k_tiles = (Tile<DIM> *)raw, *v_tiles = k_tiles + 2;
    Task task = tasks[blockIdx.y];
    int head = blockIdx.x, kv_head = head / (heads / kv_heads);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int row = warp * 16 + g, query = task.position + row, keys = task.position + task.count;
    const int *table = tables + task.table;
    int first = window > 0 ? max(0, task.position + 1 - window) / KEYS : 0, last = (keys - 1) / KEYS;

    u32 a[DIM / 16][4];
    for (int r = 0; r < 2; r++) {
        const u16 *from = q + (size_t)(task.row + min(row + 8 * r, task.count - 1)) * q_stride + head * DIM + 2 * t;
#pragma unroll
        for (int i = 0; i < DIM / 16; i++) {
            a[i][r] = *(const u32 *)(from + i * 16);
            a[i][r + 2] = *(const u32 *)(from + i * 16 + 8);
        }
    }
    float o[DIM / 8][4], best[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < DIM / 8; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;

    fetch(k_tiles[first & 1], pool_layer, table, 0, kv_head, kv_heads, block_tokens, first * KEYS, keys);
    fetch(v_tiles[first & 1], pool_layer, table, 1, kv_head, kv_heads, block_tokens, first * KEYS, keys);
    copies_commit();
    for (int tile = first; tile <= last; tile++) {
        int next = tile + 1;
        if (next <= last) {
            fetch(k_tiles[next & 1], pool_layer, table, 0, kv_head, kv_heads, block_tokens, next * KEYS, keys);
            fetch(v_tiles[next & 1], pool_layer, table, 1, kv_head, kv_heads, block_tokens, next * KEYS, keys);
        }
        copies_commit();
        copies_wait<1>();
        __syncthreads();
        Tile<DIM> &k = k_tiles[tile & 1], &v = v_tiles[tile & 1];
        float s[KEYS / 8][4];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
        for (int i = 0; i < DIM / 16; i++) {
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) {
                u32 b[4];  // keys 16j..+8 (dimensions low, high), keys 16j+8.. (low, high)
                load_4x8x8(b, &k.at[j * 16 + lane % 8 + lane / 16 * 8][i * 16 + lane / 8 % 2 * 8]);
                mma_bf16(s[2 * j], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
                mma_bf16(s[2 * j + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
            }
        }
        float shrink[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = best[r];
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) {
                int at = tile * KEYS + i / 2 * 8 + 2 * t + i % 2, from = query + 8 * r;
                float &score = s[i / 2][2 * r + i % 2];
                bool seen = at <= from && (window == 0 || at > from - window);
                score = seen ? score * scale : -INFINITY;
                top = fmaxf(top, score);
            }
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            float base = top == -INFINITY ? 0.0f : top, sum = 0.0f;
            shrink[r] = exp2_fast(best[r] - base);
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) {
                float &score = s[i / 2][2 * r + i % 2];
                score = exp2_fast(score - base);
                sum += score;
            }
            total[r] = total[r] * shrink[r] + sum;
            best[r] = top;
        }
#pragma unroll
        for (int i = 0; i < DIM / 8; i++)
            o[i][0] *= shrink[0], o[i][1] *= shrink[0], o[i][2] *= shrink[1], o[i][3] *= shrink[1];
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            u32 p0 = bf16_pair(s[2 * j][0], s[2 * j][1]), p1 = bf16_pair(s[2 * j][2], s[2 * j][3]);
            u32 p2 = bf16_pair(s[2 * j + 1][0], s[2 * j + 1][1]), p3 = bf16_pair(s[2 * j + 1][2], s[2 * j + 1][3]);
#pragma unroll
            for (int i = 0; i < DIM / 16; i++) {
                u32 b[4];  // dimensions 16i..+8 (keys low, high), 16i+8.. (low, high)
                load_4x8x8_transposed(b, &v.at[j * 16 + lane % 16][i * 16 + lane / 16 * 8]);
                mma_bf16(o[2 * i], p0, p1, p2, p3, b[0], b[1]);
                mma_bf16(o[2 * i + 1], p0, p1, p2, p3, b[2], b[3]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        if (row + 8 * r >= task.count) continue;
        float share = 1.0f / total[r];
        u16 *to = out + ((size_t)(task.row + row + 8 * r) * heads + head) * DIM + 2 * t;
#pragma unroll
        for (int i = 0; i < DIM / 8; i++) *(u32 *)(to + i * 8) = bf16_pair(o[i][2 * r] * share, o[i][2 * r + 1] * share);
    }
}

#define PREFILL(DIM)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) prefill_attention_##DIM(                                    \
        u16 *out, const u16 *q, const u16 *pool_layer, const Task *tasks, const int *tables, int q_stride, int heads,   \
        int kv_heads, int block_tokens, int window, float scale) {                                                     \
        prefill_attention<DIM>(out, q, pool_layer, tasks, tables, q_stride, heads, kv_heads, block_tokens, window,      \
                               scale);                                                                                 \
    }
PREFILL(64)
PREFILL(128)
