// INT8 products on Hopper: out[rows, n] (+)= (x[rows, k] · weights[n, k]^T) · scale of the row · scale of the column (+ bias).
//
// A block computes tiles of 128 rows by N columns: one thread feeds boxes of 128 numbers of k through the bulk copy engine,
// two warp groups multiply 64 rows each in the asynchronous tensor cores. Blocks stay and take tile after tile, so that the
// next tile's loads run while the last one's results are written. Sums are whole numbers, exact in any order; the scales come
// in as the results leave the registers, so nothing of 32 bits is written to memory.

constexpr int ROWS = 128, DEPTH = 128, GROUP = 16;

#define D4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define D16(d, i) D4(d, i), D4(d, i + 4), D4(d, i + 8), D4(d, i + 12)
#define D32(d, i) D16(d, i), D16(d, i + 16)
#define L32 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define L64                                                                                                            \
    L32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
        "%59,%60,%61,%62,%63"
#define L128                                                                                                           \
    L64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90," \
        "%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,"     \
        "%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d[64 x N] (+)= a b, both with k contiguous in shared memory, 32 numbers of it.
DEVICE void multiply(int (&d)[32], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " L32 "}, %32, %33, p;\n}"
                 : D32(d, 0)
                 : "l"(a), "l"(b), "r"(add));
}
DEVICE void multiply(int (&d)[64], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " L64 "}, %64, %65, p;\n}"
                 : D32(d, 0), D32(d, 32)
                 : "l"(a), "l"(b), "r"(add));
}
DEVICE void multiply(int (&d)[128], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 " L128 "}, %128, %129, p;\n}"
                 : D32(d, 0), D32(d, 32), D32(d, 64), D32(d, 96)
                 : "l"(a), "l"(b), "r"(add));
}
template <int N>
DEVICE void pin(int (&d)[N]) {
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(d[i])::"memory");
}

template <int N, int STAGES>
struct Shared {
    u8 x[STAGES][ROWS][DEPTH];
    u8 w[STAGES][N][DEPTH];
    u64 full[STAGES], empty[STAGES];
};

// The place of a tile: bands of 16 tiles of rows, so that what runs at the same time shares weights and x in the cache.
struct Place {
    int row, column;
};
template <int N>
DEVICE Place place(int tile, int row_tiles, int column_tiles) {
    int band = tile / (GROUP * column_tiles), inside = tile % (GROUP * column_tiles);
    int high = min(GROUP, row_tiles - band * GROUP);
    return {(band * GROUP + inside % high) * ROWS, inside / high * N};
}

template <int N, int STAGES>
DEVICE void load(Shared<N, STAGES> &s, const TensorMap *x_map, const TensorMap *w_map, int tiles, int row_tiles,
                 int column_tiles, int steps) {
    int n = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        Place at = place<N>(tile, row_tiles, column_tiles);
        for (int step = 0; step < steps; step++, n++) {
            int stage = n % STAGES;
            barrier_wait(&s.empty[stage], (n / STAGES + 1) & 1);
            barrier_expect(&s.full[stage], (ROWS + N) * DEPTH);
            // The maps count in pairs of numbers.
            load_box(s.w[stage], w_map, step * (DEPTH / 2), at.column, &s.full[stage]);
            load_box(s.x[stage], x_map, step * (DEPTH / 2), at.row, &s.full[stage]);
        }
    }
}

struct Target {
    u16 *out;
    const float *row_scales, *column_scales;
    const u16 *bias;
    int rows, n, add;
};

template <int N>
DEVICE void write(const Target &to, const int (&sums)[N / 2], int row, int column) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    row += warp * 16 + lane / 4, column += lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int here = row + half * 8;
        if (here >= to.rows) continue;
        float scale = to.row_scales[here];
        u16 *line = to.out + (size_t)here * to.n;
        // Eight at a time: all they need is asked for before the first is written.
#pragma unroll
        for (int first = 0; first < N / 8; first += 8) {
            float2 columns[8];
            u32 before[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                int c = min(column + (first + j) * 8, to.n - 2);
                columns[j] = *(const float2 *)(to.column_scales + c);
                before[j] = to.add ? *(const u32 *)(line + c) : 0;
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                int c = column + (first + j) * 8, at = 4 * (first + j) + 2 * half;
                float a = (float)sums[at] * (scale * columns[j].x), b = (float)sums[at + 1] * (scale * columns[j].y);
                if (to.bias && c < to.n) a += bf16_float(to.bias[c]), b += bf16_float(to.bias[c + 1]);
                if (c < to.n) *(u32 *)(line + c) = bf16_pair(a + bf16_low(before[j]), b + bf16_high(before[j]));
            }
        }
    }
}

template <int N, int STAGES>
DEVICE void compute(Shared<N, STAGES> &s, const Target &to, int tiles, int row_tiles, int column_tiles, int steps) {
    int group = threadIdx.x / 128 - 1, n = 0;
    int sums[N / 2];
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        for (int step = 0; step < steps; step++, n++) {
            int stage = n % STAGES;
            barrier_wait(&s.full[stage], n / STAGES & 1);
            u32 x = shared_address(s.x[stage][group * 64]), w = shared_address(s.w[stage]);
            pin(sums);
            wgmma_begin();
#pragma unroll
            for (int i = 0; i < DEPTH / 32; i++)
                multiply(sums, descriptor(x + i * 32, 16), descriptor(w + i * 32, 16), step > 0 || i > 0);
            wgmma_commit();
            // The products before these have left their stage.
            wgmma_wait<1>();
            if (step > 0 && threadIdx.x % 128 == 0) barrier_arrive(&s.empty[(n - 1) % STAGES]);
        }
        wgmma_wait<0>();
        pin(sums);
        if (threadIdx.x % 128 == 0) barrier_arrive(&s.empty[(n - 1) % STAGES]);
        Place at = place<N>(tile, row_tiles, column_tiles);
        write<N>(to, sums, at.row + group * 64, at.column);
    }
}

// Grid: as many blocks as fit, at most one per tile.
template <int N, int STAGES>
DEVICE void wide(const TensorMap *x_map, const TensorMap *w_map, Target to, int k) {
    extern __shared__ char raw[];
    Shared<N, STAGES> &s = *(Shared<N, STAGES> *)(((u64)raw + 1023) / 1024 * 1024);
    int row_tiles = (to.rows + ROWS - 1) / ROWS, column_tiles = (to.n + N - 1) / N;
    int tiles = row_tiles * column_tiles, steps = (k + DEPTH - 1) / DEPTH;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s.full[i], 1);
            barrier_init(&s.empty[i], 2);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    let_next_start();
    wait_for_input();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) load<N, STAGES>(s, x_map, w_map, tiles, row_tiles, column_tiles, steps);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        compute<N, STAGES>(s, to, tiles, row_tiles, column_tiles, steps);
    }
}

#define WIDE(N, STAGES)                                                                                                \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                              \
        wide8_##N(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, u16 *out,          \
                  const float *row_scales, const float *column_scales, const u16 *bias, int rows, int n, int k, int add) { \
        wide<N, STAGES>(&x_map, &w_map, {out, row_scales, column_scales, bias, rows, n, add}, k);                       \
    }
WIDE(64, 8)
WIDE(128, 6)
WIDE(256, 4)
