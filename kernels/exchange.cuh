// Packets of VALUES values, through which blocks hand each other the operands of a product: a word with a tag
// (words.cuh), or two in fp32. PRECISION says how values are rounded (precision.cuh). VALUES, a constant from the
// launcher, is 3, or in fp32 also 2: nothing then stands in place of value 2.
//
//                 lower half                              upper half
//   fp32, word 0  value 0                                 upper half of value 2, 16 bits of tag
//         word 1  value 1                                 lower half of value 2, 16 bits of tag
//   tf32          value 0, the upper 13 bits of value 2   the other 6 bits of value 2, value 1, 7 bits of tag
//   bf16          values 0 and 1                          value 2, 16 bits of tag
//
// A tf32 has 19 bits. Infinity and NaN are values as others are: the tag is in bits of its own.
#include "precision.cuh"
#include "words.cuh"

#if PRECISION != 3  // which has no packets
#ifndef VALUES
#error "the launcher defines VALUES, of a packet"
#endif
static_assert(VALUES == 3 || (VALUES == 2 && PRECISION == 0), "a packet has three values; in fp32, two or three");

constexpr int PACKET_WORDS = PRECISION == 0 ? 2 : 1;

// tag_of(n) is the tag of exchange n, at its place in the upper half of a word: the bits of TAG_MASK.
#if PRECISION == 1
constexpr unsigned TAG_MASK = 0x7fu;

__device__ __forceinline__ unsigned tag_of(unsigned number) { return number + 1 & TAG_MASK; }
#else
constexpr unsigned TAG_MASK = 0xffff0000u;

__device__ __forceinline__ unsigned tag_of(unsigned number) { return number + 1 << 16; }
#endif

#if PRECISION == 0
__device__ __forceinline__ void store_packet(Word *to, const float (&values)[VALUES], unsigned tag)
{
    const unsigned c = __float_as_uint(values[VALUES - 1]);  // with two values, nobody reads it
    store_word(to, word_of(__float_as_uint(values[0]), tag | c >> 16));
    store_word(to + 1, word_of(__float_as_uint(values[1]), tag | (c & 0xffffu)));
}

// Value 2, from the upper halves of both words.
__device__ __forceinline__ unsigned value_2(unsigned upper_0, unsigned upper_1)
{
    return __byte_perm(upper_1, upper_0, 0x5410);
}
#elif PRECISION == 1
__device__ __forceinline__ void store_packet(Word *to, const float (&values)[VALUES], unsigned tag)
{
    constexpr unsigned TF32 = 0xffffe000u;
    const unsigned a = to_tf32(values[0]), b = to_tf32(values[1]), c = to_tf32(values[2]) & TF32;
    store_word(to, word_of((a & TF32) | c >> 19, c << 13 | (b & TF32) >> 6 | tag));
}

// Value i of a packet. Where a tf32 has no bits, there are some of another value: tensor cores ignore them.
template <int I>
__device__ __forceinline__ unsigned value(unsigned lower, unsigned upper)
{
    return I == 0 ? lower : I == 1 ? upper << 6 : __funnelshift_l(upper, lower, 19);
}
#elif PRECISION == 2
__device__ __forceinline__ void store_packet(Word *to, const float (&values)[VALUES], unsigned tag)
{
    store_word(to, word_of(pack_bf16(values[0], values[1]), tag | to_bf16(values[2])));
}
#endif
#endif
