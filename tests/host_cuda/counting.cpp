// Counts the bytes that a kernel reads and writes, argument by argument.
//
// The kernel is compiled with -fsanitize=thread, which puts a call before every access to memory, and linked with this
// file in place of the sanitizer's runtime: the calls arrive here. Optimisation is off, so that accesses count as the
// source writes them, and not as a compiler merges, drops or moves them. Shared memory and locals make such calls as
// well; runtime.cpp counts those that fall into the array of an argument.
//
// Atomics are not counted: how many there are may depend on who comes first, as the turns of a spin do. GCC puts no call
// where a structure goes straight from memory into a function that is not inlined, or back: the header has all
// __device__ functions inlined, and only lambdas are left. What calls anything that is not defined here does not build.
// Source: GCC's sanitizer.def, the functions that instrumented code calls.
#define HOST_CUDA_RUNTIME
#include "host_cuda.h"

#ifdef __clang__
#error "counting bytes needs GCC: Clang copies structures by memcpy, and leaves out a read before a write to its place"
#endif

using host_cuda::count_read, host_cuda::count_write;

#define ACCESS(bytes)                                                      \
    void __tsan_read##bytes(void *address) { count_read(address, bytes); } \
    void __tsan_write##bytes(void *address) { count_write(address, bytes); }

// The atomics that host_cuda.h and ptx.h use, in the strongest order whatever was asked for.
constexpr int ORDER = __ATOMIC_SEQ_CST;

#define ATOMICS(bits, T)                                                                                          \
    T __tsan_atomic##bits##_load(const volatile T *address, int) { return __atomic_load_n(address, ORDER); }      \
    T __tsan_atomic##bits##_exchange(volatile T *address, T value, int)                                           \
    {                                                                                                             \
        return __atomic_exchange_n(address, value, ORDER);                                                        \
    }                                                                                                             \
    T __tsan_atomic##bits##_fetch_add(volatile T *address, T value, int)                                          \
    {                                                                                                             \
        return __atomic_fetch_add(address, value, ORDER);                                                         \
    }                                                                                                             \
    bool __tsan_atomic##bits##_compare_exchange_strong(volatile T *address, T *expected, T value, int, int)       \
    {                                                                                                             \
        return __atomic_compare_exchange_n(address, expected, value, false, ORDER, ORDER);                        \
    }                                                                                                             \
    bool __tsan_atomic##bits##_compare_exchange_weak(volatile T *address, T *expected, T value, int, int)         \
    {                                                                                                             \
        return __atomic_compare_exchange_n(address, expected, value, true, ORDER, ORDER);                         \
    }

extern "C" {
void __tsan_init() {}

ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void *address, std::size_t bytes) { count_read(address, bytes); }
void __tsan_write_range(void *address, std::size_t bytes) { count_write(address, bytes); }

ATOMICS(32, std::uint32_t)
ATOMICS(64, std::uint64_t)
}
