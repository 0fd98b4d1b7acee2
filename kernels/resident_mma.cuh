// The half of resident.cuh for tensor cores: tf32, bf16 and 3xTF32, in fragments of 16 rows and of 8 columns (ptx.cuh).
#include "precision.cuh"

#if PRECISION != 0
constexpr int TILES_M = ROWS / 16;
constexpr int WEIGHT_STEP = TILES_N * WARP * LANE_WORDS;  // a step of w: LANE_WORDS of each lane for each 8 columns
constexpr int X_STEPS = 64 / ROWS;

// A step of x: fragments of 16 rows, each of 4 neighbouring words of each lane.
__device__ __forceinline__ int word_in_step(int row, int word)
{
    const int lane_of_word = row % 8 * 4 + word % 4, word_of_lane = row % 16 / 8 + word / 4 * 2;
    return row / 16 * 128 + lane_of_word * 4 + word_of_lane;
}

struct WarpSums {
    float c[TILES_N][TILES_M][4] = {};

    // A step of x: the words of this lane.
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
                    const int row = m * 16 + lane() / 4 + i % 2 * 8;
                    a[m][i] = to_word((lane() % 4 + i / 2 * 4) * PACK, [=](int k) { return read(row, k); });
                }
        }
    };

    __device__ __forceinline__ void add(const X &x, const unsigned *weights)
    {
        const XFragments<TILES_M> fragments(x.a);
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
            struct alignas(4 * LANE_WORDS) Words {  // read at once
                unsigned w[LANE_WORDS];
            };
            multiply_add(c[n], fragments, reinterpret_cast<const Words *>(weights)[n * WARP + lane()].w);
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
                    take(m * 16 + lane() / 4 + i * 4, n * 8 + lane() % 4 * 2, c[n][m][i], c[n][m][i + 1]);
    }
};

// Word i of this lane for columns 8 n to 8 n + 7.
template <class Read>
__device__ __forceinline__ unsigned weight_word(int n, int i, Read read)
{
    return lane_word(i, [=](int k) { return read(k, n * 8 + lane() / 4); });
}

template <class Read>
__device__ __forceinline__ void store_weights(unsigned *weights, Read read)
{
#pragma unroll
    for (int n = 0; n < TILES_N; ++n)
#pragma unroll
        for (int i = 0; i < LANE_WORDS; ++i)
            weights[(n * WARP + lane()) * LANE_WORDS + i] = weight_word(n, i, read);
}

// A step of w in registers.
struct RegisterWeights {
    unsigned words[TILES_N][LANE_WORDS];

    template <class Read>
    __device__ __forceinline__ void load(Read read)
    {
#pragma unroll
        for (int n = 0; n < TILES_N; ++n)
#pragma unroll
            for (int i = 0; i < LANE_WORDS; ++i)
                words[n][i] = weight_word(n, i, read);
    }

    __device__ __forceinline__ void add_to(WarpSums &sums, const WarpSums::X &x) const
    {
        const XFragments<TILES_M> fragments(x.a);
#pragma unroll
        for (int n = 0; n < TILES_N; ++n)
            multiply_add(sums.c[n], fragments, words[n]);
    }
};
#endif
