"""The specification as an op set: each op of `rnn.reference` writes its results into arrays of the caller.

Arrays are made and copied by the functions of `rnn.cpu`, sequences in the same memory order as all arrays. It is as
slow as the specification: for tests, and for `rnn.check`.
"""

from __future__ import annotations

import functools
import types

import numpy as np

from char_gru.rnn import reference
from char_gru.rnn.cpu import copy, copy_in, empty, peak_memory_mib, read, read_scalar, replayable, to_host
from char_gru.rnn.reference import GRUSaved

__all__ = ["copy", "copy_in", "empty", "peak_memory_mib", "read", "read_scalar", "replayable", "to_host"]

empty_activations = empty


def op_set(precision: str = "fp32") -> types.SimpleNamespace:
    """All ops, their matrix products in one precision: fp32, tf32 or bf16."""
    by_precision = (input_table_forward, input_table_backward, gru_forward, gru_backward, cross_entropy_forward,
                    cross_entropy_backward)
    return types.SimpleNamespace(**globals() | {op.__name__: functools.partial(op, precision=precision)
                                                for op in by_precision})


def input_table_forward(x, W_ih, b_ih, P, *, precision="fp32") -> None:
    P[...] = reference.input_table_forward(x, W_ih, b_ih, precision)


def input_table_backward(dP, x, W_ih, dx, dW_ih, db_ih, *, precision="fp32") -> None:
    dx[...], dW_ih[...], db_ih[...] = reference.input_table_backward(dP, x, W_ih, precision)


def gru_saved(T: int, B: int, H: int, dtype=np.float32) -> GRUSaved:
    return GRUSaved(*(np.empty(shape, dtype) for shape in ((T + 1, B, H), (T, B, 3 * H), (T, B, H))))


def gru_forward(P, ids_tb, W_hh, b_hh, h0, saved: GRUSaved, *, precision="fp32") -> None:
    for array, result in zip(saved, reference.gru_forward(P, ids_tb, W_hh, b_hh, h0, precision)):
        array[:len(result)] = result


def gru_backward(dy_tb, W_y, ids_tb, W_hh, saved: GRUSaved, dP, dW_hh, db_hh, dh0, *, precision="fp32") -> None:
    T = len(ids_tb)
    window = GRUSaved(saved.h_tb[:T + 1], saved.gates_tb[:T], saved.a_n_tb[:T])
    dP[...], dW_hh[...], db_hh[...], dh0[...] = reference.gru_backward(dy_tb, W_y, ids_tb, W_hh, window, len(dP),
                                                                       precision)


def dropout_forward(x_tb, rate, seed, layer, step, keep_tb, y_tb) -> None:
    keep_tb[...], y_tb[...] = reference.dropout_forward(x_tb, rate, seed, layer, int(step[0]))


def dropout_backward(dy_tb, rate, keep_tb, dx_tb) -> None:
    dx_tb[...] = reference.dropout_backward(dy_tb, rate, keep_tb)


def cross_entropy_forward(h_tb, W_out, b_out, targets_tb, loss, dlogits_tb, *, precision="fp32") -> None:
    loss[0], dlogits_tb[...] = reference.cross_entropy_forward(h_tb, W_out, b_out, targets_tb, precision)


def cross_entropy_backward(dlogits_tb, h_tb, dW_out, db_out, W_out=None, dh_tb=None, *, precision="fp32") -> None:
    dW_out[...], db_out[...], *dh = reference.cross_entropy_backward(dlogits_tb, h_tb, W_out, precision)
    if dh:
        [dh_tb[...]] = dh


def global_norm(grads, norm) -> None:
    norm[0] = reference.global_norm(grads)


def adam(params, grads, m, v, norm, step_size, clip_norm=0.0, beta_1=0.9, beta_2=0.999, epsilon=1e-7) -> None:
    params[...], m[...], v[...] = reference.adam(params, grads, m, v, norm[0], step_size[0], clip_norm, beta_1, beta_2,
                                                 epsilon)


def sample(logits, uniforms, ids, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> None:
    ids[...] = reference.sample(logits, uniforms, temperature, top_k, top_p, min_p)


def generation_saved(R: int, H: int, V: int, dtype=np.float32) -> None:
    """Nothing: the specification keeps no buffers."""


def generate(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, saved, temperature=1.0, top_k=0, top_p=1.0,
             min_p=0.0, *, weights="fp32") -> None:
    h[...], ids[...], ids_tr[...] = reference.generate(params, P, h, ids, forced_tr, uniforms_tr, temperature, top_k,
                                                       top_p, min_p, weights)
