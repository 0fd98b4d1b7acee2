// A weight-stationary product: c (ROWS, COLUMNS) = x (ROWS, K) w (K, COLUMNS), by one block, many times with other x,
// while w stays on chip.
//
// Constants from the launcher: PRECISION (precision.cuh); ROWS: 16, 32 or 64; COLUMNS; K_STEPS; REGISTER_STEPS. K is
// cut into steps of STEP_K: 8 words, each of one element or, in bf16, of two of neighbouring k. A block has WARPS
// warps. Each owns K_STEPS steps of K, with all ROWS and COLUMNS, so that it reads its share of x from L2 once,
// straight into registers. It alone reads its share of w, from two places:
//   REGISTER_STEPS steps   in registers, LANE_WORDS per thread for each 8 columns (tensor cores only)
//   the other steps        in shared memory, WEIGHT_STEP words each
// Each warp ends with sums of its own. reduce_warps adds them, in shared memory of SUMS floats: the upper half of the
// warps stores its sums, the lower half adds its own to them; sum_of adds the sums of the lower half, in ascending
// order.
//
// Blocks hand x to each other through global memory, in the order in which warps load it: steps of K, of X_STEP words
// each. x_offset says where an element lies. Elements at k >= K must be zero there; rows beyond the matrix may hold
// anything.
//
// Bytes per product and block: for each step of each warp 32 ROWS from L2 and, unless its weights are in registers,
// 4 WEIGHT_STEP from shared memory; then 4 WARPS * ROWS * COLUMNS of sums, written to shared memory and read.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".
#include "block.cuh"
#include "precision.cuh"

#if !defined(ROWS) || !defined(COLUMNS) || !defined(K_STEPS) || !defined(REGISTER_STEPS)
#error "the launcher defines ROWS, COLUMNS, K_STEPS and REGISTER_STEPS"
#endif
static_assert(ROWS == 16 || ROWS == 32 || ROWS == 64, "rows come in fragments of 16");
static_assert(REGISTER_STEPS <= K_STEPS, "no more steps in registers than there are");

constexpr int STEP_K = 8 * PACK;
constexpr int TILES_N = ceil_div(COLUMNS, 8);
constexpr int X_STEP = ROWS * 8;                              // words of x per step
constexpr size_t X_WORDS = size_t(WARPS) * K_STEPS * X_STEP;  // of x as multiply takes it

// The tensor-core half and the scalar half: PRECISION makes one of the two files empty, and the other one defines
//   WEIGHT_STEP, X_STEPS          words of a step of w in shared memory; steps of x that a warp loads at a time
//   word_in_step(row, word)       where a word of x lies in its step
//   WarpSums                      the sums of one warp over its share of K, zero at first
//     X                             a step of x in registers: load(words) from x_offset's layout, or load_each(read)
//                                   from read(row, k), where x lies elsewhere
//     add(x, words)                 adds a step, whose w lies where store_weights left it
//     each(take)                    calls take(row, column, sum, sum of the next column) for the sums of this lane
//   store_weights(words, read)    puts a step of w into shared memory, from read(k, column)
//   RegisterWeights               a step of w in registers: load(read), add_to(sums, x)
#include "resident_mma.cuh"
#include "resident_scalar.cuh"

// Where element (row, k) of x lies, counted in elements.
__device__ __forceinline__ size_t x_offset(int row, int k)
{
    return (size_t(k / STEP_K) * X_STEP + word_in_step(row, k % STEP_K / PACK)) * PACK + k % PACK;
}

__device__ __forceinline__ void store_x(unsigned *x, int row, int k, float value)
{
    reinterpret_cast<StoredElement *>(x)[x_offset(row, k)] = to_stored(value);
}

// Rows of sums are 8 or 24 banks apart, so that the pairs of columns that half a warp stores together do not collide.
constexpr int SUMS_STRIDE = TILES_N * 8 + (TILES_N % 2 == 0 ? 8 : 0);
constexpr int SUMS_OF_WARP = ROWS * SUMS_STRIDE;
constexpr int SUMS = WARPS / 2 * SUMS_OF_WARP;

struct ResidentSums : WarpSums {
    // Leaves the sums of all warps in `sums`, SUMS floats of shared memory, for sum_of. A barrier has to stand between
    // the last sum_of and the next call.
    __device__ __forceinline__ void reduce_warps(float *sums)
    {
        constexpr int HALF = WARPS / 2;
        float2 *mine = reinterpret_cast<float2 *>(sums + warp() % HALF * SUMS_OF_WARP);
        const auto store = [=](int row, int column, float &first, float &second) {
            mine[(row * SUMS_STRIDE + column) / 2] = make_float2(first, second);
        };
        if (warp() >= HALF)
            each(store);
        __syncthreads();
        if (warp() < HALF) {
            each([=](int row, int column, float &first, float &second) {  // all loads first: no load waits for a store
                const float2 sum = mine[(row * SUMS_STRIDE + column) / 2];
                first += sum.x, second += sum.y;
            });
            each(store);
        }
        __syncthreads();
    }
};

// Element (row, column) of c after ResidentSums::reduce_warps.
__device__ __forceinline__ float sum_of(const float *sums, int row, int column)
{
    const float *sum_of_warp = sums + row * SUMS_STRIDE + column;
    float sum = sum_of_warp[0];
#pragma unroll
    for (int w = 1; w < WARPS / 2; ++w)
        sum += sum_of_warp[w * SUMS_OF_WARP];
    return sum;
}

// A warp's share of w.
struct ResidentWeights {
    RegisterWeights registers[REGISTER_STEPS > 0 ? REGISTER_STEPS : 1];
    unsigned *shared;

    static constexpr int SHARED_STEPS = K_STEPS - REGISTER_STEPS;
    static constexpr int SHARED_WORDS = WARPS * SHARED_STEPS * WEIGHT_STEP;  // of all warps

    // `all` is SHARED_WORDS of shared memory. read(k, column) is 0 outside the matrix; k counts over all warps.
    template <class Read>
    __device__ __forceinline__ void load(unsigned *all, Read read)
    {
        const int first = warp() * K_STEPS;
        shared = all + warp() * SHARED_STEPS * WEIGHT_STEP;
#pragma unroll
        for (int s = 0; s < REGISTER_STEPS; ++s)
            registers[s].load([=](int k, int column) { return read((first + s) * STEP_K + k, column); });
        for (int s = 0; s < SHARED_STEPS; ++s) {
            const int k0 = (first + REGISTER_STEPS + s) * STEP_K;
            store_weights(shared + s * WEIGHT_STEP, [=](int k, int column) { return read(k0 + k, column); });
        }
        __syncwarp();  // lanes read the words that other lanes stored
    }

    // Adds this warp's share of x w, or the first `steps` steps of it; x is X_WORDS. A caller that gives `steps` at run
    // time keeps the code of the steps apart: in 3xTF32 the compiler would else begin more steps at once than it has
    // registers for.
    __device__ __forceinline__ void multiply(ResidentSums &sums, const unsigned *x, int steps = K_STEPS) const
    {
        constexpr int WITH_REGISTERS = ceil_div(REGISTER_STEPS, X_STEPS) * X_STEPS;
        const unsigned *own_x = x + size_t(warp()) * K_STEPS * X_STEP;
        WarpSums::X next[X_STEPS];
        load_x(next, own_x, 0);
#pragma unroll
        for (int step = 0; step < WITH_REGISTERS; step += X_STEPS)
            add_steps<true>(sums, next, own_x, step, steps);
#pragma unroll 1
        for (int step = WITH_REGISTERS; step < K_STEPS; step += X_STEPS)
            add_steps<false>(sums, next, own_x, step, steps);
    }

    static __device__ __forceinline__ void load_x(WarpSums::X (&next)[X_STEPS], const unsigned *own_x, int step)
    {
#pragma unroll
        for (int i = 0; i < X_STEPS; ++i)
            if (step + i < K_STEPS)
                next[i].load(own_x + (step + i) * X_STEP);
    }

    // Adds X_STEPS steps, whose x is in `next`, while the x of the following steps is on its way to `next`. With
    // IN_REGISTERS, `step` has to be a constant after unrolling: an index that is known only at run time would put all
    // registers into local memory.
    template <bool IN_REGISTERS>
    __device__ __forceinline__ void add_steps(ResidentSums &sums, WarpSums::X (&next)[X_STEPS], const unsigned *own_x,
                                              int step, int steps) const
    {
        WarpSums::X now[X_STEPS];
#pragma unroll
        for (int i = 0; i < X_STEPS; ++i)
            now[i] = next[i];
        load_x(next, own_x, step + X_STEPS);
#pragma unroll
        for (int i = 0; i < X_STEPS; ++i) {
            if (step + i >= steps)
                return;
            if (IN_REGISTERS && step + i < REGISTER_STEPS)
                registers[step + i].add_to(sums, now[i]);
            else
                sums.add(now[i], shared + (step + i - REGISTER_STEPS) * WEIGHT_STEP);
        }
    }
};
