// Generation, all steps of a call in one cooperative launch, with every weight on chip, or as many as fit. Formulas and
// the arguments that it shares with the stepwise variant: generate.cu.
//
// Why not the plain way, generate.cu: at H 1024 it reads 12.6 MB of W_hh per character, in three launches of about 2 us
// each. Here W_hh stays on chip; per character and row, a block reads 8 KB of states and waits twice for other blocks.
//
// Blocks hand each other words with tags (words.cuh), numbered: before step t, exchange t of the launch.
// states (2, layers, R, width) words: the states before a step; width is H rounded up to a multiple of 8.
// partial_logits (2, blocks of all groups, group_rows, 4 ceil(V / 4)) words: the sums of the logits over the units of
// each block; nobody writes those from V on. characters (2, groups, group_rows, 2) words: the character before a step,
// from the block that owns the row for drawing; the second word of a row is never written. There are no partial_logits
// before step 0. counters (groups, COUNTER_WORDS).
// weights (2 layers - 1, units of all blocks of a group, 3, width), float32 or bfloat16, and biases (2 layers - 1,
// units of all blocks, 3) float32, as pack_weights writes them: matrix 2 l is W_hh of layer l, matrix 2 l - 1 its W_ih.
// off_chip: so many columns of each of these matrices, a multiple of 128 or all, lie in no block's shared memory.
//
// Groups never wait for each other: group g owns group_rows rows of text. A block owns `units` units of every layer for
// all rows of its group: in shared memory, their rows of W_hh and W_ih (but for the columns off chip), their columns of
// P and W_out, and their states. The blocks of a group own its rows in turns for drawing. A warp owns TILE rows of a
// matrix by ROWS rows of a product; its lanes share the sum over k, four neighbours at a time.
// States of gathered_rows rows and CHUNKS chunks of 128 k are in shared memory at a time.
//
// A step, and what a block waits for:
//   drawing      the owner of a row: its partial_logits of all blocks | their sum, draws and publishes the character
//   layer 0      the states before the step | W_hh h | the characters | gates, publishes states
//   layer 1...   the states before the step | W_hh h | the states of the layer below after it | W_ih times these,
//                gates, publishes states
//   last layer   publishes partial_logits
// Whoever writes exchange t + 2 of states, partial_logits or characters, in step t + 1 or later, has all states before
// step t + 1 of layer 0. The blocks wrote these in step t, after they had read all that is before step t: states of
// layer 0 and partial_logits and characters in that step; states of a layer above, as those of the layer below after
// step t - 1, in that step, and as its own before step t, in step t, ahead of its own states before step t + 1, which
// the next step reads before it writes.
//
// Bytes per step: reads through L2, 8 R H of states per block and product, once more for each further round of its
// warps over the matrix where CHUNKS chunks are not all, divided by the groups, and 8 blocks R V of partial_logits by
// the owners. Weights come from shared memory, or through L2, once per ROWS rows. Bytes per launch: reads all weights.
// Sums run in an order that the plan alone fixes; it does not depend on which weights are off chip.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".

#include "generate.cuh"
#include "generate_logits.cuh"
#include "gru.cuh"

#if !defined(ROWS) || !defined(TILE_UNITS) || !defined(CHUNKS)
#error "the launcher defines ROWS and TILE_UNITS, of a warp's tile, and CHUNKS, of k of states in shared memory"
#endif

constexpr int TILE = 3 * TILE_UNITS;           // rows of a matrix that a warp multiplies: the gates of its units
constexpr int CHUNK = 4 * WARP;                // k that a warp multiplies at a time: each lane takes four
constexpr int PART = CHUNKS * CHUNK;           // k of states that are in shared memory at a time
constexpr int GATHERED = ROWS < 4 ? ROWS : 4;  // chunks of states that a warp has on their way at a time

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

// A product of `gates` rows of a matrix, at least TILE of them, with `rows` rows of states: out[m][r] = W[m] . x[r].
//
// A pass takes gathered_rows rows of x, and as many tiles of the matrix as there are warps. Columns before off_chip of
// the matrix come through L2.
struct Product {
    int rows, width, off_chip, gathered_rows, gates;
    float *gathered;  // (gathered_rows, PART), in shared memory

    __device__ __forceinline__ int tiles() const { return ceil_div(gates, TILE); }
    __device__ __forceinline__ int rounds() const { return ceil_div(tiles(), WARPS); }

    // Brings x[row ...][first_k ...], of x (rows, width), to shared memory as soon as it shows the tag; zero beyond x.
    __device__ __forceinline__ void gather(const Word *x, unsigned tag, int row, int first_k) const
    {
        for (int first = warp(); first < gathered_rows * CHUNKS; first += GATHERED * WARPS) {
            Word words[2 * GATHERED][2];
            const Word *from[2 * GATHERED];
            int needed[2 * GATHERED];
#pragma unroll
            for (int i = 0; i < GATHERED; ++i) {
                const int chunk = first + i * WARPS, r = row + chunk / CHUNKS;
                const int k = first_k + chunk % CHUNKS * CHUNK + 4 * lane();
                const bool inside = chunk < gathered_rows * CHUNKS && r < rows && k < width;
                from[2 * i] = inside ? x + size_t(r) * width + k : x;
                from[2 * i + 1] = inside ? from[2 * i] + 2 : x;
                needed[2 * i] = needed[2 * i + 1] = inside ? 2 : 0;
            }
            load_words(words, from, needed, tag);
#pragma unroll
            for (int i = 0; i < GATHERED; ++i)
                if (first + i * WARPS < gathered_rows * CHUNKS)
                    *reinterpret_cast<float4 *>(gathered + (first + i * WARPS) * CHUNK + 4 * lane()) =
                        make_float4(value_of(words[2 * i][0]), value_of(words[2 * i][1]),
                                    value_of(words[2 * i + 1][0]), value_of(words[2 * i + 1][1]));
        }
    }

    // For all threads, which all see `out` when this returns. W (gates, width - off_chip), in shared memory, holds the
    // columns of the matrix from off_chip on; W_all (gates, width), in global memory, holds them all.
    __device__ __forceinline__ void run(float *out, int pitch, const unsigned *W, const unsigned *W_all, const Word *x,
                                        unsigned tag) const
    {
        const int tiles_at_once = min(tiles(), WARPS), row_in_pass = warp() / tiles_at_once * ROWS;
        const int W_width = width - off_chip;
        for (int row = 0; row < rows; row += gathered_rows)
            for (int round = 0; round < rounds(); ++round) {
                const int tile = round * WARPS + warp() % tiles_at_once;
                const bool active = row_in_pass < gathered_rows && row + row_in_pass < rows && tile < tiles();
                // The last tile overlaps the one before it where it would go beyond the matrix.
                const int first = min(tile * TILE, gates - TILE);
                float sums[TILE * ROWS] = {};
                for (int part = 0; part < width; part += PART) {
                    if (round == 0 || width > PART) {
                        __syncthreads();  // all have read the part before
                        gather(x, tag, row, part);
                        __syncthreads();
                    }
                    const float *x_k = gathered + row_in_pass * PART + 4 * lane();
                    for (int k = part + 4 * lane(); active && k < min(part + PART, width); k += CHUNK) {
                        FourWeights w[TILE];
                        if (k - 4 * lane() < off_chip)
                            load(w, W_all + words(first * width + k), words(width));
                        else
                            load(w, W + words(first * W_width + k - off_chip), words(W_width));
                        add_chunk(sums, w, x_k);
                        x_k += CHUNK;
                    }
                }
                if (active)
                    store(out + first * pitch + row + row_in_pass, pitch, sums, tile * TILE - first);
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
                                              const float *x) const
    {
        float4 w[TILE];
#pragma unroll
        for (int m = 0; m < TILE; ++m)
            w[m] = unpacked(weights[m]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float4 x_k = *reinterpret_cast<const float4 *>(x + r * PART);
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
    Word *states, *partial_logits, *characters;
    unsigned *counters;
    const unsigned *weights;
    const float *biases, *P, *W_out, *b_out;
    const int *forced_tr;
    const float *uniforms_tr;
    int T, R, V, H, layers, group_rows, units, gathered_rows, off_chip;
    Options options;
    float *shared;  // dynamic shared memory
};

// A block: the rows and units that it owns, and its shared memory. All functions are for all of its threads.
struct Block : Arguments {
    int width = round_up(H, 8), blocks = ceil_div(width, units), matrices = 2 * layers - 1;
    int group = blockIdx.x / blocks, block = blockIdx.x % blocks;
    unsigned number = first_number(counters, group);  // of the exchange before step 0
    int first_unit = block * units, gates = 3 * units;  // gates of this block, in a layer
    int first_row = group * group_rows, rows = min(group_rows, R - first_row);
    int own_width = width - off_chip;  // columns of a matrix in shared memory
    // In a and i, the rows of text of one gate are neighbours; the odd pitch spreads neighbouring gates over the banks.
    int padded_rows = round_up(group_rows, ROWS), pitch = padded_rows | 1;
    int logits_stride = round_up(V, 4);

    // Shared memory. Arrays that are read 16 bytes at a time come first, in multiples of 16 bytes.
    unsigned *own_weights = reinterpret_cast<unsigned *>(shared);         // (matrices, gates, own_width)
    float *gathered = shared + matrices * gates * words(own_width);       // (gathered_rows, PART)
    float *logits = gathered + gathered_rows * PART;                      // of one row, for sum_partial_logits
    float *own_states = logits + logits_shares(V) * logits_stride;        // (layers, units, padded_rows)
    float *own_P = own_states + layers * units * padded_rows;             // (V, 3, units)
    float *own_W_out = own_P + V * gates;                                 // (units, V)
    float *own_biases = own_W_out + V * units;                            // (matrices, gates)
    float *a = own_biases + matrices * gates;                             // (gates, pitch): W_hh h
    float *i = a + gates * pitch;                                         // (gates, pitch) above layer 0: W_ih x
    // (group_rows,): the characters before a step, negative where they are not known yet.
    int *own_ids = reinterpret_cast<int *>(layers > 1 ? i + gates * pitch : i);

    Product product{rows, width, off_chip, gathered_rows, gates, gathered};

    // This block's rows of matrix m (gates, width), in global memory.
    __device__ __forceinline__ const unsigned *rows_of_matrix(int m) const
    {
        return weights + (size_t(m) * blocks + block) * gates * words(width);
    }

    // The words of the exchange before step t, and their tag.
    __device__ __forceinline__ unsigned tag(int t) const { return number + t + 1; }

    // The states of a layer, of this group's rows (rows, width).
    __device__ __forceinline__ Word *states_of(int t, int layer) const
    {
        return states + ((size_t((number + t) % 2) * layers + layer) * R + first_row) * width;
    }

    // The partial_logits (group_rows, logits_stride) of block `block` of the grid.
    __device__ __forceinline__ Word *partial_logits_of(int t, int block) const
    {
        return partial_logits + size_t((number + t) % 2 * gridDim.x + block) * (group_rows * logits_stride);
    }

    // The characters (group_rows, 2) of the group.
    __device__ __forceinline__ Word *characters_of(int t) const
    {
        return characters + size_t((number + t) % 2 * (gridDim.x / blocks) + group) * (group_rows * 2);
    }

    __device__ __forceinline__ void publish_state(int t, int layer, int row, int j, float state) const
    {
        if (j < width)
            store_word(states_of(t, layer) + size_t(row) * width + j, word_with(state, tag(t)));
    }

    __device__ __forceinline__ void publish_character(int t, int row, int id) const
    {
        store_word(characters_of(t) + 2 * row, word_of(id, tag(t)));
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
#pragma unroll 1  // a block often has fewer gates, rows and states than threads
            for (int gate = threadIdx.x; gate < gates; gate += THREADS)
                own_biases[m * gates + gate] = biases[(size_t(m) * blocks + block) * gates + gate];
        }
        for (int e = threadIdx.x; e < V * gates; e += THREADS) {
            const int j = first_unit + e % units;
            own_P[e] = j < H ? P[size_t(e / units) * H + j] : 0.0f;
        }
        for (int e = threadIdx.x; e < V * units; e += THREADS) {
            const int j = first_unit + e % units, v = e / units;
            own_W_out[e % units * V + v] = j < H ? rounded(W_out[size_t(v) * H + j]) : 0.0f;
        }
#pragma unroll 1
        for (int row = threadIdx.x; row < rows; row += THREADS)
            if (row % blocks == block)
                publish_character(0, row, own_ids[row] = ids[first_row + row]);
            else
                own_ids[row] = -1;
        for (int layer = 0; layer < layers; ++layer)
#pragma unroll 1
            for (int e = threadIdx.x; e < units * padded_rows; e += THREADS) {
                const int u = e % units, row = e / units, j = first_unit + u;
                const float state = j < H && row < rows ? h[(size_t(layer) * R + first_row + row) * H + j] : 0.0f;
                own_states[(layer * units + u) * padded_rows + row] = state;
                if (row < rows)
                    publish_state(0, layer, row, j, state);
            }
    }

    // The characters before step t: those that are forced and those that this block draws, which it publishes, into
    // own_ids.
    __device__ __forceinline__ void draw(int t)
    {
        const size_t before = size_t(t - 1) * R + first_row;
#pragma unroll 1
        for (int row = threadIdx.x; row < rows; row += THREADS)
            own_ids[row] = forced_tr[before + row];
        __syncthreads();
        const Word *of_group = partial_logits_of(t, group * blocks);
        for (int row = block; row < rows; row += blocks) {
            int id = own_ids[row];  // the same for the whole block
            if (id < 0) {
                const float uniform = uniforms_tr[before + row];
                sum_partial_logits(logits, of_group + row * logits_stride, size_t(group_rows) * logits_stride, tag(t),
                                   blocks, b_out, V);
                id = draw_character(logits, uniform, V, options);
                __syncthreads();  // all threads have done with `logits`, and with own_ids
                if (threadIdx.x == 0)
                    own_ids[row] = id;
            }
            if (threadIdx.x == 0) {
                publish_character(t, row, id);
                ids_tr[before + row] = id;
                if (t == T)
                    ids[first_row + row] = id;
            }
        }
    }

    // The states of a layer after step t, from a and i.
    __device__ __forceinline__ void move_states(int t, int layer)
    {
        const float *b_hh = own_biases + 2 * layer * gates, *b_ih = b_hh - gates;
#pragma unroll 1
        for (int e = threadIdx.x; e < units * rows; e += THREADS) {
            const int u = e % units, row = e / units;
            float i_u[3], a_u[3];
#pragma unroll
            for (int g = 0; g < 3; ++g) {
                const int gate = 3 * u + g;
                a_u[g] = a[gate * pitch + row] + b_hh[gate];
                i_u[g] = layer == 0 ? own_P[(own_ids[row] * 3 + g) * units + u] : i[gate * pitch + row] + b_ih[gate];
            }
            float &state = own_states[(layer * units + u) * padded_rows + row];
            state = gru_cell(i_u, a_u, state).h;
            publish_state(t + 1, layer, row, first_unit + u, state);
        }
    }

    // Step t: the characters before it, then all layers. Step T is only the characters.
    __device__ __forceinline__ void step(int t)
    {
        if (t > 0)
            draw(t);
        if (t == T)
            return;
        for (int layer = 0; layer < layers; ++layer) {
            // One loop, because the product, which is inlined, is most of the machine code.
#pragma unroll 1
            for (int W_ih = 0; W_ih <= (layer > 0); ++W_ih) {
                const int matrix = 2 * layer - W_ih;
                product.run(W_ih ? i : a, pitch, own_weights + matrix * gates * words(own_width),
                            rows_of_matrix(matrix), states_of(t + W_ih, layer - W_ih), tag(t + W_ih));
            }
            if (layer == 0)
                read_characters(own_ids, characters_of(t), tag(t), rows);
            move_states(t, layer);
        }
        __syncthreads();  // the states of all units
        publish_partial_logits<ROWS>(partial_logits_of(t + 1, blockIdx.x), logits_stride, tag(t + 1), own_W_out,
                                     own_states + (layers - 1) * units * padded_rows, rows, padded_rows, V, units);
    }

    __device__ __forceinline__ void save() const
    {
        for (int layer = 0; layer < layers; ++layer)
#pragma unroll 1
            for (int e = threadIdx.x; e < units * rows; e += THREADS) {
                const int u = e % units, row = e / units;
                if (first_unit + u < H)
                    h[(size_t(layer) * R + first_row + row) * H + first_unit + u] =
                        own_states[(layer * units + u) * padded_rows + row];
            }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
generate_persistent(float *h, int *ids, int *ids_tr, Word *states, Word *partial_logits, Word *characters,
                    unsigned *counters, const unsigned *__restrict__ weights, const float *__restrict__ biases,
                    const float *__restrict__ P, const float *__restrict__ W_out, const float *__restrict__ b_out,
                    const int *__restrict__ forced_tr, const float *__restrict__ uniforms_tr, int T, int R, int V,
                    int H, int layers, int group_rows, int units, int gathered_rows, int off_chip,
                    float temperature, int top_k, float top_p, float min_p)
{
    extern __shared__ __align__(16) float shared[];
    Block block{{h, ids, ids_tr, states, partial_logits, characters, counters, weights, biases, P, W_out, b_out,
                 forced_tr, uniforms_tr, T, R, V, H, layers, group_rows, units, gathered_rows, off_chip,
                 {temperature, top_k, top_p, min_p}, shared}};
    block.load();
    for (int t = 0; t <= T; ++t)
        block.step(t);
    if (threadIdx.x == 0)
        leave_group(counters, block.group, block.blocks, T + 1);
    block.save();
}
