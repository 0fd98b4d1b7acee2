// Output layer, softmax, mean cross-entropy in nats, and its gradient with respect to the logits, in one pass over h.
//
//   logits = h W_out^T + b_out
//   loss = mean over positions of log(sum over v of exp(logits[v])) - logits[target]
//   dlogits[v] = (exp(logits[v]) / sum over v of exp(logits[v]) - [v is target]) / positions
//
// h (positions, H), W_out (V, H), b_out (V,), losses (positions,), loss (1,), dlogits (positions, V): float32;
// targets (positions,) int32 in [0, V). positions = T B.
//
// A block owns TILE_M positions and goes through V in tiles of TILE_N. A warp owns every eighth position, a lane every
// 32nd logit of a position. The block multiplies a tile; then each warp brings the maximum and the sum of exponentials
// of its rows up to date, the sum being relative to the maximum so far, and leaves the logits for a second sweep, which
// makes gradients of them. The one block of mean_loss owns the loss.
// Bytes: h read once, 4 H positions; W_out once per block, from L2, 4 H V positions / TILE_M; dlogits written once,
// 4 V positions.
// Why not naive.cu's way: a thread for each position reads h once for every character, 8 H V bytes a position with
// W_out: 3.5 GB at the tutorial's sizes, where h is 26 MB; and 6,400 threads are too few for a large GPU.
// Variants, by STAGES, a constant from the launcher: with 0, h and W_out pass through registers (tile.cuh), whatever
// the sizes and the GPU; with more, from sm_80 on and where rows begin at multiples of 16 bytes, asynchronous copies
// fill as many stages of shared memory, all but one of them on their way while that one is multiplied. By V: up to
// TILE_N (with copies 80 or, for bytes, 256) logits stay in shared memory between the sweeps; above, they pass through
// dlogits, 8 V positions more. By PRECISION: fp32; tf32 and bf16 round h and W_out, and nothing else.
// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867, algorithm 3; CUTLASS,
// "Efficient GEMM in CUDA", section "Pipelining".

#include "common.cuh"
#include "tile.cuh"

#ifndef STAGES
#error "the launcher defines STAGES"
#endif
#if STAGES > 0 && __CUDA_ARCH__ < 800
#error "asynchronous copies need sm_80"
#endif

constexpr int WARPS = TILE_THREADS / WARP, WARP_ROWS = TILE_M / WARPS;
constexpr int LANE_COLUMNS = ceil_div(TILE_N, WARP);
constexpr int MEAN_WARPS = 32;  // of the one block of mean_loss
static_assert(TILE_M % WARPS == 0 && WARP_ROWS <= WARP, "a lane keeps maximum and sum of one row");

// Row r of this warp, as a row of the block's tile.
__device__ __forceinline__ int row_in_tile(int r) { return warp() + WARPS * r; }

// Softmax, loss and gradient of the block's rows, from the tiles of logits that are handed to it. Rows beyond the last
// position are computed like the others, of zeros, so that the rows of a warp need no branch, and overlap; nothing of
// them is written.
struct Softmax {
    float *dlogits;
    const float *b_out;
    int first, positions, V;
    // Of the logits so far: lane r keeps the maximum of row r of its warp, and the sum of exponentials relative to it.
    float maximum, sum;

    __device__ __forceinline__ Softmax(float *dlogits, const float *b_out, int positions, int V)
        : dlogits(dlogits), b_out(b_out), first(blockIdx.x * TILE_M), positions(positions), V(V),
          maximum(__uint_as_float(0xff800000u)), sum(0.0f)
    {
    }

    __device__ __forceinline__ bool one_tile() const { return V <= TILE_N; }

    // The tile of products of columns v0 and after, in `shared`, becomes logits there.
    __device__ __forceinline__ void add_tile(float *shared, int v0)
    {
        const int columns = min(TILE_N, V - v0);
#pragma unroll 2
        for (int r = 0; r < WARP_ROWS; ++r) {
            const int position = first + row_in_tile(r);
            float *row = dlogits + size_t(position) * V + v0;
            const float old_maximum = __shfl_sync(ALL_LANES, maximum, r), old_sum = __shfl_sync(ALL_LANES, sum, r);
            float new_maximum = old_maximum;
#pragma unroll
            for (int i = 0; i < LANE_COLUMNS; ++i) {
                const int n = lane() + WARP * i;
                if (n < columns) {
                    float &logit = tile_c(shared, row_in_tile(r), n);
                    logit += b_out[v0 + n];
                    if (!one_tile() && position < positions)
                        row[n] = logit;
                    new_maximum = fmaxf(new_maximum, logit);
                }
            }
            new_maximum = warp_max(new_maximum);
            float new_sum = 0.0f;
#pragma unroll
            for (int i = 0; i < LANE_COLUMNS; ++i)
                if (lane() + WARP * i < columns)
                    new_sum += expf(tile_c(shared, row_in_tile(r), lane() + WARP * i) - new_maximum);
            new_sum = warp_sum(new_sum) + old_sum * expf(old_maximum - new_maximum);
            if (lane() == r) {
                maximum = new_maximum;
                sum = new_sum;
            }
        }
    }

    // The second sweep, over all tiles; `shared` holds the logits of the last one.
    __device__ __forceinline__ void finish(float *shared, float *losses, const int *targets) const
    {
        const float weight = reciprocal(float(positions));
        __syncwarp();  // a lane now reads logits that other lanes of its warp have written to dlogits
        for (int r = 0; r < WARP_ROWS && first + row_in_tile(r) < positions; ++r) {
            const int position = first + row_in_tile(r), target = targets[position];
            float *row = dlogits + size_t(position) * V;
            const float row_maximum = __shfl_sync(ALL_LANES, maximum, r), row_sum = __shfl_sync(ALL_LANES, sum, r);
            const float row_weight = reciprocal(row_sum);
#pragma unroll 2  // up to 80 logits of a row take a warp three turns
            for (int v = lane(); v < V; v += WARP) {
                const float logit = (one_tile() ? tile_c(shared, row_in_tile(r), v) : row[v]) - row_maximum;
                row[v] = (expf(logit) * row_weight - float(v == target)) * weight;
                if (v == target)
                    losses[position] = logf(row_sum) - logit;
            }
        }
    }
};

#if STAGES > 0
#if PRECISION != 0
// Four neighbouring k of a row, rounded: words of two fragments in tf32, of one in bf16.
struct Words {
    static constexpr int COUNT = 4 / PACK;

    unsigned words[COUNT];

    Words() = default;

    __device__ __forceinline__ explicit Words(float4 x)
    {
#if PRECISION == 1
        words[0] = tf32_operand(__float_as_uint(x.x)), words[1] = tf32_operand(__float_as_uint(x.y));
        words[2] = tf32_operand(__float_as_uint(x.z)), words[3] = tf32_operand(__float_as_uint(x.w));
#else
        words[0] = pack_bf16(x.x, x.y), words[1] = pack_bf16(x.z, x.w);
#endif
    }
};
#endif

// A stage holds TILE_K of k of the tile's rows of h, then of those of W_out, as they lie in memory, in chunks of 16
// bytes. Chunks of a row change places by the row, so that eight rows have a chunk in different banks, and two
// neighbouring rows four of theirs.
constexpr int CHUNK = 4, ROW_CHUNKS = TILE_K / CHUNK, STAGE = (TILE_M + TILE_N) * TILE_K;
constexpr int COPIED_ROWS = TILE_THREADS / ROW_CHUNKS;  // at a time
constexpr int STAGE_REST = (TILE_M + TILE_N) % COPIED_ROWS * ROW_CHUNKS;  // threads that take part in the last copy
static_assert(ROW_CHUNKS == 8 && TILE_M % COPIED_ROWS == 0, "a copy is of h or of W_out");

__device__ __forceinline__ int chunk_offset(int row, int chunk)
{
    return row * TILE_K + (chunk ^ (row % 2 * 4 + row / 2 % 2 * 2 + row / 4 % 2)) * CHUNK;
}

__device__ __forceinline__ float4 load_chunk(const float *stage, int row, int chunk)
{
    return *reinterpret_cast<const float4 *>(stage + chunk_offset(row, chunk));
}

// This thread's copies: the same chunk of every 32nd row.
struct Copies {
    static constexpr int COUNT = ceil_div(TILE_M + TILE_N, COPIED_ROWS);

    const float *source[COUNT];
    int k_limit[COUNT], target;  // the k0 from which on it copies zeros; of row 0, in a stage

    // h and W_out begin with the tile's first row, and have `rows` and `columns`.
    __device__ __forceinline__ Copies(const float *h, int rows, const float *W_out, int columns, int H)
    {
        const int first = threadIdx.x / ROW_CHUNKS, chunk = threadIdx.x % ROW_CHUNKS;
        target = chunk_offset(first, chunk);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const bool of_h = i * COPIED_ROWS < TILE_M;
            const int row = first + i * COPIED_ROWS - (of_h ? 0 : TILE_M);
            source[i] = (of_h ? h : W_out) + size_t(row) * H + chunk * CHUNK;
            k_limit[i] = row < (of_h ? rows : min(columns, TILE_N)) ? H - chunk * CHUNK : 0;
        }
    }

    // Starts the copies of the iteration that begins at k0, the next one at each call.
    __device__ __forceinline__ void start(float *stage, int k0)
    {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const bool in_stage = (i + 1) * COPIED_ROWS <= TILE_M + TILE_N || threadIdx.x < STAGE_REST;
            if (in_stage)
                cp_async_16(stage + target + i * COPIED_ROWS * TILE_K, source[i], k0 < k_limit[i]);
            source[i] += TILE_K;
        }
        cp_async_commit();
    }
};

// Adds the products of a stage. Any order of k is right if both operands have it: on tensor cores a lane takes four
// neighbouring k where tile.cuh's words are four (or eight) apart, in one load.
__device__ __forceinline__ void add_stage(TileSums &sums, const float *stage)
{
    using S = TileSums;
#if PRECISION == 0
#pragma unroll
    for (int chunk = 0; chunk < ROW_CHUNKS; ++chunk) {
        float4 b[S::COLUMNS];
#pragma unroll
        for (int j = 0; j < S::COLUMNS; ++j)
            b[j] = load_chunk(stage, TILE_M + S::index_in_tile<S::COLUMNS>(S::thread_column(), j), chunk);
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i) {
            const float4 a = load_chunk(stage, S::index_in_tile<S::ROWS>(S::thread_row(), i), chunk);
#pragma unroll
            for (int j = 0; j < S::COLUMNS; ++j) {
                float &c = sums.c[i][j];
                c = fmaf(a.w, b[j].w, fmaf(a.z, b[j].z, fmaf(a.y, b[j].y, fmaf(a.x, b[j].x, c))));
            }
        }
    }
#else
    const int g = lane() / 4, q = lane() % 4;
#pragma unroll
    for (int chunk = 0; chunk < ROW_CHUNKS; chunk += 4) {
        Words b[S::COLUMNS];
#pragma unroll
        for (int j = 0; j < S::COLUMNS; ++j)
            if (S::owned(j))
                b[j] = Words(load_chunk(stage, TILE_M + S::column(j) + g, chunk + q));
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i) {
            const Words upper(load_chunk(stage, S::row(i) + g, chunk + q));
            const Words lower(load_chunk(stage, S::row(i) + g + 8, chunk + q));
#pragma unroll
            for (int w = 0; w < Words::COUNT; w += 2) {
                const unsigned a[4] = {upper.words[w], lower.words[w], upper.words[w + 1], lower.words[w + 1]};
#pragma unroll
                for (int j = 0; j < S::COLUMNS; ++j)
                    if (S::owned(j))
                        mma(sums.c[i][j], a, {b[j].words[w], b[j].words[w + 1]});
            }
        }
    }
#endif
}

// Leaves the products of a tile in `shared`, as tile_product does, where its stages were.
__device__ __forceinline__ void multistage_product(float *shared, const float *h, int rows, const float *W_out,
                                                   int columns, int H)
{
    Copies copies(h, rows, W_out, columns, H);
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s)
        copies.start(shared + s * STAGE, s * TILE_K);
    TileSums sums;
    float *stage = shared, *spent = shared + (STAGES - 1) * STAGE;
    for (int k0 = 0; k0 < H; k0 += TILE_K) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // the next stage has arrived, and all threads have multiplied the one before
        copies.start(spent, k0 + (STAGES - 1) * TILE_K);
        add_stage(sums, stage);
        spent = stage, stage = stage == shared + (STAGES - 1) * STAGE ? shared : stage + STAGE;
    }
    cp_async_wait<0>();  // of the copies that fill with zeros, too
    __syncthreads();  // the products overwrite the stages
    sums.each([=](int m, int n, float value) { tile_c(shared, m, n) = value; });
    __syncthreads();
}
#endif

extern "C" __global__ void __launch_bounds__(TILE_THREADS, 1)
    cross_entropy_forward(float *__restrict__ dlogits, float *__restrict__ losses, const float *__restrict__ h,
                          const float *__restrict__ W_out, const float *__restrict__ b_out,
                          const int *__restrict__ targets, int positions, int V, int H)
{
#if STAGES > 0
    extern __shared__ __align__(16) float shared[];
#else
    __shared__ __align__(16) float shared[TILE_SHARED];
#endif
    Softmax softmax(dlogits, b_out, positions, V);
    const int first = softmax.first;
    for (int v0 = 0; v0 < V; v0 += TILE_N) {
#if STAGES > 0
        if (v0 > 0)
            __syncthreads();  // other warps may still be reading the logits of the tile before
        multistage_product(shared, h + size_t(first) * H, positions - first, W_out + size_t(v0) * H, V - v0, H);
#else
        tile_product<true, true>(
            shared, H, [&](int m, int k) { return first + m < positions ? h[size_t(first + m) * H + k] : 0.0f; },
            [&](int k, int n) { return v0 + n < V ? W_out[size_t(v0 + n) * H + k] : 0.0f; });
#endif
        softmax.add_tile(shared, v0);
    }
    softmax.finish(shared, losses, targets);
}

extern "C" __global__ void __launch_bounds__(MEAN_WARPS * WARP)
    mean_loss(float *__restrict__ loss, const float *__restrict__ losses, int positions)
{
    __shared__ float scratch[MEAN_WARPS];
    const float sum = array_sum<MEAN_WARPS>(losses, positions, scratch);
    if (threadIdx.x == 0)
        loss[0] = sum / float(positions);
}
