"""One GRU layer over inputs of any width, as two functions on the arrays of an op set.

The op set is `char_gru.rnn.cpu`, whose arrays are NumPy's in float32 or float64, or what `char_gru.kernels.op_set`
makes for a GPU, whose arrays are CuPy's in float32. JAX has no part in this: the ops write into arrays of their caller,
JAX's arrays cannot be written, and a custom call of JAX's needs compiled C++.

Axes: T time, B batch, I inputs, H hidden units; gates lie r, z, n along 3H, as in PyTorch. A layer of a language model
has an input table with one row per character; here every one of the T*B positions has a row of its own.
"""

from typing import Any, NamedTuple

import numpy as np

from char_gru.rnn import cpu


class Gradients(NamedTuple):
    """Gradients of the arguments of `forward`: dx_tb (T, B, I), dh0 (B, H), dW_ih (3H, I), dW_hh (3H, H), db_ih (3H,),
    db_hh (3H,)."""

    dx_tb: Any
    dh0: Any
    dW_ih: Any
    dW_hh: Any
    db_ih: Any
    db_hh: Any


def forward(x_tb, h0, W_ih, W_hh, b_ih, b_hh, ops=cpu, positions_tb=None) -> Any:
    """The states of one GRU layer over a window.

    Shapes: x_tb (T, B, I), T at least 1; h0 (B, H); W_ih (3H, I); W_hh (3H, H); b_ih, b_hh (3H,), all of one floating
    dtype; positions_tb (T, B) int32, the numbers from 0 to T*B - 1 (default: sent from the host). Returns what
    `ops.gru_saved` makes, for `backward`: its h_tb (T+1, B, H) has the states, `h_tb[0]` the initial one, `h_tb[1:]`
    the layer's output and `h_tb[T]` the state to carry on.
    Raises: ValueError for arrays of other shapes or dtypes.
    """
    T, B, I, H = _checked_sizes(x_tb, W_ih, W_hh)
    for name, array, shape in (("h0", h0, (B, H)), ("b_ih", b_ih, (3 * H,)), ("b_hh", b_hh, (3 * H,))):
        _check(name, array, x_tb.dtype, shape)
    saved = ops.gru_saved(T, B, H, x_tb.dtype)
    if B:  # else there is nothing to compute, and a GPU launches no empty grid
        P = ops.empty_activations((T * B, 3 * H), x_tb.dtype)
        ops.input_table_forward(x_tb.reshape(T * B, I), W_ih, b_ih, P)
        ops.gru_forward(P, _positions(T, B, ops) if positions_tb is None else positions_tb, W_hh, b_hh, h0, saved)
    return saved


def backward(dy_tb, x_tb, W_ih, W_hh, saved, ops=cpu, positions_tb=None, *, needs_dx: bool = True) -> Gradients:
    """Gradients of a loss with respect to the arguments of `forward`.

    Where the loss also depends on the last state, `h_tb[T]`, the caller adds its gradient to `dy_tb[T - 1]`. needs_dx:
    whether dx_tb is computed; else it is None.

    Shapes: dy_tb (T, B, H), the gradient of the output `saved.h_tb[1:]`; x_tb (T, B, I), W_ih (3H, I), W_hh (3H, H) and
    positions_tb as they were given to `forward`; saved, from `forward`.
    Raises: ValueError for arrays of other shapes or dtypes.
    """
    T, B, I, H = _checked_sizes(x_tb, W_ih, W_hh)
    dtype = x_tb.dtype
    _check("dy_tb", dy_tb, dtype, (T, B, H))
    _check("saved.h_tb", saved.h_tb, dtype, (T + 1, B, H))
    gradients = Gradients(
        dx_tb=ops.empty((T, B, I), dtype) if needs_dx else None, dh0=ops.empty((B, H), dtype),
        dW_ih=ops.empty((3 * H, I), dtype), dW_hh=ops.empty((3 * H, H), dtype), db_ih=ops.empty((3 * H,), dtype),
        db_hh=ops.empty((3 * H,), dtype))
    if not B:
        for gradient in gradients:
            if gradient is not None:
                ops.copy_in(gradient, np.zeros(gradient.shape))
        return gradients
    dP = ops.empty((T * B, 3 * H), dtype)
    ids_tb = _positions(T, B, ops) if positions_tb is None else positions_tb
    ops.gru_backward(dy_tb, None, ids_tb, W_hh, saved, dP, gradients.dW_hh, gradients.db_hh, gradients.dh0)
    if needs_dx:
        ops.input_table_backward(dP, x_tb.reshape(T * B, I), W_ih, gradients.dx_tb.reshape(T * B, I), gradients.dW_ih,
                                 gradients.db_ih)
    else:  # the output layer's op has the same gradients of weights and biases, and leaves out that of its input
        ops.cross_entropy_backward(dP.reshape(T, B, 3 * H), x_tb, gradients.dW_ih, gradients.db_ih)
    return gradients


def _positions(T: int, B: int, ops) -> Any:
    """The row of the input table for each position: ids (T, B), int32."""
    ids_tb = ops.empty((T, B), np.int32)
    ops.copy_in(ids_tb, np.arange(T * B).reshape(T, B))
    return ids_tb


def _checked_sizes(x_tb, W_ih, W_hh) -> tuple[int, int, int, int]:
    """T, B, I and H. Raises: ValueError."""
    if x_tb.dtype not in (np.float32, np.float64) or x_tb.ndim != 3 or not x_tb.shape[0] or not x_tb.shape[2]:
        raise ValueError("x_tb: expected float32 or float64 (T, B, I), T and I at least 1, "
                         f"got {x_tb.dtype} {x_tb.shape}")
    if W_hh.ndim != 2 or not W_hh.shape[1]:
        raise ValueError(f"W_hh: expected (3H, H), H at least 1, got {W_hh.shape}")
    (T, B, I), H = x_tb.shape, W_hh.shape[1]
    _check("W_ih", W_ih, x_tb.dtype, (3 * H, I))
    _check("W_hh", W_hh, x_tb.dtype, (3 * H, H))
    return T, B, I, H


def _check(name: str, array, dtype, shape: tuple[int, ...]) -> None:
    """Raises: ValueError that names the array, unless it has this dtype and shape."""
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name}: expected {dtype} {shape}, got {array.dtype} {array.shape}")
