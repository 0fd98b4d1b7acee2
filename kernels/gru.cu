// The recurrence over a window, forward and back through time: stepwise, one launch per time step.
//
//   a = W_hh h_{t-1} + b_hh       r = sigmoid(i_r + a_r)   z = sigmoid(i_z + a_z)   n = tanh(i_n + r a_n)
//   h_t = (1 - z) n + z h_{t-1}                                                        with i = P[ids[t, b]]
//
//   dh_t = dh_tb[t] + z_{t+1} dh_{t+1} + W_hh^T da_{t+1}        (dh0: the same without the first term)
//   dn = dh_t (1 - z)       di_z = dn (h_{t-1} - n) z
//   di_n = dn (1 - n^2)     di_r = di_n a_n r (1 - r)           da_t = (di_r, di_z, di_n r)
//
// Arguments, float32 but for the integers:
//   P (N, 3H); ids_tb (T, B) int32, in [0, N); W_hh (3H, H); b_hh (3H,); h0 (B, H)
//   h_tb (T+1, B, H), h_tb[0] a copy of h0; gates_tb (T, B, 3H): r, z, n; a_n_tb (T, B, H)
//   dh_tb (T, B, H); da_tb (T, B, 3H); di_n_tb (T, B, H); dh0 (B, H)
//   h16_tb (T, B, H), da16_tb (T, B, 3H) bf16, only in bf16: copies of h_tb[:T] and da_tb, the operands of dW_hh
//   dh_z_b (B, H): z dh of the step computed last; products_gb (3, B, H): the share of each gate in W_hh^T da
//   arrived (tiles of dh,) uint32: blocks that have written their share; zero between launches
//
// Forward, a block owns TILE_M rows of the batch and UNITS hidden units with their three gates, so that no block needs
// the result of another block: column n of its tile of a is gate n / UNITS of unit n % UNITS. Backward, the tiles of dh
// are few and their sums over 3H long, so that one block per tile would leave most of a GPU idle: three blocks share a
// tile of TILE_M rows and TILE_N units, one for each gate's share of the sum. The block that finishes last adds the
// three shares, always in the order r, z, n, and computes the gates' gradients. In both directions the threads of a
// block compute the product together (tile.cuh); then each thread computes the cells of every
// TILE_THREADS-th element of the tile.
//
// Bytes per step at B 64, H 1024, with tiles of 32 x 48: 128 blocks forward, or 132 backward, read 25 MB of W_hh and
// 17 MB of h or da from L2, which keeps W_hh (12.6 MB) from step to step. Further, forward reads 0.8 MB of P and writes
// 1.3 MB (h, gates, a_n); backward writes 0.8 MB of products and reads them again, reads 1.8 MB (h, gates, a_n, dh,
// dh_z) and writes 1.3 MB (da, di_n, dh_z).
// Why not naive.cu's way: there every gate of every unit reads a row of h and a row of W_hh, 1.6 GB a step at these
// sizes. Here a tile reads each of its rows once, 42 MB a step, and multiplies from shared memory.
//
// Variants: this one, for all sizes and GPUs; gru_forward_persistent.cu and gru_backward_persistent.cu, a window in one
// launch, where they fit. PRECISION (tile.cuh) applies to the products only.
// Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation",
// with the reset gate after the product, as in cuDNN.
#include "gru.cuh"
#include "tile.cuh"

static_assert(TILE_N % 3 == 0, "a block owns the three gates of its units");
static_assert(TILE_M * TILE_N % TILE_THREADS == 0, "backward, all threads compute as many cells");
constexpr int UNITS = TILE_N / 3;

// One time step, t. blockIdx.x counts UNITS hidden units, blockIdx.y TILE_M rows of the batch.
extern "C" __global__ void __launch_bounds__(TILE_THREADS)
gru_forward_step(float *h_tb, float *__restrict__ gates_tb, float *__restrict__ a_n_tb,
                 unsigned short *__restrict__ h16_tb, const float *__restrict__ P, const int *__restrict__ ids_tb,
                 const float *__restrict__ W_hh, const float *__restrict__ b_hh, const float *h0, int t, int B, int H)
{
    __shared__ __align__(16) float shared[TILE_SHARED];
    const int b0 = blockIdx.y * TILE_M, j0 = blockIdx.x * UNITS;
    const size_t step = size_t(t) * B;  // rows of an array (T, B, n) before step t
    const float *h = t == 0 ? h0 : h_tb + step * H;  // no __restrict__: it may point into h_tb, which is written

    tile_product<true, true>(
        shared, H, [=](int m, int k) { return b0 + m < B ? h[size_t(b0 + m) * H + k] : 0.0f; },
        [=](int k, int n) {
            const int gate = n / UNITS, j = j0 + n % UNITS;
            return j < H ? W_hh[(size_t(gate) * H + j) * H + k] : 0.0f;
        });

    for (int element = threadIdx.x; element < TILE_M * UNITS; element += TILE_THREADS) {
        const int m = element / UNITS, u = element % UNITS, b = b0 + m, j = j0 + u;
        if (b >= B || j >= H)
            continue;
        const float *i_b = P + size_t(ids_tb[step + b]) * 3 * H + j;
        const float i[3] = {i_b[0], i_b[H], i_b[2 * H]};
        const float a[3] = {tile_c(shared, m, u) + b_hh[j], tile_c(shared, m, UNITS + u) + b_hh[H + j],
                            tile_c(shared, m, 2 * UNITS + u) + b_hh[2 * H + j]};
        const float h_before = h[size_t(b) * H + j];
        const GRUCell cell = gru_cell(i, a, h_before);
        float *gates = gates_tb + (step + b) * 3 * H + j;
        gates[0] = cell.r;
        gates[H] = cell.z;
        gates[2 * H] = cell.n;
        a_n_tb[(step + b) * H + j] = a[2];
        if (PRECISION == 2)
            h16_tb[(step + b) * H + j] = to_bf16(h_before);
        h_tb[(step + B + b) * H + j] = cell.h;
        if (t == 0)
            h_tb[size_t(b) * H + j] = h_before;
    }
}

// Whether this block is the last of `blocks` to arrive; the same in all its threads. The threads of the last block see
// everything that the threads of the other blocks wrote before they arrived: a __syncthreads() makes writes visible
// within a block, thread 0's fences between blocks. No block waits for another, so the grid may have any size.
// Leaves the counter at zero.
__device__ __forceinline__ bool arrives_last(unsigned *arrived, unsigned blocks)
{
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // the block's writes come before its arrival
        last = atomicAdd(arrived, 1u) == blocks - 1;
        __threadfence();  // the block's reads from here on come after the other blocks' arrivals
        if (last)
            atomicExch(arrived, 0u);
    }
    __syncthreads();
    return last;
}

// One time step, t, from T - 1 down to -1; step -1 only computes dh0, the gradient of the initial state. blockIdx.x
// counts TILE_N hidden units, blockIdx.y TILE_M rows of the batch, blockIdx.z gates.
extern "C" __global__ void __launch_bounds__(TILE_THREADS)
gru_backward_step(float *da_tb, unsigned short *__restrict__ da16_tb, float *__restrict__ di_n_tb,
                  float *__restrict__ dh0, float *__restrict__ dh_z_b, float *products_gb, unsigned *arrived,
                  const float *__restrict__ dh_tb, const float *__restrict__ W_hh, const float *__restrict__ h_tb,
                  const float *__restrict__ gates_tb, const float *__restrict__ a_n_tb, int t, int T, int B, int H)
{
    __shared__ __align__(16) float shared[TILE_STAGES];
    const int b0 = blockIdx.y * TILE_M, j0 = blockIdx.x * TILE_N, gate = blockIdx.z;
    const size_t state_size = size_t(B) * H;
    const bool has_later = t + 1 < T;  // no step follows the last one
    const float *da_later = da_tb + size_t(t + 1) * 3 * state_size + size_t(gate) * H;
    const float *W = W_hh + size_t(gate) * H * H;

    const TileSums sums = tile_sums<true, false>(
        shared, has_later ? H : 0,
        [=](int m, int k) { return b0 + m < B ? da_later[size_t(b0 + m) * 3 * H + k] : 0.0f; },
        [=](int k, int n) { return j0 + n < H ? W[size_t(k) * H + j0 + n] : 0.0f; });
    sums.each([=](int m, int n, float product) {
        if (b0 + m < B && j0 + n < H)
            products_gb[gate * state_size + size_t(b0 + m) * H + j0 + n] = product;
    });
    if (!arrives_last(&arrived[blockIdx.y * gridDim.x + blockIdx.x], gridDim.z))
        return;

    for (int i = 0; i < TILE_M * TILE_N / TILE_THREADS; ++i) {
        const int element = threadIdx.x + i * TILE_THREADS, m = element / TILE_N, u = element % TILE_N;
        const int b = b0 + m, j = j0 + u;
        if (b >= B || j >= H)
            continue;
        const size_t offset_in_state = size_t(b) * H + j;
        const float *product = products_gb + offset_in_state;
        const float dh_later =
            has_later ? dh_z_b[offset_in_state] + (product[0] + product[state_size] + product[2 * state_size]) : 0.0f;
        if (t < 0) {
            dh0[offset_in_state] = dh_later;
            continue;
        }
        const size_t row = size_t(t) * B + b, offset_in_states = row * H + j, offset_in_gates = row * 3 * H + j;
        const float *gates = gates_tb + offset_in_gates;
        const float z = gates[H], dh = dh_tb[offset_in_states] + dh_later;
        const GRUCellGradient gradient =
            gru_cell_gradient(dh, gates[0], z, gates[2 * H], a_n_tb[offset_in_states], h_tb[offset_in_states]);
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            da_tb[offset_in_gates + i * H] = gradient.da[i];
            if (PRECISION == 2)
                da16_tb[offset_in_gates + i * H] = to_bf16(gradient.da[i]);
        }
        di_n_tb[offset_in_states] = gradient.di[2];
        dh_z_b[offset_in_state] = dh * z;  // this thread read the value of step t + 1 above
    }
}
