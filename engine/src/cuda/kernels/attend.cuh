// Attention of one new token per sequence over its paged KV, split along the keys.
//
// Memory-bound: every key and value is read once from device memory, straight into the registers that feed the tensor
// cores, for all query heads that share it. A warp takes whole 16-key groups; heads are the n side of
// mma.m16n8k16, so a group of up to 8 heads costs what one does.
//
// The order of the head's dimensions inside a fragment is free as long as both operands agree. So each lane loads 16
// consecutive bytes: for K lane (g, t) of a 32-dimension chunk holds 8t.. of keys g and g+8; for V it holds dimensions
// 8g.. of keys 2t, 2t+1, 2t+8, 2t+9.

DEVICE u32 transposed8x8(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
DEVICE u32 lows(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
DEVICE u32 highs(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

// How 16 keys and values of bf16 meet the query.
template <int DIM>
struct KvBf16 {
    using Number = u16;
    using Vector = uint4;  // of eight numbers
    static constexpr float SCALE = 1.0f;
    uint4 k[DIM / 32][2];
    uint4 v[DIM / 64][4];

    // Heads as the B operand: a lane holds head g, dimensions 8t.. of each 32.
    struct Query {
        uint4 at[DIM / 32];
        __device__ __forceinline__ void load(const u16 *head, int t) {
            for (int c = 0; c < DIM / 32; c++) at[c] = *(const uint4 *)(head + c * 32 + t * 8);
        }
    };

    // `k_at` is the start of 16 keys of [16 (or more), DIM]; `v_at` the same of the values.
    __device__ __forceinline__ void load(const u16 *k_at, const u16 *v_at, int g, int t) {
        for (int c = 0; c < DIM / 32; c++) {
            k[c][0] = load_stream(k_at + g * DIM + c * 32 + t * 8);
            k[c][1] = load_stream(k_at + (g + 8) * DIM + c * 32 + t * 8);
        }
        for (int c = 0; c < DIM / 64; c++)
            for (int i = 0; i < 4; i++)
                v[c][i] = load_stream(v_at + (2 * t + (i & 1) + (i >> 1) * 8) * DIM + c * 64 + g * 8);
    }

    // Puts the key and the value of the newest token where key `at` of the sixteen is.
    __device__ __forceinline__ void place(const u16 *new_k, const u16 *new_v, int at, int g, int t) {
        for (int c = 0; c < DIM / 32; c++)
            for (int i = 0; i < 2; i++)
                if (g + 8 * i == at) k[c][i] = *(const uint4 *)(new_k + c * 32 + t * 8);
        for (int c = 0; c < DIM / 64; c++)
            for (int i = 0; i < 4; i++)
                if (2 * t + (i & 1) + (i >> 1) * 8 == at) v[c][i] = *(const uint4 *)(new_v + c * 64 + g * 8);
    }

    __device__ __forceinline__ void score(float (&s)[4], const Query &query) const {
        for (int c = 0; c < DIM / 32; c++) {
            const uint4 &low = k[c][0], &high = k[c][1], &q = query.at[c];
            mma_bf16(s, low.x, high.x, low.y, high.y, q.x, q.y);
            mma_bf16(s, low.z, high.z, low.w, high.w, q.z, q.w);
        }
    }

    static __device__ __forceinline__ u32 weights(float low, float high) { return bf16_pair(low, high); }

    // The part of `o` that accumulator `i` is: dimensions dim(i) and the next, of lane group g.
    static __device__ __forceinline__ int dim(int i, int g) { return i / 4 * 64 + g * 8 + i % 4 * 2; }

    __device__ __forceinline__ void add(float (&acc)[4], int i, u32 p0, u32 p1) const {
        u32 w[4];
        for (int key = 0; key < 4; key++) {
            const uint4 &at = v[i / 4][key];
            w[key] = i % 4 == 0 ? at.x : i % 4 == 1 ? at.y : i % 4 == 2 ? at.z : at.w;
        }
        mma_bf16(acc, lows(w[0], w[1]), highs(w[0], w[1]), lows(w[2], w[3]), highs(w[2], w[3]), p0, p1);
    }
};

// The same of e4m3, made f16 in registers: half the bytes. Lane (g, t) holds dimensions 16t.. of each 64 of keys g and g+8, and
// dimensions (DIM / 8) g.. of values 2t, 2t+1, 2t+8, 2t+9.
template <int DIM>
struct KvFp8 {
    using Number = u8;
    using Vector = uint2;
    // half_pair_of_e4m3 leaves numbers 2^8 too small.
    static constexpr float SCALE = 256.0f;
    static constexpr int WORDS = DIM / 32;
    uint4 k[DIM / 64][2];
    u32 v[4][WORDS];

    struct Query {
        u32 at[DIM / 64][8];
        __device__ __forceinline__ void load(const u16 *head, int t) {
            for (int c = 0; c < DIM / 64; c++) {
                const u32 *from = (const u32 *)(head + c * 64 + t * 16);
                for (int i = 0; i < 8; i++) at[c][i] = half_pair(bf16_low(from[i]), bf16_high(from[i]));
            }
        }
    };

    __device__ __forceinline__ void load(const u8 *k_at, const u8 *v_at, int g, int t) {
        for (int c = 0; c < DIM / 64; c++) {
            k[c][0] = load_stream(k_at + g * DIM + c * 64 + t * 16);
            k[c][1] = load_stream(k_at + (g + 8) * DIM + c * 64 + t * 16);
        }
        for (int i = 0; i < 4; i++) {
            const u8 *from = v_at + (2 * t + (i & 1) + (i >> 1) * 8) * DIM + g * (DIM / 8);
            if constexpr (WORDS == 4) {
                uint4 x = load_stream(from);
                v[i][0] = x.x, v[i][1] = x.y, v[i][2] = x.z, v[i][3] = x.w;
            } else {
                uint2 x = load_stream8(from);
                v[i][0] = x.x, v[i][1] = x.y;
            }
        }
    }

    __device__ __forceinline__ void place(const u8 *new_k, const u8 *new_v, int at, int g, int t) {
        for (int c = 0; c < DIM / 64; c++)
            for (int i = 0; i < 2; i++)
                if (g + 8 * i == at) k[c][i] = *(const uint4 *)(new_k + c * 64 + t * 16);
        for (int i = 0; i < 4; i++)
            if (2 * t + (i & 1) + (i >> 1) * 8 == at)
                for (int w = 0; w < WORDS; w++) v[i][w] = ((const u32 *)(new_v + g * (DIM / 8)))[w];
    }

    __device__ __forceinline__ void score(float (&s)[4], const Query &query) const {
        for (int c = 0; c < DIM / 64; c++) {
            u32 low[4] = {k[c][0].x, k[c][0].y, k[c][0].z, k[c][0].w};
            u32 high[4] = {k[c][1].x, k[c][1].y, k[c][1].z, k[c][1].w};
            for (int w = 0; w < 4; w++)
                mma_half(s, pair<0>(low[w]), pair<0>(high[w]), pair<2>(low[w]), pair<2>(high[w]), query.at[c][2 * w],
                         query.at[c][2 * w + 1]);
        }
    }

    // Bytes I and I + 1 of a word.
    template <int I>
    static __device__ __forceinline__ u32 pair(u32 x) {
        return half_pair_of_e4m3(__byte_perm(x, 0, I == 0 ? 0x1404 : 0x3424));
    }
    // Byte I of two words.
    template <int I>
    static __device__ __forceinline__ u32 across(u32 x, u32 y) {
        return half_pair_of_e4m3(__byte_perm(x, y, (4 + I) << 12 | I << 4));
    }

    static __device__ __forceinline__ u32 weights(float low, float high) { return half_pair(low, high); }

    static __device__ __forceinline__ int dim(int i, int g) { return g * (DIM / 8) + i * 2; }

    __device__ __forceinline__ void add(float (&acc)[4], int i, u32 p0, u32 p1) const {
        int w = i / 2;
        if (i % 2 == 0)
            mma_half(acc, across<0>(v[0][w], v[1][w]), across<1>(v[0][w], v[1][w]), across<0>(v[2][w], v[3][w]),
                     across<1>(v[2][w], v[3][w]), p0, p1);
        else
            mma_half(acc, across<2>(v[0][w], v[1][w]), across<3>(v[0][w], v[1][w]), across<2>(v[2][w], v[3][w]),
                     across<3>(v[2][w], v[3][w]), p0, p1);
    }
};

// The newest token of a sequence, as one kv head and up to eight of its query heads see it.
template <int DIM, typename Kv>
struct Newest {
    alignas(16) u16 q[8][DIM];
    alignas(16) typename Kv::Number kv[2][DIM];

    // A thread turns 16 numbers of a head; eights(a, b, ..) has numbers 8a.. and 8b.. of the token's row of [heads + 2 kv_heads, DIM].
    template <typename EIGHTS>
    __device__ void turn(EIGHTS eights, int first_head, int count, int kv_head, int heads, int kv_heads, const Rotation &by) {
        constexpr int LANES = DIM / 16;
        int which = threadIdx.x / LANES, i = threadIdx.x % LANES;
        Kind kind = which < 8 ? Q : which == 8 ? K : V;
        int head = kind == Q ? first_head + min(which, count - 1) : heads + kv_head + (kind == V ? kv_heads : 0);
        // Warps that have no head.
        if (threadIdx.x / 32 * 32 >= 10 * LANES) return;
        Angles angles(by, i);
        uint4 low, high;
        eights(head * 2 * LANES + i, head * 2 * LANES + i + LANES, low, high);
        float a[8], b[8];
        turned(a, b, low, high, kind, i, LANES, by, angles);
        if (kind == Q) {
            uint4 *to = (uint4 *)q[which];
            put(to + i, a), put(to + i + LANES, b);
        } else if (which < 10) {
            auto to = (typename Kv::Vector *)kv[which - 8];
            put(to + i, a), put(to + i + LANES, b);
        }
    }
    // Key and value to where they belong in the pool; values lie `v_offset` numbers behind keys.
    __device__ void keep(typename Kv::Number *key, size_t v_offset) const {
        constexpr int EACH = DIM * sizeof(typename Kv::Number) / 16;
        int which = threadIdx.x / EACH, i = threadIdx.x % EACH;
        if (which < 2) ((uint4 *)(key + which * v_offset))[i] = ((const uint4 *)kv[which])[i];
    }
};

// What attention works on; pool_layer: [blocks, 2, kv_heads, block_tokens, DIM].
struct Attention {
    void *pool_layer;
    const int *tables, *table_of_row, *positions, *rows;
    int heads, kv_heads, block_tokens, window;
    float scale_log2;
    Rotation by;
};

// A part of the work: a split of the keys of a "head group", up to 8 query heads of one kv head.
struct Part {
    int group, split, splits, sequence;
};

template <int DIM, typename Kv, int WARPS>
struct AttentionShared {
    float merged[WARPS][8][DIM];
    float2 stats[WARPS][8];
    Newest<DIM, Kv> newest;
};

// One part, by WARPS warps. TURNS: q and k come as the product made them, and the newest key and value are not in the pool yet: they are
// turned and put there here. Costs more than a kernel of its own once parts are many. `io`: wait() until the step's earlier kernels are done,
// q(row, head) or eights(..) of q, k and v, sync() of these warps, and put(row, head, dim, top, sum, value) for what comes of it: the largest
// score, the sum of weights, the weighted sum.
// AHEAD: the next keys are under way while these are multiplied, for twice the registers.
template <int DIM, typename Kv, bool TURNS, bool AHEAD, int WARPS, typename IO>
DEVICE void attend(AttentionShared<DIM, Kv, WARPS> &s, const Attention &of, Part part, IO &io) {
    if (!TURNS) io.wait();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int group = of.heads / of.kv_heads, parts = (group + 7) / 8;
    int kv_head = part.group / parts, first_head = kv_head * group + part.group % parts * 8;
    int count = min(8, (kv_head + 1) * group - first_head), splits = part.splits, row = of.rows[part.sequence];
    if (row < 0) {
        if (TURNS) io.wait();
        return;
    }
    int position = of.positions[row], keys = position + 1;
    const int *table = of.tables + of.table_of_row[row];
    int first = of.window > 0 && keys > of.window ? keys - of.window : 0;
    int groups16 = (keys + 15) / 16 - first / 16, each = (groups16 + splits - 1) / splits;
    int from = first / 16 + part.split * each, to = min(from + each, first / 16 + groups16);

    size_t head_size = (size_t)of.block_tokens * DIM, v_offset = of.kv_heads * head_size;
    auto place_of = [&](int key) {
        size_t block = (size_t)table[key / of.block_tokens] * 2 * of.kv_heads + kv_head;
        return (typename Kv::Number *)of.pool_layer + block * head_size + key % of.block_tokens * DIM;
    };
    Kv now, next;
    auto fetch = [&](Kv &keys16, int group16) {
        const typename Kv::Number *k_at = place_of(group16 * 16);
        keys16.load(k_at, k_at + v_offset, g, t);
    };
    if (from + warp < to) fetch(now, from + warp);

    // Heads beyond the group take the first one's query and are not written.
    typename Kv::Query query;
    int new_group = -1;
    if constexpr (TURNS) {
        io.wait();
        Rotation by = of.by;
        by.angles += (size_t)position * (DIM / 2);
        s.newest.turn([&](int a, int b, uint4 &low, uint4 &high) { io.eights(row, a, b, low, high); }, first_head, count, kv_head, of.heads, of.kv_heads, by);
        io.sync();
        query.load(s.newest.q[g], t);
        if (from <= position / 16 && position / 16 < to) {
            new_group = position / 16;
            s.newest.keep(place_of(position), v_offset);
        }
    } else {
        query.load(io.q(row, first_head + (g < count ? g : 0)), t);
    }

    float o[DIM / 16][4];
    for (int i = 0; i < DIM / 16; i++)
        for (int j = 0; j < 4; j++) o[i][j] = 0.0f;
    float best[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

    for (int group16 = from + warp; group16 < to; group16 += WARPS) {
        if (AHEAD && group16 + WARPS < to) fetch(next, group16 + WARPS);
        if (TURNS && group16 == new_group) now.place(s.newest.kv[0], s.newest.kv[1], position % 16, g, t);
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        now.score(x, query);
        // x[0], x[1]: key g, heads 2t, 2t+1; x[2], x[3]: key g + 8.
        int key = group16 * 16 + g;
        for (int i = 0; i < 4; i++) {
            int at = key + (i / 2) * 8;
            x[i] = at >= first && at < keys ? x[i] * (Kv::SCALE * of.scale_log2) : -INFINITY;
        }
        float shrink[2];
        for (int h = 0; h < 2; h++) {
            float top = fmaxf(x[h], x[h + 2]);
            for (int step = 4; step < 32; step <<= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
            top = fmaxf(top, best[h]);
            shrink[h] = top == -INFINITY ? 1.0f : exp2_fast(best[h] - top);
            x[h] = x[h] == -INFINITY ? 0.0f : exp2_fast(x[h] - top);
            x[h + 2] = x[h + 2] == -INFINITY ? 0.0f : exp2_fast(x[h + 2] - top);
            total[h] = total[h] * shrink[h] + x[h] + x[h + 2];
            best[h] = top;
        }
        u32 p0 = transposed8x8(Kv::weights(x[0], x[1])), p1 = transposed8x8(Kv::weights(x[2], x[3]));
#pragma unroll
        for (int i = 0; i < DIM / 16; i++) {
            float(&acc)[4] = o[i];
            acc[0] *= shrink[0], acc[1] *= shrink[1], acc[2] *= shrink[0], acc[3] *= shrink[1];
            now.add(acc, i, p0, p1);
        }
        if (AHEAD) now = next;
        else if (group16 + WARPS < to) fetch(now, group16 + WARPS);
    }
    // o[i][..]: dimension dim(i) (+1 for [2], [3]); heads 2t, 2t+1.
    for (int h = 0; h < 2; h++)
        for (int step = 4; step < 32; step <<= 1) total[h] += __shfl_xor_sync(0xffffffffu, total[h], step);
    for (int i = 0; i < DIM / 16; i++) {
        int dim = Kv::dim(i, g);
        s.merged[warp][2 * t][dim] = o[i][0] * Kv::SCALE;
        s.merged[warp][2 * t + 1][dim] = o[i][1] * Kv::SCALE;
        s.merged[warp][2 * t][dim + 1] = o[i][2] * Kv::SCALE;
        s.merged[warp][2 * t + 1][dim + 1] = o[i][3] * Kv::SCALE;
    }
    if (g == 0) {
        s.stats[warp][2 * t] = make_float2(best[0], total[0]);
        s.stats[warp][2 * t + 1] = make_float2(best[1], total[1]);
    }
    io.sync();
    for (int i = threadIdx.x; i < count * DIM; i += WARPS * 32) {
        int head = i / DIM, dim = i % DIM;
        float top = -INFINITY, sum = 0.0f, value = 0.0f;
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, s.stats[w][head].x);
        for (int w = 0; w < WARPS; w++) {
            float2 stat = s.stats[w][head];
            float share = stat.x == -INFINITY ? 0.0f : exp2_fast(stat.x - top);
            sum += stat.y * share;
            value += s.merged[w][head][dim] * share;
        }
        io.put(row, first_head + head, dim, top, sum, value);
    }
}
