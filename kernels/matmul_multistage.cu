// Large products of two matrices: asynchronous copies fill stages of shared memory ahead of the one that is multiplied.
//
//   matmul_multistage_nn    C = A B (+ bias)      A (M, K), B (K, N)
//   matmul_multistage_nt    C = A B^T (+ bias)    A (M, K), B (N, K)
//   matmul_multistage_tn    C = A^T B (+ bias)    A (K, M), B (K, N)      all of C (M, N), bias (N,)
//
// C and bias are float32; A and B are float32, or with OPERAND_BYTES 2 bfloat16 as unsigned shorts. All are
// C-contiguous; A and B start at a multiple of 16 bytes, and so does each of their rows.
//
// Constants from the launcher: those of tile.cuh; OPERAND_BYTES, 4 or 2; STAGES, at least 2. sm_80 and later.
// A block owns a TILE_M x TILE_N tile of C and K_split of the K products, a multiple of TILE_K: blockIdx.x counts tiles
// along M, blockIdx.y along N, blockIdx.z splits of K. TileSums of tile.cuh says what its warps and threads own.
//
// Shared memory holds STAGES stages, each of TILE_K of k of both operands, which take turns. While one stage is
// multiplied, the copies into the next stages are under way, 16 bytes each and past the registers. One barrier per
// iteration says both that the next stage has arrived and that the stage of the iteration before may be overwritten.
// Operands keep the orientation and the type that they have in memory.
//   fp32        FFMA, which needs rows along m (or n): an operand with neighbouring k is copied by 4 bytes
//   tf32, bf16  a warp loads the fragments of the next k, across the barrier too, before it multiplies the present
//               ones, and rounds each element once; ldmatrix loads fragments of bfloat16 operands, without rounding
// A block takes most of the registers of a multiprocessor: each holds one block.
// Bytes: 4 M K read for each column of tiles and 4 K N for each row of tiles (half of it for bfloat16), mostly from L2;
// 4 M N written. An iteration of a tile of 192 x 128 reads 20 KiB for 786,432 operations in tf32, 38 a byte, and twice
// as many with bfloat16 operands; a warp reads 28 words a lane from shared memory for 24 mma.
// Why not naive.cu's way: see matmul.cu. Why not matmul.cu's: its loads pass through registers, one iteration ahead;
// here the loads of two iterations are on their way without registers, and larger tiles load less.
// Variants: PRECISION and OPERAND_BYTES; tiles of 192 or 256 rows, whichever keep more multiprocessors busy; split-K,
// whose partial sums add_partial_sums of matmul.cu adds.
// Source: CUTLASS, "Efficient GEMM in CUDA", section "Pipelining".
#include "tile.cuh"

#if !defined(OPERAND_BYTES) || !defined(STAGES)
#error "the launcher defines OPERAND_BYTES and STAGES"
#endif
#if __CUDA_ARCH__ < 800
#error "asynchronous copies need sm_80"
#endif

static_assert(OPERAND_BYTES == 4 || (OPERAND_BYTES == 2 && PRECISION == 2), "two bytes are bf16, multiplied as bf16");
static_assert(STAGES >= 2, "one stage is multiplied while another arrives");

#if OPERAND_BYTES == 2
using Element = unsigned short;
#else
using Element = float;
#endif

// One operand in a stage. WIDTH is TILE_M or TILE_N; m stands for m or n.
template <bool K_CONTIGUOUS, int WIDTH>
struct StageOperand {
    static constexpr bool TRANSPOSED = K_CONTIGUOUS && PRECISION == 0;  // on the way from global memory
    static constexpr bool ROWS_ALONG_K = K_CONTIGUOUS && !TRANSPOSED;
    static constexpr int ROW = ROWS_ALONG_K ? TILE_K : WIDTH;
    // Padding spreads over the banks the 8 rows of 16 bytes that ldmatrix reads together, or the 4 k x 8 m words of a
    // fragment; in fp32 it is the padding that TileSums reads with.
    static constexpr int PADDING = PRECISION == 0 ? TILE_PADDING : ROWS_ALONG_K ? 16 / OPERAND_BYTES : 8;
    static constexpr int STRIDE = ROW + PADDING, SIZE = (ROWS_ALONG_K ? WIDTH : TILE_K) * STRIDE;
    static constexpr int CHUNK = TRANSPOSED ? 1 : 16 / OPERAND_BYTES;  // elements of one copy
    static constexpr int COPIES = WIDTH * TILE_K / CHUNK / TILE_THREADS;
    static_assert(WIDTH * TILE_K % (CHUNK * TILE_THREADS) == 0, "all threads copy alike");

    // Of each of this thread's copies: source, offset of its target in a stage, and the k0 from which on it copies
    // zeros.
    const Element *source[COPIES];
    int target[COPIES], k_limit[COPIES];

    static __device__ __forceinline__ int offset(int m, int k)
    {
        return ROWS_ALONG_K ? m * STRIDE + k : k * STRIDE + m;
    }

    // The matrix has M of m and K of k; copies begin at m0 and k_begin. Elements outside of the matrix, or at k_end and
    // beyond, are copied as zeros. A chunk lies inside as a whole or not at all.
    __device__ __forceinline__ StageOperand(const Element *matrix, int m0, int M, int k_begin, int k_end, int K)
    {
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int chunk = threadIdx.x + i * TILE_THREADS;
            int m, k;
            if constexpr (TRANSPOSED) {
                m = TileOperand<true, WIDTH>::column(i), k = TileOperand<true, WIDTH>::word(i);
            } else if constexpr (ROWS_ALONG_K) {
                m = chunk / (TILE_K / CHUNK), k = chunk % (TILE_K / CHUNK) * CHUNK;
            } else {
                m = chunk % (WIDTH / CHUNK) * CHUNK, k = chunk / (WIDTH / CHUNK);
            }
            const size_t row = K_CONTIGUOUS ? m0 + m : k_begin + k, column = K_CONTIGUOUS ? k_begin + k : m0 + m;
            source[i] = matrix + row * (K_CONTIGUOUS ? K : M) + column;
            target[i] = offset(m, k);
            k_limit[i] = m0 + m < M ? k_end - k : k_begin;
        }
    }

    // Starts the copies of the iteration that begins at k0, the next one at each call.
    __device__ __forceinline__ void copy(Element *stage, int k0, int M)
    {
        const size_t step = K_CONTIGUOUS ? TILE_K : size_t(TILE_K) * M;
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            if constexpr (TRANSPOSED)
                cp_async_4(stage + target[i], source[i], k0 < k_limit[i]);
            else
                cp_async_16(stage + target[i], source[i], k0 < k_limit[i]);
            source[i] += step;
        }
    }

#if PRECISION != 0 && OPERAND_BYTES == 4
    // A word of a fragment. Any order of k is right if both operands have it: in bf16 a word holds k and k + 8, so that
    // lanes read from the same offsets as in tf32.
    static __device__ __forceinline__ unsigned word(const Element *stage, int m, int k)
    {
#if PRECISION == 1
        return __float_as_uint(stage[offset(m, k)]);  // not rounded yet: it would have to be waited for
#else
        return pack_bf16(stage[offset(m, k)], stage[offset(m, k + 8)]);
#endif
    }
#endif

#if OPERAND_BYTES == 2
    // Four matrices of 8 x 8, of which this lane gives a row: matrix lane() / 8 has its corner at (m, k), which differ
    // from lane to lane.
    static __device__ __forceinline__ void matrices(unsigned (&registers)[4], const Element *stage, int m, int k)
    {
        if constexpr (ROWS_ALONG_K)
            ldmatrix_x4(registers, stage + offset(m + lane() % 8, k));
        else
            ldmatrix_x4_trans(registers, stage + offset(m, k + lane() % 8));
    }
#endif
};

#if PRECISION != 0
constexpr int MMA_K = 8 * PACK;  // k of one mma
static_assert(TILE_N / 8 % TileSums::WARPS_N == 0 && TileSums::COLUMNS % 2 == 0, "all warps own pairs of columns");

// The fragments of one group of k, for all rows and columns of C that a warp owns.
template <class OperandA, class OperandB>
struct Fragments {
    unsigned a[TileSums::ROWS][4], b[TileSums::COLUMNS][2];

    __device__ __forceinline__ void load(const Element *stage, int k)
    {
        const Element *stage_b = stage + OperandA::SIZE;
#if OPERAND_BYTES == 2
        const int low = lane() / 8 % 2 * 8, high = lane() / 16 * 8;
#pragma unroll
        for (int i = 0; i < TileSums::ROWS; ++i)
            OperandA::matrices(a[i], stage, TileSums::row(i) + low, k + high);
#pragma unroll
        for (int j = 0; j < TileSums::COLUMNS; j += 2) {
            unsigned two[4];
            OperandB::matrices(two, stage_b, high ? TileSums::column(j + 1) : TileSums::column(j), k + low);
            b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
        }
#else
        const int g = lane() / 4, q = lane() % 4;
#pragma unroll
        for (int i = 0; i < TileSums::ROWS; ++i)
#pragma unroll
            for (int r = 0; r < 4; ++r)
                a[i][r] = OperandA::word(stage, TileSums::row(i) + g + r % 2 * 8, k + q + r / 2 * 4);
#pragma unroll
        for (int j = 0; j < TileSums::COLUMNS; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                b[j][r] = OperandB::word(stage_b, TileSums::column(j) + g, k + q + r * 4);
#endif
    }

    __device__ __forceinline__ void multiply(TileSums &sums)
    {
#if PRECISION == 1
#pragma unroll
        for (int i = 0; i < TileSums::ROWS; ++i)
#pragma unroll
            for (int r = 0; r < 4; ++r)
                a[i][r] = tf32_operand(a[i][r]);
#pragma unroll
        for (int j = 0; j < TileSums::COLUMNS; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                b[j][r] = tf32_operand(b[j][r]);
#endif
#pragma unroll
        for (int i = 0; i < TileSums::ROWS; ++i)
#pragma unroll
            for (int j = 0; j < TileSums::COLUMNS; ++j)
#if PRECISION == 1
                mma_m16n8k8_tf32(sums.c[i][j], a[i], b[j]);
#else
                mma_m16n8k16_bf16(sums.c[i][j], a[i], b[j]);
#endif
    }
};
#endif

template <bool TRANSPOSE_A, bool TRANSPOSE_B>
__device__ __forceinline__ void product(Element *shared, float *__restrict__ C, const Element *__restrict__ A,
                                        const Element *__restrict__ B, const float *__restrict__ bias, int M, int N,
                                        int K, int K_split, int add_bias)
{
    using OperandA = StageOperand<!TRANSPOSE_A, TILE_M>;
    using OperandB = StageOperand<TRANSPOSE_B, TILE_N>;
    constexpr int STAGE = OperandA::SIZE + OperandB::SIZE;
    const int m0 = blockIdx.x * TILE_M, n0 = blockIdx.y * TILE_N, k_begin = blockIdx.z * K_split;
    const int k_end = min(k_begin + K_split, K);
    OperandA operand_a(A, m0, M, k_begin, k_end, K);
    OperandB operand_b(B, n0, N, k_begin, k_end, K);
    const auto copy = [&](Element *stage, int k0) {
        operand_a.copy(stage, k0, M);
        operand_b.copy(stage + OperandA::SIZE, k0, N);
        cp_async_commit();
    };
    const auto wait = [] {  // until the next stage has arrived
        cp_async_wait<STAGES - 2>();
        __syncthreads();
    };
    const auto after = [=](Element *stage) { return stage == shared + (STAGES - 1) * STAGE ? shared : stage + STAGE; };

#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s)
        copy(shared + s * STAGE, k_begin + s * TILE_K);
    TileSums sums;
    Element *stage = shared, *spent = shared + (STAGES - 1) * STAGE;
#if PRECISION == 0
    for (int k0 = k_begin; k0 < k_end; k0 += TILE_K) {
        wait();
        copy(spent, k0 + (STAGES - 1) * TILE_K);  // of the iteration before, which all threads have multiplied
        sums.add(stage);
        spent = stage, stage = after(stage);
    }
#else
    Fragments<OperandA, OperandB> fragments, next;
    wait();
    fragments.load(stage, 0);
    for (int k0 = k_begin; k0 < k_end; k0 += TILE_K) {
        copy(spent, k0 + (STAGES - 1) * TILE_K);  // of the iteration before, from which all warps have loaded
#pragma unroll
        for (int k = MMA_K; k < TILE_K; k += MMA_K) {
            next.load(stage, k);
            fragments.multiply(sums);
            fragments = next;
        }
        spent = stage, stage = after(stage);
        wait();
        next.load(stage, 0);  // zeros after the last iteration
        fragments.multiply(sums);
        fragments = next;
    }
#endif
    cp_async_wait<0>();  // for the copies that fill with zeros, too: a thread must not end before its copies
    float *C_split = C + size_t(blockIdx.z) * M * N;
    sums.each([=](int i, int j, float value) {
        const int m = m0 + i, n = n0 + j;
        if (m < M && n < N)
            C_split[size_t(m) * N + n] = value + (add_bias ? bias[n] : 0.0f);
    });
}

extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    matmul_multistage_nn(float *__restrict__ C, const Element *__restrict__ A, const Element *__restrict__ B,
                        const float *__restrict__ bias, int M, int N, int K, int K_split, int add_bias)
{
    extern __shared__ __align__(16) Element shared[];
    product<false, false>(shared, C, A, B, bias, M, N, K, K_split, add_bias);
}

extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    matmul_multistage_nt(float *__restrict__ C, const Element *__restrict__ A, const Element *__restrict__ B,
                        const float *__restrict__ bias, int M, int N, int K, int K_split, int add_bias)
{
    extern __shared__ __align__(16) Element shared[];
    product<false, true>(shared, C, A, B, bias, M, N, K, K_split, add_bias);
}

extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    matmul_multistage_tn(float *__restrict__ C, const Element *__restrict__ A, const Element *__restrict__ B,
                        const float *__restrict__ bias, int M, int N, int K, int K_split, int add_bias)
{
    extern __shared__ __align__(16) Element shared[];
    product<true, false>(shared, C, A, B, bias, M, N, K, K_split, add_bias);
}
