"""How likely a model finds the characters of texts: the training forward pass over many rows of text at a time.

A long text is cut into rows. Each row but a text's first one reads some characters before those it scores, its run-in,
so that its state has almost forgotten that it started from zero. How much is left is measured: the second half of a
run-in is scored by the row before as well, with its longer context.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from char_gru.rnn.config import Sizes
from char_gru.rnn.vocabulary import BYTES, UNK, Vocabulary

ROWS = 256
"""The most rows that are read together."""

STEPS, POSITIONS = 512, 1 << 12
"""The most steps of a window, and the most positions, steps times rows: states and gates of one window are kept."""

LOGITS = 1 << 22
"""The most logits that are kept."""

RUN_IN, LONGER = 256, 4
"""Characters of a run-in at first, and how many times as long it becomes for a text on which it has a large effect."""

LARGEST_EFFECT = 1e-4
"""The largest change of a text's loss, in nats per character, that is left to a run-in."""

ROW_PER_RUN_IN = 4
"""The shortest row that a text is cut into, in run-ins."""

PART = 1 << 21
"""Characters that are scored before they are handed over: more of them would need more memory."""

LIKELIEST = 5
"""Characters that are listed for each position."""

LINES = 1 << 12
"""Lines of characters that are written at a time."""


class Score(NamedTuple):
    """How likely a model finds a text: `loss`, in nats per character, the mean over `characters`.

    rows: into how many rows the text was cut; run_in: characters that each row but the first one reads before those
    that it scores, at most; run_in_effect: what run-ins of half that length change in the loss, in nats per character,
    as measured in the second half of these run-ins. It estimates what the whole run-ins change, mostly from above, but
    is no bound: the rounding of float32 alone may change the loss by some 1e-6.
    """

    loss: float
    characters: int
    rows: int = 1
    run_in: int = 0
    run_in_effect: float = 0.0


class Characters(NamedTuple):
    """Consecutive characters of a text as a model finds them, each given all characters before it.

    ids (N,) int32; log_probabilities (N,), natural logarithms, of the parameters' dtype. Where ranks are asked for,
    else None: ranks (N,) int32, 1 for the likeliest character; likeliest (N, K) int32, the K = min(5, V) likeliest
    characters, the first one first, and their likeliest_log_probabilities (N, K). Equally likely characters rank in the
    order of their ids. `[UNK]`, id 0, is a character as any other here.
    """

    ids: np.ndarray
    log_probabilities: np.ndarray
    ranks: np.ndarray | None = None
    likeliest: np.ndarray | None = None
    likeliest_log_probabilities: np.ndarray | None = None


class Part(NamedTuple):
    """Consecutive characters of text `text`: all but its first one, or of a long text one part after the other, up to
    the last. rows, run_in, run_in_effect: as in `Score`."""

    text: int
    characters: Characters
    last: bool
    rows: int
    run_in: int
    run_in_effect: float


class ForwardPass:
    """The forward pass of a model over windows of up to (T, B), with the state carried from window to window.

    Arguments: sizes; params, name -> array; P (V, 3H), the input table of layer 0; ops, the op set of these arrays;
    state (layers, B, H), an array of the op set, to start from, which is not changed (default: zero). The attribute
    `state` is the one after the last window.
    """

    def __init__(self, sizes: Sizes, params: Mapping, P, ops, T: int, B: int, state=None) -> None:
        self._sizes, self._params, self._P, self._ops = sizes, params, P, ops
        dtype, H = P.dtype, sizes.H
        self.state = ops.empty((sizes.layers, B, H), dtype)
        if state is None:
            ops.copy_in(self.state, np.zeros(self.state.shape))
        else:
            ops.copy(self.state, state)
        self._ids_tb, self._positions_tb = (ops.empty((T, B), np.int32) for _ in range(2))
        ops.copy_in(self._positions_tb, np.arange(T * B).reshape(T, B))
        self._saved = ops.gru_saved(T, B, H, dtype)  # of one layer after the other
        self._P_upper = ops.empty_activations((T * B, 3 * H), dtype) if sizes.layers > 1 else None
        self._logits = ops.empty_activations((max(1, min(T * B, LOGITS // sizes.V)), sizes.V), dtype)

    def log_probabilities(self, ids_tb: np.ndarray) -> Iterator[np.ndarray]:
        """Read a window; the items together are (T * B, V): in row t * B + b, the logarithm of each character's
        probability to follow `ids_tb[t, b]`.

        Shapes: ids_tb (T, B), integers in [0, V).
        """
        ops, params, saved = self._ops, self._params, self._saved
        T, B = ids_tb.shape
        ops.copy_in(self._ids_tb[:T], ids_tb)
        h = saved.h_tb[1:T + 1].reshape(T * B, -1)
        P, ids = self._P, self._ids_tb[:T]
        for layer in range(self._sizes.layers):
            if layer > 0:
                P, ids = self._P_upper[:T * B], self._positions_tb[:T]
                ops.input_table_forward(h, params[f"W_ih.{layer}"], params[f"b_ih.{layer}"], P)
            ops.gru_forward(P, ids, params[f"W_hh.{layer}"], params[f"b_hh.{layer}"], self.state[layer], saved)
            ops.copy(self.state[layer], saved.h_tb[T])
        for start in range(0, T * B, len(self._logits)):
            logits = self._logits[:T * B - start]  # an output layer is an input table, too: W_out h + b_out
            ops.input_table_forward(h[start:start + len(logits)], params["W_out"], params["b_out"], logits)
            yield _log_softmax(ops.to_host(logits))


class _Span(NamedTuple):
    """Positions start to end - 1 of text `text`; the score of position p is that of the character `ids[p + 1]`."""

    text: int
    start: int
    end: int


class _Row(NamedTuple):
    """A row of text `text`: it reads the positions first to end - 1, keeps their scores from `kept` on, to compare them
    with those of the row before, and those from `cut` on are its own."""

    text: int
    first: int
    kept: int
    cut: int
    end: int


class Scorer:
    """A model that scores texts.

    Arguments: sizes; params, name -> array; ops, the op set of these arrays; exact, read each text as one row from its
    start to its end; details, give ranks and likeliest characters; progress, called with numbers of characters that
    have been scored.
    """

    def __init__(self, sizes: Sizes, params: Mapping, ops, exact: bool = False, details: bool = False,
                 progress: Callable[[int], object] = lambda count: None) -> None:
        self._sizes, self._params, self._ops = sizes, params, ops
        self._exact, self._details, self._progress = exact, details, progress
        self._P = ops.empty_activations((sizes.V, 3 * sizes.H), params["W_emb"].dtype)
        ops.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"], self._P)

    def parts(self, ids_of_texts: Sequence[np.ndarray]) -> Iterator[Part]:
        """All texts in their order, each in one part or more.

        Shapes: ids_of_texts, (N,) integers in [0, V) for each text, N at least 2.
        """
        batch: list[_Span] = []
        count, largest = 0, 0 if self._exact else PART
        for span in _spans(ids_of_texts, None if self._exact else PART):
            count += span.end - span.start
            if batch and count > largest:
                yield from self._scored(ids_of_texts, batch, RUN_IN)
                batch, count = [], span.end - span.start
            batch.append(span)
        yield from self._scored(ids_of_texts, batch, RUN_IN)

    def _scored(self, ids_of_texts: Sequence[np.ndarray], spans: list[_Span], run_in: int) -> list[Part]:
        """Score spans; where the run-in has too large an effect, again with a longer one."""
        rows_of_spans = [[_Row(span.text, span.start, span.start, span.start, span.end)] for span in spans]
        if not self._exact:
            rows_of_spans = _cut(spans, run_in)
        progress = self._progress if run_in == RUN_IN else lambda count: None
        by_length = sorted((row for rows in rows_of_spans for row in rows), key=lambda row: row.first - row.end)
        found: dict[_Row, Characters] = {}
        for start in range(0, len(by_length), ROWS):
            found |= self._read(ids_of_texts, by_length[start:start + ROWS], progress)
        parts = {}
        for span, rows in zip(spans, rows_of_spans):
            arrays = zip(*(_sliced(found[row], row.cut - row.kept) for row in rows))
            characters = Characters(*(None if of_rows[0] is None else np.concatenate(of_rows) for of_rows in arrays))
            parts[span] = Part(span.text, characters, span.end == len(ids_of_texts[span.text]) - 1, len(rows),
                               max(row.cut - row.first for row in rows), _effect(rows, found))
        del found
        again = [span for span in spans if parts[span].run_in_effect > LARGEST_EFFECT]
        if again:
            parts |= zip(again, self._scored(ids_of_texts, again, LONGER * run_in))
        return list(parts.values())

    def _read(self, ids_of_texts: Sequence[np.ndarray], rows: list[_Row],
              progress: Callable[[int], object]) -> dict[_Row, Characters]:
        """Read rows together, each from a zero state; the first one is the longest."""
        B = len(rows)
        ends, cuts = (np.array([at - row.first for row, at in zip(rows, ats)])
                      for ats in ([row.end for row in rows], [row.cut for row in rows]))
        inputs_tb, targets_tb = np.zeros((2, ends[0], B), np.int32)  # past a row's end: any characters
        for b, (row, end) in enumerate(zip(rows, ends)):
            ids = ids_of_texts[row.text][row.first:row.end + 1]
            inputs_tb[:end, b], targets_tb[:end, b] = ids[:-1], ids[1:]
        T = min(ends[0], STEPS, max(1, POSITIONS // B))
        forward = ForwardPass(self._sizes, self._params, self._P, self._ops, T, B)
        found, position = _unfilled(targets_tb.reshape(-1), self._P.dtype, self._sizes.V, self._details), 0
        for start in range(0, ends[0], T):
            for log_p in forward.log_probabilities(inputs_tb[start:start + T]):
                _fill(_sliced(found, position, position + len(log_p)), log_p)
                position += len(log_p)
            progress(int((np.minimum(ends, start + T) - np.maximum(cuts, start)).clip(0).sum()))
        of_rows = Characters(*(None if array is None else array.reshape(-1, B, *array.shape[1:]) for array in found))
        return {row: Characters(*(None if array is None else array[row.kept - row.first:end, b] for array in of_rows))
                for b, (row, end) in enumerate(zip(rows, ends))}


def score_of(parts: Iterable[Part]) -> Score:
    """The score of a text, from all of its parts."""
    total, count, rows, run_in, effect = 0.0, 0, 0, 0, 0.0
    for part in parts:
        characters = len(part.characters.ids)
        total -= float(part.characters.log_probabilities.sum(dtype=np.float64))
        count += characters
        rows += part.rows
        run_in = max(run_in, part.run_in)
        effect += part.run_in_effect * characters
    return Score(total / count, count, rows, run_in, effect / count)


def json_lines(parts: Iterable[Part], vocabulary: Vocabulary, names: Sequence[str] | None) -> Iterator[str]:
    """A line of JSON for each text, after the lines of its characters where the parts have details; an item has
    many lines of characters, or the one of a text. Bytes are given as their values. names: those of the texts, to be
    told in each line; None tells none.
    """
    of_text: list[Part] = []
    unit, bits = ("byte", "bits_per_byte") if vocabulary.of_bytes else ("character", "bits_per_char")
    known = vocabulary.characters.encode(BYTES) if vocabulary.of_bytes else vocabulary.characters
    characters = [json.dumps(character) for character in (UNK, *known)]
    for part in parts:
        file = {} if names is None else {"file": names[part.text]}
        if part.characters.ranks is not None:
            for start in range(0, len(part.characters.ids), LINES):
                yield _lines_of_characters(_sliced(part.characters, start, start + LINES), characters, unit,
                                           json.dumps(file)[1:-1] + ", " if file else "")
        of_text.append(part._replace(characters=Characters(*part.characters[:2])))
        if part.last:
            score = score_of(of_text)
            cut = {} if score.rows == 1 else {"rows": score.rows, "run_in": score.run_in,
                                              "run_in_effect": score.run_in_effect}
            yield json.dumps(file | {"loss": score.loss, bits: score.loss / math.log(2),
                                     f"{unit}s": score.characters} | cut) + "\n"
            of_text = []


def _lines_of_characters(found: Characters, names: Sequence[str], unit: str, file: str) -> str:
    lines = []
    for id_, log_p, rank, ids, log_ps in zip(*(array.tolist() for array in found)):
        likeliest = ", ".join([f"[{names[other]}, {other_log_p:.6g}]" for other, other_log_p in zip(ids, log_ps)])
        lines.append(f'{{{file}"{unit}": {names[id_]}, "log_probability": {log_p:.6g}, "rank": {rank}, '
                     f'"likeliest": [{likeliest}]}}\n')
    return "".join(lines)


def _spans(ids_of_texts: Sequence[np.ndarray], longest: int | None) -> Iterator[_Span]:
    """All positions of all texts, in spans of at most `longest` (None: of any length)."""
    for text, ids in enumerate(ids_of_texts):
        pieces = 1 if longest is None else -(-(len(ids) - 1) // longest)
        for start, end in _even_cuts(0, len(ids) - 1, pieces):
            yield _Span(text, start, end)


def _cut(spans: list[_Span], run_in: int) -> list[list[_Row]]:
    """The rows of each span: so long that all together are about `ROWS`, but not too short for the run-in."""
    lengths = [end - start for _, start, end in spans]
    length = max(ROW_PER_RUN_IN * run_in, -(-sum(lengths) // ROWS))
    if len(spans) <= ROWS // 2:  # a single row more than ROWS would take as long as all the others
        while sum(-(-of_span // length) for of_span in lengths) > ROWS:
            length += -(-length // 32)
    return [[_Row(text, max(0, cut - run_in), max(0, cut - run_in // 2), cut, row_end)
             for cut, row_end in _even_cuts(start, end, -(-(end - start) // length))] for text, start, end in spans]


def _even_cuts(start: int, end: int, pieces: int) -> list[tuple[int, int]]:
    cuts = [start + (end - start) * piece // pieces for piece in range(pieces + 1)]
    return list(itertools.pairwise(cuts))


def _effect(rows: list[_Row], found: Mapping[_Row, Characters]) -> float:
    """By how much the mean loss of consecutive rows would change if what they have kept of their run-ins were part of
    it, instead of what the rows before have found there."""
    change = 0.0
    for before, row in itertools.pairwise(rows):
        kept = row.cut - row.kept
        by_row, by_row_before = found[row].log_probabilities[:kept], found[before].log_probabilities[-kept:]
        change += abs(float((by_row - by_row_before).sum(dtype=np.float64)))
    return change / (rows[-1].end - rows[0].cut)


def _unfilled(ids: np.ndarray, dtype, V: int, details: bool) -> Characters:
    N, K = len(ids), min(LIKELIEST, V)
    found = Characters(ids, np.empty(N, dtype))
    if details:
        found = Characters(*found[:2], np.empty(N, np.int32), np.empty((N, K), np.int32), np.empty((N, K), dtype))
    return found


def _fill(found: Characters, log_p: np.ndarray) -> None:
    """Fill in what is known of characters: all but their ids. Shapes: log_p (N, V)."""
    targets = found.ids[:, None]
    of_target = np.take_along_axis(log_p, targets, axis=1)
    found.log_probabilities[...] = of_target[:, 0]
    if found.ranks is None:
        return
    before = (log_p > of_target) | (log_p == of_target) & (np.arange(log_p.shape[1]) < targets)
    found.ranks[...] = 1 + before.sum(axis=1)
    remaining, rows = np.array(log_p, order="C"), np.arange(len(log_p))
    for k in range(found.likeliest.shape[1]):
        found.likeliest[:, k] = best = remaining.argmax(axis=1)
        found.likeliest_log_probabilities[:, k] = remaining[rows, best]
        remaining[rows, best] = -np.inf


def _sliced(characters: Characters, start: int, end: int | None = None) -> Characters:
    return Characters(*(None if array is None else array[start:end] for array in characters))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities. Shapes: logits, result (N, V), whose columns are outermost in memory."""
    logits = np.asfortranarray(logits)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits
