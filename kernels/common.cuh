// Helpers that every kernel may use: indices, reciprocals, the logistic function, reductions in a fixed order, narrow
// number formats.
//
// Blocks are one-dimensional and a multiple of 32 threads wide wherever a function below speaks of warps.
// tanh needs no helper: CUDA's tanhf errs by at most 2 ulp and does not overflow.
// Source: CUDA C++ Programming Guide, "Warp Shuffle Functions" and the table of maximum ulp errors.

#include "ptx.cuh"

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ constexpr int ceil_div(int n, int divisor) { return (n + divisor - 1) / divisor; }

__device__ __forceinline__ int lane() { return threadIdx.x % WARP; }

__device__ __forceinline__ int warp() { return threadIdx.x / WARP; }

// Index of this thread among all threads of a one-dimensional grid.
__device__ __forceinline__ size_t thread_in_grid() { return size_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// 1 / x for x in [2^-126, 2^126], to 1 ulp, exactly 1 of 1: an approximate division (2 ulp) and a step of Newton's
// method. Above, it is 0. An exact division calls a function for special operands, and the compiler interleaves nothing
// with such a call.
__device__ __forceinline__ float reciprocal(float x)
{
    const float y = __fdividef(1.0f, x);
    return fmaf(fmaf(-x, y, 1.0f), y, y);
}

// 1 / (1 + exp(-x)). Below -88 it is 0, as GPUs flush it, where the exponential may be infinite.
__device__ __forceinline__ float sigmoid(float x) { return x < -88.0f ? 0.0f : reciprocal(1.0f + expf(-x)); }

struct Sum {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

struct Maximum {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The values of the 32 lanes combined, in every lane. Both partners of a butterfly step combine the same two numbers,
// and `Combine` commutes, so all lanes end with equal bits.
template <class Combine>
__device__ __forceinline__ float warp_reduce(float value, Combine combine)
{
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value = combine(value, __shfl_xor_sync(ALL_LANES, value, distance));
    return value;
}

// The values of all threads of a block of BLOCK_WARPS warps combined, in every thread, warp by warp in ascending order.
// `scratch` is shared memory of at least one float per warp; the caller may use it again without a barrier.
template <int BLOCK_WARPS, class Combine>
__device__ __forceinline__ float block_reduce(float value, float *scratch, Combine combine)
{
    value = warp_reduce(value, combine);
    __syncthreads();  // an earlier reduction may still be reading scratch
    if (lane() == 0)
        scratch[warp()] = value;
    __syncthreads();
    value = scratch[0];
#pragma unroll
    for (int w = 1; w < BLOCK_WARPS; ++w)
        value = combine(value, scratch[w]);
    return value;
}

__device__ __forceinline__ float warp_sum(float value) { return warp_reduce(value, Sum()); }
__device__ __forceinline__ float warp_max(float value) { return warp_reduce(value, Maximum()); }

template <int BLOCK_WARPS>
__device__ __forceinline__ float block_sum(float value, float *scratch)
{
    return block_reduce<BLOCK_WARPS>(value, scratch, Sum());
}

// The sum of an array, computed by one block of BLOCK_WARPS warps, in every thread of it.
template <int BLOCK_WARPS>
__device__ __forceinline__ float array_sum(const float *values, int count, float *scratch)
{
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += BLOCK_WARPS * WARP)
        sum += values[i];
    return block_sum<BLOCK_WARPS>(sum, scratch);
}

// Adds up values[0 .. COUNT) over the lanes, each sum in one lane: values[i] becomes sum number first + i, valid where
// first + i < end. Before the call, `first` is 0 and `end` is COUNT. A step halves the sums that a lane works on, so
// that COUNT sums take about COUNT shuffles, not 5 COUNT.
template <int COUNT, int DISTANCE, int N>
__device__ __forceinline__ void scatter_sums(float (&values)[N], int &first, int &end)
{
    constexpr int HALF = (COUNT + 1) / 2;
    const bool upper = lane() & DISTANCE;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        const float low = values[i], high = i + HALF < COUNT ? values[i + HALF] : 0.0f;
        values[i] = (upper ? high : low) + __shfl_xor_sync(ALL_LANES, upper ? low : high, DISTANCE);
    }
    if (upper)
        first += HALF;
    else
        end = min(end, first + HALF);
    if constexpr (DISTANCE > 1)
        scatter_sums<HALF, DISTANCE / 2>(values, first, end);
}

// How many of COUNT values a lane holds after scatter_sums.
__device__ constexpr int values_per_lane(int count)
{
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        count = (count + 1) / 2;
    return count;
}

// bfloat16 is the upper half of a float, stored as an unsigned short; rounding is to nearest, ties to even.
__device__ __forceinline__ float from_bf16(unsigned short x) { return __uint_as_float(unsigned(x) << 16); }

#if __CUDA_ARCH__ < 800
// to_bf16 and pack_bf16 of ptx.cuh, for GPUs without the instruction cvt.rn.bf16.
__device__ __forceinline__ unsigned short to_bf16(float x)
{
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return 0x7fff;  // NaN, as the instruction writes it
    return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ __forceinline__ unsigned pack_bf16(float low, float high)
{
    return unsigned(to_bf16(high)) << 16 | to_bf16(low);
}
#else
// An operand of mma_m16n8k8_tf32 from the bits of a float: the tensor core truncates the result to the nearest tf32 of
// that float. One instruction less than to_tf32, for loops in which every instruction counts.
__device__ __forceinline__ unsigned tf32_operand(unsigned bits)
{
    const float infinity = __uint_as_float(0x7f800000u);
    return fabsf(__uint_as_float(bits)) < infinity ? bits + 0x1000u : bits;
}
#endif
