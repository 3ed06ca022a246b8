// Products of 16 rows of weights, 64 numbers at a time, with up to four rows of x, both in shared memory.
//
// Weights are the 16-row side of the tensor cores' products, x the other. The order of k inside a fragment is free as long as both sides agree,
// so each lane loads 16 consecutive bytes: lane (g, t) has rows g and g + 8 of weights and row g of x.

DEVICE uint4 load_shared(const void *at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared_address(at)));
    return v;
}

struct Bf16 {
    static constexpr int WIDTH = 2, LANE = 8;  // bytes of a number; numbers from lane to lane
    static constexpr int X_PAD = 32;           // between rows of x in shared memory, so that they lie in different banks
    static constexpr bool SCALED = false, DIGITS = false;
    static constexpr float LARGEST = 1.0f;
    struct Sums {
        float c[2][4] = {};
    };
    uint4 a[2], b[2], x[2];

    __device__ __forceinline__ void load(const u8 *row_g, const u8 *row_g8, const u8 *x_at) {
        for (int i = 0; i < 2; i++)
            a[i] = load_shared(row_g + 64 * i), b[i] = load_shared(row_g8 + 64 * i), x[i] = load_shared(x_at + 64 * i);
    }
    __device__ __forceinline__ void multiply(Sums &s) const {
        for (int i = 0; i < 2; i++) {
            mma_bf16(s.c[i], a[i].x, b[i].x, a[i].y, b[i].y, x[i].x, x[i].y);
            mma_bf16(s.c[i], a[i].z, b[i].z, a[i].w, b[i].w, x[i].z, x[i].w);
        }
    }
    static __device__ __forceinline__ float4 result(const Sums &s) {
        return make_float4(s.c[0][0] + s.c[1][0], s.c[0][1] + s.c[1][1], s.c[0][2] + s.c[1][2], s.c[0][3] + s.c[1][3]);
    }
    static __device__ __forceinline__ void pack(uint4 (&)[2], float) {}
};

// x as f16, scaled so that the largest of a row is 2048; e4m3 is f16 exactly.
struct Fp8 {
    static constexpr int WIDTH = 1, LANE = 16, X_PAD = 8;
    static constexpr bool SCALED = true, DIGITS = false;
    static constexpr float LARGEST = 2048.0f;
    struct Sums {
        float c[2][4] = {};
    };
    uint4 a, b, x[2];

    static __device__ __forceinline__ u32 wide(u32 word, int half) {
        u32 two;
        asm("{.reg .b16 l, h;\n mov.b32 {l, h}, %1;\n cvt.rn.f16x2.e4m3x2 %0, l;\n}" : "=r"(two) : "r"(half ? word >> 16 : word));
        return two;
    }
    __device__ __forceinline__ void load(const u8 *row_g, const u8 *row_g8, const u8 *x_at) {
        a = load_shared(row_g), b = load_shared(row_g8), x[0] = load_shared(x_at), x[1] = load_shared(x_at + 16);
    }
    __device__ __forceinline__ void multiply(Sums &s) const {
        u32 of_g[4] = {a.x, a.y, a.z, a.w}, of_g8[4] = {b.x, b.y, b.z, b.w};
        for (int i = 0; i < 4; i++) {
            const uint4 &of = x[i / 2];
            mma_half(s.c[i % 2], wide(of_g[i], 0), wide(of_g8[i], 0), wide(of_g[i], 1), wide(of_g8[i], 1), i % 2 ? of.z : of.x,
                     i % 2 ? of.w : of.y);
        }
    }
    static __device__ __forceinline__ float4 result(const Sums &s) {
        return make_float4(s.c[0][0] + s.c[1][0], s.c[0][1] + s.c[1][1], s.c[0][2] + s.c[1][2], s.c[0][3] + s.c[1][3]);
    }
    // Sixteen numbers.
    static __device__ __forceinline__ void pack(uint4 (&of)[2], float scale) {
        u32 *words = (u32 *)of;
        for (int i = 0; i < 8; i++) words[i] = half_pair(bf16_low(words[i]) * scale, bf16_high(words[i]) * scale);
    }
};

// x as whole numbers of 16 bits, the largest of a row being 127 * 256, so that no number is off by more than 2^-16 of the largest, of which bf16 has
// 2^-9: two digits of eight bits, multiplied exactly. They share a product:
// its rows 0 to 3 of x are the high digits of the four rows, 4 to 7 the low ones.
struct Int8 {
    static constexpr int WIDTH = 1, LANE = 16, X_PAD = 8;
    static constexpr bool SCALED = true, DIGITS = true;
    static constexpr float LARGEST = 32512.0f;
    struct Sums {
        int c[2][4] = {};
    };
    uint4 a, b, x;

    static __device__ __forceinline__ void mma(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
        asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
    __device__ __forceinline__ void load(const u8 *row_g, const u8 *row_g8, const u8 *x_at) {
        a = load_shared(row_g), b = load_shared(row_g8), x = load_shared(x_at);
    }
    __device__ __forceinline__ void multiply(Sums &s) const {
        mma(s.c[0], a.x, b.x, a.y, b.y, x.x, x.y);
        mma(s.c[1], a.z, b.z, a.w, b.w, x.z, x.w);
    }
    static __device__ __forceinline__ float4 result(const Sums &s) {
        float v[4];
        for (int i = 0; i < 4; i++) {
            v[i] = (threadIdx.x % 4 < 2 ? 256.0f : 1.0f) * (float)(s.c[0][i] + s.c[1][i]);
            v[i] += __shfl_xor_sync(0xffffffffu, v[i], 2);
        }
        return make_float4(v[0], v[1], v[2], v[3]);
    }
    static __device__ __forceinline__ void pack(uint4 (&of)[2], float scale) {
        const u32 *words = (const u32 *)of;
        u32 high[4], low[4];
        for (int i = 0; i < 4; i++) {
            u32 q[4];
            for (int j = 0; j < 4; j++) {
                u32 word = words[i * 2 + j / 2];
                q[j] = __float2int_rn((j % 2 ? bf16_high(word) : bf16_low(word)) * scale);
            }
            low[i] = __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
            // What a low digit of -128 to 127 leaves.
            for (int j = 0; j < 4; j++) q[j] += 128;
            high[i] = __byte_perm(__byte_perm(q[0], q[1], 0x0051), __byte_perm(q[2], q[3], 0x0051), 0x5410);
        }
        of[0] = make_uint4(high[0], high[1], high[2], high[3]), of[1] = make_uint4(low[0], low[1], low[2], low[3]);
    }
};
