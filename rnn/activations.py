"""What the units of a model do while it reads a text: states, gates and logits of every character, the correlation of
states with properties of the text, and a file with all of it.

The text is read once, piece by piece, with the state carried from piece to piece. Beside the text and its ids, a piece
is all that is in memory: its arrays are added to sums, and written to their places in the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from char_gru.rnn.checkpoint import METADATA_KEY, Checkpoint, find_checkpoint, load_checkpoint
from char_gru.rnn.config import LookConfig, Sizes, UserError
from char_gru.rnn.devices import op_set
from char_gru.rnn.folder import check_output, replacing
from char_gru.rnn.params import on_ops
from char_gru.rnn.texts import STDIN, read_text
from char_gru.rnn.vocabulary import Vocabulary, code_points

PROPERTIES = ("line position", "case", "quotes", "brackets", "spaces")
"""Names of the properties of a text, in the order of the table."""

LONGEST_LINE = 100
"""The largest line position."""

STEPS, LOGITS = 512, 1 << 22
"""The most characters of a piece, and the most logits, characters times V."""

PART = 1 << 20
"""Characters of a text that are converted at a time where no model reads them."""

SUFFIX = ".safetensors"

_NAMES = {np.dtype(np.int32): "I32", np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
"""Names of types in the header of a safetensors file."""


class Tensor(NamedTuple):
    """Type and shape of a tensor in a file; its first axis is the text's characters."""

    dtype: np.dtype
    shape: tuple[int, ...]


def look(config: LookConfig) -> Iterator[str]:
    """Read a text with a model and write `config.save`, if it is given; the items are the lines of the table of units
    that follow properties of the text, and one line about the text.

    The file holds, for the N characters: `ids` (N,) int32; `surprisal` (N,) float32, -log2 of each character's
    probability given the characters before it, NaN for the first; and in `config.dtype`, for each layer l, the gates
    `r.l`, `z.l` and `n.l` (N, H) of the step that reads the character and the state `h.l` (N, H) after it, and `logits`
    (N, V) of the character to follow. Its metadata `char-gru` is JSON: vocabulary (the characters of ids 1, 2, ...),
    beginning, sizes, surprisal_in, and text_sha256, of the characters read, in UTF-8. At any moment the
    path holds what it held before, or the whole file.

    Raises: UserError for a model or text that cannot be read, a model of bytes, unknown characters (unless on_unknown
    is skip or unk), a text of fewer than two known characters, and a file that exists (unless force is given) or has no
    place on the disk; OSError that names the file if it cannot be written.
    """
    if config.save is not None:
        _check_target(config.save, config.force, find_checkpoint(config.run))
    checkpoint = load_checkpoint(find_checkpoint(config.run))
    if checkpoint.vocabulary.of_bytes:
        raise UserError(f"{config.run} is a model of bytes, and properties of text belong to characters; name a model "
                        "of characters")
    sizes, (text, ids) = checkpoint.sizes, _read(config, checkpoint.vocabulary)
    ops, steps = op_set(config.device, "fp32"), max(1, min(STEPS, LOGITS // sizes.V))
    if config.save is None:
        saving = contextlib.nullcontext(lambda start, arrays: None)
    else:
        saving = _saving(config.save, _tensors(sizes, len(ids), config.dtype), _description(checkpoint, text))
    correlations, bits = Correlations(), 0.0
    with saving as write, tqdm(total=len(ids), unit=" characters", unit_scale=True, disable=None, dynamic_ncols=True,
                               leave=False) as bar:
        pieces = zip(activations(checkpoint, ids, ops, steps), _properties(text, steps), strict=True)
        for start, (arrays, values) in zip(range(0, len(ids), steps), pieces):
            write(start, arrays)
            h = np.concatenate([arrays[f"h.{layer}"] for layer in range(sizes.layers)], axis=1)
            correlations.add(values.T, h)
            bits += float(arrays["surprisal"][1 if start == 0 else 0:].sum(dtype=np.float64))
            bar.update(len(h))
    yield from _table(correlations.r(), sizes.H, config.units)
    bits /= len(ids) - 1
    yield f"{len(ids):,} characters, mean loss {bits * math.log(2):.4f} nats, {bits:.4f} bits per character"


def activations(checkpoint: Checkpoint, ids: np.ndarray, ops, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """States, gates, logits and surprisals of a text that is read from a zero state, in pieces of `steps` characters;
    the arrays of a piece have the names and shapes of the file that `look` writes, T characters in place of N.

    Shapes: ids (N,), integers in [0, V); results ids (T,) int32, all others float32.
    """
    V, H, layers = checkpoint.sizes.V, checkpoint.sizes.H, checkpoint.sizes.layers
    params = on_ops(checkpoint.params, ops)
    P_0 = ops.empty_activations((V, 3 * H))
    ops.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"], P_0)
    P_upper, logits = (ops.empty_activations((steps, n)) for n in (3 * H, V))
    saved = ops.gru_saved(steps, 1, H)  # of one layer after the other
    state = ops.empty((layers, 1, H))
    ops.copy_in(state, np.zeros((layers, 1, H)))
    ids_tb, positions_tb = (ops.empty((steps, 1), np.int32) for _ in range(2))
    ops.copy_in(positions_tb, np.arange(steps)[:, None])
    last_logits = np.zeros((1, V))
    for start in range(0, len(ids), steps):
        targets = ids[start:start + steps].astype(np.int32)
        T, arrays = len(targets), {"ids": targets}
        ops.copy_in(ids_tb[:T], targets[:, None])
        h = saved.h_tb[1:T + 1].reshape(T, H)
        P, rows_tb = P_0, ids_tb[:T]
        for layer in range(layers):
            if layer > 0:
                P, rows_tb = P_upper[:T], positions_tb[:T]
                ops.input_table_forward(h, params[f"W_ih.{layer}"], params[f"b_ih.{layer}"], P)
            ops.gru_forward(P, rows_tb, params[f"W_hh.{layer}"], params[f"b_hh.{layer}"], state[layer], saved)
            ops.copy(state[layer], saved.h_tb[T])
            r_z_n = np.split(ops.to_host(saved.gates_tb[:T]).reshape(T, 3 * H), 3, axis=1)
            arrays |= {f"{name}.{layer}": array for name, array in zip("hrzn", (ops.to_host(h), *r_z_n))}
        ops.input_table_forward(h, params["W_out"], params["b_out"], logits[:T])  # an output layer is one, too
        arrays["logits"] = ops.to_host(logits[:T])
        before = np.concatenate([last_logits, arrays["logits"][:-1]])
        surprisal = np.logaddexp.reduce(before, axis=1) - before[np.arange(T), targets]
        arrays["surprisal"] = (surprisal / math.log(2)).astype(np.float32)
        if start == 0:
            arrays["surprisal"][0] = np.nan
        last_logits = arrays["logits"][-1:].astype(np.float64)
        yield arrays


def properties(text: str) -> dict[str, np.ndarray]:
    """What holds at each character of a text, after reading it: name -> (N,) float32.

    line position: number of characters since the last "\\n", which itself has 0, as has the place before the text; at
    most 100. case: 1 if the last letter that has a case is upper case, else 0. quotes: 1 inside double quotes: `"`
    opens or closes, “ opens, ” closes, as does a blank line, the second "\\n" of two. brackets: 1 if more of `([{` than
    of `)]}` were read; what closes nothing does not count, and a blank line closes all. spaces: 1 for white space, as
    `str.isspace` tells.
    """
    values = np.empty((len(PROPERTIES), len(text)), np.float32)
    for start, piece in zip(range(0, len(text), PART), _properties(text, PART)):
        values[:, start:start + PART] = piece
    return dict(zip(PROPERTIES, values))


def _properties(text: str, steps: int) -> Iterator[np.ndarray]:
    """The properties of a text in pieces of `steps` characters: (properties, T) float32."""
    characters = set(text)
    cased = _marks(characters, lambda character: character.lower() != character.upper())
    upper = _marks(characters, lambda character: character.lower() != character)
    white = _marks(characters, str.isspace)
    opening, closing = (_marks(set(brackets), lambda bracket: True) for brackets in ("([{", ")]}"))
    position, newline, case, quotes, depth = 0, False, False, False, 0  # after the piece before
    for start in range(0, len(text), steps):
        codes = code_points(text[start:start + steps])
        newlines, index = codes == ord("\n"), np.arange(len(codes))
        blank = newlines & np.append(newline, newlines[:-1])
        positions = index - np.append(index, -1 - position)[_last(newlines)]
        cases = np.append(upper[codes], case)[_last(cased[codes])]
        opens, toggles = codes == ord("“"), np.cumsum(codes == ord('"'))
        last = _last(opens | (codes == ord("”")) | blank)
        toggled = (toggles - np.append(toggles, 0)[last]) % 2 == 1
        in_quotes = np.append(opens, quotes)[last] ^ toggled
        # A blank line closes more than can be open; a depth is what it would be without a floor, less how far that has
        # fallen below 0.
        change = opening[codes].astype(np.int64) - closing[codes] - blank * (depth + len(codes))
        unbounded = depth + np.cumsum(change)
        depths = unbounded - np.minimum.accumulate(np.minimum(unbounded, 0))
        yield np.array([np.minimum(positions, LONGEST_LINE), cases, in_quotes, depths > 0, white[codes]], np.float32)
        position, newline, case = positions[-1], newlines[-1], cases[-1]
        quotes, depth = in_quotes[-1], depths[-1]


def _marks(characters: set[str], holds: Callable[[str], bool]) -> np.ndarray:
    """For every code point: whether it is one of the characters, and this holds for it."""
    marks = np.zeros(sys.maxunicode + 1, bool)
    for character in characters:
        marks[ord(character)] = holds(character)
    return marks


def _last(marked: np.ndarray) -> np.ndarray:
    """For each position, the last one up to it that is marked, -1 if there is none. Shapes: marked, result (T,)."""
    return np.maximum.accumulate(np.where(marked, np.arange(len(marked)), -1))


class Correlations:
    """Pearson's correlations of the columns of x (N, X) with the columns of y (N, Y), whose rows are added in pieces.

    Sums are float64, of deviations from the mean so far; those of two pieces are joined as Chan, Golub and LeVeque do
    ("Updating formulae and a pairwise algorithm for computing sample variances", 1979). Values count from the first
    row, so that the squares of a column without variation sum to exactly 0.
    """

    def __init__(self) -> None:
        self._count = 0

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add rows. Shapes: x (T, X); y (T, Y)."""
        if self._count == 0:
            self._first = [array[0].astype(np.float64) for array in (x, y)]
            self._means, self._squares = ([np.zeros(array.shape[1]) for array in (x, y)] for _ in range(2))
            self._products = np.zeros((x.shape[1], y.shape[1]))
        before, self._count = self._count, self._count + len(x)
        deviations, shifts = [], []
        for k, array in enumerate((x, y)):
            deviation = array - self._first[k]
            mean = deviation.mean(axis=0)
            deviation -= mean
            shift = mean - self._means[k]
            self._squares[k] += (deviation**2).sum(axis=0) + shift**2 * (before * len(x) / self._count)
            self._means[k] += shift * (len(x) / self._count)
            deviations.append(deviation)
            shifts.append(shift)
        self._products += deviations[0].T @ deviations[1] + np.outer(*shifts) * (before * len(x) / self._count)

    def r(self) -> np.ndarray:
        """The correlations (X, Y) float64: NaN for a column of x without variation, 0 for a column of y without."""
        of_x, of_y = self._squares
        with np.errstate(invalid="ignore"):
            return self._products / np.sqrt(np.outer(of_x, np.where(of_y > 0, of_y, 1)))


def _table(r: np.ndarray, H: int, units: int) -> Iterator[str]:
    """Lines with the units that follow each property best. Shapes: r (properties, layers * H)."""
    yield f"{'property':15}{'layer':>5}{'unit':>7}{'r':>8}"
    for name, of_units in zip(PROPERTIES, r):
        if np.isnan(of_units).all():
            yield f"{name:15}is the same at every character of this text"
            continue
        for unit in np.argsort(-np.abs(of_units), kind="stable")[:units]:
            yield f"{name:15}{unit // H:5}{unit % H:7}{of_units[unit]:8.3f}"


def _read(config: LookConfig, vocabulary: Vocabulary) -> tuple[str, np.ndarray]:
    """The text and its ids (N,); unknown characters that are left out are in neither. Raises: UserError."""
    text, name = vocabulary.as_learnt(read_text(config.text)), "stdin" if config.text == STDIN else config.text
    try:
        ids = vocabulary.encode_prompt(text, config.on_unknown)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if len(ids) < len(text):
        text = text.translate(dict.fromkeys(map(ord, set(text) - set(vocabulary.characters))))
    if len(ids) < 2:
        raise UserError(f"{name} is too short; nothing stands before its first known character, so give two")
    return text, ids


# The file

def _check_target(path: Path, force: bool, source: Path) -> None:
    """Raises: UserError for a file that is not to be written."""
    if path.suffix != SUFFIX:
        raise UserError(f"{path} does not end in {SUFFIX}, the format that --save writes; give such a name")
    check_output(path, force, source)


def _tensors(sizes: Sizes, N: int, dtype: str) -> dict[str, Tensor]:
    """The tensors of a file in their order, wider numbers first, so that each begins at a multiple of its width."""
    chosen = np.dtype(dtype)
    of_layers = {f"{name}.{layer}": Tensor(chosen, (N, sizes.H)) for layer in range(sizes.layers) for name in "hrzn"}
    return {"ids": Tensor(np.dtype(np.int32), (N,)), "surprisal": Tensor(np.dtype(np.float32), (N,)), **of_layers,
            "logits": Tensor(chosen, (N, sizes.V))}


def _description(checkpoint: Checkpoint, text: str) -> dict:
    """The metadata of a file."""
    digest = hashlib.sha256()
    for start in range(0, len(text), PART):
        digest.update(text[start:start + PART].encode())
    return {"vocabulary": checkpoint.vocabulary.characters, "beginning": checkpoint.vocabulary.beginning,
            "sizes": asdict(checkpoint.sizes), "surprisal_in": "bits", "text_sha256": digest.hexdigest()}


@contextlib.contextmanager
def _saving(path: Path, tensors: Mapping[str, Tensor], description: dict) -> Iterator[Callable[[int, dict], None]]:
    """A block that writes a safetensors file: its function `write(start, arrays)` writes rows from `start` on, of each
    tensor as many as its array (T, ...) has. The file is there when the block has ended without an exception.

    Raises: as `rnn.folder.replacing`; UserError for a file that has no place on its disk.
    """
    header, offset, places = {"__metadata__": {METADATA_KEY: json.dumps(description)}}, 0, {}
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        places[name], offset = offset, offset + size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    free = shutil.disk_usage(path.parent).free
    if free < 8 + len(raw) + offset:
        raise UserError(f"{path} takes {offset / 1e9:.3g} GB, and its disk has {free / 1e9:.3g} GB left; give a "
                        "shorter text, another disk, or leave --dtype at float16")
    with replacing(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)

        def write(start: int, arrays: dict[str, np.ndarray]) -> None:
            for name, array in arrays.items():
                dtype, (_, *columns) = tensors[name]
                file.seek(8 + len(raw) + places[name] + start * math.prod(columns) * dtype.itemsize)
                file.write(np.ascontiguousarray(array, dtype))

        yield write
