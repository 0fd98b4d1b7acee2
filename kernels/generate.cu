// Generation: a step of the recurrence for R rows of text, the output layer, and one character drawn per row.
//
//   i = P[id] (layer 0), W_ih x + b_ih (above it)      a = W_hh h + b_hh
//   h' = GRU cell of i, a and h (gru.cuh)              logits = W_out h' + b_out, h' of the last layer
//   p_v = exp((logits_v - max) / temperature); 0 for [UNK], id 0, and for characters outside top_k, top_p or min_p
//   drawn = the first v with p_1 + ... + p_v > uniform (p_1 + ... + p_(V-1))
//
// P (V, 3H), W_hh, W_ih (3H, H), b_hh, b_ih (3H,), W_out (V, H), b_out (V,), states h (R, H), logits (R, V), uniforms
// (R,), uniforms_tr (T, R) float32; ids (R,), forced_tr, ids_tr (T, R) int32, forced_tr negative where a character is
// to be drawn; t (1,) int32, the number of the step, -1 before the first.
//
// A step needs the old states of all units, so a layer's new states go to scratch, h_new. The next kernel, of the layer
// above or of the output layer, multiplies h_new and copies it to h. step_first adds one to t, which output_layer and
// next_character read: so all steps are the same launches, and a CUDA graph may repeat them.
//
// step_first, step_upper, output_layer: a warp owns one unit (with its three gates) or one logit, for ROWS rows; its
// lanes share the sum over the inputs. sample, next_character: a block owns a row.
// Why not the plain way, sample of naive.cu: there one thread reads all V logits of a row again for each character that
// top_k or top_p keeps; here the 256 threads of a block share the row and rank all its characters at once.
// Bytes per character: reads the weights once per ROWS rows, 12 H^2 in the first layer, 24 H^2 in each layer above it,
// 4 H V in the output layer; writes 8 R H per layer and 4 R V.
// Variants: stepwise, here, the plain way of generate: a step in layers + 2 kernels, for any sizes. All steps in one
// launch: generate_persistent.cu for few rows, generate_batched.cu for many. plan/generation.py chooses.
// Source: generate.cuh.

#include "generate.cuh"
#include "gru.cuh"

#ifndef ROWS
#error "the launcher defines ROWS, the rows of text that a warp multiplies its weights with"
#endif

// ---- Recurrence and output layer ------------------------------------------------------------------------------------

// sums[g][r] = W[g] . x[r], in all lanes of the warp. W[g] is one of N rows of a matrix, `stride` elements apart; x[r]
// is row first + r of x (R, K), or its last row where first + r >= R.
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

// gates[g] = the sum of gate g of unit j for this lane's row, and its bias from b (3H,).
__device__ __forceinline__ void add_biases(float (&gates)[3], const float (&sums)[3][ROWS], const float *__restrict__ b,
                                           int j, int H)
{
#pragma unroll
    for (int g = 0; g < 3; ++g)
        gates[g] = of_lane(sums[g]) + b[g * H + j];
}

// Copies x, the new states of the layer below (R, H), to h_below, by all threads of the grid.
__device__ __forceinline__ void copy_states(float *__restrict__ h_below, const float *__restrict__ x, int R, int H)
{
    const size_t count = size_t(R) * H, threads = size_t(gridDim.x) * blockDim.x;
    for (size_t i = thread_in_grid(); i < count; i += threads)
        h_below[i] = x[i];
}

// Warps of the grid take all units of the first ROWS rows, then all units of the next ROWS rows.
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
    float a_sums[3][ROWS];
    dot_rows(a_sums, W_hh + size_t(j) * H, size_t(H) * H, h, first, R, H);
    if (lane() < ROWS && row < R) {
        const float *P_row = P + size_t(ids[row]) * 3 * H + j, i[3] = {P_row[0], P_row[H], P_row[2 * H]};
        float a[3];
        add_biases(a, a_sums, b_hh, j, H);
        const size_t offset = size_t(row) * H + j;
        h_new[offset] = gru_cell(i, a, h[offset]).h;
    }
}

// x (R, H) are the new states of the layer below, which this kernel copies to h_below.
extern "C" __global__ void __launch_bounds__(THREADS)
step_upper(float *__restrict__ h_new, float *__restrict__ h_below, const float *__restrict__ h,
           const float *__restrict__ x, const float *__restrict__ W_ih, const float *__restrict__ b_ih,
           const float *__restrict__ W_hh, const float *__restrict__ b_hh, int R, int H)
{
    copy_states(h_below, x, R, H);
    const int j = unit_of_warp(H), first = first_row_of_warp(H), row = first + lane();
    if (first >= R)
        return;
    float i_sums[3][ROWS], a_sums[3][ROWS];
    dot_rows(i_sums, W_ih + size_t(j) * H, size_t(H) * H, x, first, R, H);
    dot_rows(a_sums, W_hh + size_t(j) * H, size_t(H) * H, h, first, R, H);
    if (lane() < ROWS && row < R) {
        float i[3], a[3];
        add_biases(i, i_sums, b_ih, j, H);
        add_biases(a, a_sums, b_hh, j, H);
        const size_t offset = size_t(row) * H + j;
        h_new[offset] = gru_cell(i, a, h[offset]).h;
    }
}

// x (R, H) are the new states of the last layer, which this kernel copies to h_top. The logits of a row whose next
// character is forced are not read later, and are left as they are.
extern "C" __global__ void __launch_bounds__(THREADS)
output_layer(float *__restrict__ logits, float *__restrict__ h_top, const float *__restrict__ x,
             const float *__restrict__ W_out, const float *__restrict__ b_out, const int *__restrict__ forced_tr,
             const int *__restrict__ t, int R, int V, int H)
{
    copy_states(h_top, x, R, H);
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
    const int drawn = draw_character(logits + row * V, uniforms[row], V, {temperature, top_k, top_p, min_p});
    if (threadIdx.x == 0)
        ids[row] = drawn;
}

// The character of step t of each row: the forced one if there is one, else one drawn from the row's logits.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
next_character(int *__restrict__ ids, int *__restrict__ ids_tr, const float *__restrict__ logits,
               const int *__restrict__ forced_tr, const float *__restrict__ uniforms_tr, const int *__restrict__ t,
               int R, int V, float temperature, int top_k, float top_p, float min_p)
{
    const size_t row = blockIdx.x, offset = size_t(*t) * R + row;
    int id = forced_tr[offset];
    if (id < 0)  // the same for the whole block
        id = draw_character(logits + row * V, uniforms_tr[offset], V, {temperature, top_k, top_p, min_p});
    if (threadIdx.x == 0)
        ids[row] = ids_tr[offset] = id;
}
