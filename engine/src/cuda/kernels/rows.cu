// Work on rows of the residual stream: embedding, norms, rotation with the KV write, SwiGLU.

// x[t] = table[tokens[t]]. Grid: tokens. `width` in 8-element vectors. Every step begins here: it gets its own `epoch`.
extern "C" __global__ void embed(uint4 *x, const uint4 *table, const int *tokens, int width, u32 *epoch) {
    let_next_start();
    wait_for_input();
    if (blockIdx.x == 0 && threadIdx.x == 0) *epoch += 1;
    const uint4 *row = table + (size_t)tokens[blockIdx.x] * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) x[(size_t)blockIdx.x * width + i] = row[i];
}

// rows[i] = x[from[i]]: the rows whose logits are wanted. Grid: rows.
extern "C" __global__ void pick_rows(uint4 *out, const uint4 *x, const int *from, int width) {
    let_next_start();
    wait_for_input();
    const uint4 *row = x + (size_t)from[blockIdx.x] * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[(size_t)blockIdx.x * width + i] = row[i];
}

DEVICE u32 normed_pair(u32 pair, u32 weight, float scale) {
    return bf16_pair(bf16_low(pair) * scale * bf16_low(weight), bf16_high(pair) * scale * bf16_high(weight));
}
DEVICE uint4 normed(uint4 v, uint4 weight, float scale) {
    return make_uint4(normed_pair(v.x, weight.x, scale), normed_pair(v.y, weight.y, scale),
                      normed_pair(v.z, weight.z, scale), normed_pair(v.w, weight.w, scale));
}

// y = x / rms(x) * weight (Zhang and Sennrich 2019). Grid: rows. `width` in 8-element vectors.
extern "C" __global__ void rms_norm(uint4 *y, const uint4 *x, const uint4 *weight, int width, float eps) {
    let_next_start();
    wait_for_input();
    __shared__ float shared[32];
    const uint4 *row = x + (size_t)blockIdx.x * width;
    float sum = 0.0f;
    uint4 first = threadIdx.x < width ? row[threadIdx.x] : make_uint4(0, 0, 0, 0);
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += sum_of_squares(i < blockDim.x ? first : row[i]);
    float scale = rsqrtf(block_sum(sum, shared) / (8.0f * width) + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        y[(size_t)blockIdx.x * width + i] = normed(i < blockDim.x ? first : row[i], weight[i], scale);
    }
}

DEVICE u32 gated_pair(u32 gate, u32 up) {
    return bf16_pair(silu(bf16_low(gate)) * bf16_low(up), silu(bf16_high(gate)) * bf16_high(up));
}

// out[t] = silu(gate[t]) * up[t]; both lie in one row of 2 * width vectors. Grid: (vectors, tokens).
extern "C" __global__ void swiglu(uint4 *out, const uint4 *gate_up, int width) {
    let_next_start();
    wait_for_input();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= width) return;
    const uint4 *row = gate_up + (size_t)blockIdx.y * 2 * width;
    uint4 gate = row[i], up = row[width + i];
    out[(size_t)blockIdx.y * width + i] = make_uint4(gated_pair(gate.x, up.x), gated_pair(gate.y, up.y),
                                                     gated_pair(gate.z, up.z), gated_pair(gate.w, up.w));
}

// cos and sin of every position, [positions, half]. In double, since positions are large. Grid: positions.
extern "C" __global__ void rotation_table(float2 *table, const float *frequencies, int half, float factor) {
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        double angle = (double)((float)blockIdx.x * frequencies[i]);
        table[(size_t)blockIdx.x * half + i] = make_float2((float)cos(angle) * factor, (float)sin(angle) * factor);
    }
}

// Rotates q in place, and writes rotated k and plain v into the token's slot of the pool. Grid: (threads for the heads of all kinds,
// tokens); dim is a multiple of 16.
// qkv: [tokens, heads + 2 kv_heads, dim]; layer of the pool: [blocks, 2, kv_heads, block_tokens, dim].
// A vector of eight numbers is a uint4 of bf16 or a uint2 of e4m3.
template <typename Vector>
DEVICE void rotate(uint4 *qkv, Vector *pool_layer, const float2 *table, const int *positions, const int *slots,
                   const uint4 *q_norm, const uint4 *k_norm, float eps, int heads, int kv_heads, int dim, int block_tokens) {
    let_next_start();
    wait_for_input();
    int lanes = dim / 16, thread = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y, kinds = heads + 2 * kv_heads;
    int head = thread / lanes, i = thread % lanes;
    bool there = head < kinds;
    uint4 *in = qkv + ((size_t)token * kinds + (there ? head : 0)) * 2 * lanes;
    Kind kind = head < heads ? Q : head < heads + kv_heads ? K : V;
    Rotation by = {table + (size_t)positions[token] * lanes * 8, q_norm, k_norm, eps};
    float a[8], b[8];
    turned(a, b, in[i], in[i + lanes], kind, i, lanes, by, Angles(by, i));
    int slot = slots[token];
    if (!there || (kind != Q && slot < 0)) return;
    if (kind == Q) {
        put(in + i, a), put(in + i + lanes, b);
        return;
    }
    int kv_head = head - heads - (kind == V ? kv_heads : 0);
    size_t row = ((size_t)(slot / block_tokens) * 2 + (kind == V)) * kv_heads + kv_head;
    Vector *out = pool_layer + (row * block_tokens + slot % block_tokens) * 2 * lanes;
    put(out + i, a), put(out + i + lanes, b);
}

#define ROTATE_AND_STORE(NAME, VECTOR)                                                                                 \
    extern "C" __global__ void NAME(uint4 *qkv, VECTOR *pool_layer, const float2 *table, const int *positions,         \
                                    const int *slots, const uint4 *q_norm, const uint4 *k_norm, float eps, int heads,  \
                                    int kv_heads, int dim, int block_tokens) {                                         \
        rotate(qkv, pool_layer, table, positions, slots, q_norm, k_norm, eps, heads, kv_heads, dim, block_tokens);     \
    }
ROTATE_AND_STORE(rotate_and_store, uint4)
ROTATE_AND_STORE(rotate_and_store_fp8, uint2)

// out[row] = the column of the largest number, the lowest among equals; NaN counts as minus infinity. Grid: rows.
extern "C" __global__ void argmax(int *out, const float *logits, int columns) {
    let_next_start();
    wait_for_input();
    __shared__ float best_of[32];
    __shared__ int at_of[32];
    const float *row = logits + (size_t)blockIdx.x * columns;
    float best = -INFINITY;
    int at = 0x7fffffff;
    for (int i = threadIdx.x; i < columns; i += blockDim.x)
        if (row[i] > best) best = row[i], at = i;
    for (int round = 0; round < 2; round++) {
        for (int step = 16; step > 0; step >>= 1) {
            float other = __shfl_xor_sync(0xffffffffu, best, step);
            int other_at = __shfl_xor_sync(0xffffffffu, at, step);
            if (other > best || (other == best && other_at < at)) best = other, at = other_at;
        }
        if (round == 1) break;
        if (threadIdx.x % 32 == 0) best_of[threadIdx.x / 32] = best, at_of[threadIdx.x / 32] = at;
        __syncthreads();
        bool live = threadIdx.x % 32 < blockDim.x / 32;
        best = live ? best_of[threadIdx.x % 32] : -INFINITY;
        at = live ? at_of[threadIdx.x % 32] : 0x7fffffff;
    }
    if (threadIdx.x == 0) out[blockIdx.x] = at == 0x7fffffff ? 0 : at;
}

// Weights from a seed, the numbers that the host's generator draws: SplitMix64 (Steele, Lea, Flood 2014) per element.
extern "C" __global__ void random_weights(u16 *out, size_t count, u64 state, float deviation) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        u64 z = state + (i + 1) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
        u32 sum = (u32)(z & 0xffff) + (u32)(z >> 16 & 0xffff) + (u32)(z >> 32 & 0xffff) + (u32)(z >> 48);
        out[i] = bf16_of(((float)sum - 131070.0f) * (deviation / 37837.227f));
    }
}

// Reads everything: how fast memory can be read at all. Writes only if the numbers add up to what they never do.
extern "C" __global__ void read_all(u32 *out, const uint4 *in, size_t vectors) {
    u32 sum = 0;
    size_t step = (size_t)gridDim.x * blockDim.x, i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    for (; i + 3 * step < vectors; i += 4 * step) {
        uint4 a = load_stream(in + i), b = load_stream(in + i + step);
        uint4 c = load_stream(in + i + 2 * step), d = load_stream(in + i + 3 * step);
        sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    if (sum == 0x12345679u) *out = sum;
}
