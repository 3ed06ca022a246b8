// Products of many rows on Hopper: out[rows, n] (+)= (x[rows, k] · weights[n, k]^T) · scale of the row · scale of the column (+ bias),
// or silu of one such product times another: gate and up of an MLP.
//
// A block computes tiles of 128 rows by N columns: one thread feeds boxes of 128 bytes of k through the bulk copy engine,
// two warp groups multiply 64 rows each in the asynchronous tensor cores. Blocks stay and take tile after tile, so that the
// next tile's loads run while the last one's results are written. Scales and SwiGLU come in as the results leave the
// registers, so neither numbers of 32 bits nor gate and up are written to memory.

constexpr int ROWS = 128, DEPTH = 128, GROUP = 16;

#define I4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define I16(d, i) I4(d, i), I4(d, i + 4), I4(d, i + 8), I4(d, i + 12)
#define I32(d, i) I16(d, i), I16(d, i + 16)
#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(d, i) F4(d, i), F4(d, i + 4), F4(d, i + 8), F4(d, i + 12)
#define F32(d, i) F16(d, i), F16(d, i + 16)
#define L32 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define L64                                                                                                            \
    L32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
        "%59,%60,%61,%62,%63"
#define L128                                                                                                           \
    L64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90," \
        "%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,"     \
        "%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d[64 x N] (+)= a b, both with 32 bytes of k contiguous in shared memory.
#define MULTIPLY(SUM, S32, TYPES, END)                                                                                 \
    DEVICE void multiply(SUM (&d)[32], u64 a, u64 b, int add) {                                                        \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                      \
                     "wgmma.mma_async.sync.aligned.m64n64" TYPES " " L32 "}, %32, %33, p" END ";\n}"                    \
                     : S32(d, 0)                                                                                       \
                     : "l"(a), "l"(b), "r"(add));                                                                      \
    }                                                                                                                  \
    DEVICE void multiply(SUM (&d)[64], u64 a, u64 b, int add) {                                                        \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                      \
                     "wgmma.mma_async.sync.aligned.m64n128" TYPES " " L64 "}, %64, %65, p" END ";\n}"                   \
                     : S32(d, 0), S32(d, 32)                                                                           \
                     : "l"(a), "l"(b), "r"(add));                                                                      \
    }                                                                                                                  \
    DEVICE void multiply(SUM (&d)[128], u64 a, u64 b, int add) {                                                       \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                     \
                     "wgmma.mma_async.sync.aligned.m64n256" TYPES " " L128 "}, %128, %129, p" END ";\n}"                \
                     : S32(d, 0), S32(d, 32), S32(d, 64), S32(d, 96)                                                   \
                     : "l"(a), "l"(b), "r"(add));                                                                      \
    }

struct Int8 {
    using Sum = int;
    static constexpr bool SCALED = true;
    MULTIPLY(int, I32, "k32.s32.s8.s8", "")
    DEVICE void pin(int &sum) { asm volatile("" : "+r"(sum)::"memory"); }
};
struct Fp8 {
    using Sum = float;
    static constexpr bool SCALED = true;
    MULTIPLY(float, F32, "k32.f32.e4m3.e4m3", ", 1, 1")
    DEVICE void pin(float &sum) { asm volatile("" : "+f"(sum)::"memory"); }
};
struct Bf16 {
    using Sum = float;
    static constexpr bool SCALED = false;
    MULTIPLY(float, F32, "k16.f32.bf16.bf16", ", 1, 1, 0, 0")
    DEVICE void pin(float &sum) { asm volatile("" : "+f"(sum)::"memory"); }
};

// Keeps the compiler from moving uses of the sums across the asynchronous products.
template <typename KIND, int N>
DEVICE void pin(typename KIND::Sum (&sums)[N]) {
    for (int i = 0; i < N; i++) KIND::pin(sums[i]);
}

// A block's shared memory. Results wait in `out` in columns of 64, swizzled as the copy engine takes them.
template <int N, int STAGES, bool GATED>
struct Shared {
    static constexpr int WIDTH = GATED ? N / 2 : N;
    u8 x[STAGES][ROWS][DEPTH];
    u8 w[STAGES][N][DEPTH];
    u16 out[WIDTH / 64][ROWS][64];
    u64 full[STAGES], empty[STAGES], before_full, out_empty;
};

// How many tiles there are, and where each is: bands of 16 tiles of rows, so that what runs at the same time shares weights
// and x in the cache. `WIDTH`: columns of `out` in a tile.
template <int WIDTH>
struct Tiles {
    int row_tiles, column_tiles, count, steps;
    __device__ Tiles(int rows, int n, int bytes)
        : row_tiles((rows + ROWS - 1) / ROWS), column_tiles((n + WIDTH - 1) / WIDTH), count(row_tiles * column_tiles),
          steps((bytes + DEPTH - 1) / DEPTH) {}
    __device__ int2 place(int tile) const {
        int band = tile / (GROUP * column_tiles), inside = tile % (GROUP * column_tiles);
        int high = min(GROUP, row_tiles - band * GROUP);
        return make_int2((band * GROUP + inside % high) * ROWS, inside / high * WIDTH);
    }
};

// Gated: half of a tile of weights are rows of gate, half the same rows of up, which lie `n` rows further.
template <int N, int STAGES, bool GATED>
DEVICE void load(Shared<N, STAGES, GATED> &s, const TensorMap *x_map, const TensorMap *w_map, const TensorMap *out_map,
                 Tiles<GATED ? N / 2 : N> tiles, int n, bool add) {
    int turn = 0, place = 0;
    for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x, place++) {
        int2 at = tiles.place(tile);
        for (int step = 0; step < tiles.steps; step++, turn++) {
            int stage = turn % STAGES;
            barrier_wait(&s.empty[stage], (turn / STAGES + 1) & 1);
            barrier_expect(&s.full[stage], (ROWS + N) * DEPTH);
            // The maps count in pairs of bytes.
            load_box(s.w[stage], w_map, step * (DEPTH / 2), at.y, &s.full[stage]);
            if (GATED) load_box(s.w[stage][N / 2], w_map, step * (DEPTH / 2), n + at.y, &s.full[stage]);
            load_box(s.x[stage], x_map, step * (DEPTH / 2), at.x, &s.full[stage]);
            // What the results are added to, once the multiplying groups can have seen that the last ones are gone.
            if (!GATED && add && step == min(STAGES - 1, tiles.steps - 1)) {
                barrier_wait(&s.out_empty, place & 1);
                barrier_expect(&s.before_full, ROWS * N * 2);
                for (int c = 0; c < N / 64; c++) load_box(s.out[c], out_map, at.y + c * 64, at.x, &s.before_full);
            }
        }
    }
}

struct Target {
    const float *row_scales, *column_scales;
    const u16 *bias;
    int rows, n;
    bool add, fills;
};

// 16 rows of 16 columns between a warp's registers and its rows in shared memory; a lane names the place of its row and half.
DEVICE void put(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
DEVICE void get(u32 &a, u32 &b, u32 &c, u32 &d, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(from)
                 : "memory");
}

// A warp's 16 rows of results to `out`. Of rows g and g + 8 a lane has two neighbouring columns in every eight.
template <typename KIND, int N, bool GATED>
DEVICE void stage(u32 out, const Target &to, const typename KIND::Sum (&sums)[N / 2], int tile_row, int column) {
    constexpr int WIDTH = GATED ? N / 2 : N, EIGHTS = 8;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4, row = warp * 16 + lane % 16;
    float scales[2];
#pragma unroll
    for (int half = 0; half < 2; half++)
        scales[half] = KIND::SCALED ? to.row_scales[min(tile_row + warp * 16 + lane / 4 + half * 8, to.rows - 1)] : 1.0f;
    // Two columns of a row of one product.
    auto pair = [&](int at, int half, float2 columns) {
        float2 sum = make_float2((float)sums[at], (float)sums[at + 1]);
        if (KIND::SCALED) sum.x *= scales[half] * columns.x, sum.y *= scales[half] * columns.y;
        return sum;
    };
    // 64 columns at a time: all they need is asked for before the first is used.
#pragma unroll
    for (int first = 0; first < WIDTH / 8; first += EIGHTS) {
        float2 columns[EIGHTS], ups[EIGHTS];
        u32 bias[EIGHTS], words[EIGHTS][2];
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) {
            int c = min(column + (first + j) * 8 + lane % 4 * 2, to.n - 2);
            if (KIND::SCALED) columns[j] = *(const float2 *)(to.column_scales + c);
            if (KIND::SCALED && GATED) ups[j] = *(const float2 *)(to.column_scales + to.n + c);
            bias[j] = !GATED && to.bias ? *(const u32 *)(to.bias + c) : 0;
        }
        u32 block = out + (first / 8 * ROWS + row) * 128;
        auto place = [&](int j) { return block + ((j + lane / 16) ^ row % 8) * 16; };
#pragma unroll
        for (int j = 0; j < EIGHTS; j += 2) {
            words[j][0] = words[j][1] = words[j + 1][0] = words[j + 1][1] = 0;
            if (!GATED && to.add) get(words[j][0], words[j][1], words[j + 1][0], words[j + 1][1], place(j));
        }
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = 4 * (first + j) + 2 * half;
                u32 &word = words[j][half];
                float2 v = pair(at, half, columns[j]);
                if (GATED) {
                    float2 up = pair(at + N / 4, half, ups[j]);
                    v = make_float2(silu(v.x) * up.x, silu(v.y) * up.y);
                } else {
                    v.x += bf16_low(bias[j]) + bf16_low(word), v.y += bf16_high(bias[j]) + bf16_high(word);
                }
                word = bf16_pair(v.x, v.y);
            }
        }
#pragma unroll
        for (int j = 0; j < EIGHTS; j += 2) put(place(j), words[j][0], words[j][1], words[j + 1][0], words[j + 1][1]);
    }
}

template <typename KIND, int N, int STAGES, bool GATED>
DEVICE void compute(Shared<N, STAGES, GATED> &s, const TensorMap *out_map, const Target &to, Tiles<GATED ? N / 2 : N> tiles) {
    constexpr int WIDTH = GATED ? N / 2 : N;
    int group = threadIdx.x / 128 - 1, turn = 0, place = 0;
    bool leads = threadIdx.x % 128 == 0;
    typename KIND::Sum sums[N / 2];
    for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x, place++) {
        for (int step = 0; step < tiles.steps; step++, turn++) {
            int stage = turn % STAGES;
            barrier_wait(&s.full[stage], turn / STAGES & 1);
            u32 x = shared_address(s.x[stage][group * 64]), w = shared_address(s.w[stage]);
            pin<KIND>(sums);
            wgmma_begin();
#pragma unroll
            for (int i = 0; i < DEPTH / 32; i++)
                KIND::multiply(sums, descriptor(x + i * 32, 16), descriptor(w + i * 32, 16), step > 0 || i > 0);
            wgmma_commit();
            // The products before these have left their stage.
            wgmma_wait<1>();
            if (step > 0 && leads) barrier_arrive(&s.empty[(turn - 1) % STAGES]);
            // The last tile's results have left shared memory by now.
            if (leads && step == min(1, tiles.steps - 1)) {
                store_wait_read();
                barrier_arrive(&s.out_empty);
            }
        }
        wgmma_wait<0>();
        pin<KIND>(sums);
        if (leads) barrier_arrive(&s.empty[(turn - 1) % STAGES]);
        if (to.add) barrier_wait(&s.before_full, place & 1);
        else barrier_wait(&s.out_empty, place & 1);
        int2 at = tiles.place(tile);
        stage<KIND, N, GATED>(shared_address(s.out), to, sums, at.x, at.y);
        proxy_fence();
        asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
        if (leads) {
#pragma unroll
            for (int c = 0; c < WIDTH / 64; c++) store_box(out_map, at.y + c * 64, at.x + group * 64, s.out[c][group * 64]);
            store_commit();
        }
    }
    if (leads) store_wait();
}

// Grid: as many blocks as fit, at most one per tile. `bytes` of a row of x.
template <typename KIND, int N, int STAGES, bool GATED>
DEVICE void wide(const TensorMap *x_map, const TensorMap *w_map, const TensorMap *load_map, const TensorMap *store_map,
                 Target to, int bytes) {
    extern __shared__ char raw[];
    auto &s = *(Shared<N, STAGES, GATED> *)(((u64)raw + 1023) / 1024 * 1024);
    Tiles<GATED ? N / 2 : N> tiles(to.rows, to.n, bytes);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s.full[i], 1);
            barrier_init(&s.empty[i], 2);
        }
        barrier_init(&s.before_full, 1);
        barrier_init(&s.out_empty, 2);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    // Where multiprocessors are left over, all blocks of the next kernel would crowd onto those.
    if (to.fills) let_next_start();
    wait_for_input();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) load<N, STAGES, GATED>(s, x_map, w_map, load_map, tiles, to.n, to.add);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        compute<KIND, N, STAGES, GATED>(s, store_map, to, tiles);
    }
}

#define WIDE(NAME, KIND, N, STAGES, GATED)                                                                             \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                              \
        NAME(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,                         \
             const __grid_constant__ TensorMap load_map, const __grid_constant__ TensorMap store_map,                  \
             const float *row_scales, const float *column_scales, const u16 *bias, int rows, int n, int bytes, int add, \
             int fills) {                                                                                              \
        Target to = {row_scales, column_scales, bias, rows, n, add != 0, fills != 0};                                  \
        wide<KIND, N, STAGES, GATED>(&x_map, &w_map, &load_map, &store_map, to, bytes);                                \
    }
WIDE(wide_int8_64, Int8, 64, 7, false)
WIDE(wide_int8_128, Int8, 128, 5, false)
WIDE(wide_int8_256, Int8, 256, 3, false)
WIDE(gated_int8_256, Int8, 256, 4, true)
WIDE(gated_fp8_256, Fp8, 256, 4, true)
WIDE(gated_bf16_256, Bf16, 256, 4, true)
