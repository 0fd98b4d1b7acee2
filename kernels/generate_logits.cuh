// What the blocks of a group hand each other to draw characters, in words with tags (words.cuh) that hold one float32
// or one id each: partial_logits, the sums of the logits over the units of a block, which the block that draws a row's
// next character adds up; and the character.
// publish_partial_logits, sum_partial_logits and read_characters are for all threads of a block.
#include "block.cuh"
#include "words.cuh"

__device__ constexpr int round_up(int n, int multiple) { return ceil_div(n, multiple) * multiple; }

__device__ __forceinline__ Word word_with(float value, unsigned tag) { return word_of(__float_as_uint(value), tag); }
__device__ __forceinline__ float value_of(Word word) { return __uint_as_float(lower_half(word)); }

// Loads COUNT pairs of words, until the first needed[i] (0 to 2) words of each pair i show the tag; the others become
// 0. For whole warps. from[i] points to a pair, 16-byte aligned; from[0] does even where none of its words is needed:
// in a loop that waits, every lane reads, by which tests/host_ptx knows such loops.
template <int COUNT>
__device__ __forceinline__ void load_words(Word (&words)[COUNT][2], const Word *const (&from)[COUNT],
                                           const int (&needed)[COUNT], unsigned tag)
{
    const Word *missing;
#pragma unroll
    for (int i = 0; i < 2 * COUNT; ++i)
        words[i / 2][i % 2] = 0;
    do {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (i == 0 || needed[i] > 0)
                load_two_words(words[i], from[i]);
        missing = nullptr;
#pragma unroll
        for (int i = 0; i < 2 * COUNT; ++i)
            if (i % 2 < needed[i / 2] && upper_half(words[i / 2][i % 2]) != tag)
                missing = from[i / 2] + i % 2;
    } while (any_missing(missing, missing ? missing : from[0], tag, 0xffffffffu));
#pragma unroll
    for (int i = 0; i < 2 * COUNT; ++i)
        if (i % 2 >= needed[i / 2])
            words[i / 2][i % 2] = 0;
}

// The characters (rows,) that other blocks draw, and that are negative in `ids`, in shared memory: as soon as
// characters (rows, 2), of which the first word of a row is used, show the tag. All threads see `ids` when this
// returns.
__device__ __forceinline__ void read_characters(int *ids, const Word *characters, unsigned tag, int rows)
{
    for (int first = warp() * WARP; first < rows; first += THREADS) {
        const int row = min(first + lane(), rows - 1);
        Word character[1][2];
        const Word *const from[1] = {characters + 2 * row};
        const int needed[1] = {first + lane() < rows && ids[row] < 0};
        load_words(character, from, needed, tag);
        if (needed[0])
            ids[row] = lower_half(character[0][0]);
    }
    __syncthreads();
}

// partial_logits (rows, V) words, `stride` from row to row, of a block whose units have W_out (units, V) and states
// (units, padded_rows), both in shared memory. A thread sums one v of TILE rows.
template <int TILE>
__device__ __forceinline__ void publish_partial_logits(Word *partial_logits, int stride, unsigned tag,
                                                       const float *W_out, const float *states, int rows,
                                                       int padded_rows, int V, int units)
{
    for (int e = threadIdx.x; e < V * (padded_rows / TILE); e += THREADS) {
        const int v = e % V, row = e / V * TILE;
        float sums[TILE] = {};
        for (int u = 0; u < units; ++u) {
            const float weight = W_out[u * V + v];
            const void *aligned = __builtin_assume_aligned(states + u * padded_rows + row, 4 * (TILE < 4 ? TILE : 4));
            const float *state = static_cast<const float *>(aligned);
#pragma unroll
            for (int r = 0; r < TILE; ++r)
                sums[r] = fmaf(weight, state[r], sums[r]);
        }
#pragma unroll
        for (int r = 0; r < TILE; ++r)
            if (row + r < rows)
                store_word(partial_logits + (row + r) * stride + v, word_with(sums[r], tag));
    }
}

// How many threads share the sum over the blocks for four logits.
__device__ constexpr int logits_shares(int V) { return V > 4 * THREADS ? 1 : THREADS / ceil_div(V, 4); }

// The logits (V,) of one row: b_out plus its partial_logits of all blocks, words `stride` apart from block to block, as
// soon as these show the tag. `logits` is shared memory with room for logits_shares(V) rows of round_up(V, 4).
__device__ __forceinline__ void sum_partial_logits(float *logits, const Word *partial_logits, size_t stride,
                                                   unsigned tag, int blocks, const float *__restrict__ b_out, int V)
{
    constexpr int AT_ONCE = 4;  // of four logits of a block, which a thread has on their way
    const int quads = ceil_div(V, 4), shares = logits_shares(V);
    for (int first = 0; first < quads * shares; first += THREADS) {
        const int e = first + threadIdx.x, v = 4 * (e % quads);
        float4 sum = make_float4(0, 0, 0, 0);
        for (int i = 0; i < blocks; i += AT_ONCE * shares) {
            Word words[2 * AT_ONCE][2];
            const Word *from[2 * AT_ONCE];
            int needed[2 * AT_ONCE];
#pragma unroll
            for (int n = 0; n < 2 * AT_ONCE; ++n) {
                const int block = i + n / 2 * shares + e / quads, v_n = v + n % 2 * 2;
                const bool inside = e < quads * shares && block < blocks;
                from[n] = partial_logits + (inside ? block * stride + v_n : 0);
                needed[n] = inside ? min(V - v_n, 2) : 0;
            }
            load_words(words, from, needed, tag);
#pragma unroll
            for (int n = 0; n < 2 * AT_ONCE; n += 2) {
                sum.x += value_of(words[n][0]), sum.y += value_of(words[n][1]);
                sum.z += value_of(words[n + 1][0]), sum.w += value_of(words[n + 1][1]);
            }
        }
        if (e < quads * shares)
            *reinterpret_cast<float4 *>(logits + 4 * e) = sum;
    }
    __syncthreads();
#pragma unroll 1  // a thread has few logits
    for (int v = threadIdx.x; v < V; v += THREADS) {
        float sum = b_out[v];
#pragma unroll 1  // shares are few where characters are many
        for (int share = 0; share < shares; ++share)
            sum += logits[share * 4 * quads + v];
        logits[v] = sum;  // no other thread reads logits[v] before the barrier
    }
    __syncthreads();
}
