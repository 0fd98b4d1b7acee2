"""One table `name -> shape` from which sizes, offsets, initial values and checkpoint entries all follow.

All parameters lie in one flat float32 buffer; gradients and Adam's moments are buffers of the same layout, so that
the global norm and the update are one pass each. A parameter is named by its symbol in the formulas and its layer
(`W_hh.0`); `checkpoint_name` gives its name in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from char_gru.rnn.config import Sizes

ALIGNMENT = 64
"""Every parameter starts at a multiple of this many elements (256 bytes of float32), to align wide GPU loads."""

_CHECKPOINT_NAMES = {
    "W_emb": "embedding.weight",
    "W_ih": "gru.weight_ih_l{layer}",
    "W_hh": "gru.weight_hh_l{layer}",
    "b_ih": "gru.bias_ih_l{layer}",
    "b_hh": "gru.bias_hh_l{layer}",
    "W_out": "output.weight",
    "b_out": "output.bias",
}


def parameter_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters in the order in which they lie in the flat buffer.

    Gates lie r, z, n along 3H. Layer 0 reads embeddings (E wide), every further layer the layer below it (H wide).
    """
    V, E, H = sizes.V, sizes.E, sizes.H
    shapes: dict[str, tuple[int, ...]] = {"W_emb": (V, E)}
    for layer in range(sizes.layers):
        shapes[f"W_ih.{layer}"] = (3 * H, E if layer == 0 else H)
        shapes[f"W_hh.{layer}"] = (3 * H, H)
        shapes[f"b_ih.{layer}"] = (3 * H,)
        shapes[f"b_hh.{layer}"] = (3 * H,)
    return shapes | {"W_out": (V, H), "b_out": (V,)}


def checkpoint_name(name: str) -> str:
    """PyTorch's name of a parameter: `W_hh.0` is `gru.weight_hh_l0`."""
    base, _, layer = name.partition(".")
    return _CHECKPOINT_NAMES[base].format(layer=layer)


def parameter_count(sizes: Sizes) -> int:
    """Number of trained values: 4,022,850 at the tutorial's sizes (V 66, E 256, H 1024, one layer)."""
    return sum(math.prod(shape) for shape in parameter_shapes(sizes).values())


def flat_size(sizes: Sizes) -> int:
    """Elements of the flat buffer, the gaps that align each parameter included (they stay zero)."""
    return sum(_aligned(math.prod(shape)) for shape in parameter_shapes(sizes).values())


def named_views(flat, sizes: Sizes) -> dict:
    """Views of a flat buffer, one for each parameter, by name.

    Shapes: flat (flat_size,), any float dtype, NumPy or CuPy; each view has the shape of `parameter_shapes`.
    """
    views, offset = {}, 0
    for name, shape in parameter_shapes(sizes).items():
        count = math.prod(shape)
        views[name] = flat[offset:offset + count].reshape(shape)
        offset += _aligned(count)
    return views


def on_ops(params: Mapping[str, np.ndarray], ops) -> dict:
    """Copies of parameters as arrays of an op set, by name."""
    arrays = {name: ops.empty(array.shape, array.dtype) for name, array in params.items()}
    for name, array in arrays.items():
        ops.copy_in(array, params[name])
    return arrays


def gates_z_first(array: np.ndarray, axis: int = 0) -> np.ndarray:
    """Gates r, z, n along an axis as Keras and ONNX order them, z, r, n; and the other way round."""
    first, second, n = np.split(array, 3, axis)
    return np.concatenate([second, first, n], axis)


def initial_parameters(sizes: Sizes, init: str, seed: int) -> np.ndarray:
    """A flat float32 buffer (flat_size,) with initial values, a pure function of the arguments.

    init `keras`: embeddings uniform(-0.05, 0.05), `W_ih` and `W_out` Glorot uniform, `W_hh` with orthonormal columns,
    biases zero (the tutorial's). init `pytorch`: embeddings normal(0, 1), all else uniform(-1/sqrt(H), 1/sqrt(H)).

    Raises: MemoryError for more parameters than can be addressed.
    """
    if flat_size(sizes) > np.iinfo(np.intp).max // 8:
        raise MemoryError(f"{parameter_count(sizes):,} parameters")
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    flat = np.zeros(flat_size(sizes), np.float32)
    for name, view in named_views(flat, sizes).items():
        base = name.partition(".")[0]
        if init == "pytorch" and base == "W_emb":
            view[...] = rng.standard_normal(view.shape)
        elif init == "pytorch":
            bound = 1 / math.sqrt(sizes.H)
            view[...] = rng.uniform(-bound, bound, view.shape)
        elif base == "W_emb":
            view[...] = rng.uniform(-0.05, 0.05, view.shape)
        elif base == "W_hh":
            view[...] = _orthonormal_columns(rng, *view.shape)
        elif base in ("W_ih", "W_out"):
            bound = math.sqrt(6 / sum(view.shape))
            view[...] = rng.uniform(-bound, bound, view.shape)
    return flat


def _orthonormal_columns(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    q, r = np.linalg.qr(rng.standard_normal((rows, columns)))
    return q * np.sign(np.diag(r))


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
