// The logits of rows of text, summed over the blocks of a group: each block publishes partial_logits, the sums over its
// own units, and a block that draws a row's next character adds them up. Both functions are for all threads of a block.
#include "block.cuh"

__device__ constexpr int round_up(int n, int multiple) { return ceil_div(n, multiple) * multiple; }

// partial_logits (rows, V), `stride` from row to row, of a block whose units have W_out (units, V) and states (units,
// padded_rows), both in shared memory. A thread sums one v of TILE rows.
template <int TILE>
__device__ __forceinline__ void publish_partial_logits(float *partial_logits, int stride, const float *W_out,
                                                       const float *states, int rows, int padded_rows, int V, int units)
{
    for (int e = threadIdx.x; e < V * (padded_rows / TILE); e += THREADS) {
        const int v = e % V, row = e / V * TILE;
        float sums[TILE] = {};
        for (int u = 0; u < units; ++u) {
            const float weight = W_out[u * V + v];
            const void *aligned = __builtin_assume_aligned(states + u * padded_rows + row, 4 * (TILE < 4 ? TILE : 4));
            const float *state = static_cast<const float *>(aligned);
#pragma unroll
            for (int r = 0; r < TILE; ++r)
                sums[r] = fmaf(weight, state[r], sums[r]);
        }
#pragma unroll
        for (int r = 0; r < TILE; ++r)
            if (row + r < rows)
                partial_logits[(row + r) * stride + v] = sums[r];
    }
}

// How many threads share the sum over the blocks for four logits.
__device__ constexpr int logits_shares(int V) { return V > 4 * THREADS ? 1 : THREADS / ceil_div(V, 4); }

// The logits (V,) of one row: b_out plus its partial_logits of all blocks, `stride` from block to block. `logits` is
// shared memory with room for logits_shares(V) rows of round_up(V, 4).
__device__ __forceinline__ void sum_partial_logits(float *logits, const float *partial_logits, size_t stride,
                                                   int blocks, const float *__restrict__ b_out, int V)
{
    const int quads = ceil_div(V, 4), shares = logits_shares(V);
    for (int e = threadIdx.x; e < quads * shares; e += THREADS) {
        const int v = 4 * (e % quads);
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8  // loads in flight
        for (int block = e / quads; block < blocks; block += shares) {
            const float4 added = *reinterpret_cast<const float4 *>(partial_logits + block * stride + v);
            sum.x += added.x, sum.y += added.y, sum.z += added.z, sum.w += added.w;
        }
        *reinterpret_cast<float4 *>(logits + 4 * e) = sum;
    }
    __syncthreads();
    for (int v = threadIdx.x; v < V; v += THREADS) {
        float sum = b_out[v];
        for (int share = 0; share < shares; ++share)
            sum += logits[share * 4 * quads + v];
        logits[v] = sum;  // no other thread reads logits[v] before the barrier
    }
    __syncthreads();
}
