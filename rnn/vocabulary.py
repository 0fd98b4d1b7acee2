"""Characters and their ids: id 0 is `[UNK]`, ids 1.. are the sorted distinct characters of the training text. Where a
model that knows some characters learns another text, new ones follow, sorted among themselves.

A model of bytes has 256 characters at most: U+0000 to U+00FF, each standing for the byte of that value. So ids, batches
and drawing are those of any model, and text is made of bytes, and bytes of text, at the border only, by `as_characters`
and `text_decoder`.
"""

from __future__ import annotations

import codecs
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from char_gru.rnn.config import UserError, described

UNK = "[UNK]"
MOST_SHOWN = 20
"""Characters that a message shows at most."""
_CODE_POINTS = 0x110000
_CHUNK = 1 << 22
"""Characters converted at a time, so that a text of any length needs little memory beside its ids."""

LINE_ENDS, SEPARATORS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", ";|\t,"
"""Characters after which a text begins anew, in the order in which they are looked for."""

BYTES = "latin-1"
"""The encoding by which byte values are the characters U+0000 to U+00FF."""

_LETTERS = dict.fromkeys(range(0x80, 0x100), "x")
"""Bytes beyond ASCII are parts of letters in UTF-8 and most other encodings, whatever characters stand for them."""

RARE = 10_000
"""Once in so many characters, a separator is too rare for a model to learn from it how a text begins."""


class Vocabulary:
    """The characters that a model knows.

    characters: the known characters in the order of their ids, which start at 1; `[UNK]` is not among them.
    beginning: the character after which a text without a prompt begins; one that is unknown is replaced by the first
    known of line ends, `SEPARATORS`, the space, other characters that are no letter or digit, and all others. of_bytes:
    whether the characters stand for bytes.
    Raises: ValueError for what are no such characters; UserError, in all methods, for texts that are no strings.
    """

    def __init__(self, characters: str, beginning: str = "\n", of_bytes: bool = False) -> None:
        codes = code_points(_string("characters", characters))
        if len(codes) == 0 or len(np.unique(codes)) < len(codes):
            raise ValueError("characters must be at least one, and distinct")
        if of_bytes and codes.max() > 0xFF:
            raise ValueError("characters that stand for bytes must be U+0000 to U+00FF")
        if not isinstance(beginning, str) or len(beginning) != 1:
            raise ValueError(f"beginning must be one character, not {beginning!r:.20}")
        self.characters, self.of_bytes = characters, of_bytes
        usual = (character for character in beginning + LINE_ENDS + SEPARATORS + " " if character in characters)
        others = (character for character in characters if not _is_of_words(character))
        self.beginning = next(itertools.chain(usual, others), characters[0])
        self._codes = np.concatenate([[0xFFFD], codes]).astype("<u4")
        self._ids = np.zeros(_CODE_POINTS, self.dtype)
        self._ids[codes] = np.arange(1, len(self), dtype=self.dtype)

    @staticmethod
    def of(text: str, known: str = "", of_bytes: bool = False) -> Vocabulary:
        """The vocabulary of a text that is not empty, with the beginning that `beginning_of` gives; known: characters
        that keep the first ids, in this order; of_bytes: whether the text's characters stand for bytes.

        Raises: ValueError for an empty text.
        """
        if _string("text", text) == "":
            raise ValueError("text: expected at least one character, got none")
        seen = np.zeros(_CODE_POINTS, bool)
        for start in range(0, len(text), _CHUNK):
            seen[code_points(text[start:start + _CHUNK])] = True
        seen[code_points(known)] = False
        beginning = beginning_of(text[:_CHUNK].translate(_LETTERS) if of_bytes else text)
        return Vocabulary(known + _text(np.flatnonzero(seen).astype("<u4")), beginning, of_bytes)

    def __len__(self) -> int:
        """V, `[UNK]` included."""
        return len(self.characters) + 1

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, Vocabulary) and self.characters == other.characters
                and self.of_bytes == other.of_bytes)

    @property
    def unit(self) -> str:
        """What an id stands for, in a word."""
        return "byte" if self.of_bytes else "character"

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id."""
        return np.min_scalar_type(len(self) - 1)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, 0 where a character is unknown.

        Shapes: result (len(text),), `dtype`.
        """
        ids = np.empty(len(_string("text", text)), self.dtype)
        for start in range(0, len(text), _CHUNK):
            self._ids.take(code_points(text[start:start + _CHUNK]), out=ids[start:start + _CHUNK], mode="clip")
        return ids

    def encode_prompt(self, text: str, on_unknown: str = "error") -> np.ndarray:
        """Ids (N,) of a text to read. on_unknown: whether unknown characters are refused (`error`), left out (`skip`),
        or read as `[UNK]` (`unk`).

        Raises: UserError that shows the unknown characters, if they are refused, and for another on_unknown.
        """
        if on_unknown not in ("error", "skip", "unk"):
            raise UserError(f"--on-unknown is {on_unknown!r:.50}, but must be error, skip or unk")
        ids = self.encode(text)
        if on_unknown == "error" and (ids == 0).any():
            unknown = sorted({character for character, known in zip(text, ids) if known == 0})
            raise UserError(f"the text has {self.unit}s that the model has not learnt: {self.shown(unknown)}; "
                            "leave them out, or give --on-unknown skip or unk")
        return ids[ids != 0] if on_unknown == "skip" else ids

    def as_characters(self, text: str | bytes, name: str = "text") -> str:
        """A text in characters of the vocabulary: of a model of bytes, one for each byte of its UTF-8, or of bytes that
        are given themselves. What a command line had of bytes that are no UTF-8, in lone surrogates, becomes these
        bytes again.

        Raises: UserError that names the argument, for bytes where the model has characters, and for other surrogates.
        """
        if not self.of_bytes:
            return _string(name, text)
        if isinstance(text, bytes | bytearray):
            return text.decode(BYTES)
        try:
            return _string(name, text).encode("utf-8", "surrogateescape").decode(BYTES)
        except UnicodeEncodeError as error:
            raise UserError(f"{name}: has no UTF-8 ({error.object[error.start]!a})") from None

    def text_decoder(self) -> Callable[[str, bool], str]:
        """A function of a piece of a text in characters of the vocabulary, and of whether it is the last one, that
        gives the text of the pieces. Of a model of bytes, this is their UTF-8: a character that is cut in two is given
        with its last byte, and U+FFFD stands for bytes that are no UTF-8."""
        if not self.of_bytes:
            return lambda piece, last: piece
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda piece, last: decoder.decode(self.as_bytes(piece), last)

    def as_bytes(self, characters: str) -> bytes:
        """The bytes that characters of the vocabulary stand for."""
        return characters.encode(BYTES)

    def as_text(self, characters: str) -> str:
        """A whole text, from its characters of the vocabulary."""
        return self.text_decoder()(characters, True)

    def as_learnt(self, text: str | bytes, name: str = "text") -> str:
        """A text in characters of the vocabulary: of bytes, all of them; else without a byte order mark, and with each
        line end (`\\r\\n`, `\\r`) as `\\n`, unless the model has learnt the mark or `\\r`.

        Raises: UserError as `as_characters`.
        """
        text = self.as_characters(text, name)
        if self.of_bytes:
            return text
        if "\ufeff" not in self.characters:
            text = text.removeprefix("\ufeff")
        if "\r" not in text or "\r" in self.characters:
            return text
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids; `[UNK]` becomes U+FFFD, the replacement character.

        Shapes: ids (N,), any integer dtype, values in [0, V).
        Raises: ValueError for other ids.
        """
        return _text(self._codes[checked_ids("ids", ids, len(self)).astype(np.intp, copy=False)])

    def shown(self, characters: Sequence[str]) -> str:
        """The first characters of several in quotes, with escapes for those that cannot be printed; bytes as
        b'\\xff'."""
        quoted = (f"b{character!a}" if self.of_bytes else
                  repr(character) if character.isprintable() else ascii(character)
                  for character in characters[:MOST_SHOWN])
        more = len(characters) - MOST_SHOWN
        return " ".join(quoted) + (f" and {more:,} more" if more > 0 else "")


def checked_ids(name: str, ids, V: int) -> np.ndarray:
    """Ids as a NumPy array, checked before they select rows of a table.

    Raises: ValueError that names the argument, if they are no integers in [0, V).
    """
    ids = np.asarray(ids)
    if ids.size and ids.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers, got {ids.dtype}")
    if ids.size and (ids.max() >= V or ids.dtype.kind == "i" and ids.min() < 0):
        raise ValueError(f"{name}: expected ids in [0, {V}), got some from {ids.min()} to {ids.max()}")
    return ids


def beginning_of(text: str) -> str:
    """A character after which a text that is not empty often begins anew, judged by its first 4 million characters.

    It is a line's end, where the text has one inside, not too rarely, and no line has more separators than there are
    line ends, as the one after a heading has (` ; ` separates, too); else the first of `SEPARATORS` that stands there
    not too rarely and mostly not before a space (after which a sentence would go on); else the space. Where there is
    none of these, it is the most frequent character that is no letter or digit, and in a text of letters the most
    frequent one. Of a separator of several characters that stand only together (`=>`), it is the last.
    """
    text = text[:_CHUNK]
    inside = text[:-1]  # nothing follows the last character
    needed = max(1, len(text) // RARE)
    found = [character for character in SEPARATORS if inside.count(character) >= needed]
    separators = [character for character in found if 2 * text.count(character + " ") < inside.count(character)]
    between = [character for character in found if 2 * text.count(f" {character} ") >= inside.count(character)]
    for character in LINE_ENDS:
        count = inside.count(character)
        if count >= needed and not any(line.count(separator) > count
                                       for separator in separators + between for line in inside.split(character)):
            return character
    if separators:
        return _last_of_separator(separators[0], text)
    if inside.count(" ") >= needed:
        return " "
    codes, counts = np.unique(code_points(inside or text), return_counts=True)
    frequent = _text(codes[np.argsort(-counts, kind="stable")])
    return next((_last_of_separator(character, text) for character in frequent if not _is_of_words(character)),
                frequent[0])


def _last_of_separator(character: str, text: str) -> str:
    """The last of the characters, none of them of words, that follow one another wherever this one stands, and stand
    nowhere else: both at least nine times out of ten."""
    passed = ""
    while character not in passed:
        passed += character
        after = Counter(re.findall(f"(?s){re.escape(character)}(?=(.))", text))
        following, count = max(after.items(), key=lambda pair: pair[1], default=("", 0))
        if count and not _is_of_words(following) and 10 * count >= 9 * max(map(text.count, (character, following))):
            character = following
    return character


def _is_of_words(character: str) -> bool:
    """Whether it is a letter, a mark on one, or a digit."""
    return unicodedata.category(character)[0] in "LMN"


def _string(name: str, text: object) -> str:
    """The text. Raises: UserError that names the argument, if it is no string."""
    if not isinstance(text, str):
        raise UserError(f"{name}: expected a string, got {described(text)}")
    return text


def code_points(text: str) -> np.ndarray:
    """Unicode code points (N,) of a text, lone surrogates among them."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _text(codes: np.ndarray) -> str:
    return codes.tobytes().decode("utf-32-le", "surrogatepass")
