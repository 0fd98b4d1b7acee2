"""The op set of the CPU: every op of training and generation in NumPy, as quick as NumPy and BLAS allow.

`rnn.reference` says what each op computes; here it is computed in place, in memory orders that BLAS likes.

Axes: T time, B batch, V vocabulary, E embedding, H hidden units, R rows of generated text; gates lie r, z, n along 3H.
All functions take float32 or float64 arrays (one dtype in a call) and write their results into arrays of the caller,
made once per run: every op overwrites its outputs. Sums run in a fixed order, so equal inputs give equal bits.

Memory order: sequences have shape (T, B, n) here as everywhere, but `empty_activations` makes their last axis the
outermost in memory. A time step is then a matrix of units by batch, the order in which BLAS multiplies it fastest,
and all steps together are still one matrix of (T*B, n), as the products over all steps need it.
"""

from __future__ import annotations

import functools
import os
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

ADAM_CHUNK = 1 << 16
"""Elements that Adam updates at a time; its five arrays then stay in the cache."""

FEW_ROWS = 8
"""Up to this many rows of generated text, many small products with a few rows of the weights are faster than one."""

SMALL_PRODUCT, SMALL_ROWS = 600_000, 96
"""Multiply-adds of such a small product, and rows of its weights, at most: OpenBLAS computes it on one thread, without
the copy of the weights that it makes for a larger one and that takes longer than reading them once."""

SHARE = 1 << 19
"""Weights whose small products are worth a thread of their own: handing them to it takes some 40 microseconds."""

PRODUCT_BLOCK = 3 << 18
"""Elements of W_hh that BLAS multiplies with a batch at a time: faster than a larger matrix in one piece."""


# Arrays

def empty(shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
    """An array for parameters, states and scalars."""
    return np.empty(shape, dtype)


def empty_activations(shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
    """An array whose last axis is the outermost in memory, for sequences and tables."""
    return np.moveaxis(np.empty((shape[-1], *shape[:-1]), dtype), 0, -1)


def copy_in(destination: np.ndarray, source: np.ndarray) -> None:
    """Copy an array of the host to one of the device, converting its dtype; any order in memory will do.

    Raises: ValueError for a source of another shape: nothing is broadcast.
    """
    if destination.shape != np.shape(source):
        raise ValueError(f"destination: expected an array of the source's shape {np.shape(source)}, "
                         f"got {destination.shape}")
    destination[...] = source


def copy(destination: np.ndarray, source: np.ndarray) -> None:
    """Copy between arrays of the device."""
    destination[...] = source


def to_host(array: np.ndarray) -> np.ndarray:
    """A contiguous NumPy copy of an array of the device."""
    return np.array(array, order="C")


def read(array: np.ndarray) -> Callable[[], np.ndarray]:
    """The content of an array as it is now, given by a call at any later time."""
    content = to_host(array)
    return lambda: content


def read_scalar(array: np.ndarray) -> float:
    """The value of a one-element array as it is now, for `float()` at any later time."""
    return array.item()


def peak_memory_mib() -> float:
    """The largest memory that this process has taken so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


# Launching

def replayable(function: Callable[..., None]) -> Callable[..., None]:
    """A function that runs a fixed sequence of ops on fixed arrays, to be called many times with the same arguments.

    The CPU returns the function itself; an op set whose launches cost time may record the ops and replay them as one.
    """
    return function


# Threads

def _threads() -> int:
    """How many threads compute small products: as many as OpenBLAS takes for large ones, by the same variables."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        given = os.environ.get(name, "")
        if given.isdecimal() and int(given):
            return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(_threads() - 1, 1))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


# Input table

def input_table_forward(x, W_ih, b_ih, P) -> None:
    """Input products of a layer, one row for each distinct input: P = x W_ih^T + b_ih.

    Layer 0 has one distinct input per character (x is W_emb), so V rows serve T*B positions; the layers above it have
    one per position (x is the output of the layer below, N = T*B).

    Shapes: x (N, E); W_ih (3H, E); b_ih (3H,); result P (N, 3H).
    """
    np.matmul(x, W_ih.T, out=P)
    P += b_ih


def input_table_backward(dP, x, W_ih, dx, dW_ih, db_ih) -> None:
    """Gradients of `input_table_forward`.

    Shapes: dP (N, 3H); x (N, E); W_ih (3H, E); results dx (N, E), dW_ih (3H, E), db_ih (3H,).
    """
    np.matmul(dP, W_ih, out=dx)
    np.matmul(dP.T, x, out=dW_ih)
    np.sum(dP, axis=0, out=db_ih)


# Recurrence

class GRUSaved(NamedTuple):
    """Results of one layer's forward pass that its backward pass reads, and buffers of both passes.

    h_tb (T+1, B, H): states, `h_tb[0]` the initial one; gates_tb (T, B, 3H): r, z, n; a_n_tb (T, B, H);
    da_tb (T, B, 3H): gradients of a, written by the backward pass. a_b and i_b (B, 3H), h_b and product_b (B, H) hold
    one time step: BLAS multiplies these contiguous arrays faster than a slice of the whole sequence. W_hh_columns
    (H, 3H): W_hh^T, a contiguous copy for the backward pass.
    """

    h_tb: np.ndarray
    gates_tb: np.ndarray
    a_n_tb: np.ndarray
    da_tb: np.ndarray
    a_b: np.ndarray
    i_b: np.ndarray
    h_b: np.ndarray
    product_b: np.ndarray
    W_hh_columns: np.ndarray


def gru_saved(T: int, B: int, H: int, dtype=np.float32) -> GRUSaved:
    """Arrays for `gru_forward` and `gru_backward` over windows of up to T steps."""
    def steps(n: int) -> np.ndarray:
        return np.empty((T, n, B), dtype).transpose(0, 2, 1)

    return GRUSaved(
        h_tb=empty_activations((T + 1, B, H), dtype), gates_tb=steps(3 * H), a_n_tb=steps(H),
        da_tb=empty_activations((T, B, 3 * H), dtype), a_b=empty_activations((B, 3 * H), dtype),
        i_b=empty_activations((B, 3 * H), dtype), h_b=empty_activations((B, H), dtype),
        product_b=empty_activations((B, H), dtype), W_hh_columns=np.empty((H, 3 * H), dtype))


def gru_forward(P, ids_tb, W_hh, b_hh, h0, saved: GRUSaved) -> None:
    """One GRU layer over a window; the input product of step t, row b is `P[ids_tb[t, b]]`.

    Shapes: P (N, 3H); ids_tb (T, B), integers in [0, N); W_hh (3H, H); b_hh (3H,); h0 (B, H); result in `saved`:
    the states `saved.h_tb[:T + 1]`, of which the last is the state to carry on.
    """
    H = W_hh.shape[1]
    h, a, i = saved.h_b, saved.a_b, saved.i_b
    h[...] = h0
    saved.h_tb[0] = h
    for t in range(len(ids_tb)):
        rz, n = saved.gates_tb[t][:, :2 * H], saved.gates_tb[t][:, 2 * H:]
        r, z = rz[:, :H], rz[:, H:]
        _columns_times(h, W_hh, a)
        a += b_hh
        np.take(P.T, ids_tb[t], axis=1, out=i.T, mode="clip")
        np.add(i[:, :2 * H], a[:, :2 * H], out=rz)
        _sigmoid(rz)
        saved.a_n_tb[t] = a[:, 2 * H:]
        np.multiply(r, a[:, 2 * H:], out=n)
        n += i[:, 2 * H:]
        np.tanh(n, out=n)
        h -= n  # h' = n + z * (h - n)
        h *= z
        h += n
        saved.h_tb[t + 1] = h


def gru_backward(dy_tb, W_y, ids_tb, W_hh, saved: GRUSaved, dP, dW_hh, db_hh, dh0) -> None:
    """Back through time over the window of the last `gru_forward`.

    The gradient that reaches each state from outside the recurrence is dy_tb W_y, a product made step by step; where
    W_y is None it is dy_tb itself. dh is the sum of this gradient and of the gradient that step t+1 hands back:

        dn = dh (1 - z)                    di_z = dn (h_{t-1} - n) z
        di_n = dn (1 - n^2)                di_r = di_n a_n r (1 - r)
        da = (di_r, di_z, di_n r)          dh handed back = dh z + W_hh^T da
        dW_hh = sum_t da_t^T h_{t-1}       db_hh = sum_t da_t       dP[v] = sum of di over the positions of id v

    Shapes: dy_tb (T, B, M) and W_y (M, H), which are dlogits_tb and W_out for the layer below the output, or dy_tb
    (T, B, H) and None; ids_tb (T, B); W_hh (3H, H); results dP (N, 3H), dW_hh (3H, H), db_hh (3H,), dh0 (B, H).
    """
    T, B = ids_tb.shape
    H = W_hh.shape[1]
    di, dh, product, dn = saved.i_b, saved.h_b, saved.product_b, saved.a_b[:, :H]
    di_r, di_z, di_n = di[:, :H], di[:, H:2 * H], di[:, 2 * H:]
    W_hh_columns = saved.W_hh_columns.T
    W_hh_columns[...] = W_hh
    dP[...] = 0
    dh[...] = 0
    distinct = len(np.unique(ids_tb)) == ids_tb.size  # as above layer 0, where every position has a row of its own
    for t in reversed(range(T)):
        gates = saved.gates_tb[t]
        r, z, n = gates[:, :H], gates[:, H:2 * H], gates[:, 2 * H:]
        if W_y is None:
            dh += dy_tb[t]
        else:
            np.matmul(dy_tb[t], W_y, out=product)
            dh += product
        np.subtract(1, z, out=dn)
        dn *= dh
        np.subtract(saved.h_tb[t], n, out=di_z)
        di_z *= z
        di_z *= dn
        np.multiply(n, n, out=di_n)
        np.subtract(1, di_n, out=di_n)
        di_n *= dn
        np.subtract(1, r, out=di_r)
        di_r *= r
        di_r *= saved.a_n_tb[t]
        di_r *= di_n
        # An id that several batch rows share selects its row of dP several times. All copies receive the same sum, so
        # it does not matter which copy is written back last.
        ids = ids_tb[t]
        dP[ids] += di if distinct else (ids[:, None] == ids).astype(di.dtype) @ di
        di_n *= r
        da = di
        saved.da_tb[t] = da
        np.matmul(da, W_hh_columns, out=product)
        dh *= z
        dh += product
    dh0[...] = dh
    da = saved.da_tb[:T].reshape(T * B, 3 * H)
    np.matmul(da.T, saved.h_tb[:T].reshape(T * B, H), out=dW_hh)
    np.sum(da, axis=0, out=db_hh)


def _sigmoid(x) -> None:
    """sigmoid(x) = (1 + tanh(x / 2)) / 2 in place; it cannot overflow."""
    x *= 0.5
    np.tanh(x, out=x)
    x *= 0.5
    x += 0.5


# Dropout between layers

def dropout_forward(x_tb, rate, seed, layer, step, keep_tb, y_tb) -> None:
    """Set a share `rate` of the elements to zero and scale the kept elements by 1 / (1 - rate).

    Element k of x_tb (counted along H, then B, then T) is kept if 32-bit word k of the Philox stream with key
    (seed, layer) and counter (0, step, 0, 0) is at least rate * 2^32: the same mask on every device.

    Shapes: x_tb (T, B, H); step (1,) uint64, the training step; results keep_tb (T, B, H) bool, y_tb (T, B, H).
    """
    stream = np.random.Philox(key=[seed, layer], counter=[0, int(step[0]), 0, 0])
    words = stream.random_raw(-(-x_tb.size // 2)).astype("<u8", copy=False).view("<u4")[:x_tb.size]
    np.greater_equal(words.reshape(x_tb.shape), int(rate * 2**32), out=keep_tb)
    dropout_backward(x_tb, rate, keep_tb, y_tb)


def dropout_backward(dy_tb, rate, keep_tb, dx_tb) -> None:
    """Gradient of `dropout_forward`: the same mask and the same scale. dx_tb may be dy_tb.

    Shapes: dy_tb (T, B, H); keep_tb (T, B, H) bool; result dx_tb (T, B, H).
    """
    np.multiply(dy_tb, keep_tb, out=dx_tb)
    dx_tb *= 1 / (1 - rate)


# Output layer and loss

def cross_entropy_forward(h_tb, W_out, b_out, targets_tb, loss, dlogits_tb) -> None:
    """Output layer, softmax and mean cross-entropy, and the gradient of this loss with respect to the logits.

    Shapes: h_tb (T, B, H); W_out (V, H); b_out (V,); targets_tb (T, B), integers in [0, V); results loss (1,), in nats
    per character, and dlogits_tb (T, B, V) = (softmax(logits) - onehot(target)) / (T*B).
    """
    T, B, H = h_tb.shape
    V = len(W_out)
    logits = dlogits_tb.reshape(T * B, V, copy=False)
    targets = targets_tb.reshape(T * B, 1)
    np.matmul(h_tb.reshape(T * B, H), W_out.T, out=logits)
    logits += b_out
    logits -= logits.max(axis=1, keepdims=True)
    at_target = np.take_along_axis(logits, targets, axis=1)
    np.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    loss[0] = np.mean(np.log(total) - at_target, dtype=np.float64)
    logits /= total
    np.put_along_axis(logits, targets, np.take_along_axis(logits, targets, axis=1) - 1, axis=1)
    logits /= T * B


def cross_entropy_backward(dlogits_tb, h_tb, dW_out, db_out, W_out=None, dh_tb=None) -> None:
    """Gradients of the output layer's parameters and, where W_out is given, of h_tb: dlogits_tb W_out. Else
    `gru_backward` computes that product, unless dropout lies between the two.

    Shapes: dlogits_tb (T, B, V); h_tb (T, B, H); W_out (V, H); results dW_out (V, H), db_out (V,), and with W_out
    dh_tb (T, B, H).
    """
    (T, B, V), H = dlogits_tb.shape, h_tb.shape[2]
    dlogits = dlogits_tb.reshape(T * B, V)
    np.matmul(dlogits.T, h_tb.reshape(T * B, H), out=dW_out)
    np.sum(dlogits, axis=0, out=db_out)
    if W_out is not None:
        dh_tb[...] = (W_out.T @ dlogits.T).T.reshape(T, B, H)  # in the memory order of activations


# Optimiser

def global_norm(grads, norm) -> None:
    """Euclidean norm of all gradients together.

    Shapes: grads (N,), the flat buffer; result norm (1,).
    """
    total = 0.0
    for start in range(0, len(grads), ADAM_CHUNK):
        chunk = grads[start:start + ADAM_CHUNK]
        total += float(np.dot(chunk, chunk))
    norm[0] = np.sqrt(total)


def adam(params, grads, m, v, norm, step_size, clip_norm=0.0, beta_1=0.9, beta_2=0.999, epsilon=1e-7) -> None:
    """Adam as Keras computes it, with the gradient scaled so that its global norm is at most clip_norm (if above 0).

        m = beta_1 m + (1 - beta_1) g
        v = beta_2 v + (1 - beta_2) g^2
        p = p - step_size m / (sqrt(v) + epsilon)

    step_size is learning_rate sqrt(1 - beta_2^t) / (1 - beta_1^t), t counted from 1. If `norm` is not finite, nothing
    changes: a training that diverges keeps its last finite parameters.

    Shapes: params, grads, m, v (N,), updated in place except grads; norm (1,), from `global_norm`; step_size (1,).
    """
    if not np.isfinite(norm[0]):
        return
    scale = min(1.0, clip_norm / float(norm[0])) if clip_norm and norm[0] else 1.0
    g, s = np.empty(ADAM_CHUNK, params.dtype), np.empty(ADAM_CHUNK, params.dtype)
    for start in range(0, len(params), ADAM_CHUNK):
        chunk = slice(start, start + ADAM_CHUNK)
        p_c, m_c, v_c = params[chunk], m[chunk], v[chunk]
        g_c, s_c = g[:len(p_c)], s[:len(p_c)]
        np.multiply(grads[chunk], scale, out=g_c)
        m_c *= beta_1
        np.multiply(g_c, 1 - beta_1, out=s_c)
        m_c += s_c
        v_c *= beta_2
        np.multiply(g_c, g_c, out=s_c)
        s_c *= 1 - beta_2
        v_c += s_c
        np.sqrt(v_c, out=s_c)
        s_c += epsilon
        np.divide(m_c, s_c, out=s_c)
        s_c *= step_size[0]
        p_c -= s_c


# Sampling

def sample(logits, uniforms, ids, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> None:
    """Draw one character per row by inverse CDF, by the rules of `rnn.reference.sample`; `[UNK]`, id 0, is never drawn.

    Shapes: logits (R, V); uniforms (R,), in [0, 1); result ids (R,), int32.
    """
    with np.errstate(over="ignore"):  # a character that is infinitely unlikely has p = 0
        _draw(logits, uniforms, ids, temperature, top_k, top_p, min_p)


def _draw(logits, uniforms, ids, temperature, top_k, top_p, min_p) -> None:
    """`sample` for a caller that ignores overflow."""
    known = logits[:, 1:]
    divisor = known.dtype.type(temperature)
    if divisor == 0:
        ids[...] = 1 + known.argmax(axis=1)
        return
    p = known - np.maximum.reduce(known, axis=1, keepdims=True)
    p /= divisor
    np.exp(p, out=p)
    if top_k or top_p < 1:
        order = np.argsort(-known, axis=1, kind="stable")
        ranked = np.take_along_axis(p, order, axis=1)
        if top_k:
            ranked[:, top_k:] = 0
        if top_p < 1:
            reached = np.cumsum(ranked, axis=1)
            ranked[:, 1:][reached[:, :-1] >= top_p * reached[:, -1:]] = 0
        np.put_along_axis(p, order, ranked, axis=1)
    if min_p:
        p[p < min_p] = 0  # the most likely character has p = 1
    cumulative = np.add.accumulate(p, axis=1)
    # A uniform number below 1 times the total rounds to less than the total, so the last cumulative sum exceeds it.
    np.add((cumulative > uniforms[:, None] * cumulative[:, -1:]).argmax(axis=1), 1, out=ids)


class GenerationSaved(NamedTuple):
    """Buffers of `generate` for one step: both products (R, 3H); gate_r (R, H), r times a_n; logits_r (R, V)."""

    input_products_r: np.ndarray
    recurrent_products_r: np.ndarray
    gate_r: np.ndarray
    logits_r: np.ndarray


def generation_saved(R: int, H: int, V: int, dtype=np.float32) -> GenerationSaved:
    """Arrays for `generate` with R rows."""
    return GenerationSaved(*(empty_activations((R, n), dtype) for n in (3 * H, 3 * H, H, V)))


def generate(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, saved: GenerationSaved,
             temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> None:
    """Read and write R rows of text, one character per row and step, in place.

    Each step reads the last character of each row, moves the states on and yields the next character: the forced one
    where forced_tr is not negative (prompts are read this way), else one drawn as `sample` says.

    Shapes: params name -> array, as `rnn.params.named_views` gives them; P (V, 3H), the input table of layer 0;
    h (layers, R, H), moved on in place; ids (R,) int32, the characters before the first step, replaced by the last
    characters; forced_tr (T, R) int32; uniforms_tr (T, R) in [0, 1); result ids_tr (T, R) int32.
    """
    i, a, gate, logits = saved
    T, R = forced_tr.shape
    if R > 1 and T * R >= len(P):
        P = _columns_outermost(P)
    states = [np.empty_like(gate) for _ in h]
    for state, h_layer in zip(states, h):
        state[...] = h_layer
    # Biases have a value for each row: NumPy adds a whole matrix faster than one value to each few.
    recurrent = [(params[f"W_hh.{layer}"], _columns_outermost(np.broadcast_to(params[f"b_hh.{layer}"], a.shape)))
                 for layer in range(len(h))]
    W_out, b_out = params["W_out"], params["b_out"]
    some_forced, some_free = (forced_tr >= 0).any(axis=1), (forced_tr < 0).any(axis=1)
    with np.errstate(over="ignore"):  # as in `sample`; entered once, as entering takes longer than drawing a character
        for t in range(T):
            _take_rows(P, ids, i)
            for layer, (state, (W_hh, b_hh)) in enumerate(zip(states, recurrent)):
                if layer > 0:
                    _rows_times(states[layer - 1], params[f"W_ih.{layer}"], i)
                    i += params[f"b_ih.{layer}"]
                _rows_times(state, W_hh, a)
                a += b_hh
                _gru_step(i, a, state, gate)
            if some_free[t]:
                _rows_times(states[-1], W_out, logits)
                logits += b_out
                _draw(logits, uniforms_tr[t], ids, temperature, top_k, top_p, min_p)
            if some_forced[t]:
                np.copyto(ids, forced_tr[t], where=forced_tr[t] >= 0)
            ids_tr[t] = ids
    for h_layer, state in zip(h, states):
        h_layer[...] = state


def _gru_step(i, a, h, gate) -> None:
    """One step of the recurrence for R rows.

    Shapes: i, a (R, 3H), input and recurrent products, overwritten; h (R, H), updated in place; gate (R, H), a buffer.
    """
    H = h.shape[1]
    rz, n = i[:, :2 * H], i[:, 2 * H:]
    rz += a[:, :2 * H]
    _sigmoid(rz)
    np.multiply(rz[:, :H], a[:, 2 * H:], out=gate)
    n += gate
    np.tanh(n, out=n)
    h -= n
    h *= rz[:, H:]
    h += n


def _columns_outermost(x) -> np.ndarray:
    """A copy of a matrix whose columns are outermost in memory."""
    copied = empty_activations(x.shape, x.dtype)
    copied[...] = x
    return copied


def _take_rows(P, ids, out) -> None:
    """out = P[ids]."""
    if P.flags.c_contiguous:
        P.take(ids, 0, out, "clip")
    else:
        P.T.take(ids, 1, out.T, "clip")


def _rows_times(x, W, out) -> None:
    """out = x W^T for x (R, K) and out (R, N) whose columns are outermost in memory, and W (N, K)."""
    rows = _rows_of_small_product(*W.shape, len(x))
    if len(x) == 1:
        np.dot(W, x[0], out=out[0])
    elif rows:
        _small_products(x, W.reshape(-1, rows, W.shape[1]), out.T.reshape(-1, rows, len(x), copy=False))
    else:
        _columns_times(x, W, out)


@functools.cache
def _rows_of_small_product(N: int, K: int, R: int) -> int:
    """Rows of weights (N, K) of which each small product with R rows of text takes as many; 0: they are not quicker."""
    most = min(SMALL_ROWS, SMALL_PRODUCT // (R * K)) if R <= FEW_ROWS else 0
    rows = next((rows for rows in range(most, 0, -1) if N % rows == 0), 0)
    return rows if 2 * rows > most else 0


def _small_products(x, W_blocks, out_blocks) -> None:
    """A product for each block of weights (rows, K), with x (R, K), into blocks (rows, R); on several threads where
    there is enough to do. Each number is computed in the same way on however many."""
    blocks = len(W_blocks)
    shares = max(1, min(_threads(), W_blocks.size // SHARE, blocks))
    parts = [slice(blocks * share // shares, blocks * (share + 1) // shares) for share in range(shares)]
    others = [_pool().submit(np.matmul, W_blocks[part], x.T, out_blocks[part]) for part in parts[1:]]
    np.matmul(W_blocks[parts[0]], x.T, out=out_blocks[parts[0]])
    for other in others:
        other.result()


def _columns_times(x, W, out) -> None:
    """out = x W^T for x (R, K) and out (R, N) whose columns are outermost in memory, and W (N, K)."""
    blocks = max(1, W.size // PRODUCT_BLOCK)
    if len(W) % blocks:
        blocks = 1
    np.matmul(W.reshape(blocks, -1, W.shape[1]), x.T, out=out.T.reshape(blocks, -1, len(x), copy=False))
