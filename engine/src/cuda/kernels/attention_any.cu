// Attention for any head size, one warp per query and head: the reference that the fast kernels are tested against,
// and what runs for head sizes that they do not know.

DEVICE float number(u16 x) { return bf16_float(x); }
DEVICE float number(u8 x) { return e4m3_float(x); }

// q: rows of `q_stride`, heads of `dim`; out: rows of heads * dim. Grid: (rows, heads).
template <typename Kv>
DEVICE void attend(u16 *out, const u16 *q, const Kv *pool_layer, const int *tables, const int *table_of_row,
                   const int *positions, int q_stride, int heads, int kv_heads, int dim, int block_tokens, int window,
                   float scale_log2) {
    let_next_start();
    wait_for_input();
    extern __shared__ float scratch[];  // [2][dim]: the query, the output
    int row = blockIdx.x, head = blockIdx.y, lane = threadIdx.x;
    float *query = scratch, *sum = scratch + dim;
    const u16 *from = q + (size_t)row * q_stride + head * dim;
    for (int i = lane; i < dim; i += 32) query[i] = bf16_float(from[i]), sum[i] = 0.0f;
    __syncwarp();
    int position = positions[row], kv_head = head / (heads / kv_heads);
    const int *table = tables + table_of_row[row];
    int first = window > 0 && position + 1 > window ? position + 1 - window : 0;
    float best = -INFINITY, total = 0.0f;
    for (int key = first; key <= position; key++) {
        size_t k_row = ((size_t)table[key / block_tokens] * 2 * kv_heads + kv_head) * block_tokens + key % block_tokens;
        const Kv *k = pool_layer + k_row * dim, *v = k + (size_t)kv_heads * block_tokens * dim;
        float score = 0.0f;
        for (int i = lane; i < dim; i += 32) score += query[i] * number(k[i]);
        score = warp_sum(score) * scale_log2;
        float now = fmaxf(best, score), shrink = exp2_fast(best - now), weight = exp2_fast(score - now);
        for (int i = lane; i < dim; i += 32) sum[i] = sum[i] * shrink + weight * number(v[i]);
        total = total * shrink + weight;
        best = now;
    }
    for (int i = lane; i < dim; i += 32) out[((size_t)row * heads + head) * dim + i] = bf16_of(sum[i] / total);
}

#define ATTENTION_ANY(NAME, KV)                                                                                        \
    extern "C" __global__ void NAME(u16 *out, const u16 *q, const KV *pool_layer, const int *tables,                   \
                                    const int *table_of_row, const int *positions, int q_stride, int heads,            \
                                    int kv_heads, int dim, int block_tokens, int window, float scale_log2) {           \
        attend(out, q, pool_layer, tables, table_of_row, positions, q_stride, heads, kv_heads, dim, block_tokens,      \
               window, scale_log2);                                                                                    \
    }
ATTENTION_ANY(attention_any, u16)
ATTENTION_ANY(attention_any_fp8, u8)
