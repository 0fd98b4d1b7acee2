"""Checks of a model that another framework wrote, whatever the format of its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from char_gru.rnn.config import UserError
from char_gru.rnn.vocabulary import Vocabulary

BFLOAT16 = np.dtype("V2")
"""NumPy has no bfloat16; h5py and this package hold one as its two bytes."""


def checked_arrays(path: Path, arrays: Mapping, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The arrays of a file as float32. A dataset of HDF5 is read only after its shape and dtype were checked.

    Shapes: arrays: name -> NumPy array or HDF5 dataset of any float dtype, or `BFLOAT16`; result: name -> array of the
    shape that `shapes` has for it.

    Raises: UserError that names the path and the array, for another shape or dtype, and for numbers that are not finite
    in float32.
    """
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise UserError(f"{path}: {name} has shape {arrays[name].shape}, but the model's other layers need {shape}")
        if arrays[name].dtype.kind != "f" and arrays[name].dtype != BFLOAT16:
            raise UserError(f"{path}: {name} holds {arrays[name].dtype}; save the model in float32")
    converted = {name: _float32(arrays[name][()]) for name in shapes}
    for name, array in converted.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds numbers that are not finite in float32; use another file")
    return converted


def vocabulary_for(path: Path, own: Vocabulary | None, given: Vocabulary | None, V: int) -> Vocabulary:
    """The vocabulary of a model with V rows of embeddings: its file's own, or the one of `--vocabulary-of`.

    Raises: UserError that names the path, where there is none, both, or one of another size.
    """
    if own and given:
        raise UserError(f"{path} has its own vocabulary; leave --vocabulary-of out")
    vocabulary = own or given
    if vocabulary is None:
        raise UserError(f"{path} has no vocabulary; give --vocabulary-of TEXT, the text that the model has learnt")
    if len(vocabulary) != V:
        source = "its vocabulary" if own else "the text of --vocabulary-of"
        raise UserError(f"{path} has embeddings for {V:,} characters, [UNK] included, but {source} has "
                        f"{len(vocabulary):,}; give the text that the model has learnt, whose sorted characters are "
                        "its ids from 1 on")
    return vocabulary


def _float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == BFLOAT16:  # the upper half of a float32
        return (array.view("<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # a float64 too large for float32 becomes infinite
        return array.astype(np.float32)
