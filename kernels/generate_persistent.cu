// Generation, all steps of a call in one cooperative launch, with every weight on chip, or as many as fit. Formulas and
// the arguments that it shares with the stepwise variant: generate.cu.
//
// Why not the plain way, generate.cu: at H 1024 it reads 12.6 MB of W_hh per character, in three launches of about 2 us
// each. Here W_hh stays on chip; per character, a block reads 4 KB of states and waits once or twice for other blocks.
//
// states (2, layers, R, width) float32: the states before a step and after it, in turns, which blocks hand to each
// other; width is H rounded up to a multiple of 8. partial_logits (2, blocks of all groups, group_rows, 4 ceil(V / 4))
// float32: the sums of the logits over the units of each block, in turns too. counters (groups, 32) uint32, zero before
// and after.
// weights (2 layers - 1, units of all blocks of a group, 3, width), float32 or bfloat16, and biases (2 layers - 1,
// units of all blocks, 3) float32, as pack_weights writes them: matrix 2 l is W_hh of layer l, matrix 2 l - 1 its W_ih.
// off_chip: so many columns of each of these matrices, a multiple of 128 or all, lie in no block's shared memory.
//
// Groups never wait for each other: group g owns group_rows rows of text. A block owns `units` units of every layer for
// all rows of its group: in shared memory, their rows of W_hh and W_ih (but for the columns off chip), their columns of
// P and W_out, and their states. A warp owns TILE rows of a matrix by ROWS rows of a product; its lanes share the sum
// over k, four neighbours at a time.
// States pass through a ring of STAGES stages of stage_rows rows by 128 k, filled by asynchronous copies.
//
// Variants, by DRAWS; for a step of each, what a block does before, between and after its waits for the other blocks:
//   OWNER_DRAWS ("persistent"): the blocks of a group own its rows in turns for drawing. layers + 1 barriers per
//   character.
//     drawing      wait | the owner of a row sums its partial_logits, draws and publishes the character | arrive
//     layer 0      W_hh h | wait | gates, publish | arrive
//     layer 1...   W_hh h | wait | W_ih times the states of the layer below, gates, publish | arrive
//   ALL_DRAW ("persistent-all-draw"): every block sums the partial_logits of all rows and draws all characters of its
//   group. The same sums of the same numbers give the same bits in all blocks, so no block has to publish a character.
//   `layers` barriers per character.
//     layer 0      W_hh h | wait | sum partial_logits, draw, gates, publish | arrive
//     layer 1...   as above
//   With one layer, W_hh multiplies the states that the wait is for, so the product follows the wait; these states are
//   on their way while partial_logits are summed.
// Bytes per step: reads through L2, 4 R H of states per block, product and round of its warps over the matrix, divided
// by the groups, and, of partial_logits, 4 blocks R V by the owners, or, divided by the groups, in every block. Weights
// come from shared memory, or through L2, once per ROWS rows.
// Bytes per launch: reads all weights.
// Sums run in an order that the plan alone fixes; it does not depend on which weights are off chip.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".

#include "barrier.cuh"
#include "generate.cuh"
#include "generate_logits.cuh"
#include "gru.cuh"
#include "ptx.cuh"

#if !defined(ROWS) || !defined(TILE_UNITS) || !defined(STAGES) || !defined(DRAWS)
#error "the launcher defines ROWS and TILE_UNITS, of a warp's tile, STAGES, of the ring, and DRAWS, the way of drawing"
#endif

constexpr int OWNER_DRAWS = 0, ALL_DRAW = 1;  // DRAWS

constexpr int TILE = 3 * TILE_UNITS;  // rows of a matrix that a warp multiplies: the gates of its units
constexpr int CHUNK = 4 * WARP;       // k of a stage: each lane takes four
static_assert(STAGES >= 2, "one stage is filled while another is read");
static_assert(DRAWS == OWNER_DRAWS || DRAWS == ALL_DRAW);

// How many 32-bit words `count` weights take.
__device__ constexpr int words(int count) { return BF16 ? count / 2 : count; }

// Four neighbours of a row of weights, which a lane reads at once.
struct alignas(4 * words(4)) FourWeights {
    unsigned word[words(4)];
};

__device__ __forceinline__ float4 unpacked(const FourWeights &weights)
{
    const unsigned *w = weights.word;
    if constexpr (BF16)
        return make_float4(__uint_as_float(w[0] << 16), __uint_as_float(w[0] & 0xffff0000u),
                           __uint_as_float(w[1] << 16), __uint_as_float(w[1] & 0xffff0000u));
    else
        return make_float4(__uint_as_float(w[0]), __uint_as_float(w[1]), __uint_as_float(w[2]), __uint_as_float(w[3]));
}

// Word `word` of a row of H weights, zero from H on.
__device__ __forceinline__ unsigned weights_word(const float *__restrict__ row, int word, int H)
{
    const auto weight = [&](int k) { return k < H ? row[k] : 0.0f; };
    return BF16 ? pack_bf16(weight(2 * word), weight(2 * word + 1)) : __float_as_uint(weight(word));
}

// One matrix W (3H, H) with its b (3H,), as generate_persistent reads it: weights (units of all blocks, 3, width),
// biases (units of all blocks, 3). Units and inputs from H on are zero: their states stay zero, and add nothing.
extern "C" __global__ void __launch_bounds__(THREADS)
pack_weights(unsigned *__restrict__ weights, float *__restrict__ biases, const float *__restrict__ W,
             const float *__restrict__ b, int H, int width, int padded_units)
{
    const size_t count = size_t(padded_units) * 3 * words(width), threads = size_t(gridDim.x) * blockDim.x;
    for (size_t e = thread_in_grid(); e < count; e += threads) {
        const int row = e / words(width), word = e % words(width), j = row / 3, g = row % 3;
        weights[e] = j < H ? weights_word(W + (size_t(g) * H + j) * H, word, H) : 0;
        if (word == 0)
            biases[row] = j < H ? b[g * H + j] : 0.0f;
    }
}

// ---- Products -------------------------------------------------------------------------------------------------------

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy_16(float *stage, const float *x, bool inside) { cp_async_16(stage, x, inside); }
__device__ __forceinline__ void close_stage() { cp_async_commit(); }
__device__ __forceinline__ void wait_for_oldest_stage() { cp_async_wait<STAGES - 2>(); }
#else  // there are no asynchronous copies: these end at once
__device__ __forceinline__ void copy_16(float *stage, const float *x, bool inside)
{
    *reinterpret_cast<float4 *>(stage) = inside ? *reinterpret_cast<const float4 *>(x) : make_float4(0, 0, 0, 0);
}
__device__ __forceinline__ void close_stage() {}
__device__ __forceinline__ void wait_for_oldest_stage() {}
#endif

// Adds up values[0 .. COUNT) over the lanes, each sum in one lane: values[i] becomes sum number first + i, valid where
// first + i < end. Before the call, `first` is 0 and `end` is COUNT. A step halves the sums that a lane works on, so
// that COUNT sums take about COUNT shuffles, not 5 COUNT.
template <int COUNT, int DISTANCE, int N>
__device__ __forceinline__ void scatter_sums(float (&values)[N], int &first, int &end)
{
    constexpr int HALF = (COUNT + 1) / 2;
    const bool upper = lane() & DISTANCE;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        const float low = values[i], high = i + HALF < COUNT ? values[i + HALF] : 0.0f;
        values[i] = (upper ? high : low) + __shfl_xor_sync(ALL_LANES, upper ? low : high, DISTANCE);
    }
    if (upper)
        first += HALF;
    else
        end = min(end, first + HALF);
    if constexpr (DISTANCE > 1)
        scatter_sums<HALF, DISTANCE / 2>(values, first, end);
}

// How many of COUNT values a lane holds after scatter_sums.
__device__ constexpr int values_per_lane(int count)
{
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        count = (count + 1) / 2;
    return count;
}

// A product of `gates` rows of a matrix, at least TILE of them, with `rows` rows of states: out[m][r] = W[m] . x[r].
//
// A pass takes stage_rows rows of x, and as many tiles of the matrix as there are warps. All threads call `begin`, then
// `run`; in between they may do anything but touch the ring. Columns before off_chip of the matrix come through L2.
struct Product {
    int rows, width, off_chip, stage_rows, gates;
    float *ring;  // (STAGES, stage_rows, CHUNK), in shared memory
    const float *x;
    int next_row, next_round, next_k;  // of x, where the next stage begins

    __device__ __forceinline__ int tiles() const { return ceil_div(gates, TILE); }
    __device__ __forceinline__ int rounds() const { return ceil_div(tiles(), WARPS); }

    __device__ __forceinline__ void fill_next_stage(int slot)
    {
        if (next_row < rows) {
            float *stage = ring + slot * stage_rows * CHUNK + 4 * lane();
            const int k = next_k + 4 * lane();
#pragma unroll 1  // unrolled, it would take the registers that sums need
            for (int row = warp(); row < stage_rows; row += WARPS)
                copy_16(stage + row * CHUNK, x + size_t(next_row + row) * width + k,
                        next_row + row < rows && k < width);
            next_k += CHUNK;
            if (next_k >= width) {
                next_k = 0;
                if (++next_round == rounds()) {
                    next_round = 0;
                    next_row += stage_rows;
                }
            }
        }
        close_stage();  // an empty stage too: wait_for_oldest_stage counts stages
    }

    __device__ __forceinline__ void begin(const float *states)
    {
        x = states;
        next_row = next_round = next_k = 0;
        for (int i = 0; i < STAGES - 1; ++i)
            fill_next_stage(i);
    }

    // All threads see `out`, and may begin the next product, when this returns. W (gates, width - off_chip), in shared
    // memory, holds the columns of the matrix from off_chip on; W_all (gates, width), in global memory, holds them all.
    __device__ __forceinline__ void run(float *out, int pitch, const unsigned *W, const unsigned *W_all)
    {
        const int tiles_at_once = min(tiles(), WARPS), row_in_stage = warp() / tiles_at_once * ROWS;
        int slot = 0;
        for (int row = 0; row < rows; row += stage_rows)
            for (int round = 0; round < rounds(); ++round) {
                const int tile = round * WARPS + warp() % tiles_at_once;
                const bool active = row_in_stage < stage_rows && row + row_in_stage < rows && tile < tiles();
                // The last tile overlaps the one before it where it would go beyond the matrix.
                const int first = min(tile * TILE, gates - TILE);
                float sums[TILE * ROWS] = {};
                for (int first_k = 0; first_k < width; first_k += CHUNK) {
                    const int k = first_k + 4 * lane(), W_width = width - off_chip;
                    const bool on_chip = first_k >= off_chip, multiplies = active && k < width;
                    FourWeights w[TILE];
                    if (multiplies && !on_chip)  // on their way while the stage is waited for
                        load(w, W_all + words(first * width + k), words(width));
                    wait_for_oldest_stage();
                    __syncthreads();  // all see the oldest stage, and all have read the stage that is filled next
                    fill_next_stage(slot > 0 ? slot - 1 : STAGES - 1);
                    if (multiplies && on_chip)
                        load(w, W + words(first * W_width + k - off_chip), words(W_width));
                    if (multiplies)
                        add_chunk(sums, w, ring + (slot * stage_rows + row_in_stage) * CHUNK + 4 * lane());
                    slot = slot + 1 < STAGES ? slot + 1 : 0;
                }
                if (active)
                    store(out + first * pitch + row + row_in_stage, pitch, sums, tile * TILE - first);
            }
        __syncthreads();
    }

    __device__ __forceinline__ void load(FourWeights (&w)[TILE], const unsigned *W, int words_of_row) const
    {
#pragma unroll
        for (int m = 0; m < TILE; ++m)
            w[m] = *reinterpret_cast<const FourWeights *>(W + m * words_of_row);
    }

    __device__ __forceinline__ void add_chunk(float (&sums)[TILE * ROWS], const FourWeights (&weights)[TILE],
                                              const float *stage) const
    {
        float4 w[TILE];
#pragma unroll
        for (int m = 0; m < TILE; ++m)
            w[m] = unpacked(weights[m]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float4 x_k = *reinterpret_cast<const float4 *>(stage + r * CHUNK);
#pragma unroll
            for (int m = 0; m < TILE; ++m) {
                float &sum = sums[m * ROWS + r];
                sum = fmaf(w[m].x, x_k.x, sum);
                sum = fmaf(w[m].y, x_k.y, sum);
                sum = fmaf(w[m].z, x_k.z, sum);
                sum = fmaf(w[m].w, x_k.w, sum);
            }
        }
    }

    // Stores the tile's sums but for its first `skip` rows, which the tile before it has as well.
    __device__ __forceinline__ void store(float *out, int pitch, float (&sums)[TILE * ROWS], int skip) const
    {
        int first = 0, end = TILE * ROWS;
        scatter_sums<TILE * ROWS, WARP / 2>(sums, first, end);
#pragma unroll
        for (int i = 0; i < values_per_lane(TILE * ROWS); ++i) {
            const int m = (first + i) / ROWS, r = (first + i) % ROWS;
            if (first + i < end && m >= skip)
                out[m * pitch + r] = sums[i];
        }
    }
};

// ---- All steps ------------------------------------------------------------------------------------------------------

// The arguments of the kernel; the heads of this file and of generate.cu say what they are.
struct Arguments {
    float *h;
    int *ids, *ids_tr;
    float *states, *partial_logits;
    unsigned *counters;
    const unsigned *weights;
    const float *biases, *P, *W_out, *b_out;
    const int *forced_tr;
    const float *uniforms_tr;
    int T, R, V, H, layers, group_rows, units, stage_rows, off_chip;
    Options options;
    float *shared;  // dynamic shared memory
};

// A block: the rows and units that it owns, and its shared memory. All functions are for all of its threads.
struct Block : Arguments {
    int width = round_up(H, 8), blocks = ceil_div(width, units), matrices = 2 * layers - 1;
    Group group{counters, int(blockIdx.x / blocks), int(blockIdx.x % blocks), blocks};
    int first_unit = group.block * units, gates = 3 * units;  // gates of this block, in a layer
    int first_row = group.index * group_rows, rows = min(group_rows, R - first_row);
    int own_width = width - off_chip;  // columns of a matrix in shared memory
    // In a and i, the rows of text of one gate are neighbours; the odd pitch spreads neighbouring gates over the banks.
    int padded_rows = round_up(group_rows, ROWS), pitch = padded_rows | 1;
    int logits_stride = round_up(V, 4);

    // Shared memory. Arrays that are read 16 bytes at a time come first, in multiples of 16 bytes.
    unsigned *own_weights = reinterpret_cast<unsigned *>(shared);         // (matrices, gates, own_width)
    float *ring = shared + matrices * gates * words(own_width);           // (STAGES, stage_rows, CHUNK)
    float *logits = ring + STAGES * stage_rows * CHUNK;                   // of one row, for sum_partial_logits
    float *own_states = logits + logits_shares(V) * logits_stride;        // (layers, units, padded_rows)
    float *own_P = own_states + layers * units * padded_rows;             // (V, 3, units)
    float *own_W_out = own_P + V * gates;                                 // (units, V)
    float *own_biases = own_W_out + V * units;                            // (matrices, gates)
    float *a = own_biases + matrices * gates;                             // (gates, pitch): W_hh h
    float *i = a + gates * pitch;                                         // (gates, pitch) above layer 0: W_ih x
    // (group_rows,): the characters before a step; with owner-draws, the forced ones and the ones this block draws.
    int *own_ids = reinterpret_cast<int *>(layers > 1 ? i + gates * pitch : i);

    Product product{rows, width, off_chip, stage_rows, gates, ring};

    // This block's rows of matrix m (gates, width), in global memory.
    __device__ __forceinline__ const unsigned *rows_of_matrix(int m) const
    {
        return weights + (size_t(m) * blocks + group.block) * gates * words(width);
    }

    // The states of a layer before step t, of this group's rows (rows, width).
    __device__ __forceinline__ float *states_of(int t, int layer) const
    {
        return states + ((size_t(t % 2) * layers + layer) * R + first_row) * width;
    }

    // The partial_logits (group_rows, logits_stride) before step t of block `block` of the grid.
    __device__ __forceinline__ float *partial_logits_of(int t, int block) const
    {
        return partial_logits + size_t(t % 2 * gridDim.x + block) * (group_rows * logits_stride);
    }

    // Fills shared memory, and hands the states before step 0 to the group.
    __device__ __forceinline__ void load()
    {
        for (int m = 0; m < matrices; ++m) {
            const unsigned *source = rows_of_matrix(m) + words(off_chip);
            uint4 *own = reinterpret_cast<uint4 *>(own_weights + m * gates * words(own_width));
            const int quads = words(own_width) / 4;  // of a row
#pragma unroll 8  // loads in flight
            for (int q = threadIdx.x; q < gates * quads; q += THREADS)
                own[q] = reinterpret_cast<const uint4 *>(source + q / quads * words(width))[q % quads];
            for (int gate = threadIdx.x; gate < gates; gate += THREADS)
                own_biases[m * gates + gate] = biases[(size_t(m) * blocks + group.block) * gates + gate];
        }
        for (int e = threadIdx.x; e < V * gates; e += THREADS) {
            const int j = first_unit + e % units;
            own_P[e] = j < H ? P[size_t(e / units) * H + j] : 0.0f;
        }
        for (int e = threadIdx.x; e < V * units; e += THREADS) {
            const int j = first_unit + e % units, v = e / units;
            own_W_out[e % units * V + v] = j < H ? rounded(W_out[size_t(v) * H + j]) : 0.0f;
        }
        for (int row = threadIdx.x; row < rows; row += THREADS)
            own_ids[row] = ids[first_row + row];
        for (int layer = 0; layer < layers; ++layer)
            for (int e = threadIdx.x; e < units * padded_rows; e += THREADS) {
                const int u = e % units, row = e / units, j = first_unit + u;
                const float state = j < H && row < rows ? h[(size_t(layer) * R + first_row + row) * H + j] : 0.0f;
                own_states[(layer * units + u) * padded_rows + row] = state;
                if (j < width && row < rows)
                    states_of(0, layer)[size_t(row) * width + j] = state;
            }
        group.barrier();
    }

    // The forced characters before step t, into own_ids; negative where a character is to be drawn.
    __device__ __forceinline__ void load_forced(int t)
    {
        for (int row = threadIdx.x; row < rows; row += THREADS)
            own_ids[row] = forced_tr[size_t(t - 1) * R + first_row + row];
    }

    // Draws the characters before step t that are not forced, this block's or all of the group's, into own_ids. The
    // owner of a row publishes its character.
    __device__ __forceinline__ void draw(int t)
    {
        const size_t before = size_t(t - 1) * R + first_row;
        const float *of_group = partial_logits_of(t, group.index * blocks);
        for (int row = DRAWS == OWNER_DRAWS ? group.block : 0; row < rows; row += DRAWS == OWNER_DRAWS ? blocks : 1)
            if (own_ids[row] < 0) {  // the same for the whole block
                const float uniform = uniforms_tr[before + row];
                sum_partial_logits(logits, of_group + row * logits_stride, size_t(group_rows) * logits_stride, blocks,
                                   b_out, V);
                const int id = draw_character(logits, uniform, V, options);
                if (threadIdx.x == 0)
                    own_ids[row] = id;
                __syncthreads();  // all threads see the id, and have done with `logits`
            }
        for (int row = group.block + blocks * threadIdx.x; row < rows; row += blocks * THREADS)
            ids[first_row + row] = ids_tr[before + row] = own_ids[row];
    }

    // The states of a layer after step t, from a and i.
    __device__ __forceinline__ void move_states(int t, int layer)
    {
        const float *b_hh = own_biases + 2 * layer * gates, *b_ih = b_hh - gates;
        const int *ids_read = DRAWS == OWNER_DRAWS ? ids + first_row : own_ids;
        for (int e = threadIdx.x; e < units * rows; e += THREADS) {
            const int u = e % units, row = e / units, j = first_unit + u;
            float i_u[3], a_u[3];
#pragma unroll
            for (int g = 0; g < 3; ++g) {
                const int gate = 3 * u + g;
                a_u[g] = a[gate * pitch + row] + b_hh[gate];
                i_u[g] = layer == 0 ? own_P[(ids_read[row] * 3 + g) * units + u] : i[gate * pitch + row] + b_ih[gate];
            }
            float &state = own_states[(layer * units + u) * padded_rows + row];
            state = gru_cell(i_u, a_u, state).h;
            if (j < width)
                states_of(t + 1, layer)[size_t(row) * width + j] = state;
        }
    }

    // Step t: the characters before it, then all layers. Step T is only the characters.
    __device__ __forceinline__ void step(int t)
    {
        for (int layer = 0; layer < layers; ++layer) {
            const bool draws = layer == 0 && t > 0;
            if (draws)
                load_forced(t);  // before the wait, which hides the latency
            if (layer == 0 && DRAWS == OWNER_DRAWS) {
                group.wait();
                if (t < T)
                    product.begin(states_of(t, 0));
                if (draws)
                    draw(t);
                if (t == T)
                    return;  // no block would wait for this arrival, and it might follow the reset of the counters
                group.arrive();
            }

            // The product with W_hh is before the wait, but after it with one layer and all-draw; the product with W_ih
            // is after the wait. Both are one loop, because the product, which is inlined, is most of the machine code.
            const bool W_hh_after = DRAWS == ALL_DRAW && layers == 1;
#pragma unroll 1
            for (int after = 0; after <= 1; ++after) {
                if (after)
                    group.wait();
                const bool W_ih = after && layer > 0, multiplies = W_ih || (after == W_hh_after && t < T);
                if (multiplies && (layer > 0 || DRAWS == ALL_DRAW))  // else it began before the drawing
                    product.begin(W_ih ? states_of(t + 1, layer - 1) : states_of(t, layer));
                if (after && draws && DRAWS == ALL_DRAW)
                    draw(t);
                const int matrix = 2 * layer - W_ih;
                if (multiplies)
                    product.run(W_ih ? i : a, pitch, own_weights + matrix * gates * words(own_width),
                                rows_of_matrix(matrix));
            }
            if (t == T)
                return;

            move_states(t, layer);
            if (layer == layers - 1) {
                __syncthreads();  // the states of all units
                publish_partial_logits<ROWS>(partial_logits_of(t + 1, blockIdx.x), logits_stride, own_W_out,
                                             own_states + layer * units * padded_rows, rows, padded_rows, V, units);
            }
            group.arrive();
        }
    }

    __device__ __forceinline__ void save() const
    {
        for (int layer = 0; layer < layers; ++layer)
            for (int e = threadIdx.x; e < units * rows; e += THREADS) {
                const int u = e % units, row = e / units;
                if (first_unit + u < H)
                    h[(size_t(layer) * R + first_row + row) * H + first_unit + u] =
                        own_states[(layer * units + u) * padded_rows + row];
            }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
generate_persistent(float *h, int *ids, int *ids_tr, float *states, float *partial_logits, unsigned *counters,
                    const unsigned *__restrict__ weights, const float *__restrict__ biases,
                    const float *__restrict__ P, const float *__restrict__ W_out, const float *__restrict__ b_out,
                    const int *__restrict__ forced_tr, const float *__restrict__ uniforms_tr, int T, int R, int V,
                    int H, int layers, int group_rows, int units, int stage_rows, int off_chip, float temperature,
                    int top_k, float top_p, float min_p)
{
    extern __shared__ __align__(16) float shared[];
    Block block{{h, ids, ids_tr, states, partial_logits, counters, weights, biases, P, W_out, b_out, forced_tr,
                 uniforms_tr, T, R, V, H, layers, group_rows, units, stage_rows, off_chip,
                 {temperature, top_k, top_p, min_p}, shared}};
    block.load();
    for (int t = 0; t <= T; ++t)
        block.step(t);
    block.group.leave();
    block.save();
}
