// Attention of one new token per sequence as kernels of their own: attend.cuh.

// Where q is, [rows, q_stride] with heads first, and where results go: `out` [rows, heads, DIM], or where keys are split partial [sequences,
// heads, splits, DIM] and stats [.., 2].
template <int DIM>
struct Io {
    u16 *out;
    float *partial;
    float2 *stats;
    const u16 *qkv;
    int q_stride, heads;
    Part part;

    __device__ __forceinline__ void wait() const { wait_for_input(); }
    __device__ __forceinline__ void sync() const { __syncthreads(); }
    __device__ __forceinline__ const u16 *q(int row, int head) const { return qkv + (size_t)row * q_stride + head * DIM; }
    __device__ __forceinline__ void eights(int row, int a, int b, uint4 &low, uint4 &high) const {
        const uint4 *of = (const uint4 *)q(row, 0);
        low = of[a], high = of[b];
    }
    __device__ __forceinline__ void put(int row, int head, int dim, float top, float sum, float value) const {
        if (part.splits == 1) {
            out[((size_t)row * heads + head) * DIM + dim] = bf16_of(value / sum);
            return;
        }
        size_t at = ((size_t)part.sequence * heads + head) * part.splits + part.split;
        partial[at * DIM + dim] = value;
        if (dim == 0) stats[at] = make_float2(top, sum);
    }
};

// Grid: (kv_heads * head groups, splits, sequences); 128 threads.
#define DECODE(NAME, TURNS, DIM, KV, BLOCKS)                                                                           \
    extern "C" __global__ void __launch_bounds__(128, BLOCKS) NAME##_##DIM(                                            \
        u16 *out, float *partial, float2 *stats, const u16 *q, void *pool_layer, const int *tables,                    \
        const int *table_of_row, const int *positions, const int *rows, int q_stride, int heads, int kv_heads,         \
        int block_tokens, int window, float scale_log2, const float2 *angles, const uint4 *q_norm, const uint4 *k_norm, \
        float eps) {                                                                                                   \
        __shared__ AttentionShared<DIM, KV<DIM>, 4> s;                                                                 \
        let_next_start();                                                                                              \
        Attention of = {pool_layer, tables, table_of_row, positions, rows, heads, kv_heads, block_tokens, window, scale_log2, \
                        {angles, q_norm, k_norm, eps}};                                                                \
        Part part = {(int)blockIdx.x, (int)blockIdx.y, (int)gridDim.y, (int)blockIdx.z};                               \
        Io<DIM> io = {out, partial, stats, q, q_stride, heads, part};                                                  \
        attend<DIM, KV<DIM>, TURNS, true, 4>(s, of, part, io);                                                         \
    }
DECODE(decode_attention, false, 64, KvBf16, 2)
DECODE(decode_attention, false, 128, KvBf16, 2)
DECODE(decode_attention_fp8, false, 64, KvFp8, 3)
DECODE(decode_attention_fp8, false, 128, KvFp8, 3)
DECODE(decode_attention_turning, true, 64, KvBf16, 2)
DECODE(decode_attention_turning, true, 128, KvBf16, 2)
DECODE(decode_attention_turning_fp8, true, 64, KvFp8, 3)
DECODE(decode_attention_turning_fp8, true, 128, KvFp8, 3)

// Joins the splits. Grid: (heads, sequences); DIM threads.
extern "C" __global__ void decode_join(u16 *out, const float *partial, const float2 *stats, const int *rows, int splits) {
    let_next_start();
    wait_for_input();
    int heads = gridDim.x, row = rows[blockIdx.y];
    if (row < 0) return;
    size_t at = ((size_t)blockIdx.y * heads + blockIdx.x) * splits;
    partial += at * blockDim.x + threadIdx.x, stats += at;
    float top = -INFINITY, sum = 0.0f, value = 0.0f;
    // Loads wait for nothing but each other.
#pragma unroll 8
    for (int split = 0; split < splits; split++) top = fmaxf(top, stats[split].x);
#pragma unroll 8
    for (int split = 0; split < splits; split++) {
        float2 stat = stats[split];
        float share = stat.x == -INFINITY ? 0.0f : exp2_fast(stat.x - top);
        sum += stat.y * share;
        value += partial[(size_t)split * blockDim.x] * share;
    }
    out[((size_t)row * heads + blockIdx.x) * blockDim.x + threadIdx.x] = bf16_of(value / sum);
}
