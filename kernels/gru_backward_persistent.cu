// Back through time over a window in one launch, the weights on chip from the last step to the first.
//
//   dh_t = dy_t W_y + z_{t+1} dh_{t+1} + W_hh^T da_{t+1}      (dh0: the same without the first term)
//   dn = dh_t (1 - z)       di_z = dn (h_{t-1} - n) z
//   di_n = dn (1 - n^2)     di_r = di_n a_n r (1 - r)           da_t = (di_r, di_z, di_n r)
//   db = sum of da          dP[v] = sum of di over the positions of id v
//
// Arguments, float32 but for the integers and the bf16 copy:
//   da_tb (T, B, 3H), and in bf16 da16_tb (T, B, 3H) bf16, which dW_hh then takes in its place; where V = 0, for those
//   who sum by id themselves, di_n_tb (T, B, H), and da_tb in bf16, too; dh0 (B, H); dP_g (groups, V, 3H) and
//   db_g (groups, 3H): sums over the rows of each group; dh_z_b (B, H): z dh of the step before
//   exchange (2, row tiles, SPLITS WARPS K_STEPS, X_STEP) words, zero where k >= 3H; partials (row tiles, ranges, SPLITS,
//   ROWS, UNITS); counters (groups, 1 + ranges, 2 COUNTER_WORDS) uint32, zero between launches
//   dy_tb (T, B, N) with W_y (N, H); or, where N = 0, dy_tb (T, B, H), to which no product is left to do
//   W_hh (3H, H); h_tb (T+1, B, H), gates_tb (T, B, 3H), a_n_tb (T, B, H) from the forward pass; ids_tb (T, B) int32
//
// Tiles of rows, groups, exchange and barriers are as in gru_forward_persistent.cu; here da is gathered, three times as
// wide as h. So K = 3H may be split among SPLITS blocks: they share a range of UNITS units of dh, each gathers its part
// of da, and after a barrier of their own each adds their sums, in ascending order, for FINISHED of the units, and takes
// these through the gates. dy_t W_y is N more rows of K that are there before anybody waits; dh from the output layer
// never exists in memory. While the others arrive, a block saves da and adds di to its sums by id, in shared memory, row
// by row: a fixed order.
//
// Per step and block: 4 ROWS * 8 WARPS K_STEPS bytes from L2 for each row tile (3H / SPLITS elements for each row),
// with more than one split 4 ROWS (UNITS + SPLITS FINISHED) bytes of partial sums written and read, 24 ROWS FINISHED
// bytes read (28 where N = 0) and 28 written, 16 in bf16 (32 in both where V = 0).
// At B 64, H 1024 on an H100: tf32, 2 groups of 16 ranges and 4 splits, gathers 96 KiB a block and step (unsplit, 384);
// bf16, 4 groups of 32 ranges, unsplit, 96 KiB.
//
// Variants: fp32, tf32, bf16; gru.cu for sizes and GPUs that this one does not fit. plan.py chooses.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".
#include "barrier.cuh"
#include "resident.cuh"

#ifndef SPLITS
#error "the launcher defines SPLITS"
#endif

constexpr int UNITS = COLUMNS;
constexpr int FINISHED = ceil_div(UNITS, 2 * SPLITS) * 2;  // even: two bf16 of a word come from one block
constexpr int PAIRS = ceil_div(ROWS * FINISHED, THREADS);  // of a row and a unit, that a thread takes through the gates
constexpr int ROWS_AT_A_TIME = 8;                          // that are on their way to the sums by id

// One block: x counts the splits of the first range of the first group, then those of its second range, ...
extern "C" __global__ void __launch_bounds__(THREADS, 1)
gru_backward_persistent(float *__restrict__ da_tb, unsigned short *__restrict__ da16_tb, float *__restrict__ di_n_tb,
                        float *__restrict__ dh0, float *__restrict__ dP_g, float *__restrict__ db_g, float *dh_z_b,
                        unsigned *exchange, float *partials, unsigned *counters, const float *__restrict__ dy_tb,
                        const float *__restrict__ W_y, const float *__restrict__ W_hh, const float *__restrict__ h_tb,
                        const float *__restrict__ gates_tb, const float *__restrict__ a_n_tb,
                        const int *__restrict__ ids_tb, int T, int B, int H, int N, int V, int groups)
{
    const int blocks = gridDim.x / groups, ranges = blocks / SPLITS, group = blockIdx.x / blocks;
    const int range = blockIdx.x % blocks / SPLITS, split = blockIdx.x % SPLITS;
    const int j0 = range * UNITS, finished = split * FINISHED;
    const int tiles = ceil_div(B, ROWS), tiles_of_group = ceil_div(tiles, groups);
    const int first_tile = group * tiles_of_group, last_tile = min(first_tile + tiles_of_group, tiles);
    const int y_steps = ceil_div(ceil_div(N, STEP_K), SPLITS * WARPS);  // of a warp
    unsigned *arrived = counters + size_t(group) * (1 + ranges) * 2 * COUNTER_WORDS, *left = arrived + COUNTER_WORDS;
    unsigned *range_arrived = arrived + (1 + range) * 2 * COUNTER_WORDS, *range_left = range_arrived + COUNTER_WORDS;
    const size_t split_words = size_t(WARPS) * K_STEPS * X_STEP, tile_words = SPLITS * split_words;

    extern __shared__ __align__(16) unsigned shared[];
    unsigned *y_weights = shared + ResidentWeights::SHARED_WORDS;
    float *sums = reinterpret_cast<float *>(y_weights + WARPS * y_steps * WEIGHT_STEP);
    float *di_of_tile = sums + SUMS;                            // (ROWS, 3, FINISHED)
    float *dP = di_of_tile + ROWS * 3 * FINISHED;               // (V, 3, FINISHED)
    int *ids = reinterpret_cast<int *>(dP + V * 3 * FINISHED);  // (ROWS,)

    // Element `pair` of this thread in a tile: neighbouring threads take neighbouring units.
    const auto row_of = [](int pair) { return (int(threadIdx.x) + pair * THREADS) / FINISHED; };
    const auto unit_of = [](int pair) { return (int(threadIdx.x) + pair * THREADS) % FINISHED; };
    const auto owned = [=](int tile, int pair) {
        const int u = finished + unit_of(pair);
        return row_of(pair) < ROWS && tile * ROWS + row_of(pair) < B && u < UNITS && j0 + u < H;
    };

    ResidentWeights weights;
    const int k0 = split * WARPS * K_STEPS * STEP_K;
    weights.load(shared, [=](int k, int column) {
        const int j = j0 + column;
        return column < UNITS && j < H && k0 + k < 3 * H ? W_hh[size_t(k0 + k) * H + j] : 0.0f;
    });
    const auto y_step = [=](int i) { return (split * WARPS + warp()) * y_steps + i; };
    for (int i = 0; i < y_steps; ++i)
        store_weights(y_weights + (warp() * y_steps + i) * WEIGHT_STEP, [=](int k, int column) {
            const int v = y_step(i) * STEP_K + k, j = j0 + column;
            return column < UNITS && j < H && v < N ? W_y[size_t(v) * H + j] : 0.0f;
        });
    for (int i = threadIdx.x; i < V * 3 * FINISHED; i += THREADS)
        dP[i] = 0.0f;
    float db[PAIRS][3] = {};
    int rows_to_add = 0;
    __syncthreads();

    for (int t = T - 1; t >= -1; --t) {  // at -1 lies the initial state
        for (int tile = first_tile; tile < last_tile; ++tile) {
            float r[PAIRS], z[PAIRS], n[PAIRS], a_n[PAIRS], before[PAIRS], dh[PAIRS], dy[PAIRS];
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                if (owned(tile, pair)) {
                    const int b = tile * ROWS + row_of(pair), j = j0 + finished + unit_of(pair);
                    dh[pair] = t + 1 < T ? dh_z_b[size_t(b) * H + j] : 0.0f;  // written by this thread
                    if (t >= 0) {
                        const size_t row = size_t(t) * B + b;
                        r[pair] = gates_tb[row * 3 * H + j];
                        z[pair] = gates_tb[row * 3 * H + H + j];
                        n[pair] = gates_tb[row * 3 * H + 2 * H + j];
                        a_n[pair] = a_n_tb[row * H + j];
                        before[pair] = h_tb[row * H + j];
                        dy[pair] = N == 0 ? dy_tb[row * H + j] : 0.0f;
                    }
                }
            const int id_row = tile * ROWS + threadIdx.x;
            const int id = V > 0 && t >= 0 && threadIdx.x < ROWS && id_row < B ? ids_tb[size_t(t) * B + id_row] : 0;

            // What the last tile left for the sums by id. All of some rows is loaded before any sum is stored.
            for (int column = threadIdx.x; column < 3 * FINISHED && rows_to_add > 0; column += THREADS)
                for (int row = 0; row < rows_to_add; row += ROWS_AT_A_TIME) {
                    float value[ROWS_AT_A_TIME], *sum[ROWS_AT_A_TIME];
#pragma unroll
                    for (int i = 0; i < ROWS_AT_A_TIME; ++i) {
                        value[i] = di_of_tile[(row + i) * 3 * FINISHED + column];
                        sum[i] = dP + ids[row + i] * 3 * FINISHED + column;
                    }
#pragma unroll
                    for (int i = 0; i < ROWS_AT_A_TIME; ++i)
                        if (row + i < rows_to_add)
                            *sum[i] += value[i];
                }

            ResidentSums product;
            if (t >= 0)
                for (int i = 0; i < y_steps; ++i) {
                    ResidentSums::X y;
                    y.load_each([=](int row, int k) {
                        const int b = tile * ROWS + row, v = y_step(i) * STEP_K + k;
                        return b < B && v < N ? dy_tb[(size_t(t) * B + b) * N + v] : 0.0f;
                    });
                    product.add(y, y_weights + (warp() * y_steps + i) * WEIGHT_STEP);
                }
            if (t + 1 < T) {
                if (tile == first_tile)
                    group_wait(arrived, unsigned(blocks) * (T - 1 - t));
                weights.multiply(product, exchange + ((t + 1) % 2 * tiles + tile) * tile_words + split * split_words);
            }
            product.reduce_warps(sums);

            float *partials_of_range = partials + (size_t(tile) * ranges + range) * SPLITS * ROWS * UNITS;
            if (SPLITS > 1) {
                for (int i = threadIdx.x; i < ROWS * UNITS; i += THREADS)
                    partials_of_range[split * ROWS * UNITS + i] = sum_of(sums, i / UNITS, i % UNITS);
                const int done = (T - 1 - t) * (last_tile - first_tile) + tile - first_tile + 1;
                group_barrier(range_arrived, SPLITS * done);
            }

            float di[PAIRS][3];
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                if (owned(tile, pair)) {
                    const int row = row_of(pair), u = finished + unit_of(pair);
                    float sum = 0.0f;
                    if (SPLITS == 1)
                        sum = sum_of(sums, row, u);
                    else
#pragma unroll
                        for (int s = 0; s < SPLITS; ++s)
                            sum += partials_of_range[(s * ROWS + row) * UNITS + u];
                    dh[pair] += sum;
                }
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                if (owned(tile, pair)) {
                    const int row = row_of(pair), b = tile * ROWS + row, j = j0 + finished + unit_of(pair);
                    if (t < 0) {
                        dh0[size_t(b) * H + j] = dh[pair];
                        continue;
                    }
                    dh[pair] += dy[pair];
                    const float dn = dh[pair] * (1.0f - z[pair]);
                    di[pair][2] = dn * (1.0f - n[pair] * n[pair]);
                    di[pair][0] = di[pair][2] * a_n[pair] * (r[pair] * (1.0f - r[pair]));
                    di[pair][1] = dn * (before[pair] - n[pair]) * z[pair];
                    unsigned *x = exchange + (t % 2 * tiles + tile) * tile_words;
#pragma unroll
                    for (int gate = 0; gate < 3; ++gate) {
                        const float da = gate == 2 ? di[pair][2] * r[pair] : di[pair][gate];
                        store_x(x, row, gate * H + j, da);
                        db[pair][gate] += da;
                        di_of_tile[(row * 3 + gate) * FINISHED + unit_of(pair)] = di[pair][gate];
                    }
                }
            if (threadIdx.x < ROWS)
                ids[threadIdx.x] = id;
            rows_to_add = t >= 0 && V > 0 ? min(ROWS, B - tile * ROWS) : 0;
            if (t < 0 || tile + 1 < last_tile)
                __syncthreads();  // the next tile's sums take the place of these
            else
                group_arrive(arrived);
            if (t < 0)
                continue;

#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                if (owned(tile, pair)) {
                    const int b = tile * ROWS + row_of(pair), j = j0 + finished + unit_of(pair);
                    const size_t row = size_t(t) * B + b;
                    dh_z_b[size_t(b) * H + j] = dh[pair] * z[pair];
                    if (V == 0)
                        di_n_tb[row * H + j] = di[pair][2];
#pragma unroll
                    for (int gate = 0; gate < 3; ++gate) {
                        const float da = gate == 2 ? di[pair][2] * r[pair] : di[pair][gate];
#if PRECISION == 2
                        da16_tb[(row * 3 + gate) * H + j] = to_bf16(da);
                        if (V == 0)
#endif
                            da_tb[(row * 3 + gate) * H + j] = da;
                    }
                }
        }
    }

    // The sums over the rows of the group: db row by row, through the place of di.
    __syncthreads();
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair)
        if (row_of(pair) < ROWS)
#pragma unroll
            for (int gate = 0; gate < 3; ++gate)
                di_of_tile[(row_of(pair) * 3 + gate) * FINISHED + unit_of(pair)] = db[pair][gate];
    __syncthreads();
    for (int i = threadIdx.x; i < (V + 1) * 3 * FINISHED; i += THREADS) {
        const int v = i / (3 * FINISHED), column = i % (3 * FINISHED), u = finished + column % FINISHED;
        if (u >= UNITS || j0 + u >= H)
            continue;
        float sum = 0.0f;
        if (v < V)
            sum = dP[i];
        else
            for (int row = 0; row < ROWS; ++row)
                sum += di_of_tile[row * 3 * FINISHED + column];
        float *result = v < V ? dP_g + (size_t(group) * V + v) * 3 * H : db_g + size_t(group) * 3 * H;
        result[column / FINISHED * H + j0 + u] = sum;
    }
    group_leave(arrived, left, blocks);
    if (SPLITS > 1)
        group_leave(range_arrived, range_left, SPLITS);
}
