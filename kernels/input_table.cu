// Sums of rows by id: dP[v] = sum of di[p] over the positions p with ids[p] == v, ascending; 0 for an id without any.
//
// Arguments: di (N, 3H) float32, given as da (N, 3H), whose first 2H columns equal di's, and di_n (N, H), the last H
// columns of di; ids (N,) int32 in [0, V); result dP (V, 3H) float32. The products of the input table are in matmul.cu.
//
// Positions are first sorted by id, stably, one digit of 8 bits at a time from the lowest. count_digits counts the
// digits of each chunk of RADIX positions; scan_digits turns these counts into offsets, where the first position of
// each chunk with each digit goes; place_by_digit moves the positions there. A block owns a chunk and a thread a
// position of it; scan_digits is one block, where a thread owns a digit. Equal ids then lie together: a block of
// sum_by_id owns one id and 128 columns, a lane four of them, a warp every (blockDim.x / 32)nd position of that id; the
// warps' sums are added in ascending order.
//
// Bytes: sorting reads and writes about 24 N per digit; sum_by_id reads 12 H N in rows of 512 bytes,
// and writes 12 H V.
// Why not naive.cu's way: each of its 3 H V threads looks at all N ids, 5.2 GB at the tutorial's sizes; sorted, the
// positions of an id lie together, and every row of da is read once.
// Variants: none. Up to V 256, more characters than most texts have, ids have a single digit.
// Source: Zagha and Blelloch, "Radix sort for vector multiprocessors", 1991.
#include "common.cuh"

constexpr int RADIX = 256;  // digits, positions of a chunk, threads of a block

__device__ __forceinline__ int digit_of(int id, int shift) { return id >> shift & (RADIX - 1); }

// counts (chunks, RADIX)
extern "C" __global__ void __launch_bounds__(RADIX)
    count_digits(int *__restrict__ counts, const int *__restrict__ ids, int N, int shift)
{
    __shared__ int chunk_counts[RADIX];
    const size_t i = thread_in_grid();
    chunk_counts[threadIdx.x] = 0;
    __syncthreads();
    if (i < N)
        atomicAdd(&chunk_counts[digit_of(ids[i], shift)], 1);
    __syncthreads();
    counts[i] = chunk_counts[threadIdx.x];
}

// Overwrites counts with offsets: where the first position of each chunk with each digit goes.
extern "C" __global__ void __launch_bounds__(RADIX) scan_digits(int *counts, int chunks)
{
    __shared__ int totals[RADIX];
    const int digit = threadIdx.x;
    int total = 0;
#pragma unroll 8
    for (int chunk = 0; chunk < chunks; ++chunk)
        total += counts[size_t(chunk) * RADIX + digit];
    totals[digit] = total;
    __syncthreads();
    int offset = 0;
    for (int lower = 0; lower < digit; ++lower)
        offset += totals[lower];
#pragma unroll 8
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int count = counts[size_t(chunk) * RADIX + digit];
        counts[size_t(chunk) * RADIX + digit] = offset;
        offset += count;
    }
}

// positions[i] is where ids[i] comes from: i itself in the first pass, when shift is 0 and positions is not read.
extern "C" __global__ void __launch_bounds__(RADIX)
    place_by_digit(int *__restrict__ sorted_ids, int *__restrict__ sorted_positions, const int *__restrict__ ids,
                   const int *__restrict__ positions, const int *__restrict__ offsets, int N, int shift)
{
    __shared__ int digits[RADIX];
    const size_t i = thread_in_grid();
    const int digit = i < N ? digit_of(ids[i], shift) : 0;
    digits[threadIdx.x] = digit;
    __syncthreads();
    if (i >= N)
        return;
    int offset = offsets[size_t(blockIdx.x) * RADIX + digit];
    for (int earlier = 0; earlier < threadIdx.x; ++earlier)
        offset += digits[earlier] == digit;
    sorted_ids[offset] = ids[i];
    sorted_positions[offset] = shift == 0 ? int(i) : positions[i];
}

// The first of N ascending ids that is not below v.
__device__ __forceinline__ int lower_bound(const int *ids, int N, int v)
{
    int begin = 0, end = N;
    while (begin < end) {
        const int middle = begin + (end - begin) / 2;
        if (ids[middle] < v)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin;
}

constexpr int LANE_COLUMNS = 4, COLUMNS = LANE_COLUMNS * WARP;

// blockIdx.x is v, blockIdx.y counts columns; dynamic shared memory: COLUMNS floats per warp.
extern "C" __global__ void __launch_bounds__(1024)
    sum_by_id(float *__restrict__ dP, const float *__restrict__ da, const float *__restrict__ di_n,
              const int *__restrict__ sorted_ids, const int *__restrict__ sorted_positions, int N, int H)
{
    extern __shared__ float partials[];
    const int v = blockIdx.x, c0 = blockIdx.y * COLUMNS, warps = blockDim.x / WARP;
    const int begin = lower_bound(sorted_ids, N, v), end = lower_bound(sorted_ids, N, v + 1);
    float sums[LANE_COLUMNS] = {};
#pragma unroll 4
    for (int i = begin + warp(); i < end; i += warps) {
        const size_t p = sorted_positions[i];
#pragma unroll
        for (int j = 0; j < LANE_COLUMNS; ++j) {
            const int c = c0 + j * WARP + lane();
            if (c < 3 * H)
                sums[j] += c < 2 * H ? da[p * 3 * H + c] : di_n[p * H + c - 2 * H];
        }
    }
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; ++j)
        partials[warp() * COLUMNS + j * WARP + lane()] = sums[j];
    __syncthreads();
    for (int column = threadIdx.x; column < COLUMNS && c0 + column < 3 * H; column += blockDim.x) {
        float sum = 0.0f;
        for (int w = 0; w < warps; ++w)
            sum += partials[w * COLUMNS + column];
        dP[size_t(v) * 3 * H + c0 + column] = sum;
    }
}
