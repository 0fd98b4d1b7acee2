// Kernels that only launch, only wait, or only load, to measure what each costs.
//   empty       nothing
//   barriers    counters (2), zero before and after: `count` barriers among all blocks of a cooperative launch
//   exchanges   words (2, blocks, 2), counters (1, COUNTER_WORDS), both zero before the first launch: `count` exchanges
//               of words with tags (words.cuh) among all blocks of a cooperative launch
//   loads       next (places,): `count` loads through L2, each from the place that the one before it has read
// A block owns its two words; of the rest, nothing.
#include "barrier.cuh"

extern "C" __global__ void empty()
{
}

extern "C" __global__ void barriers(unsigned *counters, int count)
{
    Group group(counters, 0, blockIdx.x, gridDim.x);
    for (int i = 0; i < count; i++)
        group.barrier();
    group.leave();
}

extern "C" __global__ void exchanges(Word *words, unsigned *counters, int count)
{
    const int blocks = gridDim.x;
    const unsigned first = first_number(counters, 0);
    unsigned number = 0;  // of exchanges so far, by the words of other blocks
    for (int i = 0; i < count; i++) {
        const unsigned tag = first + i + 1;
        Word *half = words + (first + i) % 2 * blocks * 2;
        if (threadIdx.x < 2)
            store_word(half + blockIdx.x * 2 + threadIdx.x, word_of(number, tag));
        for (int block0 = 0; block0 < blocks; block0 += blockDim.x) {
            const Word *needed = half + min(block0 + int(threadIdx.x), blocks - 1) * 2;
            Word two[2];
            do
                load_two_words(two, needed);
            while (any_missing(upper_half(two[0]) != tag || upper_half(two[1]) != tag, needed, tag, 0xffffffffu));
            number = lower_half(two[0]) + 1;
        }
        __syncthreads();  // the block has all words: only then may it store the next ones
    }
    if (threadIdx.x == 0)
        leave_group(counters, 0, blocks, count);
}

extern "C" __global__ void loads(const unsigned *next, int count)
{
    unsigned place = 0;
    for (int i = 0; i < count; i++)
        place = load_relaxed(next + place);
}
