// CUDA C++ for a host compiler: everything that a kernel file may use when it runs without a GPU.
//
// Kernel sources are compiled unchanged as C++17 behind this header; runtime.cpp runs them: one CUDA thread is one
// fiber, one block is one OS thread, and whatever makes threads wait for each other is a rendezvous of fibers. A
// function that is not declared here (float atomics, clocks, textures) stops the build, and so does inline PTX: ptx.h
// has the functions of kernels/ptx.cuh.
// Source: CUDA C++ Programming Guide, chapter "C++ Language Extensions".
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define HOST_CUDA 1
#define __CUDA_ARCH__ 900

#define __global__
#define __shared__ thread_local  // of block scope: static as well, so one instance per block
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#ifdef HOST_CUDA_COUNT_BYTES
#define __device__ __attribute__((always_inline))  // a structure that a call takes or returns would not be counted
#else
#define __device__
#endif

// Functions that move data between the fibers of a warp, hidden from ThreadSanitizer: a shuffle or an mma orders no
// memory.
#define HOST_CUDA_UNCHECKED __attribute__((no_sanitize("thread")))

// `extern __shared__ T name[];` is no C++ declaration. The loader writes this in its place, on the same line; the
// leading statement makes sure that it stands inside a function.
#define HOST_CUDA_DYNAMIC_SHARED(type, name) \
    (void)0;                                 \
    type *const name = static_cast<type *>(host_cuda::dynamic_shared())

struct dim3 {
    unsigned x, y, z;
};
using uint3 = dim3;

extern __thread uint3 threadIdx, blockIdx;
extern __thread dim3 blockDim, gridDim;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

__forceinline__ float2 make_float2(float x, float y) { return {x, y}; }
__forceinline__ float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
__forceinline__ int2 make_int2(int x, int y) { return {x, y}; }
__forceinline__ int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
__forceinline__ uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
__forceinline__ uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace host_cuda {

// Where a primitive was called, for reports.
#define HOST_CUDA_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

void sync_threads(const char *file, int line);
void sync_warp(unsigned mask, const char *file, int line);

// An instruction that all 32 lanes of a warp execute together: the last to arrive runs work(lanes) for all of them,
// where lanes[i] is the `data` of lane i.
using Work = void (*)(void *const *lanes);
void whole_warp(const char *name, void *data, Work work, const char *file, int line);

std::uint64_t shuffle(const char *name, unsigned mask, std::uint64_t bits, int source, const char *file, int line);
unsigned ballot(const char *name, unsigned mask, bool predicate, const char *file, int line);

// To be called in each turn of a loop that waits for another block: lets the other fibers run, and detects a deadlock.
void spin_pause(const unsigned *counter, unsigned value, unsigned target, const char *file, int line);

// Ahead of an access to global memory, strong or weak: where a schedule decides which block runs, another may go on.
void may_interrupt(bool strong);

// What a model of memory wants to know of __syncthreads() and __syncwarp(): with a key, that whatever the thread knows
// is handed over, or that it takes over whatever was handed over with this key before. Keys are those of one block.
struct MemoryOrder {
    void (*before)(void *key), (*after)(void *key);
};
extern MemoryOrder memory_order;

// For reports: the CUDA source line of a line of PTX. Null where kernels run from their source.
extern const char *(*source_of_ptx)(int line);

void *dynamic_shared();
std::size_t shared_bytes();  // at dynamic_shared(): what the kernel and the launch ask for
[[noreturn]] void stop(const char *why);  // ends the launch with this report
void fence();
void count_group_barrier(const unsigned *counter);  // an arrival of this block at one
void count_mma();
void record_wait(const unsigned *counter, unsigned target);
int lane_in_warp();

// For counting.cpp: only bytes in the arrays of the arguments count.
void count_read(const void *address, std::uint64_t bytes);
void count_write(const void *address, std::uint64_t bytes);
void record_atomic(const void *address, std::uint64_t bytes);

// An asynchronous copy, from cp_async_16 or _4 to the cp_async_wait in which it happens.
struct Copy {
    void *target;
    const void *source;
    int bytes;
    bool inside;
};
void copy_later(void *target, const void *source, int bytes, bool inside);
void commit_copies();
bool next_finished_copy(int pending, Copy &copy);

template <class To, class From>
HOST_CUDA_UNCHECKED inline To bit_cast(From from)
{
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class T>
inline T shuffle_value(const char *name, unsigned mask, T value, int source, const char *file, int line)
{
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles move 4 or 8 bytes");
    using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
    return bit_cast<T>(Bits(shuffle(name, mask, bit_cast<Bits>(value), source, file, line)));
}

}  // namespace host_cuda

inline void __syncthreads(HOST_CUDA_SITE) { host_cuda::sync_threads(file, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, HOST_CUDA_SITE) { host_cuda::sync_warp(mask, file, line); }
inline void __threadfence() { host_cuda::fence(); }

// Shuffles: a lane outside its segment of `width` lanes keeps its own value.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, HOST_CUDA_SITE)
{
    const int first = host_cuda::lane_in_warp() & -width;
    return host_cuda::shuffle_value("__shfl_sync", mask, value, first + (source & (width - 1)), file, line);
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, HOST_CUDA_SITE)
{
    const int lane = host_cuda::lane_in_warp(), source = lane - int(distance);
    return host_cuda::shuffle_value("__shfl_up_sync", mask, value, source < (lane & -width) ? lane : source, file,
                                    line);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, HOST_CUDA_SITE)
{
    const int lane = host_cuda::lane_in_warp(), source = lane + int(distance);
    return host_cuda::shuffle_value("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source,
                                    file, line);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, HOST_CUDA_SITE)
{
    const int lane = host_cuda::lane_in_warp(), source = lane ^ bits;
    return host_cuda::shuffle_value("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source,
                                    file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, HOST_CUDA_SITE)
{
    return host_cuda::ballot("__ballot_sync", mask, predicate != 0, file, line);
}

inline int __any_sync(unsigned mask, int predicate, HOST_CUDA_SITE)
{
    return host_cuda::ballot("__any_sync", mask, predicate != 0, file, line) != 0;
}

inline int __all_sync(unsigned mask, int predicate, HOST_CUDA_SITE)
{
    return host_cuda::ballot("__all_sync", mask, predicate == 0, file, line) == 0;
}

// Atomics, relaxed as on the device; integers only, since sums of floats are to have a fixed order.
template <class T>
using HostAtomic = std::enable_if_t<std::is_integral<T>::value && sizeof(T) >= 4, T>;

template <class T>
inline HostAtomic<T> atomicAdd(T *address, std::common_type_t<T> value)
{
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <class T>
inline HostAtomic<T> atomicExch(T *address, std::common_type_t<T> value)
{
    return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}

template <class T>
inline HostAtomic<T> atomicCAS(T *address, std::common_type_t<T> expected, std::common_type_t<T> value)
{
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

template <class T>
inline HostAtomic<T> atomicMax(T *address, std::common_type_t<T> value)
{
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (old < value &&
           !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

template <class T>
inline HostAtomic<T> atomicMin(T *address, std::common_type_t<T> value)
{
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (value < old &&
           !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

template <class T>
__forceinline__ T __ldg(const T *address)
{
    return *address;
}

inline unsigned __float_as_uint(float x) { return host_cuda::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return host_cuda::bit_cast<int>(x); }
HOST_CUDA_UNCHECKED inline float __uint_as_float(unsigned x) { return host_cuda::bit_cast<float>(x); }
inline float __int_as_float(int x) { return host_cuda::bit_cast<float>(x); }

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned bits)
{
    return unsigned((std::uint64_t(high) << 32 | low) << (bits & 31) >> 32);
}

// Byte i of the result is the one of the eight bytes of y and x that bits 4 i to 4 i + 2 of the selector name.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector)
{
    const std::uint64_t bytes = std::uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i)
        result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(std::uint64_t(x) * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y)
{
    return (unsigned long long)((unsigned __int128)(x)*y >> 64);
}

inline int min(int x, int y) { return x < y ? x : y; }
inline unsigned min(unsigned x, unsigned y) { return x < y ? x : y; }
inline long long min(long long x, long long y) { return x < y ? x : y; }
inline unsigned long long min(unsigned long long x, unsigned long long y) { return x < y ? x : y; }
inline float min(float x, float y) { return std::fmin(x, y); }
inline int max(int x, int y) { return x > y ? x : y; }
inline unsigned max(unsigned x, unsigned y) { return x > y ? x : y; }
inline long long max(long long x, long long y) { return x > y ? x : y; }
inline unsigned long long max(unsigned long long x, unsigned long long y) { return x > y ? x : y; }
inline float max(float x, float y) { return std::fmax(x, y); }

#include "ptx.h"

// How a launch reaches a kernel: the parameter types are deduced from the function, for the loader to check against.
namespace host_cuda {

struct Parameter {
    char kind;  // f, i, u as NumPy has them; V for void
    int bytes;
    bool pointer, readonly;
};

struct Kernel {
    const char *name;
    void (*call)(void *const *arguments);
    const Parameter *parameters;
    int parameter_count;
    std::size_t shared_bytes = 0;  // ahead of the dynamic shared memory, in the same buffer
    bool shared_shadow = false;    // whether a zero byte per byte of that buffer lies behind it
};

// The kernels of the compiled source, ending with a null name.
extern const Kernel kernels[];

template <class T> struct ScalarOf { using type = T; };
template <> struct ScalarOf<float2> { using type = float; };
template <> struct ScalarOf<float4> { using type = float; };
template <> struct ScalarOf<int2> { using type = int; };
template <> struct ScalarOf<int4> { using type = int; };
template <> struct ScalarOf<uint2> { using type = unsigned; };
template <> struct ScalarOf<uint4> { using type = unsigned; };

template <class T>
constexpr Parameter describe()
{
    using Pointee = std::remove_pointer_t<T>;
    using Scalar = typename ScalarOf<std::remove_cv_t<Pointee>>::type;
    if constexpr (std::is_void<Scalar>::value) {
        return {'V', 1, true, std::is_const<Pointee>::value};
    } else {
        static_assert(std::is_arithmetic<Scalar>::value, "kernel parameters are numbers and pointers to numbers");
        return {std::is_floating_point<Scalar>::value ? 'f' : std::is_signed<Scalar>::value ? 'i' : 'u',
                int(sizeof(Scalar)), std::is_pointer<T>::value, std::is_const<Pointee>::value};
    }
}

template <auto function>
struct Trampoline;

template <class... Parameters, void (*function)(Parameters...)>
struct Trampoline<function> {
    static constexpr Parameter parameters[sizeof...(Parameters) + 1] = {describe<Parameters>()...};

    template <std::size_t... i>
    static void call(void *const *arguments, std::index_sequence<i...>)
    {
        function(*static_cast<Parameters *>(arguments[i])...);
    }

    static void call(void *const *arguments) { call(arguments, std::index_sequence_for<Parameters...>()); }

    static constexpr Kernel kernel(const char *name) { return {name, call, parameters, int(sizeof...(Parameters))}; }
};

}  // namespace host_cuda

#define HOST_CUDA_KERNEL(name) host_cuda::Trampoline<name>::kernel(#name)

#ifndef HOST_CUDA_RUNTIME
#define asm inline_ptx_belongs_in_ptx_cuh
#endif

#ifdef HOST_CUDA_COUNT_BYTES
#pragma GCC poison memcpy memmove memset  // their accesses would not be counted
#endif
