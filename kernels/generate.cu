// Generation: a step of the recurrence for R rows of text, the output layer, and one character drawn per row.
//
//   i = P[id] (layer 0), W_ih x + b_ih (above it)      a = W_hh h + b_hh
//   r = sigmoid(i_r + a_r)    z = sigmoid(i_z + a_z)    n = tanh(i_n + r a_n)    h' = n + z (h - n)
//   logits = W_out h + b_out
//   p_v = exp((logits_v - max) / temperature); those outside top_k, top_p or min_p become 0, as that of [UNK], id 0, is
//   drawn = the first v with p_1 + ... + p_v > uniform (p_1 + ... + p_(V-1))
//
// P (V, 3H), W_hh, W_ih (3H, H), b_hh, b_ih (3H,), W_out (V, H), b_out (V,), states h (R, H), logits (R, V), uniforms
// (R,), uniforms_tr (T, R) float32; ids (R,), forced_tr, ids_tr (T, R) int32, forced_tr negative where a character is
// to be drawn.
//
// A step needs the old states of all units, so new states go to scratch, and the kernel that reads them next, for the
// layer above or the output layer, also puts them in their place.
//
// step_first, step_upper, output_layer: a warp owns one unit (with its three gates) or one logit, for ROWS rows; its
// lanes share the sum over the inputs. sample, next_character: a block owns a row.
// Bytes per character: reads the weights once per ROWS rows, 12 H^2 in the first layer, 24 H^2 in those above, 4 H V in
// the output layer; writes 8 R H per layer and 4 R V.
// Variants: one step per launch, for any sizes.
// Source: Holtzman et al., "The Curious Case of Neural Text Degeneration" (top-p); Nguyen et al., "Turning Up the Heat"
// (min-p).

#include "common.cuh"

#if !defined(THREADS) || !defined(ROWS)
#error "generate.cu needs THREADS, of a block, and ROWS, that a warp multiplies its weights with"
#endif

constexpr int WARPS = THREADS / WARP;
constexpr int DIGIT_BITS = 3;
static_assert(WARPS == 1 << DIGIT_BITS, "find_cut needs a warp for each value of a digit");

// ---- Recurrence and output layer ------------------------------------------------------------------------------------

// sums[g][r] = W[g] . x[r], in all lanes of the warp, where W[g] are N rows of a matrix, `stride` elements apart, and
// x[r] are ROWS rows of x (R, K) from row `first` on (the last one again where R ends before).
template <int N>
__device__ __forceinline__ void dot_rows(float (&sums)[N][ROWS], const float *__restrict__ W, size_t stride,
                                         const float *__restrict__ x, int first, int R, int K)
{
#pragma unroll
    for (int g = 0; g < N; ++g)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            sums[g][r] = 0.0f;
#pragma unroll 4  // loads in flight: there are only a few warps per multiprocessor to hide their latency
    for (int k = lane(); k < K; k += WARP) {
        float weight[N];
#pragma unroll
        for (int g = 0; g < N; ++g)
            weight[g] = W[g * stride + k];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float x_k = x[size_t(min(first + r, R - 1)) * K + k];
#pragma unroll
            for (int g = 0; g < N; ++g)
                sums[g][r] += weight[g] * x_k;
        }
    }
#pragma unroll
    for (int g = 0; g < N; ++g)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            sums[g][r] = warp_sum(sums[g][r]);
}

// sums[r] in lane r, so that one lane finishes each row. A plain index would put the sums in local memory.
__device__ __forceinline__ float of_lane(const float (&sums)[ROWS])
{
    float value = sums[0];
#pragma unroll
    for (int r = 1; r < ROWS; ++r)
        value = lane() == r ? sums[r] : value;
    return value;
}

// One unit of one row; i and a as the head of this file names them, before b_hh is added.
__device__ __forceinline__ float gru_unit(float i_r, float i_z, float i_n, float a_r, float a_z, float a_n,
                                          const float *__restrict__ b_hh, int j, int H, float h)
{
    const float r = sigmoid(i_r + (a_r + b_hh[j]));
    const float z = sigmoid(i_z + (a_z + b_hh[H + j]));
    const float n = tanhf(i_n + r * (a_n + b_hh[2 * H + j]));
    return n + z * (h - n);
}

// The states of the layer below, put in their place by all threads of the grid.
__device__ __forceinline__ void keep_states(float *__restrict__ h_below, const float *__restrict__ x, int R, int H)
{
    const size_t count = size_t(R) * H, threads = size_t(gridDim.x) * blockDim.x;
    for (size_t i = thread_in_grid(); i < count; i += threads)
        h_below[i] = x[i];
}

// Warps of the grid take the units of the first ROWS rows, then those of the next.
__device__ __forceinline__ int unit_of_warp(int units) { return int(thread_in_grid() / WARP % units); }
__device__ __forceinline__ int first_row_of_warp(int units) { return int(thread_in_grid() / WARP / units) * ROWS; }

extern "C" __global__ void __launch_bounds__(THREADS)
step_first(float *__restrict__ h_new, const float *__restrict__ h, const float *__restrict__ P,
           const int *__restrict__ ids, const float *__restrict__ W_hh, const float *__restrict__ b_hh, int R, int H)
{
    const int j = unit_of_warp(H), first = first_row_of_warp(H), row = first + lane();
    if (first >= R)
        return;
    float a[3][ROWS];
    dot_rows(a, W_hh + size_t(j) * H, size_t(H) * H, h, first, R, H);
    const float a_r = of_lane(a[0]), a_z = of_lane(a[1]), a_n = of_lane(a[2]);
    if (lane() < ROWS && row < R) {
        const float *i = P + size_t(ids[row]) * 3 * H + j;
        const size_t at = size_t(row) * H + j;
        h_new[at] = gru_unit(i[0], i[H], i[2 * H], a_r, a_z, a_n, b_hh, j, H, h[at]);
    }
}

// x (R, H) are the new states of the layer below, on their way to h_below.
extern "C" __global__ void __launch_bounds__(THREADS)
step_upper(float *__restrict__ h_new, float *__restrict__ h_below, const float *__restrict__ h,
           const float *__restrict__ x, const float *__restrict__ W_ih, const float *__restrict__ b_ih,
           const float *__restrict__ W_hh, const float *__restrict__ b_hh, int R, int H)
{
    keep_states(h_below, x, R, H);
    const int j = unit_of_warp(H), first = first_row_of_warp(H), row = first + lane();
    if (first >= R)
        return;
    float i[3][ROWS], a[3][ROWS];
    dot_rows(i, W_ih + size_t(j) * H, size_t(H) * H, x, first, R, H);
    dot_rows(a, W_hh + size_t(j) * H, size_t(H) * H, h, first, R, H);
    const float i_r = of_lane(i[0]), i_z = of_lane(i[1]), i_n = of_lane(i[2]);
    const float a_r = of_lane(a[0]), a_z = of_lane(a[1]), a_n = of_lane(a[2]);
    if (lane() < ROWS && row < R) {
        const size_t at = size_t(row) * H + j;
        h_new[at] = gru_unit(i_r + b_ih[j], i_z + b_ih[H + j], i_n + b_ih[2 * H + j], a_r, a_z, a_n, b_hh, j, H,
                             h[at]);
    }
}

// x (R, H) are the new states of the last layer, on their way to h_top. Nobody reads the logits of a row whose next
// character is forced; they are left as they are.
extern "C" __global__ void __launch_bounds__(THREADS)
output_layer(float *__restrict__ logits, float *__restrict__ h_top, const float *__restrict__ x,
             const float *__restrict__ W_out, const float *__restrict__ b_out, const int *__restrict__ forced_tr, int t,
             int R, int V, int H)
{
    keep_states(h_top, x, R, H);
    const int v = unit_of_warp(V), first = first_row_of_warp(V), row = first + lane();
    const bool free = lane() < ROWS && row < R && forced_tr[size_t(t) * R + row] < 0;
    if (!__any_sync(ALL_LANES, free))
        return;
    float sums[1][ROWS];
    dot_rows(sums, W_out + size_t(v) * H, 0, x, first, R, H);
    const float sum = of_lane(sums[0]);
    if (free)
        logits[size_t(row) * V + v] = sum + b_out[v];
}

// ---- Drawing a character --------------------------------------------------------------------------------------------

struct Options {
    float temperature;
    int top_k;
    float top_p, min_p;
};

// The rank of a character as a number, the larger the more likely; of equal logits, the one with the smaller id has the
// larger key. No two characters have the same.
using Key = unsigned long long;

// The characters of one row.
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

// The largest key of all threads, in every thread. A barrier has to stand between two calls with the same scratch.
__device__ __forceinline__ Key block_max(Key key, Key *scratch)
{
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        key = max(key, __shfl_xor_sync(ALL_LANES, key, distance));
    if (lane() == 0)
        scratch[warp()] = key;
    __syncthreads();
    for (int w = 0; w < WARPS; ++w)
        key = max(key, scratch[w]);
    return key;
}

// Sum of the weights of the characters whose key is at least `cut`, by one warp. The order of the sum does not depend
// on the cut, so a larger cut never has a larger sum, whatever the rounding.
template <class Weight>
__device__ __forceinline__ float weight_from(Key cut, const Row &row, Weight weight)
{
    float sum = 0.0f;
    for (int v = 1 + lane(); v < row.V; v += WARP)
        if (row.key(v) >= cut)
            sum += weight(v);
    return warp_sum(sum);
}

// The largest cut from which on the characters weigh at least `wanted`; 0 if all together weigh less. The cut is found
// digit by digit, the highest first, where each warp weighs one of the values that a digit may have.
template <class Weight>
__device__ __forceinline__ Key find_cut(const Row &row, float wanted, Weight weight, float *scratch)
{
    Key cut = 0;
    for (int digits = ceil_div(32 + row.id_bits, DIGIT_BITS); digits > 0; --digits) {
        const int shift = (digits - 1) * DIGIT_BITS;
        const float sum = weight_from(cut | Key(warp()) << shift, row, weight);
        if (lane() == 0)
            scratch[warp()] = sum;
        __syncthreads();
        int digit = WARPS - 1;
        while (digit > 0 && !(scratch[digit] >= wanted))
            --digit;
        cut |= Key(digit) << shift;
        __syncthreads();  // the next digit's sums go to the same place
    }
    return cut;
}

// Sum of the values of the threads before this one, and in `total` that of all threads.
__device__ __forceinline__ float block_scan(float value, float *scratch, float &total)
{
    float through = value;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const float before = __shfl_up_sync(ALL_LANES, through, distance);
        through = lane() >= distance ? before + through : through;
    }
    float before = __shfl_up_sync(ALL_LANES, through, 1);
    before = lane() > 0 ? before : 0.0f;
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

// The character drawn from one row of logits (V,), in all threads of the block; each block draws once.
__device__ __forceinline__ int draw(const float *__restrict__ logits, float uniform, int V, const Options &options)
{
    __shared__ Key keys[WARPS];
    __shared__ float sums[WARPS];
    Row row = {logits, V, 32 - __clz(V - 1), 0.0f, options.temperature};

    Key best = 0;
    for (int v = 1 + threadIdx.x; v < V; v += THREADS)
        best = max(best, row.key(v));
    best = block_max(best, keys);
    if (options.temperature == 0.0f)
        return row.id(best);
    row.largest = logits[row.id(best)];

    Key cut = 0;
    if (options.top_k > 0)
        cut = find_cut(row, float(options.top_k), [](int) { return 1.0f; }, sums);
    if (options.top_p < 1.0f) {
        const auto p_of_top_k = [&](int v) { return row.key(v) >= cut ? row.p(v) : 0.0f; };
        cut = find_cut(row, options.top_p * weight_from(0, row, p_of_top_k), p_of_top_k, sums);  // never a smaller one
    }
    const auto p_kept = [&](int v) {
        const float p = row.p(v);
        return row.key(v) >= cut && p >= options.min_p ? p : 0.0f;
    };

    // Each thread takes neighbouring ids, so that the order of the threads is that of the ids.
    const int each = ceil_div(V - 1, THREADS), begin = min(1 + int(threadIdx.x) * each, V), end = min(begin + each, V);
    float sum = 0.0f;
    for (int v = begin; v < end; ++v)
        sum += p_kept(v);
    float total, reached = block_scan(sum, sums, total);
    int first = 0, last = 0;  // ids: the first one that passes the uniform number, the last one kept; 0 for none
    for (int v = begin; v < end; ++v) {
        const float p = p_kept(v);
        reached += p;
        last = p > 0.0f ? v : last;
        first = first == 0 && p > 0.0f && reached > uniform * total ? v : first;
    }
    // Threads behind the right one have passed the number too: the smallest id wins. Where there is none, because the
    // number is so close to 1 that rounding decides, the last one kept is drawn.
    const Key chosen = block_max(first > 0 ? Key(1) << 32 | (V - first) : Key(last), keys);
    return chosen >> 32 ? V - int(unsigned(chosen)) : max(int(chosen), 1);  // 1 where logits are not finite
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
sample(int *__restrict__ ids, const float *__restrict__ logits, const float *__restrict__ uniforms, int V,
       float temperature, int top_k, float top_p, float min_p)
{
    const size_t row = blockIdx.x;
    const int drawn = draw(logits + row * V, uniforms[row], V, {temperature, top_k, top_p, min_p});
    if (threadIdx.x == 0)
        ids[row] = drawn;
}

// The character of step t: the forced one, else one drawn.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
next_character(int *__restrict__ ids, int *__restrict__ ids_tr, const float *__restrict__ logits,
               const int *__restrict__ forced_tr, const float *__restrict__ uniforms_tr, int t, int R, int V,
               float temperature, int top_k, float top_p, float min_p)
{
    const size_t row = blockIdx.x, at = size_t(t) * R + row;
    int id = forced_tr[at];
    if (id < 0)  // the same for the whole block
        id = draw(logits + row * V, uniforms_tr[at], V, {temperature, top_k, top_p, min_p});
    if (threadIdx.x == 0)
        ids[row] = ids_tr[at] = id;
}
