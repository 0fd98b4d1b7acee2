"""Launchers of naive.cu: the ops of the training step, and drawing a character, by one thread per output.

Each launcher takes the arguments of the fast op of the same name and computes the same in fp32, its only precision.
"""

import types

import numpy as np

from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.kernels.adam import adam_scalars, check_adam, check_global_norm
from char_gru.kernels.arrays import copy
from char_gru.kernels.cross_entropy import check_cross_entropy_backward, check_cross_entropy_forward
from char_gru.kernels.generate import check_sample, draw_options
from char_gru.kernels.gru import GRUSaved, check_gru_backward, check_gru_forward
from char_gru.kernels.input_table import check_input_table_backward, check_input_table_forward, check_sum_by_id
from char_gru.kernels.matmul import check_column_sums, check_matmul
from char_gru.kernels.scratch import scratch
from char_gru.kernels.sizes import ceil_div

THREADS = 256  # of a block


def op_set() -> types.SimpleNamespace:
    """The op set of the kernels in fp32, with the naive ops in place of their fast twins."""
    return types.SimpleNamespace(**vars(kernels.op_set("fp32")) | {op.__name__: op for op in _OPS})


def matmul(A, B, C, *, transpose_a=False, transpose_b=False, bias=None, precision="fp32") -> None:
    """As `kernels.matmul.matmul`, by one thread per element of C."""
    _check_precision(precision)
    M, N, K = check_matmul(A, B, C, transpose_a, transpose_b, bias)
    strides_a, strides_b = (1, M) if transpose_a else (K, 1), (1, K) if transpose_b else (N, 1)  # of m, k; of k, n
    add_bias, bias = bias is not None, C if bias is None else bias  # without a bias, C stands in and is not read
    _launch("matmul", M * N, [C, A, B, bias, *map(np.int32, (M, N, K, *strides_a, *strides_b, add_bias))])


def column_sums(A, sums) -> None:
    """As `kernels.matmul.column_sums`, by one thread per column."""
    check_column_sums(A, sums)
    M, N = A.shape
    _launch("column_sums", N, [sums, A, np.int32(M), np.int32(N)])


def sum_by_id(da_tb, di_n_tb, ids_tb, dP) -> None:
    """As `kernels.input_table.sum_by_id`, by one thread per element of dP, without sorting."""
    check_sum_by_id(da_tb, di_n_tb, ids_tb, dP)
    V, H = len(dP), di_n_tb.shape[2]
    _launch("sum_by_id", V * 3 * H, [dP, da_tb, di_n_tb, ids_tb, *map(np.int32, (ids_tb.size, V, H))])


def input_table_forward(x, W_ih, b_ih, P, *, precision="fp32") -> None:
    """As `kernels.input_table_forward`, by one thread per element of P."""
    check_input_table_forward(x, W_ih, b_ih, P)
    matmul(x, W_ih, P, transpose_b=True, bias=b_ih, precision=precision)


def input_table_backward(dP, x, W_ih, dx, dW_ih, db_ih, *, precision="fp32") -> None:
    """As `kernels.input_table_backward`, by one thread per element of each gradient."""
    check_input_table_backward(dP, x, W_ih, dx, dW_ih, db_ih)
    matmul(dP, W_ih, dx, precision=precision)
    matmul(dP, x, dW_ih, transpose_a=True, precision=precision)
    column_sums(dP, db_ih)


def gru_forward(P, ids_tb, W_hh, b_hh, h0, saved: GRUSaved, *, precision="fp32") -> None:
    """As `kernels.gru_forward`, by one launch per time step and one thread per row and hidden unit."""
    _check_precision(precision)
    check_gru_forward(P, ids_tb, W_hh, b_hh, h0, saved, precision)
    (T, B), H = ids_tb.shape, W_hh.shape[1]
    copy(saved.h_tb[0], h0)
    for t in range(T):
        _launch("gru_forward_step", B * H, [saved.h_tb, saved.gates_tb, saved.a_n_tb, P, ids_tb, W_hh, b_hh,
                                            *map(np.int32, (t, B, H))])


def gru_backward(dy_tb, W_y, ids_tb, W_hh, saved: GRUSaved, dP, dW_hh, db_hh, dh0, *, precision="fp32") -> None:
    """As `kernels.gru_backward`, by one launch per time step and one thread per row and hidden unit."""
    _check_precision(precision)
    check_gru_backward(dy_tb, W_y, ids_tb, W_hh, saved, dP, dW_hh, db_hh, dh0, precision)
    (T, B), H = ids_tb.shape, W_hh.shape[1]
    dh_tb = dy_tb
    if W_y is not None:
        dh_tb = scratch("gru_backward", (T, B, H))
        matmul(dy_tb.reshape(T * B, len(W_y)), W_y, dh_tb.reshape(T * B, H))
    for t in range(T - 1, -2, -1):
        _launch("gru_backward_step", B * H, [saved.da_tb, saved.di_n_tb, dh0, saved.dh_z_b, dh_tb, W_hh, saved.h_tb,
                                             saved.gates_tb, saved.a_n_tb, *map(np.int32, (t, T, B, H))])
    da = saved.da_tb[:T].reshape(T * B, 3 * H)
    matmul(da, saved.h_tb[:T].reshape(T * B, H), dW_hh, transpose_a=True)
    column_sums(da, db_hh)
    sum_by_id(saved.da_tb[:T], saved.di_n_tb[:T], ids_tb, dP)


def cross_entropy_forward(h_tb, W_out, b_out, targets_tb, loss, dlogits_tb, *, precision="fp32") -> None:
    """As `kernels.cross_entropy_forward`, by one thread per position."""
    _check_precision(precision)
    check_cross_entropy_forward(h_tb, W_out, b_out, targets_tb, loss, dlogits_tb)
    positions, (V, H) = targets_tb.size, W_out.shape
    losses = scratch("cross_entropy_forward", (positions,))
    _launch("cross_entropy_forward", positions, [dlogits_tb, losses, h_tb, W_out, b_out, targets_tb,
                                                 *map(np.int32, (positions, V, H))])
    _launch_one_thread("mean_loss", [loss, losses, np.int32(positions)])


def cross_entropy_backward(dlogits_tb, h_tb, dW_out, db_out, W_out=None, dh_tb=None, *, precision="fp32") -> None:
    """As `kernels.cross_entropy_backward`, by one thread per element of each gradient."""
    check_cross_entropy_backward(dlogits_tb, h_tb, dW_out, db_out, W_out, dh_tb)
    V, H = dW_out.shape
    matmul(dlogits_tb.reshape(-1, V), h_tb.reshape(-1, H), dW_out, transpose_a=True, precision=precision)
    column_sums(dlogits_tb.reshape(-1, V), db_out)
    if W_out is not None:
        matmul(dlogits_tb.reshape(-1, V), W_out, dh_tb.reshape(-1, H), precision=precision)


def global_norm(grads, norm) -> None:
    """As `kernels.global_norm`, by one thread."""
    check_global_norm(grads, norm)
    _launch_one_thread("global_norm", [norm, grads, np.uint64(grads.size)])


def adam(params, grads, m, v, norm, step_size, clip_norm=0.0, beta_1=0.9, beta_2=0.999, epsilon=1e-7) -> None:
    """As `kernels.adam`, by one thread per parameter."""
    check_adam(params, grads, m, v, norm, step_size)
    _launch("adam", params.size, [params, m, v, grads, norm, step_size,
                                  *adam_scalars(clip_norm, beta_1, beta_2, epsilon), np.uint64(params.size)])


def sample(logits, uniforms, ids, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> None:
    """As `kernels.sample`, by one thread per row."""
    R, V = check_sample(logits, uniforms, ids)
    _launch("sample", R, [ids, logits, uniforms, np.int32(R), np.int32(V),
                          *draw_options(V, temperature, top_k, top_p, min_p)])


_OPS = (input_table_forward, input_table_backward, gru_forward, gru_backward, cross_entropy_forward,
        cross_entropy_backward, global_norm, adam, sample)


def _check_precision(precision: str) -> None:
    if precision != "fp32":
        raise ValueError(f"precision: expected fp32, the only one of naive.cu, got {precision!r}")


def _launch(kernel: str, outputs: int, args: list) -> None:
    runtime.launch("naive", kernel, ceil_div(outputs, THREADS), THREADS, args, constants={})


def _launch_one_thread(kernel: str, args: list) -> None:
    runtime.launch("naive", kernel, 1, 1, args, constants={})
