// Generation of one text by a model of one layer, all steps of a call in one cooperative launch, W_hh and W_out in
// registers. Formulas, and the arguments that it shares with the stepwise variant: generate.cu.
//
// Why not the plain way, generate.cu: there a character takes three launches of about 2 us. Here it takes two exchanges
// among the blocks, of about 0.6 us each, and what a block does between them. generate_persistent.cu, for several rows
// and layers, reads weights and states from shared memory, and adds up partial logits of all blocks.
//
// Blocks hand each other words with tags (words.cuh), numbered: before step t, exchange t of the launch.
// states (2, width) words: the states before a step; width is H rounded up to a multiple of 2. logits (2, V rounded up
// to a multiple of 2) words: those of the character before a step, from step 1 on, where it is drawn; nobody writes
// those from V on. beginning (2, 2) words, of which the first of two is used: the character before step 0. counters (1,
// COUNTER_WORDS).
//
// A block owns UNITS units (their gates, P and states) and OUTPUTS logits. All its threads share the sums over k, each
// with the weights of PAIRS pairs of k in registers: pair i begins with k = 2 (thread + 256 i). What follows the sums
// is for the first warp. Every block draws the character, from the same numbers, so to the same bits.
//
// A step, and what a block waits for:
//   states before the step | W_out h, publishes its logits, W_hh h | all logits | draws, gates, publishes its states
// That makes two barriers of a block, or one where the character is forced, which needs no logits.
// Whoever writes exchange t + 2 of states or logits, in step t + 1 or later, has all states before step t + 1. The
// blocks wrote these in step t, after they had read all that is before step t.
// Bytes per step: reads through L2, 8 H + 8 V per block. Bytes per launch: reads W_hh, W_out and P once.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".

#include "generate.cuh"
#include "generate_logits.cuh"
#include "gru.cuh"

#if !defined(UNITS) || !defined(OUTPUTS) || !defined(PAIRS)
#error "the launcher defines UNITS and OUTPUTS, units and logits of a block, and PAIRS, of k of a thread"
#endif

constexpr int GATES = 3 * UNITS;
static_assert(UNITS <= WARP && OUTPUTS <= WARP, "a lane of the first warp finishes each of them");

// The weights of `COUNT` rows of a matrix with which a thread multiplies its k.
template <int COUNT>
struct Rows {
    float weights[COUNT][PAIRS][2];

    // weight(row, k) may be called for any k.
    template <class Weight>
    __device__ __forceinline__ void load(Weight weight)
    {
#pragma unroll
        for (int row = 0; row < COUNT; ++row)
#pragma unroll
            for (int i = 0; i < 2 * PAIRS; ++i)
                weights[row][i / 2][i % 2] = weight(row, 2 * (int(threadIdx.x) + i / 2 * THREADS) + i % 2);
    }

    // The sums (COUNT,) of this warp's products with x, to shared memory.
    __device__ __forceinline__ void multiply(float *warp_sums, const float (&x)[PAIRS][2]) const
    {
        float sums[COUNT] = {};
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; ++i)
#pragma unroll
            for (int row = 0; row < COUNT; ++row)
                sums[row] = fmaf(weights[row][i / 2][i % 2], x[i / 2][i % 2], sums[row]);
        int first = 0, end = COUNT;
        scatter_sums<COUNT, WARP / 2>(sums, first, end);
#pragma unroll
        for (int i = 0; i < values_per_lane(COUNT); ++i)
            if (first + i < end)
                warp_sums[first + i] = sums[i];
    }
};

// Sum `row` of all warps, whose sums are (WARPS, COUNT).
template <int COUNT>
__device__ __forceinline__ float sum_of_warps(const float *warp_sums, int row)
{
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w)
        sum += warp_sums[w * COUNT + row];
    return sum;
}

// The character before step t, from the words of the logits, in all lanes of a warp. `row` has room for two more logits
// than V.
__device__ __forceinline__ int draw(float *row, const Word *logits, unsigned tag, float uniform, int V, Options options)
{
    constexpr int AT_ONCE = 2;  // pairs that a lane has on their way
    for (int first = 0; first < V; first += AT_ONCE * 2 * WARP) {
        Word words[AT_ONCE][2];
        const Word *from[AT_ONCE];
        int needed[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int v = first + 2 * (lane() + i * WARP);
            from[i] = logits + (v < V ? v : 0);
            needed[i] = max(0, min(V - v, 2));
        }
        load_words(words, from, needed, tag);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (needed[i] > 0) {
                const int v = first + 2 * (lane() + i * WARP);
                row[v] = value_of(words[i][0]);
                row[v + 1] = value_of(words[i][1]);
            }
    }
    __syncwarp();  // all lanes see all logits
    const int id = draw_character<1>(row, uniform, V, options);
    __syncwarp();  // all lanes have done with the logits
    return id;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
generate_one_text(float *h, int *ids, int *ids_tr, Word *states, Word *logits, Word *beginning, unsigned *counters,
                  const float *__restrict__ P, const float *__restrict__ W_hh, const float *__restrict__ b_hh,
                  const float *__restrict__ W_out, const float *__restrict__ b_out, const int *__restrict__ forced_tr,
                  const float *__restrict__ uniforms_tr, int T, int V, int H, float temperature, int top_k, float top_p,
                  float min_p)
{
    extern __shared__ float shared[];
    float *gate_sums = shared;                           // (2, WARPS, GATES), in turns
    float *logit_sums = gate_sums + 2 * WARPS * GATES;   // (WARPS, OUTPUTS)
    float *own_P = logit_sums + WARPS * OUTPUTS;         // (V, 3, UNITS)
    float *row = own_P + V * GATES;                      // the logits (V,), and padding

    const unsigned number = first_number(counters, 0);  // of the exchange before step 0
    const int width = round_up(H, 2), first_v = blockIdx.x * OUTPUTS;
    const auto tag = [&](int t) { return number + t + 1; };
    const auto states_of = [&](int t) { return states + (number + t) % 2 * width; };
    const auto logits_of = [&](int t) { return logits + (number + t) % 2 * round_up(V, 2); };

    Rows<GATES> own_W_hh;
    own_W_hh.load([&](int gate, int k) {
        const int j = blockIdx.x * UNITS + gate / 3;
        return j < H && k < H ? rounded(W_hh[(size_t(gate % 3) * H + j) * H + k]) : 0.0f;
    });
    Rows<OUTPUTS> own_W_out;
    own_W_out.load([&](int output, int k) {
        const int v = first_v + output;
        return v < V && k < H ? rounded(W_out[size_t(v) * H + k]) : 0.0f;
    });
    for (int e = threadIdx.x; e < V * GATES; e += THREADS) {
        const int j = blockIdx.x * UNITS + e % UNITS;
        own_P[e] = j < H ? P[size_t(e / UNITS) * H + j] : 0.0f;
    }
    __syncthreads();

    // Of the first warp, lane u owns unit u and output u.
    const int u = threadIdx.x, j = blockIdx.x * UNITS + u;
    const bool has_unit = u < UNITS && j < width, has_output = u < OUTPUTS && first_v + u < V;
    float b[3] = {}, state = 0.0f;
    if (has_unit && j < H) {
        for (int g = 0; g < 3; ++g)
            b[g] = b_hh[g * H + j];
        state = h[j];
    }
    const float b_of_output = has_output ? b_out[first_v + u] : 0.0f;
    if (has_unit)
        store_word(states_of(0) + j, word_with(state, tag(0)));
    if (blockIdx.x == 0 && u == 0)
        store_word(beginning + number % 2 * 2, word_of(ids[0], tag(0)));

#pragma unroll 1
    for (int t = 0; t <= T; ++t) {
        int id = t > 0 ? forced_tr[t - 1] : 0;
        const float uniform = t > 0 ? uniforms_tr[t - 1] : 0.0f;
        const bool draws = id < 0;

        Word words[PAIRS][2];
        const Word *from[PAIRS];
        int needed[PAIRS];
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            const int k = 2 * (threadIdx.x + i * THREADS);
            from[i] = states_of(t) + (k < width ? k : 0);
            needed[i] = k < width ? 2 : 0;
        }
        load_words(words, from, needed, tag(t));
        float x[PAIRS][2];
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; ++i)
            x[i / 2][i % 2] = value_of(words[i / 2][i % 2]);

        if (draws) {
            own_W_out.multiply(logit_sums + warp() * OUTPUTS, x);
            __syncthreads();
            if (has_output)
                store_word(logits_of(t) + first_v + u,
                           word_with(b_of_output + sum_of_warps<OUTPUTS>(logit_sums, u), tag(t)));
        }
        // The first warp may still be reading the sums of the step before.
        float *sums = gate_sums + t % 2 * (WARPS * GATES);
        own_W_hh.multiply(sums + warp() * GATES, x);
        __syncthreads();
        if (warp() > 0)
            continue;

        if (t == 0) {
            const Word *const where[1] = {beginning + number % 2 * 2};
            const int one[1] = {1};
            Word first[1][2];
            load_words(first, where, one, tag(0));
            id = lower_half(first[0][0]);
        }
        if (draws)
            id = draw(row, logits_of(t), tag(t), uniform, V, {temperature, top_k, top_p, min_p});
        if (blockIdx.x == 0 && u == 0 && t > 0) {
            ids_tr[t - 1] = id;
            if (t == T)
                ids[0] = id;
        }
        if (has_unit && t < T) {
            float i_u[3], a_u[3];
#pragma unroll
            for (int g = 0; g < 3; ++g) {
                i_u[g] = own_P[(id * 3 + g) * UNITS + u];
                a_u[g] = sum_of_warps<GATES>(sums, 3 * u + g) + b[g];
            }
            state = gru_cell(i_u, a_u, state).h;
            store_word(states_of(t + 1) + j, word_with(state, tag(t + 1)));
        }
    }
    if (has_unit && j < H)
        h[j] = state;
    if (threadIdx.x == 0)
        leave_group(counters, 0, gridDim.x, T + 1);
}
