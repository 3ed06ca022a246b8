// Rows of bf16 in eight bits with one scale a row: e4m3, so that the largest number becomes 448 (Micikevicius et al. 2022, FP8
// formats for deep learning), or INT8, so that it becomes 127. Weights once, one scale per output; activations in every step,
// one scale per token, where they can in the kernel that makes them.

// Eight bf16 of one vector.
struct Eight {
    float x[8];
    __device__ __forceinline__ void load(uint4 v) {
        u32 words[4] = {v.x, v.y, v.z, v.w};
        for (int j = 0; j < 4; j++) x[2 * j] = bf16_low(words[j]), x[2 * j + 1] = bf16_high(words[j]);
    }
};

struct Fp8 {
    static constexpr float TOP = 448.0f;
    static __device__ __forceinline__ uint2 round(const float (&x)[8], float inverse) {
        u16 pairs[4];
        for (int j = 0; j < 4; j++)
            asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
                : "=h"(pairs[j])
                : "f"(x[2 * j + 1] * inverse), "f"(x[2 * j] * inverse));
        return make_uint2(pairs[0] | (u32)pairs[1] << 16, pairs[2] | (u32)pairs[3] << 16);
    }
};

struct Int8 {
    static constexpr float TOP = 127.0f;
    // As the host rounds, bit for bit: one product, rounded, then to the nearest whole number, ties to even.
    static __device__ __forceinline__ u32 number(float x, float inverse) {
        return (u32)__float2int_rn(__fmul_rn(x, inverse)) & 0xff;
    }
    static __device__ __forceinline__ uint2 round(const float (&x)[8], float inverse) {
        u32 words[2];
        for (int j = 0; j < 2; j++)
            words[j] = number(x[4 * j], inverse) | number(x[4 * j + 1], inverse) << 8 |
                       number(x[4 * j + 2], inverse) << 16 | number(x[4 * j + 3], inverse) << 24;
        return make_uint2(words[0], words[1]);
    }
};

// The row's scale into `scales`, its inverse to every thread. Not finite numbers show as a scale of NaN. All threads of a block
// of up to 1024 call it; `shared` holds 32 numbers.
template <typename KIND>
DEVICE float scale_of(u32 top, u32 *shared, float *scales) {
    for (int step = 16; step > 0; step >>= 1) top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = top;
    __syncthreads();
    top = threadIdx.x % 32 < (blockDim.x + 31) / 32 ? shared[threadIdx.x % 32] : 0;
    for (int step = 16; step > 0; step >>= 1) top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
    bool tiny = top < 0x0da24260u, broken = top >= 0x7f800000u;
    float largest = __uint_as_float(top);
    if (threadIdx.x == 0)
        scales[blockIdx.x] = broken ? __uint_as_float(0x7fffffffu) : tiny ? 1.0f : __fdiv_rn(largest, KIND::TOP);
    return tiny || broken ? 0.0f : __fdiv_rn(KIND::TOP, largest);
}
// Compared as integers: exact, and NaN is the largest.
DEVICE u32 top_of(const float (&x)[8]) {
    u32 top = 0;
    for (int j = 0; j < 8; j++) top = max(top, __float_as_uint(x[j]) & 0x7fffffffu);
    return top;
}

// Grid: rows. `width` in 8-element vectors.
template <typename KIND>
DEVICE void quantise_rows(uint2 *out, float *scales, const uint4 *x, int width) {
    __shared__ u32 shared[32];
    let_next_start();
    wait_for_input();
    const uint4 *row = x + (size_t)blockIdx.x * width;
    Eight eight;
    u32 top = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) eight.load(row[i]), top = max(top, top_of(eight.x));
    float inverse = scale_of<KIND>(top, shared, scales);
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        eight.load(row[i]), out[(size_t)blockIdx.x * width + i] = KIND::round(eight.x, inverse);
}

// y = x / rms(x) * weight, rounded to bf16 as `rms_norm` does, then to eight bits. Grid: rows, at most 1024 vectors wide.
template <typename KIND>
DEVICE void norm_rows(uint2 *out, float *scales, const uint4 *x, const uint4 *weight, int width, float eps) {
    __shared__ float sums[32];
    __shared__ u32 shared[32];
    let_next_start();
    wait_for_input();
    int i = threadIdx.x;
    Eight v, w;
    float sum = 0.0f;
    if (i < width) {
        v.load(x[(size_t)blockIdx.x * width + i]), w.load(weight[i]);
        for (int j = 0; j < 8; j += 2) sum += v.x[j] * v.x[j] + v.x[j + 1] * v.x[j + 1];
    }
    float scale = rsqrtf(block_sum(sum, sums) / (8.0f * width) + eps);
    u32 top = 0;
    if (i < width) {
        for (int j = 0; j < 8; j += 2) {
            u32 pair = bf16_pair(v.x[j] * scale * w.x[j], v.x[j + 1] * scale * w.x[j + 1]);
            v.x[j] = bf16_low(pair), v.x[j + 1] = bf16_high(pair);
        }
        top = top_of(v.x);
    }
    float inverse = scale_of<KIND>(top, shared, scales);
    if (i < width) out[(size_t)blockIdx.x * width + i] = KIND::round(v.x, inverse);
}

// silu(gate) * up, rounded to bf16 as `swiglu` does, then to eight bits. Grid: rows. The row waits in shared memory, 16 bytes a
// vector.
template <typename KIND>
DEVICE void swiglu_rows(uint2 *out, float *scales, const uint4 *gate_up, int width) {
    extern __shared__ uint4 line[];
    __shared__ u32 shared[32];
    let_next_start();
    wait_for_input();
    const uint4 *row = gate_up + (size_t)blockIdx.x * 2 * width;
    u32 top = 0;
    Eight gate, up;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        gate.load(row[i]), up.load(row[width + i]);
        u32 pairs[4];
        for (int j = 0; j < 4; j++) {
            pairs[j] = bf16_pair(silu(gate.x[2 * j]) * up.x[2 * j], silu(gate.x[2 * j + 1]) * up.x[2 * j + 1]);
        }
        line[i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        gate.load(line[i]), top = max(top, top_of(gate.x));
    }
    float inverse = scale_of<KIND>(top, shared, scales);
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        gate.load(line[i]), out[(size_t)blockIdx.x * width + i] = KIND::round(gate.x, inverse);
}

#define QUANTISE(NAME, KIND)                                                                                           \
    extern "C" __global__ void quantise_rows_##NAME(uint2 *out, float *scales, const uint4 *x, int width) {             \
        quantise_rows<KIND>(out, scales, x, width);                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void norm_rows_##NAME(uint2 *out, float *scales, const uint4 *x, const uint4 *weight,         \
                                                int width, float eps) {                                                \
        norm_rows<KIND>(out, scales, x, weight, width, eps);                                                           \
    }                                                                                                                  \
    extern "C" __global__ void swiglu_rows_##NAME(uint2 *out, float *scales, const uint4 *gate_up, int width) {         \
        swiglu_rows<KIND>(out, scales, gate_up, width);                                                                \
    }
QUANTISE(int8, Int8)
QUANTISE(fp8, Fp8)
