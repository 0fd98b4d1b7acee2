// Dropout between layers.
//
//   keep[k] = word[k] >= rate 2^32      y[k] = x[k] keep[k] / (1 - rate)      dx[k] = dy[k] keep[k] / (1 - rate)
//
// word[k], 32 bits, belongs to the stream Philox 4x64-10 with key (seed, layer) and counter (0, step, 0, 0) as NumPy
// draws it: block b of four 64-bit words has the counter (b + 1, step, 0, 0), and each word gives its low half first.
// So the mask is a function of its arguments alone, and the same on every device.
//
// x, y, dx, dy (N,) float32, N = T B H; keep (N,) bytes of 0 or 1; step (1,) uint64, in device memory.
//
// A warp of dropout_forward owns 256 consecutive elements: each lane draws the eight words of one Philox block; then,
// eight times, the lanes take 32 neighbouring elements and get their mask bits from the lanes that drew these bits, so
// that every access to memory is contiguous. A thread of dropout_backward owns one element.
// Bytes: forward 4 N read, 5 N written; backward 5 N read, 4 N written.
// Why no twin in naive.cu: a thread owns one element here already, or the eight of a Philox block.
// Variants: none.
// Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", table 2; numpy/random/src/philox/philox.h.

#include "common.cuh"

constexpr int WORDS = 8;  // 32-bit words in a Philox block

struct Philox {
    unsigned long long counter[4], key[2];

    __device__ __forceinline__ void round()
    {
        constexpr unsigned long long M0 = 0xD2E7470EE14C6C93ull, M1 = 0xCA5A826395121157ull;
        const unsigned long long low_0 = M0 * counter[0], high_0 = __umul64hi(M0, counter[0]);
        const unsigned long long low_1 = M1 * counter[2], high_1 = __umul64hi(M1, counter[2]);
        counter[0] = high_1 ^ counter[1] ^ key[0];
        counter[1] = low_1;
        counter[2] = high_0 ^ counter[3] ^ key[1];
        counter[3] = low_0;
        key[0] += 0x9E3779B97F4A7C15ull;  // golden ratio
        key[1] += 0xBB67AE8584CAA73Bull;  // sqrt(3) - 1
    }
};

// Bit w says whether word w of a Philox block is at least `threshold`.
__device__ __forceinline__ unsigned kept_words(Philox philox, unsigned threshold)
{
#pragma unroll
    for (int i = 0; i < 10; ++i)
        philox.round();
    unsigned kept = 0;
#pragma unroll
    for (int w = 0; w < WORDS; ++w)
        kept |= unsigned(unsigned(philox.counter[w / 2] >> 32 * (w % 2)) >= threshold) << w;
    return kept;
}

extern "C" __global__ void dropout_forward(unsigned char *__restrict__ keep, float *__restrict__ y,
                                           const float *__restrict__ x, const unsigned long long *__restrict__ step,
                                           unsigned long long seed, unsigned long long layer, unsigned threshold,
                                           float scale, size_t N)
{
    const size_t first = thread_in_grid() / WARP * (WARP * WORDS);
    const unsigned kept = kept_words({{thread_in_grid() + 1, step[0], 0, 0}, {seed, layer}}, threshold);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        const int element = i * WARP + lane();  // of the warp's 256
        const bool mine = __shfl_sync(ALL_LANES, kept, element / WORDS) >> element % WORDS & 1;
        const size_t k = first + element;
        if (k < N) {
            keep[k] = mine;
            y[k] = x[k] * (mine ? scale : 0.0f);  // a product, so that NaN stays NaN as in the reference
        }
    }
}

// dx may be dy: a thread reads its element before it writes it.
extern "C" __global__ void dropout_backward(float *dx, const float *dy, const unsigned char *__restrict__ keep,
                                            float scale, size_t N)
{
    const size_t k = thread_in_grid();
    if (k < N)
        dx[k] = dy[k] * (keep[k] ? scale : 0.0f);
}
