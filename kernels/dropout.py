"""Launchers of dropout.cu."""

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.sizes import ceil_div

THREADS = 256
ELEMENTS_PER_THREAD = 8  # dropout_forward


def dropout_forward(x_tb, rate, seed, layer, step, keep_tb, y_tb) -> None:
    """Set a share `rate` of the elements to zero and scale the kept elements by 1 / (1 - rate).

    Shapes: x_tb (T, B, H) float32; step (1,) uint64, the training step; results keep_tb (T, B, H) bool, y_tb (T, B, H)
    float32.
    Raises: ValueError.
    Equals: keep_tb = words >= rate 2^32, y_tb = x_tb * keep_tb / (1 - rate), with the words of NumPy's
    `Philox(key=[seed, layer], counter=[0, step, 0, 0])`.
    """
    scale = _scale(rate)
    runtime.check("x_tb", x_tb, np.float32, x_tb.shape)
    runtime.check("step", step, np.uint64, (1,))
    runtime.check("keep_tb", keep_tb, bool, x_tb.shape)
    runtime.check("y_tb", y_tb, np.float32, x_tb.shape)
    runtime.launch("dropout", "dropout_forward", ceil_div(x_tb.size, THREADS * ELEMENTS_PER_THREAD), THREADS,
                   [keep_tb.view(np.uint8), y_tb, x_tb, step, np.uint64(seed), np.uint64(layer),
                    np.uint32(int(rate * 2**32)), scale, np.uint64(x_tb.size)], constants={})


def dropout_backward(dy_tb, rate, keep_tb, dx_tb) -> None:
    """Gradient of `dropout_forward`: the same mask and the same scale. dx_tb may be dy_tb.

    Shapes: dy_tb (T, B, H) float32; keep_tb (T, B, H) bool; result dx_tb (T, B, H) float32.
    Raises: ValueError.
    Equals: dy_tb * keep_tb / (1 - rate).
    """
    scale = _scale(rate)
    runtime.check("dy_tb", dy_tb, np.float32, dy_tb.shape)
    runtime.check("keep_tb", keep_tb, bool, dy_tb.shape)
    runtime.check("dx_tb", dx_tb, np.float32, dy_tb.shape)
    runtime.launch("dropout", "dropout_backward", ceil_div(dy_tb.size, THREADS), THREADS,
                   [dx_tb, dy_tb, keep_tb.view(np.uint8), scale, np.uint64(dy_tb.size)], constants={})


def _scale(rate: float) -> np.float32:
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected a number from 0 to below 1, got {rate}")
    return np.float32(1 / (1 - rate))
