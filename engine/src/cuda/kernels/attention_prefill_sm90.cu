// Causal attention of prompt chunks over paged KV on Hopper: asynchronous tensor cores fed by the bulk copy engine.
//
// A block takes 128 queries of one head: one warp group loads tiles of 128 keys and values (each KV block of the pool is one
// box of a tensor map, so paging costs nothing), two warp groups compute 64 queries each and take turns: the products
// of one run while the other takes its softmax, as in FlashAttention-3 (Shah et al. 2024, section 3.1).

constexpr int QUERIES = 128, KEYS = 128, STAGES = 2;

#define F8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define F32(d, i) F8(d, i), F8(d, i + 8), F8(d, i + 16), F8(d, i + 24)
#define R32_A                                                                                                          \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"   \
    "%30,%31"
#define R32_B                                                                                                          \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,"  \
    "%60,%61,%62,%63"

// S[64 x 128] (+)= Q K^T, both K-major in shared memory.
DEVICE void wgmma_scores(float (&d)[64], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " R32_A R32_B "}, %64, %65, p, 1, 1, 0, 0;\n}"
                 : F32(d, 0), F32(d, 32)
                 : "l"(a), "l"(b), "r"(add));
}
// O[64 x 128] += P V, P in registers, V with its n side contiguous.
DEVICE void wgmma_values(float (&d)[64], const u32 *a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " R32_A R32_B "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : F32(d, 0), F32(d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void wgmma_values(float (&d)[32], const u32 *a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " R32_A "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : F32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// Keeps the compiler from moving uses of accumulators across the asynchronous products.
template <int N>
DEVICE void pin(float (&d)[N]) {
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

template <int DIM>
struct Shared {
    u16 q[DIM / 64][QUERIES][64];
    u16 k[STAGES][DIM / 64][KEYS][64];
    u16 v[STAGES][DIM / 64][KEYS][64];
    u64 q_full, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

// What a block works on: `count` queries from row `row` of the batch; the first is at `position` of its sequence, whose
// block table begins at `table`.
struct Task {
    int row, count, position, table;
};

// Run by the four warps of the loading group: the copy engine takes one box per instruction, and a tile of 16-token
// blocks is 16 boxes of keys and 16 of values, more than one warp issues in the time the tile is computed. Warps 0 and
// 1 load keys, 2 and 3 values.
template <int DIM>
DEVICE void load_tiles(Shared<DIM> &s, const TensorMap *q_map, const TensorMap *kv_map, Task task, const int *tables,
                       int head, int kv_head, int kv_heads, int block_shift, int layer_row, int beyond, int first,
                       int last) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, keys = task.position + task.count;
    if (threadIdx.x == 0) {
        barrier_expect(&s.q_full, QUERIES * DIM * 2);
        for (int c = 0; c < DIM / 64; c++) load_box(s.q[c], q_map, head * DIM + c * 64, task.row, &s.q_full);
    }
    int value = warp / 2, per_tile = KEYS >> block_shift, boxes = per_tile * (DIM / 64);
    int box = lane * 2 + warp % 2, part = box % per_tile, c = box / per_tile;
    const int *table = tables + task.table;
    for (int tile = last, n = 0; tile >= first; tile--, n++) {
        int stage = n % STAGES;
        // What lies beyond the sequence is read as zeros: a weight of 0 times stale memory could be NaN.
        int key = tile * KEYS + (part << block_shift), row = beyond;
        if (box < boxes && key < keys)
            row = layer_row + (((table[key >> block_shift] * 2 + value) * kv_heads + kv_head) << block_shift);
        u64 *full = value ? &s.v_full[stage] : &s.k_full[stage];
        barrier_wait(value ? &s.v_empty[stage] : &s.k_empty[stage], (n / STAGES + 1) & 1);
        if (lane == 0 && warp % 2 == 0) barrier_expect(full, KEYS * DIM * 2);
        u16 *to = value ? &s.v[stage][c][part << block_shift][0] : &s.k[stage][c][part << block_shift][0];
        if (box < boxes) load_box(to, kv_map, c * 64, row, full);
    }
}

// One tile's scores → weights in `s`, with the row maxima and sums brought up to date. Returns nothing; `shrink` is what
// earlier sums must be multiplied by.
DEVICE void softmax(float (&s)[64], float (&best)[2], float (&total)[2], float (&shrink)[2], bool masked, int query,
                    int key, int window, float scale) {
    if (masked) {
#pragma unroll
        for (int i = 0; i < 64; i++) {
            int at = key + i / 4 * 8 + (i & 1), from = query + (i & 2) * 4;
            bool seen = at <= from && (window == 0 || at > from - window);
            if (!seen) s[i] = -INFINITY;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = best[r];
#pragma unroll
        for (int i = 0; i < 64; i += 4) top = fmaxf(top, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        float base = top == -INFINITY ? 0.0f : top * scale;
        shrink[r] = exp2_fast(best[r] * scale - base);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 64; i += 4) {
            s[i + 2 * r] = exp2_fast(s[i + 2 * r] * scale - base);
            s[i + 2 * r + 1] = exp2_fast(s[i + 2 * r + 1] * scale - base);
            sum += s[i + 2 * r] + s[i + 2 * r + 1];
        }
        total[r] = total[r] * shrink[r] + sum;
        best[r] = top;
    }
}

DEVICE void to_weights(u32 (&p)[32], const float (&s)[64]) {
#pragma unroll
    for (int i = 0; i < 32; i++) p[i] = bf16_pair(s[2 * i], s[2 * i + 1]);
}

template <int DIM>
DEVICE void issue_scores(float (&scores)[64], Shared<DIM> &s, int group, int stage) {
    u32 q = shared_address(s.q) + group * 64 * 128, k = shared_address(s.k[stage]);
#pragma unroll
    for (int i = 0; i < DIM / 16; i++)
        wgmma_scores(scores, descriptor(q + i / 4 * QUERIES * 128 + i % 4 * 32, 16),
                     descriptor(k + i / 4 * KEYS * 128 + i % 4 * 32, 16), i > 0);
}

template <int DIM>
DEVICE void issue_values(float (&o)[DIM / 2], const u32 (&p)[32], Shared<DIM> &s, int stage) {
    u32 v = shared_address(s.v[stage]);
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) wgmma_values(o, p + 4 * i, descriptor(v + i * 16 * 128, KEYS * 128));
}

// The two groups take turns in queueing products, so that one takes its softmax while the other's products run.
DEVICE void turn_wait(int group) { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
DEVICE void turn_pass(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(2 - group) : "memory"); }

struct Masked {
    static constexpr bool on = true;
};
struct Plain {
    static constexpr bool on = false;
};

template <int DIM>
DEVICE void compute(Shared<DIM> &s, u16 *out, Task task, int head, int heads, int window, float scale, int first, int last) {
    int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int row = group * 64 + warp * 16 + g, query = task.position + row;
    // The first and the last query of this warp group decide whether a tile needs the mask.
    int first_query = task.position + group * 64;
    auto masked = [&](int tile) {
        return tile * KEYS + KEYS - 1 > first_query || (window > 0 && tile * KEYS <= first_query + 63 - window);
    };
    float o[DIM / 2], scores[64], best[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, shrink[2];
    u32 p[32];
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) o[i] = 0.0f;

    if (group == 1) turn_pass(group);
    barrier_wait(&s.q_full, 0);
    barrier_wait(&s.k_full[0], 0);
    wgmma_begin();
    issue_scores(scores, s, group, 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(scores);
    if (threadIdx.x % 128 == 0) barrier_arrive(&s.k_empty[0]);
    softmax(scores, best, total, shrink, masked(last), query, last * KEYS + 2 * t, window, scale);
    to_weights(p, scores);

    int n = 1;
    // No branch while products are under way: the assembler would wait for them there. So the mask is outside.
    auto step = [&](auto mask, int tile) {
        int stage = n % STAGES, before = (n - 1) % STAGES;
        barrier_wait(&s.k_full[stage], n / STAGES & 1);
        barrier_wait(&s.v_full[before], (n - 1) / STAGES & 1);
        pin(scores);
        pin(o);
        turn_wait(group);
        wgmma_begin();
        issue_scores(scores, s, group, stage);
        wgmma_commit();
        issue_values<DIM>(o, p, s, before);
        wgmma_commit();
        turn_pass(group);
        wgmma_wait<1>();
        pin(scores);
        if (threadIdx.x % 128 == 0) barrier_arrive(&s.k_empty[stage]);
        softmax(scores, best, total, shrink, mask.on, query, tile * KEYS + 2 * t, window, scale);
        pin(scores);
        wgmma_wait<0>();
        pin(o);
        if (threadIdx.x % 128 == 0) barrier_arrive(&s.v_empty[before]);
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) o[i] *= shrink[i / 2 & 1];
        to_weights(p, scores);
    };
    for (int tile = last - 1; tile >= first; tile--, n++) {
        if (masked(tile)) step(Masked{}, tile);
        else step(Plain{}, tile);
    }
    int stage = (n - 1) % STAGES;
    barrier_wait(&s.v_full[stage], (n - 1) / STAGES & 1);
    pin(o);
    wgmma_begin();
    issue_values<DIM>(o, p, s, stage);
    wgmma_commit();
    wgmma_wait<0>();
    pin(o);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        if (row + 8 * r >= task.count) continue;
        float share = 1.0f / total[r];
        u16 *to = out + ((size_t)(task.row + row + 8 * r) * heads + head) * DIM + 2 * t;
#pragma unroll
        for (int i = 0; i < DIM / 2; i += 4) *(u32 *)(to + i * 2) = bf16_pair(o[i + 2 * r] * share, o[i + 2 * r + 1] * share);
    }
}

// Grid: (heads, tasks). A block of the pool has 1 << `block_shift` tokens. `layer_row`: the layer's first row in the pool seen as rows of DIM elements; `beyond`: a row past
// its end. Scores are scaled by `scale` = log2(e) / sqrt(DIM).
template <int DIM>
DEVICE void prefill_attention(u16 *out, const TensorMap *q_map, const TensorMap *kv_map, const Task *tasks, const int *tables,
                              int heads, int kv_heads, int block_shift, int layer_row, int beyond, int window, float scale) {
    let_next_start();
    wait_for_input();
    extern __shared__ char raw[];
    Shared<DIM> &s = *(Shared<DIM> *)(((u64)raw + 1023) / 1024 * 1024);
    Task task = tasks[blockIdx.y];
    int head = blockIdx.x, kv_head = head / (heads / kv_heads);
    int last = (task.position + task.count - 1) / KEYS;
    int first = window > 0 ? max(0, task.position + 1 - window) / KEYS : 0;
    if (threadIdx.x == 0) {
        barrier_init(&s.q_full, 1);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s.k_full[i], 1);
            barrier_init(&s.v_full[i], 1);
            barrier_init(&s.k_empty[i], 2);
            barrier_init(&s.v_empty[i], 2);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        load_tiles<DIM>(s, q_map, kv_map, task, tables, head, kv_head, kv_heads, block_shift, layer_row, beyond, first, last);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        compute<DIM>(s, out, task, head, heads, window, scale, first, last);
    }
}

#define PREFILL(DIM)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(384, 1) prefill_attention_sm90_##DIM(                                \
        u16 *out, const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap kv_map, const Task *tasks, \
        const int *tables, int heads, int kv_heads, int block_shift, int layer_row, int beyond, int window,            \
        float scale) {                                                                                                 \
        prefill_attention<DIM>(out, &q_map, &kv_map, tasks, tables, heads, kv_heads, block_shift, layer_row, beyond,    \
                               window, scale);                                                                         \
    }
PREFILL(64)
PREFILL(128)
