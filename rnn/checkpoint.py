"""Checkpoints: one self-describing safetensors file, written atomically and verified when read.

Parameters stand under PyTorch's names. One metadata key holds a JSON text with sizes, vocabulary, the progress of
training (in a file that can be resumed) and a SHA-256 of this text and of every tensor, so that a changed file is
noticed. A file without progress holds only parameters, and loads strictly into a PyTorch module.

The format's number says what a reader must know: 1, a model of characters, which every version reads; 2, a model of
bytes, which versions without such models refuse instead of reading its vocabulary as text. Nothing else in the file
tells the two apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import numpy as safetensors_numpy

from char_gru.rnn.config import Sizes, UserError
from char_gru.rnn.folder import write_atomically
from char_gru.rnn.params import checkpoint_name, parameter_shapes
from char_gru.rnn.texts import open_file
from char_gru.rnn.vocabulary import Vocabulary

METADATA_KEY = "char-gru"
FORMAT, FORMAT_OF_BYTES = 1, 2

HEADER_LIMIT, SMALL_HEADER = 16 << 20, 4 << 20
"""Bytes of the longest header, with every character there is, and of the longest with few characters and layers, but
with the names of very many files that a command line gave."""

HEADER_PARTS = 400_000
"""The most brackets, braces and commas of a header: a layer takes a hundred of them, a file of the text one."""


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
    write_atomically(path, checkpoint_bytes(checkpoint))


def checkpoint_bytes(checkpoint: Checkpoint) -> bytes:
    """The bytes of a checkpoint's file."""
    tensors, vocabulary = _tensors(checkpoint), checkpoint.vocabulary
    description = {"format": FORMAT_OF_BYTES if vocabulary.of_bytes else FORMAT, "sizes": asdict(checkpoint.sizes),
                   "vocabulary": vocabulary.characters, "beginning": vocabulary.beginning,
                   "progress": checkpoint.resumable.progress if checkpoint.resumable else None}
    description["sha256"] = _digest(description, tensors)
    return safetensors_numpy.save(tensors, {METADATA_KEY: json.dumps(description)})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises: UserError, one line, for a file that cannot be read, is no checkpoint, was cut short or altered, or whose
    tensors are not of the sizes it claims.
    """
    with open_file(path) as file:
        try:
            return read_checkpoint(file, path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_checkpoint(file: BinaryIO, path: Path) -> Checkpoint:
    """Read and verify a checkpoint from its open file, of which the errors tell the path. The length of its header is
    checked before the header is read, and the header before the tensors are.

    Raises: UserError as `load_checkpoint`; OSError.
    """
    unusable = UserError(f"{path} is no checkpoint of char-gru, or is damaged or cut short; "
                         "name a .safetensors file that train.py wrote")
    unfitting = UserError(f"{path} holds tensors that do not fit the sizes it claims; use another checkpoint")
    try:
        size = file.seek(0, os.SEEK_END) - 8
        file.seek(0)
        header, description = _header(file, size)
        size -= file.tell() - 8
        recorded, form = description.pop("sha256"), description["format"]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise unusable from None
    if form not in (FORMAT, FORMAT_OF_BYTES):
        raise UserError(f"{path} is a checkpoint of format {form!r:.20}, this version reads {FORMAT} and "
                        f"{FORMAT_OF_BYTES}; "
                        "use the version that wrote it")
    try:
        places = _places(header, _shapes(description, header))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise unfitting from None
    try:
        tensors = _read_tensors(file, places, size)
    except (TypeError, ValueError):
        raise unusable from None
    if recorded != _digest(description, tensors):
        raise UserError(f"{path} was altered after it was written (its checksum differs); use another checkpoint")
    if not all(np.isfinite(array).all() for array in tensors.values()):
        raise UserError(f"{path} holds numbers that are not finite; use another checkpoint")
    try:
        return _checkpoint(description, tensors)
    except ValueError:
        raise unfitting from None


def is_of_other_software(path: Path) -> bool:
    """Whether a file has tensors in the format of safetensors, and does not claim to be a checkpoint.

    Raises: UserError for a file that cannot be opened.
    """
    with open_file(path) as file:
        try:
            size = file.seek(0, os.SEEK_END) - 8
            file.seek(0)
            return METADATA_KEY not in _raw_header(file, size).get("__metadata__", {})
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError, OSError):
            return False


def find_checkpoint(run: Path | str | None, runs: Path = Path("runs")) -> Path:
    """The checkpoint file to generate from.

    run: a checkpoint file; or the folder of a run, whose best checkpoint is taken, or the last one where there is no
    best; None for the newest run in the folder `runs`.

    Raises: UserError if there is no checkpoint.
    """
    if not isinstance(run, Path | str | None):
        raise UserError(f"expected the path of a run or a checkpoint, got {run!r:.50}")
    folder = newest_run(runs) if run is None else Path(run)
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


def _header(file: BinaryIO, size: int) -> tuple[dict, dict]:
    """The header of a safetensors file, and the description in it; `size` bytes follow the header's length.

    Raises: ValueError and others for what is none, and for a header longer than the tensors behind it may need: a
    tensor's entry takes less than 12 times its bytes, as does a character of the vocabulary.
    """
    header = _raw_header(file, size)
    return header, json.loads(header["__metadata__"][METADATA_KEY], parse_constant=_refuse_constant)


def _raw_header(file: BinaryIO, size: int) -> dict:
    """The header of a safetensors file. Raises: as `_header`."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size, HEADER_LIMIT, SMALL_HEADER + 12 * (size - length)):
        raise ValueError("length")
    raw = file.read(length)
    if sum(map(raw.count, (b"[", b"{", b","))) > HEADER_PARTS:
        raise ValueError("parts")
    return json.loads(raw)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _shapes(description: dict, header: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of the sizes that a description claims.

    Raises: ValueError and others for what are no sizes.
    """
    sizes, progress = Sizes(**description["sizes"]), description["progress"]
    if not all(type(size) is int and size > 0 for size in asdict(sizes).values()) or sizes.layers > len(header):
        raise ValueError("sizes")
    known = description["vocabulary"]
    if not isinstance(known, str) or len(known) + 1 != sizes.V or not isinstance(progress, dict | None):
        raise ValueError("vocabulary or progress")
    parameters = {checkpoint_name(name): shape for name, shape in parameter_shapes(sizes).items()}
    if progress is None:
        return parameters
    B = header["state"]["shape"][1]
    if type(B) is not int or B < 1:
        raise ValueError("state")
    return {"state": (sizes.layers, B, sizes.H)} | {
        prefix + name: shape for prefix in ("", "adam.m.", "adam.v.") for name, shape in parameters.items()}


def _places(header: dict, shapes: dict[str, tuple[int, ...]]) -> list[tuple[int, int, str, tuple[int, ...]]]:
    """Of each tensor, in the order in which they lie in the file: where its bytes begin and end, name, shape.

    Raises: ValueError and others for tensors of other names or shapes, or not of float32.
    """
    if header.keys() - {"__metadata__"} != shapes.keys():
        raise ValueError("names")
    if any(header[name]["shape"] != list(shape) or header[name]["dtype"] != "F32" for name, shape in shapes.items()):
        raise ValueError("shapes")
    return sorted((*header[name]["data_offsets"], name, shape) for name, shape in shapes.items())


def _read_tensors(file: BinaryIO, places: list[tuple], size: int) -> dict[str, np.ndarray]:
    """Name -> array of the tensors that make up the `size` bytes to come.

    Raises: ValueError where they do not, TypeError for places that are no numbers.
    """
    end, slices = 0, {}
    for first, last, name, shape in places:
        if first != end or last - first != 4 * math.prod(shape):
            raise ValueError(name)
        slices[name], end = slice(first // 4, last // 4), last
    if end != size or len(raw := file.read(size)) != size:
        raise ValueError("size")
    values = np.frombuffer(raw, np.float32)
    return {name: values[slices[name]].reshape(shape) for _, _, name, shape in places}


def _checkpoint(description: dict, tensors: dict[str, np.ndarray]) -> Checkpoint:
    """Raises: ValueError for a vocabulary that is none."""
    sizes, progress = Sizes(**description["sizes"]), description["progress"]

    def group(prefix: str) -> dict[str, np.ndarray]:
        return {name: tensors[prefix + checkpoint_name(name)] for name in parameter_shapes(sizes)}

    resumable = None
    if progress is not None:
        resumable = Resumable(group("adam.m."), group("adam.v."), tensors["state"], progress)
    vocabulary = Vocabulary(description["vocabulary"], description.get("beginning", "\n"),  # older files have none
                            description["format"] == FORMAT_OF_BYTES)
    return Checkpoint(sizes, vocabulary, group(""), resumable)


def _digest(description: dict, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
