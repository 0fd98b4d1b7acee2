// The recurrence over a window in one launch, its weights on chip from the first step to the last.
//
//   a = W_hh h_{t-1} + b_hh       r = sigmoid(i_r + a_r)   z = sigmoid(i_z + a_z)   n = tanh(i_n + r a_n)
//   h_t = (1 - z) n + z h_{t-1}                                                        with i = P[ids[t, b]]
//
// Arguments, float32 but for the integers and the bf16 copy:
//   h_tb (T+1, B, H), h_tb[0] a copy of h0; gates_tb (T, B, 3H): r, z, n; a_n_tb (T, B, H)
//   h16_tb (T, B, H) bf16, only in bf16: the states before each step, an operand of dW_hh
//   exchange (2, row tiles, WARPS K_STEPS, X_STEP) words, zero where k >= H; counters (groups, 2 COUNTER_WORDS) uint32,
//   zero between launches
//   P (N, 3H); ids_tb (T, B) int32, in [0, N); W_hh (3H, H); b_hh (3H,); h0 (B, H)
//
// The batch is cut into tiles of ROWS rows, and the tiles into groups that never wait for each other. In a group, every
// block owns UNITS hidden units with their three gates, so that a step has nothing to exchange but the new states: each
// block leaves those of its units in `exchange`, rounded and in the order in which warps load them (resident.cuh), and
// gathers those of all units. One barrier of the group per step. Two halves of `exchange` take turns: whoever writes a
// half has passed the barrier that all blocks reached after they had read it. What does not depend on the others is
// done while they arrive: the input products of the next step are loaded, and r, z, n, a_n and h are saved.
//
// Per step and block: 4 ROWS * 8 WARPS K_STEPS bytes from L2 for each row tile (H elements for each row), 3 ROWS UNITS
// input products from L2, 24 ROWS UNITS bytes written (bf16: as many, two bytes of exchange and two of h16_tb).
// At B 64, H 1024 on an H100: tf32, 2 groups of 64 blocks, gathers 128 KiB a block and step; bf16, 4 groups of 32, 32 KiB.
//
// Variants: fp32, tf32, bf16; gru.cu for sizes and GPUs that this one does not fit. plan.py chooses.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".
#include "barrier.cuh"
#include "resident.cuh"

static_assert(COLUMNS % 3 == 0, "a block owns the three gates of its units");
constexpr int UNITS = COLUMNS / 3;
constexpr int PAIRS = ceil_div(ROWS * UNITS, THREADS);  // of a row and a unit, that a thread takes through the gates

// One block: x counts the blocks of the first group, then those of the second, ...
extern "C" __global__ void __launch_bounds__(THREADS, 1)
gru_forward_persistent(float *h_tb, float *__restrict__ gates_tb, float *__restrict__ a_n_tb,
                       unsigned short *__restrict__ h16_tb, unsigned *exchange, unsigned *counters,
                       const float *__restrict__ P, const int *__restrict__ ids_tb, const float *__restrict__ W_hh,
                       const float *__restrict__ b_hh, const float *__restrict__ h0, int T, int B, int H, int groups)
{
    extern __shared__ __align__(16) unsigned shared[];
    float *sums = reinterpret_cast<float *>(shared + ResidentWeights::SHARED_WORDS);
    const int blocks = gridDim.x / groups, group = blockIdx.x / blocks, j0 = blockIdx.x % blocks * UNITS;
    const int tiles = ceil_div(B, ROWS), tiles_of_group = ceil_div(tiles, groups);
    const int first_tile = group * tiles_of_group, last_tile = min(first_tile + tiles_of_group, tiles);
    unsigned *arrived = counters + group * 2 * COUNTER_WORDS, *left = arrived + COUNTER_WORDS;
    const size_t tile_words = size_t(WARPS) * K_STEPS * X_STEP;

    // Element `pair` of this thread in a tile: neighbouring threads take neighbouring units.
    const auto row_of = [](int pair) { return (int(threadIdx.x) + pair * THREADS) / UNITS; };
    const auto unit_of = [](int pair) { return (int(threadIdx.x) + pair * THREADS) % UNITS; };
    const auto owned = [=](int tile, int pair) {
        return row_of(pair) < ROWS && tile * ROWS + row_of(pair) < B && j0 + unit_of(pair) < H;
    };

    ResidentWeights weights;
    weights.load(shared, [=](int k, int column) {
        const int gate = column / UNITS, j = j0 + column % UNITS;
        return gate < 3 && j < H && k < H ? W_hh[(size_t(gate) * H + j) * H + k] : 0.0f;
    });

    for (int tile = first_tile; tile < last_tile; ++tile)
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair)
            if (owned(tile, pair)) {
                const size_t place = size_t(tile * ROWS + row_of(pair)) * H + j0 + unit_of(pair);
                const float h = h0[place];
                h_tb[place] = h;
                store_x(exchange + tile * tile_words, row_of(pair), j0 + unit_of(pair), h);
#if PRECISION == 2
                h16_tb[place] = to_bf16(h);
#endif
            }
    group_arrive(arrived);

    float b[PAIRS][3];
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair)
#pragma unroll
        for (int gate = 0; gate < 3; ++gate)
            b[pair][gate] = b_hh[gate * H + min(j0 + unit_of(pair), H - 1)];

    for (int t = 0; t < T; ++t) {
        for (int tile = first_tile; tile < last_tile; ++tile) {
            // Loads that depend on others come after all of those.
            float before[PAIRS], i[PAIRS][3];
            int id[PAIRS];
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                if (owned(tile, pair)) {
                    const size_t row = size_t(t) * B + tile * ROWS + row_of(pair);
                    id[pair] = ids_tb[row];
                    before[pair] = h_tb[row * H + j0 + unit_of(pair)];  // written by this thread
                }
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                if (owned(tile, pair))
#pragma unroll
                    for (int gate = 0; gate < 3; ++gate)
                        i[pair][gate] = P[(size_t(id[pair]) * 3 + gate) * H + j0 + unit_of(pair)];

            if (tile == first_tile)
                group_wait(arrived, unsigned(blocks) * (t + 1));
            ResidentSums product;
            weights.multiply(product, exchange + (t % 2 * tiles + tile) * tile_words);
            product.reduce_warps(sums);

            float a[PAIRS][3];
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
#pragma unroll
                for (int gate = 0; gate < 3; ++gate)
                    a[pair][gate] = sum_of(sums, min(row_of(pair), ROWS - 1), gate * UNITS + unit_of(pair)) + b[pair][gate];
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                if (owned(tile, pair)) {
                    const float r = sigmoid(i[pair][0] + a[pair][0]), z = sigmoid(i[pair][1] + a[pair][1]);
                    const float n = tanhf(i[pair][2] + r * a[pair][2]), h = n + z * (before[pair] - n);
                    store_x(exchange + ((t + 1) % 2 * tiles + tile) * tile_words, row_of(pair), j0 + unit_of(pair), h);
                    before[pair] = h, i[pair][0] = r, i[pair][1] = z, i[pair][2] = n;
                }
            if (tile + 1 < last_tile)
                __syncthreads();  // the next tile's sums take the place of these
            else if (t + 1 < T)
                group_arrive(arrived);

#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                if (owned(tile, pair)) {
                    const size_t row = size_t(t) * B + tile * ROWS + row_of(pair);
                    const int j = j0 + unit_of(pair);
                    h_tb[(row + B) * H + j] = before[pair];
                    a_n_tb[row * H + j] = a[pair][2];
#pragma unroll
                    for (int gate = 0; gate < 3; ++gate)
                        gates_tb[(row * 3 + gate) * H + j] = i[pair][gate];
#if PRECISION == 2
                    if (t + 1 < T)
                        h16_tb[(row + B) * H + j] = to_bf16(before[pair]);
#endif
                }
        }
    }
    group_leave(arrived, left, blocks);
}
