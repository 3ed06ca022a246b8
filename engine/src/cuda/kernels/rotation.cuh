// Rotating heads (RoPE), in registers: a thread has eight dimensions of a head and the eight, half a head later, that they are rotated with.

DEVICE void floats(uint4 v, float (&x)[8]) {
    u32 words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; i++) x[2 * i] = bf16_low(words[i]), x[2 * i + 1] = bf16_high(words[i]);
}

// Eight numbers as bf16 or e4m3.
DEVICE void put(uint4 *to, const float (&x)[8]) {
    *to = make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7]));
}
DEVICE void put(uint2 *to, const float (&x)[8]) {
    *to = make_uint2(e4m3_pair(x[0], x[1]) | (u32)e4m3_pair(x[2], x[3]) << 16,
                     e4m3_pair(x[4], x[5]) | (u32)e4m3_pair(x[6], x[7]) << 16);
}

// What turns heads of one position: cos and sin of each dimension of half a head, and the weights of heads' norms where there are any.
struct Rotation {
    const float2 *angles;
    const uint4 *q_norm, *k_norm;
    float eps;
};

enum Kind { Q, K, V };

// Those of dimensions 8i.. of half a head, two a number.
struct Angles {
    float4 at[4];
    __device__ __forceinline__ Angles(const Rotation &by, int i) {
        for (int j = 0; j < 4; j++) at[j] = ((const float4 *)(by.angles + i * 8))[j];
    }
};

// Dimensions 8i.. of a head, and 8(i + lanes).., as attention takes them; `lanes` neighbouring lanes (a power of two) have one head.
// All lanes of the warp must come here.
DEVICE void turned(float (&a)[8], float (&b)[8], uint4 low, uint4 high, Kind kind, int i, int lanes, const Rotation &by,
                   const Angles &angles) {
    floats(low, a), floats(high, b);
    if (by.q_norm) {
        float sum = sum_of_squares(low) + sum_of_squares(high);
        for (int step = 1; step < lanes; step <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        float scale = rsqrtf(sum / (16 * lanes) + by.eps), of_a[8], of_b[8];
        const uint4 *norm = kind == Q ? by.q_norm : by.k_norm;
        floats(norm[i], of_a), floats(norm[i + lanes], of_b);
        if (kind != V)
            for (int j = 0; j < 8; j++) a[j] *= scale * of_a[j], b[j] *= scale * of_b[j];
    }
    if (kind == V) return;
    for (int j = 0; j < 4; j++) {
        float4 angle = angles.at[j];
        float a0 = a[2 * j], a1 = a[2 * j + 1], b0 = b[2 * j], b1 = b[2 * j + 1];
        a[2 * j] = a0 * angle.x - b0 * angle.y, a[2 * j + 1] = a1 * angle.z - b1 * angle.w;
        b[2 * j] = b0 * angle.x + a0 * angle.y, b[2 * j + 1] = b1 * angle.z + a1 * angle.w;
    }
}
