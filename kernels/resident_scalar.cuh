// The half of resident.cuh for fp32: products by FFMA. Weights all lie in shared memory.
#include "precision.cuh"

#if PRECISION == 0
static_assert(REGISTER_STEPS == 0, "fp32 weights lie in shared memory");

constexpr int WEIGHT_STEP = STEP_K * TILES_N * 8;  // a step of w: STEP_K rows of all columns

// Each of the packets of a row has ROWS rows: first the rows of thread_row() 0, which are 8 apart, then those of 1, ...
__device__ __forceinline__ int place_in_group(int row, int packet)
{
    return (packet * ROWS + row % 8 * (ROWS / 8) + row / 8) * PACKET_WORDS;
}

__device__ __forceinline__ Slot slot_of(int, int k) { return {k / VALUES, k % VALUES}; }

// A lane owns every 8th row from thread_row() on, and COLUMNS / 4 neighbouring columns from thread_column() on.
struct WarpSums {
    static constexpr int LANE_ROWS = ROWS / 8, LANE_COLUMNS = TILES_N * 2;
    static constexpr int NEIGHBOURS = LANE_COLUMNS % 4 ? 2 : 4;

    float c[LANE_ROWS][LANE_COLUMNS] = {};

    static __device__ __forceinline__ int thread_row() { return lane() % 8; }
    static __device__ __forceinline__ int thread_column() { return lane() / 8 * LANE_COLUMNS; }

    // A step of x: the rows of this lane.
    struct Step {
        float elements[STEP_K][LANE_ROWS];

        template <class Read>
        __device__ __forceinline__ void load_each(Read read)
        {
#pragma unroll
            for (int k = 0; k < STEP_K; ++k)
#pragma unroll
                for (int i = 0; i < LANE_ROWS; ++i)
                    elements[k][i] = read(thread_row() + 8 * i, k);
        }
    };

    // A group of x, which is one step: the rows of this lane, both words of each packet.
    struct X {
        unsigned lower[GROUP_PACKETS][LANE_ROWS][2], upper[GROUP_PACKETS][LANE_ROWS][2];

        static __device__ __forceinline__ int place() { return thread_row() * LANE_ROWS * PACKET_WORDS; }

        __device__ __forceinline__ void load(const Word *x)
        {
#pragma unroll
            for (int p = 0; p < GROUP_PACKETS; ++p)
#pragma unroll
                for (int i = 0; i < LANE_ROWS; ++i) {
                    Word words[2];
                    load_two_words(words, x + place() + (p * ROWS + i) * PACKET_WORDS);
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        lower[p][i][j] = lower_half(words[j]);
                        upper[p][i][j] = upper_half(words[j]);
                    }
                }
        }

        __device__ __forceinline__ bool missing(unsigned tag, int packets) const
        {
            unsigned wrong = 0;
#pragma unroll
            for (int p = 0; p < GROUP_PACKETS; ++p) {
                const unsigned expected = p < packets ? tag : 0;
#pragma unroll
                for (int i = 0; i < LANE_ROWS; ++i)
                    wrong |= (upper[p][i][0] ^ expected) | (upper[p][i][1] ^ expected);
            }
            return wrong & TAG_MASK;
        }

        template <int>
        __device__ __forceinline__ Step step() const
        {
            Step result;
#pragma unroll
            for (int p = 0; p < GROUP_PACKETS; ++p)
#pragma unroll
                for (int i = 0; i < LANE_ROWS; ++i) {
                    result.elements[VALUES * p][i] = __uint_as_float(lower[p][i][0]);
                    result.elements[VALUES * p + 1][i] = __uint_as_float(lower[p][i][1]);
                    if constexpr (VALUES == 3)
                        result.elements[VALUES * p + 2][i] = __uint_as_float(value_2(upper[p][i][0], upper[p][i][1]));
                }
            return result;
        }
    };

    __device__ __forceinline__ void add(const Step &x, const unsigned *weights)
    {
#pragma unroll
        for (int k = 0; k < STEP_K; ++k) {
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

    template <class Take>
    __device__ __forceinline__ void each(Take take)
    {
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i)
#pragma unroll
            for (int j = 0; j < LANE_COLUMNS; j += NEIGHBOURS)
                take(thread_row() + 8 * i, thread_column() + j, c[i] + j);
    }
};

// Rows of 8 TILES_N columns, one row for each k.
template <class Read>
__device__ __forceinline__ void store_weights(unsigned *weights, Read read)
{
    for (int word = lane(); word < WEIGHT_STEP; word += WARP)
        weights[word] = __float_as_uint(read(word / (TILES_N * 8), word % (TILES_N * 8)));
}

// A step of w in registers: none in fp32.
struct RegisterWeights {
    template <class Read>
    __device__ __forceinline__ void load(Read)
    {
    }

    __device__ __forceinline__ void add_to(WarpSums &, const WarpSums::Step &) const {}
};
#endif
