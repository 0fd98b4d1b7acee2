// What the variants of generation share: rounding a weight, and drawing a character.
//
// Constant from the launcher: BF16, 1 where weights are rounded to bfloat16, else 0.
// draw_character<TEAM> and the functions that it calls are for the threads of a team together: all WARPS warps of a
// block, or one warp, in which there are no barriers of the block.
// Source: Holtzman et al., "The Curious Case of Neural Text Degeneration" (top-p); Nguyen et al., "Turning Up the Heat"
// (min-p).
#include "block.cuh"

#ifndef BF16
#error "the launcher defines BF16, whether weights are rounded to it"
#endif

constexpr int DIGIT_BITS = 3;
static_assert(WARPS == 1 << DIGIT_BITS, "threshold_by_digits needs a warp for each value of a digit");

// A weight of W_hh, W_ih or W_out as the kernels multiply it. P is not rounded.
__device__ __forceinline__ float rounded(float weight) { return BF16 ? from_bf16(to_bf16(weight)) : weight; }

struct Options {
    float temperature;
    int top_k;
    float top_p, min_p;
};

// Orders the characters of a row: the more likely one has the larger key; of two with equal logits, the one with the
// smaller id. No two characters of a row have equal keys.
using Key = unsigned long long;

// One row of text: the logits of its next character.
struct Row {
    const float *logits;
    int V, id_bits;
    float largest, temperature;

    __device__ __forceinline__ Key key(int v) const
    {
        const unsigned bits = __float_as_uint(logits[v] + 0.0f);  // -0 is equal to 0
        const unsigned ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
        return Key(ascending) << id_bits | ((1u << id_bits) - 1 - v);
    }

    __device__ __forceinline__ int id(Key key) const
    {
        const unsigned mask = (1u << id_bits) - 1;
        return mask - (unsigned(key) & mask);
    }

    // How likely a character is, relative to the most likely one.
    __device__ __forceinline__ float p(int v) const { return expf((logits[v] - largest) / temperature); }
};

// A thread's number in its team.
template <int TEAM>
__device__ __forceinline__ int team_thread()
{
    static_assert(TEAM == 1 || TEAM == WARPS);
    return TEAM == 1 ? lane() : threadIdx.x;
}

// The largest key of all threads, in every thread. A barrier has to stand between two calls with the same scratch.
template <int TEAM>
__device__ __forceinline__ Key team_max(Key key, Key *scratch)
{
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        key = max(key, __shfl_xor_sync(ALL_LANES, key, distance));
    if constexpr (TEAM > 1) {
        if (lane() == 0)
            scratch[warp()] = key;
        __syncthreads();
        for (int w = 0; w < TEAM; ++w)
            key = max(key, scratch[w]);
    }
    return key;
}

// Sum of weight(v) over the characters v whose key is at least `threshold`, by one warp. The order of the sum does not
// depend on the threshold, so a larger threshold never has a larger sum, whatever the rounding.
template <class Weight>
__device__ __forceinline__ float weight_from(Key threshold, const Row &row, Weight weight)
{
    float sum = 0.0f;
    for (int v = 1 + lane(); v < row.V; v += WARP)
        if (row.key(v) >= threshold)
            sum += weight(v);
    return warp_sum(sum);
}

// The largest threshold at which weight_from is at least `wanted`; 0 if all characters together weigh less. It is found
// digit by digit, the highest digit first: each warp weighs one of the values that the digit may have.
template <class Weight>
__device__ __forceinline__ Key threshold_by_digits(const Row &row, float wanted, Weight weight, float *scratch)
{
    Key threshold = 0;
    for (int digits = ceil_div(32 + row.id_bits, DIGIT_BITS); digits > 0; --digits) {
        const int shift = (digits - 1) * DIGIT_BITS;
        const float sum = weight_from(threshold | Key(warp()) << shift, row, weight);
        if (lane() == 0)
            scratch[warp()] = sum;
        __syncthreads();
        int digit = WARPS - 1;
        while (digit > 0 && !(scratch[digit] >= wanted))
            --digit;
        threshold |= Key(digit) << shift;
        __syncthreads();  // the sums of the next digit go to the same scratch
    }
    return threshold;
}

// As find_threshold. A character stays if few enough characters are more likely than it, and if their probabilities add
// up to little enough. That sum has the same order for all characters, so it is never smaller for a less likely one.
template <int TEAM>
__device__ __forceinline__ Key threshold_by_ranks(const Row &row, const Options &options, Key *keys, float *sums)
{
    constexpr int MEMBERS = TEAM * WARP;
    // Calls use(v, key, p_before) for those characters v of this thread that top_k leaves.
    const auto for_own = [&](auto use) {
        for (int first_v = 1; first_v + team_thread<TEAM>() - lane() < row.V; first_v += MEMBERS) {
            const int v = first_v + team_thread<TEAM>();
            const Key key = v < row.V ? row.key(v) : 0;
            int rank = 0;
            float p_before = 0.0f;
            for (int first = 1; first < row.V; first += WARP) {
                const int u = first + lane();
                const Key key_u = u < row.V ? row.key(u) : 0;
                const float p_u = u < row.V ? row.p(u) : 0.0f;
#pragma unroll 8  // shuffles in flight
                for (int i = 0; i < min(WARP, row.V - first); ++i) {
                    const bool more_likely = __shfl_sync(ALL_LANES, key_u, i) > key;
                    const float p = __shfl_sync(ALL_LANES, p_u, i);
                    rank += more_likely;
                    p_before += more_likely ? p : 0.0f;
                }
            }
            if (v < row.V && (options.top_k == 0 || rank < options.top_k))
                use(v, key, p_before);
        }
    };
    float p_of_top_k = 0.0f;
    if (options.top_p < 1.0f) {
        for_own([&](int v, Key, float) { p_of_top_k += row.p(v); });
        p_of_top_k = TEAM == 1 ? warp_sum(p_of_top_k) : block_sum<WARPS>(p_of_top_k, sums);
    }
    Key smallest = ~Key(0);
    for_own([&](int, Key key, float p_before) {
        if (options.top_p >= 1.0f || p_before < options.top_p * p_of_top_k)
            smallest = min(smallest, key);
    });
    return ~team_max<TEAM>(~smallest, keys);
}

// The smallest key that top_k and top_p leave. Ranks take V steps for each character of a thread, twice with top_p, and
// up to 3 barriers. Digits take 26 barriers or more for top_k and as many for top_p, but far fewer steps where a thread
// has many characters.
template <int TEAM>
__device__ __forceinline__ Key find_threshold(const Row &row, const Options &options, Key *keys, float *sums)
{
    if (options.top_k == 0 && options.top_p >= 1.0f)
        return 0;
    if (TEAM == 1 || row.V <= 1 + THREADS)
        return threshold_by_ranks<TEAM>(row, options, keys, sums);
    Key threshold = 0;
    if (options.top_k > 0)
        threshold = threshold_by_digits(row, float(options.top_k), [](int) { return 1.0f; }, sums);
    if (options.top_p < 1.0f) {
        const auto p_of_top_k = [&](int v) { return row.key(v) >= threshold ? row.p(v) : 0.0f; };
        const float wanted = options.top_p * weight_from(0, row, p_of_top_k);
        threshold = threshold_by_digits(row, wanted, p_of_top_k, sums);  // never smaller than that of top_k
    }
    return threshold;
}

// The sum of the values of all threads before this one; `total` becomes the sum of the values of all threads.
template <int TEAM>
__device__ __forceinline__ float team_scan(float value, float *scratch, float &total)
{
    float through = value;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const float before = __shfl_up_sync(ALL_LANES, through, distance);
        through = lane() >= distance ? before + through : through;
    }
    float before = __shfl_up_sync(ALL_LANES, through, 1);
    before = lane() > 0 ? before : 0.0f;
    if constexpr (TEAM == 1) {
        total = __shfl_sync(ALL_LANES, through, WARP - 1);
        return before;
    }
    if (lane() == WARP - 1)
        scratch[warp()] = through;
    __syncthreads();
    float warps_before = 0.0f;
    total = 0.0f;
    for (int w = 0; w < WARPS; ++w) {
        warps_before = w == warp() ? total : warps_before;
        total += scratch[w];
    }
    return warps_before + before;
}

// The id drawn from one row of logits (V,), in all threads of the team. A barrier has to stand between two calls.
template <int TEAM = WARPS>
__device__ __forceinline__ int draw_character(const float *__restrict__ logits, float uniform, int V,
                                              const Options &options)
{
    __shared__ Key keys[WARPS];
    __shared__ float sums[WARPS];
    Row row = {logits, V, 32 - __clz(V - 1), 0.0f, options.temperature};

    Key best = 0;
#pragma unroll 1  // a thread has few characters, in each of these loops
    for (int v = 1 + team_thread<TEAM>(); v < V; v += TEAM * WARP)
        best = max(best, row.key(v));
    best = team_max<TEAM>(best, keys);
    if (options.temperature == 0.0f)
        return row.id(best);
    row.largest = logits[row.id(best)];

    const Key threshold = find_threshold<TEAM>(row, options, keys, sums);
    const auto p_kept = [&](int v) {
        const float p = row.p(v);
        return row.key(v) >= threshold && p >= options.min_p ? p : 0.0f;
    };

    // Each thread takes neighbouring ids, so that a sum in the order of the threads is one in the order of the ids.
    const int each = ceil_div(V - 1, TEAM * WARP), begin = min(1 + team_thread<TEAM>() * each, V);
    const int end = min(begin + each, V);
    float sum = 0.0f;
#pragma unroll 1
    for (int v = begin; v < end; ++v)
        sum += p_kept(v);
    float total, reached = team_scan<TEAM>(sum, sums, total);
    int first = 0, last = 0;  // ids: the first that passes the uniform number, the last that is kept; 0 where none is
#pragma unroll 1
    for (int v = begin; v < end; ++v) {
        const float p = p_kept(v);
        reached += p;
        last = p > 0.0f ? v : last;
        first = first == 0 && p > 0.0f && reached > uniform * total ? v : first;
    }
    // Threads with larger ids have passed the number too, so the smallest id of all threads is drawn. Where no thread
    // has passed it, because it is so close to 1 that rounding decides, the last id kept is drawn.
    const Key chosen = team_max<TEAM>(first > 0 ? Key(1) << 32 | (V - first) : Key(last), keys);
    return chosen >> 32 ? V - int(unsigned(chosen)) : max(int(chosen), 1);  // 1 where logits are not finite
}
