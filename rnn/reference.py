"""The specification: every op of training and generation as a pure function, arrays in, results out.

The op sets, `rnn.cpu` and `kernels`, are compared with these functions. An op set takes the arrays for its results as
further arguments, in the order in which the functions here return them.

The GRU is the form in which the reset gate acts after the recurrent product (PyTorch's, cuDNN's, and Keras's
`reset_after=True`), so that one product per step serves all three gates:

    i = W_ih x + b_ih                a = W_hh h + b_hh
    r = sigmoid(i_r + a_r)           z = sigmoid(i_z + a_z)           n = tanh(i_n + r * a_n)
    h' = (1 - z) * n + z * h

Axes: T time, B batch, V vocabulary, E embedding, H hidden units, R rows of generated text; gates lie r, z, n along 3H.
`X_tb` has axes (T, B, ...), `dX` is the gradient of the loss with respect to X. Floating arrays are float32 or float64,
one dtype in a call. `precision` says how matrix products round their operands; nothing else is rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class GRUSaved(NamedTuple):
    """States and gates of a window, which its backward pass reads; `h_tb[0]` is the initial state."""

    h_tb: np.ndarray  # (T+1, B, H)
    gates_tb: np.ndarray  # (T, B, 3H): r, z, n
    a_n_tb: np.ndarray  # (T, B, H)


def product(a, b, precision="fp32"):
    """The matrix product a b of operands rounded to a precision, summed in their dtype."""
    return rounded(a, precision) @ rounded(b, precision)


def rounded(x, precision):
    """x as tensor cores read it, in the dtype of x: fp32 unchanged; tf32 with a mantissa of 10 bits, ties away from
    zero; bf16 with a mantissa of 7 bits, ties to even."""
    if precision == "fp32":
        return x
    bits = x.astype(np.float32).view(np.uint32)
    half, kept = {"tf32": (0x1000, 0xFFFFE000), "bf16": (0x7FFF + (bits >> 16 & 1), 0xFFFF0000)}[precision]
    return ((bits + half) & kept).view(np.float32).astype(x.dtype)


def input_table_forward(x, W_ih, b_ih, precision="fp32"):
    """Input products of a layer, one row for each distinct input: P = x W_ih^T + b_ih.

    Layer 0 has one distinct input per character (x is W_emb), so V rows serve T*B positions; the layers above it have
    one per position (x is the output of the layer below, N = T*B).

    Shapes: x (N, E); W_ih (3H, E); b_ih (3H,); result P (N, 3H).
    """
    return product(x, W_ih.T, precision) + b_ih


def input_table_backward(dP, x, W_ih, precision="fp32"):
    """Gradients of `input_table_forward`.

    Shapes: dP (N, 3H); x (N, E); W_ih (3H, E); results dx (N, E), dW_ih (3H, E), db_ih (3H,).
    """
    return product(dP, W_ih, precision), product(dP.T, x, precision), dP.sum(axis=0)


def gru_cell(i, h, W_hh, b_hh, precision="fp32"):
    """One step of the GRU.

    Shapes: i (B, 3H), input products; h (B, H); W_hh (3H, H); b_hh (3H,); results: the new h (B, H), gates (B, 3H),
    which are r, z and n, and a_n (B, H).
    """
    a = product(h, W_hh.T, precision) + b_hh
    (i_r, i_z, i_n), (a_r, a_z, a_n) = np.split(i, 3, axis=1), np.split(a, 3, axis=1)
    r, z = _sigmoid(i_r + a_r), _sigmoid(i_z + a_z)
    n = np.tanh(i_n + r * a_n)
    return (1 - z) * n + z * h, np.concatenate([r, z, n], axis=1), a_n


def gru_cell_backward(dh_new, h, gates, a_n, W_hh, precision="fp32"):
    """Gradients of `gru_cell`, from dh_new, the gradient of the new h.

    Shapes: dh_new, h, a_n (B, H); gates (B, 3H); W_hh (3H, H); results di (B, 3H), da (B, 3H), dh (B, H).
    """
    r, z, n = np.split(gates, 3, axis=1)
    dz, dn = dh_new * (h - n), dh_new * (1 - z)
    di_n = dn * (1 - n**2)
    di_r, di_z = di_n * a_n * r * (1 - r), dz * z * (1 - z)
    di, da = (np.concatenate([di_r, di_z, last], axis=1) for last in (di_n, di_n * r))
    return di, da, dh_new * z + product(da, W_hh, precision)


def gru_forward(P, ids_tb, W_hh, b_hh, h0, precision="fp32"):
    """One GRU layer over a window; the input product of step t, row b is `P[ids_tb[t, b]]`.

    Shapes: P (N, 3H); ids_tb (T, B), integers in [0, N); W_hh (3H, H); b_hh (3H,); h0 (B, H); results h_tb
    (T+1, B, H), gates_tb (T, B, 3H), a_n_tb (T, B, H), as a `GRUSaved`.
    """
    h_tb, gates_tb, a_n_tb = [h0], [], []
    for ids in ids_tb:
        h, gates, a_n = gru_cell(P[ids], h_tb[-1], W_hh, b_hh, precision)
        h_tb.append(h)
        gates_tb.append(gates)
        a_n_tb.append(a_n)
    return GRUSaved(np.array(h_tb), np.array(gates_tb), np.array(a_n_tb))


def gru_backward(dy_tb, W_y, ids_tb, W_hh, saved, N, precision="fp32"):
    """Back through time over the window of a `gru_forward`.

    The gradient that reaches each state from outside the recurrence is dy_tb W_y, or dy_tb itself where W_y is None.
    dP[v] is the sum of di over the positions of id v.

    Shapes: dy_tb (T, B, M) and W_y (M, H), which are dlogits_tb and W_out for the layer below the output, or dy_tb
    (T, B, H) and None; ids_tb (T, B); W_hh (3H, H); saved, from `gru_forward`; N, the number of rows of P; results
    dP (N, 3H), dW_hh (3H, H), db_hh (3H,), dh0 (B, H).
    """
    dh_tb = dy_tb if W_y is None else product(dy_tb, W_y, precision)
    h_tb, gates_tb, a_n_tb = saved
    di_tb, da_tb, dh = np.empty_like(gates_tb), np.empty_like(gates_tb), np.zeros_like(h_tb[0])
    for t in reversed(range(len(ids_tb))):
        di_tb[t], da_tb[t], dh = gru_cell_backward(dh_tb[t] + dh, h_tb[t], gates_tb[t], a_n_tb[t], W_hh, precision)
    dP = np.zeros((N, len(W_hh)), W_hh.dtype)
    np.add.at(dP, ids_tb, di_tb)
    return dP, product(_rows(da_tb).T, _rows(h_tb[:-1]), precision), da_tb.sum(axis=(0, 1)), dh


def dropout_forward(x_tb, rate, seed, layer, step):
    """Set a share `rate` of the elements to zero and scale the kept elements by 1 / (1 - rate).

    Element k of x_tb (counted along H, then B, then T) is kept if 32-bit word k of the Philox stream with key
    (seed, layer) and counter (0, step, 0, 0) is at least rate * 2^32: the same mask on every device.

    Shapes: x_tb (T, B, H); step, the number of the training step; results keep_tb (T, B, H) bool, y_tb (T, B, H).
    """
    stream = np.random.Philox(key=[seed, layer], counter=[0, step, 0, 0])
    words = stream.random_raw(-(-x_tb.size // 2)).astype("<u8").view("<u4")[:x_tb.size]
    keep_tb = words.reshape(x_tb.shape) >= int(rate * 2**32)
    return keep_tb, dropout_backward(x_tb, rate, keep_tb)


def dropout_backward(dy_tb, rate, keep_tb):
    """Gradient of `dropout_forward`: the same mask and the same scale.

    Shapes: dy_tb (T, B, H); keep_tb (T, B, H) bool; result dx_tb (T, B, H).
    """
    return dy_tb * keep_tb * (1 / (1 - rate))


def cross_entropy_forward(h_tb, W_out, b_out, targets_tb, precision="fp32"):
    """Output layer, softmax and mean cross-entropy, and the gradient of this loss with respect to the logits.

    Shapes: h_tb (T, B, H); W_out (V, H); b_out (V,); targets_tb (T, B), integers in [0, V); results loss, a number, in
    nats per character, and dlogits_tb (T, B, V) = (softmax(logits) - onehot(target)) / (T*B).
    """
    logits_tb = product(h_tb, W_out.T, precision) + b_out
    logits_tb = logits_tb - logits_tb.max(axis=2, keepdims=True)
    exp_tb = np.exp(logits_tb)
    sum_tb = exp_tb.sum(axis=2, keepdims=True)
    targets_tb = targets_tb[:, :, None]
    loss = np.mean(np.log(sum_tb) - np.take_along_axis(logits_tb, targets_tb, axis=2))
    onehot_tb = targets_tb == np.arange(len(W_out))
    return loss, (exp_tb / sum_tb - onehot_tb) / targets_tb.size


def cross_entropy_backward(dlogits_tb, h_tb, W_out=None, precision="fp32"):
    """Gradients of the output layer's parameters and, where W_out is given, of h_tb: dlogits_tb W_out. Else
    `gru_backward` computes that product, unless dropout lies between the two.

    Shapes: dlogits_tb (T, B, V); h_tb (T, B, H); W_out (V, H); results dW_out (V, H), db_out (V,), and with W_out
    dh_tb (T, B, H).
    """
    dlogits = _rows(dlogits_tb)
    gradients = product(dlogits.T, _rows(h_tb), precision), dlogits.sum(axis=0)
    return gradients if W_out is None else (*gradients, product(dlogits_tb, W_out, precision))


def global_norm(grads):
    """Euclidean norm of all gradients together.

    Shapes: grads (N,), the flat buffer; result a number.
    """
    return np.sqrt(np.sum(grads**2))


def adam(params, grads, m, v, norm, step_size, clip_norm=0.0, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """Adam as Keras computes it, with the gradient scaled so that its global norm is at most clip_norm (if above 0).

    step_size is learning_rate sqrt(1 - beta_2^t) / (1 - beta_1^t), t counted from 1. If `norm` is not finite, nothing
    changes: a training that diverges keeps its last finite parameters.

    Shapes: params, grads, m, v (N,); norm, from `global_norm`; step_size a number; results params, m, v (N,).
    """
    if not np.isfinite(norm):
        return params, m, v
    g = grads * min(1.0, clip_norm / norm) if clip_norm > 0 and norm > 0 else grads
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g**2
    return params - step_size * m / (np.sqrt(v) + epsilon), m, v


def sample(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one character per row by inverse CDF; `[UNK]`, id 0, is never drawn.

    The logits are divided by the temperature; temperature 0 takes the most likely character, of equally likely ones the
    one with the smallest id. Then three filters run in this order:

        top_k    keeps the top_k most likely characters (0: all); equally likely characters rank in the order of ids
        top_p    of the characters kept so far, keeps the fewest most likely ones that together hold at least the share
                 top_p of the kept probability
        min_p    of these, keeps the characters at least min_p times as likely as the most likely character

    The character drawn is the first whose cumulative share of the kept probability, in the order of ids, exceeds the
    row's uniform number.

    Shapes: logits (R, V); uniforms (R,), in [0, 1); result ids (R,), int32.
    """
    known = logits[:, 1:]
    with np.errstate(over="ignore"):  # float32 overflows at a huge temperature, and in a division by a tiny one
        temperature = logits.dtype.type(temperature)
        if temperature == 0:
            return (1 + known.argmax(axis=1)).astype(np.int32)
        p = np.exp((known - known.max(axis=1, keepdims=True)) / temperature)
    order = np.argsort(-known, axis=1, kind="stable")  # the most likely character first
    ranked = np.take_along_axis(p, order, axis=1)
    if top_k:
        ranked = np.where(np.arange(ranked.shape[1]) < top_k, ranked, 0)
    if top_p < 1:
        reached = np.cumsum(ranked, axis=1)
        before = np.pad(reached[:, :-1], ((0, 0), (1, 0)))
        ranked = np.where(before < top_p * reached[:, -1:], ranked, 0)
    p = np.take_along_axis(ranked, np.argsort(order, axis=1), axis=1)  # in the order of ids again
    cumulative = np.cumsum(np.where(p >= min_p, p, 0), axis=1)  # the most likely character has p = 1
    # A uniform number below 1 times the total rounds to less than the total, so the last cumulative sum exceeds it.
    return (1 + (cumulative > uniforms[:, None] * cumulative[:, -1:]).argmax(axis=1)).astype(np.int32)


def generate(params, P, h, ids, forced_tr, uniforms_tr, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
             weights="fp32"):
    """Read and write R rows of text, one character per row and step.

    Each step reads the last character of each row, moves the states on and yields the next character: the forced one
    where forced_tr is not negative (prompts are read this way), else one drawn as `sample` says. W_hh, W_ih above layer
    0 and W_out are rounded to the precision `weights`, nothing else is.

    Shapes: params name -> array, as `rnn.params.named_views` gives them; P (V, 3H), the input table of layer 0;
    h (layers, R, H); ids (R,), the characters before the first step; forced_tr (T, R); uniforms_tr (T, R) in [0, 1);
    results h (layers, R, H), ids (R,), the last characters, and ids_tr (T, R) int32, the characters of all steps.
    """
    W = {name: rounded(array, weights) for name, array in params.items() if name.startswith("W")}
    ids_tr = np.empty(forced_tr.shape, np.int32)
    for t in range(len(forced_tr)):
        states, i = [], P[ids]
        for layer, state in enumerate(h):
            if layer > 0:
                i = input_table_forward(states[-1], W[f"W_ih.{layer}"], params[f"b_ih.{layer}"])
            states.append(gru_cell(i, state, W[f"W_hh.{layer}"], params[f"b_hh.{layer}"])[0])
        h = np.array(states)
        drawn = sample(product(h[-1], W["W_out"].T) + params["b_out"], uniforms_tr[t], temperature, top_k, top_p, min_p)
        ids = ids_tr[t] = np.where(forced_tr[t] >= 0, forced_tr[t], drawn)
    return h, ids, ids_tr


def _sigmoid(x):
    """1 / (1 + exp(-x)), by a function that cannot overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def _rows(x_tb):
    """(T, B, n) as (T*B, n)."""
    return x_tb.reshape(-1, x_tb.shape[2])
