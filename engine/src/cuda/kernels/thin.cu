// Products with few rows of x, bound by reading the weights once.
//
// A block takes 16 rows of the weights (and, gated, the 16 rows of `up` that belong to them), its warps take turns
// along k, 64 numbers at a time. Weights go from memory straight into the registers that feed the tensor cores: they
// are the 16-row side of mma.m16n8k16, up to 8 rows of x each the other. The order of k inside a fragment is free as
// long as both sides agree, so each lane loads 16 consecutive bytes: numbers 8t.. and 32 + 8t.. of rows g and g + 8.

constexpr int WARPS = 8, ROWS = 16, STEP = 64;

DEVICE float silu(float x) { return x / (1.0f + __expf(-x)); }

struct Weights64 {
    uint4 a[2], b[2];  // rows g, g + 8; each: numbers 8t.., 32 + 8t..

    __device__ __forceinline__ void load(const u16 *row_g, const u16 *row_g8, int at) {
        a[0] = load_stream(row_g + at), a[1] = load_stream(row_g + at + 32);
        b[0] = load_stream(row_g8 + at), b[1] = load_stream(row_g8 + at + 32);
    }
    __device__ __forceinline__ void times(const uint4 x[2], float c[4]) const {
        for (int i = 0; i < 2; i++) {
            mma_bf16(c, a[i].x, b[i].x, a[i].y, b[i].y, x[i].x, x[i].y);
            mma_bf16(c, a[i].z, b[i].z, a[i].w, b[i].w, x[i].z, x[i].w);
        }
    }
};

// out[rows, n] (+)= x[rows, k] weights[n, k]^T (+ bias); gated: out = silu(x weights^T) * (x up^T), `up` being the n rows
// after those of `weights`. TILES: rows of x in eights. Grid: n / 16 (rounded up) blocks. k is a multiple of 64.
template <int TILES, bool GATED, typename OUT>
DEVICE void thin(OUT *out, const u16 *x, const u16 *weights, const u16 *bias, int rows, int n, int k, int add) {
    constexpr int SIDES = GATED ? 2 : 1, UNROLL = GATED || TILES > 2 ? 1 : 2;
    __shared__ float sums[WARPS][SIDES][ROWS][TILES * 8];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int first = blockIdx.x * ROWS;
    const u16 *row_g[SIDES], *row_g8[SIDES];
    for (int side = 0; side < SIDES; side++) {
        const u16 *base = weights + (size_t)side * n * k;
        row_g[side] = base + (size_t)min(first + g, n - 1) * k + t * 8;
        row_g8[side] = base + (size_t)min(first + g + 8, n - 1) * k + t * 8;
    }
    float c[SIDES][TILES][4];
    for (int side = 0; side < SIDES; side++)
        for (int tile = 0; tile < TILES; tile++)
            for (int i = 0; i < 4; i++) c[side][tile][i] = 0.0f;

    // The weights do not depend on the kernel before this one: their first loads are under way while it ends.
    Weights64 now[UNROLL][SIDES], next[UNROLL][SIDES];
    auto fetch = [&](Weights64 (&to)[UNROLL][SIDES], int at) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
#pragma unroll
            for (int side = 0; side < SIDES; side++)
                if (at + u * WARPS * STEP < k) to[u][side].load(row_g[side], row_g8[side], at + u * WARPS * STEP);
    };
    fetch(now, warp * STEP);
    wait_for_input();
    const u16 *x_row[TILES];
    for (int tile = 0; tile < TILES; tile++) x_row[tile] = x + (size_t)min(tile * 8 + g, rows - 1) * k + t * 8;
    for (int at = warp * STEP; at < k; at += UNROLL * WARPS * STEP) {
        fetch(next, at + UNROLL * WARPS * STEP);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int here = at + u * WARPS * STEP;
            if (here >= k) break;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                uint4 both[2] = {*(const uint4 *)(x_row[tile] + here), *(const uint4 *)(x_row[tile] + here + 32)};
#pragma unroll
                for (int side = 0; side < SIDES; side++) now[u][side].times(both, c[side][tile]);
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
#pragma unroll
            for (int side = 0; side < SIDES; side++) now[u][side] = next[u][side];
    }
    let_next_start();
    for (int side = 0; side < SIDES; side++)
        for (int tile = 0; tile < TILES; tile++)
            for (int i = 0; i < 4; i++)
                sums[warp][side][g + i / 2 * 8][tile * 8 + 2 * t + i % 2] = c[side][tile][i];
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * TILES * 8; i += WARPS * 32) {
        int row = i / ROWS, column = first + i % ROWS;
        if (row >= rows || column >= n) continue;
        float sum = 0.0f, up = 0.0f;
        for (int w = 0; w < WARPS; w++) {
            sum += sums[w][0][i % ROWS][row];
            if (GATED) up += sums[w][SIDES - 1][i % ROWS][row];
        }
        if (bias) sum += bf16_float(bias[column]);
        if (GATED) sum = silu(sum) * up;
        OUT *to = out + (size_t)row * n + column;
        if constexpr (sizeof(OUT) == 4) {
            *to = sum;
        } else {
            if (add) sum += bf16_float(*to);
            *to = bf16_of(sum);
        }
    }
}

#define THIN(NAME, TILES, GATED, OUT)                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                              \
        NAME##_##TILES(OUT *out, const u16 *x, const u16 *weights, const u16 *bias, int rows, int n, int k, int add) {  \
        thin<TILES, GATED, OUT>(out, x, weights, bias, rows, n, k, add);                                               \
    }
#define THIN_ALL(TILES)                                                                                                \
    THIN(thin, TILES, false, u16)                                                                                      \
    THIN(thin_wide, TILES, false, float)                                                                               \
    THIN(thin_gated, TILES, true, u16)
THIN_ALL(1)
THIN_ALL(2)
THIN_ALL(4)
