// Back through time over a window in one launch: W_hh stays on chip from the last step to the first.
//
//   dh_t = dy_t W_y + z_{t+1} dh_{t+1} + W_hh^T da_{t+1}      (dh0: the same without the first term)
//   dn = dh_t (1 - z)       di_z = dn (h_{t-1} - n) z
//   di_n = dn (1 - n^2)     di_r = di_n a_n r (1 - r)           da_t = (di_r, di_z, di_n r)
//   db = sum of da          dP[v] = sum of di over the positions of id v
//
// Arguments, float32 but for the integers and the bf16 copy:
//   da_tb (T, B, 3H); in bf16 its copy da16_tb (T, B, 3H) instead, the operand of dW_hh. Where V = 0, another launch
//   sums by id: it needs da_tb, in bf16 too, and di_n_tb (T, B, H)
//   dh0 (B, H); dP_g (groups, V, 3H) and db_g (groups, 3H): sums over the rows of each group
//   dh_z_b (B, H): z dh of the step done last
//   exchange (2, row tiles, SPLITS WARPS K_GROUPS, X_GROUP) words; partial_sums (2, row tiles, ranges, ROWS, UNITS,
//   SPLITS) words; counters (2 groups, COUNTER_WORDS) uint32, for da and then for partial sums: all zero at first and
//   then left to the launches of one plan (words.cuh)
//   dy_tb (T, B, N) with W_y (N, H); or, where N = 0, dy_tb (T, B, H), which is added to dh as it is
//   W_hh (3H, H); h_tb (T+1, B, H), gates_tb (T, B, 3H), a_n_tb (T, B, H) from the forward pass; ids_tb (T, B) int32
//
// Tiles of rows, groups and exchange are as in gru_forward_persistent.cu, but blocks exchange da, which is three times
// as wide as h; a packet has the three gates of a unit. So K = 3H may be split among SPLITS blocks (split-K), which
// share a range of UNITS units of dh. Each of them gathers its part of da and hands its partial sums to the others, in
// tagged words of one fp32 each. When it has the sums of all splits, it adds them, in ascending order, for FINISHED of
// the units, and takes these through the gates.
//
// Two more results need no other launch. dy_t W_y is multiplied as N more rows of K, before a block waits for da: the
// gradient of the output layer's input never exists in memory. And a block adds di to the sums by id in shared memory,
// row by row, so that the order of each sum is fixed, while it waits for the other blocks.
//
// Bytes per step and block: 8 ROWS H / SPLITS from L2 for each row tile (fp32: 16); with more than one split 8 ROWS
// (UNITS + SPLITS FINISHED) of partial sums written and read; 24 ROWS FINISHED read (28 where N = 0) and 28 written, 16
// in bf16 (32 in both where V = 0). At B 64, H 1024 on an H100, K split in 4: tf32, 2 groups of 16 ranges, gathers 64
// KiB of da and 32 KiB of partial sums a block and step; bf16, 4 groups of 8 ranges, 32 KiB of each.
// Why not naive.cu's way: there every element of dh reads a row of da and a column of W_hh, 1.6 GB a step at these
// sizes, and every step is a launch. Here W_hh, 12.6 MB, is read once per group and window.
//
// Variants: fp32, tf32, bf16; gru.cu for sizes and GPUs that this one does not fit. plan/recurrence.py chooses.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".
#include "exchange.cuh"
#include "gru.cuh"
#include "resident.cuh"
#include "row_tiles.cuh"
#include "words.cuh"

#ifndef SPLITS
#error "the launcher defines SPLITS"
#endif

static_assert(VALUES == 3, "a packet has the three gates of a unit");
constexpr int UNITS = COLUMNS;
constexpr int FINISHED = ceil_div(UNITS, SPLITS);
constexpr int SUM_COLUMNS = 3 * FINISHED;  // of a sum by id: the three gates of the finished units
constexpr int ROWS_AT_A_TIME = 8;          // rows of di that a thread loads before it adds them
using Elements = OwnElements<FINISHED>;

// The fused output layer, dy_t W_y: N more rows of K, of which each warp multiplies `steps` steps. W_y stays on chip.
struct FusedOutput {
    int N, steps, first_step;
    unsigned *weights;  // of this warp

    // `all_weights` is WARPS steps WEIGHT_STEP words of shared memory; read(v, column) is 0 outside of W_y.
    template <class Read>
    __device__ __forceinline__ FusedOutput(unsigned *all_weights, int N, int split, Read read)
        : N(N), steps(ceil_div(ceil_div(N, STEP_K), SPLITS * WARPS)), first_step((split * WARPS + warp()) * steps),
          weights(all_weights + warp() * steps * WEIGHT_STEP)
    {
        for (int i = 0; i < steps; ++i) {
            const int v0 = (first_step + i) * STEP_K;
            store_weights(weights + i * WEIGHT_STEP, [=](int k, int column) { return read(v0 + k, column); });
        }
    }

    // Adds this warp's share for the tile whose first row is b0; dy is dy_tb[t].
    __device__ __forceinline__ void add_to(ResidentSums &product, const float *__restrict__ dy, int b0, int B) const
    {
        for (int i = 0; i < steps; ++i) {
            ResidentSums::Step y;
            y.load_each([=](int row, int k) {
                const int b = b0 + row, v = (first_step + i) * STEP_K + k;
                return b < B && v < N ? dy[size_t(b) * N + v] : 0.0f;
            });
            product.add(y, weights + i * WEIGHT_STEP);
        }
    }
};

// db and dP of the finished units: sums of da over all positions, by element in registers, and of di over the positions
// of each id, in shared memory. A tile leaves its di and ids in shared memory. They are added to dP when the next tile
// begins, while the block waits for the other blocks anyway.
struct GradientSums {
    int V;
    float *di;            // (ROWS, 3, FINISHED): of one tile
    float *dP;            // (V, 3, FINISHED)
    int *ids;             // (ROWS,): of the rows of di
    int rows_to_add = 0;  // of di, to dP
    int id;               // of row threadIdx.x of the tile that began last
    float db[Elements::COUNT][3] = {};

    __device__ __forceinline__ GradientSums(float *shared, int V)
        : V(V), di(shared), dP(di + ROWS * SUM_COLUMNS), ids(reinterpret_cast<int *>(dP + V * SUM_COLUMNS))
    {
        // di as well: begin_tile loads rows of it that no tile has, and adds them to nothing.
        for (int i = threadIdx.x; i < (ROWS + V) * SUM_COLUMNS; i += THREADS)
            di[i] = 0.0f;
    }

    // di of element i of this thread.
    __device__ __forceinline__ float &di_of(int i, int gate) const
    {
        return di[(Elements::row(i) * 3 + gate) * FINISHED + Elements::unit(i)];
    }

    // Loads the ids of a tile of `rows` rows, and adds di of the tile before it: row by row, a fixed order. All di and
    // sums of ROWS_AT_A_TIME rows are loaded before any sum is stored.
    __device__ __forceinline__ void begin_tile(const int *__restrict__ ids_of_tile, int rows)
    {
        id = V > 0 && int(threadIdx.x) < rows ? ids_of_tile[threadIdx.x] : 0;
        for (int column = threadIdx.x; column < SUM_COLUMNS && rows_to_add > 0; column += THREADS)
            for (int row = 0; row < rows_to_add; row += ROWS_AT_A_TIME) {
                float value[ROWS_AT_A_TIME], *sum[ROWS_AT_A_TIME];
#pragma unroll
                for (int i = 0; i < ROWS_AT_A_TIME; ++i) {
                    value[i] = di[(row + i) * SUM_COLUMNS + column];
                    sum[i] = dP + ids[row + i] * SUM_COLUMNS + column;
                }
#pragma unroll
                for (int i = 0; i < ROWS_AT_A_TIME; ++i)
                    if (row + i < rows_to_add)
                        *sum[i] += value[i];
            }
    }

    __device__ __forceinline__ void add(int i, const GRUCellGradient &gradient)
    {
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) {
            db[i][gate] += gradient.da[gate];
            di_of(i, gate) = gradient.di[gate];
        }
    }

    // Keeps the ids for the next begin_tile. A barrier of the block has to stand between the two calls.
    __device__ __forceinline__ void end_tile(int rows)
    {
        if (threadIdx.x < ROWS)
            ids[threadIdx.x] = id;
        rows_to_add = V > 0 ? rows : 0;
    }

    // Writes the group's dP and db for the hidden units from j0 on and before j_end. The threads put db of their
    // elements into the memory of di, where it is added row by row.
    __device__ __forceinline__ void write(float *dP_g, float *db_g, int group, int H, int j0, int j_end) const
    {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Elements::COUNT; ++i)
            if (Elements::row(i) < ROWS)
#pragma unroll
                for (int gate = 0; gate < 3; ++gate)
                    di_of(i, gate) = db[i][gate];
        __syncthreads();
        for (int i = threadIdx.x; i < (V + 1) * SUM_COLUMNS; i += THREADS) {
            const int v = i / SUM_COLUMNS, column = i % SUM_COLUMNS, j = j0 + column % FINISHED;
            if (j >= j_end)
                continue;
            float sum = 0.0f;
            if (v < V)
                sum = dP[i];
            else
                for (int row = 0; row < ROWS; ++row)
                    sum += di[row * SUM_COLUMNS + column];
            float *result = v < V ? dP_g + (size_t(group) * V + v) * 3 * H : db_g + size_t(group) * 3 * H;
            result[column / FINISHED * H + j] = sum;
        }
    }
};

// The forward pass's results for one element, and, where N = 0, the gradient that reaches it from outside.
struct Saved {
    float r, z, n, a_n, h_before, dy;
};

// Adds to dh the products of this thread's elements over all of K. `sums` holds this split's after reduce_warps; with
// more than one split, the range exchanges them through partial_sums (ROWS, UNITS, SPLITS), with `tag`.
__device__ __forceinline__ void add_products(float (&dh)[Elements::COUNT], const Elements &own, int tile, int split,
                                             const float *sums, Word *partial_sums, unsigned tag)
{
    constexpr int COUNT = Elements::COUNT;
    float sum[COUNT];
    if constexpr (SPLITS == 1) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            sum[i] = sum_of(sums, min(own.row(i), ROWS - 1), own.unit(i));
    } else {
        for (int i = threadIdx.x; i < ROWS * UNITS; i += THREADS)
            store_word(partial_sums + i * SPLITS + split,
                       word_of(__float_as_uint(sum_of(sums, i / UNITS, i % UNITS)), tag));
        const Word *from[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i)  // a thread without an element i reads another one's
            from[i] = partial_sums + (min(own.row(i), ROWS - 1) * UNITS +
                                      min(split * FINISHED + own.unit(i), UNITS - 1)) * SPLITS;
        Word words[COUNT][ceil_div(SPLITS, 2)][2];
        unsigned wrong;
        do {
            wrong = 0;
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
#pragma unroll
                for (int s = 0; s < SPLITS / 2; ++s)
                    load_two_words(words[i][s], from[i] + 2 * s);
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
#pragma unroll
                for (int s = 0; s < SPLITS; ++s)
                    wrong |= upper_half(words[i][s / 2][s % 2]) ^ tag;
        } while (any_missing(wrong, from[0], tag, ~0u));
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            sum[i] = 0.0f;
#pragma unroll
            for (int s = 0; s < SPLITS; ++s)
                sum[i] += __uint_as_float(lower_half(words[i][s / 2][s % 2]));
        }
    }
    own.each(tile, [&](int i, int, int) { dh[i] += sum[i]; });
}

// One block: x counts the splits of the first range of the first group, then those of its second range, ...
extern "C" __global__ void __launch_bounds__(THREADS, 1)
gru_backward_persistent(float *__restrict__ da_tb, unsigned short *__restrict__ da16_tb, float *__restrict__ di_n_tb,
                        float *__restrict__ dh0, float *__restrict__ dP_g, float *__restrict__ db_g, float *dh_z_b,
                        Word *exchange, Word *partial_sums, unsigned *counters,
                        const float *__restrict__ dy_tb, const float *__restrict__ W_y, const float *__restrict__ W_hh,
                        const float *__restrict__ h_tb, const float *__restrict__ gates_tb,
                        const float *__restrict__ a_n_tb, const int *__restrict__ ids_tb, int T, int B, int H, int N,
                        int V, int groups)
{
    const int blocks = gridDim.x / groups, group = blockIdx.x / blocks, split = blockIdx.x % SPLITS;
    const int ranges = blocks / SPLITS, range = blockIdx.x % blocks / SPLITS;
    const RowTiles tiles(B, groups, group);
    const int j0 = range * UNITS, j_end = min(j0 + UNITS, H);
    const Elements own = {B, j0 + split * FINISHED, j_end};
    // The exchanges of da of the last step and of the partial sums ahead of it; a step further back, a number more.
    const unsigned first = first_number(counters, group), first_sums = first_number(counters, groups + group);
    // da of a tile in step t, as the product reads it; one split of K after the other.
    const auto exchanged = [=](int t, int tile) {
        return exchange + ((first + T - 1 - t) % 2 * tiles.all + tile) * SPLITS * X_WORDS;
    };
    // Hands da of one row of a tile and one unit in step t to the group.
    const auto publish = [=](int t, int tile, int row, int j, const float (&da)[3]) {
        store_packet(exchanged(t, tile) + place_of(row, j), da, tag_of(first + T - 1 - t));
    };

    extern __shared__ __align__(16) unsigned shared[];
    ResidentWeights weights;
    const int first_unit = split * WARPS * K_GROUPS * GROUP_PACKETS;  // of this split: a packet has a unit's gates
    weights.load(shared, [=](int packet, int gate, int column) {
        const int unit = first_unit + packet, j = j0 + column;
        return column < UNITS && j < H && unit < H ? W_hh[(size_t(gate) * H + unit) * H + j] : 0.0f;
    });
    unsigned *output_weights = shared + ResidentWeights::SHARED_WORDS;
    const FusedOutput output(output_weights, N, split, [=](int v, int column) {
        const int j = j0 + column;
        return column < UNITS && j < H && v < N ? W_y[size_t(v) * H + j] : 0.0f;
    });
    float *sums = reinterpret_cast<float *>(output_weights + WARPS * output.steps * WEIGHT_STEP);
    GradientSums gradient_sums(sums + SUMS, V);
    __syncthreads();

    for (int t = T - 1; t >= -1; --t)  // step -1 stands for the initial state: it only computes dh0
        for (int tile = tiles.first; tile < tiles.end; ++tile) {
            Saved saved[Elements::COUNT];
            float dh[Elements::COUNT] = {};
            own.each(tile, [&](int i, int b, int j) {
                dh[i] = t + 1 < T ? dh_z_b[size_t(b) * H + j] : 0.0f;  // this thread wrote it
                if (t < 0)
                    return;
                const size_t row = size_t(t) * B + b;
                const float *gates = gates_tb + row * 3 * H + j;
                saved[i] = {gates[0], gates[H], gates[2 * H], a_n_tb[row * H + j], h_tb[row * H + j],
                            N == 0 ? dy_tb[row * H + j] : 0.0f};
            });
            const int rows = min(ROWS, B - tile * ROWS);
            gradient_sums.begin_tile(ids_tb + size_t(max(t, 0)) * B + tile * ROWS, t < 0 ? 0 : rows);

            ResidentSums product;
            if (t >= 0)
                output.add_to(product, dy_tb + size_t(t) * B * N, tile * ROWS, B);
            if (t + 1 < T)
                weights.multiply(product, exchanged(t + 1, tile) + split * X_WORDS, H - first_unit,
                                 tag_of(first + T - 2 - t));
            product.reduce_warps(sums);
            const unsigned number = first_sums + T - 1 - t;
            const size_t range_of_tile = (size_t(number % 2) * tiles.all + tile) * ranges + range;
            add_products(dh, own, tile, split, sums, partial_sums + range_of_tile * ROWS * UNITS * SPLITS, number + 1);

            GRUCellGradient gradient[Elements::COUNT] = {};  // left undefined, it would take more registers
            if (t < 0) {
                own.each(tile, [&](int i, int b, int j) { dh0[size_t(b) * H + j] = dh[i]; });
                gradient_sums.end_tile(0);
                __syncthreads();  // before the next tile's sums overwrite this tile's
                continue;
            }
            own.each(tile, [&](int i, int b, int j) {
                const Saved &cell = saved[i];
                dh[i] += cell.dy;
                gradient[i] = gru_cell_gradient(dh[i], cell.r, cell.z, cell.n, cell.a_n, cell.h_before);
            });
#pragma unroll
            for (int i = 0; i < Elements::COUNT; ++i)  // outside the batch, too, where da is zero
                if (own.row(i) < ROWS && own.j0 + own.unit(i) < j_end)
                    publish(t, tile, own.row(i), own.j0 + own.unit(i), gradient[i].da);
            own.each(tile, [&](int i, int, int) { gradient_sums.add(i, gradient[i]); });
            gradient_sums.end_tile(rows);
            __syncthreads();  // before the next product's sums overwrite this one's
            own.each(tile, [&](int i, int b, int j) {
                const size_t row = size_t(t) * B + b;
                dh_z_b[size_t(b) * H + j] = dh[i] * saved[i].z;
                if (V == 0)
                    di_n_tb[row * H + j] = gradient[i].di[2];
#pragma unroll
                for (int gate = 0; gate < 3; ++gate) {
                    if (PRECISION == 2)
                        da16_tb[(row * 3 + gate) * H + j] = to_bf16(gradient[i].da[gate]);
                    if (PRECISION != 2 || V == 0)
                        da_tb[(row * 3 + gate) * H + j] = gradient[i].da[gate];
                }
            });
        }
    gradient_sums.write(dP_g, db_g, group, H, own.j0, j_end);
    if (threadIdx.x == 0) {
        leave_group(counters, group, blocks, T);
        if (SPLITS > 1)
            leave_group(counters, groups + group, blocks, T + 1);
    }
}
