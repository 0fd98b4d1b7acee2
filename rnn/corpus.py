"""Where text comes from: files, a download of Shakespeare, and Python's own documentation, for work offline."""

from __future__ import annotations

import hashlib
import logging
import sys
from pathlib import Path
from typing import NamedTuple

from char_gru.rnn.config import UserError

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
DOWNLOAD_TIMEOUT = 10
"""Seconds to wait for a server."""


class Corpus(NamedTuple):
    """A text and where it came from.

    name: a word for the text, good as a folder's name; source: the value of `--data` that gives this text; sha256: of
    the text in UTF-8.
    """

    text: str
    name: str
    source: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def load_corpus(data: tuple[str, ...], encoding: str = "utf-8") -> Corpus:
    """The text that `--data` names; without a name, Shakespeare or, where its download fails, Python's documentation.

    Raises: UserError for a file that cannot be read or is empty, an unknown encoding, and a failed download if `data`
    names shakespeare.
    """
    if data == ():
        try:
            return load_corpus(("shakespeare",))
        except UserError as error:
            print(f"{error}\ntraining on Python's own documentation instead (--data python-docs)", file=sys.stderr)
            return load_corpus(("python-docs",))
    if data == ("shakespeare",):
        return Corpus(_shakespeare().decode("utf-8"), "shakespeare", data)
    if data == ("python-docs",):
        return Corpus(_python_docs(), "python-docs", data)
    text = "".join(_read(Path(name), encoding) for name in data)
    return Corpus(text, Path(data[0]).stem or "text", data)


def _read(path: Path, encoding: str) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; "
                        "--data takes files, shakespeare or python-docs") from None
    try:
        text = raw.decode(encoding)
        text.encode()  # a few encodings give lone surrogates, which UTF-8 cannot encode
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not {encoding}: byte {raw[error.start]:#04x} at offset {error.start}; "
                        "convert it, or name its encoding with --encoding") from None
    except UnicodeError as error:
        raise UserError(f"{path} is not {encoding} ({error}); name its encoding with --encoding") from None
    except LookupError:
        raise UserError(f"--encoding {encoding} is unknown; utf-8, latin-1 and cp1252 are common ones") from None
    if not text:
        raise UserError(f"{path} is empty; give a file with text")
    return text


def _shakespeare() -> bytes:
    import pooch

    pooch.get_logger().setLevel(logging.ERROR)
    failures = []
    for url in SHAKESPEARE_URLS:
        try:
            path = pooch.retrieve(url, f"sha256:{SHAKESPEARE_SHA256}", "tinyshakespeare.txt",
                                  pooch.os_cache("char-gru"),
                                  downloader=pooch.HTTPDownloader(timeout=DOWNLOAD_TIMEOUT))
            return Path(path).read_bytes()
        except (OSError, ValueError) as error:
            failures.append(type(error).__name__)
    raise UserError(f"could not fetch Shakespeare ({', '.join(failures)}); "
                    "name a file of your own with --data FILE, or connect to the internet")


def _python_docs() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
