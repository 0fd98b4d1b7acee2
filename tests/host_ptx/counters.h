// Counters: words of global memory that a launch adds to by atomics, as barriers among blocks do. A launch leaves each
// as it was, for the next launch. Blocks that arrive at one, by an addition that is a release, do so equally often.
#pragma once

#include <pthread.h>

#include "report.h"

struct Arrivals {  // of one block at a counter
    u32 count;
    Place last;
};

struct Counter {
    u64 address;
    u32 before;  // the launch
    Place last;          // addition
    Arrivals *arrivals;  // per block; null where no addition is a release
    Counter *next;
};

static Counter *counters = nullptr;
static pthread_mutex_t counters_lock = PTHREAD_MUTEX_INITIALIZER;

// To be called ahead of each addition.
PTX_CALL void count_on(u64 address, bool release, int line)
{
    pthread_mutex_lock(&counters_lock);
    Counter *counter = counters;
    while (counter && counter->address != address)
        counter = counter->next;
    if (!counter) {
        const u32 before = __atomic_load_n(reinterpret_cast<const u32 *>(address), __ATOMIC_RELAXED);
        counters = counter = new Counter{address, before, {}, nullptr, counters};
    }
    counter->last = {line, blockIdx, threadIdx};
    if (release) {
        if (!counter->arrivals)
            counter->arrivals = static_cast<Arrivals *>(
                std::calloc(u64(gridDim.x) * gridDim.y * gridDim.z, sizeof(Arrivals)));
        Arrivals &mine = counter->arrivals[(u64(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x];
        mine = {mine.count + 1, counter->last};
    }
    pthread_mutex_unlock(&counters_lock);
}

PTX_CALL void forget_counters()
{
    while (Counter *counter = counters) {
        counters = counter->next;
        std::free(counter->arrivals);
        delete counter;
    }
}

// After a launch of so many blocks that ended: what is wrong with one of its counters, or null.
PTX_EXPORT const char *ptx_wrong_counter(u64 blocks)
{
    static Report report("", "", {});
    for (const Counter *counter = counters; counter; counter = counter->next) {
        const auto said = [counter](const char *what, const char *numbers, u32 one, u32 other, const Place &place) {
            char format[96], where[128];
            std::snprintf(format, sizeof(format), "address %%#llx, %s", numbers);
            std::snprintf(where, sizeof(where), format, (unsigned long long)counter->address, one, other);
            report = {what, where, place};
            return report.text;
        };
        const u32 now = *reinterpret_cast<const u32 *>(counter->address);
        if (now != counter->before)
            return said("a counter that is not as it was before the launch", "then %u, now %u", counter->before, now,
                        counter->last);
        const Arrivals *most = nullptr, *fewest = nullptr;
        for (u64 i = 0; counter->arrivals && i < blocks; ++i) {
            const Arrivals &its = counter->arrivals[i];
            if (its.count && (!most || its.count > most->count))
                most = &its;
            if (its.count && (!fewest || its.count < fewest->count))
                fewest = &its;
        }
        if (most && most->count != fewest->count)
            return said("a block that arrives at a counter more often than another block", "%u times, not %u",
                        most->count, fewest->count, most->last);
    }
    return nullptr;
}
