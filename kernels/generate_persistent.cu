// Generation, all steps of a call in one cooperative launch, with every weight on chip. Formulas and the arguments that
// it shares with the stepwise variant: generate.cu.
//
// states (2, layers, R, width) float32: what the blocks tell each other, the states before a step and after it in
// turns; width is H rounded up to a multiple of 8. partial_logits (blocks, group_rows, 4 ceil(V / 4)) float32: what
// the units of each block add to the logits. counters (groups, 32) uint32, zero before and after. weights (2 layers -
// 1, units of all blocks of a group, 3, width), float32 or bfloat16, and biases (2 layers - 1, units of all blocks, 3)
// float32, as `pack` writes them: matrix 2 l is W_hh of layer l, matrix 2 l - 1 its W_ih.
//
// Groups never wait for each other: group g owns group_rows rows of text. A block owns `units` units of every layer
// for all rows of its group: in shared memory, their rows of W_hh and W_ih, their columns of P and W_out, their
// states. The blocks of a group take its rows in turns for drawing. A warp owns UNITS units (with their three gates)
// by ROWS rows of a product; its lanes share the sum over k, four neighbours at a time. States pass through a ring of
// STAGES stages of stage_rows rows by 128 k, filled by asynchronous copies.
//
// A step, and what happens while others are waited for:
//   each layer   W_hh h of the step before | wait | W_ih times the states of the layer below, gates, publish | arrive
//   last layer   publishes its part of the logits too, with the barrier that its states need anyway
//   drawing      wait | the owner of a row sums the parts, draws and publishes the character | arrive
// That makes layers + 1 barriers per character; the one behind the drawing hides the product with W_hh of layer 0, the
// only product that one layer has. If every block drew for itself, that barrier would go, but every block would read
// all parts, and the product would have nothing to hide behind.
// Bytes per step: reads through L2, 4 R H of states per block and product, divided by the groups, and 4 blocks R V of
// partial logits in all; weights come from shared memory, once per stage_rows rows.
// Sums run in an order that the plan alone fixes.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".

#include "barrier.cuh"
#include "generate.cuh"
#include "generate_logits.cuh"
#include "mma.cuh"

#if !defined(ROWS) || !defined(UNITS) || !defined(STAGES)
#error "generate_persistent.cu needs ROWS and UNITS, of a warp's tile, and STAGES, of the ring"
#endif

constexpr int CHUNK = 4 * WARP;     // k of a stage: each lane takes four
constexpr int COUNTER_STRIDE = 32;  // a group's two counters fill a cache line
static_assert(STAGES >= 2, "one stage is filled while another is read");

// How many 32-bit words `count` weights take.
__device__ constexpr int words(int count) { return BF16 ? count / 2 : count; }

__device__ __forceinline__ float4 four_weights(const unsigned *at)
{
    if constexpr (BF16) {
        const uint2 pairs = *reinterpret_cast<const uint2 *>(at);
        return make_float4(__uint_as_float(pairs.x << 16), __uint_as_float(pairs.x & 0xffff0000u),
                           __uint_as_float(pairs.y << 16), __uint_as_float(pairs.y & 0xffff0000u));
    } else {
        return *reinterpret_cast<const float4 *>(at);
    }
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
        const auto weight = [&](int k) { return j < H && k < H ? W[(size_t(g) * H + j) * H + k] : 0.0f; };
        weights[i] = BF16 ? pack_bf16(weight(2 * word), weight(2 * word + 1)) : __float_as_uint(weight(word));
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

// A product of a block's rows of a matrix with the states of its group: out[3 u + g][r] = W[3 u + g] . x[r].
//
// A pass takes stage_rows rows of x, and as many tiles of units as there are warps. All threads call `begin`, then
// `run`; in between they may do anything but touch the ring.
struct Product {
    int rows, width, units, stage_rows;
    float *ring;
    // Where the next stage to be filled comes from: x, and the place in it.
    const float *x;
    int next_row, next_round, next_k, next_slot;

    __device__ __forceinline__ int unit_tiles() const { return ceil_div(units, UNITS); }
    __device__ __forceinline__ int rounds() const { return ceil_div(unit_tiles(), WARPS); }

    __device__ __forceinline__ void fill_next_stage()
    {
        if (next_row < rows) {
            float *stage = ring + next_slot * stage_rows * CHUNK + 4 * lane();
            const int k = next_k + 4 * lane();
#pragma unroll 1  // unrolled, it would take the registers that sums need
            for (int row = warp(); row < stage_rows; row += WARPS)
                copy_16(stage + row * CHUNK, x + size_t(next_row + row) * width + k,
                        next_row + row < rows && k < width);
            next_slot = next_slot + 1 < STAGES ? next_slot + 1 : 0;
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

    __device__ __forceinline__ void begin(const float *states)
    {
        x = states;
        next_row = next_round = next_k = next_slot = 0;
        for (int i = 0; i < STAGES - 1; ++i)
            fill_next_stage();
    }

    // Everybody sees `out`, and may begin the next product, when this returns.
    __device__ __forceinline__ void run(float *out, int pitch, const unsigned *W)
    {
        const int tiles = min(unit_tiles(), WARPS), row_in_stage = warp() / tiles * ROWS;
        int slot = 0;
        for (int row = 0; row < rows; row += stage_rows)
            for (int round = 0; round < rounds(); ++round) {
                const int tile = round * WARPS + warp() % tiles;
                const bool active = row_in_stage < stage_rows && row + row_in_stage < rows && tile < unit_tiles();
                // The last tile overlaps the one before it, rather than leave the matrix.
                const int unit = min(tile * UNITS, units - UNITS);
                float sums[3 * UNITS * ROWS] = {};
                for (int first_k = 0; first_k < width; first_k += CHUNK) {
                    wait_for_oldest_stage();
                    __syncthreads();  // it is there for all, and all have read the stage that is filled next
                    fill_next_stage();
                    const int k = first_k + 4 * lane();
                    if (active && k < width)
                        add_chunk(sums, W + 3 * unit * words(width) + words(k),
                                  ring + (slot * stage_rows + row_in_stage) * CHUNK + 4 * lane());
                    slot = slot + 1 < STAGES ? slot + 1 : 0;
                }
                if (active)
                    store(out + 3 * unit * pitch + row + row_in_stage, pitch, sums, 3 * (tile * UNITS - unit));
            }
        __syncthreads();
    }

    __device__ __forceinline__ void add_chunk(float (&sums)[3 * UNITS * ROWS], const unsigned *W,
                                              const float *stage) const
    {
        float4 x_k[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            x_k[r] = *reinterpret_cast<const float4 *>(stage + r * CHUNK);
#pragma unroll
        for (int g = 0; g < 3 * UNITS; ++g) {
            const float4 w = four_weights(W + g * words(width));
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float &sum = sums[g * ROWS + r];
                sum = fmaf(w.x, x_k[r].x, sum);
                sum = fmaf(w.y, x_k[r].y, sum);
                sum = fmaf(w.z, x_k[r].z, sum);
                sum = fmaf(w.w, x_k[r].w, sum);
            }
        }
    }

    // The tile's sums from gate `skip` on, which are nobody else's.
    __device__ __forceinline__ void store(float *out, int pitch, float (&sums)[3 * UNITS * ROWS], int skip) const
    {
        int first = 0, end = 3 * UNITS * ROWS;
        scatter_sums<3 * UNITS * ROWS, WARP / 2>(sums, first, end);
#pragma unroll
        for (int i = 0; i < values_per_lane(3 * UNITS * ROWS); ++i) {
            const int g = (first + i) / ROWS, r = (first + i) % ROWS;
            if (first + i < end && g >= skip)
                out[g * pitch + r] = sums[i];
        }
    }
};

// ---- All steps ------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
write_text(float *h, int *ids, int *ids_tr, float *states, float *partial_logits, unsigned *counters,
           const uint4 *__restrict__ weights, const float *__restrict__ biases, const float *__restrict__ P,
           const float *__restrict__ W_out, const float *__restrict__ b_out, const int *__restrict__ forced_tr,
           const float *__restrict__ uniforms_tr, int T, int R, int V, int H, int layers, int group_rows, int units,
           int stage_rows, float temperature, int top_k, float top_p, float min_p)
{
    const int width = round_up(H, 8), blocks = ceil_div(width, units), matrices = 2 * layers - 1;
    const int group = blockIdx.x / blocks, block = blockIdx.x % blocks, first_unit = block * units;
    const int first_row = group * group_rows, rows = min(group_rows, R - first_row);
    const int matrix_words = 3 * units * words(width);  // of this block
    // Gates lie one row of text beside the other; the odd pitch spreads those of neighbouring units over the banks.
    const int padded_rows = round_up(group_rows, ROWS), pitch = padded_rows | 1;
    const int logits_stride = round_up(V, 4);
    const Options options = {temperature, top_k, top_p, min_p};

    // What is read 16 bytes at a time comes first, in multiples of 16 bytes.
    extern __shared__ __align__(16) float shared[];
    unsigned *own_weights = reinterpret_cast<unsigned *>(shared);
    float *ring = shared + matrices * matrix_words;
    float *logits = ring + STAGES * stage_rows * CHUNK;
    float *own_states = logits + logits_shares(V) * logits_stride;  // (layers, units, padded_rows)
    float *own_P = own_states + layers * units * padded_rows;       // (V, 3, units)
    float *own_W_out = own_P + V * 3 * units;                       // (units, V)
    float *own_biases = own_W_out + units * V;                      // (matrices, units, 3)
    float *a = own_biases + matrices * 3 * units;                   // (units, 3, pitch)
    float *i = a + 3 * units * pitch;                               // the same, where there are layers above the first

    for (int m = 0; m < matrices; ++m) {
        const size_t quads = matrix_words / 4;
        const uint4 *source = weights + (size_t(m) * blocks + block) * quads;
#pragma unroll 8  // loads in flight
        for (int q = threadIdx.x; q < quads; q += THREADS)
            reinterpret_cast<uint4 *>(own_weights)[m * quads + q] = source[q];
        for (int gate = threadIdx.x; gate < 3 * units; gate += THREADS)
            own_biases[m * 3 * units + gate] = biases[(size_t(m) * blocks + block) * 3 * units + gate];
    }
    for (int e = threadIdx.x; e < V * 3 * units; e += THREADS) {
        const int j = first_unit + e % units;
        own_P[e] = j < H ? P[size_t(e / units) * H + j] : 0.0f;
    }
    for (int e = threadIdx.x; e < V * units; e += THREADS) {
        const int j = first_unit + e % units, v = e / units;
        own_W_out[e % units * V + v] = j < H ? rounded(W_out[size_t(v) * H + j]) : 0.0f;
    }

    const auto states_of = [&](int step, int layer) {
        return states + ((size_t(step % 2) * layers + layer) * R + first_row) * width;
    };
    unsigned *counter = counters + group * COUNTER_STRIDE;
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
    arrive();  // in place of the one behind the drawing

    Product product = {rows, width, units, stage_rows, ring};
    product.begin(states_of(0, 0));
    for (int t = 0; t < T; ++t) {
        for (int layer = 0; layer < layers; ++layer) {
            // W_hh before the wait, then W_ih: in one place, because the product is most of the code.
            for (int m = 2 * layer; m >= 0 && m >= 2 * layer - 1; --m) {
                if (m > 0)  // that of layer 0 began before the drawing
                    product.begin(m % 2 == 0 ? states_of(t, layer) : states_of(t + 1, layer - 1));
                product.run(m % 2 == 0 ? a : i, pitch, own_weights + m * matrix_words);
                if (m % 2 == 0)
                    group_wait(counter, arrivals);
            }
            const float *b_hh = own_biases + 2 * layer * 3 * units, *b_ih = b_hh - 3 * units;
            float *layer_states = own_states + layer * units * padded_rows;
            for (int e = threadIdx.x; e < units * rows; e += THREADS) {
                const int u = e % units, row = e / units, j = first_unit + u;
                float i_u[3], a_u[3];
#pragma unroll
                for (int g = 0; g < 3; ++g) {
                    const int gate = 3 * u + g;
                    a_u[g] = a[gate * pitch + row] + b_hh[gate];
                    i_u[g] = layer == 0 ? own_P[(ids[first_row + row] * 3 + g) * units + u]
                                        : i[gate * pitch + row] + b_ih[gate];
                }
                float &state = layer_states[u * padded_rows + row];
                state = gru_unit(i_u[0], i_u[1], i_u[2], a_u[0], a_u[1], a_u[2], state);
                if (j < width)
                    states_of(t + 1, layer)[size_t(row) * width + j] = state;
            }
            if (layer == layers - 1) {
                __syncthreads();  // the states of all units
                publish_logits<ROWS>(partial_logits + size_t(blockIdx.x) * group_rows * logits_stride, logits_stride,
                               own_W_out, layer_states, rows, padded_rows, V, units);
            }
            arrive();
        }
        group_wait(counter, arrivals);
        if (t + 1 < T)
            product.begin(states_of(t + 1, 0));
        for (int row = block; row < rows; row += blocks) {
            const size_t at = size_t(t) * R + first_row + row;
            const int forced = forced_tr[at];
            const float uniform = uniforms_tr[at];
            // For a forced character too: to know it first would be one more latency in a row.
            sum_logits(logits, partial_logits + (size_t(group) * blocks * group_rows + row) * logits_stride,
                       size_t(group_rows) * logits_stride, blocks, b_out, V);
            const int id = forced >= 0 ? forced : draw(logits, uniform, V, options);
            if (threadIdx.x == 0)
                ids[first_row + row] = ids_tr[at] = id;
        }
        if (t + 1 < T)
            arrive();  // the last one nobody would wait for, and it might come after the counters are set back
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
