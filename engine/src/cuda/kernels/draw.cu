// Draws from rows of logits: masks, edits, log-probabilities; temperature, top-k, top-p, min-p, then the token where the cumulative weight, in the
// order of ids, passes a uniform number: what the host does (sampling/draw.rs), and the same token but where a rounding lies between.
//
// All sums are of integers, so their order does not matter and the same logits always give the same token.

// A token's key says how far its logit lies below the best: 2^26 steps a nat, the last key for 64 nats and more. Its weight is its probability
// relative to the best one's, in steps of 2^-40.
constexpr int THREADS = 1024, WARPS = THREADS / 32, BINS = 2048;
constexpr u32 FARTHEST = 0xffffffffu;

struct Draw {
    int row;
    u32 top_k;    // 0: off
    float top_p;  // 1: off
    float min_p;
    float rate;  // log2(e) / temperature; 0: the best token
    u32 padding;
    double unit;  // in [0, 1)
};

struct Edit {
    int row, token;
    float bias, repetition, minus;
    int keeps;
    float raw;  // the logit before, written where `keeps`
};

// The token, and its logit as it was drawn from.
struct Drawn {
    int token;
    float logit;
};

// What log-probabilities are made of: the largest logit, the sum of exp(logit - largest) in steps of 2^-40, the `count` best
// tokens in no order.
constexpr int MOST = 20;
struct Raw {
    float best;
    u32 count;
    u64 total;
    int tokens[MOST];
    float logits[MOST];
};

DEVICE float sane(float logit) { return logit != logit ? -INFINITY : fminf(logit, 3.402823466e38f); }

// Bits of the tokens that stay, a list of words for each of `rows`. Grid: (parts, rows).
extern "C" __global__ void mask_logits(float *logits, const int *rows, const u32 *masks, int words, int columns) {
    const u32 *mask = masks + (size_t)blockIdx.y * words;
    float *row = logits + (size_t)rows[blockIdx.y] * columns;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < columns; i += gridDim.x * blockDim.x)
        if (!(mask[i / 32] >> i % 32 & 1)) row[i] = -INFINITY;
}

// Changes logits in place; each token of a row at most once. Every rounding is the host's.
extern "C" __global__ void edit_logits(float *logits, Edit *edits, int count, int columns) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    Edit edit = edits[i];
    float &at = logits[(size_t)edit.row * columns + edit.token];
    if (edit.keeps) edits[i].raw = sane(at);
    float logit = __fadd_rn(sane(at), edit.bias);
    logit = logit > 0.0f ? __fdiv_rn(logit, edit.repetition) : __fmul_rn(logit, edit.repetition);
    at = __fsub_rn(logit, edit.minus);
}

// Sums over the block before each thread, and over all of it; `shared` holds 33 numbers.
DEVICE u64 sum_before(u64 x, u64 *shared, u64 &total) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = x;
    for (int step = 1; step < 32; step <<= 1) {
        u64 other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == 31) shared[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 before = 0;
        for (int i = 0; i < WARPS; i++) {
            u64 of_warp = shared[i];
            shared[i] = before;
            before += of_warp;
        }
        shared[WARPS] = before;
    }
    __syncthreads();
    u64 before = shared[warp] + sum - x;
    total = shared[WARPS];
    __syncthreads();
    return before;
}

// One row, as its keys.
struct Row {
    const float *logits;
    int columns;
    float best, rate;

    __device__ __forceinline__ u32 key(int token) const {
        float below = best - sane(logits[token]);
        return below < 64.0f ? (u32)(below * 67108864.0f) : FARTHEST;
    }
    __device__ __forceinline__ u64 weight(u32 key) const {
        if (key == FARTHEST) return 0;
        return (u64)(exp2_fast(-(float)key * (rate / 67108864.0f)) * 1099511627776.0f);
    }
};

// The best logit and the lowest token that has it.
DEVICE float best_of(const float *logits, int columns, int &token, float *tops, int *tokens) {
    float best = -INFINITY;
    token = 0x7fffffff;
#pragma unroll 4
    for (int i = threadIdx.x; i < columns; i += THREADS) {
        float logit = sane(logits[i]);
        if (logit > best) best = logit, token = i;
    }
    for (int round = 0; round < 2; round++) {
        for (int step = 16; step > 0; step >>= 1) {
            float other = __shfl_xor_sync(0xffffffffu, best, step);
            int other_token = __shfl_xor_sync(0xffffffffu, token, step);
            if (other > best || (other == best && other_token < token)) best = other, token = other_token;
        }
        if (round == 1) break;
        if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = best, tokens[threadIdx.x / 32] = token;
        __syncthreads();
        best = tops[threadIdx.x % 32], token = tokens[threadIdx.x % 32];
    }
    return best;
}

// What is kept: every token with a smaller key, and `ties` of those that have it, the lowest first.
struct Cut {
    u32 key;
    u64 ties;
};

// The fewest best tokens that `value`, a function of the key, adds up to `target` over. They must reach it. Eleven bits of
// the key at a time; `bins` holds BINS numbers.
template <typename Value>
DEVICE Cut cut_at(const Row &row, u64 target, Value value, u64 *bins, u64 *shared) {
    __shared__ u32 found;
    __shared__ u64 found_before;
    u64 better = 0;
    u32 prefix = 0;
    for (int shift = 21; shift >= 0; shift = shift == 10 ? 0 : shift - 11) {
        int width = shift == 0 ? 10 : 11;
        for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
        __syncthreads();
#pragma unroll 4
        for (int i = threadIdx.x; i < row.columns; i += THREADS) {
            u32 key = row.key(i);
            if (shift < 21 && key >> (shift + width) != prefix) continue;
            u64 x = value(key);
            if (x) atomicAdd(&bins[key >> shift & ((1u << width) - 1)], x);
        }
        __syncthreads();
        u64 low = bins[2 * threadIdx.x], high = bins[2 * threadIdx.x + 1], all;
        u64 before = better + sum_before(low + high, shared, all);
        if (before < target && target <= before + low + high) {
            bool second = target > before + low;
            found = 2 * threadIdx.x + second;
            found_before = second ? before + low : before;
        }
        __syncthreads();
        prefix = prefix << width | found;
        better = found_before;
        __syncthreads();
    }
    u64 each = value(prefix);
    return {prefix, (target - better + each - 1) / each};
}

// The lowest token at which the sum of `value(token)` over tokens in order passes `target`. Each warp has a run of tokens;
// the one in which it happens goes through it again.
template <typename Value>
DEVICE int passes_at(int columns, Value value, u64 *shared, bool whole_known, double unit, u64 target) {
    __shared__ int found;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int span = (columns + THREADS - 1) / THREADS * 32, from = warp * span, to = min(from + span, columns);
    u64 mine = 0;
#pragma unroll 4
    for (int i = from + lane; i < to; i += 32) mine += value(i);
    u64 total, before = sum_before(mine, shared, total);
    if (!whole_known) {
        target = (u64)(unit * (double)total);
        if (target >= total) target = total - 1;
    }
    if (threadIdx.x == 0) found = 0x7fffffff;
    __syncthreads();
    u64 after = __shfl_sync(0xffffffffu, before + mine, 31);
    before = __shfl_sync(0xffffffffu, before, 0);
    if (before <= target && target < after) {
        for (int base = from; base < to; base += 32) {
            u64 sum = base + lane < to ? value(base + lane) : 0;
            for (int step = 1; step < 32; step <<= 1) {
                u64 other = __shfl_up_sync(0xffffffffu, sum, step);
                if (lane >= step) sum += other;
            }
            u32 past = __ballot_sync(0xffffffffu, before + sum > target);
            if (past) {
                if (lane == 0) found = base + __ffs(past) - 1;
                break;
            }
            before += __shfl_sync(0xffffffffu, sum, 31);
        }
    }
    __syncthreads();
    return found;
}

// The highest token of those that have the cut's key and are kept.
DEVICE int last_of(const Row &row, Cut cut, u64 *shared) {
    if (cut.key == FARTHEST) return 0x7fffffff;
    auto tie = [&](int token) -> u64 { return row.key(token) == cut.key; };
    return passes_at(row.columns, tie, shared, true, 0.0, cut.ties - 1);
}

struct Scratch {
    u64 bins[BINS], sums[WARPS + 1];
    float tops[WARPS];
    int tokens[WARPS];
};

// Log-probabilities are of the logits before any edit. Grid: rows, each with the number of best tokens that is wanted.
extern "C" __global__ void __launch_bounds__(THREADS, 1) raw_logits(Raw *out, const float *logits, const int2 *rows, int columns) {
    __shared__ Scratch s;
    __shared__ u32 found;
    int2 wanted = rows[blockIdx.x];
    Raw &raw = out[blockIdx.x];
    Row row = {logits + (size_t)wanted.x * columns, columns, 0.0f, 1.4426950408889634f};
    int best_token;
    row.best = best_of(row.logits, columns, best_token, s.tops, s.tokens);
    if (row.best == -INFINITY) row.best = 0.0f;
    u64 mine = 0, total;
#pragma unroll 4
    for (int i = threadIdx.x; i < columns; i += THREADS) mine += row.weight(row.key(i));
    sum_before(mine, s.sums, total);
    int count = min(min(wanted.y, MOST), columns);
    if (threadIdx.x == 0) raw.best = row.best, raw.total = total, raw.count = count, found = 0;
    if (count == 0) return;
    Cut cut = {FARTHEST, ~0ull};
    if (count < columns) cut = cut_at(row, count, [](u32) -> u64 { return 1; }, s.bins, s.sums);
    // Not `last_of`: the last key may be what fills the list.
    auto tie = [&](int token) -> u64 { return row.key(token) == cut.key; };
    int last_tie = count < columns ? passes_at(columns, tie, s.sums, true, 0.0, cut.ties - 1) : columns;
    for (int i = threadIdx.x; i < columns; i += THREADS) {
        u32 key = row.key(i);
        if (key > cut.key || (key == cut.key && i > last_tie)) continue;
        u32 at = atomicAdd(&found, 1u);
        if (at < MOST) raw.tokens[at] = i, raw.logits[at] = sane(row.logits[i]);
    }
}

// Grid: draws.
extern "C" __global__ void __launch_bounds__(THREADS, 1) draw_tokens(Drawn *out, const float *logits, const Draw *draws, int columns) {
    __shared__ Scratch s;
    Draw draw = draws[blockIdx.x];
    Row row = {logits + (size_t)draw.row * columns, columns, 0.0f, draw.rate};
    int best_token;
    row.best = best_of(row.logits, columns, best_token, s.tops, s.tokens);
    if (draw.rate == 0.0f || row.best == -INFINITY) {
        if (best_token == 0x7fffffff) best_token = 0;
        if (threadIdx.x == 0) out[blockIdx.x] = {best_token, sane(row.logits[best_token])};
        return;
    }
    Cut cut = {FARTHEST, ~0ull};
    if (draw.top_k > 0 && draw.top_k < (u32)columns)
        cut = cut_at(row, draw.top_k, [](u32) -> u64 { return 1; }, s.bins, s.sums);
    if (draw.top_p < 1.0f) {
        u64 mine = 0, total;
#pragma unroll 4
        for (int i = threadIdx.x; i < columns; i += THREADS) {
            u32 key = row.key(i);
            if (key < cut.key) mine += row.weight(key);
        }
        sum_before(mine, s.sums, total);
        if (cut.key != FARTHEST) total += cut.ties * row.weight(cut.key);
        u64 target = (u64)ceil((double)draw.top_p * (double)total);
        target = target < 1 ? 1 : target > total ? total : target;
        cut = cut_at(row, target, [&](u32 key) { return row.weight(key); }, s.bins, s.sums);
    }
    int last_tie = last_of(row, cut, s.sums);
    u64 least = (u64)ceil((double)draw.min_p * 1099511627776.0);
    auto kept = [&](int token) -> u64 {
        u32 key = row.key(token);
        u64 weight = row.weight(key);
        bool in = key < cut.key || (key == cut.key && token <= last_tie);
        return in && weight >= least ? weight : 0;
    };
    int token = passes_at(columns, kept, s.sums, false, draw.unit, 0);
    if (token == 0x7fffffff) token = best_token;
    if (threadIdx.x == 0) out[blockIdx.x] = {token, sane(row.logits[token])};
}
