// All layers of a decode step of a few sequences, in one kernel.
//
// Such a step reads the weights once and does little else, but as kernels in a row each product starts with nothing under way and ends with
// less and less of it. Here one block stays on each multiprocessor for the whole step: some of its warps do nothing but bring weights into
// a ring in shared memory through the bulk copy engine, in the order in which they will be used, across products and layers; the others
// multiply, attend and wait for each other's results (words.cuh). While they wait the ring fills, and memory is not idle.
//
// KIND (kinds.cuh), KV (attend.cuh) and HEAD_DIM are set before this text. The ring is in ring.cuh.

// What the warps that compute share: rows of x or what attention needs, what each warp came to of two tiles, sums that stay between passes, and of each row
// of x the sum of squares and the largest number.
struct Room {
    u8 *x;
    float (*sums)[WARPS][ROWS * 8];
    float (*held)[ROWS * 8];
    float2 (*known)[WARPS];
};
DEVICE void sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// Where rows come from: of the kernel before, or words with this flag. Where they go.
struct Source {
    const u16 *plain;
    const Word *words;
    u32 flag;
};
struct Target {
    u16 *plain;
    Word *words;
    u32 flag;
};

// By one warp: until words here and there of numbers from..to of all rows have been written.
DEVICE void await(const Source &x, int rows, int k, int from, int to) {
    int lane = threadIdx.x % 32;
    size_t row = lane % rows, at = from / 2 + (size_t)((to - from) / 2 - 1) * lane / 31;
    take_word(x.words + row * (k / 2) + at, x.flag);
}

// Numbers from..to of each row of x to shared memory, multiplied by the norm's weights if there is one. PAIRS of words at once by a thread.
template <int PAIRS>
DEVICE void stage_x(const Step &step, const Room &room, const Source &x, const u16 *norm, int k, int from, int to, int pitch) {
    // What is known of whole rows is known from the first pass on.
    bool knows = from == 0 && (norm || KIND::SCALED);
    for (int row = 0; row < step.rows; row++) {
        float square = 0.0f, most = 0.0f;
        for (int first = from / 4 + threadIdx.x; first < (knows ? k : to) / 4; first += PAIRS * THREADS) {
            uint2 by[PAIRS], v[PAIRS];
            u32 data[2 * PAIRS];
            int last = k / 4 - 1;
#pragma unroll
            for (int i = 0; i < PAIRS; i++)
                if (norm) by[i] = __ldg((const uint2 *)norm + min(first + i * THREADS, last));
            if (x.plain) {
#pragma unroll
                for (int i = 0; i < PAIRS; i++) {
                    uint2 two = ((const uint2 *)(x.plain + (size_t)row * k))[min(first + i * THREADS, last)];
                    data[2 * i] = two.x, data[2 * i + 1] = two.y;
                }
            } else {
                const Word *of = x.words + (size_t)row * (k / 2);
                take_pairs<PAIRS>(data, [&](int i) { return of + 2 * min(first + i * THREADS, last); }, x.flag);
            }
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                int at = first + i * THREADS;
                if (at > last) break;
                v[i] = make_uint2(data[2 * i], data[2 * i + 1]);
                if (norm) {
                    square += sum_of_squares(v[i].x) + sum_of_squares(v[i].y);
                    v[i] = make_uint2(mul_pairs(v[i].x, by[i].x), mul_pairs(v[i].y, by[i].y));
                }
                if (KIND::SCALED) most = fmaxf(most, fmaxf(largest(v[i].x), largest(v[i].y)));
                if (at < to / 4) ((uint2 *)(room.x + row * pitch * 2))[at - from / 4] = v[i];
            }
        }
        if (!knows) continue;
        square = warp_sum(square), most = warp_max(most);
        if (threadIdx.x % 32 == 0) room.known[row][threadIdx.x / 32] = make_float2(square, most);
    }
    sync();
    for (int row = 0; KIND::SCALED && row < step.rows; row++) {
        uint4 *put = (uint4 *)(room.x + row * pitch * 2);
        float most = 0.0f;
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, room.known[row][w].y);
        float scale = most > 0.0f ? KIND::LARGEST / most : 0.0f;
        for (int i = threadIdx.x; i < (to - from) / 16; i += THREADS) {
            uint4 v[2] = {put[2 * i], put[2 * i + 1]};
            KIND::pack(v, scale);
            put[2 * i] = v[0], put[2 * i + 1] = v[1];
        }
    }
    if (KIND::SCALED) sync();
}

// A tile's piece times x: this warp's share of it. WHOLE: it is not the end of a row.
template <bool WHOLE>
DEVICE void multiply_piece(KIND::Sums &sums, const u8 *stage, const u8 *x, int numbers) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u8 *row = stage + g * PITCH + t * KIND::LANE * WIDTH;
    KIND of[UNITS];
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        int at = (warp * UNITS + u) * UNIT;
        if (WHOLE || at < numbers) of[u].load(row + at * WIDTH, row + 8 * PITCH + at * WIDTH, x + at * 2);
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++)
        if (WHOLE || (warp * UNITS + u) * UNIT < numbers) of[u].multiply(sums);
}

// One number of a tile as the tensor cores leave them, and what it needs besides, asked for early.
struct Ending {
    int row, column;
    bool there;
    float scale, up_scale, bias;

    // `i`: the number's place in the tile.
    __device__ __forceinline__ Ending(const Step &step, const Matrix &matrix, What what, const Shape &shape, int tile, int i) {
        int g = i / 16, high = i / 2 % 2;
        column = i / 4 % 4 * 2 + i % 2;
        row = what == GATE_UP ? tile * 8 + g : tile * ROWS + g + high * 8;
        there = column < step.rows && row < shape.n && !(what == GATE_UP && high);
        int known = min(row, shape.n - 1);
        scale = KIND::SCALED ? matrix.scales[known] : 1.0f;
        up_scale = KIND::SCALED && what == GATE_UP ? matrix.scales[shape.n + known] : 1.0f;
        bias = matrix.bias ? bf16_float(matrix.bias[known]) : 0.0f;
    }
    // `of_x`: what the sums of its row of x are multiplied by.
    __device__ __forceinline__ void finish(What what, const Shape &shape, float sum, float of_x, const Source &old, const Target &to) const {
        float up = __shfl_xor_sync(0xffffffffu, sum, 2);
        sum = sum * of_x * scale + bias;
        if (what == GATE_UP) sum = silu(sum) * (up * of_x * up_scale);
        size_t at = (size_t)column * shape.n + row;
        if (there && (what == O || what == DOWN)) {
            if (old.plain) {
                sum += bf16_float(old.plain[at]);
            } else {
                u32 two = take_word(old.words + at / 2, old.flag);
                sum += row % 2 ? bf16_high(two) : bf16_low(two);
            }
        }
        // The row after this one is sixteen lanes on.
        u32 two = bf16_pair(sum, __shfl_down_sync(0xffffffffu, sum, 16));
        if (!there) return;
        if (to.plain) to.plain[at] = (u16)two;
        else if (threadIdx.x % 32 < 16) put_word(to.words + at / 2, two, to.flag);
    }
};

// What the sums of a row of x are multiplied by.
DEVICE float of_row(const Step &step, const Room &room, int row, int k, bool norm) {
    if (row >= step.rows) return 0.0f;
    float square = 0.0f, most = 0.0f;
    for (int w = 0; w < WARPS; w++) square += room.known[row][w].x, most = fmaxf(most, room.known[row][w].y);
    return (norm ? rsqrtf(square / k + step.eps) : 1.0f) * (KIND::SCALED ? most / KIND::LARGEST : 1.0f);
}

DEVICE void product(const Step &step, const Matrix &matrix, What what, const Room &room, Ring &ring, Turn &turn, const Source &x,
                    const u16 *norm, const Source &old, const Target &out) {
    Shape shape = shape_of(step, what);
    int first = turn.first;
    turn.after(shape.tiles);
    if (first >= shape.tiles) return;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, pitch = shape.pass + X_PAD, half = 0;
    int mine = threadIdx.x % 128;
    const u8 *x_row = room.x + (min(KIND::DIGITS ? g % 4 : g, step.rows - 1) * pitch + t * KIND::LANE) * 2 + (KIND::DIGITS ? g / 4 * 16 : 0);
    for (int from = 0; from < shape.k; from += shape.pass) {
        int to = min(from + shape.pass, shape.k);
        // One warp asks until some of it is there, lest the asking of all keep memory busy; and all are done with what was in its place.
        if (warp == 0 && !x.plain) await(x, step.rows, shape.k, from, to);
        sync();
        if (what == DOWN) stage_x<7>(step, room, x, norm, shape.k, from, to, pitch);
        else stage_x<4>(step, room, x, norm, shape.k, from, to, pitch);
        for (int tile = first, local = 0; tile < shape.tiles; tile += gridDim.x, local++, half ^= 1) {
            Ending ending(step, matrix, what, shape, tile, mine);
            KIND::Sums c;
            for (int at = from; at < to; at += PIECE_NUMBERS) {
                const u8 *stage = ring.stages + ring.at * STAGE, *x_at = x_row + (at - from) * 2;
                barrier_wait(ring.full + ring.at, ring.parity);
                if (at + PIECE_NUMBERS <= to) multiply_piece<true>(c, stage, x_at, 0);
                else multiply_piece<false>(c, stage, x_at, to - at);
                __syncwarp();
                if (lane == 0) barrier_arrive(ring.empty + ring.at);
                ring.next();
            }
            *(float4 *)&room.sums[half][warp][lane * 4] = KIND::result(c);
            sync();
            // Half of the warps end the tile, the others go on.
            if (warp / 4 != half) continue;
            float sum = 0.0f;
            for (int w = 0; w < WARPS; w++) sum += room.sums[half][w][mine];
            if (from > 0) sum += room.held[local][mine];
            if (to < shape.k) room.held[local][mine] = sum;
            else ending.finish(what, shape, sum, of_row(step, room, ending.column, shape.k, norm), old, out);
        }
    }
}

// How attention hands on what it has.
struct Io {
    const Step &step;
    u32 flag;
    Part part;

    __device__ __forceinline__ void wait() const {}
    __device__ __forceinline__ void sync() const { ::sync(); }
    // A sequence's row is its number.
    __device__ __forceinline__ void eights(int, int a, int b, uint4 &low, uint4 &high) const {
        const Word *of = step.qkv + (size_t)part.sequence * ((step.heads + 2 * step.kv_heads) * DIM / 2);
        u32 data[8];
        take_pairs<4>(data, [&](int i) { return of + (i < 2 ? a : b) * 4 + i % 2 * 2; }, flag);
        low = make_uint4(data[0], data[1], data[2], data[3]), high = make_uint4(data[4], data[5], data[6], data[7]);
    }
    // Two numbers, `lanes` lanes apart, make a word.
    __device__ __forceinline__ void result(int head, int dim, float value, int lanes, bool there) const {
        float next = __shfl_down_sync(0xffffffffu, value, lanes);
        if (there && dim % 2 == 0)
            put_word(step.attended + (((size_t)part.sequence * step.heads + head) * DIM + dim) / 2, bf16_pair(value, next), flag);
    }
    __device__ __forceinline__ void put(int, int head, int dim, float top, float sum, float value) const {
        if (part.splits == 1) return result(head, dim, value / sum, 1, true);
        size_t at = ((size_t)part.sequence * step.heads + head) * part.splits + part.split;
        put_word(step.partial + at * DIM + dim, value, flag);
        if (dim == 0) put_word(step.stats + 2 * at, top, flag), put_word(step.stats + 2 * at + 1, sum, flag);
    }
    // Each split's block joins a share of the head group's numbers, some lanes each.
    __device__ __forceinline__ void join(int first_head, int count) const {
        constexpr int LANES = 8;
        int share = (count * DIM / 2 + part.splits - 1) / part.splits * 2, end = min((part.split + 1) * share, count * DIM);
        int lane = threadIdx.x % LANES, warp_first = part.split * share + threadIdx.x / 32 * (32 / LANES);
        for (; warp_first < end; warp_first += THREADS / LANES) {
            int i = warp_first + threadIdx.x % 32 / LANES, head = first_head + min(i, end - 1) / DIM, dim = min(i, end - 1) % DIM;
            size_t at = ((size_t)part.sequence * step.heads + head) * part.splits;
            float top = -INFINITY, sum = 0.0f, value = 0.0f;
            for (int split = lane; split < part.splits; split += 2 * LANES) {
                float values[2];
                float2 of[2];
                take_splits<2>(values, of, step.partial + at * DIM + dim, DIM, step.stats + 2 * at, split, LANES, part.splits, flag);
                add_split(top, sum, value, of[0].x, of[0].y, values[0]);
                add_split(top, sum, value, of[1].x, of[1].y, values[1]);
            }
            for (int away = 1; away < LANES; away <<= 1)
                add_split(top, sum, value, __shfl_xor_sync(0xffffffffu, top, away), __shfl_xor_sync(0xffffffffu, sum, away),
                          __shfl_xor_sync(0xffffffffu, value, away));
            result(head, dim, value / sum, LANES, i < end && lane == 0);
        }
    }
    static __device__ __forceinline__ void add_split(float &top, float &sum, float &value, float of_top, float of_sum, float of_value) {
        float most = fmaxf(top, of_top), mine = top == -INFINITY ? 0.0f : exp2_fast(top - most);
        float other = of_top == -INFINITY ? 0.0f : exp2_fast(of_top - most);
        top = most, sum = sum * mine + of_sum * other, value = value * mine + of_value * other;
    }
};

DEVICE void attention(const Step &step, const Layer &layer, const Room &room, u32 flag) {
    Attention of = {layer.pool, step.tables, step.table_of_row, step.positions, step.decode_rows, step.heads, step.kv_heads,
                    step.block_tokens, (int)layer.window, step.scale_log2, {step.angles, layer.q_norm, layer.k_norm, step.eps}};
    int group = step.heads / step.kv_heads, parts = (group + 7) / 8, groups = step.kv_heads * parts;
    for (int item = blockIdx.x; item < groups * step.splits * step.rows; item += gridDim.x) {
        Part part = {item % groups, item / groups % step.splits, step.splits, item / groups / step.splits};
        Io io = {step, flag, part};
        int first = part.group / parts * group + part.group % parts * 8;
        int count = min(8, (part.group / parts + 1) * group - first);
        sync();
        if (step.decode_rows[part.sequence] >= 0) {
            attend<DIM, KV<DIM>, true, false, WARPS>(*(AttentionShared<DIM, KV<DIM>, WARPS> *)room.x, of, part, io);
            if (step.splits > 1) io.join(first, count);
        } else if (part.split == 0) {
            // Padding: the products want some numbers.
            for (int i = threadIdx.x; i < count * DIM / 2; i += THREADS)
                put_word(step.attended + ((size_t)part.sequence * step.heads + first) * (DIM / 2) + i, 0u, flag);
        }
    }
}

DEVICE void compute(const Step &step, const Room &room, Ring &ring) {
    Turn turn = {(int)blockIdx.x};
    u32 flag = *step.epoch * step.count * 2;
    Source none = {};
    for (int i = 0; i < step.count; i++, flag += 2) {
        const Layer &layer = step.layers[i];
        Source before = {i == 0 ? step.x : nullptr, step.hidden, flag - 1}, between = {nullptr, step.hidden, flag};
        product(step, layer.qkv, QKV, room, ring, turn, before, layer.attention_norm, none, {nullptr, step.qkv, flag});
        attention(step, layer, room, flag);
        product(step, layer.o, O, room, ring, turn, {nullptr, step.attended, flag}, nullptr, before, {nullptr, step.hidden, flag});
        product(step, layer.gate_up, GATE_UP, room, ring, turn, between, layer.mlp_norm, none, {nullptr, step.gated, flag});
        product(step, layer.down, DOWN, room, ring, turn, {nullptr, step.gated, flag}, nullptr, between,
                {i + 1 == step.count ? step.x : nullptr, step.hidden, flag + 1});
    }
}

// Grid: the multiprocessors, all at once; 384 threads.
extern "C" __global__ void __launch_bounds__(THREADS + FETCHERS * 32, 1) all_layers(const __grid_constant__ Step step) {
    extern __shared__ __align__(128) u8 shared[];
    Room room;
    u8 *at = shared;
    room.x = at, at += step.x_bytes;
    room.sums = (float(*)[WARPS][ROWS * 8])at, at += 2 * sizeof(*room.sums);
    room.held = (float(*)[ROWS * 8])at, at += step.held * sizeof(*room.held);
    room.known = (float2(*)[WARPS])at, at += MOST_ROWS * sizeof(*room.known);
    u64 *barriers = (u64 *)at;
    at += 256;
    Ring ring = {at, barriers, barriers + 16, step.stages, 0, 0};
    if (threadIdx.x == 0) {
        for (int i = 0; i < step.stages; i++) barrier_init(ring.full + i, FETCHERS), barrier_init(ring.empty + i, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < THREADS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        return compute(step, room, ring);
    }
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    int lane = threadIdx.x % 32, first = threadIdx.x / 32 % FETCHERS * EACH;
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    walk(step, [&](const u8 *from, u32 bytes) {
        barrier_wait(ring.empty + ring.at, ring.parity ^ 1);
        if (lane == 0) barrier_expect(ring.full + ring.at, bytes * EACH);
        __syncwarp();
        if (lane < EACH) bring(ring.stages + ring.at * STAGE + (first + lane) * PITCH, from, bytes, ring.full + ring.at, policy);
        ring.next();
    });
}
