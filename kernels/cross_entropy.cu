// Output layer, softmax, mean cross-entropy in nats, and its gradient with respect to the logits, in one pass over h.
//
//   logits = h W_out^T + b_out
//   loss = mean over positions of log(sum over v of exp(logits[v])) - logits[target]
//   dlogits[v] = (exp(logits[v]) / sum over v of exp(logits[v]) - [v is target]) / positions
//
// h (positions, H), W_out (V, H), b_out (V,), losses (positions,), loss (1,), dlogits (positions, V): float32;
// targets (positions,) int32 in [0, V). positions = T B.
//
// A block of cross_entropy_forward owns TILE_M positions and goes through V in tiles of TILE_N. A warp owns every
// eighth position, a lane every 32nd logit of a position. The block multiplies a tile (tile.cuh); then each warp brings
// the maximum and the sum of exponentials of its rows up to date, the sum being relative to the maximum so far, and
// leaves the logits for a second sweep, which makes gradients of them. The one block of mean_loss owns the loss.
// Bytes: h read once, 4 H positions; W_out once per block, from L2; dlogits written once, 4 V positions.
// Why not naive.cu's way: a thread for each position reads h once for every character, 8 H V bytes a position with
// W_out: 3.5 GB at the tutorial's sizes, where h is 26 MB; and 6,400 threads are too few for a large GPU.
// Variants, by V: up to TILE_N the logits stay in shared memory between the sweeps; above, they pass through dlogits,
// 8 V positions more. By PRECISION: fp32; tf32 and bf16 round h and W_out, and nothing else.
// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867, algorithm 3.

#include "common.cuh"
#include "tile.cuh"

constexpr int WARPS = TILE_THREADS / WARP, WARP_ROWS = TILE_M / WARPS;
constexpr int LANE_COLUMNS = ceil_div(TILE_N, WARP);
constexpr int MEAN_WARPS = 32;  // of the one block of mean_loss
static_assert(TILE_M % WARPS == 0 && WARP_ROWS <= WARP, "a lane keeps maximum and sum of one row");

// Row r of this warp, as a row of the block's tile.
__device__ __forceinline__ int row_in_tile(int r) { return warp() + WARPS * r; }

extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    cross_entropy_forward(float *__restrict__ dlogits, float *__restrict__ losses, const float *__restrict__ h,
                          const float *__restrict__ W_out, const float *__restrict__ b_out,
                          const int *__restrict__ targets, int positions, int V, int H)
{
    __shared__ __align__(16) float shared[TILE_SHARED];
    const bool one_tile = V <= TILE_N;
    const int first = blockIdx.x * TILE_M;
    // Of the logits so far: lane r keeps the maximum of row r of its warp, and the sum of exponentials relative to it.
    float maximum = __uint_as_float(0xff800000u), sum = 0.0f;

    for (int v0 = 0; v0 < V; v0 += TILE_N) {
        const int columns = min(TILE_N, V - v0);
        tile_product<true, true>(
            shared, H, [&](int m, int k) { return first + m < positions ? h[size_t(first + m) * H + k] : 0.0f; },
            [&](int k, int n) { return n < columns ? W_out[size_t(v0 + n) * H + k] : 0.0f; });
        for (int r = 0; r < WARP_ROWS && first + row_in_tile(r) < positions; ++r) {
            float *row = dlogits + size_t(first + row_in_tile(r)) * V + v0;
            const float old_maximum = __shfl_sync(ALL_LANES, maximum, r), old_sum = __shfl_sync(ALL_LANES, sum, r);
            float new_maximum = old_maximum;
#pragma unroll
            for (int i = 0; i < LANE_COLUMNS; ++i) {
                const int n = lane() + WARP * i;
                if (n >= columns)
                    break;
                float &logit = tile_c(shared, row_in_tile(r), n);
                logit += b_out[v0 + n];
                if (!one_tile)
                    row[n] = logit;
                new_maximum = fmaxf(new_maximum, logit);
            }
            new_maximum = warp_max(new_maximum);
            float new_sum = 0.0f;
#pragma unroll
            for (int i = 0; i < LANE_COLUMNS; ++i)
                if (lane() + WARP * i < columns)
                    new_sum += expf(tile_c(shared, row_in_tile(r), lane() + WARP * i) - new_maximum);
            new_sum = warp_sum(new_sum) + old_sum * expf(old_maximum - new_maximum);
            if (lane() == r) {
                maximum = new_maximum;
                sum = new_sum;
            }
        }
    }

    const float weight = reciprocal(float(positions));
    __syncwarp();  // a lane now reads logits that other lanes of its warp have written to dlogits
    for (int r = 0; r < WARP_ROWS && first + row_in_tile(r) < positions; ++r) {
        const int position = first + row_in_tile(r), target = targets[position];
        float *row = dlogits + size_t(position) * V;
        const float row_maximum = __shfl_sync(ALL_LANES, maximum, r), row_sum = __shfl_sync(ALL_LANES, sum, r);
        const float row_weight = reciprocal(row_sum);
        for (int v = lane(); v < V; v += WARP) {
            const float logit = (one_tile ? tile_c(shared, row_in_tile(r), v) : row[v]) - row_maximum;
            row[v] = (expf(logit) * row_weight - float(v == target)) * weight;
            if (v == target)
                losses[position] = logf(row_sum) - logit;
        }
    }
}

extern "C" __global__ void __launch_bounds__(MEAN_WARPS * WARP)
    mean_loss(float *__restrict__ loss, const float *__restrict__ losses, int positions)
{
    __shared__ float scratch[MEAN_WARPS];
    const float sum = array_sum<MEAN_WARPS>(losses, positions, scratch);
    if (threadIdx.x == 0)
        loss[0] = sum / float(positions);
}
