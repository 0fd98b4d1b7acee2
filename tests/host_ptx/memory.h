// Memory as the translated kernels use it: alignment and bounds of every access, reads of what was never written,
// asynchronous copies that are read before their wait, read-only loads of what the launch writes. Each access to global
// memory has its effect at once, as on x86, or with PTX_WEAK as late as weak_memory.h allows.
//
// Global memory: translator.py follows each address to the parameter that it comes from. Such an access has to lie in
// that argument's array; an address of mixed origin in any of them. Where ptx_arrays() was not called, nothing is known
// of the arrays and only alignment is checked. A load that finds the poison of a fresh array is a read of memory that
// was never written.
//
// Shared memory: one buffer, first the static variables, then what the launch asks for. Addresses are offsets in it.
// Behind it lies a byte for each of its bytes, which tells whether the byte was written.
// Source: PTX ISA, "State Spaces, Types, and Variables", "Data Movement and Conversion Instructions".
#pragma once

#if defined(PTX_WEAK) || defined(PTX_BANKS)  // here, since host_cuda.h redefines words that these headers use
#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <utility>
#include <vector>
#endif

#include "counters.h"
#include "report.h"

// ---- Global memory --------------------------------------------------------------------------------------------------

struct Array {
    u64 start, size, place;
    u8 *written, *read_only;  // a byte per byte: whether this launch stored there, or read it by ld.global.nc
    u32 poison_bytes;         // of the poison where nobody wrote: 2 or 4; 0 where none is known
};

constexpr int MOST_ARRAYS = 64;
static Array arrays[MOST_ARRAYS];
static int array_count = 0;
static u8 *shadow = nullptr;

// The arrays of the next launch: per parameter its start, its size, and its place in the shadow, in which arrays that
// overlap share their bytes; address and place are equal modulo 16. A number has size 0.
PTX_EXPORT void ptx_arrays(int count, const u64 (*described)[3], u64 shadow_bytes)
{
    forget_counters();
    std::free(shadow);
    shadow = shadow_bytes ? static_cast<u8 *>(std::calloc(2, shadow_bytes)) : nullptr;
    array_count = count < MOST_ARRAYS ? count : MOST_ARRAYS;
    for (int i = 0; i < array_count; ++i)
        arrays[i] = {described[i][0], described[i][1], described[i][2], shadow + described[i][2],
                     shadow + shadow_bytes + described[i][2], 0};
}

// What lies in arrays that nobody wrote, and its bytes in each of the arrays that ptx_arrays was told of.
static u32 poison;
PTX_EXPORT void ptx_poison(const u32 *bytes, u32 value)
{
    poison = value;
    for (int i = 0; i < array_count; ++i)
        arrays[i].poison_bytes = bytes[i];
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

// Whether one of the elements in a loaded value, of 2 or 4 bytes, may be poison, whose halves begin with 12 ones.
template <class T>
PTX bool may_be_poison(T value)
{
    if constexpr (sizeof(T) == 8)
        return may_be_poison(u32(bits<u64>(value))) || may_be_poison(u32(bits<u64>(value) >> 32));
    else if constexpr (sizeof(T) == 4)
        return bits<u32>(value) >= 0xfff00000u || (!std::is_same<T, f32>::value && u16(value) >= 0xfff0u);
    else
        return sizeof(T) == 2 && u16(value) >= 0xfff0u;
}

template <int ARRAY>
[[gnu::cold]] PTX_CALL void check_poison(const void *value, u64 address, u32 bytes, int line)
{
    const Array *array = ARRAY == ANY_ARRAY ? array_of(address, bytes) : &arrays[ARRAY];
    const u32 unit = array ? array->poison_bytes : 0;
    for (u32 i = 0; unit && i + unit <= bytes; i += unit)
        if (std::memcmp(static_cast<const u8 *>(value) + i, &poison, unit) == 0)
            fault("global memory read before it is written", address + i, unit, line);
}

// A value that was loaded from an address of global memory.
template <int ARRAY, class T>
PTX T written_value(T value, u64 address, int line)
{
    if (__builtin_expect(may_be_poison(value), 0))
        check_poison<ARRAY>(&value, address, sizeof(T), line);
    return value;
}

enum class Scope { GPU, BLOCK };  // of a release, an acquire, or a fence

#ifdef PTX_WEAK
#include "weak_memory.h"
#else
template <class T, int ARRAY>
PTX T load_weak(u64 address)
{
    return *reinterpret_cast<const T *>(address);
}

template <class T, int ARRAY>
PTX void store_weak(u64 address, T value)
{
    *reinterpret_cast<T *>(address) = value;
}

template <class T, int ARRAY>
PTX T load_strong(u64 address, bool acquire, Scope, bool)
{
    return __atomic_load_n(reinterpret_cast<const T *>(address), acquire ? __ATOMIC_ACQUIRE : __ATOMIC_RELAXED);
}

template <class T, int ARRAY>
PTX void store_strong(u64 address, T value, bool release, Scope)
{
    __atomic_store_n(reinterpret_cast<T *>(address), value, release ? __ATOMIC_RELEASE : __ATOMIC_RELAXED);
}

// The new value is operation(old value); returns the old one.
template <class T, int ARRAY, class Operation>
PTX T atomic_at(u64 address, Operation operation, bool, bool, Scope)
{
    T before = __atomic_load_n(reinterpret_cast<T *>(address), __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(reinterpret_cast<T *>(address), &before, operation(before), true,
                                        __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
    }
    return before;
}

PTX void memory_fence(bool, Scope) { host_cuda::fence(); }
PTX void copy_started() {}
PTX void copy_bytes(void *target, u64 address, int bytes)
{
    std::memcpy(target, reinterpret_cast<const void *>(address), bytes);
}
#endif

// ---- Shared memory --------------------------------------------------------------------------------------------------

struct Shared {
    u8 *start;
    u32 size;
    u8 *states() const { return start + size; }  // a State per byte
};

enum State : u8 { NEVER_WRITTEN = 0, WRITTEN = 1, COPY_PENDING = 2 };

PTX Shared shared_memory() { return {static_cast<u8 *>(host_cuda::dynamic_shared()), u32(host_cuda::shared_bytes())}; }

[[noreturn, gnu::cold]] PTX_CALL void wrong_shared(const Shared &shared, u32 offset, int bytes, int line)
{
    if (offset % bytes)
        fault("misaligned access", offset, bytes, line);
    if (u64(offset) + bytes > shared.size)
        fault("outside shared memory", offset, bytes, line);
    bool pending = false;
    for (int i = 0; i < bytes; ++i)
        pending |= shared.states()[offset + i] == COPY_PENDING;
    fault(pending ? "shared memory used before the wait for the asynchronous copy to it"
                  : "shared memory read before it is written", offset, bytes, line);
}

PTX bool in_shared(const Shared &shared, u32 offset, int bytes)
{
    return offset % bytes == 0 && u64(offset) + bytes <= shared.size;
}

#ifdef PTX_BANKS
#include "banks.h"
#else
PTX void on_banks(u32, int, int) {}
#endif

template <int BYTES>
struct States {  // of the bytes of an access
    using Word = std::conditional_t<BYTES == 1, u8, std::conditional_t<BYTES == 2, u16,
                 std::conditional_t<BYTES == 4, u32, u64>>>;
    static constexpr int LAST = BYTES / int(sizeof(Word)) - 1;
    static constexpr Word all(State state) { return Word(Word(~Word(0)) / 255 * state); }
    Word words[LAST + 1];

    States(const Shared &shared, u32 offset) { std::memcpy(words, shared.states() + offset, BYTES); }
    bool written() const { return words[0] == all(WRITTEN) && words[LAST] == all(WRITTEN); }
    bool pending() const { return (words[0] | words[LAST]) & all(COPY_PENDING); }
};

// Where the bytes of a load from shared memory lie.
template <int BYTES>
PTX const u8 *load_shared(const Shared &shared, u32 offset, int line)
{
    if (__builtin_expect(!in_shared(shared, offset, BYTES) || !States<BYTES>(shared, offset).written(), 0))
        wrong_shared(shared, offset, BYTES, line);
    on_banks(offset, BYTES, line);
    return shared.start + offset;
}

// Where the bytes of a store to shared memory lie.
template <int BYTES>
PTX u8 *store_shared(const Shared &shared, u32 offset, int line, State state = WRITTEN)
{
    if (__builtin_expect(!in_shared(shared, offset, BYTES) || States<BYTES>(shared, offset).pending(), 0))
        wrong_shared(shared, offset, BYTES, line);
    on_banks(offset, BYTES, line);
    std::memset(shared.states() + offset, state, BYTES);
    return shared.start + offset;
}

// ---- Asynchronous copies: "cp.async", "cp.async.commit_group", "cp.async.wait_group" -------------------------------

template <int ARRAY, int BYTES>
PTX_CALL void copy_async(const Shared &shared, u32 offset, u64 address, u32 source_bytes, int line)
{
    u8 *target = store_shared<BYTES>(shared, offset, line, COPY_PENDING);
    if (source_bytes != 0 && source_bytes != u32(BYTES))
        fault("a cp.async of a part, which is not modelled", address, BYTES, line);
    if (source_bytes) {
        check_global<ARRAY>(address, BYTES, line);
        copy_started();
    }
    for (u32 i = 0; i < source_bytes; i += 4)
        written_value<ARRAY>(*reinterpret_cast<const u32 *>(address + i), address + i, line);
    std::memset(target, 0xff, BYTES);
    host_cuda::copy_later(target, reinterpret_cast<const void *>(address), BYTES, source_bytes != 0);
}

PTX_CALL void finish_copies(const Shared &shared, int pending)
{
    for (host_cuda::Copy copy; host_cuda::next_finished_copy(pending, copy);) {
        if (copy.inside)
            copy_bytes(copy.target, u64(copy.source), copy.bytes);
        else
            std::memset(copy.target, 0, copy.bytes);
        std::memset(static_cast<u8 *>(copy.target) + shared.size, WRITTEN, copy.bytes);
    }
}

// ---- Synchronisation ------------------------------------------------------------------------------------------------

constexpr const char *SITE = "PTX";

// What a thread has polled: a loop that waits for another block reads the same words again and again, and must let
// other fibers run.
struct Poll {
    static constexpr int PATIENCE = 64;  // reads in a row that see no change, and are no wait
    static constexpr int WORDS = 64;     // remembered, each where its address says

    u64 addresses[WORDS] = {}, values[WORDS] = {};
    int unchanged = 0;  // reads since one saw a change
    u64 waited_at = 0;  // of the words that are read in turns, the one at which the fiber pauses
    int elsewhere = 0;  // reads since the last at waited_at

    static int place(u64 at) { return int(at / 4 * 0x9e3779b97f4a7c15u >> 58); }

    bool is_waiting(u64 at) const
    {
        return unchanged > 4 * PATIENCE || (unchanged > PATIENCE / 2 && at == addresses[place(at)]);
    }

    template <class T>
    T read(u64 at, T now, int line)
    {
        u64 &address = addresses[place(at)], &value = values[place(at)];
        unchanged = at == address && u64(now) != value ? 0 : unchanged + 1;
        address = at;
        value = u64(now);
        elsewhere = at == waited_at ? 0 : elsewhere + 1;
        if (unchanged > PATIENCE && elsewhere > WORDS) {
            waited_at = at;
            elsewhere = 0;
        }
        if (unchanged > PATIENCE && at == waited_at)
            host_cuda::spin_pause(reinterpret_cast<const unsigned *>(at), unsigned(now), unsigned(now) + 1, SITE, line);
        return now;
    }
};

[[noreturn, gnu::cold]] PTX_CALL void fault_of_warp(const char *what, u32 members, int line)
{
    char where[64];
    std::snprintf(where, sizeof(where), "members %#x, lane %d", members, host_cuda::lane_in_warp());
    fault(what, where, line);
}

PTX void check_member(u32 members, int line)
{
    if (!(members >> host_cuda::lane_in_warp() & 1))
        fault_of_warp("a lane that the member mask leaves out", members, line);
}

PTX void sync_warp(u32 members, int line)
{
    check_member(members, line);
    host_cuda::sync_warp(members, SITE, line);
}

// "shfl.sync": c has the segment mask in bits 8 to 12 and the clamp in bits 0 to 4.
template <char MODE>
PTX_CALL u32 shuffle(u32 value, u32 b, u32 c, u32 members, bool &inside, int line)
{
    const int lane = host_cuda::lane_in_warp(), segment = int(c >> 8 & 31), clamp = int(c & 31), by = int(b & 31);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    const int source = MODE == 'u' ? lane - by : MODE == 'd' ? lane + by : MODE == 'b' ? lane ^ by
                                                                         : first | (by & ~segment);
    inside = MODE == 'u' ? source >= last : source <= last;
    const char *name = MODE == 'u' ? "shfl.up" : MODE == 'd' ? "shfl.down" : MODE == 'b' ? "shfl.bfly" : "shfl.idx";
    check_member(members, line);
    const u64 given = host_cuda::shuffle(name, members, value, inside ? source : lane, SITE, line);
    if (given >> 32)  // no word of a lane
        fault_of_warp("a shuffle from a lane that takes no part in it", members, line);
    return u32(given);
}

PTX bool vote_any(bool p, u32 members, int line)
{
    check_member(members, line);
    return host_cuda::ballot("vote.any", members, p, SITE, line) != 0;
}
