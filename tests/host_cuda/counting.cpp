// Counts the bytes that a kernel reads and writes, argument by argument.
//
// The kernel is compiled with -fsanitize=thread, which puts a call before every access to memory, and linked with this
// file in place of the sanitizer's runtime: the calls arrive here. Optimisation is off, so that accesses count as the
// source writes them, and not as a compiler merges, drops or moves them. Accesses to shared memory and locals make
// such calls as well; runtime.cpp counts only accesses to the array of an argument.
//
// Atomics are not counted: their number may depend on which block comes first, as the turns of a spin do. GCC puts no
// call where a structure goes straight from memory into a function that is not inlined, or back: the header has all
// __device__ functions inlined, and only lambdas are left. A kernel that needs a function not
// defined here does not build.
// Source: GCC's sanitizer.def, the functions that instrumented code calls.
#define HOST_CUDA_RUNTIME
#include "host_cuda.h"

#ifdef __clang__
#error "counting bytes needs GCC: Clang copies structures by memcpy, and leaves out the read of what it overwrites"
#endif

using host_cuda::count_read, host_cuda::count_write, host_cuda::record_atomic;

#define ACCESS(bytes)                                                      \
    void __tsan_read##bytes(void *address) { count_read(address, bytes); } \
    void __tsan_write##bytes(void *address) { count_write(address, bytes); }

// The atomics that host_cuda.h and ptx.h use, in the strongest order whatever was asked for.
constexpr int ORDER = __ATOMIC_SEQ_CST;

// CUDA's atomic functions are relaxed. Stronger ones belong to a group's barrier, whose functions record themselves.
template <class T>
T *recorded(volatile T *address, int order)
{
    if (order == __ATOMIC_RELAXED)
        record_atomic(const_cast<T *>(address), sizeof(T));
    return const_cast<T *>(address);
}

#define ATOMICS(bits, T)                                                                                              \
    T __tsan_atomic##bits##_load(const volatile T *address, int) { return __atomic_load_n(address, ORDER); }          \
    void __tsan_atomic##bits##_store(volatile T *address, T value, int) { __atomic_store_n(address, value, ORDER); }  \
    T __tsan_atomic##bits##_exchange(volatile T *address, T value, int order)                                         \
    {                                                                                                                 \
        return __atomic_exchange_n(recorded(address, order), value, ORDER);                                           \
    }                                                                                                                 \
    T __tsan_atomic##bits##_fetch_add(volatile T *address, T value, int order)                                        \
    {                                                                                                                 \
        return __atomic_fetch_add(recorded(address, order), value, ORDER);                                            \
    }                                                                                                                 \
    bool __tsan_atomic##bits##_compare_exchange_strong(volatile T *address, T *expected, T value, int order, int)     \
    {                                                                                                                 \
        return __atomic_compare_exchange_n(recorded(address, order), expected, value, false, ORDER, ORDER);           \
    }                                                                                                                 \
    bool __tsan_atomic##bits##_compare_exchange_weak(volatile T *address, T *expected, T value, int order, int)       \
    {                                                                                                                 \
        return __atomic_compare_exchange_n(recorded(address, order), expected, value, true, ORDER, ORDER);            \
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
