// The meaning of each function of kernels/ptx.cuh on a CPU: the same names and parameters, without PTX. The parameters
// `file` and `line` are filled in by the compiler: where the kernel made the call, for reports.
#pragma once

namespace host_cuda {

// ---- mma: gathers A and B from the fragments of 32 lanes, multiplies, adds to the accumulators ----------------------

struct Fragments {
    float *d;
    const unsigned *a, *b;
};

HOST_CUDA_UNCHECKED inline float tf32_element(unsigned bits, int) { return __uint_as_float(bits & 0xffffe000u); }
HOST_CUDA_UNCHECKED inline float bf16_element(unsigned bits, int i) { return __uint_as_float(bits >> 16 * i << 16); }

// `P` is the number of elements per register, `A` the number of registers of an A fragment.
template <float (*element)(unsigned, int), int P, int A>
HOST_CUDA_UNCHECKED void mma(void *const *lanes)
{
    constexpr int K = 2 * P * A;
    float a[16][K], b[K][8], d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const Fragments &fragments = *static_cast<const Fragments *>(lanes[lane]);
        const int g = lane / 4, q = lane % 4;
        for (int r = 0; r < A; ++r)
            for (int i = 0; i < P; ++i)
                a[g + 8 * (r % 2)][q * P + 4 * P * (r / 2) + i] = element(fragments.a[r], i);
        for (int r = 0; r < A / 2; ++r)
            for (int i = 0; i < P; ++i)
                b[q * P + 4 * P * r + i][g] = element(fragments.b[r], i);
        for (int i = 0; i < 4; ++i)
            d[g + 8 * (i / 2)][2 * q + i % 2] = fragments.d[i];
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < K; ++k)
            for (int column = 0; column < 8; ++column)
                d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            static_cast<const Fragments *>(lanes[lane])->d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    count_mma();
}

// ---- ldmatrix: lane 8 m + i gave row i of matrix m ------------------------------------------------------------------

struct MatrixRow {
    uint4 row;         // the 16 bytes at the address that this lane gave
    unsigned *result;  // four registers
};

template <bool transposed>
HOST_CUDA_UNCHECKED void ldmatrix(void *const *lanes)
{
    unsigned short element[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
        const uint4 &row = static_cast<const MatrixRow *>(lanes[lane])->row;
        const unsigned words[4] = {row.x, row.y, row.z, row.w};
        for (int i = 0; i < 8; ++i)
            element[lane / 8][lane % 8][i] = (unsigned short)(words[i / 2] >> 16 * (i % 2));
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < 4; ++m) {
            const int g = lane / 4, q = lane % 4;
            const unsigned low = transposed ? element[m][2 * q][g] : element[m][g][2 * q];
            const unsigned high = transposed ? element[m][2 * q + 1][g] : element[m][g][2 * q + 1];
            static_cast<const MatrixRow *>(lanes[lane])->result[m] = high << 16 | low;
        }
}

// ---- cp.async: copies happen as late as they may, in cp_async_wait: a read without the wait finds the old bytes -----

inline void finish_copies(int pending)
{
    for (Copy copy; next_finished_copy(pending, copy);) {
        unsigned *target = static_cast<unsigned *>(copy.target);
        const unsigned *source = static_cast<const unsigned *>(copy.source);
        for (int i = 0; i < copy.bytes / 4; ++i)
            target[i] = copy.inside ? source[i] : 0;
    }
}

}  // namespace host_cuda

// ---- The functions of ptx.cuh ---------------------------------------------------------------------------------------

__device__ __forceinline__ void ldmatrix_x4(unsigned (&registers)[4], const void *row, HOST_CUDA_SITE)
{
    host_cuda::MatrixRow mine = {*static_cast<const uint4 *>(row), registers};
    host_cuda::whole_warp("ldmatrix_x4", &mine, host_cuda::ldmatrix<false>, file, line);
}

__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&registers)[4], const void *row, HOST_CUDA_SITE)
{
    host_cuda::MatrixRow mine = {*static_cast<const uint4 *>(row), registers};
    host_cuda::whole_warp("ldmatrix_x4_trans", &mine, host_cuda::ldmatrix<true>, file, line);
}

__device__ __forceinline__ void add_release(unsigned *counter, unsigned value)
{
    host_cuda::count_group_barrier(counter);
    __atomic_fetch_add(counter, value, __ATOMIC_RELEASE);
}

__device__ __forceinline__ unsigned load_relaxed(const unsigned *counter)
{
    return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

__device__ __forceinline__ unsigned load_acquire(const unsigned *counter)
{
    return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

__device__ __forceinline__ void wait_at_least(const unsigned *counter, unsigned target, HOST_CUDA_SITE)
{
    host_cuda::record_wait(counter, target);
    for (unsigned value = load_relaxed(counter); int(value - target) < 0; value = load_relaxed(counter))
        host_cuda::spin_pause(counter, value, target, file, line);
    load_acquire(counter);
}

__device__ __forceinline__ void store_word(unsigned long long *to, unsigned long long word)
{
    host_cuda::count_write(to, sizeof(word));
    __atomic_store_n(to, word, __ATOMIC_RELAXED);
}

// Not counted: how often a word is read depends on which block comes first.
__device__ __forceinline__ void load_two_words(unsigned long long (&words)[2], const unsigned long long *from)
{
    for (int i = 0; i < 2; ++i)
        words[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
}

__device__ __forceinline__ bool any_missing(bool missing, const unsigned long long *from, unsigned tag, unsigned mask,
                                            HOST_CUDA_SITE)
{
    const unsigned *upper = reinterpret_cast<const unsigned *>(from) + 1;
    host_cuda::record_wait(upper, tag);
    if (!host_cuda::ballot("any_missing", 0xffffffffu, missing, file, line))
        return false;
    host_cuda::spin_pause(upper, __atomic_load_n(upper, __ATOMIC_RELAXED) & mask, tag & mask, file, line);
    return true;
}

__device__ __forceinline__ unsigned opaque(unsigned bits) { return bits; }

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ unsigned short to_bf16(float x)
{
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return 0x7fff;  // NaN, as the instruction writes it
    return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ __forceinline__ unsigned pack_bf16(float low, float high)
{
    return unsigned(to_bf16(high)) << 16 | to_bf16(low);
}

__device__ __forceinline__ unsigned to_tf32(float x)
{
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) >= 0x7f800000u)
        return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffffffu : bits;  // NaN, as the instruction writes it; infinity
    return (bits + 0x1000u) & 0xffffe000u;
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                                 HOST_CUDA_SITE)
{
    host_cuda::Fragments fragments = {d, a, b};
    host_cuda::whole_warp("mma_m16n8k8_tf32", &fragments, host_cuda::mma<host_cuda::tf32_element, 1, 4>, file, line);
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                                  HOST_CUDA_SITE)
{
    host_cuda::Fragments fragments = {d, a, b};
    host_cuda::whole_warp("mma_m16n8k16_bf16", &fragments, host_cuda::mma<host_cuda::bf16_element, 2, 4>, file, line);
}

__device__ __forceinline__ void cp_async_16(void *shared, const void *global, bool inside = true)
{
    host_cuda::copy_later(shared, global, 16, inside);
}

__device__ __forceinline__ void cp_async_4(void *shared, const void *global, bool inside = true)
{
    host_cuda::copy_later(shared, global, 4, inside);
}

__device__ __forceinline__ void cp_async_commit() { host_cuda::commit_copies(); }

template <int Pending>
__device__ __forceinline__ void cp_async_wait()
{
    host_cuda::finish_copies(Pending);
}
#endif
