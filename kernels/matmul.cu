// Products of two matrices, and sums over the rows of one.
//
//   matmul_nn          C = A B (+ bias)      A (M, K), B (K, N)
//   matmul_nt          C = A B^T (+ bias)    A (M, K), B (N, K)
//   matmul_tn          C = A^T B (+ bias)    A (K, M), B (K, N)      all of C (M, N), bias (N,)
//   add_partial_sums   C = partial_sums[0] + partial_sums[1] + ... (+ bias)      partial_sums (splits, M, N)
//   column_sums        sums[n] = A[0, n] + A[1, n] + ...                         A (M, N), sums (N,)
//
// Everything is float32 and C-contiguous; with OPERAND_BYTES 2, A and B of a product are bfloat16 as unsigned shorts.
//
// A block of a product owns a TILE_M x TILE_N tile of C and K_split of the K products: blockIdx.x counts tiles along M,
// blockIdx.y along N, blockIdx.z splits of K. tile.cuh says what its warps and threads own. A block of column_sums
// owns 32 columns: a lane one of these columns, a warp every (blockDim.x / 32)nd row.
//
// Bytes: a product reads 4 M K for each column of tiles and 4 K N for each row of tiles, mostly from L2, and writes
// 4 M N; a product split along K also writes and reads its partial sums. column_sums reads 4 M N, 128 bytes per warp
// and row.
// Why not naive.cu's way: it loads 8 M N K bytes, two numbers for each multiply-add, 161 GB for dW_hh at the tutorial's
// sizes; a tile of 128 x 128 uses each number that it loads 128 times, which leaves 1.3 GB.
// Variants: PRECISION, see tile.cuh; OPERAND_BYTES, 4 or 2; tiles of 128 for a large C, else of 64; split-K, K shared
// among blocks, where C has too few tiles to occupy a GPU, with the partial sums added in ascending order. Large
// products go through matmul_multistage.cu where they can; this file runs at any sizes, and on any GPU.
// Source: CUTLASS, "Efficient GEMM in CUDA", section "Parallelized Reductions".
#include "tile.cuh"

#if !defined(OPERAND_BYTES)
#error "the launcher defines OPERAND_BYTES"
#endif
static_assert(OPERAND_BYTES == 4 || (OPERAND_BYTES == 2 && PRECISION == 2), "two bytes are bf16, multiplied as bf16");

#if OPERAND_BYTES == 2
using Element = unsigned short;
__device__ __forceinline__ float to_float(Element x) { return from_bf16(x); }
#else
using Element = float;
__device__ __forceinline__ float to_float(Element x) { return x; }
#endif

template <bool TRANSPOSE_A, bool TRANSPOSE_B>
__device__ __forceinline__ void product(float *__restrict__ C, const Element *__restrict__ A,
                                        const Element *__restrict__ B, const float *__restrict__ bias, int M, int N,
                                        int K, int K_split, int add_bias)
{
    __shared__ __align__(16) float shared[TILE_STAGES];
    const int m0 = blockIdx.x * TILE_M, n0 = blockIdx.y * TILE_N, k0 = blockIdx.z * K_split;
    float *C_split = C + size_t(blockIdx.z) * M * N;
    const TileSums sums = tile_sums<!TRANSPOSE_A, TRANSPOSE_B>(
        shared, min(K_split, K - k0),
        [=](int i, int p) {
            const int m = m0 + i, k = k0 + p;
            return m < M ? to_float(A[TRANSPOSE_A ? size_t(k) * M + m : size_t(m) * K + k]) : 0.0f;
        },
        [=](int p, int j) {
            const int k = k0 + p, n = n0 + j;
            return n < N ? to_float(B[TRANSPOSE_B ? size_t(n) * K + k : size_t(k) * N + n]) : 0.0f;
        });
    sums.each([=](int i, int j, float value) {
        const int m = m0 + i, n = n0 + j;
        if (m < M && n < N)
            C_split[size_t(m) * N + n] = add_bias ? value + bias[n] : value;
    });
}

extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    matmul_nn(float *__restrict__ C, const Element *__restrict__ A, const Element *__restrict__ B,
              const float *__restrict__ bias, int M, int N, int K, int K_split, int add_bias)
{
    product<false, false>(C, A, B, bias, M, N, K, K_split, add_bias);
}

extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    matmul_nt(float *__restrict__ C, const Element *__restrict__ A, const Element *__restrict__ B,
              const float *__restrict__ bias, int M, int N, int K, int K_split, int add_bias)
{
    product<false, true>(C, A, B, bias, M, N, K, K_split, add_bias);
}

extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    matmul_tn(float *__restrict__ C, const Element *__restrict__ A, const Element *__restrict__ B,
              const float *__restrict__ bias, int M, int N, int K, int K_split, int add_bias)
{
    product<true, false>(C, A, B, bias, M, N, K, K_split, add_bias);
}

// One thread per element of C.
extern "C" __global__ void add_partial_sums(float *__restrict__ C, const float *__restrict__ partial_sums,
                                        const float *__restrict__ bias, int M, int N, int splits, int add_bias)
{
    const size_t size = size_t(M) * N, i = thread_in_grid();
    if (i >= size)
        return;
    float sum = 0.0f;
    for (int split = 0; split < splits; ++split)
        sum += partial_sums[split * size + i];
    C[i] = add_bias ? sum + bias[i % N] : sum;
}

constexpr int MAX_SUM_WARPS = 32;

extern "C" __global__ void __launch_bounds__(MAX_SUM_WARPS * WARP)
    column_sums(float *__restrict__ sums, const float *__restrict__ A, int M, int N)
{
    __shared__ float partial_sums[MAX_SUM_WARPS][WARP];
    const int n = blockIdx.x * WARP + lane(), warps = blockDim.x / WARP;
    float sum = 0.0f;
    if (n < N)
#pragma unroll 8
        for (int m = warp(); m < M; m += warps)
            sum += A[size_t(m) * N + n];
    partial_sums[warp()][lane()] = sum;
    __syncthreads();
    if (warp() == 0 && n < N) {
        for (int w = 1; w < warps; ++w)
            sum += partial_sums[w][lane()];
        sums[n] = sum;
    }
}
