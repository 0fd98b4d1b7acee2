// Global norm of the gradients, and Adam's update, over the flat buffers of all parameters.
//
//   norm = sqrt(sum g^2)
//   g' = g min(1, clip_norm / norm), where clip_norm and norm are above 0
//   m = beta_1 m + (1 - beta_1) g'   v = beta_2 v + (1 - beta_2) g'^2   p = p - step_size m / (sqrt(v) + epsilon)
//
// params, grads, m, v (N,) float32; norm, step_size (1,) float32, in device memory since they change from step to step.
//
// A thread of square_sums owns every (gridDim THREADS)-th group of four gradients, a block one element of `sums`.
// The one block of norm_of_sums owns the norm. A thread of adam owns four elements of every buffer. Sums are added in
// an order that depends on N and the alignment alone: four by thread, a tree over the warp, then warp after warp.
// Bytes: norm 4 N read; adam 16 N read, 12 N written.
// Why not naive.cu's way: its norm is one thread that adds N numbers one after the other, while all others idle; its
// adam moves the same bytes, four at a time instead of sixteen.
// Variants: buffers that all start on 16 bytes move as float4, else (slices) as float.
// Source: Kingma and Ba, "Adam", section 2, last paragraph (epsilon outside the corrected root, as Keras has it).

#include "block.cuh"

// sums[block]: the sum of squares of the elements that a block owns.
extern "C" __global__ void __launch_bounds__(THREADS)
    square_sums(float *__restrict__ sums, const float *__restrict__ grads, size_t N)
{
    __shared__ float scratch[WARPS];
    const size_t stride = size_t(gridDim.x) * THREADS;
    const size_t quads = size_t(grads) % sizeof(float4) == 0 ? N / 4 : 0;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);  // four short sums err less than a long one, and run in parallel
    for (size_t i = thread_in_grid(); i < quads; i += stride) {
        const float4 g = reinterpret_cast<const float4 *>(grads)[i];
        sum.x += g.x * g.x;
        sum.y += g.y * g.y;
        sum.z += g.z * g.z;
        sum.w += g.w * g.w;
    }
    for (size_t i = 4 * quads + thread_in_grid(); i < N; i += stride)
        sum.x += grads[i] * grads[i];
    const float total = block_sum<WARPS>((sum.x + sum.y) + (sum.z + sum.w), scratch);
    if (threadIdx.x == 0)
        sums[blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    norm_of_sums(float *__restrict__ norm, const float *__restrict__ sums, int blocks)
{
    __shared__ float scratch[WARPS];
    const float sum = array_sum<WARPS>(sums, blocks, scratch);
    if (threadIdx.x == 0)
        norm[0] = sqrtf(sum);
}

struct Update {
    float scale, beta_1, new_1, beta_2, new_2, step_size, epsilon;

    __device__ __forceinline__ void operator()(float &p, float g, float &m, float &v) const
    {
        g *= scale;
        m = beta_1 * m + new_1 * g;
        v = beta_2 * v + new_2 * (g * g);
        // Approximate, each to 2 ulp: exact roots and divisions call functions for special operands, 0 among them.
        const float root = v * rsqrtf(fmaxf(v, 1.17549435e-38f));  // of at least 2^-126, so that 0 gives 0
        p -= step_size * __fdividef(m, root + epsilon);
    }
};

// new_1 is 1 - beta_1 and new_2 is 1 - beta_2, rounded once: 1 - 0.999f in float is off by 1.3e-5 of its value.
extern "C" __global__ void __launch_bounds__(THREADS)
    adam(float *__restrict__ params, float *__restrict__ m, float *__restrict__ v, const float *__restrict__ grads,
         const float *__restrict__ norm, const float *__restrict__ step_size, float clip_norm, float beta_1,
         float new_1, float beta_2, float new_2, float epsilon, size_t N)
{
    const float INFINITE = __uint_as_float(0x7f800000u);
    if (!(norm[0] < INFINITE))
        return;  // the whole grid: a training that diverges keeps its last finite parameters
    const float scale = clip_norm > 0.0f && norm[0] > 0.0f ? fminf(1.0f, clip_norm / norm[0]) : 1.0f;
    const Update update = {scale, beta_1, new_1, beta_2, new_2, step_size[0], epsilon};
    const size_t stride = size_t(gridDim.x) * THREADS;
    const size_t quads = (size_t(params) | size_t(m) | size_t(v) | size_t(grads)) % sizeof(float4) == 0 ? N / 4 : 0;
    for (size_t i = thread_in_grid(); i < quads; i += stride) {
        const float4 g = reinterpret_cast<const float4 *>(grads)[i];
        float4 &params_i = reinterpret_cast<float4 *>(params)[i], p = params_i;
        float4 &m_i = reinterpret_cast<float4 *>(m)[i], new_m = m_i;
        float4 &v_i = reinterpret_cast<float4 *>(v)[i], new_v = v_i;
        update(p.x, g.x, new_m.x, new_v.x);
        update(p.y, g.y, new_m.y, new_v.y);
        update(p.z, g.z, new_m.z, new_v.z);
        update(p.w, g.w, new_m.w, new_v.w);
        params_i = p;
        m_i = new_m;
        v_i = new_v;
    }
    for (size_t i = 4 * quads + thread_in_grid(); i < N; i += stride)
        update(params[i], grads[i], m[i], v[i]);
}
