// What all kernels share: bf16 as 16 bits, 16-byte loads, warp reductions. No headers, so that the run-time
// compiler needs none.
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

#define DEVICE static __device__ __forceinline__
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

DEVICE float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float bf16_float(u16 x) { return __uint_as_float((u32)x << 16); }

// Two floats, rounded to nearest even; `low` in the low half.
DEVICE u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
DEVICE u16 bf16_of(float x) { return (u16)bf16_pair(x, 0.0f); }

// a * b + c on two bf16, and a * b.
DEVICE u32 fma_pairs(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE u32 mul_pairs(u32 a, u32 b) { return fma_pairs(a, b, 0x80008000u); }
DEVICE uint4 mul_pairs(uint4 a, uint4 b) {
    return make_uint4(mul_pairs(a.x, b.x), mul_pairs(a.y, b.y), mul_pairs(a.z, b.z), mul_pairs(a.w, b.w));
}

DEVICE float sum_of_squares(u32 pair) { return bf16_low(pair) * bf16_low(pair) + bf16_high(pair) * bf16_high(pair); }
DEVICE float sum_of_squares(uint4 v) {
    return sum_of_squares(v.x) + sum_of_squares(v.y) + sum_of_squares(v.z) + sum_of_squares(v.w);
}
DEVICE float largest(u32 pair) { return fmaxf(fabsf(bf16_low(pair)), fabsf(bf16_high(pair))); }

DEVICE float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Weights and KV pass through once: keep them out of the way of what is reused.
DEVICE uint4 load_stream(const void *at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

DEVICE uint2 load_stream8(const void *at) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
    return v;
}

// Kernels of a step may start while the one before them ends (programmatic dependent launch, Hopper and later). Every
// thread must wait before it touches what earlier kernels wrote or read, or returns.
DEVICE void wait_for_input() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Of four neighbouring lanes.
DEVICE float sum_of_four(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
DEVICE float warp_sum(float x) {
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
DEVICE float warp_max(float x) {
    for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// Sum over a block of up to 1024 threads; every thread gets it. `shared` holds 32 floats.
DEVICE float block_sum(float x, float *shared) {
    x = warp_sum(x);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = lane < blockDim.x / 32 ? shared[lane] : 0.0f;
    x = warp_sum(x);
    __syncthreads();
    return x;
}

// Numbers of e4m3 (the format is said in kv/fp8.rs).
DEVICE float e4m3_float(u8 x) {
    // Sign, exponent and mantissa where bf16 has them, with an exponent that is 120 too small.
    return bf16_float((u16)((x & 0x80) << 8 | (x & 0x7f) << 4)) * 1.329227995784916e36f;
}
// Two of them, in the second and the fourth byte, as f16 but 2^8 too small: exact, since f16's subnormal numbers reach far enough.
DEVICE u32 half_pair_of_e4m3(u32 x) { return (x & 0x80008000u) | (x >> 1 & 0x3f803f80u); }

// Two floats, rounded to nearest even; what is beyond the largest number becomes it. `low` in the low byte.
DEVICE u16 e4m3_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    __trap();  // The engine refuses such pools on devices without the instruction.
    return 0;
#endif
}

DEVICE u32 half_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// C[16x8] += A[16x16] B[16x8], f16 in, f32 out.
DEVICE void mma_half(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// C[16x8] += A[16x16] B[16x8], bf16 in, f32 out.
DEVICE void mma_bf16(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
