"""Texts of files and streams: what may be read, in which encoding, and with which line ends; or their bytes as they
are.

A text is read in chunks, so that what is no text (a device, a checkpoint, a PDF, two gigabytes of zeros) is refused
before it is read whole, and what has no end is read up to a limit.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import os
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from char_gru.rnn.config import UserError

STDIN = "-"
"""The name of a text that stands for standard input."""

UNSIZED_LIMIT = 4 << 30
"""The most bytes read from a stream, or unpacked from a .gz: both may have no end."""

PROMPT_LIMIT = 16 << 20
"""The most bytes of a prompt."""

CHUNK = 1 << 20
"""Bytes read at a time."""

_BOMS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))
"""Byte order marks and encodings; UTF-32's come first, since UTF-16's begins one of them."""

_DOCUMENTS = ((b"%PDF-", "a PDF document"), (b"{\\rtf", "an RTF document"),
              (b"PK\x03\x04", "a zip archive, as .docx, .odt and .epub are"))
"""How files begin that people take for texts."""


def open_file(path: Path, streams: bool = False) -> BinaryIO:
    """Open a regular file or, where `streams` may be read as well, a named pipe.

    Raises: UserError for a path that cannot be opened, and for a device or socket, which may have no end.
    """
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or streams and stat.S_ISFIFO(mode)):
            raise UserError(f"{path} is no file, but a device, a socket or a pipe; name a file")
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_text(name: str | Path, limit: int | None = None) -> str:
    """The text of a file, or of standard input if `name` is "-", in UTF-8 or what its byte order mark says, without
    this mark, and with its own line ends.

    limit: the most bytes.

    Raises: UserError as `text_pieces`.
    """
    return "".join(text_pieces(name, newline="keep", limit=limit))


def read(name: str | Path, as_bytes: bool, limit: int | None = None) -> str | bytes:
    """What a model reads of a file, or of standard input if `name` is "-": its text, as `read_text` gives it, or its
    bytes, as `byte_pieces` gives them.

    Raises: UserError as these.
    """
    return b"".join(byte_pieces(name, limit)) if as_bytes else read_text(name, limit)


def text_pieces(name: str | Path, encoding: str = "utf-8", newline: str = "unix", limit: int | None = None,
                advice: str = "convert it to UTF-8") -> Iterator[str]:
    """The text of a file, or of standard input if `name` is "-", piece by piece, without a byte order mark.

    What begins as gzip does is unpacked. encoding: `utf-8` also reads UTF-16 and UTF-32 that begin with their byte
    order mark. newline: `unix` makes each line end (`\\r\\n`, `\\r`) a `\\n`, `keep` leaves all as they are. limit: the
    most bytes, as in `byte_pieces`. advice: what to do about bytes that are not of the encoding.

    Raises: UserError as `byte_pieces`, and for what is no text, or not of the encoding.
    """
    yield from _decoded(byte_pieces(name, limit), "stdin" if str(name) == STDIN else name, encoding, newline, advice)


def byte_pieces(name: str | Path, limit: int | None = None) -> Iterator[bytes]:
    """The bytes of a file, or of standard input if `name` is "-", piece by piece; what begins as gzip does is unpacked.

    limit: the most bytes, UNSIZED_LIMIT if it is None for a stream and for what was packed.

    Raises: UserError for what cannot be read, or is longer than its limit.
    """
    if str(name) == STDIN:
        if sys.stdin is None:
            raise UserError("stdin is closed; give the text itself, or name a file")
        if sys.stdin.isatty():
            print("reading stdin; Ctrl-D on a line of its own ends it", file=sys.stderr)
        yield from _chunks(sys.stdin.buffer, "stdin", limit)
        return
    with open_file(Path(name), streams=True) as file:
        yield from _chunks(file, name, limit)


def _chunks(file: io.BufferedReader, name: str | Path, limit: int | None) -> Iterator[bytes]:
    """The bytes of an open file, unpacked, the first four of them in one chunk."""
    packed = file.peek(2).startswith(b"\x1f\x8b")
    if limit is None and (packed or not stat.S_ISREG(os.fstat(file.fileno()).st_mode)):
        limit = UNSIZED_LIMIT
    total, source, chunk = 0, gzip.GzipFile(fileobj=file) if packed else file, bytes(CHUNK)
    try:
        while len(chunk) == CHUNK:  # a shorter one is the last: behind it, a terminal would wait for another Ctrl-D
            chunk = source.read(CHUNK)
            total += len(chunk)
            if limit is not None and total > limit:
                raise UserError(f"{name} has more than {limit >> 20:,} MiB; give less text"
                                + (", or save it in a file and name that" if limit == UNSIZED_LIMIT else ""))
            yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{name} begins as gzip does, but is damaged or cut short; pack it again") from None
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None


def _decoded(chunks: Iterable[bytes], name: str | Path, encoding: str, newline: str, advice: str) -> Iterator[str]:
    decoder, lines = None, io.IncrementalNewlineDecoder(None, translate=newline == "unix")
    read = characters = 0
    for chunk in itertools.chain(chunks, [b""]):
        if decoder is None:
            _refuse_documents(chunk, name)
            encoding = _encoding(chunk, encoding)
            decoder = codecs.getincrementaldecoder(encoding)()
        begun = len(decoder.getstate()[0])  # bytes of a character that the chunk before began
        try:
            text = decoder.decode(chunk, final=not chunk)
            if encoding != "utf-8":
                text.encode()  # a few encodings give lone surrogates, which UTF-8 cannot encode
        except UnicodeDecodeError as error:
            byte, offset = error.object[error.start], read - begun + error.start
            kind = "binary, or not" if encoding == "utf-8" and b"\0" in chunk else "not"
            raise UserError(f"{name} is {kind} {encoding}: byte {byte:#04x} at offset {offset}; {advice}") from None
        except UnicodeError as error:
            raise UserError(f"{name} is not {encoding} ({error}); {advice}") from None
        if "\0" in text:
            number = characters + text.index("\0")
            raise UserError(f"{name} is binary, or not {encoding}: its character {number:,} is NUL; {advice}")
        if characters == 0:
            text = text.removeprefix("\ufeff")
        read, characters = read + len(chunk), characters + len(text)
        yield lines.decode(text, final=not chunk)


def _refuse_documents(chunk: bytes, name: str | Path) -> None:
    for beginning, kind in _DOCUMENTS:
        if chunk.startswith(beginning):
            raise UserError(f"{name} is {kind}, not plain text; save it as text")


def _encoding(chunk: bytes, encoding: str) -> str:
    """The encoding of a text with this first chunk: the one asked for, or what a byte order mark says for UTF-8."""
    try:
        io.TextIOWrapper(io.BytesIO(), encoding)
    except LookupError:
        raise UserError(f"--encoding {encoding} is unknown; utf-8, latin-1 and cp1252 are common ones") from None
    if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig"):
        return encoding
    return next((by_mark for mark, by_mark in _BOMS if chunk.startswith(mark)), "utf-8")
