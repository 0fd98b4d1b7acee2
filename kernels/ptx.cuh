// Every instruction that CUDA C++ has no function for, as a small device function; no other file contains inline PTX.
//
//   ldmatrix_x4(_trans)    sm_75   four 8x8 matrices of 16-bit elements, from shared memory to registers
//   add_release            sm_75   adds to a counter in global memory and releases what the thread wrote before
//   load_relaxed           sm_75   reads a counter, and orders nothing; wait_at_least repeats it
//   load_acquire           sm_75   reads a counter and acquires what was released to it; wait_at_least ends with it
//   store_word             sm_75   writes 64 bits at once, and orders nothing
//   load_two_words         sm_75   reads two neighbouring 64 bits, each of them at once, and orders nothing
//   any_missing            sm_75   a vote of the warp, for loops that load words until they have come
//   opaque                 sm_75   no instruction at all: hides a value from the compiler
//   to_bf16, pack_bf16     sm_80   round one float, or two, to bfloat16
//   to_tf32                sm_80   rounds a float to tf32
//   mma_m16n8k8_tf32       sm_80   D (16,8) += A (16,8)  B (8,8);   a[4], b[2]: one tf32 per register
//   mma_m16n8k16_bf16      sm_80   D (16,8) += A (16,16) B (16,8);  a[4], b[2]: two bf16 per register
//   cp_async_16, _4        sm_80   copies from global to shared memory that run while the thread goes on
//   cp_async_commit, _wait sm_80   close a group of such copies; wait for groups
//
// All 32 lanes of a warp execute an mma or an ldmatrix together. A lane owns, with g = lane / 4, q = lane % 4 and p
// elements per register (1 or 2; the element with the smaller index in the low half):
//   a[r]  row g + 8 (r % 2), columns q p + 4 p (r / 2) and the p - 1 after it
//   b[r]  rows q p + 4 p r and the p - 1 after it, column g
//   d[i]  row g + 8 (i / 2), column 2 q + i % 2
// Products are exact and sums are fp32; the tensor core ignores the low 13 bits of a tf32 operand (round it first, with
// to_tf32 or tf32_operand).
//
// A function exists only where its instruction does, so that its use on an older GPU stops the build. What each
// function means on a CPU, for tests without a GPU, is in tests/host_cuda/ptx.h.
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k8 / mma.m16n8k16", "ldmatrix", "cp.async", "cvt", "red", "ld".

#ifndef HOST_CUDA

// Four 8x8 matrices of 16-bit elements. Lane 8 m + i gives the address (16-byte aligned, shared memory) of the eight
// elements of row i of matrix m; registers[m] receives elements 2 q and 2 q + 1 of row g: an A fragment of
// mma_m16n8k16_bf16 when the matrices are the upper left, lower left, upper right and lower right quarters of a 16x16
// tile.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&registers)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row)))
                 : "memory");
}

// As ldmatrix_x4, each matrix transposed: registers[m] receives elements g of rows 2 q and 2 q + 1.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&registers)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row)))
                 : "memory");
}

// Adds to a counter; whoever acquires the new value sees everything that this thread wrote, or acquired, before.
__device__ __forceinline__ void add_release(unsigned *counter, unsigned value)
{
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned load_relaxed(const unsigned *counter)
{
    unsigned value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

__device__ __forceinline__ unsigned load_acquire(const unsigned *counter)
{
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

// Spins until the counter has reached `target`, modulo 2^32. On a CPU, the other blocks get their turns in here.
//
// An acquire invalidates L1, so the loop polls with relaxed loads. The acquire after the loop reads the value of the
// last poll or a later one, which came about by releasing adds only, so that it acquires all of them. Its value is not
// used: ptxas leaves the load out and keeps the invalidation.
__device__ __forceinline__ void wait_at_least(const unsigned *counter, unsigned target)
{
    while (int(load_relaxed(counter) - target) < 0) {
    }
    load_acquire(counter);
}

// Writes a word that blocks hand each other. A word is written at once, and read at once below: whoever reads one half
// of it as it was written has the other half, too. Nothing else is ordered.
__device__ __forceinline__ void store_word(unsigned long long *to, unsigned long long word)
{
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

// Reads two neighbouring words, 16-byte aligned, each of them at once.
__device__ __forceinline__ void load_two_words(unsigned long long (&words)[2], const unsigned long long *from)
{
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(words[0]), "=l"(words[1])
                 : "l"(from)
                 : "memory");
}

// Whether a lane of the warp misses a word that another block writes; a loop that loads words again and again asks it
// in each turn. wait_at_least and this are the only ways to wait for another block: on a CPU, the other blocks get
// their turns in here. `from` is where a word lies that this lane needs, and `tag` what its upper half has to show, as
// far as `mask` goes.
__device__ __forceinline__ bool any_missing(bool missing, const unsigned long long *, unsigned, unsigned)
{
    return __any_sync(0xffffffffu, missing);
}

// The same bits, of which the compiler knows nothing: it computes again, in each turn of a loop, whatever is derived
// from them, and keeps no register for the result.
__device__ __forceinline__ unsigned opaque(unsigned bits)
{
    asm volatile("" : "+r"(bits));
    return bits;
}

#if __CUDA_ARCH__ >= 800
// The nearest bfloat16, ties to even, as its 16 bits.
__device__ __forceinline__ unsigned short to_bf16(float x)
{
    unsigned short result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(x));
    return result;
}

// Two bfloat16 in one register, as the tensor cores take them: `low` is the element with the smaller index.
__device__ __forceinline__ unsigned pack_bf16(float low, float high)
{
    unsigned result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

// The nearest tf32 (10 bits of mantissa, ties away from zero) as the bits of a float. The tensor core truncates its
// operands, which doubles the error: round first.
__device__ __forceinline__ unsigned to_tf32(float x)
{
    unsigned result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
    return result;
}

// d += a b in tf32.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b in bfloat16.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Starts the copy of 16 bytes (both addresses 16-byte aligned) past L1; with `inside` false the target is filled with
// zeros and nothing is read, which guards a tail. The bytes are there, for this thread, after cp_async_wait; for the
// other threads after a barrier that follows it.
__device__ __forceinline__ void cp_async_16(void *shared, const void *global, bool inside = true)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
                 "l"(global), "r"(inside ? 16 : 0)
                 : "memory");
}

// As cp_async_16, for 4 bytes (both addresses 4-byte aligned), through L1.
__device__ __forceinline__ void cp_async_4(void *shared, const void *global, bool inside = true)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
                 "l"(global), "r"(inside ? 4 : 0)
                 : "memory");
}

// Closes a group: the copies that this thread started since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's latest groups are unfinished.
template <int Pending>
__device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
#endif

#endif
