"""Text from a model: prompts, carried state, streaming; and how likely a model finds a text."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from char_gru.rnn import cpu
from char_gru.rnn.checkpoint import find_checkpoint, load_checkpoint
from char_gru.rnn.config import Sizes, UserError, check_length, check_sampling, check_seed, described
from char_gru.rnn.devices import op_set
from char_gru.rnn.params import on_ops
from char_gru.rnn.scoring import ForwardPass, Part, Score, Scorer, score_of
from char_gru.rnn.vocabulary import Vocabulary

FIRST_CHUNK, LARGEST_CHUNK = 8, 1024
"""Steps that are launched together: few at first, so that text appears at once, then twice as many each time."""

CHUNK_NUMBERS = 1 << 18
"""The most uniform numbers, steps times rows, of a chunk after the first: `kernels.arrays` does not copy larger arrays
while the GPU computes."""

PAUSE_SECONDS = 0.05
"""A chunk that takes longer than this is not followed by a larger one: a reader would see the text come in bursts."""

Strings = str | bytes | Sequence[str | bytes]
"""A prompt or a stop string, or several; `bytes` are for models of bytes."""


class Generator:
    """A model that writes text.

    A model of bytes (`vocabulary.of_bytes`) reads prompts, stop strings and texts to score as their UTF-8, or as the
    `bytes` that they are; its lengths and scores count bytes; the texts that it writes are decoded from UTF-8. Its
    `step` and `next` take and give the characters U+0000 to U+00FF, each of which stands for the byte of that value.

    Arguments: sizes; vocabulary; params, name -> array of the op set as `rnn.params.named_views` gives them; ops, the
    op set; seed of the characters that `step` draws.
    Raises: ValueError for a vocabulary of another size than V; UserError for a seed out of range.
    """

    def __init__(self, sizes: Sizes, vocabulary: Vocabulary, params: Mapping, ops=cpu, seed: int = 0) -> None:
        if len(vocabulary) != sizes.V:  # ids would select rows beside the input table
            raise ValueError(f"vocabulary: expected {sizes.V} characters, [UNK] included, got {len(vocabulary)}")
        check_seed(seed)
        self.sizes, self.vocabulary = sizes, vocabulary
        self._params, self._ops, self._rng = params, ops, _uniform_source(seed)
        dtype = params["W_emb"].dtype
        self._P = ops.empty((sizes.V, 3 * sizes.H), dtype)
        ops.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"], self._P)

    @staticmethod
    def load(run: Path | str | None = None, device: str = "auto", seed: int = 0) -> Generator:
        """The model of a run's folder or of a checkpoint file; with None, of the newest run under runs/.

        Raises: UserError if there is no checkpoint, if it cannot be used, or if the machine lacks the device.
        """
        checkpoint = load_checkpoint(find_checkpoint(run))
        ops = op_set(device, "fp32")  # as text is written in fp32, the input table must not be rounded
        return Generator(checkpoint.sizes, checkpoint.vocabulary, on_ops(checkpoint.params, ops), ops, seed)

    def zero_state(self, rows: int):
        """The state before any character, (layers, rows, H)."""
        state = self._ops.empty((self.sizes.layers, rows, self.sizes.H), self._P.dtype)
        self._ops.copy_in(state, np.zeros(state.shape))
        return state

    def step(self, chars: Sequence[str], state=None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             min_p: float = 0.0) -> tuple[list[str], object]:
        """Read one character per row and draw the next ones: (next characters, new state).

        state (layers, rows, H): the state that the last call returned, or None for a zero state; it is not changed.
        Unknown characters are read as `[UNK]`.

        Raises: UserError for options out of range, and for an entry of `chars` that is not one character.
        """
        check_sampling(temperature, top_k, top_p, min_p)
        ids = self._ids_of_rows(chars, state)
        new_state = self.zero_state(len(ids))
        if state is not None:
            self._ops.copy(new_state, state)
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        texts = _Texts(self, new_state, ids[:, None], self._rng, 1, options)
        return list(self.vocabulary.decode(texts.launch(1)()[0])), new_state

    def next(self, chars: Sequence[str], state=None) -> tuple[np.ndarray, object]:
        """Read one character per row and give the probabilities of the next ones: (probabilities, new state).

        Shapes: probabilities (rows, V), a NumPy array of float32 whose rows sum to 1: column i is for the character of
        id i, `vocabulary.characters[i - 1]`, column 0 for `[UNK]`, which is never drawn; state and new state (layers,
        rows, H), as in `step`.

        Raises: UserError as `step`.
        """
        ids = self._ids_of_rows(chars, state)
        forward = ForwardPass(self.sizes, self._params, self._P, self._ops, 1, len(ids), state)
        log_p = np.concatenate([*forward.log_probabilities(ids[None])])
        return np.exp(log_p, order="C"), forward.state

    def generate(self, prompts: Strings = "", length: int = 1000, **options) -> list[str]:
        """Texts that continue the prompts, without the prompts; options: those of `stream`.

        Raises: UserError as `stream`, and for texts without an end: length 0 and no `stop`.
        """
        if length == 0 and not options.get("stop"):
            raise UserError("generate needs a length or a stop string; stream writes without end")
        pieces = list(self.stream(prompts, length, **options))
        return ["".join(pieces_of_row) for pieces_of_row in zip(*pieces)]

    def stream(self, prompts: Strings = "", length: int = 1000, *, temperature: float = 1.0,
               top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, stop: Strings = (),
               seed: int | None = None, on_unknown: str = "error", raw: bool = False) -> Iterator[list[str]]:
        """Continue all prompts together, piece by piece: each item has the next few characters of every text. A string
        is one prompt, and one stop string.

        From a model of bytes, a character comes with the last of its bytes, and U+FFFD stands for bytes that are no
        UTF-8; with `raw`, each byte comes at once, as the character that stands for it (`piece.encode("latin-1")` has
        the bytes).

        A text ends after `length` characters (0: never), or as soon as it contains a string of `stop`, which is kept.
        Line ends of prompts become those of the text learnt, and a byte order mark is dropped, as
        `Vocabulary.as_learnt` says. An empty prompt starts after the vocabulary's `beginning`, the end of a line where
        the model has learnt lines. The k-th character of row b is drawn with uniform number (k, b) of the Philox stream
        of the seed, so the same seed writes the same texts, however they are cut into pieces. While the caller works on
        a piece, a GPU writes the next one.

        Raises: UserError for unknown characters in a prompt (unless on_unknown is skip or unk), for no prompt, an empty
        stop string, and options out of range.
        """
        check_length(length)
        check_sampling(temperature, top_k, top_p, min_p)
        seed = new_seed() if seed is None else seed
        check_seed(seed)
        prompts = [self.vocabulary.as_learnt(prompt, "prompts") for prompt in _listed(prompts)]
        stop = [self.vocabulary.as_characters(text, "stop") for text in _listed(stop)]
        if not prompts:
            raise UserError("there is no prompt; an empty one is ''")
        if "" in stop:
            raise UserError("stop has an empty string; give the text at which to stop, or leave it out")
        ids_of_rows = [self._prompt_ids(prompt, on_unknown) for prompt in prompts]
        pieces = self._pieces(ids_of_rows, length, stop, seed,
                              {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p})
        return pieces if raw or not self.vocabulary.of_bytes else self._decoded(pieces, len(prompts))

    def score(self, text: str | bytes, on_unknown: str = "error", exact: bool = False) -> Score:
        """How likely the model finds each character of a text given all characters before it, from a zero state on.

        The first character is not scored. Line ends and byte order mark are those of a prompt in `stream`. Unknown
        characters are refused, left out (`skip`), or read, and scored, as `[UNK]` (`unk`). A long text is cut into
        rows, as `rnn.scoring` tells; with `exact` it is one row.

        Raises: UserError for unknown characters, and for a text with fewer than two known ones.
        """
        return score_of(self.score_parts([self.ids_to_score(text, on_unknown)], exact))

    def ids_to_score(self, text: str | bytes, on_unknown: str = "error") -> np.ndarray:
        """Ids (N,) of a text to score. Raises: UserError as `score`."""
        ids = self.vocabulary.encode_prompt(self.vocabulary.as_learnt(text), on_unknown)
        if len(ids) < 2:
            raise UserError(f"the text to score is too short; its first known {self.vocabulary.unit} is not scored, so "
                            "give two")
        return ids

    def score_parts(self, ids_of_texts: Sequence[np.ndarray], exact: bool = False, details: bool = False,
                    progress: Callable[[int], object] = lambda count: None) -> Iterator[Part]:
        """The texts' characters as the model finds them; arguments and result: those of `rnn.scoring.Scorer`."""
        return Scorer(self.sizes, self._params, self._ops, exact, details, progress).parts(ids_of_texts)

    def _ids_of_rows(self, chars: Sequence[str], state) -> np.ndarray:
        """The id (rows,) of the one character of each row. Raises: UserError for any other input, or state."""
        if isinstance(chars, str):
            chars = [chars]
        if not isinstance(chars, Iterable) or isinstance(chars, bytes):
            raise UserError(f"give one character per row, as strings, not {described(chars)}")
        chars = list(chars)
        if not chars or any(not isinstance(char, str) or len(char) != 1 for char in chars):
            raise UserError(f"give one character per row, not {chars!r:.60}")
        shape = (self.sizes.layers, len(chars), self.sizes.H)
        if state is not None and not hasattr(state, "shape"):
            raise UserError(f"state is {described(state)}, but must be an array: what the last call returned, or None")
        if state is not None and state.shape != shape:
            raise UserError(f"state has shape {state.shape}, but must have {shape}: (layers, rows, H)")
        return self.vocabulary.encode("".join(chars))

    def _pieces(self, ids_of_rows: list[np.ndarray], length: int, stop: Sequence[str], seed: int,
                options: dict) -> Iterator[list[str]]:
        """Decode chunk after chunk, and end each row's text at its length or at a stop string. A stop string may begin
        in an earlier piece, so `tails` keeps the last characters of each row.
        """
        rows = len(ids_of_rows)
        largest = max(FIRST_CHUNK, min(LARGEST_CHUNK, CHUNK_NUMBERS // rows))
        texts = _Texts(self, self.zero_state(rows), ids_of_rows, _uniform_source(seed), largest, options)
        tails, open_rows = [""] * rows, set(range(rows))
        overlap = max((len(text) for text in stop), default=1) - 1
        for start, ids_tr in _chunks(texts, length, largest):
            pieces = [""] * rows
            for row in sorted(open_rows):
                first = texts.prompt_steps[row] - start
                last = first + length if length else len(ids_tr) + 1
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

    def _decoded(self, pieces: Iterator[list[str]], rows: int) -> Iterator[list[str]]:
        """The text of bytes that come in pieces; what is left of a character at the end of a text comes last."""
        decoders = [self.vocabulary.text_decoder() for _ in range(rows)]
        for pieces_of_rows in pieces:
            yield [decode(piece, False) for decode, piece in zip(decoders, pieces_of_rows)]
        yield [decode("", True) for decode in decoders]

    def _prompt_ids(self, prompt: str, on_unknown: str) -> np.ndarray:
        ids = self.vocabulary.encode_prompt(prompt, on_unknown)
        if len(ids) == 0:
            ids = self.vocabulary.encode(self.vocabulary.beginning)
        return ids.astype(np.int32)


def _chunks(texts: _Texts, length: int, largest: int) -> Iterator[tuple[int, np.ndarray]]:
    """Launch chunk after chunk; each item is the number of a chunk's first step and its ids (T, R), read when the next
    chunk has been launched. Chunks in which every row still reads its prompt are launched, but are no items."""
    start, first_drawn, end = 0, texts.prompt_steps.min(), texts.prompt_steps.max() + length
    unread: list[Callable] = []
    while start < first_drawn:  # nothing is drawn, so ids are read only to stay no more than two chunks ahead
        T = min(largest, first_drawn - start)
        unread.append(texts.launch(T))
        if len(unread) > 2:
            unread.pop(0)()
        start += T
    size, before, launched = FIRST_CHUNK, time.perf_counter(), None
    while length == 0 or start < end:
        T = min(size, end - start) if length else size
        previous, launched = launched, (start, texts.launch(T))
        if previous:
            yield previous[0], previous[1]()
        start += T
        now = time.perf_counter()
        if now - before < PAUSE_SECONDS:
            size = min(2 * size, largest)
        before = now
    yield launched[0], launched[1]()


class _Texts:
    """Rows of text in the making: state, prompts, uniform numbers, and device arrays for chunks of up to `steps` steps.

    prompt_steps (R,): how many steps each row reads its prompt for: one for each character but the first, which the
    first step starts from.
    """

    def __init__(self, generator: Generator, state, ids_of_rows: Sequence[np.ndarray], rng: np.random.Generator,
                 steps: int, options: dict) -> None:
        self._generator, self._state, self._rng, self._options = generator, state, rng, options
        ops, sizes, rows = generator._ops, generator.sizes, len(ids_of_rows)
        self.prompt_steps = np.array([len(ids) - 1 for ids in ids_of_rows])
        longest = self.prompt_steps.max()
        self._prompts_tr = np.full((longest, rows), -1, np.int32)  # row 0 is for the next step
        for row, ids in enumerate(ids_of_rows):
            self._prompts_tr[:len(ids) - 1, row] = ids[1:]
        # At the start, row k of the uniform numbers is for drawn character k - longest of every text; the rows before
        # `longest` meet steps that read a prompt, and are never used. A launch of T steps drops the first T rows.
        self._numbers, self._delays = np.zeros((longest, rows), np.float32), longest - self.prompt_steps
        self._ids = ops.empty((rows,), np.int32)
        ops.copy_in(self._ids, np.array([ids[0] for ids in ids_of_rows]))
        self._forced_tr, self._ids_tr = (ops.empty((steps, rows), np.int32) for _ in range(2))
        self._uniforms_tr = ops.empty((steps, rows), np.float32)
        self._saved = ops.generation_saved(rows, sizes.H, sizes.V, generator._P.dtype)

    def launch(self, T: int) -> Callable[[], np.ndarray]:
        """Launch T steps; a call of the result waits for their ids (T, R)."""
        ops, generator, rows = self._generator._ops, self._generator, len(self._delays)
        forced_tr = np.full((T, rows), -1, np.int32)
        forced_tr[:len(self._prompts_tr)] = self._prompts_tr[:T]
        self._prompts_tr = self._prompts_tr[T:]
        missing = max(0, T + self._delays.max() - len(self._numbers))
        numbers = np.concatenate([self._numbers, self._rng.random((missing, rows), np.float32)])
        self._numbers = numbers[T:]
        ops.copy_in(self._forced_tr[:T], forced_tr)
        ops.copy_in(self._uniforms_tr[:T],
                    np.take_along_axis(numbers, np.arange(T)[:, None] + self._delays, axis=0))
        ops.generate(generator._params, generator._P, self._state, self._ids, self._forced_tr[:T],
                     self._uniforms_tr[:T], self._ids_tr[:T], self._saved, **self._options)
        return ops.read(self._ids_tr[:T])


def _listed(given: Strings) -> list[str | bytes]:
    """One text, or several, as a list."""
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else [given]


def new_seed() -> int:
    """A random seed, short enough to type again."""
    return secrets.randbits(32)


def _uniform_source(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def _end_of_first(stop: Sequence[str], text: str) -> int | None:
    """The offset at which the stop string that ends first in a text ends; None where the text contains none."""
    ends = [text.index(wanted) + len(wanted) for wanted in stop if wanted in text]
    return min(ends, default=None)
