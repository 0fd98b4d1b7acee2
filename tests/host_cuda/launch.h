// What a loader hands to the runtime: one launch, and the two functions that a built module offers.
#pragma once

#include <cstdint>

enum class Order : std::int32_t { ASCENDING, DESCENDING, RANDOM };

struct Traffic {
    std::uint64_t start, size;    // where the array of an argument lies, in bytes; both 0 where it is a number
    std::uint64_t read, written;  // results: bytes, as often as threads ask for them
};

struct LaunchRequest {
    const char *kernel;
    std::uint32_t grid[3], block[3];
    std::uint64_t shared_bytes;  // dynamic shared memory per block
    std::int32_t cooperative;    // all blocks alive at once
    Order order;                 // in which the threads of a block, and the blocks, get their turns
    std::uint64_t seed;          // of the random order
    void *const *arguments;      // one pointer per parameter, to its value
    Traffic *traffic;            // one per parameter, or null where no bytes are counted

    std::uint64_t group_barriers, mma_calls;  // results: arrivals of blocks at group barriers, mma instructions of warps
};

extern "C" {
// Runs the launch. Null, or why it could not end, valid until the next call.
const char *host_cuda_launch(LaunchRequest *request);

// One line per kernel: its name, then one word per parameter: kind and bytes as NumPy writes them, `*` for a pointer to
// such, `c` for a pointer to const.
const char *host_cuda_signatures();
}
