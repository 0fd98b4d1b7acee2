// The recurrence over a window in one launch: W_hh stays on chip from the first step to the last.
//
//   a = W_hh h_{t-1} + b_hh       r = sigmoid(i_r + a_r)   z = sigmoid(i_z + a_z)   n = tanh(i_n + r a_n)
//   h_t = (1 - z) n + z h_{t-1}                                                        with i = P[ids[t, b]]
//
// Arguments, float32 but for the integers and the bf16 copy:
//   h_tb (T+1, B, H), h_tb[0] a copy of h0; gates_tb (T, B, 3H): r, z, n; a_n_tb (T, B, H)
//   h16_tb (T, B, H) bf16, only in bf16: the states before each step, an operand of dW_hh
//   exchange (2, row tiles, WARPS K_STEPS, X_STEP) words, zero where k >= H
//   counters (groups, COUNTER_WORDS) uint32, zero before and after a launch
//   P (N, 3H); ids_tb (T, B) int32, in [0, N); W_hh (3H, H); b_hh (3H,); h0 (B, H)
//
// The batch is cut into tiles of ROWS rows, and the tiles among groups of blocks that never wait for each other
// (row_tiles.cuh). In a group, every block owns UNITS hidden units with their three gates, and keeps their rows of
// W_hh. So the blocks of a group have only the new states to exchange: each block writes the states of its units to
// `exchange`, rounded and in the order in which warps load them (resident.cuh), and after one barrier per step reads
// the states of all units. Its threads share the elements of a tile, a row and a unit each, to compute the gates.
//
// The two halves of `exchange` hold the states before even and before odd steps. A block overwrites a half only after
// the barrier at which all blocks arrived when they had read it. The barrier takes a while, which a block fills with
// work that needs no other block: it saves r, z, n, a_n and h of this step and loads the input products of the next.
//
// Bytes per step and block: 4 ROWS * 8 WARPS K_STEPS from L2 for each row tile (H elements for each row), 12 ROWS UNITS
// of input products from L2, 24 ROWS UNITS written (bf16: as many, two bytes of exchange and two of h16_tb). At B 64,
// H 1024 on an H100: tf32, 2 groups of 64 blocks, which gather 128 KiB a block and step; bf16, 4 groups of 32, 32 KiB.
// Why not naive.cu's way: there every gate of every unit reads a row of h and a row of W_hh, 1.6 GB a step at these
// sizes, and every step is a launch. Here W_hh, 12.6 MB, is read once per group and window.
//
// Variants: fp32, tf32, bf16; gru.cu for sizes and GPUs that this one does not fit. plan/recurrence.py chooses.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".
#include "barrier.cuh"
#include "gru.cuh"
#include "resident.cuh"
#include "row_tiles.cuh"

static_assert(COLUMNS % 3 == 0, "a block owns the three gates of its units");
constexpr int UNITS = COLUMNS / 3;
using Elements = OwnElements<UNITS>;

// One block: x counts the blocks of the first group, then those of the second, ...
extern "C" __global__ void __launch_bounds__(THREADS, 1)
gru_forward_persistent(float *h_tb, float *__restrict__ gates_tb, float *__restrict__ a_n_tb,
                       unsigned short *__restrict__ h16_tb, unsigned *exchange, unsigned *counters,
                       const float *__restrict__ P, const int *__restrict__ ids_tb, const float *__restrict__ W_hh,
                       const float *__restrict__ b_hh, const float *__restrict__ h0, int T, int B, int H, int groups)
{
    extern __shared__ __align__(16) unsigned shared[];  // the weights that are not in registers, then the sums
    float *sums = reinterpret_cast<float *>(shared + ResidentWeights::SHARED_WORDS);
    const int blocks = gridDim.x / groups;
    Group group(counters, blockIdx.x / blocks, blockIdx.x % blocks, blocks);
    const RowTiles tiles(B, groups, group.index);
    const int j0 = group.block * UNITS;
    const Elements own = {B, j0, H};
    // The states of a tile before step t, as the product reads them.
    const auto exchanged = [=](int t, int tile) { return exchange + (t % 2 * tiles.all + tile) * X_WORDS; };

    ResidentWeights weights;
    weights.load(shared, [=](int k, int column) {
        const int gate = column / UNITS, j = j0 + column % UNITS;
        return gate < 3 && j < H && k < H ? W_hh[(size_t(gate) * H + j) * H + k] : 0.0f;
    });
    for (int tile = tiles.first; tile < tiles.end; ++tile)
        own.each(tile, [=](int i, int b, int j) {
            const float h = h0[size_t(b) * H + j];
            h_tb[size_t(b) * H + j] = h;
            store_x(exchanged(0, tile), own.row(i), j, h);
            if (PRECISION == 2)
                h16_tb[size_t(b) * H + j] = to_bf16(h);
        });
    group.arrive();

    float bias[Elements::COUNT][3];
#pragma unroll
    for (int i = 0; i < Elements::COUNT; ++i)
#pragma unroll
        for (int gate = 0; gate < 3; ++gate)
            bias[i][gate] = b_hh[gate * H + min(j0 + own.unit(i), H - 1)];

    for (int t = 0; t < T; ++t)
        for (int tile = tiles.first; tile < tiles.end; ++tile) {
            // The ids of all elements are loaded before the rows of P that they lead to.
            int id[Elements::COUNT];
            float h_before[Elements::COUNT], input[Elements::COUNT][3];
            own.each(tile, [&](int i, int b, int j) {
                id[i] = ids_tb[size_t(t) * B + b];
                h_before[i] = h_tb[(size_t(t) * B + b) * H + j];  // this thread wrote it in the step before
            });
            own.each(tile, [&](int i, int, int j) {
#pragma unroll
                for (int gate = 0; gate < 3; ++gate)
                    input[i][gate] = P[(size_t(id[i]) * 3 + gate) * H + j];
            });

            if (tile == tiles.first)
                group.wait();  // all blocks have written their states before step t
            ResidentSums product;
            weights.multiply(product, exchanged(t, tile));
            product.reduce_warps(sums);

            float a[Elements::COUNT][3];
#pragma unroll
            for (int i = 0; i < Elements::COUNT; ++i)
#pragma unroll
                for (int gate = 0; gate < 3; ++gate)
                    a[i][gate] = sum_of(sums, min(own.row(i), ROWS - 1), gate * UNITS + own.unit(i)) + bias[i][gate];
            GRUCell cell[Elements::COUNT] = {};  // left undefined, it would take more registers
            own.each(tile, [&](int i, int, int j) {
                cell[i] = gru_cell(input[i], a[i], h_before[i]);
                store_x(exchanged(t + 1, tile), own.row(i), j, cell[i].h);
            });
            if (tile + 1 < tiles.end)
                __syncthreads();  // before the next tile's sums overwrite this tile's
            else if (t + 1 < T)
                group.arrive();

            own.each(tile, [&](int i, int b, int j) {
                const size_t row = size_t(t) * B + b;
                h_tb[(row + B) * H + j] = cell[i].h;
                a_n_tb[row * H + j] = a[i][2];
                float *gates = gates_tb + row * 3 * H + j;
                gates[0] = cell[i].r;
                gates[H] = cell[i].z;
                gates[2 * H] = cell[i].n;
                if (PRECISION == 2 && t + 1 < T)
                    h16_tb[(row + B) * H + j] = to_bf16(cell[i].h);
            });
        }
    group.leave();
}
