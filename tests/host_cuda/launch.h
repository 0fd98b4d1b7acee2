// The interface between the loader and the runtime: one launch, and the two functions that a built module offers.
#pragma once

#include <cstdint>

enum class Order : std::int32_t { ASCENDING, DESCENDING, RANDOM };

// Which block goes on, where only one runs at a time, by the seed: any of them; all others before one that is
// interrupted, which is starved until they wait or have ended, and then another; the fast one before all others. FREE:
// all at once.
enum class Schedule : std::int32_t { FREE, RANDOM, STARVED, FAST };

struct Traffic {
    std::uint64_t start, size;    // where the array of an argument lies, in bytes; both 0 where it is a number
    std::uint64_t read, written;  // results: bytes, counted each time that a thread asks for them
};

// A step of a thread, in the order in which the threads of its block got their turns.
enum class Did : std::int32_t { READ, WRITE, ATOMIC, BARRIER, ARRIVE, WAIT, COLLECTIVE };

struct Event {
    std::uint32_t block, thread;
    Did did;
    std::int32_t argument;  // whose array; -1 for shared memory
    std::uint64_t offset;   // in the array, in bytes; address of the name of a COLLECTIVE
    std::uint64_t size;     // bytes; of a WAIT, the number that the counter is to reach
};

struct LaunchRequest {
    const char *kernel;
    std::uint32_t grid[3], block[3];
    std::uint64_t shared_bytes;  // dynamic shared memory per block
    std::int32_t cooperative;    // all blocks alive at once
    Order order;                 // in which the threads of a block, and the blocks, get their turns
    Schedule schedule;           // of the blocks
    std::uint64_t seed;          // of the random order, and of the schedule
    void *const *arguments;      // one pointer per parameter, to its value
    Traffic *traffic;            // one per parameter, or null where no bytes are counted
    std::int32_t recording;      // whether to keep the events; only where bytes are counted

    // Results.
    std::uint64_t group_barriers, mma_calls;  // arrivals of blocks at group barriers, mma instructions of warps
    const Event *events;                      // valid until the next launch: block after block
    std::uint64_t event_count;
};

extern "C" {
// Runs the launch. Null, or why it could not end, valid until the next call.
const char *host_cuda_launch(LaunchRequest *request);

// One line per kernel: its name, then one word per parameter: kind and bytes of the number, as NumPy writes them, then
// `*` for a pointer to such numbers, `c` for a pointer to const.
const char *host_cuda_signatures();
}
