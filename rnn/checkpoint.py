"""Checkpoints: one self-describing safetensors file, written atomically and verified when read.

Parameters stand under PyTorch's names. One metadata key holds a JSON text with sizes, vocabulary, the progress of
training (in a file that can be resumed) and a SHA-256 of this text and of every tensor, so that a changed file is
noticed. A file without progress holds only parameters, and loads strictly into a PyTorch module.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from char_gru.rnn.config import Sizes, UserError
from char_gru.rnn.folder import write_atomically
from char_gru.rnn.params import checkpoint_name, parameter_shapes
from char_gru.rnn.vocabulary import Vocabulary

METADATA_KEY = "char-gru"
FORMAT = 1


@dataclass(frozen=True)
class Resumable:
    """Data by which `last.safetensors` can be resumed: Adam's moments by parameter name, the carried state
    (layers, B, H), and progress, a dictionary of JSON values that the training loop fills and reads."""

    m: dict[str, np.ndarray]
    v: dict[str, np.ndarray]
    state: np.ndarray
    progress: dict


@dataclass(frozen=True)
class Checkpoint:
    """A model as a file holds it: params maps each name of `parameter_shapes` to a float32 array."""

    sizes: Sizes
    vocabulary: Vocabulary
    params: dict[str, np.ndarray]
    resumable: Resumable | None = None


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that at any moment the path holds either the old file or the new one, whole.

    Raises: OSError if the file cannot be written; the old file is then unchanged.
    """
    tensors = _tensors(checkpoint)
    description = {"format": FORMAT, "sizes": asdict(checkpoint.sizes),
                   "vocabulary": checkpoint.vocabulary.characters, "beginning": checkpoint.vocabulary.beginning,
                   "progress": checkpoint.resumable.progress if checkpoint.resumable else None}
    description["sha256"] = _digest(description, tensors)
    write_atomically(path, safetensors_numpy.save(tensors, {METADATA_KEY: json.dumps(description)}))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises: UserError, one line, for a file that cannot be read, is no checkpoint, was cut short or altered, or whose
    tensors are not of the sizes it claims.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        tensors = safetensors_numpy.load(raw)
        header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
        description = json.loads(header["__metadata__"][METADATA_KEY])
        recorded = description.pop("sha256")
        form = description["format"]
        digest = _digest(description, tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{path} is no checkpoint of char-gru, or is damaged or cut short; "
                        "name a .safetensors file that train.py wrote") from None
    if form != FORMAT:
        raise UserError(f"{path} is a checkpoint of format {form!r:.20}, this version reads {FORMAT}; "
                        "use the version that wrote it")
    if recorded != digest:
        raise UserError(f"{path} was altered after it was written (its checksum differs); use another checkpoint")
    try:
        return _checkpoint(description, tensors)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} holds tensors that do not fit the sizes it claims; use another checkpoint") from None


def find_checkpoint(run: Path | None, runs: Path = Path("runs")) -> Path:
    """The checkpoint file to generate from.

    run: a checkpoint file; or the folder of a run, whose best checkpoint is taken, or the last one where there is no
    best; None for the newest run in the folder `runs`.

    Raises: UserError if there is no checkpoint.
    """
    folder = newest_run(runs) if run is None else run
    if not folder.is_dir():
        return folder
    for name in ("best.safetensors", "last.safetensors"):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{folder} holds no checkpoint; name the folder of a run, or train one with train.py")


def newest_run(runs: Path = Path("runs")) -> Path:
    """The folder of the run, among the runs in a folder, that was saved last.

    Raises: UserError if no run was saved there.
    """
    saved = list(runs.glob("*/last.safetensors"))
    if not saved:
        raise UserError(f"there is no run under {runs}{os.sep}; train one with train.py, or name a folder")
    return max(saved, key=lambda path: path.stat().st_mtime_ns).parent


def _tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    groups = {"": checkpoint.params}
    tensors = {}
    if checkpoint.resumable:
        groups |= {"adam.m.": checkpoint.resumable.m, "adam.v.": checkpoint.resumable.v}
        tensors["state"] = np.ascontiguousarray(checkpoint.resumable.state)
    for prefix, group in groups.items():
        for name, array in group.items():
            tensors[prefix + checkpoint_name(name)] = np.ascontiguousarray(array)
    return tensors


def _checkpoint(description: dict, tensors: dict[str, np.ndarray]) -> Checkpoint:
    sizes = Sizes(**description["sizes"])
    if not all(type(size) is int and size > 0 for size in asdict(sizes).values()) or sizes.layers > len(tensors):
        raise ValueError("sizes")
    vocabulary = Vocabulary(description["vocabulary"], description.get("beginning", "\n"))  # older files have none
    if len(vocabulary) != sizes.V:
        raise ValueError("vocabulary")
    shapes = parameter_shapes(sizes)

    def group(prefix: str) -> dict[str, np.ndarray]:
        arrays = {name: tensors.pop(prefix + checkpoint_name(name)) for name in shapes}
        if any(array.shape != shapes[name] or array.dtype != np.float32 for name, array in arrays.items()):
            raise ValueError("shapes")
        return arrays

    params, resumable, progress = group(""), None, description["progress"]
    if progress is not None:
        if not isinstance(progress, dict):
            raise ValueError("progress")
        state = tensors.pop("state")
        if state.shape != (sizes.layers, *state.shape[1:2], sizes.H) or state.dtype != np.float32:
            raise ValueError("state")
        resumable = Resumable(group("adam.m."), group("adam.v."), state, progress)
    if tensors:
        raise ValueError("tensors without a meaning")
    return Checkpoint(sizes, vocabulary, params, resumable)


def _digest(description: dict, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
