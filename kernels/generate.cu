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
// to be drawn; t (1,) int32, the number of the step, -1 before the first.
//
// A step needs the old states of all units, so new states go to scratch, and the kernel that reads them next, for the
// layer above or the output layer, also puts them in their place. The first kernel of a step moves t on, for the last
// two, so that all steps are the same launches, which a graph may repeat.
//
// step_first, step_upper, output_layer: a warp owns one unit (with its three gates) or one logit, for ROWS rows; its
// lanes share the sum over the inputs. sample, next_character: a block owns a row.
// Bytes per character: reads the weights once per ROWS rows, 12 H^2 in the first layer, 24 H^2 in those above, 4 H V in
// the output layer; writes 8 R H per layer and 4 R V.
// Variants: this one, a step in layers + 2 kernels, for any sizes; generate_persistent.cu and, for many rows,
// generate_batched.cu, all steps in one launch.
// Source: generate.cuh.

#include "generate.cuh"

#ifndef ROWS
#error "generate.cu needs ROWS, that a warp multiplies its weights with"
#endif

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
            weight[g] = rounded(W[g * stride + k]);
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
step_first(float *__restrict__ h_new, int *__restrict__ t, const float *__restrict__ h, const float *__restrict__ P,
           const int *__restrict__ ids, const float *__restrict__ W_hh, const float *__restrict__ b_hh, int R, int H)
{
    if (thread_in_grid() == 0)
        ++*t;
    const int j = unit_of_warp(H), first = first_row_of_warp(H), row = first + lane();
    if (first >= R)
        return;
    float a[3][ROWS];
    dot_rows(a, W_hh + size_t(j) * H, size_t(H) * H, h, first, R, H);
    const float a_r = of_lane(a[0]), a_z = of_lane(a[1]), a_n = of_lane(a[2]);
    if (lane() < ROWS && row < R) {
        const float *i = P + size_t(ids[row]) * 3 * H + j;
        const size_t at = size_t(row) * H + j;
        h_new[at] = gru_unit(i[0], i[H], i[2 * H], a_r + b_hh[j], a_z + b_hh[H + j], a_n + b_hh[2 * H + j], h[at]);
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
        h_new[at] = gru_unit(i_r + b_ih[j], i_z + b_ih[H + j], i_n + b_ih[2 * H + j], a_r + b_hh[j], a_z + b_hh[H + j],
                             a_n + b_hh[2 * H + j], h[at]);
    }
}

// x (R, H) are the new states of the last layer, on their way to h_top. Nobody reads the logits of a row whose next
// character is forced; they are left as they are.
extern "C" __global__ void __launch_bounds__(THREADS)
output_layer(float *__restrict__ logits, float *__restrict__ h_top, const float *__restrict__ x,
             const float *__restrict__ W_out, const float *__restrict__ b_out, const int *__restrict__ forced_tr,
             const int *__restrict__ t, int R, int V, int H)
{
    keep_states(h_top, x, R, H);
    const int v = unit_of_warp(V), first = first_row_of_warp(V), row = first + lane();
    const bool free = lane() < ROWS && row < R && forced_tr[size_t(*t) * R + row] < 0;
    if (!__any_sync(ALL_LANES, free))
        return;
    float sums[1][ROWS];
    dot_rows(sums, W_out + size_t(v) * H, 0, x, first, R, H);
    const float sum = of_lane(sums[0]);
    if (free)
        logits[size_t(row) * V + v] = sum + b_out[v];
}

// ---- Drawing a character --------------------------------------------------------------------------------------------

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
               const int *__restrict__ forced_tr, const float *__restrict__ uniforms_tr, const int *__restrict__ t,
               int R, int V, float temperature, int top_k, float top_p, float min_p)
{
    const size_t row = blockIdx.x, at = size_t(*t) * R + row;
    int id = forced_tr[at];
    if (id < 0)  // the same for the whole block
        id = draw(logits + row * V, uniforms_tr[at], V, {temperature, top_k, top_p, min_p});
    if (threadIdx.x == 0)
        ids[row] = ids_tr[at] = id;
}
