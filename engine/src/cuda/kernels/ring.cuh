// What a step of the megakernel is, how blocks share its products, and the warps that fetch weights.
//
// KIND (kinds.cuh) and HEAD_DIM are set before this text.

// Warps that multiply and attend; then come those that fetch, some rows each: a copy takes some hundred cycles to ask for, one after the other.
constexpr int WARPS = 8, THREADS = WARPS * 32, FETCHERS = 4;
// A stage of the ring: pieces of so many bytes of 16 rows of weights, apart by 64 bytes more, so that rows lie in different banks.
constexpr int ROWS = 16, PIECE = 1024, PITCH = PIECE + 64, STAGE = ROWS * PITCH, EACH = ROWS / FETCHERS;
constexpr int WIDTH = KIND::WIDTH, PIECE_NUMBERS = PIECE / WIDTH, UNIT = 64, UNITS = PIECE_NUMBERS / UNIT / WARPS;
constexpr int DIM = HEAD_DIM;
constexpr int X_PAD = KIND::X_PAD;  // numbers between rows of x in shared memory
constexpr int MOST_ROWS = 4;

struct Matrix {
    const u8 *weights;
    const float *scales;
    const u16 *bias;
};
struct Layer {
    Matrix qkv, o, gate_up, down;  // as What counts them
    const u16 *attention_norm, *mlp_norm;
    const uint4 *q_norm, *k_norm;
    void *pool;
    long long window;
};
// Where things are. Words: hidden [rows, hidden / 2], qkv, attended and gated likewise, partial [rows, heads, splits, DIM], stats [.., 2].
// `epoch` is another in each step. A pass of a product covers as much of k as fits in `x_bytes` of shared memory for all rows of x; `held`
// tiles' sums stay between passes.
struct Step {
    const Layer *layers;
    const u32 *epoch;
    u16 *x;
    Word *hidden, *qkv, *attended, *gated, *partial, *stats;
    const int *tables, *table_of_row, *positions, *decode_rows;
    const float2 *angles;
    int count, rows, width, ffn, heads, kv_heads, block_tokens, splits;
    int x_bytes, held, stages;
    float eps, scale_log2;
};

enum What { QKV, O, GATE_UP, DOWN };

// A product as blocks share it: tiles of 16 rows of weights, gated eight and the eight of `up` that belong to them.
struct Shape {
    int n, k, tiles, pass;  // a pass covers so much of k
};
DEVICE Shape shape_of(const Step &step, What what) {
    int inner = step.heads * DIM;
    Shape s;
    s.n = what == QKV ? inner + 2 * step.kv_heads * DIM : what == GATE_UP ? step.ffn : step.width;
    s.k = what == O ? inner : what == DOWN ? step.ffn : step.width;
    int each = what == GATE_UP ? ROWS / 2 : ROWS, fits = step.x_bytes / (2 * step.rows) - X_PAD;
    s.tiles = (s.n + each - 1) / each;
    s.pass = s.k <= fits ? s.k : fits / PIECE_NUMBERS * PIECE_NUMBERS;
    return s;
}
// Tiles go round the blocks, on from where the last product ended.
struct Turn {
    int first;
    __device__ __forceinline__ void after(int tiles) {
        first = (first - tiles) % (int)gridDim.x;
        if (first < 0) first += gridDim.x;
    }
};

struct Ring {
    u8 *stages;
    u64 *full, *empty;
    int count, at;
    u32 parity;
    __device__ __forceinline__ void next() {
        if (++at == count) at = 0, parity ^= 1;
    }
};

// The warps that fetch.
DEVICE void bring(void *to, const void *from, u32 bytes, u64 *barrier, u64 policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
                 : "memory");
}
// Calls bring(piece of this lane's row, its bytes) for each stage, in order.
template <typename BRING>
DEVICE void walk_product(const Step &step, const Matrix &matrix, What what, Turn &turn, BRING bring) {
    Shape shape = shape_of(step, what);
    int mine = threadIdx.x / 32 % FETCHERS * EACH + threadIdx.x % EACH;
    for (int from = 0; from < shape.k; from += shape.pass) {
        int to = min(from + shape.pass, shape.k);
        for (int tile = turn.first; tile < shape.tiles; tile += gridDim.x) {
            int row = what == GATE_UP ? min(tile * 8 + mine % 8, shape.n - 1) + mine / 8 * shape.n
                                      : min(tile * ROWS + mine, shape.n - 1);
            const u8 *weights = matrix.weights + (size_t)row * shape.k * WIDTH;
            for (int at = from; at < to; at += PIECE_NUMBERS) {
                bring(weights + (size_t)at * WIDTH, (u32)(min(PIECE_NUMBERS, to - at) * WIDTH));
            }
        }
    }
    turn.after(shape.tiles);
}
template <typename BRING>
DEVICE void walk(const Step &step, BRING bring) {
    Turn turn = {(int)blockIdx.x};
#pragma unroll 1
    for (int i = 0; i < step.count * 4; i++) walk_product(step, (&step.layers[i / 4].qkv)[i % 4], (What)(i % 4), turn, bring);
}
