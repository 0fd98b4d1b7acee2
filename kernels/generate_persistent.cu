// Generation, all steps of a call in one cooperative launch, with every weight on chip, or as many as fit. Formulas and
// the arguments that it shares with the stepwise variant: generate.cu.
//
// states (2, layers, R, width) float32: what the blocks tell each other, the states before a step and after it in
// turns; width is H rounded up to a multiple of 8. partial_logits (2, blocks of all groups, group_rows, 4 ceil(V / 4))
// float32: what the units of each block add to the logits, in turns too. counters (groups, 32) uint32, zero before and
// after.
// weights (2 layers - 1, units of all blocks of a group, 3, width), float32 or bfloat16, and biases (2 layers - 1,
// units of all blocks, 3) float32, as `pack` writes them: matrix 2 l is W_hh of layer l, matrix 2 l - 1 its W_ih.
// columns_off_chip: so many columns of each of these, a multiple of 128 or all, lie in no block's shared memory.
//
// Groups never wait for each other: group g owns group_rows rows of text. A block owns `units` units of every layer
// for all rows of its group: in shared memory, their rows of W_hh and W_ih (but for the columns off chip), their
// columns of P, their states, and of W_out what drawing needs. A warp owns TILE rows of a matrix by ROWS rows of a
// product; its lanes share the sum over k, four neighbours at a time.
// States pass through a ring of STAGES stages of stage_rows rows by 128 k, filled by asynchronous copies.
//
// Variants, by who DRAWS and from what; for a step of each, what happens while others are waited for:
//   OWNER: a block holds its units' columns of W_out and publishes their part of the logits with their states. The
//   blocks of a group take its rows in turns for drawing: layers + 1 barriers per character.
//     drawing      wait | the owner of a row sums its parts, draws and publishes the character | arrive
//     layer 0      W_hh h | wait | gates, publish | arrive
//     the others   W_hh h | wait | W_ih times the states of the layer below, gates, publish | arrive
//   EVERY_BLOCK_FROM_PARTS: every block sums all parts and draws all characters of its group. The same sums of the same
//   numbers give the same bits in all blocks, so nobody has to be told: `layers` barriers per character.
//     layer 0      W_hh h | wait | sum the parts, draw, gates, publish | arrive
//     the others   as above
//   EVERY_BLOCK_FROM_STATES: the same, where every block holds all of W_out, and computes all logits from the states
//   that W_hh takes anyway. No parts are published, and nothing is off chip.
//     layer 0      W_hh h | wait | W_out times the states of the last layer, draw, gates, publish | arrive
//     the others   as above
// With one layer, W_hh takes the states that are waited for: where every block draws, it multiplies them after the
// wait, in one product with W_out or, from parts, with states on their way while parts are summed.
// Bytes per step: reads through L2, 4 R H of states per block, product and round of its warps over the matrix, divided
// by the groups, and, of partial logits, 4 blocks R V by owners, or in every block, divided by the groups; weights come
// from shared memory, or through L2, once per ROWS rows. The order of their sums does not depend on where they lie.
// Bytes per launch: reads all weights, and 4 V H of W_out in every block where it draws from states.
// Sums run in an order that the plan alone fixes.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".

#include "barrier.cuh"
#include "generate.cuh"
#include "generate_logits.cuh"
#include "ptx.cuh"

#if !defined(ROWS) || !defined(UNITS) || !defined(STAGES) || !defined(DRAWS)
#error "generate_persistent.cu needs ROWS and UNITS, of a warp's tile, STAGES, of the ring, and DRAWS, who draws"
#endif

constexpr int OWNER = 0, EVERY_BLOCK_FROM_PARTS = 1, EVERY_BLOCK_FROM_STATES = 2;  // DRAWS

constexpr int TILE = 3 * UNITS;  // rows of a matrix that a warp multiplies: gates, or logits
constexpr int CHUNK = 4 * WARP;  // k of a stage: each lane takes four
static_assert(STAGES >= 2, "one stage is filled while another is read");
static_assert(DRAWS == OWNER || DRAWS == EVERY_BLOCK_FROM_PARTS || DRAWS == EVERY_BLOCK_FROM_STATES);

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

// One matrix as write_text reads it: weights (units of all blocks, 3, width), biases (units of all blocks, 3). Units
// and inputs from H on are zero: their states stay zero, and add nothing.
extern "C" __global__ void __launch_bounds__(THREADS)
pack(unsigned *__restrict__ weights, float *__restrict__ biases, const float *__restrict__ W,
     const float *__restrict__ b, int H, int width, int padded_units)
{
    const size_t count = size_t(padded_units) * 3 * words(width), threads = size_t(gridDim.x) * blockDim.x;
    for (size_t i = thread_in_grid(); i < count; i += threads) {
        const int row = i / words(width), word = i % words(width), j = row / 3, g = row % 3;
        weights[i] = j < H ? weights_word(W + (size_t(g) * H + j) * H, word, H) : 0;
        if (word == 0)
            biases[row] = j < H ? b[g * H + j] : 0.0f;
    }
}

// ---- Products -------------------------------------------------------------------------------------------------------

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy_16(float *stage, const float *x, bool inside) { cp_async_16(stage, x, inside); }
__device__ __forceinline__ void close_stage() { cp_async_commit(); }
__device__ __forceinline__ void wait_for_oldest_stage() { cp_async_wait<STAGES - 2>(); }
#else  // no asynchronous copies: they are over at once
__device__ __forceinline__ void copy_16(float *stage, const float *x, bool inside)
{
    *reinterpret_cast<float4 *>(stage) = inside ? *reinterpret_cast<const float4 *>(x) : make_float4(0, 0, 0, 0);
}
__device__ __forceinline__ void close_stage() {}
__device__ __forceinline__ void wait_for_oldest_stage() {}
#endif

// Adds up values[0 .. COUNT) of the lanes, each in one lane: sum first + i is then values[i] of the lane, if it is
// below `end`; `first` is 0 and `end` COUNT before. A step halves the values that a lane has to do with, so that COUNT
// sums take about COUNT shuffles, not 5 COUNT.
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

// A product of rows of a matrix, at least TILE of them, with the states of a block's group: out[m][r] = W[m] . x[r].
//
// A pass takes stage_rows rows of x, and as many tiles of the matrix as there are warps. All threads call `begin`, then
// `run`; in between they may do anything but touch the ring. Columns before off_chip of the matrix come through L2.
struct Product {
    int rows, width, off_chip, stage_rows;
    float *ring;
    // What is multiplied: x, with so many rows of a matrix; and the place in x where the next stage comes from.
    const float *x;
    int matrix_rows;
    int next_row, next_round, next_k;

    __device__ __forceinline__ int tiles() const { return ceil_div(matrix_rows, TILE); }
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
        close_stage();  // an empty one too: stages are counted
    }

    __device__ __forceinline__ void begin(const float *states, int rows_of_matrix)
    {
        x = states;
        matrix_rows = rows_of_matrix;
        next_row = next_round = next_k = 0;
        for (int i = 0; i < STAGES - 1; ++i)
            fill_next_stage(i);
    }

    // Everybody sees `out`, and may begin the next product, when this returns. W (matrix_rows, width - off_chip) are
    // the columns in shared memory, W_all (matrix_rows, width) those and the others, in global memory.
    __device__ __forceinline__ void run(float *out, int pitch, const unsigned *W, const unsigned *W_all)
    {
        const int tiles_at_once = min(tiles(), WARPS), row_in_stage = warp() / tiles_at_once * ROWS;
        int slot = 0;
        for (int row = 0; row < rows; row += stage_rows)
            for (int round = 0; round < rounds(); ++round) {
                const int tile = round * WARPS + warp() % tiles_at_once;
                const bool active = row_in_stage < stage_rows && row + row_in_stage < rows && tile < tiles();
                // The last tile overlaps the one before it, rather than leave the matrix.
                const int first = min(tile * TILE, matrix_rows - TILE);
                float sums[TILE * ROWS] = {};
                for (int first_k = 0; first_k < width; first_k += CHUNK) {
                    const int k = first_k + 4 * lane(), W_width = width - off_chip;
                    const bool on_chip = first_k >= off_chip, multiplies = active && k < width;
                    FourWeights w[TILE];
                    if (multiplies && !on_chip)  // on their way while the stage is waited for
                        load(w, W_all + words(first * width + k), words(width));
                    wait_for_oldest_stage();
                    __syncthreads();  // it is there for all, and all have read the stage that is filled next
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

    // The tile's sums from row `skip` of the matrix on, which are nobody else's.
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

// ---- Logits ---------------------------------------------------------------------------------------------------------

// Draws the characters of the rows first, first + step, ... whose id is negative, from parts (blocks, group_rows,
// stride); ids lie in shared memory, logits as for sum_logits.
__device__ __forceinline__ void draw_from_parts(int *ids, float *logits, const float *parts, int group_rows, int stride,
                                                int blocks, const float *__restrict__ b_out,
                                                const float *__restrict__ uniforms, int first, int step, int rows,
                                                int V, const Options &options)
{
    for (int row = first; row < rows; row += step)
        if (ids[row] < 0) {  // the same for the whole block
            const float uniform = uniforms[row];
            sum_logits(logits, parts + row * stride, size_t(group_rows) * stride, blocks, b_out, V);
            const int id = draw(logits, uniform, V, options);
            if (threadIdx.x == 0)
                ids[row] = id;
            __syncthreads();  // everybody sees it, and has done with this draw
        }
}

// Draws the characters of the rows whose id is negative. outputs (V, pitch) are W_out h, one row of text beside the
// other; logits (rows, stride) is room for what is drawn from; all arrays but `uniforms` lie in shared memory.
__device__ __forceinline__ void draw_from_states(int *ids, float *logits, int stride, const float *outputs, int pitch,
                                                 const float *b_out, const float *__restrict__ uniforms, int rows,
                                                 int V, const Options &options)
{
    for (int e = threadIdx.x; e < rows * V; e += THREADS) {
        const int v = e % V, row = e / V;
        if (ids[row] < 0)
            logits[row * stride + v] = outputs[v * pitch + row] + b_out[v];
    }
    __syncthreads();
    for (int row = 0; row < rows; ++row)
        if (ids[row] < 0) {  // the same for the whole block
            const int id = draw(logits + row * stride, uniforms[row], V, options);
            if (threadIdx.x == 0)
                ids[row] = id;
            __syncthreads();  // everybody sees it, and has done with this draw
        }
}

// ---- All steps ------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
write_text(float *h, int *ids, int *ids_tr, float *states, float *partial_logits, unsigned *counters,
           const unsigned *__restrict__ weights, const float *__restrict__ biases, const float *__restrict__ P,
           const float *__restrict__ W_out, const float *__restrict__ b_out, const int *__restrict__ forced_tr,
           const float *__restrict__ uniforms_tr, int T, int R, int V, int H, int layers, int group_rows, int units,
           int stage_rows, int columns_off_chip, float temperature, int top_k, float top_p, float min_p)
{
    const int width = round_up(H, 8), blocks = ceil_div(width, units), matrices = 2 * layers - 1;
    const int group = blockIdx.x / blocks, block = blockIdx.x % blocks, first_unit = block * units;
    const int first_row = group * group_rows, rows = min(group_rows, R - first_row);
    const int gates = 3 * units;  // of this block, in a layer
    // Columns of W_hh and W_ih that come through L2; where W_out is on chip, none.
    const int off_chip = DRAWS == EVERY_BLOCK_FROM_STATES ? 0 : columns_off_chip;
    const int own_width = width - off_chip, matrix_words = gates * words(own_width);
    // Of W_out, a tile at least, ahead of W_hh of layer 0: one product may take both.
    const int out_rows = DRAWS == EVERY_BLOCK_FROM_STATES ? max(V, TILE) : 0;
    // Sums lie one row of text beside the other; the odd pitch spreads those of neighbouring units over the banks.
    const int padded_rows = round_up(group_rows, ROWS), pitch = padded_rows | 1;
    const int logits_stride = round_up(V, 4);
    const Options options = {temperature, top_k, top_p, min_p};

    // What is read 16 bytes at a time comes first, in multiples of 16 bytes.
    extern __shared__ __align__(16) float shared[];
    unsigned *own_weights = reinterpret_cast<unsigned *>(shared);  // (out_rows + matrices * gates, own_width)
    float *ring = shared + out_rows * words(width) + matrices * matrix_words;
    float *logits = ring + STAGES * stage_rows * CHUNK;
    float *own_states = logits + (DRAWS == EVERY_BLOCK_FROM_STATES ? group_rows : logits_shares(V)) * logits_stride;
    float *own_P = own_states + layers * units * padded_rows;  // (V, 3, units), behind (layers, units, padded_rows)
    float *own_W_out = own_P + V * gates;                      // (units, V), where parts are published
    float *own_biases = own_W_out + (DRAWS == EVERY_BLOCK_FROM_STATES ? 0 : V * units);  // of the rows of own_weights
    // a (gates, pitch), and ahead of it, in turns, i of the layers above the first and W_out h (out_rows, pitch).
    float *a = own_biases + out_rows + matrices * gates + max(out_rows, layers > 1 ? gates : 0) * pitch;
    const float *i = a - gates * pitch;
    // (group_rows,): the characters before a step; with OWNER, those that this block draws, and the forced ones.
    int *own_ids = reinterpret_cast<int *>(a + gates * pitch);

    const auto rows_of_matrix = [&](int m) {  // (gates, width), this block's
        return weights + (size_t(m) * blocks + block) * gates * words(width);
    };
    for (int m = 0; m < matrices; ++m) {
        const unsigned *source = rows_of_matrix(m) + words(off_chip);
        uint4 *own = reinterpret_cast<uint4 *>(own_weights + out_rows * words(width) + m * matrix_words);
        const int quads = words(own_width) / 4;  // of a row
#pragma unroll 8  // loads in flight
        for (int q = threadIdx.x; q < gates * quads; q += THREADS)
            own[q] = reinterpret_cast<const uint4 *>(source + q / quads * words(width))[q % quads];
        for (int gate = threadIdx.x; gate < gates; gate += THREADS)
            own_biases[out_rows + m * gates + gate] = biases[(size_t(m) * blocks + block) * gates + gate];
    }
    for (int e = threadIdx.x; e < V * gates; e += THREADS) {
        const int j = first_unit + e % units;
        own_P[e] = j < H ? P[size_t(e / units) * H + j] : 0.0f;
    }
    for (int row = threadIdx.x; row < rows; row += THREADS)
        own_ids[row] = ids[first_row + row];
    if (DRAWS == EVERY_BLOCK_FROM_STATES) {
#pragma unroll 8  // loads in flight
        for (int e = threadIdx.x; e < out_rows * words(width); e += THREADS) {
            const int v = e / words(width), word = e % words(width);
            own_weights[e] = v < V ? weights_word(W_out + size_t(v) * H, word, H) : 0;
        }
        for (int v = threadIdx.x; v < V; v += THREADS)
            own_biases[v] = b_out[v];
    } else {
        for (int e = threadIdx.x; e < V * units; e += THREADS) {
            const int j = first_unit + e % units, v = e / units;
            own_W_out[e % units * V + v] = j < H ? rounded(W_out[size_t(v) * H + j]) : 0.0f;
        }
    }

    const auto states_of = [&](int step, int layer) {
        return states + ((size_t(step % 2) * layers + layer) * R + first_row) * width;
    };
    const auto parts_of = [&](int step, int block_of_all) {
        return partial_logits + size_t(step % 2 * gridDim.x + block_of_all) * (group_rows * logits_stride);
    };
    unsigned *counter = counters + group * COUNTER_WORDS;
    unsigned arrivals = 0;  // the target of the next group_wait
    const auto arrive = [&] {
        group_arrive(counter);
        arrivals += blocks;
    };

    for (int layer = 0; layer < layers; ++layer)
        for (int e = threadIdx.x; e < units * padded_rows; e += THREADS) {
            const int j = first_unit + e % units, row = e / units;
            const float state = j < H && row < rows ? h[(size_t(layer) * R + first_row + row) * H + j] : 0.0f;
            own_states[(layer * units + e % units) * padded_rows + row] = state;
            if (j < width && row < rows)
                states_of(0, layer)[size_t(row) * width + j] = state;
        }
    arrive();
    group_wait(counter, arrivals);

    // All characters before step t that this block draws; the owner of a row says which it is.
    const auto draw_characters = [&](int t) {
        const size_t before = size_t(t - 1) * R + first_row;
        if (DRAWS == EVERY_BLOCK_FROM_STATES)
            draw_from_states(own_ids, logits, logits_stride, a - out_rows * pitch, pitch, own_biases,
                             uniforms_tr + before, rows, V, options);
        else
            draw_from_parts(own_ids, logits, parts_of(t, group * blocks), group_rows, logits_stride, blocks, b_out,
                            uniforms_tr + before, DRAWS == OWNER ? block : 0, DRAWS == OWNER ? blocks : 1, rows, V,
                            options);
        for (int row = block + blocks * threadIdx.x; row < rows; row += blocks * THREADS)
            ids[first_row + row] = ids_tr[before + row] = own_ids[row];
    };
    // The states of a layer after step t, once a and i are there.
    const auto move_states = [&](int t, int layer) {
        const float *b_hh = own_biases + out_rows + 2 * layer * gates, *b_ih = b_hh - gates;
        const int *ids_read = DRAWS == OWNER ? ids + first_row : own_ids;
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
            state = gru_unit(i_u[0], i_u[1], i_u[2], a_u[0], a_u[1], a_u[2], state);
            if (j < width)
                states_of(t + 1, layer)[size_t(row) * width + j] = state;
        }
    };

    Product product = {rows, width, off_chip, stage_rows, ring};
    for (int t = 0; t <= T; ++t)  // the last time only to draw
        for (int layer = 0; layer < layers; ++layer) {
            const bool drawing = layer == 0 && t > 0;
            bool any = false;  // character that is not forced
            if (drawing) {     // read before the wait, which hides the latency
                const int *forced = forced_tr + size_t(t - 1) * R + first_row;
                for (int row = threadIdx.x; row < rows; row += THREADS)
                    own_ids[row] = forced[row];
                for (int row = 0; row < rows; ++row)
                    any |= forced[row] < 0;
            }
            if (layer == 0 && DRAWS == OWNER) {
                group_wait(counter, arrivals);
                if (t < T)
                    product.begin(states_of(t, 0), gates);
                if (drawing)
                    draw_characters(t);
                if (t == T)
                    break;  // nobody would wait for this arrival, and it might come after the counters are set back
                arrive();
            }

            // Before the wait W_hh; after it W_ih, or in layer 0 W_out, which lies ahead of it. With one layer, where
            // every block draws, all take the states that are waited for. In one place, because the product is most of
            // the code.
            const bool W_hh_late = DRAWS != OWNER && layers == 1;
#pragma unroll 1
            for (int late = 0; late <= 1; ++late) {
                if (late)
                    group_wait(counter, arrivals);
                const int first = late ? -(layer > 0 ? gates : any ? out_rows : 0) : 0;
                const int end = late == W_hh_late && t < T ? gates : 0;
                if (first < end && (layer > 0 || DRAWS != OWNER))  // else it began before the drawing
                    product.begin(!late ? states_of(t, layer) : layer > 0 ? states_of(t + 1, layer - 1)
                                                                          : states_of(t, layers - 1), end - first);
                if (late && drawing && DRAWS == EVERY_BLOCK_FROM_PARTS)
                    draw_characters(t);
                if (first < end)
                    product.run(a + first * pitch, pitch,
                                own_weights + (out_rows + 2 * layer * gates + first) * words(own_width),
                                rows_of_matrix(max(2 * layer - (first < 0), 0)));
            }
            if (drawing && DRAWS == EVERY_BLOCK_FROM_STATES)
                draw_characters(t);
            if (t == T)
                break;

            move_states(t, layer);
            if (layer == layers - 1 && DRAWS != EVERY_BLOCK_FROM_STATES) {
                __syncthreads();  // the states of all units
                publish_logits<ROWS>(parts_of(t + 1, blockIdx.x), logits_stride, own_W_out,
                                     own_states + layer * units * padded_rows, rows, padded_rows, V, units);
            }
            arrive();
        }
    group_leave(counter, counter + 1, blocks);
    for (int layer = 0; layer < layers; ++layer)
        for (int e = threadIdx.x; e < units * rows; e += THREADS) {
            const int u = e % units, row = e / units;
            if (first_unit + u < H)
                h[(size_t(layer) * R + first_row + row) * H + first_unit + u] =
                    own_states[(layer * units + u) * padded_rows + row];
        }
}
