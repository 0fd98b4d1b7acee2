// Barrier among the blocks of one group, inside one cooperative launch.
//
// A counter in global memory, one per group, starts at zero and only grows during a launch: every block adds one per
// barrier and waits until it reaches the target that follows from the number of barriers. The comparison is modular.
//
// Everything that any thread of the group wrote before the barrier is visible to every thread of the group after it:
// the first __syncthreads() hands the block's writes to thread 0, whose release hands them to the group; the acquire
// and the second __syncthreads() do the same on the other side. This does not hold for loads through the read-only
// cache: an array that other blocks write during the launch must not be read through __ldg or a `const __restrict__`
// parameter.
// Source: PTX ISA, "Memory Consistency Model", release and acquire patterns.

#include "words.cuh"

// A group of blocks that wait for each other: `blocks` blocks, of which this one is number `block`, share a counter.
//
// A barrier has two halves, arrive and wait, which all threads of all blocks of the group call in turns; what a block
// does between them, it does while the other blocks arrive. After its last wait, every block leaves.
struct Group {
    int index, block, blocks;
    unsigned *counter;    // COUNTER_WORDS of global memory, zero before and after: arrivals, then blocks that have left
    unsigned target = 0;  // arrivals once all blocks have arrived as often as this one

    // `counters` (groups, COUNTER_WORDS) has the words of group `index` in that row.
    __device__ __forceinline__ Group(unsigned *counters, int index, int block, int blocks)
        : index(index), block(block), blocks(blocks), counter(counters + size_t(index) * COUNTER_WORDS)
    {
    }

    __device__ __forceinline__ void arrive()
    {
        __syncthreads();
        if (threadIdx.x == 0)
            add_release(counter, 1);
        target += blocks;
    }

    __device__ __forceinline__ void wait() const
    {
        if (threadIdx.x == 0)
            wait_at_least(counter, target);
        __syncthreads();
    }

    __device__ __forceinline__ void barrier()
    {
        arrive();
        wait();
    }

    // The last block to leave sets both words back to zero, so that the next launch, or the replay of a graph, starts
    // where this one did. Nobody waits.
    __device__ __forceinline__ void leave() const
    {
        unsigned *left = counter + 1;
        if (threadIdx.x == 0 && atomicAdd(left, 1u) == blocks - 1) {
            atomicExch(counter, 0u);
            atomicExch(left, 0u);
        }
    }
};
