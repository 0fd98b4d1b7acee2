// Memory as the translated kernels use it: alignment and bounds of every access, asynchronous copies that are read
// before their wait, read-only loads of what the launch writes. Each instruction has its effect at once, as on x86.
//
// Global memory: translator.py follows each address to the parameter that it comes from. Such an access has to lie in
// that argument's array; an address of mixed origin in any of them. Where arrays() was not called, nothing is known
// of the arrays and only alignment is checked.
//
// Shared memory: one buffer, first the static variables, then what the launch asks for. Addresses are offsets in it.
// Source: PTX ISA, "State Spaces, Types, and Variables", "Data Movement and Conversion Instructions".
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#include "arithmetic.h"
#include "host_cuda.h"
#undef asm

static const char *source_line(int line);  // of a PTX line; translator.py writes it

[[noreturn, gnu::cold]] PTX_CALL void fault(const char *what, u64 address, int bytes, int line)
{
    char text[512];
    std::snprintf(text, sizeof(text), "PTX line %d (%s): %s; address %#llx, %d bytes; block %u %u %u, thread %u %u %u",
                  line, source_line(line), what, (unsigned long long)address, bytes, blockIdx.x, blockIdx.y, blockIdx.z,
                  threadIdx.x, threadIdx.y, threadIdx.z);
    host_cuda::stop(text);
}

// ---- Global memory --------------------------------------------------------------------------------------------------

struct Array {
    u64 start, size;
    u8 *written, *read_only;  // a byte per byte: whether this launch stored there, or read it by ld.global.nc
};

constexpr int MOST_ARRAYS = 64;
static Array arrays[MOST_ARRAYS];
static int array_count = 0;
static u8 *shadow = nullptr;

#define PTX_EXPORT extern "C" __attribute__((visibility("default")))

// The arrays of the next launch: per parameter its start, its size, and where its bytes begin in the shadow, in which
// arrays that overlap share their bytes. A number has size 0.
PTX_EXPORT void ptx_arrays(int count, const u64 (*described)[3], u64 shadow_bytes)
{
    std::free(shadow);
    shadow = shadow_bytes ? static_cast<u8 *>(std::calloc(2, shadow_bytes)) : nullptr;
    array_count = count < MOST_ARRAYS ? count : MOST_ARRAYS;
    for (int i = 0; i < array_count; ++i)
        arrays[i] = {described[i][0], described[i][1], shadow + described[i][2],
                     shadow + shadow_bytes + described[i][2]};
}

constexpr int ANY_ARRAY = -1;

PTX_CALL Array *array_of(u64 address, int bytes)
{
    for (int i = 0; i < array_count; ++i)
        if (arrays[i].size >= u64(bytes) && address - arrays[i].start <= arrays[i].size - bytes)
            return &arrays[i];
    return nullptr;
}

[[gnu::cold]] PTX_CALL void wrong_access(const char *what, u64 address, int bytes, int line)
{
    if (address % bytes)
        fault("misaligned access", address, bytes, line);
    if (array_count)
        fault(what, address, bytes, line);
}

template <int ARRAY>
PTX void check_global(u64 address, int bytes, int line)
{
    if constexpr (ARRAY == ANY_ARRAY) {
        if (address % bytes || (array_count && !array_of(address, bytes)))
            wrong_access("outside every array of the launch", address, bytes, line);
    } else {
        const u64 offset = address - arrays[ARRAY].start, size = arrays[ARRAY].size;
        if (__builtin_expect(address % bytes || offset >= size || size - offset < u64(bytes), 0))
            wrong_access("outside its array", address, bytes, line);
    }
}

// Marks bytes that are stored to, or read by ld.global.nc, and sees whether the launch did the other there.
PTX_CALL void mark(u64 address, int bytes, bool stored, int line)
{
    const Array *array = array_of(address, bytes);
    if (!array || !shadow)
        return;
    u8 *mine = (stored ? array->written : array->read_only) + (address - array->start);
    const u8 *other = (stored ? array->read_only : array->written) + (address - array->start);
    for (int i = 0; i < bytes; ++i) {
        mine[i] = 1;
        if (other[i])
            fault(stored ? "a store to what this launch read by ld.global.nc"
                         : "ld.global.nc of what this launch has written", address, bytes, line);
    }
}

template <class T, int ARRAY>
PTX T load_global(u64 address, int line)
{
    check_global<ARRAY>(address, sizeof(T), line);
    return *reinterpret_cast<const T *>(address);
}

// ---- Shared memory --------------------------------------------------------------------------------------------------

struct Shared {
    u8 *start;
    u32 size;
    u8 *pending() const { return start + size; }  // a byte per byte: an asynchronous copy to it is not done
};

PTX Shared shared_memory() { return {static_cast<u8 *>(host_cuda::dynamic_shared()), u32(host_cuda::shared_bytes())}; }

[[noreturn, gnu::cold]] PTX_CALL void wrong_shared(u64 offset, int bytes, int line)
{
    fault(offset % bytes ? "misaligned access" : "outside shared memory", offset, bytes, line);
}

// Where the bytes of an access to shared memory lie.
PTX u8 *in_shared(const Shared &shared, u32 offset, int bytes, int line)
{
    if (__builtin_expect(offset % bytes || u64(offset) + bytes > shared.size, 0))
        wrong_shared(offset, bytes, line);
    return shared.start + offset;
}

// For an access in a kernel with asynchronous copies.
PTX_CALL void check_pending(const Shared &shared, u32 offset, int bytes, int line)
{
    for (int i = 0; i < bytes; ++i)
        if (shared.pending()[offset + i])
            fault("shared memory used before the wait for the asynchronous copy to it", offset, bytes, line);
}

// ---- Asynchronous copies: "cp.async", "cp.async.commit_group", "cp.async.wait_group" -------------------------------

template <int ARRAY>
PTX_CALL void copy_async(const Shared &shared, u32 offset, u64 address, int bytes, u32 source_bytes, int line)
{
    u8 *target = in_shared(shared, offset, bytes, line);
    if (source_bytes != 0 && source_bytes != u32(bytes))
        fault("a cp.async of a part, which is not modelled", address, bytes, line);
    if (source_bytes)
        check_global<ARRAY>(address, bytes, line);
    check_pending(shared, offset, bytes, line);
    std::memset(shared.pending() + offset, 1, bytes);
    std::memset(target, 0xff, bytes);
    host_cuda::copy_later(target, reinterpret_cast<const void *>(address), bytes, source_bytes != 0);
}

PTX_CALL void finish_copies(const Shared &shared, int pending)
{
    for (host_cuda::Copy copy; host_cuda::next_finished_copy(pending, copy);) {
        if (copy.inside)
            std::memcpy(copy.target, copy.source, copy.bytes);
        else
            std::memset(copy.target, 0, copy.bytes);
        std::memset(static_cast<u8 *>(copy.target) + shared.size, 0, copy.bytes);
    }
}

// ---- Synchronisation ------------------------------------------------------------------------------------------------

constexpr const char *SITE = "PTX";

// What a thread polled last: a loop that waits for another block reads one word again and again, and must let other
// fibers run.
struct Poll {
    u64 address = 0, value = 0;
    int repeated = 0;
    static constexpr int PATIENCE = 64;  // equal reads in a row that are no wait

    template <class T>
    T read(u64 at, T now, int line)
    {
        repeated = at == address && u64(now) == value ? repeated + 1 : 0;
        address = at;
        value = u64(now);
        if (repeated > PATIENCE)
            host_cuda::spin_pause(reinterpret_cast<const unsigned *>(at), unsigned(now), unsigned(now) + 1, SITE, line);
        return now;
    }
};

template <class T>
PTX T add_relaxed(u64 address, T value)
{
    return __atomic_fetch_add(reinterpret_cast<T *>(address), value, __ATOMIC_RELAXED);
}

template <class T>
PTX T exchange_relaxed(u64 address, T value)
{
    return __atomic_exchange_n(reinterpret_cast<T *>(address), value, __ATOMIC_RELAXED);
}

PTX void add_release(u64 address, u32 value)
{
    host_cuda::count_group_barrier(reinterpret_cast<const unsigned *>(address));
    __atomic_fetch_add(reinterpret_cast<u32 *>(address), value, __ATOMIC_RELEASE);
}

// "shfl.sync": c has the segment mask in bits 8 to 12 and the clamp in bits 0 to 4.
template <char MODE>
PTX_CALL u32 shuffle(u32 value, u32 b, u32 c, u32 members, bool *in_range)
{
    const int lane = host_cuda::lane_in_warp(), segment = int(c >> 8 & 31), clamp = int(c & 31), by = int(b & 31);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    const int source = MODE == 'u' ? lane - by : MODE == 'd' ? lane + by : MODE == 'b' ? lane ^ by
                                                                         : first | (by & ~segment);
    const bool inside = MODE == 'u' ? source >= last : source <= last;
    if (in_range)
        *in_range = inside;
    const char *name = MODE == 'u' ? "shfl.up" : MODE == 'd' ? "shfl.down" : MODE == 'b' ? "shfl.bfly" : "shfl.idx";
    return u32(host_cuda::shuffle(name, members, value, inside ? source : lane, SITE, 0));
}

PTX bool vote_any(bool p, u32 members) { return host_cuda::ballot("vote.any", members, p, SITE, 0) != 0; }
