// Generation for many rows of text and one layer: all steps of a call in one cooperative launch, its products on tensor
// cores, as exact as fp32. Formulas, and the arguments that it shares with the stepwise variant: generate.cu.
//
// Why not the plain way, generate.cu: for 64 rows at H 1024 it reads the 12.6 MB of W_hh eight times per character, for
// eight rows each, and multiplies without tensor cores. Here W_hh stays on chip, and a block reads 128 KiB of states.
//
// exchange (2, groups, row tiles, WARPS K_GROUPS, X_GROUP) uint32, zero where k >= H: the states before a step and
// after it, in turns. partial_logits (2, blocks, group_rows, 4 ceil(V / 4)) words: the sums of the logits over the
// units of each block; nobody writes those from V on. characters (2, groups, group_rows, 2) words: the character before
// a step, from the block that owns the row for drawing; the second word of a row is never written. In both, exchange t
// of the launch is for the character before step t; there are no partial_logits before step 0. numbers (groups,
// COUNTER_WORDS): counters of words.cuh. counters (groups, COUNTER_WORDS) uint32, zero before and after.
//
// Groups never wait for each other: group g owns group_rows rows of text, in tiles of ROWS. A block owns UNITS units
// for all rows of its group: on chip, their rows of W_hh (resident.cuh), their columns of P and W_out, their states.
// The blocks of a group own its rows in turns for drawing.
//
// A step, and what a block does before, between and after its waits for the other blocks:
//   product    wait | W_hh h, tile by tile
//   gates      wait for the characters | gates, publish the states | arrive, publish this block's partial_logits
//   drawing    the owner of a row waits for its partial_logits | sums them, draws and publishes the character
// That makes one barrier per character, and a wait for words that the product hides. Whoever writes exchange t + 2 of
// partial_logits or characters, in step t + 1, has all states before step t + 1, which the other blocks wrote in step
// t, after they had read exchange t of both.
//
// Bytes per step and block: 32 ROWS WARPS K_GROUPS of states through L2 for each tile (4 H for each row), 8 group_rows
// V of partial_logits written; a drawing reads 8 blocks V of them. Multiply-adds of tf32: three (bf16: two) ROWS
// COLUMNS H for each tile. At 64 rows, V 66, H 1024 on an H100: 2 groups of 64 blocks, which gather 128 KiB a block and
// step.
//
// Variants: fp32 and bf16 weights (BF16); generate_persistent.cu for few rows, several layers, and GPUs without tensor
// cores; generate.cu for any sizes. plan/generation.py chooses.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".
#include "barrier.cuh"
#include "generate.cuh"
#include "generate_logits.cuh"
#include "gru.cuh"
#include "resident.cuh"

static_assert(PRECISION == 3, "the result is to be as exact as fp32");
static_assert(COLUMNS % 3 == 0, "a block owns the three gates of its units");
constexpr int UNITS = COLUMNS / 3;
constexpr int LOGIT_ROWS = 8;  // of which a thread sums one logit

// The next character of a row: the forced one, or one drawn from the sums of partial_logits. Not inlined: the compiler
// would compute some of it once for all steps, and keep that in registers that the product needs.
__device__ __noinline__ int next_character(float *logits, const Word *partial_logits, size_t stride, unsigned tag,
                                           int blocks, const float *b_out, int V, int forced, float uniform,
                                           Options options)
{
    // For a forced character too: to wait for `forced` first would put one more latency in a row.
    sum_partial_logits(logits, partial_logits, stride, tag, blocks, b_out, V);
    return forced >= 0 ? forced : draw_character(logits, uniform, V, options);
}

// The arguments of the kernel; the heads of this file and of generate.cu say what they are.
struct Arguments {
    float *h;
    int *ids, *ids_tr;
    unsigned *exchange;
    Word *partial_logits, *characters;
    unsigned *numbers, *counters;
    const float *P, *W_hh, *b_hh, *W_out, *b_out;
    const int *forced_tr;
    const float *uniforms_tr;
    int T, R, V, H, group_rows;
    Options options;
    unsigned *shared;  // dynamic shared memory
};

// A block: the rows and units that it owns, and its shared memory. All functions are for all of its threads.
struct Block : Arguments {
    int blocks = ceil_div(H, UNITS), groups = gridDim.x / blocks;
    Group group{counters, int(blockIdx.x / blocks), int(blockIdx.x % blocks), blocks};
    unsigned number = first_number(numbers, group.index);  // of the exchange of words before step 0
    int first_unit = group.block * UNITS, first_row = group.index * group_rows;
    int rows = min(group_rows, R - first_row);
    // A stride of 4 more than a multiple of 8 spreads the states of neighbouring units over the banks.
    int padded_rows = round_up(group_rows, LOGIT_ROWS) + 4, logits_stride = round_up(V, 4);
    size_t group_words = ceil_div(group_rows, ROWS) * X_WORDS;

    // Shared memory, weights first. Arrays that are read 16 bytes at a time come first, in multiples of 16 bytes.
    float *sums = reinterpret_cast<float *>(shared + ResidentWeights::SHARED_WORDS);
    float *logits = sums + SUMS;                                    // of one row, for sum_partial_logits
    float *own_states = logits + logits_shares(V) * logits_stride;  // (UNITS, padded_rows)
    float *a = own_states + UNITS * padded_rows;                    // (group_rows, 3, UNITS)
    float *own_P = a + group_rows * COLUMNS;                        // (V, 3, UNITS)
    float *own_W_out = own_P + V * COLUMNS;                         // (UNITS, V)
    float *own_b = own_W_out + UNITS * V;                           // (3, UNITS)
    int *own_ids = reinterpret_cast<int *>(own_b + COLUMNS);        // (group_rows,): the characters before a step

    // The states before step t of this group's rows, in the order of exchange.
    __device__ __forceinline__ unsigned *states_of(int t) const
    {
        return exchange + (t % 2 * groups + group.index) * group_words;
    }

    // The words of exchange t of the launch, and their tag: partial_logits (group_rows, logits_stride) of block `block`
    // of the grid, and the characters (group_rows, 2) of this group.
    __device__ __forceinline__ unsigned tag(int t) const { return number + t + 1; }

    __device__ __forceinline__ Word *partial_logits_of(int t, int block) const
    {
        return partial_logits + size_t((number + t) % 2 * gridDim.x + block) * (group_rows * logits_stride);
    }

    __device__ __forceinline__ Word *characters_of(int t) const
    {
        return characters + size_t((number + t) % 2 * groups + group.index) * (group_rows * 2);
    }

    __device__ __forceinline__ void publish_character(int t, int row, int id) const
    {
        store_word(characters_of(t) + 2 * row, word_of(id, tag(t)));
    }

    __device__ __forceinline__ void publish_state(int t, int row, int j, float state) const
    {
        states_of(t)[row / ROWS * X_WORDS + place_of(row % ROWS, j)] = __float_as_uint(state);
    }

    // Fills shared memory and the registers of weights, and hands the states before step 0 to the group.
    __device__ __forceinline__ void load(ResidentWeights &weights)
    {
        weights.load(shared, [this](int k, int, int column) {
            const int gate = column / UNITS, j = first_unit + column % UNITS;
            return gate < 3 && j < H && k < H ? W_hh[(size_t(gate) * H + j) * H + k] : 0.0f;
        });
        for (int e = threadIdx.x; e < V * COLUMNS; e += THREADS) {
            const int j = first_unit + e % UNITS;
            own_P[e] = j < H ? P[size_t(e / UNITS) * H + j] : 0.0f;
        }
        for (int e = threadIdx.x; e < V * UNITS; e += THREADS) {
            const int j = first_unit + e % UNITS, v = e / UNITS;
            own_W_out[e % UNITS * V + v] = j < H ? rounded(W_out[size_t(v) * H + j]) : 0.0f;
        }
#pragma unroll 1  // a block has fewer gates and rows than threads
        for (int e = threadIdx.x; e < COLUMNS; e += THREADS) {
            const int j = first_unit + e % UNITS;
            own_b[e] = j < H ? b_hh[e / UNITS * H + j] : 0.0f;
        }
#pragma unroll 1
        for (int row = threadIdx.x; row < rows; row += THREADS) {
            own_ids[row] = -1;
            if (row % blocks == group.block)
                publish_character(0, row, ids[first_row + row]);
        }
        for (int e = threadIdx.x; e < padded_rows * UNITS; e += THREADS) {
            const int j = first_unit + e % UNITS, row = e / UNITS;
            const bool inside = j < H && row < rows;
            const float state = inside ? h[size_t(first_row + row) * H + j] : 0.0f;
            own_states[e % UNITS * padded_rows + row] = state;
            if (inside)
                publish_state(0, row, j, state);
        }
        group.arrive();
    }

    // a = W_hh h + b_hh of all rows, from the states before step t.
    __device__ __forceinline__ void multiply(const ResidentWeights &weights, int t)
    {
        for (int first = 0; first < rows; first += ROWS) {
            ResidentSums product;
            weights.multiply(product, states_of(t) + first / ROWS * X_WORDS, H);
            product.reduce_warps(sums);
            for (int e = threadIdx.x; e < min(ROWS, rows - first) * COLUMNS; e += THREADS)
                a[first * COLUMNS + e] = sum_of(sums, e / COLUMNS, e % COLUMNS) + own_b[e % COLUMNS];
            __syncthreads();  // the sums of the next tile go to the same shared memory
        }
    }

    // The states after step t.
    __device__ __forceinline__ void move_states(int t)
    {
        for (int e = threadIdx.x; e < rows * UNITS; e += THREADS) {
            const int u = e % UNITS, row = e / UNITS;
            if (first_unit + u >= H)
                continue;
            const float *a_row = a + row * COLUMNS + u, *P_row = own_P + own_ids[row] * COLUMNS + u;
            const float i_u[3] = {P_row[0], P_row[UNITS], P_row[2 * UNITS]};
            const float a_u[3] = {a_row[0], a_row[UNITS], a_row[2 * UNITS]};
            float &state = own_states[u * padded_rows + row];
            state = gru_cell(i_u, a_u, state).h;
            publish_state(t + 1, row, first_unit + u, state);
        }
    }

    // Publishes the characters of step t of the rows that this block owns.
    __device__ __forceinline__ void draw(int t)
    {
        const Word *of_group = partial_logits_of(t + 1, group.index * blocks);
        for (int row = group.block; row < rows; row += blocks) {
            const size_t offset = size_t(t) * R + first_row + row;
            const int forced = forced_tr[offset];
            const float uniform = uniforms_tr[offset];
            const int id = next_character(logits, of_group + row * logits_stride, size_t(group_rows) * logits_stride,
                                          tag(t + 1), blocks, b_out, V, forced, uniform, options);
            if (threadIdx.x == 0) {
                publish_character(t + 1, row, id);
                ids_tr[offset] = id;
                if (t + 1 == T)
                    ids[first_row + row] = id;
            }
        }
    }

    __device__ __forceinline__ void step(const ResidentWeights &weights, int t)
    {
        if (t > 0)
#pragma unroll 1
            for (int row = threadIdx.x; row < rows; row += THREADS)
                own_ids[row] = forced_tr[size_t(t - 1) * R + first_row + row];
        group.wait();
        multiply(weights, t);
        read_characters(own_ids, characters_of(t), tag(t), rows);
        move_states(t);
        if (t + 1 < T)
            group.arrive();  // no block would wait for the last arrival, and it might follow the reset of the counters
        else
            __syncthreads();  // the states of all units, as in arrive()
        publish_partial_logits<LOGIT_ROWS>(partial_logits_of(t + 1, blockIdx.x), logits_stride, tag(t + 1), own_W_out,
                                           own_states, rows, padded_rows, V, UNITS);
        draw(t);
    }

    __device__ __forceinline__ void save() const
    {
        for (int e = threadIdx.x; e < rows * UNITS; e += THREADS) {
            const int u = e % UNITS, row = e / UNITS;
            if (first_unit + u < H)
                h[size_t(first_row + row) * H + first_unit + u] = own_states[u * padded_rows + row];
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
generate_batched(float *h, int *ids, int *ids_tr, unsigned *exchange, Word *partial_logits, Word *characters,
                 unsigned *numbers, unsigned *counters, const float *__restrict__ P,
                 const float *__restrict__ W_hh, const float *__restrict__ b_hh, const float *__restrict__ W_out,
                 const float *__restrict__ b_out, const int *__restrict__ forced_tr,
                 const float *__restrict__ uniforms_tr, int T, int R, int V, int H, int group_rows, float temperature,
                 int top_k, float top_p, float min_p)
{
    extern __shared__ __align__(16) unsigned shared[];
    Block block{{h, ids, ids_tr, exchange, partial_logits, characters, numbers, counters, P, W_hh, b_hh, W_out, b_out,
                 forced_tr, uniforms_tr, T, R, V, H, group_rows, {temperature, top_k, top_p, min_p}, shared}};
    ResidentWeights weights;
    block.load(weights);
    for (int t = 0; t < T; ++t)
        block.step(weights, t);
    block.group.leave();
    if (threadIdx.x == 0)
        leave_group(numbers, block.group.index, block.blocks, T + 1);
    block.save();
}
