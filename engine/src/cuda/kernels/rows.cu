// Work on rows of the residual stream: embedding, norms, rotation with the KV write, SwiGLU.

// x[t] = table[tokens[t]]. Grid: tokens. `width` in 8-element vectors.
extern "C" __global__ void embed(uint4 *x, const uint4 *table, const int *tokens, int width) {
    let_next_start();
    wait_for_input();
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

DEVICE float sum_of_squares(uint4 v) {
    float sum = 0.0f;
    u32 words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; i++) {
        float low = bf16_low(words[i]), high = bf16_high(words[i]);
        sum += low * low + high * high;
    }
    return sum;
}

DEVICE u32 normed_pair(u32 pair, u32 weight, float scale) {
    return bf16_pair(bf16_low(pair) * scale * bf16_low(weight), bf16_high(pair) * scale * bf16_high(weight));
}

// y = x / rms(x) * weight (Zhang and Sennrich 2019). Grid: rows. `width` in 8-element vectors.
extern "C" __global__ void rms_norm(uint4 *y, const uint4 *x, const uint4 *weight, int width, float eps) {
    let_next_start();
    wait_for_input();
    __shared__ float shared[32];
    const uint4 *row = x + (size_t)blockIdx.x * width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += sum_of_squares(row[i]);
    float scale = rsqrtf(block_sum(sum, shared) / (8.0f * width) + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        uint4 v = row[i], w = weight[i];
        v.x = normed_pair(v.x, w.x, scale);
        v.y = normed_pair(v.y, w.y, scale);
        v.z = normed_pair(v.z, w.z, scale);
        v.w = normed_pair(v.w, w.w, scale);
        y[(size_t)blockIdx.x * width + i] = v;
    }
}

DEVICE float silu(float x) { return x / (1.0f + __expf(-x)); }

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

// Rotates q in place, and writes rotated k and plain v into the token's slot of the pool. One warp per head of a
// token. Grid: (ceil(heads of all kinds / warps), tokens).
// qkv: [tokens, heads + 2 kv_heads, dim]; layer of the pool: [blocks, 2, kv_heads, block_tokens, dim].
extern "C" __global__ void rotate_and_store(u16 *qkv, u16 *pool_layer, const float2 *table, const int *positions,
                                            const int *slots, const u16 *q_norm, const u16 *k_norm, float eps,
                                            int heads, int kv_heads, int dim, int block_tokens) {
    let_next_start();
    wait_for_input();
    int head = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, token = blockIdx.y;
    if (head >= heads + 2 * kv_heads) return;
    u16 *in = qkv + ((size_t)token * (heads + 2 * kv_heads) + head) * dim;
    int slot = slots[token], half = dim / 2;
    bool is_q = head < heads, is_v = head >= heads + kv_heads;
    u16 *out = in;
    if (!is_q) {
        if (slot < 0) return;
        int kv_head = is_v ? head - heads - kv_heads : head - heads;
        size_t row = ((size_t)(slot / block_tokens) * 2 + is_v) * kv_heads + kv_head;
        out = pool_layer + (row * block_tokens + slot % block_tokens) * dim;
    }
    if (is_v) {
        for (int i = lane; i < half; i += 32) ((u32 *)out)[i] = ((u32 *)in)[i];
        return;
    }
    const u32 *norm = (const u32 *)(is_q ? q_norm : k_norm);
    float scale = 1.0f;
    if (norm) {
        float sum = 0.0f;
        for (int i = lane; i < half; i += 32) {
            u32 pair = ((u32 *)in)[i];
            sum += bf16_low(pair) * bf16_low(pair) + bf16_high(pair) * bf16_high(pair);
        }
        scale = rsqrtf(warp_sum(sum) / dim + eps);
    }
    // Pairs of neighbours, as the rotation pairs dimension i with i + half.
    const float4 *angles = (const float4 *)(table + (size_t)positions[token] * half);
    for (int i = lane; i < half / 2; i += 32) {
        u32 low = ((u32 *)in)[i], high = ((u32 *)in)[i + half / 2];
        float a0 = bf16_low(low), a1 = bf16_high(low), b0 = bf16_low(high), b1 = bf16_high(high);
        if (norm) {
            u32 norm_low = norm[i], norm_high = norm[i + half / 2];
            a0 *= scale * bf16_low(norm_low), a1 *= scale * bf16_high(norm_low);
            b0 *= scale * bf16_low(norm_high), b1 *= scale * bf16_high(norm_high);
        }
        float4 angle = angles[i];
        ((u32 *)out)[i] = bf16_pair(a0 * angle.x - b0 * angle.y, a1 * angle.z - b1 * angle.w);
        ((u32 *)out)[i + half / 2] = bf16_pair(b0 * angle.x + a0 * angle.y, b1 * angle.z + a1 * angle.w);
    }
}

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
