// The logits of rows of text, summed over the blocks that share the units: each block publishes what its own units add,
// and a block that draws a row's next character sums the parts. Both are for all threads of a block together.
#include "block.cuh"

__device__ constexpr int round_up(int n, int multiple) { return ceil_div(n, multiple) * multiple; }

// What this block's units, with states (units, padded_rows), add to the logits of its group's rows: parts (rows, V),
// `stride` from row to row. A thread takes one v of TILE rows.
template <int TILE>
__device__ __forceinline__ void publish_logits(float *parts, int stride, const float *W_out, const float *states,
                                               int rows, int padded_rows, int V, int units)
{
    for (int i = threadIdx.x; i < V * (padded_rows / TILE); i += THREADS) {
        const int v = i % V, row = i / V * TILE;
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
                parts[(row + r) * stride + v] = sums[r];
    }
}

// How many threads share the sum over the blocks for four logits.
__device__ constexpr int logits_shares(int V) { return V > 4 * THREADS ? 1 : THREADS / ceil_div(V, 4); }

// The logits (V,) of one row, in shared memory with room for logits_shares(V) rows of round_up(V, 4): the sum of what
// the blocks published for it, `stride` from block to block.
__device__ __forceinline__ void sum_logits(float *logits, const float *parts, size_t stride, int blocks,
                                           const float *__restrict__ b_out, int V)
{
    const int quads = ceil_div(V, 4), shares = logits_shares(V);
    for (int i = threadIdx.x; i < quads * shares; i += THREADS) {
        const int v = 4 * (i % quads);
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8  // loads in flight
        for (int block = i / quads; block < blocks; block += shares) {
            const float4 part = *reinterpret_cast<const float4 *>(parts + block * stride + v);
            sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        *reinterpret_cast<float4 *>(logits + 4 * i) = sum;
    }
    __syncthreads();
    for (int v = threadIdx.x; v < V; v += THREADS) {
        float sum = b_out[v];
        for (int share = 0; share < shares; ++share)
            sum += logits[share * 4 * quads + v];
        logits[v] = sum;  // where this thread alone has read
    }
    __syncthreads();
}
