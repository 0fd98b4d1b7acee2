// Every op of the training step, and drawing a character, in the plainest way: a thread per output, a loop per sum.
//
//   matmul           C[m, n] = sum over k of A[m, k] B[k, n] (+ bias[n])
//   column_sums      sums[n] = sum over m of A[m, n]
//   sum_by_id        dP[v, c] = sum of di[p, c] over the positions p with ids[p] == v
//   gru_forward_step         h_{t+1} from i = P[ids_tb[t]] and a = W_hh h_t + b_hh, as gru.cuh has it
//   gru_backward_step        da_t and di_t from dh_t = dh_tb[t] + dh_later, as gru.cuh has it, where
//                            dh_later = z_{t+1} dh_{t+1} + W_hh^T da_{t+1}; for t = -1 it is dh0
//   cross_entropy_forward    logits = h W_out^T + b_out        loss = log(sum of exp(logits)) - logits[target]
//                            dlogits = (softmax(logits) - onehot(target)) / positions
//   mean_loss        loss = (sum of losses) / positions
//   global_norm      norm = sqrt(sum of g^2)
//   adam             g' = g min(1, clip_norm / norm)           m = beta_1 m + (1 - beta_1) g'
//                    v = beta_2 v + (1 - beta_2) g'^2          p = p - step_size m / (sqrt(v) + epsilon)
//   sample           the first v with p_1 + ... + p_v > uniform (p_1 + ... + p_(V-1)), where
//                    p_v = exp((logits_v - largest) / temperature), or 0 outside top_k, top_p or min_p
//
// naive.py builds the ops from these kernels: input_table_forward is a matmul, input_table_backward two matmuls and
// column_sums, gru_backward a matmul, T + 1 steps, a matmul, column_sums and sum_by_id. Dropout has no kernel here:
// dropout.cu says why.
//
// Arguments: outputs, inputs, sizes, float32 but for int32 ids, ids_tb and targets.
//   C (M, N); A (M, K) and B (K, N), A[m, k] at A + A_m m + A_k k, so that strides tell which of them is transposed;
//   bias (N,); A (M, N) of column_sums; di (N, 3H) as da (N, 3H), whose first 2H columns equal di's, and di_n (N, H)
//   P, dP (V, 3H); ids_tb (T, B); W_hh (3H, H); b_hh (3H,); h_tb (T+1, B, H), h_tb[0] the initial state;
//   gates_tb (T, B, 3H): r, z, n; a_n_tb, dh_tb, di_n_tb (T, B, H); da_tb (T, B, 3H); dh0, dh_z_b (B, H): z_t dh_t
//   h (positions, H); W_out (V, H); b_out (V,); targets, losses (positions,); dlogits (positions, V)
//   loss, norm, step_size (1,); params, grads, m, v (N,); logits (R, V); uniforms, and ids of sample (R,)
//
// A kernel is the program of one thread. A launch starts a thread for each output, in blocks of 256; the thread
// numbered thread_in_grid() owns the output of that number. A thread adds in ascending order, so that equal runs give
// equal bits; fmaf(a, b, c) is a b + c, rounded once. Sums of millions of numbers, or of numbers most of which are tiny
// beside the largest, as in a softmax, are kept in double. No two threads of a launch exchange anything: a step of the
// recurrence leaves its states in global memory, where the next launch reads them.
//
// Bytes that all threads together ask for, at B 64, T 100, H 1024, V 66, and the floor, where each array moves once:
//   dW_hh = da^T h           8 M N K = 161 GB     117 MB: each element of da is asked for 1024 times, of h 3072 times
//   gru_forward_step         24 B H^2 = 1.6 GB    15 MB: each weight 64 times, each element of h_t 3072 times
//   gru_backward_step        24 B H^2 = 1.6 GB    17 MB: each weight 64 times, each element of da_{t+1} 1024 times
//   cross_entropy_forward    8 T B V H = 3.5 GB   28 MB: each element of h 66 times, of W_out 6400 times
//   sum_by_id                12 T B V H = 5.2 GB  79 MB: each id 3H V times
//   column_sums, mean_loss, global_norm, adam     the floor
// Caches serve most of it, but even a cache serves a multiprocessor no more than some 100 bytes a cycle.
//
// Variants: the fast twin of each kernel, named beside it. The same tests compare both with rnn/reference.py.
// Source: as the fast twins; CUDA C++ Programming Guide, "Shared Memory", has this matmul, and why it is slow.
#include "gru.cuh"

// Slow: 2 loads for each multiply-add, where a tile in shared memory serves a whole block. Fast twin: matmul.cu.
extern "C" __global__ void matmul(float *C, const float *A, const float *B, const float *bias, int M, int N, int K,
                                  int A_m, int A_k, int B_k, int B_n, int add_bias)
{
    const size_t m = thread_in_grid() / N, n = thread_in_grid() % N;
    if (m >= M)
        return;  // the last block may have more threads than there are outputs left
    float sum = 0.0f;
    for (size_t k = 0; k < K; ++k)
        sum = fmaf(A[m * A_m + k * A_k], B[k * B_k + n * B_n], sum);
    C[m * N + n] = add_bias ? sum + bias[n] : sum;
}

// Slow: N threads, too few to hide how long a load takes. Fast twin: column_sums of matmul.cu, 32 warps for 32 columns.
extern "C" __global__ void column_sums(float *sums, const float *A, int M, int N)
{
    const size_t n = thread_in_grid();
    if (n >= N)
        return;
    float sum = 0.0f;
    for (size_t m = 0; m < M; ++m)
        sum += A[m * N + n];
    sums[n] = sum;
}

// Slow: each of 3H V threads reads all ids, few of which are its own. Fast twin: input_table.cu, which sorts them.
extern "C" __global__ void sum_by_id(float *dP, const float *da, const float *di_n, const int *ids, int N, int V, int H)
{
    const size_t v = thread_in_grid() / (3 * H), c = thread_in_grid() % (3 * H);
    if (v >= V)
        return;
    float sum = 0.0f;
    for (size_t p = 0; p < N; ++p)
        if (ids[p] == v)
            sum += c < 2 * H ? da[p * 3 * H + c] : di_n[p * H + c - 2 * H];
    dP[v * 3 * H + c] = sum;
}

// One time step, t.
// Slow: neighbouring threads have neighbouring units, whose weights lie H apart, so that one load of a warp touches 32
// cache lines; each row of the batch reads W_hh anew; and each of the T launches fetches W_hh from L2 again.
// Fast twins: gru.cu, in tiles; gru_forward_persistent.cu, one launch, W_hh on chip.
extern "C" __global__ void gru_forward_step(float *h_tb, float *gates_tb, float *a_n_tb, const float *P,
                                            const int *ids_tb, const float *W_hh, const float *b_hh, int t, int B,
                                            int H)
{
    const size_t b = thread_in_grid() / H, j = thread_in_grid() % H, row = size_t(t) * B + b;  // of arrays (T, B, .)
    if (b >= B)
        return;
    const float *h = h_tb + row * H;  // h_t; h_{t+1} lies B rows behind it
    float i[3], a[3];
    for (int gate = 0; gate < 3; ++gate) {
        const size_t g = size_t(gate) * H + j;  // row of W_hh
        float sum = 0.0f;
        for (int k = 0; k < H; ++k)
            sum = fmaf(W_hh[g * H + k], h[k], sum);
        a[gate] = sum + b_hh[g];
        i[gate] = P[size_t(ids_tb[row]) * 3 * H + g];
    }
    const GRUCell cell = gru_cell(i, a, h[j]);
    float *gates = gates_tb + row * 3 * H + j;
    gates[0] = cell.r;
    gates[H] = cell.z;
    gates[2 * H] = cell.n;
    a_n_tb[row * H + j] = a[2];
    h_tb[(row + B) * H + j] = cell.h;
}

// One time step, t, from T - 1 down to -1; step -1 only computes dh0, the gradient of the initial state.
// Slow: a warp loads 32 neighbouring weights at once, but each row of the batch reads all of W_hh anew; a thread does
// 3H multiply-adds one after the other; and there are T + 1 launches.
// Fast twins: gru.cu, in tiles; gru_backward_persistent.cu, one launch, W_hh on chip.
extern "C" __global__ void gru_backward_step(float *da_tb, float *di_n_tb, float *dh0, float *dh_z_b,
                                             const float *dh_tb, const float *W_hh, const float *h_tb,
                                             const float *gates_tb, const float *a_n_tb, int t, int T, int B, int H)
{
    const size_t b = thread_in_grid() / H, j = thread_in_grid() % H;
    if (b >= B)
        return;
    float dh_later = 0.0f;  // of the last step, which no step follows
    if (t + 1 < T) {
        const float *da_later = da_tb + (size_t(t + 1) * B + b) * 3 * H;
        for (size_t g = 0; g < 3 * H; ++g)
            dh_later = fmaf(W_hh[g * H + j], da_later[g], dh_later);
        dh_later += dh_z_b[b * H + j];
    }
    if (t < 0) {
        dh0[b * H + j] = dh_later;
        return;
    }
    const size_t row = size_t(t) * B + b, unit = row * H + j;
    const float *gates = gates_tb + row * 3 * H + j;
    const float dh = dh_tb[unit] + dh_later, z = gates[H];
    const GRUCellGradient gradient = gru_cell_gradient(dh, gates[0], z, gates[2 * H], a_n_tb[unit], h_tb[unit]);
    for (int gate = 0; gate < 3; ++gate)
        da_tb[row * 3 * H + gate * H + j] = gradient.da[gate];
    di_n_tb[unit] = gradient.di[2];
    dh_z_b[b * H + j] = dh * z;
}

// Slow: V H multiply-adds follow one another in a thread, and T B threads are too few for a GPU; one load of a warp, of
// h or of the logits, touches 32 cache lines; the logits are read three times.
// Fast twin: cross_entropy.cu, whose blocks keep a tile of logits on chip.
extern "C" __global__ void cross_entropy_forward(float *dlogits, float *losses, const float *h, const float *W_out,
                                                 const float *b_out, const int *targets, int positions, int V, int H)
{
    const size_t p = thread_in_grid();
    if (p >= positions)
        return;
    float *row = dlogits + p * V;  // logits first, then their gradients
    float largest = __uint_as_float(0xff800000u);  // -infinity
    for (int v = 0; v < V; ++v) {
        float logit = 0.0f;
        for (int j = 0; j < H; ++j)
            logit = fmaf(h[p * H + j], W_out[size_t(v) * H + j], logit);
        row[v] = logit + b_out[v];
        largest = fmaxf(largest, row[v]);
    }
    double sum = 0.0;  // of exponentials relative to the largest, which cannot overflow
    for (int v = 0; v < V; ++v)
        sum += expf(row[v] - largest);
    losses[p] = logf(float(sum)) - (row[targets[p]] - largest);
    for (int v = 0; v < V; ++v)
        row[v] = (expf(row[v] - largest) / float(sum) - float(v == targets[p])) / float(positions);
}

// Launched with a single thread. Slow: each addition waits for the one before.
// Fast twin: mean_loss of cross_entropy.cu, one block of 1,024 threads.
extern "C" __global__ void mean_loss(float *loss, const float *losses, int positions)
{
    double sum = 0.0;
    for (int p = 0; p < positions; ++p)
        sum += losses[p];
    loss[0] = float(sum / positions);
}

// Launched with a single thread. Slow: it adds millions of squares one after the other while the rest of the GPU idles.
// Fast twins: square_sums of adam.cu, in up to 1,024 blocks, then norm_of_sums, in one.
extern "C" __global__ void global_norm(float *norm, const float *grads, size_t N)
{
    double sum = 0.0;
    for (size_t i = 0; i < N; ++i)
        sum += double(grads[i]) * grads[i];
    norm[0] = sqrtf(float(sum));
}

// Not slow: neighbouring threads read neighbouring elements. Fast twin: adam of adam.cu, four elements in one load.
// new_1 is 1 - beta_1 and new_2 is 1 - beta_2, rounded once.
extern "C" __global__ void adam(float *params, float *m, float *v, const float *grads, const float *norm,
                                const float *step_size, float clip_norm, float beta_1, float new_1, float beta_2,
                                float new_2, float epsilon, size_t N)
{
    const size_t i = thread_in_grid();
    if (i >= N || !(norm[0] < __uint_as_float(0x7f800000u)))
        return;  // a norm that is infinite or NaN leaves all parameters as they are
    const float g = grads[i] * (clip_norm > 0.0f && norm[0] > 0.0f ? fminf(1.0f, clip_norm / norm[0]) : 1.0f);
    m[i] = beta_1 * m[i] + new_1 * g;
    v[i] = beta_2 * v[i] + new_2 * (g * g);
    params[i] -= step_size[0] * (m[i] / (sqrtf(v[i]) + epsilon));
}

// The logits of one row; characters are ordered from the most to the least likely, of equal ones the smaller id first.
struct Row {
    const float *logits;
    int V, likeliest;
    float temperature;

    // How likely character v is, relative to the likeliest.
    __device__ float p(int v) const { return expf((logits[v] - logits[likeliest]) / temperature); }

    __device__ bool more_likely(int u, int v) const
    {
        return logits[u] > logits[v] || (logits[u] == logits[v] && u < v);
    }

    // The most likely of the characters less likely than v, or, if v is 0, of all characters; 0 if there is none.
    __device__ int next(int v) const
    {
        int best = 0;
        for (int u = 1; u < V; ++u)
            if ((v == 0 || more_likely(v, u)) && (best == 0 || more_likely(u, best)))
                best = u;
        return best;
    }
};

// The least likely character that top_k and top_p keep; 0 if they keep all.
__device__ int last_kept(const Row &row, int top_k, float top_p)
{
    int last = 0;
    for (int rank = 0; rank < top_k && (rank == 0 || last > 0); ++rank)
        last = row.next(last);
    if (top_p >= 1.0f)
        return last;
    float p_of_top_k = 0.0f;
    for (int v = 1; v < row.V; ++v)
        p_of_top_k += last == 0 || !row.more_likely(last, v) ? row.p(v) : 0.0f;
    int v = row.likeliest;
    for (float reached = row.p(v); v != last && !(reached >= top_p * p_of_top_k); reached += row.p(v))
        v = row.next(v);
    return v;
}

// Slow: a thread reads all V logits again for each character that top_k or top_p keeps, and there are only R threads.
// Fast twin: draw_character of generate.cuh, a block per row, which ranks all characters at once.
extern "C" __global__ void sample(int *ids, const float *logits, const float *uniforms, int R, int V, float temperature,
                                  int top_k, float top_p, float min_p)
{
    const size_t r = thread_in_grid();
    if (r >= R)
        return;
    Row row = {logits + r * V, V, 0, temperature};
    row.likeliest = row.next(0);
    ids[r] = row.likeliest;
    if (temperature == 0.0f)
        return;
    const int last = last_kept(row, top_k, top_p);
    const auto p_kept = [=](int v) {
        return (last == 0 || !row.more_likely(last, v)) && row.p(v) >= min_p ? row.p(v) : 0.0f;
    };
    float total = 0.0f, reached = 0.0f;
    for (int v = 1; v < V; ++v)
        total += p_kept(v);
    for (int v = 1; v < V && !(reached > uniforms[r] * total); ++v)
        if (p_kept(v) > 0.0f) {
            reached += p_kept(v);
            ids[r] = v;
        }
}
