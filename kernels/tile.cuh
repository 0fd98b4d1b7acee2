// One block computes one tile of a matrix product: c (TILE_M, TILE_N) = a (TILE_M, K) b (K, TILE_N), for any K >= 0.
//
// Constants from the launcher: PRECISION (0 fp32, 1 tf32, 2 bf16); TILE_M, TILE_N, TILE_K, multiples of 16. The tiles
// in use keep TILE_SHARED floats within the 48 KB of static shared memory; a larger one does not compile.
// All TILE_THREADS threads of a one-dimensional block call tile_sums or tile_product together. The operands are
// functors, inlined: a(m, k) and b(k, n), with m and n counted from the tile's corner, return 0 where m or n lies
// outside of the matrix; k stays inside [0, K). A_K_CONTIGUOUS and B_K_CONTIGUOUS say that neighbouring k are
// neighbours in memory (else neighbouring m, or n).
//
// Each iteration brings TILE_K of k from global memory to shared memory, through registers, so that the loads of the
// next iteration run while this iteration multiplies. Operands lie in shared memory by k, then m or n, in words of 32
// bits: one fp32, one tf32 or two bf16 of neighbouring k, rounded once, on the way. Iterations use two stages of shared
// memory in turns, with one barrier each.
//   fp32        a thread owns TILE_M / 16 rows by TILE_N / 16 columns, a warp 4 x 8 threads; FFMA, k ascending
//   tf32, bf16  a warp owns fragments of 16 x 8, on the tensor cores; fp32 sums, k ascending in groups of 8 (bf16: 16)
// Every element of c is summed in the same order, wherever the element lies in the tile: equal calls give equal bits.
// Source: CUTLASS, "Efficient GEMM in CUDA" (the hierarchy of tiles); ptx.cuh for the fragments.
#include "common.cuh"
#include "precision.cuh"

#if !defined(TILE_M) || !defined(TILE_N) || !defined(TILE_K)
#error "the launcher defines TILE_M, TILE_N and TILE_K"
#endif

static_assert(PRECISION <= 2, "0 fp32, 1 tf32, 2 bf16");
static_assert(TILE_M % 16 == 0 && TILE_N % 16 == 0 && TILE_K % 16 == 0, "tiles are multiples of 16");

constexpr int TILE_THREADS = 256;
constexpr int TILE_WORDS = TILE_K / PACK;  // words along k per iteration
// The padding of a row puts words that a warp accesses together into different banks: in fp32 the 8 x 4 words that it
// stores (and rows stay aligned to 16 bytes), else the 4 x 8 words of a fragment that it loads.
constexpr int TILE_PADDING = PRECISION == 0 ? 4 : 8;
constexpr int TILE_A_STRIDE = TILE_M + TILE_PADDING;
constexpr int TILE_B_STRIDE = TILE_N + TILE_PADDING;
constexpr int TILE_STAGE = TILE_WORDS * (TILE_A_STRIDE + TILE_B_STRIDE);
constexpr int TILE_C_STRIDE = TILE_N + 1;

// Floats of shared memory, aligned to 16 bytes: TILE_STAGES for tile_sums, TILE_SHARED for tile_product.
constexpr int TILE_STAGES = 2 * TILE_STAGE;
constexpr int TILE_SHARED = TILE_STAGES > TILE_M * TILE_C_STRIDE ? TILE_STAGES : TILE_M * TILE_C_STRIDE;

// This thread's share of one operand of the next iteration, on its way from global to shared memory. WIDTH is TILE_M or
// TILE_N.
template <bool K_CONTIGUOUS, int WIDTH>
struct TileOperand {
    static constexpr int SIZE = WIDTH * TILE_WORDS, SHARE = ceil_div(SIZE, TILE_THREADS);

    float elements[SHARE][PACK];

    // Neighbouring threads take neighbouring elements in memory. Along k they take 8 words, then the next row: a memory
    // transaction moves 32 bytes, and 8 x 4 words fall into different banks.
    static __device__ __forceinline__ int word(int i)
    {
        const int e = threadIdx.x + i * TILE_THREADS;
        return K_CONTIGUOUS ? e / (8 * WIDTH) * 8 + e % 8 : e / WIDTH;
    }

    static __device__ __forceinline__ int column(int i)
    {
        const int e = threadIdx.x + i * TILE_THREADS;
        return K_CONTIGUOUS ? e / 8 % WIDTH : e % WIDTH;
    }

    static __device__ __forceinline__ bool owned(int i)
    {
        return SIZE % TILE_THREADS == 0 || threadIdx.x + i * TILE_THREADS < SIZE;
    }

    // read(k, column) is the operand's functor; k0 is the first k of the iteration.
    template <class Read>
    __device__ __forceinline__ void load(int k0, int K, Read read)
    {
#pragma unroll
        for (int i = 0; i < SHARE; ++i)
#pragma unroll
            for (int p = 0; p < PACK; ++p) {
                const int k = k0 + word(i) * PACK + p;
                elements[i][p] = owned(i) && k < K ? read(k, column(i)) : 0.0f;
            }
    }

    // Elements are rounded here and not in load, which would have to wait for them to arrive. `stage` is an array of
    // float, but its elements hold the bits of any word.
    __device__ __forceinline__ void store(float *stage) const
    {
#pragma unroll
        for (int i = 0; i < SHARE; ++i)
            if (owned(i)) {
                const unsigned rounded = to_word(0, [&](int p) { return elements[i][p]; });
                stage[word(i) * (WIDTH + TILE_PADDING) + column(i)] = __uint_as_float(rounded);
            }
    }
};

// This thread's share of c.
#if PRECISION == 0
struct TileSums {
    static constexpr int ROWS = TILE_M / 16, COLUMNS = TILE_N / 16;

    float c[ROWS][COLUMNS] = {};

    // Row and column of this thread, the block seen as 16 x 16 threads.
    static __device__ __forceinline__ int thread_row() { return warp() / 2 * 4 + lane() / 8; }
    static __device__ __forceinline__ int thread_column() { return warp() % 2 * 8 + lane() % 8; }

    // A thread's rows (or columns) lie together in runs of 4, 2 or 1, which one load reads; its next run begins 16 runs
    // later.
    template <int COUNT>
    static constexpr int RUN = COUNT % 4 == 0 ? 4 : COUNT % 2 == 0 ? 2 : 1;

    template <int COUNT>
    static __device__ __forceinline__ int index_in_tile(int thread, int i)
    {
        return (i / RUN<COUNT> * 16 + thread) * RUN<COUNT> + i % RUN<COUNT>;
    }

    template <int COUNT>
    static __device__ __forceinline__ void load(float (&values)[COUNT], const float *row, int thread)
    {
#pragma unroll
        for (int i = 0; i < COUNT; i += RUN<COUNT>) {
            const float *run = row + index_in_tile<COUNT>(thread, i);
            if constexpr (RUN<COUNT> == 4) {
                const float4 x = *reinterpret_cast<const float4 *>(run);
                values[i] = x.x, values[i + 1] = x.y, values[i + 2] = x.z, values[i + 3] = x.w;
            } else if constexpr (RUN<COUNT> == 2) {
                const float2 x = *reinterpret_cast<const float2 *>(run);
                values[i] = x.x, values[i + 1] = x.y;
            } else {
                values[i] = *run;
            }
        }
    }

    __device__ __forceinline__ void add(const float *stage)
    {
        const float *stage_b = stage + TILE_WORDS * TILE_A_STRIDE;
#pragma unroll
        for (int k = 0; k < TILE_WORDS; ++k) {
            float a[ROWS], b[COLUMNS];
            load(a, stage + k * TILE_A_STRIDE, thread_row());
            load(b, stage_b + k * TILE_B_STRIDE, thread_column());
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j)
                    c[i][j] = fmaf(a[i], b[j], c[i][j]);
        }
    }

    template <class Each>
    __device__ __forceinline__ void each(Each take) const
    {
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j)
                take(index_in_tile<ROWS>(thread_row(), i), index_in_tile<COLUMNS>(thread_column(), j), c[i][j]);
    }
};
#else
struct TileSums {
    static constexpr int WARPS_M = TILE_M % 64 == 0 ? 4 : TILE_M % 32 == 0 ? 2 : 1;
    static constexpr int WARPS_N = TILE_THREADS / WARP / WARPS_M;
    static constexpr int ROWS = TILE_M / 16 / WARPS_M, COLUMNS = ceil_div(TILE_N / 8, WARPS_N);

    float c[ROWS][COLUMNS][4] = {};

    // First row (or column) of this warp's fragments; warps take turns.
    static __device__ __forceinline__ int row(int i) { return (warp() % WARPS_M + i * WARPS_M) * 16; }
    static __device__ __forceinline__ int column(int j) { return (warp() / WARPS_M + j * WARPS_N) * 8; }
    // Whether fragment j lies inside the tile; equal in all lanes of a warp.
    static __device__ __forceinline__ bool owned(int j) { return TILE_N / 8 % WARPS_N == 0 || column(j) < TILE_N; }

    // Counted in words, the mma of tf32 and the mma of bf16 take the same fragments: 16 x 8 of a and 8 x 8 of b.
    __device__ __forceinline__ void add(const float *stage)
    {
        const float *stage_b = stage + TILE_WORDS * TILE_A_STRIDE;
        const int g = lane() / 4, q = lane() % 4;
#pragma unroll
        for (int k = 0; k < TILE_WORDS; k += 8) {
            unsigned b[COLUMNS][2];
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j)
                if (owned(j))
#pragma unroll
                    for (int r = 0; r < 2; ++r)
                        b[j][r] = __float_as_uint(stage_b[(k + q + 4 * r) * TILE_B_STRIDE + column(j) + g]);
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                unsigned a[4];
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    a[r] = __float_as_uint(stage[(k + q + r / 2 * 4) * TILE_A_STRIDE + row(i) + g + r % 2 * 8]);
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j)
                    if (owned(j))
                        mma(c[i][j], a, b[j]);
            }
        }
    }

    template <class Each>
    __device__ __forceinline__ void each(Each take) const
    {
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j)
                if (owned(j))
#pragma unroll
                    for (int r = 0; r < 4; ++r)
                        take(row(i) + lane() / 4 + r / 2 * 8, column(j) + lane() % 4 * 2 + r % 2, c[i][j][r]);
    }
};
#endif

// The sums over all k, in registers: each(take) calls take(m, n, value) for every element of c, in the thread that owns
// it. `shared` has TILE_STAGES floats, which other threads may still be reading when this function returns.
template <bool A_K_CONTIGUOUS, bool B_K_CONTIGUOUS, class A, class B>
__device__ __forceinline__ TileSums tile_sums(float *shared, int K, A a, B b)
{
    const auto a_by_k = [&](int k, int m) { return a(m, k); };
    TileSums sums;
    TileOperand<A_K_CONTIGUOUS, TILE_M> next_a;
    TileOperand<B_K_CONTIGUOUS, TILE_N> next_b;
    next_a.load(0, K, a_by_k);
    next_b.load(0, K, b);
    __syncthreads();  // the caller may have just used `shared`
    for (int k0 = 0, iteration = 0; k0 < K; k0 += TILE_K, ++iteration) {
        // Every thread that read this stage two iterations ago has passed the barrier of the last iteration since.
        float *stage = shared + iteration % 2 * TILE_STAGE;
        next_a.store(stage);
        next_b.store(stage + TILE_WORDS * TILE_A_STRIDE);
        __syncthreads();
        next_a.load(k0 + TILE_K, K, a_by_k);
        next_b.load(k0 + TILE_K, K, b);
        sums.add(stage);
    }
    return sums;
}

// Element (m, n) of c after tile_product.
__device__ __forceinline__ float &tile_c(float *shared, int m, int n) { return shared[m * TILE_C_STRIDE + n]; }

// Leaves c in shared memory, for any thread to read through tile_c at once. `shared` has TILE_SHARED floats.
template <bool A_K_CONTIGUOUS, bool B_K_CONTIGUOUS, class A, class B>
__device__ __forceinline__ void tile_product(float *shared, int K, A a, B b)
{
    const TileSums sums = tile_sums<A_K_CONTIGUOUS, B_K_CONTIGUOUS>(shared, K, a, b);
    __syncthreads();  // c overwrites the stages
    sums.each([=](int m, int n, float value) { tile_c(shared, m, n) = value; });
    __syncthreads();
}
