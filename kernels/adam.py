"""Launchers of adam.cu: global norm of the gradients, and Adam."""

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.scratch import scratch
from char_gru.kernels.sizes import ceil_div

THREADS = 256
MAX_BLOCKS = 1024  # of square_sums; norm_of_sums, a single block, adds the sums of all blocks


def global_norm(grads, norm) -> None:
    """Euclidean norm of all gradients together.

    Shapes: grads (N,) float32, the flat buffer; result norm (1,) float32.
    Raises: ValueError.
    Equals: sqrt(sum(grads**2)).
    """
    check_global_norm(grads, norm)
    N = grads.size
    blocks = min(ceil_div(N, 4 * THREADS), MAX_BLOCKS)
    sums = scratch("global_norm", (MAX_BLOCKS,))
    runtime.launch("adam", "square_sums", blocks, THREADS, [sums, grads, np.uint64(N)], constants={})
    runtime.launch("adam", "norm_of_sums", 1, THREADS, [norm, sums, np.int32(blocks)], constants={})


def adam(params, grads, m, v, norm, step_size, clip_norm=0.0, beta_1=0.9, beta_2=0.999, epsilon=1e-7) -> None:
    """Adam as Keras computes it, with the gradient scaled so that its global norm is at most clip_norm (if above 0).

    If `norm` is not finite, nothing changes.

    Shapes: params, m, v (N,), updated in place; grads (N,); norm (1,), from `global_norm`; step_size (1,),
    learning_rate sqrt(1 - beta_2^t) / (1 - beta_1^t), t counted from 1; all float32.
    Raises: ValueError.
    Equals: params - step_size * m / (sqrt(v) + epsilon), with the new m and v.
    """
    check_adam(params, grads, m, v, norm, step_size)
    N = params.size
    runtime.launch("adam", "adam", ceil_div(N, 4 * THREADS), THREADS,
                   [params, m, v, grads, norm, step_size, *adam_scalars(clip_norm, beta_1, beta_2, epsilon),
                    np.uint64(N)], constants={})


def check_global_norm(grads, norm) -> None:
    """Check the arrays of `global_norm`. Raises: ValueError."""
    runtime.check("grads", grads, np.float32, (grads.size,))
    runtime.check("norm", norm, np.float32, (1,))


def check_adam(params, grads, m, v, norm, step_size) -> None:
    """Check the arrays of `adam`. Raises: ValueError."""
    for name, array in (("params", params), ("grads", grads), ("m", m), ("v", v)):
        runtime.check(name, array, np.float32, (params.size,))
    runtime.check("norm", norm, np.float32, (1,))
    runtime.check("step_size", step_size, np.float32, (1,))


def adam_scalars(clip_norm: float, beta_1: float, beta_2: float, epsilon: float) -> list:
    """The scalar arguments of the kernel; 1 - beta is computed in double precision and rounded once."""
    return [np.float32(scalar) for scalar in (clip_norm, beta_1, 1 - beta_1, beta_2, 1 - beta_2, epsilon)]
