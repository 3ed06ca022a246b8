// Results that blocks of one kernel hand to each other: four bytes and a flag in one word of eight, written and read whole. Who reads asks
// until the flag is what it must be, so that there is neither a fence nor a counter between a result and its use (each would cost
// microseconds while memory is busy). A flag's number is used once only.

using Word = u64;

DEVICE void put_word(Word *at, u32 data, u32 flag) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(at), "l"((u64)flag << 32 | data) : "memory");
}
DEVICE void put_word(Word *at, float data, u32 flag) { put_word(at, __float_as_uint(data), flag); }

// After so many questions (seconds) something is wrong that no answer will mend: an error is better than silence.
struct Patience {
    int left = 1 << 23;
    __device__ __forceinline__ void lose() {
        if (--left < 0) __trap();
    }
};

DEVICE void ask(u64 (&words)[2], const Word *at) {
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(words[0]), "=l"(words[1]) : "l"(at) : "memory");
}

// Pairs of words at place(0), place(1) and so on: all of them are asked for before any is looked at.
template <int PAIRS, typename PLACE>
DEVICE void take_pairs(u32 (&data)[2 * PAIRS], PLACE place, u32 flag) {
    bool all;
    Patience patience;
    do {
        u64 words[PAIRS][2];
#pragma unroll
        for (int i = 0; i < PAIRS; i++) ask(words[i], place(i));
        all = true;
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; i++) all &= (u32)(words[i / 2][i % 2] >> 32) == flag, data[i] = (u32)words[i / 2][i % 2];
        patience.lose();
    } while (!all);
}

// What splits number first, first + away and so on came to: numbers `step` words apart, and two statistics each; those beyond `count` are
// nothing.
template <int EACH>
DEVICE void take_splits(float (&values)[EACH], float2 (&stats)[EACH], const Word *of, int step, const Word *of_stats, int first, int away,
                        int count, u32 flag) {
    bool all;
    Patience patience;
    do {
        u64 words[EACH], pairs[EACH][2];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int at = min(first + i * away, count - 1);
            asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(words[i]) : "l"(of + (size_t)at * step) : "memory");
            ask(pairs[i], of_stats + 2 * at);
        }
        all = true;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            all &= (u32)(words[i] >> 32) == flag && (u32)(pairs[i][0] >> 32) == flag && (u32)(pairs[i][1] >> 32) == flag;
            values[i] = __uint_as_float((u32)words[i]);
            stats[i] = first + i * away < count ? make_float2(__uint_as_float((u32)pairs[i][0]), __uint_as_float((u32)pairs[i][1]))
                                         : make_float2(-INFINITY, 0.0f);
        }
        patience.lose();
    } while (!all);
}

DEVICE u32 take_word(const Word *at, u32 flag) {
    u64 word;
    Patience patience;
    do {
        asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(at) : "memory");
        patience.lose();
    } while ((u32)(word >> 32) != flag);
    return (u32)word;
}
