// Generation for many rows of text and one layer: all steps of a call in one cooperative launch, its products on tensor
// cores, as exact as fp32. Formulas, and the arguments that it shares with the stepwise variant: generate.cu.
//
// exchange (2, groups, row tiles, WARPS K_STEPS, X_STEP) words, zero where k >= H: the states before a step and after
// it, in turns. partial_logits (blocks, group_rows, 4 ceil(V / 4)) float32: what the units of each block add to the
// logits. counters (groups, COUNTER_WORDS) uint32, zero before and after.
//
// Groups never wait for each other: group g owns group_rows rows of text, in tiles of ROWS. A block owns UNITS units
// for all rows of its group: on chip, their rows of W_hh (resident.cuh), their columns of P and W_out, their states.
// The blocks of a group take its rows in turns for drawing.
//
// A step, and what happens while others are waited for:
//   product    W_hh h, tile by tile, with the states that the barrier before the drawing handed over
//   gates      wait for the characters | gates, publish the states and this block's part of the logits | arrive
//   drawing    wait | the owner of a row sums the parts, draws and publishes the character | arrive
// That makes two barriers per character, of which the product hides the one behind the drawing.
//
// Bytes per step and block: 32 ROWS WARPS K_STEPS of states through L2 for each tile (4 H for each row), 4 group_rows V
// of partial logits written; a drawing reads 4 blocks V of them. Multiply-adds of tf32: three (bf16: two) ROWS COLUMNS
// H for each tile. At 64 rows, V 66, H 1024 on an H100: 2 groups of 64 blocks, which gather 128 KiB a block and step.
//
// Variants: fp32 and bf16 weights (BF16); generate_persistent.cu for few rows, several layers, and GPUs without tensor
// cores; generate.cu for any sizes. generation_plan chooses.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".
#include "barrier.cuh"
#include "generate.cuh"
#include "generate_logits.cuh"
#include "resident.cuh"

static_assert(PRECISION == 3, "the result is to be as exact as fp32");
static_assert(COLUMNS % 3 == 0, "a block owns the three gates of its units");
constexpr int UNITS = COLUMNS / 3;
constexpr int LOGIT_ROWS = 8;  // of which a thread sums one logit

// The next character of a row: the forced one, or the one drawn, its logits the sum of what the blocks published. Not
// inlined: what it could compute once for all steps would take the registers of the product.
__device__ __noinline__ int next_character(float *logits, const float *parts, size_t stride, int blocks,
                                           const float *b_out, int V, int forced, float uniform, Options options)
{
    // For a forced character too: to know it first would be one more latency in a row.
    sum_logits(logits, parts, stride, blocks, b_out, V);
    return forced >= 0 ? forced : draw(logits, uniform, V, options);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
write_text(float *h, int *ids, int *ids_tr, unsigned *exchange, float *partial_logits, unsigned *counters,
           const float *__restrict__ P, const float *__restrict__ W_hh, const float *__restrict__ b_hh,
           const float *__restrict__ W_out, const float *__restrict__ b_out, const int *__restrict__ forced_tr,
           const float *__restrict__ uniforms_tr, int T, int R, int V, int H, int group_rows, float temperature,
           int top_k, float top_p, float min_p)
{
    const int blocks = ceil_div(H, UNITS), groups = gridDim.x / blocks;
    const int group = blockIdx.x / blocks, block = blockIdx.x % blocks, j0 = block * UNITS;
    const int first_row = group * group_rows, rows = min(group_rows, R - first_row);
    // A stride of 4 more than a multiple of 8 spreads the states of neighbouring units over the banks.
    const int padded_rows = round_up(group_rows, LOGIT_ROWS) + 4, logits_stride = round_up(V, 4);
    const int own_steps = min(ceil_div(H, STEP_K) - warp() * K_STEPS, K_STEPS);  // of this warp, none behind H
    const size_t tile_words = size_t(WARPS) * K_STEPS * X_STEP, group_words = ceil_div(group_rows, ROWS) * tile_words;
    const Options options = {temperature, top_k, top_p, min_p};
    unsigned *arrived = counters + group * COUNTER_WORDS, *left = arrived + 1;

    // What is read 16 bytes at a time comes first, in multiples of 16 bytes.
    extern __shared__ __align__(16) unsigned shared[];
    float *sums = reinterpret_cast<float *>(shared + ResidentWeights::SHARED_WORDS);
    float *logits = sums + SUMS;
    float *own_states = logits + logits_shares(V) * logits_stride;  // (UNITS, padded_rows)
    float *a = own_states + UNITS * padded_rows;                    // (group_rows, 3, UNITS)
    float *own_P = a + group_rows * COLUMNS;                        // (V, 3, UNITS)
    float *own_W_out = own_P + V * COLUMNS;                         // (UNITS, V)
    float *own_b = own_W_out + UNITS * V;                           // (3, UNITS)
    const auto states_of = [=](int step) { return exchange + (step % 2 * groups + group) * group_words; };
    const auto publish = [=](int step, int row, int j, float state) {
        store_x(states_of(step) + row / ROWS * tile_words, row % ROWS, j, state);
    };

    ResidentWeights weights;
    weights.load(shared, [=](int k, int column) {
        const int gate = column / UNITS, j = j0 + column % UNITS;
        return gate < 3 && j < H && k < H ? W_hh[(size_t(gate) * H + j) * H + k] : 0.0f;
    });
    for (int e = threadIdx.x; e < V * COLUMNS; e += THREADS) {
        const int j = j0 + e % UNITS;
        own_P[e] = j < H ? P[size_t(e / UNITS) * H + j] : 0.0f;
    }
    for (int e = threadIdx.x; e < V * UNITS; e += THREADS) {
        const int j = j0 + e % UNITS, v = e / UNITS;
        own_W_out[e % UNITS * V + v] = j < H ? rounded(W_out[size_t(v) * H + j]) : 0.0f;
    }
    for (int e = threadIdx.x; e < COLUMNS; e += THREADS) {
        const int j = j0 + e % UNITS;
        own_b[e] = j < H ? b_hh[e / UNITS * H + j] : 0.0f;
    }
    for (int e = threadIdx.x; e < padded_rows * UNITS; e += THREADS) {
        const int j = j0 + e % UNITS, row = e / UNITS;
        const bool inside = j < H && row < rows;
        const float state = inside ? h[size_t(first_row + row) * H + j] : 0.0f;
        own_states[e % UNITS * padded_rows + row] = state;
        if (inside)
            publish(0, row, j, state);
    }
    unsigned arrivals = 0;  // the target of the next group_wait
    const auto arrive = [&] {
        group_arrive(arrived);
        arrivals += blocks;
    };
    arrive();
    group_wait(arrived, arrivals);

    for (int t = 0; t < T; ++t) {
        for (int first = 0; first < rows; first += ROWS) {
            ResidentSums product;
            weights.multiply(product, states_of(t) + first / ROWS * tile_words, own_steps);
            product.reduce_warps(sums);
            for (int e = threadIdx.x; e < min(ROWS, rows - first) * COLUMNS; e += THREADS)
                a[first * COLUMNS + e] = sum_of(sums, e / COLUMNS, e % COLUMNS) + own_b[e % COLUMNS];
            __syncthreads();  // the next tile's sums take the place of these
        }

        if (t > 0)  // the first characters were there before
            group_wait(arrived, arrivals);
        for (int e = threadIdx.x; e < rows * UNITS; e += THREADS) {
            const int u = e % UNITS, row = e / UNITS;
            if (j0 + u >= H)
                continue;
            const float *a_u = a + row * COLUMNS + u, *i_u = own_P + ids[first_row + row] * COLUMNS + u;
            float &state = own_states[u * padded_rows + row];
            state = gru_unit(i_u[0], i_u[UNITS], i_u[2 * UNITS], a_u[0], a_u[UNITS], a_u[2 * UNITS], state);
            publish(t + 1, row, j0 + u, state);
        }
        __syncthreads();  // the states of all units
        publish_logits<LOGIT_ROWS>(partial_logits + size_t(blockIdx.x) * group_rows * logits_stride, logits_stride,
                                   own_W_out, own_states, rows, padded_rows, V, UNITS);
        arrive();

        group_wait(arrived, arrivals);
        for (int row = block; row < rows; row += blocks) {
            const size_t at = size_t(t) * R + first_row + row;
            const int forced = forced_tr[at];
            const float uniform = uniforms_tr[at];
            const float *parts = partial_logits + (size_t(group) * blocks * group_rows + row) * logits_stride;
            const int id = next_character(logits, parts, size_t(group_rows) * logits_stride, blocks, b_out, V, forced,
                                          uniform, options);
            if (threadIdx.x == 0)
                ids[first_row + row] = ids_tr[at] = id;
        }
        if (t + 1 < T)
            arrive();  // the last one nobody would wait for, and it might come after the counters are set back
    }
    group_leave(arrived, left, blocks);
    for (int e = threadIdx.x; e < rows * UNITS; e += THREADS)
        if (j0 + e % UNITS < H)
            h[size_t(first_row + e / UNITS) * H + j0 + e % UNITS] = own_states[e % UNITS * padded_rows + e / UNITS];
}
