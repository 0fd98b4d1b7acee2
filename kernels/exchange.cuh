// What the words hold through which blocks hand each other operands of a product (words.cuh): VALUES values, rounded as
// PRECISION says (precision.cuh), and a tag.
//
//             values   lower half                              upper half
//   fp32, 3xTF32   1   the value                               32 bits of tag
//   tf32           3   value 0, the upper 13 bits of value 2   the other 6 bits of value 2, value 1, 7 bits of tag
//   bf16           3   values 0 and 1                          value 2, 16 bits of tag
//
// A tf32 has 19 bits. Infinity and NaN are values as others are: the tag is in bits of its own.
#include "precision.cuh"
#include "words.cuh"

constexpr int VALUES = PRECISION == 1 || PRECISION == 2 ? 3 : 1;  // of a word

// tag_of(n) is the tag of exchange n, at its place in the upper half of a word: the bits of TAG_MASK.
#if PRECISION == 1
constexpr unsigned TAG_MASK = 0x7fu;

__device__ __forceinline__ unsigned tag_of(unsigned number) { return number + 1 & TAG_MASK; }

__device__ __forceinline__ Word packed(const float (&values)[VALUES], unsigned tag)
{
    constexpr unsigned TF32 = 0xffffe000u;
    const unsigned a = to_tf32(values[0]), b = to_tf32(values[1]), c = to_tf32(values[2]) & TF32;
    return word_of((a & TF32) | c >> 19, c << 13 | (b & TF32) >> 6 | tag);
}

// The bits of a tf32 below which there are some of another value: tensor cores ignore them.
__device__ __forceinline__ unsigned value_0(unsigned lower, unsigned) { return lower; }
__device__ __forceinline__ unsigned value_1(unsigned, unsigned upper) { return upper << 6; }
__device__ __forceinline__ unsigned value_2(unsigned lower, unsigned upper)
{
    return __funnelshift_l(upper, lower, 19);
}
#elif PRECISION == 2
constexpr unsigned TAG_MASK = 0xffff0000u;

__device__ __forceinline__ unsigned tag_of(unsigned number) { return number + 1 << 16; }

__device__ __forceinline__ Word packed(const float (&values)[VALUES], unsigned tag)
{
    return word_of(pack_bf16(values[0], values[1]), tag | to_bf16(values[2]));
}
#else
constexpr unsigned TAG_MASK = 0xffffffffu;

__device__ __forceinline__ unsigned tag_of(unsigned number) { return number + 1; }

__device__ __forceinline__ Word packed(const float (&values)[VALUES], unsigned tag)
{
    return word_of(__float_as_uint(values[0]), tag);
}
#endif
