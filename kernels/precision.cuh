// What PRECISION, a constant from the launcher, means for the operands x and w of a product. Sums are always fp32.
//
//   0 fp32     a word of 32 bits holds one fp32; multiplied by FFMA
//   1 tf32     a word holds one tf32, rounded once, when it is stored; multiplied by tensor cores, as are 2 and 3
//   2 bf16     a word holds two bf16 of neighbouring k, rounded once, when they are stored
//   3 3xTF32   a word holds one fp32; the product is as exact as that of fp32. With BF16 1, a second constant from the
//              launcher, w is rounded to bf16
//
// 3xTF32 cuts each fp32 operand, just before it is multiplied, into the nearest tf32, hi, and the remainder, lo, of
// which a tf32 keeps all but the last bit:
//   x w = x_lo w_hi + x_hi w_lo + x_hi w_hi      x_lo w_lo is about as small as what fp32 rounds off
// An infinite operand, or one that hi rounds to infinity, gives NaN. A bf16 is a tf32: with BF16, w_lo is 0, two
// products are enough, and a word holds two elements of w. Tensor cores truncate the bits that do not fit into a sum,
// where fp32 rounds them, so that long sums drift: here the tensor cores sum one step of 8 k, and the thread sums the
// steps.
// Source: Ootomo and Yokota, "Recovering Single Precision Accuracy from Tensor Cores While Surpassing the FP32
// Theoretical Peak Performance".
#include "common.cuh"
#include "ptx.cuh"

#ifndef PRECISION
#error "the launcher defines PRECISION"
#endif
#if PRECISION == 3 && !defined(BF16)
#error "the launcher defines BF16, whether weights are rounded to it"
#endif
#if PRECISION != 0 && __CUDA_ARCH__ < 800
#error "tf32, bf16 and 3xTF32 need the tensor cores of sm_80"
#endif
static_assert(PRECISION >= 0 && PRECISION <= 3, "0 fp32, 1 tf32, 2 bf16, 3 3xTF32");

constexpr int PACK = PRECISION == 2 ? 2 : 1;  // elements of neighbouring k in a word

// An element as a word holds it, and its rounding.
#if PRECISION == 1
using StoredElement = unsigned;
__device__ __forceinline__ StoredElement to_stored(float x) { return to_tf32(x); }
#elif PRECISION == 2
using StoredElement = unsigned short;
__device__ __forceinline__ StoredElement to_stored(float x) { return to_bf16(x); }
#else
using StoredElement = unsigned;
__device__ __forceinline__ StoredElement to_stored(float x) { return __float_as_uint(x); }
#endif

// A word of elements: the PACK elements from k on, each from read(k).
template <class Read>
__device__ __forceinline__ unsigned to_word(int k, Read read)
{
    if constexpr (PACK == 2)
        return pack_bf16(read(k), read(k + 1));
    else
        return to_stored(read(k));
}

// One step of a warp on tensor cores: multiply_add computes c (16 M, 8) += x (16 M, 8 PACK) w (8 PACK, 8), in fragments
// (ptx.cuh). x is given as XFragments, made once for all w that it is multiplied with; w as LANE_WORDS words of each
// lane, which lane_word makes.
#if PRECISION == 1 || PRECISION == 2
constexpr int LANE_WORDS = 2;

template <int M>
struct XFragments {
    unsigned words[M][4];

    __device__ __forceinline__ explicit XFragments(const unsigned (&x)[M][4])
    {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                words[m][i] = x[m][i];
    }
};

__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
#if PRECISION == 1
    mma_m16n8k8_tf32(d, a, b);
#else
    mma_m16n8k16_bf16(d, a, b);
#endif
}

template <int M>
__device__ __forceinline__ void multiply_add(float (&c)[M][4], const XFragments<M> &x, const unsigned (&w)[LANE_WORDS])
{
#pragma unroll
    for (int m = 0; m < M; ++m)
        mma(c[m], x.words[m], w);
}
#elif PRECISION == 3
constexpr int LANE_WORDS = BF16 ? 1 : 2;

// The tensor core takes the upper 11 bits of lo, which has 12 at most. NaN may be lost in hi, which is rounded in fewer
// instructions than by to_tf32, but not in lo.
__device__ __forceinline__ void split(unsigned x, unsigned &hi, unsigned &lo)
{
    hi = (x + 0x1000u) & 0xffffe000u;
    lo = __float_as_uint(__uint_as_float(x) - __uint_as_float(hi));
}

template <int M>
struct XFragments {
    unsigned hi[M][4], lo[M][4];

    __device__ __forceinline__ explicit XFragments(const unsigned (&x)[M][4])
    {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                split(x[m][i], hi[m][i], lo[m][i]);
    }
};

template <int M>
__device__ __forceinline__ void multiply_add(float (&c)[M][4], const XFragments<M> &x, const unsigned (&w)[LANE_WORDS])
{
    float step[M][4] = {};  // small products first; neighbouring instructions do not wait for each other
    // opaque: weights in registers are the same in every product, and the compiler would keep their hi and lo there
    // too.
    unsigned w_hi[2];
    const unsigned first = w[0], last = w[LANE_WORDS - 1];  // ahead of opaque, so that both are read at once
    if constexpr (BF16) {
        const unsigned two = opaque(first);
        w_hi[0] = two << 16, w_hi[1] = two & 0xffff0000u;
    } else {
        unsigned w_lo[2];
        split(opaque(first), w_hi[0], w_lo[0]);
        split(opaque(last), w_hi[1], w_lo[1]);
#pragma unroll
        for (int m = 0; m < M; ++m)
            mma_m16n8k8_tf32(step[m], x.hi[m], w_lo);
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
        mma_m16n8k8_tf32(step[m], x.lo[m], w_hi);
#pragma unroll
    for (int m = 0; m < M; ++m)
        mma_m16n8k8_tf32(step[m], x.hi[m], w_hi);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            c[m][i] += step[m][i];
}
#endif

#if PRECISION != 0
// Word i of this lane's LANE_WORDS, from read(k) of its column. A single word holds both elements of the lane, as bf16.
template <class Read>
__device__ __forceinline__ unsigned lane_word(int i, Read read)
{
    if constexpr (LANE_WORDS == 1)
        return pack_bf16(read(lane() % 4), read(lane() % 4 + 4));
    else
        return to_word((lane() % 4 + i * 4) * PACK, read);
}
#endif
