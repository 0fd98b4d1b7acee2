// The recurrence over a window in one launch: W_hh stays on chip from the first step to the last.
//
//   a = W_hh h_{t-1} + b_hh       r = sigmoid(i_r + a_r)   z = sigmoid(i_z + a_z)   n = tanh(i_n + r a_n)
//   h_t = (1 - z) n + z h_{t-1}                                                        with i = P[ids[t, b]]
//
// Arguments, float32 but for the integers and the bf16 copy:
//   h_tb (T+1, B, H), h_tb[0] a copy of h0; gates_tb (T, B, 3H): r, z, n; a_n_tb (T, B, H)
//   h16_tb (T, B, H) bf16, only in bf16: the states before each step, an operand of dW_hh
//   exchange (2, row tiles, WARPS K_GROUPS, X_GROUP) words and counters (groups, COUNTER_WORDS) uint32, both zero at
//   first and then left to the launches of one plan (words.cuh)
//   P (N, 3H); ids_tb (T, B) int32, in [0, N); W_hh (3H, H); b_hh (3H,); h0 (B, H)
//
// The batch is cut into tiles of ROWS rows, and the tiles among groups of blocks that never wait for each other
// (row_tiles.cuh). In a group, every block owns UNITS hidden units with their three gates, and keeps their rows of
// W_hh. So the blocks of a group have only the new states to exchange: each block writes the states of its units to
// `exchange`, in packets with tags (exchange.cuh) and in the order in which warps load them (resident.cuh); each warp
// waits for the packets that it multiplies, and for nothing else. A packet has the states of a row in VALUES units of a
// block, so that one thread computes them. While its packets travel, a block saves r, z, n, a_n and h of the step and
// loads the input products of the next.
//
// Bytes per step and block: 8 ROWS * ceil(UNITS / VALUES) (fp32: 16) from L2 for each block of the group and row tile,
// 12 ROWS UNITS of input products from L2, 24 ROWS UNITS written (bf16: 2 ROWS UNITS of h16_tb in addition). At B 64, H
// 1024 on an H100: tf32, 2 groups of 57 blocks, which gather 86 KiB a block and step; bf16, 4 groups of 32, 44 KiB.
// Why not naive.cu's way: there every gate of every unit reads a row of h and a row of W_hh, 1.6 GB a step at these
// sizes, and every step is a launch. Here W_hh, 12.6 MB, is read once per group and window.
//
// Variants: fp32, tf32, bf16; gru.cu for sizes and GPUs that this one does not fit. plan/recurrence.py chooses.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".
#include "exchange.cuh"
#include "gru.cuh"
#include "resident.cuh"
#include "row_tiles.cuh"
#include "words.cuh"

static_assert(COLUMNS % 3 == 0, "a block owns the three gates of its units");
constexpr int UNITS = COLUMNS / 3;
using Elements = OwnElements<UNITS, VALUES>;

// One block: x counts the blocks of the first group, then those of the second, ...
extern "C" __global__ void __launch_bounds__(THREADS, 1)
gru_forward_persistent(float *h_tb, float *__restrict__ gates_tb, float *__restrict__ a_n_tb,
                       unsigned short *__restrict__ h16_tb, Word *exchange, unsigned *counters,
                       const float *__restrict__ P, const int *__restrict__ ids_tb, const float *__restrict__ W_hh,
                       const float *__restrict__ b_hh, const float *__restrict__ h0, int T, int B, int H, int groups)
{
    extern __shared__ __align__(16) unsigned shared[];  // the weights that are not in registers, then the sums
    float *sums = reinterpret_cast<float *>(shared + ResidentWeights::SHARED_WORDS);
    const int blocks = gridDim.x / groups, group = blockIdx.x / blocks, block = blockIdx.x % blocks;
    const RowTiles tiles(B, groups, group);
    const int j0 = block * UNITS;
    const Elements own = {B, j0, H};
    const unsigned first = first_number(counters, group);  // of the exchange of the states before step 0
    // The states of a tile before step t, as the product reads them.
    const auto exchanged = [=](int t, int tile) {
        return exchange + ((first + t) % 2 * tiles.all + tile) * X_WORDS;
    };
    // Hands this thread's states before step t to the group, zero outside the batch and from H on.
    const auto publish = [=](int t, int tile, const auto &h) {
#pragma unroll
        for (int i = 0; i < Elements::COUNT; i += VALUES) {
            float values[VALUES];
#pragma unroll
            for (int v = 0; v < VALUES; ++v)
                values[v] = h(i + v);
            if (own.row(i) < ROWS)
                store_packet(exchanged(t, tile) + place_of(own.row(i), block * Elements::WIDTH + own.place(i)), values,
                             tag_of(first + t));
        }
    };

    ResidentWeights weights;
    weights.load(shared, [=](int packet, int value, int column) {
        const int unit = packet % Elements::WIDTH + value * Elements::WIDTH;  // of the block that writes the packet
        const int k = packet / Elements::WIDTH * UNITS + unit, gate = column / UNITS, j = j0 + column % UNITS;
        return gate < 3 && j < H && unit < UNITS && k < H ? W_hh[(size_t(gate) * H + j) * H + k] : 0.0f;
    });
    for (int tile = tiles.first; tile < tiles.end; ++tile) {
        float h[Elements::COUNT] = {};
        own.each(tile, [&](int i, int b, int j) {
            h[i] = h0[size_t(b) * H + j];
            h_tb[size_t(b) * H + j] = h[i];
            if (PRECISION == 2)
                h16_tb[size_t(b) * H + j] = to_bf16(h[i]);
        });
        publish(0, tile, [&](int i) { return h[i]; });
    }

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

            ResidentSums product;
            weights.multiply(product, exchanged(t, tile), blocks * Elements::WIDTH, tag_of(first + t));
            product.reduce_warps(sums);

            float a[Elements::COUNT][3];
#pragma unroll
            for (int i = 0; i < Elements::COUNT; ++i)
#pragma unroll
                for (int gate = 0; gate < 3; ++gate)
                    a[i][gate] = bias[i][gate] + sum_of(sums, min(own.row(i), ROWS - 1),
                                                        gate * UNITS + min(own.unit(i), UNITS - 1));
            GRUCell cell[Elements::COUNT] = {};  // left undefined, it would take more registers
            own.each(tile, [&](int i, int, int) { cell[i] = gru_cell(input[i], a[i], h_before[i]); });
            if (t + 1 < T)
                publish(t + 1, tile, [&](int i) { return cell[i].h; });
            __syncthreads();  // before the next product's sums overwrite this one's

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
    if (threadIdx.x == 0)
        leave_group(counters, group, blocks, T);
}
