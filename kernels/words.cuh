// Words of 64 bits with tags: how blocks hand each other values while they run, with no barrier, fence or counter.
//
// A word holds a value, or several (exchange.cuh), and a tag, which says which exchange it belongs to. A block that
// needs a word reads it again and again until it shows the tag. So a value travels once to L2 and once from it. A word
// is written and read at once (store_word).
//
// No old word is taken for a new one. Exchanges have numbers, which go on from launch to launch: a counter in global
// memory says where a launch begins. The words of exchange n lie in half n % 2 of an array, with the tag n + 1; so a
// word that is to show the tag n + 1 shows n - 1 before, or 0 if it was never written, however few bits of these are
// kept. This holds where each number is used once, by all words of a half: an array belongs to one way to cut the work.
// Where a tag has 32 bits, words may leave numbers out. A launch that is aborted takes the memory of its process on the
// GPU with it.
//
// No word is overwritten while somebody needs it, although nobody says that he has read it: a block writes number n + 2
// only when it has all of number n + 1, and whoever wrote that had read all of number n.
// Source: PTX ISA, "Memory Consistency Model": a relaxed access of 64 bits is not torn, and reads no value that depends
// on itself.
#include "ptx.cuh"

using Word = unsigned long long;
constexpr int COUNTER_WORDS = 32;  // a counter has a line of L2 to itself

__device__ __forceinline__ Word word_of(unsigned lower, unsigned upper) { return Word(upper) << 32 | lower; }
__device__ __forceinline__ unsigned lower_half(Word word) { return unsigned(word); }
__device__ __forceinline__ unsigned upper_half(Word word) { return unsigned(word >> 32); }

// The numbers of the exchanges of a launch: first_number and those after it. The counters (groups, COUNTER_WORDS) of a
// kernel have, for each group, the number of exchanges of all launches so far, and the number of blocks that have left
// the running one, which is zero before and after it.
__device__ __forceinline__ unsigned first_number(const unsigned *counters, int group)
{
    return load_relaxed(counters + size_t(group) * COUNTER_WORDS);
}

// To be called by a thread of each block of a group, at the end: the last block to leave counts the exchanges of this
// launch. Nobody waits.
__device__ __forceinline__ void leave_group(unsigned *counters, int group, int blocks, unsigned exchanges)
{
    unsigned *number = counters + size_t(group) * COUNTER_WORDS, *left = number + 1;
    if (atomicAdd(left, 1u) == blocks - 1) {
        atomicExch(left, 0u);
        atomicExch(number, load_relaxed(number) + exchanges);
    }
}
