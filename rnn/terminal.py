"""What a terminal is shown: lines that end, and no control characters from paths, texts or checkpoints of strangers."""

from __future__ import annotations

import re
import shlex
import sys

LONGEST_LINE = 1000
"""Characters of an error line; of a longer one, the middle is left out."""

_GAP = " [...] "

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but tab and newline: they move the cursor, colour, retitle or reprogram a terminal."""


def one_line(message: str) -> str:
    """A message as one line of at most LONGEST_LINE characters: what is not printable stands as Python writes it
    (`\\x1b`)."""
    if not message.isprintable():
        message = "".join(char if char.isprintable() else _escaped(char) for char in message)
    if len(message) > LONGEST_LINE:
        kept = (LONGEST_LINE - len(_GAP)) // 2
        message = message[:kept] + _GAP + message[-kept:]
    return message


def complain(prog: str, message: object) -> None:
    """Write an error line of a program to stderr."""
    print(f"{prog}: {one_line(str(message))}", file=sys.stderr)


def quoted(path: object) -> str:
    """A path as a part of a command that a user may copy to a shell."""
    return shlex.quote(str(path))


def displayed(text: str) -> str:
    """A text of a model as stdout takes it: unchanged, or for a terminal with control characters but tab and newline
    as Python writes them. A checkpoint of a stranger may have learnt any character."""
    return _CONTROL.sub(lambda match: _escaped(match[0]), text) if sys.stdout.isatty() else text


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
