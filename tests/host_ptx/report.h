// Reports of faults, which end a launch, and the check of registers that may be read ahead of every write.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#include "arithmetic.h"
#include "host_cuda.h"
#undef asm

#define PTX_EXPORT extern "C" __attribute__((visibility("default")))

struct Place {
    int line;  // of the PTX
    uint3 block, thread;
};

static const char *source_line(int line);  // of a PTX line; translator.py writes it
[[maybe_unused]] static const bool source_line_told = (host_cuda::source_of_ptx = source_line, true);

struct Report {
    char text[512];

    Report(const char *what, const char *where, const Place &place)
    {
        const auto &[line, block, thread] = place;
        std::snprintf(text, sizeof(text), "PTX line %d (%s): %s; %s; block %u %u %u, thread %u %u %u", line,
                      source_line(line), what, where, block.x, block.y, block.z, thread.x, thread.y, thread.z);
    }
};

[[noreturn, gnu::cold]] PTX_CALL void fault(const char *what, const char *where, int line)
{
    host_cuda::stop(Report(what, where, {line, blockIdx, threadIdx}).text);
}

[[noreturn, gnu::cold]] PTX_CALL void fault(const char *what, u64 address, int bytes, int line)
{
    char where[64];
    std::snprintf(where, sizeof(where), "address %#llx, %d bytes", (unsigned long long)address, bytes);
    fault(what, where, line);
}

[[noreturn, gnu::cold]] PTX_CALL void unwritten_register(const char *name, int line)
{
    char where[64];
    std::snprintf(where, sizeof(where), "register %%%s", name);
    fault("a register read before it is written", where, line);
}

// What a register holds, where it may be read ahead of every write: registers.py finds these places.
template <class T>
PTX T checked(T held, bool written, const char *name, int line)
{
    if (__builtin_expect(!written, 0))
        unwritten_register(name, line);
    return held;
}
