// Products with few rows of x, bound by reading the weights once.
//
// A block takes 16 rows of weights at a time (or 32 of them; gated, 16 and the 16 of `up` that belong to them), its warps take turns
// along k, 64 numbers at a time. Weights go from memory straight into the registers that feed the tensor cores: they
// are the 16-row side of mma.m16n8k16, up to 8 rows of x each the other. The order of k inside a fragment is free as
// long as both sides agree, so each lane loads 16 consecutive bytes. Blocks stay until all is done, so that a tile's first weights
// are under way while the last one's sums are added up.
//
// Weights of eight bits become bf16 on the way, exactly, and are multiplied with x as it is: no pass that rounds x, and results
// closer to the unrounded network than those of products in eight bits.

constexpr int WARPS = 8, STEP = 64;

// 64 weights of rows g and g + 8, of which lane (g, t) has numbers 8t.. and 32 + 8t..
struct Bf16 {
    using Number = u16;
    static constexpr int FIRST = 8, SECOND = 32;
    static constexpr bool SCALED = false;
    uint4 a[2], b[2];

    __device__ __forceinline__ void load(const u16 *row_g, const u16 *row_g8) {
        a[0] = load_stream(row_g), a[1] = load_stream(row_g + SECOND);
        b[0] = load_stream(row_g8), b[1] = load_stream(row_g8 + SECOND);
    }
    // What the i-th of four products takes.
    __device__ __forceinline__ void part(int i, u32 (&w)[4]) const {
        const uint4 &g = a[i / 2], &g8 = b[i / 2];
        if (i % 2 == 0) w[0] = g.x, w[1] = g8.x, w[2] = g.y, w[3] = g8.y;
        else w[0] = g.z, w[1] = g8.z, w[2] = g.w, w[3] = g8.w;
    }
};

// As above, of numbers 16t..
template <typename KIND>
struct Eight {
    using Number = u8;
    static constexpr int FIRST = 16, SECOND = 8;
    static constexpr bool SCALED = true;
    uint4 a, b;

    __device__ __forceinline__ void load(const u8 *row_g, const u8 *row_g8) { a = load_stream(row_g), b = load_stream(row_g8); }
    __device__ __forceinline__ void part(int i, u32 (&w)[4]) const {
        u32 g = ((const u32 *)&a)[i], g8 = ((const u32 *)&b)[i];
        w[0] = KIND::wide(__byte_perm(g, 0, KIND::LOW)), w[1] = KIND::wide(__byte_perm(g8, 0, KIND::LOW));
        w[2] = KIND::wide(__byte_perm(g, 0, KIND::HIGH)), w[3] = KIND::wide(__byte_perm(g8, 0, KIND::HIGH));
    }
};
struct OfInt8 {
    // Two bytes in the low half of each 16 bits. 0x4300 is 128, whose last place is 1; a number of 128 more or less sign makes
    // (128 + low seven bits) - (128 or 256).
    static __device__ __forceinline__ u32 wide(u32 bytes) {
        return fma_pairs((bytes & 0x007f007fu) | 0x43004300u, 0x3f803f80u, (bytes & 0x00800080u) | 0xc300c300u);
    }
    static constexpr u32 LOW = 0x4140, HIGH = 0x4342;
};
struct OfFp8 {
    // Two bytes in the high half of each 16 bits: sign, then exponent and mantissa at the low end of bf16's; 2^120 makes up for
    // the difference in bias, and for numbers without a leading 1.
    static __device__ __forceinline__ u32 wide(u32 bytes) {
        u32 moved = (bytes >> 4 & 0x07f007f0u) | (bytes & 0x80008000u);
        return fma_pairs(moved, 0x7b807b80u, 0x80008000u);
    }
    static constexpr u32 LOW = 0x1404, HIGH = 0x3424;
};
using Int8 = Eight<OfInt8>;
using Fp8 = Eight<OfFp8>;

// The product: out[rows, n] (+)= (x[rows, k] weights[n, k]^T) scales (+ bias); gated: out = silu(gate) * up, `up` being the n rows (and
// scales) after those of `weights`. With `norm` x / rms(x) * norm stands for x (Zhang and Sennrich 2019): a row's rms is not known before
// all of it has been seen, but it may as well divide the sums. k is a multiple of 64.
struct Product {
    const u16 *x;
    const float *scales;
    const u16 *bias, *norm;
    float eps;
    int rows, n, k, add;
};

// What each warp comes to: of each row of weights and of x, and the squares of x.
template <int TILES, int BANDS>
struct Shared {
    float sums[WARPS][BANDS][16][TILES * 8], squares[WARPS][TILES * 8];
};

// A lane's weights: those at hand, and those under way. BANDS: rows in sixteens, or gate and up.
template <typename KIND, int BANDS, bool GATED, int UNROLL>
struct Feed {
    static constexpr int ROWS = GATED ? 16 : 16 * BANDS, STRIDE = UNROLL * WARPS * STEP;
    const typename KIND::Number *weights;
    int n, k;
    u32 row_g[BANDS], row_g8[BANDS];  // where they begin, in eights
    KIND now[UNROLL][BANDS], next[UNROLL][BANDS];

    __device__ __forceinline__ void aim(int tile) {
        int lane = threadIdx.x % 32;
        for (int band = 0; band < BANDS; band++) {
            int row = tile * ROWS + (GATED ? 0 : band * 16) + lane / 4, before = GATED ? band * n : 0;
            row_g[band] = (before + min(row, n - 1)) * (u32)(k / 8) + lane % 4 * (KIND::FIRST / 8);
            row_g8[band] = (before + min(row + 8, n - 1)) * (u32)(k / 8) + lane % 4 * (KIND::FIRST / 8);
        }
    }
    __device__ __forceinline__ void fetch(KIND (&to)[UNROLL][BANDS], int at) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
#pragma unroll
            for (int band = 0; band < BANDS; band++) {
                int here = at + u * WARPS * STEP;
                if (here < k) to[u][band].load(weights + (row_g[band] + here / 8) * 8ull, weights + (row_g8[band] + here / 8) * 8ull);
            }
    }
    __device__ __forceinline__ void shift() {
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
#pragma unroll
            for (int band = 0; band < BANDS; band++) now[u][band] = next[u][band];
    }
};

// Numbers `at`.. of a lane's rows of x, normed but for rms, into the sums.
template <typename KIND, int TILES, int BANDS, bool NORMED>
DEVICE void multiply(float (&c)[BANDS][TILES][4], float (&square)[TILES], const KIND (&weights)[BANDS], const u16 *const (&x_row)[TILES],
                     const u16 *norm, int at) {
    constexpr int SECOND = KIND::SECOND / 8;
    uint4 x[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const uint4 *from = (const uint4 *)(x_row[tile] + at);
        x[tile][0] = from[0], x[tile][1] = from[SECOND];
        if constexpr (NORMED) {
            square[tile] += sum_of_squares(x[tile][0]) + sum_of_squares(x[tile][1]);
            const uint4 *by = (const uint4 *)(norm + at);
            x[tile][0] = mul_pairs(x[tile][0], by[0]), x[tile][1] = mul_pairs(x[tile][1], by[SECOND]);
        }
    }
#pragma unroll
    for (int band = 0; band < BANDS; band++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 w[4];
            weights[band].part(i, w);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const uint4 &of = x[tile][i / 2];
                mma_bf16(c[band][tile], w[0], w[1], w[2], w[3], i % 2 ? of.z : of.x, i % 2 ? of.w : of.y);
            }
        }
}

// Adds up what the warps came to, and writes a tile of `out`.
template <typename KIND, int TILES, int BANDS, bool GATED, bool NORMED, typename OUT>
DEVICE void write(OUT *out, const Shared<TILES, BANDS> &s, const Product &of, int tile) {
    constexpr int COLUMNS = GATED ? 16 : 16 * BANDS;
    for (int i = threadIdx.x; i < COLUMNS * TILES * 8; i += WARPS * 32) {
        int row = i / COLUMNS, inside = i % COLUMNS, column = tile * COLUMNS + inside;
        if (row >= of.rows || column >= of.n) continue;
        float sum = 0.0f, up = 0.0f, square = 0.0f;
        for (int w = 0; w < WARPS; w++) {
            sum += s.sums[w][inside / 16][inside % 16][row];
            if (GATED) up += s.sums[w][BANDS - 1][inside][row];
            if (NORMED) square += s.squares[w][row];
        }
        float scale = NORMED ? rsqrtf(square / of.k + of.eps) : 1.0f;
        sum *= scale * (KIND::SCALED ? of.scales[column] : 1.0f);
        if (of.bias) sum += bf16_float(of.bias[column]);
        if (GATED) sum = silu(sum) * (up * scale * (KIND::SCALED ? of.scales[of.n + column] : 1.0f));
        OUT *to = out + (size_t)row * of.n + column;
        if constexpr (sizeof(OUT) == 4) *to = sum;
        else *to = bf16_of(of.add ? sum + bf16_float(*to) : sum);
    }
}

// TILES: rows of x in eights. Grid: at most as many blocks as there are tiles.
template <typename KIND, int TILES, int BANDS, bool GATED, bool NORMED, typename OUT>
DEVICE void thin(Shared<TILES, BANDS> &s, OUT *out, const typename KIND::Number *weights, const Product &of) {
    constexpr int UNROLL = TILES > 2 ? 1 : 128 / (int)sizeof(KIND) / BANDS;
    using Weights = Feed<KIND, BANDS, GATED, UNROLL>;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int tiles = (of.n + Weights::ROWS - 1) / Weights::ROWS;
    // Weights do not depend on the kernels before this one: the first loads are under way while those end.
    Weights feed;
    feed.weights = weights, feed.n = of.n, feed.k = of.k;
    feed.aim(blockIdx.x);
    feed.fetch(feed.now, warp * STEP);
    // All blocks are there: what comes next may begin to fetch where one of them ends.
    let_next_start();
    wait_for_input();
    const u16 *x_row[TILES], *norm = of.norm + t * KIND::FIRST;
    for (int tile = 0; tile < TILES; tile++) x_row[tile] = of.x + (size_t)min(tile * 8 + g, of.rows - 1) * of.k + t * KIND::FIRST;

    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        int after = tile + gridDim.x;
        float c[BANDS][TILES][4] = {}, square[TILES] = {};
        for (int at = warp * STEP; at < of.k; at += Weights::STRIDE) {
            int ahead = at + Weights::STRIDE;
            if (ahead >= of.k && after < tiles) feed.aim(after), ahead = warp * STEP;
            feed.fetch(feed.next, ahead);
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                int here = at + u * WARPS * STEP;
                if (here < of.k) multiply<KIND, TILES, BANDS, NORMED>(c, square, feed.now[u], x_row, norm, here);
            }
            feed.shift();
        }
        if (tile != blockIdx.x) __syncthreads();
        for (int band = 0; band < BANDS; band++)
            for (int j = 0; j < TILES; j++)
                for (int i = 0; i < 4; i++) s.sums[warp][band][g + i / 2 * 8][j * 8 + 2 * t + i % 2] = c[band][j][i];
        for (int j = 0; NORMED && j < TILES; j++) {
            float four = sum_of_four(square[j]);
            if (t == 0) s.squares[warp][j * 8 + g] = four;
        }
        __syncthreads();
        write<KIND, TILES, BANDS, GATED, NORMED>(out, s, of, tile);
    }
}

// Three blocks on a multiprocessor instead of two were 4 % slower with weights of eight bits.
#define THIN(NAME, KIND, TILES, BANDS, GATED, OUT)                                                                     \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                              \
        NAME##_##TILES(OUT *out, const u16 *x, const KIND::Number *weights, const float *scales, const u16 *bias,      \
                       const u16 *norm, float eps, int rows, int n, int k, int add) {                                  \
        __shared__ Shared<TILES, BANDS> s;                                                                             \
        Product of = {x, scales, bias, norm, eps, rows, n, k, add};                                                    \
        if (norm) thin<KIND, TILES, BANDS, GATED, true>(s, out, weights, of);                                          \
        else thin<KIND, TILES, BANDS, GATED, false>(s, out, weights, of);                                              \
    }
#define THIN_EIGHT(NAME, KIND)                                                                                         \
    THIN(NAME, KIND, 1, 1, false, u16)                                                                                 \
    THIN(NAME, KIND, 2, 2, false, u16)                                                                                 \
    THIN(NAME, KIND, 4, 2, false, u16)                                                                                 \
    THIN(NAME##_gated, KIND, 1, 2, true, u16)                                                                          \
    THIN(NAME##_gated, KIND, 2, 2, true, u16)                                                                          \
    THIN(NAME##_gated, KIND, 4, 2, true, u16)
THIN_EIGHT(thin_int8, Int8)
THIN_EIGHT(thin_fp8, Fp8)
THIN(thin_bf16, Bf16, 1, 1, false, u16)
THIN(thin_bf16, Bf16, 2, 2, false, u16)
THIN(thin_bf16, Bf16, 4, 1, false, u16)
THIN(thin_bf16_wide, Bf16, 1, 1, false, float)
THIN(thin_bf16_wide, Bf16, 2, 2, false, float)
THIN(thin_bf16_wide, Bf16, 4, 1, false, float)
THIN(thin_bf16_gated, Bf16, 1, 2, true, u16)
THIN(thin_bf16_gated, Bf16, 2, 2, true, u16)
THIN(thin_bf16_gated, Bf16, 4, 2, true, u16)
