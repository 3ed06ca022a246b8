// Products with few rows of x and weights of eight bits, bound by reading the weights once.
//
// As thin.cu: weights go from memory straight into the registers that feed the tensor cores. On the way they become bf16,
// exactly, and are multiplied with x as it is: no pass that rounds x, and results closer to the unrounded network than those of
// products in eight bits. Each lane loads 16 consecutive numbers of rows g and g + 8 (and, for more rows of x, of 16 rows more:
// x is read once per block, so taller blocks read it less often).

constexpr int WARPS = 8, STEP = 64;

DEVICE float silu(float x) { return x / (1.0f + __expf(-x)); }

// a * b + c on two bf16.
DEVICE u32 fma_pairs(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

struct Int8 {
    // Two bytes in the low half of each 16 bits. 0x4300 is 128, whose last place is 1; a number of 128 more or less sign makes
    // (128 + low seven bits) - (128 or 256).
    static __device__ __forceinline__ u32 wide(u32 bytes) {
        return fma_pairs((bytes & 0x007f007fu) | 0x43004300u, 0x3f803f80u, (bytes & 0x00800080u) | 0xc300c300u);
    }
    static constexpr u32 LOW = 0x4140, HIGH = 0x4342;
};

struct Fp8 {
    // Two bytes in the high half of each 16 bits: sign, then exponent and mantissa at the low end of bf16's; 2^120 makes up for
    // the difference in bias, and for numbers without a leading 1.
    static __device__ __forceinline__ u32 wide(u32 bytes) {
        u32 moved = (bytes >> 4 & 0x07f007f0u) | (bytes & 0x80008000u);
        return fma_pairs(moved, 0x7b807b80u, 0x80008000u);
    }
    static constexpr u32 LOW = 0x1404, HIGH = 0x3424;
};

// Sixteen weights of rows g and g + 8.
struct Weights16 {
    uint4 a, b;

    template <typename KIND>
    __device__ __forceinline__ void times(int word, u32 (&pairs)[4]) const {
        u32 of_a = ((const u32 *)&a)[word], of_b = ((const u32 *)&b)[word];
        pairs[0] = KIND::wide(__byte_perm(of_a, 0, KIND::LOW)), pairs[1] = KIND::wide(__byte_perm(of_b, 0, KIND::LOW));
        pairs[2] = KIND::wide(__byte_perm(of_a, 0, KIND::HIGH)), pairs[3] = KIND::wide(__byte_perm(of_b, 0, KIND::HIGH));
    }
};

// out[rows, n] (+)= (x[rows, k] weights[n, k]^T) scales (+ bias); gated: out = silu(gate) * up, `up` being the n rows (and scales)
// after those of `weights`. TILES: rows of x in eights; BANDS: rows of weights in sixteens, or gate and up. Grid: n over rows
// of weights, rounded up. k is a multiple of 64.
template <typename KIND, int TILES, int BANDS, bool GATED>
DEVICE void thin(u16 *out, const u16 *x, const u8 *weights, const float *scales, const u16 *bias, int rows, int n, int k,
                 int add) {
    constexpr int UNROLL = TILES > 2 ? 1 : BANDS > 1 ? 2 : 4, COLUMNS = GATED ? 16 : 16 * BANDS;
    __shared__ float sums[WARPS][BANDS][16][TILES * 8];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int first = blockIdx.x * COLUMNS;
    const u8 *row_g[BANDS], *row_g8[BANDS];
    for (int band = 0; band < BANDS; band++) {
        const u8 *base = weights + (GATED ? (size_t)band * n * k : 0);
        int row = first + (GATED ? 0 : band * 16) + g;
        row_g[band] = base + (size_t)min(row, n - 1) * k + t * 16;
        row_g8[band] = base + (size_t)min(row + 8, n - 1) * k + t * 16;
    }
    float c[BANDS][TILES][4];
    for (int band = 0; band < BANDS; band++)
        for (int tile = 0; tile < TILES; tile++)
            for (int i = 0; i < 4; i++) c[band][tile][i] = 0.0f;

    // The weights do not depend on the kernel before this one: their first loads are under way while it ends.
    Weights16 now[UNROLL][BANDS], next[UNROLL][BANDS];
    auto fetch = [&](Weights16 (&to)[UNROLL][BANDS], int at) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
#pragma unroll
            for (int band = 0; band < BANDS; band++) {
                int here = at + u * WARPS * STEP;
                if (here < k) to[u][band] = {load_stream(row_g[band] + here), load_stream(row_g8[band] + here)};
            }
    };
    fetch(now, warp * STEP);
    wait_for_input();
    const u16 *x_row[TILES];
    for (int tile = 0; tile < TILES; tile++) x_row[tile] = x + (size_t)min(tile * 8 + g, rows - 1) * k + t * 16;
    for (int at = warp * STEP; at < k; at += UNROLL * WARPS * STEP) {
        fetch(next, at + UNROLL * WARPS * STEP);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int here = at + u * WARPS * STEP;
            if (here >= k) break;
            uint4 both[TILES][2];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                both[tile][0] = *(const uint4 *)(x_row[tile] + here);
                both[tile][1] = *(const uint4 *)(x_row[tile] + here + 8);
            }
#pragma unroll
            for (int band = 0; band < BANDS; band++)
#pragma unroll
                for (int word = 0; word < 4; word++) {
                    u32 w[4];
                    now[u][band].template times<KIND>(word, w);
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        const u32 *four = (const u32 *)&both[tile][word / 2] + word % 2 * 2;
                        mma_bf16(c[band][tile], w[0], w[1], w[2], w[3], four[0], four[1]);
                    }
                }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
#pragma unroll
            for (int band = 0; band < BANDS; band++) now[u][band] = next[u][band];
    }
    let_next_start();
    for (int band = 0; band < BANDS; band++)
        for (int tile = 0; tile < TILES; tile++)
            for (int i = 0; i < 4; i++)
                sums[warp][band][g + i / 2 * 8][tile * 8 + 2 * t + i % 2] = c[band][tile][i];
    __syncthreads();
    for (int i = threadIdx.x; i < COLUMNS * TILES * 8; i += WARPS * 32) {
        int row = i / COLUMNS, inside = i % COLUMNS, column = first + inside, band = inside / 16;
        if (row >= rows || column >= n) continue;
        float sum = 0.0f, up = 0.0f;
        for (int w = 0; w < WARPS; w++) {
            sum += sums[w][band][inside % 16][row];
            if (GATED) up += sums[w][BANDS - 1][inside][row];
        }
        sum *= scales[column];
        if (bias) sum += bf16_float(bias[column]);
        if (GATED) sum = silu(sum) * (up * scales[n + column]);
        u16 *to = out + (size_t)row * n + column;
        if (add) sum += bf16_float(*to);
        *to = bf16_of(sum);
    }
}

// Three blocks on a multiprocessor instead of two were 4 % slower.
#define THIN(NAME, KIND, TILES, BANDS, GATED)                                                                          \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                              \
        NAME##_##TILES(u16 *out, const u16 *x, const u8 *weights, const float *scales, const u16 *bias, int rows, int n, \
                       int k, int add) {                                                                               \
        thin<KIND, TILES, BANDS, GATED>(out, x, weights, scales, bias, rows, n, k, add);                               \
    }
#define THIN_ALL(NAME, KIND)                                                                                           \
    THIN(NAME, KIND, 1, 1, false)                                                                                      \
    THIN(NAME, KIND, 2, 2, false)                                                                                      \
    THIN(NAME, KIND, 4, 2, false)                                                                                      \
    THIN(NAME##_gated, KIND, 1, 2, true)                                                                               \
    THIN(NAME##_gated, KIND, 2, 2, true)                                                                               \
    THIN(NAME##_gated, KIND, 4, 2, true)
THIN_ALL(thin_int8, Int8)
THIN_ALL(thin_fp8, Fp8)
