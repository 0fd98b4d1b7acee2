// The half of resident.cuh for tensor cores: tf32, bf16 and 3xTF32, in fragments of 16 rows and of 8 columns (ptx.cuh).
#include "precision.cuh"

#if PRECISION != 0
constexpr int TILES_M = ROWS / 16;
constexpr int WEIGHT_STEP = TILES_N * WARP * LANE_WORDS;  // a step of w: LANE_WORDS of each lane for each 8 columns

#if PRECISION == 3
// A group of x, which is one step: fragments of 16 rows, each of 4 neighbouring words of each lane.
__device__ __forceinline__ int place_in_group(int row, int packet)
{
    const int lane_of_word = row % 8 * 4 + packet % 4, word_of_lane = row % 16 / 8 + packet / 4 * 2;
    return row / 16 * 128 + lane_of_word * 4 + word_of_lane;
}

__device__ __forceinline__ Slot slot_of(int, int k) { return {k, 0}; }
#else
constexpr int ROW_WORDS = GROUP_PACKETS / 4;  // of a group and a row, that a lane loads: 2, or 4 in bf16

// A group of x: for each fragment of 16 rows, for its rows g and then its rows g + 8, pairs of words of each lane; a
// lane has the ROW_WORDS words from ROW_WORDS q on of a row.
__device__ __forceinline__ int place_in_group(int row, int packet)
{
    const int lane_of_word = row % 8 * 4 + packet / ROW_WORDS;
    const int pair = row / 8 * (ROW_WORDS / 2) + packet % ROW_WORDS / 2;
    return (pair * WARP + lane_of_word) * 2 + packet % 2;
}

// Of the words of a lane q, a step takes in tf32 value `step` of both; in bf16 values 0 and 1 of two of them, or, in
// the last step, value 2 of all four. A step's element k belongs to lane k / PACK % 4.
__device__ __forceinline__ Slot slot_of(int step, int k)
{
    const int first = k / PACK % 4 * ROW_WORDS, half = k / PACK / 4;
    if (PACK == 1)
        return {first + half, step};
    return step < 2 ? Slot{first + step * 2 + half, k % 2} : Slot{first + half * 2 + k % 2, 2};
}
#endif

struct WarpSums {
    static constexpr int NEIGHBOURS = 2;

    float c[TILES_N][TILES_M][4] = {};

    // A step of x: the operands of this lane.
    struct Step {
        unsigned a[TILES_M][4];

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

#if PRECISION == 3
    // A group of x: the words of this lane.
    struct X {
        Step only;

        __device__ __forceinline__ void load(const XWord *x)
        {
#pragma unroll
            for (int m = 0; m < TILES_M; ++m) {
                const uint4 words = *reinterpret_cast<const uint4 *>(x + m * 128 + lane() * 4);
                only.a[m][0] = words.x, only.a[m][1] = words.y, only.a[m][2] = words.z, only.a[m][3] = words.w;
            }
        }

        template <int>
        __device__ __forceinline__ Step step() const
        {
            return only;
        }
    };
#else
    // A group of x: the words of this lane, of 16 rows from row 16 m on those of rows g + 8 r.
    struct X {
        unsigned lower[TILES_M][2][ROW_WORDS], upper[TILES_M][2][ROW_WORDS];

        static __device__ __forceinline__ int place() { return lane() * 2; }  // of the first of them in the group

        __device__ __forceinline__ void load(const Word *x)
        {
#pragma unroll
            for (int m = 0; m < TILES_M; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r)
#pragma unroll
                    for (int i = 0; i < ROW_WORDS; i += 2) {
                        Word words[2];
                        load_two_words(words, x + ((m * 2 + r) * ROW_WORDS / 2 + i / 2) * WARP * 2 + place());
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            lower[m][r][i + j] = lower_half(words[j]);
                            upper[m][r][i + j] = upper_half(words[j]);
                        }
                    }
        }

        __device__ __forceinline__ bool missing(unsigned tag, int packets) const
        {
            unsigned wrong = 0;
#pragma unroll
            for (int i = 0; i < ROW_WORDS; ++i) {
                const unsigned expected = lane() % 4 * ROW_WORDS + i < packets ? tag : 0;
#pragma unroll
                for (int m = 0; m < TILES_M; ++m)
#pragma unroll
                    for (int r = 0; r < 2; ++r)
                        wrong |= upper[m][r][i] ^ expected;
            }
            return wrong & TAG_MASK;
        }

        template <int STEP>
        __device__ __forceinline__ Step step() const
        {
            Step result;
#pragma unroll
            for (int m = 0; m < TILES_M; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        result.a[m][r + 2 * i] = operand<STEP>(lower[m][r], upper[m][r], i);
            return result;
        }

        // Operand i of a row in a step, as slot_of says.
        template <int STEP>
        static __device__ __forceinline__ unsigned operand(const unsigned (&lower)[ROW_WORDS],
                                                           const unsigned (&upper)[ROW_WORDS], int i)
        {
#if PRECISION == 1
            return value<STEP>(lower[i], upper[i]);
#else
            return STEP < 2 ? lower[STEP % 2 * 2 + i] : __byte_perm(upper[2 * i], upper[2 * i + 1], 0x5410);
#endif
        }
    };
#endif

    __device__ __forceinline__ void add(const Step &x, const unsigned *weights)
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
                for (int i = 0; i < 4; i += NEIGHBOURS)
                    take(m * 16 + lane() / 4 + i * 4, n * 8 + lane() % 4 * 2, c[n][m] + i);
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

    __device__ __forceinline__ void add_to(WarpSums &sums, const WarpSums::Step &x) const
    {
        const XFragments<TILES_M> fragments(x.a);
#pragma unroll
        for (int n = 0; n < TILES_N; ++n)
            multiply_add(sums.c[n], fragments, words[n]);
    }
};
#endif
