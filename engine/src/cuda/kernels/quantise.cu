// Rows of bf16 to e4m3 with one scale a row, so that the largest number becomes 448, e4m3's largest
// (Micikevicius et al. 2022, FP8 formats for deep learning). Weights once, one scale per output; activations in every
// step, one scale per token.

// Grid: rows. `width` in 8-element vectors.
extern "C" __global__ void quantise_rows_e4m3(uint2 *out, float *scales, const uint4 *x, int width) {
    __shared__ float shared[32];
    let_next_start();
    wait_for_input();
    const uint4 *row = x + (size_t)blockIdx.x * width;
    float top = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        uint4 v = row[i];
        u32 words[4] = {v.x, v.y, v.z, v.w};
        for (int j = 0; j < 4; j++) top = fmaxf(top, fmaxf(fabsf(bf16_low(words[j])), fabsf(bf16_high(words[j]))));
    }
    top = warp_max(top);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = top;
    __syncthreads();
    top = threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.0f;
    top = warp_max(top);
    float inverse = top > 0.0f ? 448.0f / top : 1.0f;
    if (threadIdx.x == 0) scales[blockIdx.x] = top > 0.0f ? top / 448.0f : 1.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        uint4 v = row[i];
        u32 words[4] = {v.x, v.y, v.z, v.w};
        u16 pairs[4];
        for (int j = 0; j < 4; j++)
            asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
                : "=h"(pairs[j])
                : "f"(bf16_high(words[j]) * inverse), "f"(bf16_low(words[j]) * inverse));
        out[(size_t)blockIdx.x * width + i] = make_uint2(pairs[0] | (u32)pairs[1] << 16, pairs[2] | (u32)pairs[3] << 16);
    }
}
