"""Text from a model: prompts, carried state, streaming."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rnn import reference
from rnn.checkpoint import find_checkpoint, load_checkpoint
from rnn.config import Sizes, UserError, check_sampling
from rnn.devices import op_set
from rnn.vocabulary import Vocabulary

CHUNK = 32
"""Characters that are written between two looks at what has been written."""


class Generator:
    """A model that writes text.

    Arguments: sizes; vocabulary; params, name -> array of the op set as `rnn.params.named_views` gives them; ops, the
    op set; seed of the characters that `step` draws.
    """

    def __init__(self, sizes: Sizes, vocabulary: Vocabulary, params: Mapping, ops=reference, seed: int = 0) -> None:
        self.sizes, self.vocabulary = sizes, vocabulary
        self._params, self._ops, self._rng = params, ops, _uniform_source(seed)
        dtype = params["W_emb"].dtype
        self._P = ops.empty((sizes.V, 3 * sizes.H), dtype)
        ops.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"], self._P)

    @staticmethod
    def load(run: Path | str | None = None, device: str = "auto", seed: int = 0) -> Generator:
        """The model of a run's folder or of a checkpoint file; without a name, of the newest run under runs/.

        Raises: UserError if there is none or it cannot be used.
        """
        checkpoint = load_checkpoint(find_checkpoint(None if run is None else Path(run)))
        ops = op_set(device)
        params = {}
        for name, array in checkpoint.params.items():
            params[name] = ops.empty(array.shape, array.dtype)
            ops.copy_in(params[name], array)
        return Generator(checkpoint.sizes, checkpoint.vocabulary, params, ops, seed)

    def zero_state(self, rows: int):
        """The state before any character, (layers, rows, H)."""
        state = self._ops.empty((self.sizes.layers, rows, self.sizes.H), self._P.dtype)
        self._ops.copy_in(state, np.zeros(state.shape))
        return state

    def step(self, chars: Sequence[str], state=None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             min_p: float = 0.0) -> tuple[list[str], object]:
        """Read one character per row and draw the next ones: (next characters, new state).

        state: what the last call returned, or None before the first; it is not changed. Unknown characters are read
        as `[UNK]`.
        """
        check_sampling(temperature, top_k, top_p, min_p)
        if not chars or any(len(char) != 1 for char in chars):
            raise UserError(f"step takes one character per row, not {list(chars)!r}")
        rows = len(chars)
        new_state = self.zero_state(rows)
        if state is not None:
            self._ops.copy(new_state, state)
        writer = _Writer(self, new_state, self.vocabulary.encode("".join(chars)))
        ids_tr = writer.write(np.full((1, rows), -1), self._rng.random((1, rows), np.float32),
                              temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        return list(self.vocabulary.decode(ids_tr[0])), new_state

    def generate(self, prompts: Sequence[str] = ("",), length: int = 1000, **options) -> list[str]:
        """Texts that continue the prompts, without the prompts; options as for `stream`."""
        texts = [""] * len(prompts)
        for pieces in self.stream(prompts, length, **options):
            texts = [text + piece for text, piece in zip(texts, pieces)]
        return texts

    def stream(self, prompts: Sequence[str] = ("",), length: int = 1000, *, temperature: float = 1.0, top_k: int = 0,
               top_p: float = 1.0, min_p: float = 0.0, stop: Sequence[str] = (), seed: int | None = None,
               on_unknown: str = "error") -> Iterator[list[str]]:
        """Continue all prompts together, piece by piece: each item has the next few characters of every text.

        A text ends after `length` characters or with the first string of `stop` that it comes to hold (the string
        is kept). An empty prompt starts at the beginning of a line. The k-th character of row b is drawn with uniform
        number (k, b) of the Philox stream of the seed, so the same seed writes the same texts.

        Raises: UserError for unknown characters in a prompt (unless on_unknown is skip or unk) and for options out of
        range.
        """
        check_sampling(temperature, top_k, top_p, min_p)
        ids_of_rows = [self._prompt_ids(prompt, on_unknown) for prompt in prompts]
        return self._pieces(ids_of_rows, length, stop, new_seed() if seed is None else seed,
                            {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p})

    def _pieces(self, ids_of_rows: list[np.ndarray], length: int, stop: Sequence[str], seed: int,
                options: dict) -> Iterator[list[str]]:
        rows = len(ids_of_rows)
        forced_steps = np.array([len(ids) - 1 for ids in ids_of_rows])
        forced_tr = np.full((forced_steps.max() + length, rows), -1, np.int32)
        uniforms_tr = np.zeros(forced_tr.shape, np.float32)
        uniforms = _uniform_source(seed).random((length, rows), np.float32)
        for row, ids in enumerate(ids_of_rows):
            read = len(ids) - 1
            forced_tr[:read, row] = ids[1:]
            uniforms_tr[read:read + length, row] = uniforms[:, row]
        writer = _Writer(self, self.zero_state(rows), np.array([ids[0] for ids in ids_of_rows]))
        tails, open_rows = [""] * rows, set(range(rows))
        overlap = max((len(text) for text in stop), default=1) - 1
        for start in range(0, len(forced_tr), CHUNK):
            ids_tr = writer.write(forced_tr[start:start + CHUNK], uniforms_tr[start:start + CHUNK], **options)
            pieces = [""] * rows
            for row in sorted(open_rows):
                first, last = forced_steps[row] - start, forced_steps[row] + length - start
                piece = self.vocabulary.decode(ids_tr[max(first, 0):max(last, 0), row])
                end = _end_of_first(stop, tails[row] + piece)
                if end is not None:
                    piece = piece[:end - len(tails[row])]
                if end is not None or last <= len(ids_tr):
                    open_rows.remove(row)
                pieces[row] = piece
                tails[row] = (tails[row] + piece)[-overlap:] if overlap else ""
            yield pieces
            if not open_rows:
                return

    def _prompt_ids(self, prompt: str, on_unknown: str) -> np.ndarray:
        ids = self.vocabulary.encode_prompt(prompt, on_unknown)
        if len(ids) == 0:
            ids = self.vocabulary.encode("\n")
        return ids.astype(np.int32)


class _Writer:
    """Buffers of one text in the making: the op set's `generate`, on arrays of the host."""

    def __init__(self, generator: Generator, state, first_ids: np.ndarray) -> None:
        self._generator, self._state = generator, state
        ops, sizes, rows = generator._ops, generator.sizes, len(first_ids)
        self._ids = ops.empty((rows,), np.int32)
        ops.copy_in(self._ids, first_ids)
        self._forced_tr, self._ids_tr = (ops.empty((CHUNK, rows), np.int32) for _ in range(2))
        self._uniforms_tr = ops.empty((CHUNK, rows), np.float32)
        self._saved = ops.generation_saved(rows, sizes.H, sizes.V, generator._P.dtype)

    def write(self, forced_tr: np.ndarray, uniforms_tr: np.ndarray, **options) -> np.ndarray:
        """Up to CHUNK steps; shapes as for `rnn.reference.generate`."""
        ops, generator, T = self._generator._ops, self._generator, len(forced_tr)
        ops.copy_in(self._forced_tr[:T], forced_tr)
        ops.copy_in(self._uniforms_tr[:T], uniforms_tr)
        ops.generate(generator._params, generator._P, self._state, self._ids, self._forced_tr[:T],
                     self._uniforms_tr[:T], self._ids_tr[:T], self._saved, **options)
        return ops.to_host(self._ids_tr[:T])


def new_seed() -> int:
    """A seed to draw with when none was asked for, short enough to type again."""
    return secrets.randbits(32)


def _uniform_source(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def _end_of_first(stop: Sequence[str], text: str) -> int | None:
    ends = [text.index(wanted) + len(wanted) for wanted in stop if wanted in text]
    return min(ends, default=None)
