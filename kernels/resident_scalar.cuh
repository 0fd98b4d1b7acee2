// The half of resident.cuh for fp32: products by FFMA. Weights all lie in shared memory.
#include "precision.cuh"

#if PRECISION == 0
static_assert(REGISTER_STEPS == 0, "fp32 weights lie in shared memory");

constexpr int WEIGHT_STEP = 8 * TILES_N * 8;                                // a step of w: 8 k of all columns
constexpr int X_STEPS = ROWS * TILES_N * 8 > 1024 || ROWS == 64 ? 1 : 2;  // two where few sums leave registers for them

// Each of the 8 k of a step has ROWS rows: first the rows of thread_row() 0, which are 8 apart, then those of 1, ...
__device__ __forceinline__ int word_in_step(int row, int word) { return word * ROWS + row % 8 * (ROWS / 8) + row / 8; }

// A lane owns every 8th row from thread_row() on, and COLUMNS / 4 neighbouring columns from thread_column() on.
struct WarpSums {
    static constexpr int LANE_ROWS = ROWS / 8, LANE_COLUMNS = TILES_N * 2;

    float c[LANE_ROWS][LANE_COLUMNS] = {};

    static __device__ __forceinline__ int thread_row() { return lane() % 8; }
    static __device__ __forceinline__ int thread_column() { return lane() / 8 * LANE_COLUMNS; }

    // A step of x: the rows of this lane.
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

    template <class Take>
    __device__ __forceinline__ void each(Take take)
    {
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i)
#pragma unroll
            for (int j = 0; j < LANE_COLUMNS; j += 2)
                take(thread_row() + 8 * i, thread_column() + j, c[i][j], c[i][j + 1]);
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

    __device__ __forceinline__ void add_to(WarpSums &, const WarpSums::X &) const {}
};
#endif
