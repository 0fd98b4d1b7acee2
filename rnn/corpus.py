"""Where text comes from: files, folders and streams, a download of Shakespeare, and Python's own documentation, for
work offline."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from char_gru.rnn.config import UserError
from char_gru.rnn.folder import is_of_run, is_run
from char_gru.rnn.terminal import one_line
from char_gru.rnn.texts import STDIN, byte_pieces, text_pieces
from char_gru.rnn.vocabulary import BYTES

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
DOWNLOAD_TIMEOUT, DOWNLOAD_SECONDS = 10, 60
"""Seconds to wait for a server's next bytes, and for all that it sends."""

_ADVICE = "convert it, name its encoding with --encoding, or train a model of bytes with --bytes"


class Corpus(NamedTuple):
    """A text and where it came from.

    text: its characters or, for a model of bytes, the characters that stand for its bytes in `rnn.vocabulary`; sha256:
    of the text in UTF-8, or of its bytes; name: a word for the text, good as a folder's name; source: the value of
    `--data` that gives this text; files: the files that it is made of, in their order.
    """

    text: str
    sha256: str
    name: str
    source: tuple[str, ...]
    files: tuple[str, ...] = ()

    @staticmethod
    def of(raw: bytes | bytearray, name: str, source: tuple[str, ...], files: Sequence[str] = (),
           as_bytes: bool = False) -> Corpus:
        """The corpus of a text in UTF-8 or, with as_bytes, of any bytes."""
        text = raw.decode(BYTES if as_bytes else "utf-8")
        return Corpus(text, hashlib.sha256(raw).hexdigest(), name, source, tuple(files))


def load_corpus(data: Sequence[str | Path] | str | Path, encoding: str = "utf-8", newline: str = "unix",
                separator: str = "", as_bytes: bool = False) -> Corpus:
    """The text that `--data` names; without a name, Shakespeare or, where its download fails, Python's documentation.

    data: shakespeare, python-docs, or any of: files, folders (all files below them that are not hidden), patterns
    such as `texts/*.txt`, "-" for standard input. Each match of a pattern counts as if it were named itself, in the
    order of the paths. Files of a folder are read in the order of their paths, and empty ones among them left out; an
    empty file that is named is refused. Runs and checkpoints in folders and among matches are left out. encoding,
    newline: as `rnn.texts.text_pieces` has them. separator: a text between two files. as_bytes: files of any kind are
    read as the bytes that they are, for a model of bytes; encoding and newline then say nothing.

    Raises: UserError for a file that cannot be read, is empty or no text, an unknown encoding, and a failed download
    if `data` names shakespeare; also for data that are no strings or paths.
    """
    data = tuple(data) if isinstance(data, list | tuple) else (data,)
    for name in data:
        if not isinstance(name, str | Path):
            raise UserError(f"data: expected strings or paths, got {name!r:.50}")
    data = tuple(map(str, data))
    if data == ():
        try:
            return load_corpus(("shakespeare",), as_bytes=as_bytes)
        except UserError as error:
            print(f"{one_line(str(error))}\ntraining on Python's own documentation instead (--data python-docs)",
                  file=sys.stderr)
            return load_corpus(("python-docs",), as_bytes=as_bytes)
    if data == ("shakespeare",):
        return Corpus.of(_shakespeare(), "shakespeare", data, as_bytes=as_bytes)
    if data == ("python-docs",):
        return Corpus.of(_python_docs().encode(), "python-docs", data, as_bytes=as_bytes)
    for name in data:
        if name in ("shakespeare", "python-docs") and not Path(name).exists():
            raise UserError(f"--data {name} stands alone; name no other text with it, or name files only")
    if data.count(STDIN) > 1:
        raise UserError("--data names standard input (-) twice, but it can be read only once")
    raw, files = bytearray(), []  # UTF-8 of all texts takes less memory than their pieces, joined
    for name in data:
        for file, is_named in _files(name).items():
            before = len(raw)
            raw += separator.encode() if files else b""
            start = len(raw)
            for piece in byte_pieces(file) if as_bytes else _utf8_pieces(file, encoding, newline):
                raw += piece
            if len(raw) > start:
                files.append("stdin" if file == STDIN else file)
            elif is_named:
                raise UserError(f"{'stdin' if file == STDIN else file} is empty; give a file with text")
            else:
                del raw[before:]
    if not files:
        raise UserError(f"{' '.join(data)}: no file with text is there; name files that hold text")
    return Corpus.of(raw, _name(data[0], files[0]), data, files, as_bytes)


def _utf8_pieces(file: str, encoding: str, newline: str) -> Iterator[bytes]:
    for piece in text_pieces(file, encoding, newline, advice=_ADVICE):
        yield piece.encode()


def _files(name: str) -> dict[str, bool]:
    """The files that one value of `--data` stands for, and of each whether it is named itself, or by a pattern; the
    others lie below a folder. What a folder or a pattern stands for is no file of a run."""
    if Path(name).is_dir():
        return _below(Path(name))
    if name == STDIN or Path(name).exists():
        return {name: True}
    if not glob.has_magic(name):
        raise UserError(f"cannot read {name}: No such file or directory; --data takes files, folders, patterns in "
                        "quotes, - for standard input, or either of shakespeare and python-docs alone")
    files: dict[str, bool] = {}
    for match in map(Path, glob.glob(name, recursive=True)):
        if match.is_dir() and not is_run(match):
            files |= _below(match)
        elif not match.is_dir() and not is_of_run(match):
            files.setdefault(str(match), True)
    return dict(sorted(files.items(), key=lambda item: Path(item[0])))


def _below(path: Path) -> dict[str, bool]:
    below = []
    for folder, folders, files in os.walk(path):
        folders[:] = [inner for inner in folders if not is_run(Path(folder, inner))]
        below += [Path(folder, file) for file in files]
    shown = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return {str(file): False for file in sorted(shown) if file.is_file() and not is_of_run(file)}


def _name(first: str, file: str) -> str:
    """A name for the text whose first value of `--data` and first file are these."""
    if first == STDIN:
        return "stdin"
    path = Path(first).resolve() if Path(first).is_dir() else Path(file.removesuffix(".gz"))
    return path.stem or "text"


def _shakespeare() -> bytes:
    """Shakespeare from the cache, into which it is fetched once. A file there that is not whole, as a killed program
    leaves it, does not pass for Shakespeare, and is fetched and written anew."""
    import platformdirs

    cached = Path(platformdirs.user_cache_dir("char-gru"), "tinyshakespeare.txt")
    with contextlib.suppress(OSError):
        text = cached.read_bytes()
        if hashlib.sha256(text).hexdigest() == SHAKESPEARE_SHA256:
            return text
    failures = []
    for url in SHAKESPEARE_URLS:
        try:
            text = _fetched(url)
        except (OSError, ValueError) as error:
            failures.append(type(error).__name__)
            continue
        if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
            failures.append("another text")
            continue
        with contextlib.suppress(OSError):  # without a cache, it is fetched again
            cached.parent.mkdir(parents=True, exist_ok=True)
            cached.write_bytes(text)
        return text
    raise UserError(f"could not fetch Shakespeare ({', '.join(failures)}); "
                    "name a file of your own with --data FILE, or connect to the internet")


def _fetched(url: str) -> bytes:
    """What a server sends, at most SHAKESPEARE_BYTES. A thread of its own waits for the server, which is given up after
    DOWNLOAD_SECONDS, however slowly its bytes come. On a terminal, a bar shows how far it is.

    Raises: OSError, ValueError.
    """
    from tqdm import tqdm

    body, failures, given_up = bytearray(), [], threading.Event()
    thread = threading.Thread(target=_fetch, args=(url, body, failures, given_up), daemon=True)
    thread.start()
    end = time.monotonic() + DOWNLOAD_SECONDS
    with tqdm(total=SHAKESPEARE_BYTES, desc="fetching Shakespeare", unit="B", unit_scale=True, disable=None,
              leave=False) as bar:
        while thread.is_alive() and time.monotonic() < end:
            thread.join(0.1)
            bar.update(len(body) - bar.n)
    if thread.is_alive():
        given_up.set()
        raise TimeoutError
    if failures:
        raise failures[0]
    return bytes(body)


def _fetch(url: str, body: bytearray, failures: list[Exception], given_up: threading.Event) -> None:
    """Append to `body` what a server sends, until it is given up; append what fails to `failures`."""
    import requests

    try:
        with requests.Session() as session:
            kept = url.partition("//")[0] + "//"  # a redirect from https:// to anything else finds no adapter
            session.adapters = {kept: session.adapters[kept]}
            with session.get(url, stream=True, timeout=DOWNLOAD_TIMEOUT) as response:
                response.raise_for_status()
                for piece in response.iter_content(256):
                    body += piece
                    if len(body) > SHAKESPEARE_BYTES:
                        raise ValueError("longer than Shakespeare")
                    if given_up.is_set():
                        return
    except Exception as error:  # noqa: BLE001 (it is raised in the thread that waits)
        failures.append(error)


def _python_docs() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
