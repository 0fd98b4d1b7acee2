// One GRU cell, of one row and one hidden unit, and its gradient: the only place in which kernels compute either.
//
//   r = sigmoid(i_r + a_r)      z = sigmoid(i_z + a_z)      n = tanh(i_n + r a_n)      h' = n + z (h - n)
//
//   dn = dh' (1 - z)            di_z = dn (h - n) z         dh  = dh' z + W_hh^T da
//   di_n = dn (1 - n^2)         di_r = di_n a_n r (1 - r)   da = (di_r, di_z, di_n r)
//
// i is the unit's input product and a its recurrent product, biases included. i, a, di and da have three numbers each,
// in the order r, z, n. The reset gate r acts after the recurrent product (cuDNN's, PyTorch's and Keras's reset_after
// form), so that one product serves all three gates.
// Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation".
#include "common.cuh"

struct GRUCell {
    float r, z, n, h;
};

__device__ __forceinline__ GRUCell gru_cell(const float (&i)[3], const float (&a)[3], float h_before)
{
    const float r = sigmoid(i[0] + a[0]), z = sigmoid(i[1] + a[1]), n = tanhf(i[2] + r * a[2]);
    return {r, z, n, n + z * (h_before - n)};
}

struct GRUCellGradient {
    float di[3], da[3];
};

// dh is the gradient of the new state, dh'. The caller computes dh of the old state, dh' z + W_hh^T da.
__device__ __forceinline__ GRUCellGradient gru_cell_gradient(float dh, float r, float z, float n, float a_n,
                                                             float h_before)
{
    const float dn = dh * (1.0f - z), di_n = dn * (1.0f - n * n);
    const float di_r = di_n * a_n * (r * (1.0f - r)), di_z = dn * (h_before - n) * z;
    return {{di_r, di_z, di_n}, {di_r, di_z, di_n * r}};
}
