"""Characters and their ids: id 0 is `[UNK]`, ids 1.. are the sorted distinct characters of the training text. Where a
model that knows some characters learns another text, new ones follow, sorted among themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from char_gru.rnn.config import UserError

UNK = "[UNK]"
MOST_SHOWN = 20
"""Characters that a message shows at most."""
_CODE_POINTS = 0x110000
_CHUNK = 1 << 22
"""Characters converted at a time, so that a text of any length needs little memory beside its ids."""


class Vocabulary:
    """The characters that a model knows.

    characters: the known characters in the order of their ids, which start at 1; `[UNK]` is not among them.
    """

    def __init__(self, characters: str) -> None:
        codes = _code_points(characters)
        if len(codes) == 0 or len(np.unique(codes)) < len(codes):
            raise ValueError("characters must be at least one, and distinct")
        self.characters = characters
        self._codes = np.concatenate([[0xFFFD], codes]).astype("<u4")
        self._ids = np.zeros(_CODE_POINTS, self.dtype)
        self._ids[codes] = np.arange(1, len(self), dtype=self.dtype)

    @staticmethod
    def of(text: str, known: str = "") -> Vocabulary:
        """The vocabulary of a text that is not empty; known: characters that keep the first ids, in this order."""
        seen = np.zeros(_CODE_POINTS, bool)
        for start in range(0, len(text), _CHUNK):
            seen[_code_points(text[start:start + _CHUNK])] = True
        seen[_code_points(known)] = False
        return Vocabulary(known + _text(np.flatnonzero(seen).astype("<u4")))

    def __len__(self) -> int:
        """V, `[UNK]` included."""
        return len(self.characters) + 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.characters == other.characters

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id."""
        return np.min_scalar_type(len(self) - 1)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, 0 where a character is unknown.

        Shapes: result (len(text),), `dtype`.
        """
        ids = np.empty(len(text), self.dtype)
        for start in range(0, len(text), _CHUNK):
            self._ids.take(_code_points(text[start:start + _CHUNK]), out=ids[start:start + _CHUNK], mode="clip")
        return ids

    def encode_prompt(self, text: str, on_unknown: str = "error") -> np.ndarray:
        """Ids (N,) of a text to read. on_unknown: whether unknown characters are refused (`error`), left out (`skip`),
        or read as `[UNK]` (`unk`).

        Raises: UserError that shows the unknown characters, if they are refused.
        """
        ids = self.encode(text)
        if on_unknown == "error" and (ids == 0).any():
            unknown = sorted({character for character, known in zip(text, ids) if known == 0})
            raise UserError(f"the text has characters that the model has not learnt: {shown(unknown)}; "
                            "leave them out, or give --on-unknown skip or unk")
        return ids[ids != 0] if on_unknown == "skip" else ids

    def line_ends(self, text: str) -> str:
        """A text with each line end (`\\r\\n`, `\\r`) as `\\n`, unless the model has learnt `\\r`."""
        if "\r" not in text or "\r" in self.characters:
            return text
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids; `[UNK]` becomes U+FFFD, the replacement character.

        Shapes: ids (N,), any integer dtype, values in [0, V).
        """
        return _text(self._codes[np.asarray(ids, np.intp)])


def shown(characters: Sequence[str]) -> str:
    """The first characters of several in quotes, with escapes for those that cannot be printed."""
    quoted = (repr(character) if character.isprintable() else ascii(character) for character in characters[:MOST_SHOWN])
    more = len(characters) - MOST_SHOWN
    return " ".join(quoted) + (f" and {more:,} more" if more > 0 else "")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _text(codes: np.ndarray) -> str:
    return codes.tobytes().decode("utf-32-le", "surrogatepass")
