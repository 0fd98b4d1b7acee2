// Tensor-core fragments: the PTX instructions, and what they mean on a host.
//
//   mma_m16n8k8_tf32     D (16,8) += A (16,8)  B (8,8)    sm_80   a[4], b[2]: one tf32 per register
//   mma_m16n8k16_bf16    D (16,8) += A (16,16) B (16,8)   sm_80   a[4], b[2]: two bf16 per register
//   ldmatrix_x4(_trans)  four 8x8 matrices of 16-bit elements, from shared memory to registers       sm_75
//   cp_async_16, _4      copies from global to shared memory that run while the thread goes on       sm_80
//
// All 32 lanes of a warp execute an mma or an ldmatrix together. A lane owns, with g = lane / 4, q = lane % 4 and p elements
// per register (1 or 2; the element with the smaller index in the low half):
//   a[r]  row g + 8 (r % 2), columns q p + 4 p (r / 2) and the p - 1 after it
//   b[r]  rows q p + 4 p r and the p - 1 after it, column g
//   d[i]  row g + 8 (i / 2), column 2 q + i % 2
// Products are exact and sums are fp32; tf32 operands lose the low 13 bits of what is passed (round with to_tf32 first).
// A wrapper exists only where its instruction does, so that use on an older GPU stops the build.
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k8 / mma.m16n8k16", "ldmatrix", "cp.async".

#ifdef HOST_CUDA
struct HostFragments {
    float *d;
    const unsigned *a, *b;
};

HOST_CUDA_UNCHECKED inline float host_tf32(unsigned bits, int) { return __uint_as_float(bits & 0xffffe000u); }
HOST_CUDA_UNCHECKED inline float host_bf16(unsigned bits, int i) { return __uint_as_float(bits >> 16 * i << 16); }

// One mma.sync: gathers A and B from the fragments of the 32 lanes, multiplies, and adds to the accumulators of each lane.
// `P` is the number of elements per register, `A` the number of registers of an A fragment.
template <float (*element)(unsigned, int), int P, int A>
HOST_CUDA_UNCHECKED void host_mma(void *const *lanes)
{
    constexpr int K = 2 * P * A;
    float a[16][K], b[K][8], d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const HostFragments &fragments = *static_cast<const HostFragments *>(lanes[lane]);
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
            static_cast<const HostFragments *>(lanes[lane])->d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    host_cuda::count_mma();
}

struct HostMatrixRow {
    uint4 row;         // the 16 bytes at the address that this lane gave
    unsigned *result;  // four registers
};

// One ldmatrix.x4: lane 8 m + i gave the address of row i of matrix m.
template <bool transposed>
HOST_CUDA_UNCHECKED void host_ldmatrix(void *const *lanes)
{
    unsigned short element[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
        const uint4 &row = static_cast<const HostMatrixRow *>(lanes[lane])->row;
        const unsigned words[4] = {row.x, row.y, row.z, row.w};
        for (int i = 0; i < 8; ++i)
            element[lane / 8][lane % 8][i] = (unsigned short)(words[i / 2] >> 16 * (i % 2));
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < 4; ++m) {
            const int g = lane / 4, q = lane % 4;
            const unsigned low = transposed ? element[m][2 * q][g] : element[m][g][2 * q];
            const unsigned high = transposed ? element[m][2 * q + 1][g] : element[m][g][2 * q + 1];
            static_cast<const HostMatrixRow *>(lanes[lane])->result[m] = high << 16 | low;
        }
}
#endif

// Four 8x8 matrices of 16-bit elements. Lane 8 m + i gives the address (16-byte aligned, shared memory) of the eight elements
// of row i of matrix m; registers[m] receives elements 2 q and 2 q + 1 of row g: an A fragment of mma_m16n8k16_bf16 when the
// matrices are the upper left, lower left, upper right and lower right quarters of a 16x16 tile.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&registers)[4], const void *row)
{
#ifdef HOST_CUDA
    HostMatrixRow mine = {*static_cast<const uint4 *>(row), registers};
    host_cuda::whole_warp("ldmatrix_x4", &mine, host_ldmatrix<false>);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}

// The same, each matrix transposed: registers[m] receives elements g of rows 2 q and 2 q + 1.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&registers)[4], const void *row)
{
#ifdef HOST_CUDA
    HostMatrixRow mine = {*static_cast<const uint4 *>(row), registers};
    host_cuda::whole_warp("ldmatrix_x4_trans", &mine, host_ldmatrix<true>);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}

#if __CUDA_ARCH__ >= 800
// An operand of mma_m16n8k8_tf32 from the bits of a float: truncated, as the tensor core does it, this is the nearest tf32. An
// instruction less than to_tf32 where each operand counts.
__device__ __forceinline__ unsigned tf32_operand(unsigned bits)
{
    const float infinity = __uint_as_float(0x7f800000u);
    return fabsf(__uint_as_float(bits)) < infinity ? bits + 0x1000u : bits;
}

// The same bits, of which the compiler knows nothing: what follows from them it computes again in each turn of a loop.
__device__ __forceinline__ unsigned opaque(unsigned bits)
{
#ifndef HOST_CUDA
    asm volatile("" : "+r"(bits));
#endif
    return bits;
}

// d += a b in tf32.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
#ifdef HOST_CUDA
    HostFragments fragments = {d, a, b};
    host_cuda::whole_warp("mma_m16n8k8_tf32", &fragments, host_mma<host_tf32, 1, 4>);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d += a b in bfloat16.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
#ifdef HOST_CUDA
    HostFragments fragments = {d, a, b};
    host_cuda::whole_warp("mma_m16n8k16_bf16", &fragments, host_mma<host_bf16, 2, 4>);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Starts the copy of 16 bytes (both addresses 16-byte aligned) past L1; with `inside` false the target is filled with zeros
// and nothing is read, which guards a tail. The bytes are there, for this thread, after cp_async_wait; for the other threads
// after a barrier that follows it.
__device__ __forceinline__ void cp_async_16(void *shared, const void *global, bool inside = true)
{
#ifdef HOST_CUDA
    host_cuda::copy_later(shared, global, 16, inside);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(shared))), "l"(global),
                 "r"(inside ? 16 : 0)
                 : "memory");
#endif
}

// The same for 4 bytes (both addresses 4-byte aligned), through L1.
__device__ __forceinline__ void cp_async_4(void *shared, const void *global, bool inside = true)
{
#ifdef HOST_CUDA
    host_cuda::copy_later(shared, global, 4, inside);
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(unsigned(__cvta_generic_to_shared(shared))), "l"(global),
                 "r"(inside ? 4 : 0)
                 : "memory");
#endif
}

// Closes a group: the copies that this thread started since the last commit.
__device__ __forceinline__ void cp_async_commit()
{
#ifdef HOST_CUDA
    host_cuda::commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Pending` of this thread's latest groups are unfinished.
template <int Pending>
__device__ __forceinline__ void cp_async_wait()
{
#ifdef HOST_CUDA
    host_cuda::finish_copies(Pending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}
#endif
