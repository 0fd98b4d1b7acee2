"""The state_dict of a PyTorch model, in a `.safetensors` file, as a checkpoint.

The model is README's: `embedding` (Embedding), `gru` (GRU of one direction with biases), `output` (Linear with bias).
All names may begin with one prefix (`model.`, or the `_orig_mod.` of `torch.compile`). Numbers of any floating-point
type become float32.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import safetensors

from char_gru.rnn.checkpoint import Checkpoint
from char_gru.rnn.config import Sizes, UserError
from char_gru.rnn.export.foreign import BFLOAT16, checked_arrays, vocabulary_for
from char_gru.rnn.params import checkpoint_name, parameter_shapes
from char_gru.rnn.texts import open_file
from char_gru.rnn.vocabulary import Vocabulary

VOCABULARY_KEY = "vocabulary"
"""Key of the file's metadata whose value is the string of known characters, in the order of their ids, from 1."""

_EMBEDDING, _RECURRENT = "embedding.weight", "gru.weight_hh_l0"

_WANTED = ("expected the state_dict of a model with embedding (Embedding), gru (GRU of one direction, with biases) and "
           "output (Linear, with bias)")

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": BFLOAT16}
"""Type of numbers in a file -> dtype."""


def from_pytorch(path: Path, vocabulary: Vocabulary | None) -> Checkpoint:
    """The model of a `.safetensors` file. vocabulary: for a file that has none in its metadata.

    Raises: UserError, one line, for a file that cannot be read or is damaged, for tensors of another model, and for a
    vocabulary that is missing or of another size.
    """
    tensors, own = _read(path)
    prefix = next((name.removesuffix(_EMBEDDING) for name in tensors if name.endswith(_EMBEDDING)), "")
    for name in (prefix + _EMBEDDING, prefix + _RECURRENT):
        if name not in tensors:
            raise UserError(f"{path} has no {name}; {_WANTED}")
        if tensors[name].ndim != 2 or not tensors[name].size:
            raise UserError(f"{path}: {name} has shape {tensors[name].shape}, but must be a matrix that is not empty")
    (V, E), (_, H) = tensors[prefix + _EMBEDDING].shape, tensors[prefix + _RECURRENT].shape
    layer = re.compile(re.escape(prefix) + r"gru\.weight_hh_l\d+")
    sizes = Sizes(V, E, H, sum(layer.fullmatch(name) is not None for name in tensors))
    names = {name: prefix + checkpoint_name(name) for name in parameter_shapes(sizes)}
    if missing := sorted(set(names.values()) - tensors.keys()):
        raise UserError(f"{path} has no {missing[0]}; {_WANTED}")
    if unknown := sorted(tensors.keys() - set(names.values())):
        raise UserError(f"{path} has a tensor {unknown[0]}; {_WANTED}, and nothing else")
    shapes = {names[name]: shape for name, shape in parameter_shapes(sizes).items()}
    vocabulary = vocabulary_for(path, own, vocabulary, V)
    arrays = checked_arrays(path, tensors, shapes)
    return Checkpoint(sizes, vocabulary, {name: arrays[names[name]] for name in names})


def _read(path: Path) -> tuple[dict[str, np.ndarray], Vocabulary | None]:
    """Name -> array of a file's tensors, and the vocabulary in its metadata.

    Raises: UserError.
    """
    with open_file(path) as file:
        try:
            raw = file.read()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        entries = safetensors.deserialize(raw)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is no file of safetensors, or is damaged or cut short ({error})") from None
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{path}: {name} holds {entry['dtype']}; save the model in float32")
        tensors[name] = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    metadata = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")]).get("__metadata__") or {}
    try:
        return tensors, Vocabulary(metadata[VOCABULARY_KEY]) if VOCABULARY_KEY in metadata else None
    except ValueError as error:
        raise UserError(f"{path}: the metadata {VOCABULARY_KEY} cannot be used ({error}); give each character once, in "
                        "the order of the ids") from None
