// A product with weights that stay on chip: c (ROWS, COLUMNS) = x (ROWS, K) w (K, COLUMNS), one block, many times over.
//
// Constants from the launcher: PRECISION (0 fp32, 1 tf32, 2 bf16, 3 fp32 in parts); ROWS: 16, 32 or 64; COLUMNS;
// K_STEPS and REGISTER_STEPS, below; with PRECISION 3, BF16: whether w is rounded to bf16. K counts in steps of STEP_K:
// 8 words of 32 bits, one fp32, one tf32 or two bf16 of neighbouring k each. A block has WARPS warps. Each owns K_STEPS
// steps of K, with all ROWS and COLUMNS, so that it reads its share of x from L2 once, straight into registers, and its
// share of w from where only it ever looks:
//   REGISTER_STEPS steps   in registers, LANE_WORDS per thread for each 8 columns (tensor cores only)
//   the other steps        in shared memory, WEIGHT_STEP words each
// The sums of the warps meet in shared memory, SUMS floats: the upper half of the warps leaves its sums, the lower half
// adds its own, and whoever needs an element adds those of the lower half, in ascending order.
//
// fp32 in parts is fp32 on tensor cores, as exact as without: x and w stay fp32 words until they are multiplied, when
// each is cut into the nearest tf32, hi, and what that leaves, lo, of which tf32 takes all but the last bit:
//   x w = x_lo w_hi + x_hi w_lo + x_hi w_hi      x_lo w_lo is about as small as what fp32 rounds off
// What is infinite, or rounds to infinity in tf32, gives NaN.
// A bf16 is a tf32: w_lo is 0, two products are enough, and a word holds the w of two k. Tensor cores cut off what does
// not fit into a sum, where fp32 rounds it, so that long sums drift: here they sum one step, and the thread its steps.
//
// x is handed from block to block through global memory in the order in which warps load it, 16 bytes a lane:
//   tensor cores  steps of K, each of fragments of 16 rows, each of 4 words for each lane (ptx.cuh)
//   fp32          steps of K, each of 8 k, each of ROWS rows: those of thread_row() 0, 8 apart, then those of 1, ...
// x_place says where an element lies; what lies beyond the matrix in k must be zero there, rows may hold anything.
//
// Per product, a block reads 4 ROWS * 8 bytes of L2 and WEIGHT_STEP * 4 of shared memory for each step that is there,
// and writes and reads 2 * 4 WARPS / 2 * ROWS * COLUMNS bytes of sums.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip"; Ootomo and Yokota, "Recovering Single
// Precision Accuracy from Tensor Cores While Surpassing the FP32 Theoretical Peak Performance".
#include "block.cuh"
#include "ptx.cuh"

#if !defined(PRECISION) || !defined(ROWS) || !defined(COLUMNS) || !defined(K_STEPS) || !defined(REGISTER_STEPS)
#error "the launcher defines PRECISION, ROWS, COLUMNS, K_STEPS and REGISTER_STEPS"
#endif
#if PRECISION == 3 && !defined(BF16)
#error "the launcher defines BF16, whether weights are rounded to it"
#endif
#if PRECISION != 0 && __CUDA_ARCH__ < 800
#error "all but fp32 without parts need the tensor cores of sm_80"
#endif

constexpr int PACK = PRECISION == 2 ? 2 : 1;  // elements per word
constexpr int STEP_K = 8 * PACK;
constexpr int TILES_M = ROWS / 16, TILES_N = ceil_div(COLUMNS, 8);
constexpr int X_STEP = ROWS * 8;  // words of x per step
#if PRECISION == 3 && BF16
constexpr int LANE_WORDS = 1;  // of w per step and 8 columns
#else
constexpr int LANE_WORDS = 2;
#endif
constexpr int WEIGHT_STEP = TILES_N * WARP * LANE_WORDS;  // words of w per step
// Steps of x that a warp loads at a time; fp32 has registers for more than one where there are few sums.
constexpr int X_STEPS = PRECISION != 0 ? 64 / ROWS : ROWS * TILES_N * 8 > 1024 || ROWS == 64 ? 1 : 2;

// Rows of sums are 8 or 24 banks apart, so that the pairs of columns that half a warp stores together do not collide.
constexpr int SUMS_STRIDE = TILES_N * 8 + (TILES_N % 2 == 0 ? 8 : 0);
constexpr int SUMS_OF_WARP = ROWS * SUMS_STRIDE;
constexpr int SUMS = WARPS / 2 * SUMS_OF_WARP;

static_assert(PRECISION >= 0 && PRECISION <= 3, "0 fp32, 1 tf32, 2 bf16, 3 fp32 in parts");
static_assert(ROWS == 16 || ROWS == 32 || ROWS == 64, "rows come in fragments of 16");
static_assert(REGISTER_STEPS <= K_STEPS, "no more steps in registers than there are");
static_assert(PRECISION != 0 || REGISTER_STEPS == 0, "fp32 weights lie in shared memory");

// Where element (row, k) of x lies, counted in elements: floats, or bf16.
__device__ __forceinline__ size_t x_place(int row, int k)
{
    const int word = k % STEP_K / PACK;
    const size_t step = size_t(k / STEP_K) * X_STEP;
#if PRECISION == 0
    return step + word * ROWS + row % 8 * (ROWS / 8) + row / 8;
#else
    const int lane = row % 8 * 4 + word % 4, place = row % 16 / 8 + word / 4 * 2;
    return (step + row / 16 * 128 + lane * 4 + place) * PACK + k % PACK;
#endif
}

// Puts an element of x there, rounded to what its word holds.
__device__ __forceinline__ void store_x(unsigned *x, int row, int k, float value)
{
    const size_t place = x_place(row, k);
#if PRECISION == 1
    x[place] = to_tf32(value);
#elif PRECISION == 2
    reinterpret_cast<unsigned short *>(x)[place] = to_bf16(value);
#else
    x[place] = __float_as_uint(value);
#endif
}

// The sums of one warp over its share of K.
struct ResidentSums {
#if PRECISION == 0
    // A lane owns every 8th row from thread_row() on, and COLUMNS / 4 neighbouring columns.
    static constexpr int LANE_ROWS = ROWS / 8, LANE_COLUMNS = TILES_N * 2;

    float c[LANE_ROWS][LANE_COLUMNS] = {};

    static __device__ __forceinline__ int thread_row() { return lane() % 8; }
    static __device__ __forceinline__ int thread_column() { return lane() / 8 * LANE_COLUMNS; }

    struct X {
        float elements[8][LANE_ROWS];

        __device__ __forceinline__ void load(const unsigned *x)
        {
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const unsigned *from = x + k * ROWS + thread_row() * LANE_ROWS;
                if constexpr (LANE_ROWS % 4 == 0) {
#pragma unroll
                    for (int i = 0; i < LANE_ROWS; i += 4) {
                        const float4 rows = *reinterpret_cast<const float4 *>(from + i);
                        elements[k][i] = rows.x, elements[k][i + 1] = rows.y;
                        elements[k][i + 2] = rows.z, elements[k][i + 3] = rows.w;
                    }
                } else {
                    const float2 rows = *reinterpret_cast<const float2 *>(from);
                    elements[k][0] = rows.x, elements[k][1] = rows.y;
                }
            }
        }

        // From read(row, k), for what is not laid out for this.
        template <class Read>
        __device__ __forceinline__ void load_each(Read read)
        {
#pragma unroll
            for (int k = 0; k < 8; ++k)
#pragma unroll
                for (int i = 0; i < LANE_ROWS; ++i)
                    elements[k][i] = read(thread_row() + 8 * i, k);
        }
    };

    __device__ __forceinline__ void add(const X &x, const unsigned *weights)
    {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            float w[LANE_COLUMNS];
            const float *from = reinterpret_cast<const float *>(weights) + k * TILES_N * 8 + thread_column();
#pragma unroll
            for (int j = 0; j < LANE_COLUMNS; j += LANE_COLUMNS % 4 ? 2 : 4)
                if constexpr (LANE_COLUMNS % 4 == 0) {
                    const float4 columns = *reinterpret_cast<const float4 *>(from + j);
                    w[j] = columns.x, w[j + 1] = columns.y, w[j + 2] = columns.z, w[j + 3] = columns.w;
                } else {
                    const float2 columns = *reinterpret_cast<const float2 *>(from + j);
                    w[j] = columns.x, w[j + 1] = columns.y;
                }
#pragma unroll
            for (int i = 0; i < LANE_ROWS; ++i)
#pragma unroll
                for (int j = 0; j < LANE_COLUMNS; ++j)
                    c[i][j] = fmaf(x.elements[k][i], w[j], c[i][j]);
        }
    }

    // take(row, column, two neighbouring sums)
    template <class Take>
    __device__ __forceinline__ void each(Take take)
    {
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i)
#pragma unroll
            for (int j = 0; j < LANE_COLUMNS; j += 2)
                take(thread_row() + 8 * i, thread_column() + j, c[i][j], c[i][j + 1]);
    }
#else
    float c[TILES_M][TILES_N][4] = {};

    struct X {
        unsigned a[TILES_M][4];

        __device__ __forceinline__ void load(const unsigned *x)
        {
#pragma unroll
            for (int m = 0; m < TILES_M; ++m) {
                const uint4 words = *reinterpret_cast<const uint4 *>(x + m * 128 + lane() * 4);
                a[m][0] = words.x, a[m][1] = words.y, a[m][2] = words.z, a[m][3] = words.w;
            }
        }

        template <class Read>
        __device__ __forceinline__ void load_each(Read read)
        {
#pragma unroll
            for (int m = 0; m < TILES_M; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = m * 16 + lane() / 4 + i % 2 * 8, k = (lane() % 4 + i / 2 * 4) * PACK;
#if PRECISION == 1
                    a[m][i] = to_tf32(read(row, k));
#elif PRECISION == 2
                    a[m][i] = pack_bf16(read(row, k), read(row, k + 1));
#else
                    a[m][i] = __float_as_uint(read(row, k));
#endif
                }
        }
    };

#if PRECISION == 3
    // What the tensor cores take of x.
    struct Operand {
        unsigned hi[TILES_M][4], lo[TILES_M][4];

        __device__ __forceinline__ explicit Operand(const X &x)
        {
#pragma unroll
            for (int m = 0; m < TILES_M; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    split(x.a[m][i], hi[m][i], lo[m][i]);
        }
    };

    // Of lo the tensor core takes the upper 11 bits, and there are 12 at most. NaN may be lost in hi, which is rounded
    // in fewer instructions than by to_tf32, but not in lo.
    static __device__ __forceinline__ void split(unsigned x, unsigned &hi, unsigned &lo)
    {
        hi = (x + 0x1000u) & 0xffffe000u;
        lo = __float_as_uint(__uint_as_float(x) - __uint_as_float(hi));
    }

    __device__ __forceinline__ void add(const Operand &x, int n, const unsigned (&w)[LANE_WORDS])
    {
        float step[TILES_M][4] = {};  // small products first; neighbouring instructions do not wait for each other
        // opaque: of weights in registers, which are the same in every product, the compiler would keep the parts too.
#if BF16
        const unsigned two = opaque(w[0]), w_hi[2] = {two << 16, two & 0xffff0000u};
#else
        unsigned w_hi[2], w_lo[2];
        split(opaque(w[0]), w_hi[0], w_lo[0]);
        split(opaque(w[1]), w_hi[1], w_lo[1]);
#pragma unroll
        for (int m = 0; m < TILES_M; ++m)
            mma_m16n8k8_tf32(step[m], x.hi[m], w_lo);
#endif
#pragma unroll
        for (int m = 0; m < TILES_M; ++m)
            mma_m16n8k8_tf32(step[m], x.lo[m], w_hi);
#pragma unroll
        for (int m = 0; m < TILES_M; ++m)
            mma_m16n8k8_tf32(step[m], x.hi[m], w_hi);
#pragma unroll
        for (int m = 0; m < TILES_M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                c[m][n][i] += step[m][i];
    }
#else
    using Operand = X;

    __device__ __forceinline__ void add(const Operand &x, int n, const unsigned (&w)[LANE_WORDS])
    {
#pragma unroll
        for (int m = 0; m < TILES_M; ++m)
#if PRECISION == 1
            mma_m16n8k8_tf32(c[m][n], x.a[m], w);
#else
            mma_m16n8k16_bf16(c[m][n], x.a[m], w);
#endif
    }
#endif

    __device__ __forceinline__ void add(const X &x, const unsigned *weights)
    {
        const Operand operand(x);
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
            struct alignas(4 * LANE_WORDS) Words {  // read at once
                unsigned w[LANE_WORDS];
            };
            add(operand, n, reinterpret_cast<const Words *>(weights)[n * WARP + lane()].w);
        }
    }

    template <class Take>
    __device__ __forceinline__ void each(Take take)
    {
#pragma unroll
        for (int m = 0; m < TILES_M; ++m)
#pragma unroll
            for (int n = 0; n < TILES_N; ++n)
#pragma unroll
                for (int i = 0; i < 4; i += 2)
                    take(m * 16 + lane() / 4 + i * 4, n * 8 + lane() % 4 * 2, c[m][n][i], c[m][n][i + 1]);
    }
#endif

    // Leaves the sums of all warps in `sums`, SUMS floats of shared memory, for sum_of. A barrier has to stand between
    // the last sum_of and the next call.
    __device__ __forceinline__ void meet(float *sums)
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
            each([=](int row, int column, float &first, float &second) {  // all loads first: none waits for a store
                const float2 sum = mine[(row * SUMS_STRIDE + column) / 2];
                first += sum.x, second += sum.y;
            });
            each(store);
        }
        __syncthreads();
    }
};

// Element (row, column) of c after ResidentSums::meet.
__device__ __forceinline__ float sum_of(const float *sums, int row, int column)
{
    const float *place = sums + row * SUMS_STRIDE + column;
    float sum = place[0];
#pragma unroll
    for (int w = 1; w < WARPS / 2; ++w)
        sum += place[w * SUMS_OF_WARP];
    return sum;
}

#if PRECISION != 0
// Word i of this lane's fragment of columns 8 n to 8 n + 7, from read(k, column); k counts from the step's first. Where
// there is but one word, it has both elements of the fragment, 4 k apart.
template <class Read>
__device__ __forceinline__ unsigned weight_word(int n, int i, Read read)
{
    const int k = (lane() % 4 + i * 4) * PACK, column = n * 8 + lane() / 4;
#if PRECISION == 1
    return to_tf32(read(k, column));
#elif PRECISION == 2
    return pack_bf16(read(k, column), read(k + 1, column));
#elif BF16
    return pack_bf16(read(k, column), read(k + 4, column));
#else
    return __float_as_uint(read(k, column));
#endif
}
#endif

// Fills WEIGHT_STEP words of shared memory with a step of w.
template <class Read>
__device__ __forceinline__ void store_weights(unsigned *weights, Read read)
{
#if PRECISION == 0
    for (int place = lane(); place < WEIGHT_STEP; place += WARP)
        weights[place] = __float_as_uint(read(place / (TILES_N * 8), place % (TILES_N * 8)));
#else
#pragma unroll
    for (int n = 0; n < TILES_N; ++n)
#pragma unroll
        for (int i = 0; i < LANE_WORDS; ++i)
            weights[(n * WARP + lane()) * LANE_WORDS + i] = weight_word(n, i, read);
#endif
}

// A warp's share of w.
struct ResidentWeights {
    unsigned registers[REGISTER_STEPS > 0 ? REGISTER_STEPS : 1][TILES_N][LANE_WORDS];
    unsigned *shared;

    static constexpr int SHARED_STEPS = K_STEPS - REGISTER_STEPS;
    static constexpr int SHARED_WORDS = WARPS * SHARED_STEPS * WEIGHT_STEP;

    // `all` is SHARED_WORDS of shared memory. read(k, column) is 0 outside the matrix; k counts over all warps.
    template <class Read>
    __device__ __forceinline__ void load(unsigned *all, Read read)
    {
        const int first = warp() * K_STEPS;
        shared = all + warp() * SHARED_STEPS * WEIGHT_STEP;
#if PRECISION != 0
#pragma unroll
        for (int s = 0; s < REGISTER_STEPS; ++s)
#pragma unroll
            for (int n = 0; n < TILES_N; ++n)
#pragma unroll
                for (int i = 0; i < LANE_WORDS; ++i)
                    registers[s][n][i] =
                        weight_word(n, i, [=](int k, int column) { return read((first + s) * STEP_K + k, column); });
#endif
        for (int s = 0; s < SHARED_STEPS; ++s) {
            const int k0 = (first + REGISTER_STEPS + s) * STEP_K;
            store_weights(shared + s * WEIGHT_STEP, [=](int k, int column) { return read(k0 + k, column); });
        }
        __syncwarp();  // lanes read what others stored
    }

    // Adds this warp's share of x w, or the first `steps` of it. Where that is no constant, the code of a step stays
    // apart from that of others: of fp32 in parts, the compiler would begin more at once than it has registers for.
    __device__ __forceinline__ void multiply(ResidentSums &sums, const unsigned *x_all, int steps = K_STEPS) const
    {
        constexpr int WITH_REGISTERS = ceil_div(REGISTER_STEPS, X_STEPS) * X_STEPS;
        const unsigned *x = x_all + size_t(warp()) * K_STEPS * X_STEP;
        ResidentSums::X next[X_STEPS];
        load_x(next, x, 0);
#pragma unroll
        for (int step = 0; step < WITH_REGISTERS; step += X_STEPS)
            add_steps<true>(sums, next, x, step, steps);
#pragma unroll 1
        for (int step = WITH_REGISTERS; step < K_STEPS; step += X_STEPS)
            add_steps<false>(sums, next, x, step, steps);
    }

    static __device__ __forceinline__ void load_x(ResidentSums::X (&next)[X_STEPS], const unsigned *x, int step)
    {
#pragma unroll
        for (int i = 0; i < X_STEPS; ++i)
            if (step + i < K_STEPS)
                next[i].load(x + (step + i) * X_STEP);
    }

    // Adds X_STEPS steps, whose x is in `next`, while the x of those after them is on its way there. Where weights of
    // some may be in registers, `step` has to be a constant after unrolling, or all registers would go to local memory.
    template <bool IN_REGISTERS>
    __device__ __forceinline__ void add_steps(ResidentSums &sums, ResidentSums::X (&next)[X_STEPS], const unsigned *x,
                                              int step, int steps) const
    {
        ResidentSums::X now[X_STEPS];
#pragma unroll
        for (int i = 0; i < X_STEPS; ++i)
            now[i] = next[i];
        load_x(next, x, step + X_STEPS);
#pragma unroll
        for (int i = 0; i < X_STEPS; ++i) {
            if (step + i >= steps)
                return;
#if PRECISION != 0
            if (IN_REGISTERS && step + i < REGISTER_STEPS) {
                const ResidentSums::Operand operand(now[i]);
#pragma unroll
                for (int n = 0; n < TILES_N; ++n)
                    sums.add(operand, n, registers[step + i][n]);
                continue;
            }
#endif
            sums.add(now[i], shared + (step + i - REGISTER_STEPS) * WEIGHT_STEP);
        }
    }
};
