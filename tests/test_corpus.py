"""Text from files, from the download and from Python's own documentation."""

import hashlib
import http.server
import os
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from char_gru.rnn import corpus
from char_gru.rnn.batches import ShuffledWindows
from char_gru.rnn.config import UserError
from char_gru.rnn.corpus import load_corpus
from char_gru.rnn.vocabulary import Vocabulary
from tests.helpers.commands import TINY, assert_refused, run

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"


def test_newlines_are_kept_as_they_are(tmp_path):
    raw = b"one\r\ntwo\nthree\rfour\n\n"
    (tmp_path / "lines.txt").write_bytes(raw)
    text = load_corpus((str(tmp_path / "lines.txt"),))
    assert text.text.encode() == raw
    assert text.name == "lines"
    assert text.sha256 == hashlib.sha256(raw).hexdigest()


def test_files_are_read_one_after_the_other(tmp_path):
    names = [str(tmp_path / name) for name in ("b.txt", "a.txt")]
    Path(names[0]).write_text("from b", "utf-8")
    Path(names[1]).write_text("; dann ä", "utf-8")
    text = load_corpus(tuple(names))
    assert text.text == "from b; dann ä"
    assert text.name == "b"
    assert text.source == tuple(names)


def test_encoding_names_what_the_bytes_mean(tmp_path):
    path = tmp_path / "old.txt"
    path.write_bytes("naïve\n".encode("latin-1"))
    assert load_corpus((str(path),), "latin-1").text == "naïve\n"


@pytest.mark.parametrize(("raw", "encoding", "parts"), [
    (b"abc\xff", "utf-8", ("is not utf-8", "0xff", "offset 3", "--encoding")),
    (b"\xe4bc", "utf-8", ("0xe4", "offset 0")),
    ("né".encode()[:-1], "utf-8", ("0xc3", "offset 1")),
    (b"a\0b", "utf-16-le", ("is not utf-16-le", "0x62", "offset 2")),
    (b"abc", "no-such", ("--encoding no-such is unknown", "utf-8")),
    (b"abc", "base64", ("--encoding base64 is unknown",)),
    (b"abc", "undefined", ("undefined",)),
    (b"+2AA-", "utf-7", ("is not utf-7", "surrogates")),
    (b"", "utf-8", ("is empty",)),
    (b"\xef\xbb\xbf", "utf-8-sig", ("is empty",)),
    (b"\xff\xfe", "utf-16", ("is empty",)),
])
def test_unusable_file_is_refused_with_its_name_and_the_reason(tmp_path, raw, encoding, parts):
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        load_corpus((str(path),), encoding)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert all(part in message for part in parts), message
    assert str(path) in message or "--encoding" in message


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file.*shakespeare or python-docs"):
        load_corpus((str(tmp_path / "missing.txt"),))
    with pytest.raises(UserError, match="Is a directory; --data takes files"):
        load_corpus((str(tmp_path),))


def test_python_docs_are_a_long_text_and_need_no_network():
    docs = load_corpus(("python-docs",))
    assert docs.name == "python-docs"
    assert len(docs.text) > 300_000
    assert docs == load_corpus(("python-docs",))


class Mirrors:
    """Web servers' files by path, on 127.0.0.1; `requested` lists the paths asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requested: list[str] = []

    @contextmanager
    def serving(self, monkeypatch, paths: tuple[str, ...]):
        """Serve, with `paths` as the download's mirrors."""
        mirrors = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirrors.requested.append(self.path)
                body = mirrors.files.get(self.path)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_) -> None:
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
            address = f"http://127.0.0.1:{server.server_port}"
            monkeypatch.setattr(corpus, "SHAKESPEARE_URLS", tuple(address + path for path in paths))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()


@pytest.fixture
def mirrors(tmp_path, monkeypatch):
    """Mirrors of PLAY in the place of Shakespeare, with an empty cache and no proxy."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    return Mirrors()


def test_shakespeare_is_fetched_once_and_then_read_from_the_cache(mirrors, monkeypatch):
    mirrors.files["/play"] = PLAY
    with mirrors.serving(monkeypatch, ("/play", "/other")):
        fetched = load_corpus(("shakespeare",))
    assert fetched.text.encode() == PLAY
    assert fetched.name == "shakespeare"
    assert mirrors.requested == ["/play"]
    assert load_corpus(("shakespeare",)) == load_corpus(()) == fetched


@pytest.mark.parametrize("first", [b"<html>Log in to this network</html>", PLAY[:-1], b"", None])
def test_second_mirror_serves_when_the_first_gives_something_else(mirrors, monkeypatch, first):
    mirrors.files["/right"] = PLAY
    if first is not None:
        mirrors.files["/wrong"] = first
    with mirrors.serving(monkeypatch, ("/wrong", "/right")):
        assert load_corpus(("shakespeare",)).text.encode() == PLAY
    assert mirrors.requested == ["/wrong", "/right"]


def test_damaged_copy_in_the_cache_is_fetched_again(mirrors, monkeypatch, tmp_path):
    mirrors.files["/play"] = PLAY
    with mirrors.serving(monkeypatch, ("/play",)):
        load_corpus(("shakespeare",))
        [cached] = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        cached.write_bytes(PLAY[:10])
        assert load_corpus(("shakespeare",)).text.encode() == PLAY
    assert mirrors.requested == ["/play", "/play"]


def test_failed_download_is_refused_when_asked_for_and_replaced_by_python_docs_otherwise(mirrors, monkeypatch, capsys):
    with mirrors.serving(monkeypatch, ("/a", "/b")):
        with pytest.raises(UserError, match="could not fetch Shakespeare.*--data FILE"):
            load_corpus(("shakespeare",))
        assert capsys.readouterr().err == ""
        text = load_corpus(())
    printed = capsys.readouterr()
    assert text == load_corpus(("python-docs",))
    assert printed.out == ""
    assert "could not fetch Shakespeare" in printed.err and "--data FILE" in printed.err
    assert "--data python-docs" in printed.err


def test_training_offline_without_a_text_learns_python_docs(tmp_path):
    result = run("train.py", *TINY, "--steps", "1", cwd=tmp_path, environ={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("could not fetch Shakespeare")
    assert (tmp_path / "runs" / "python-docs" / "last.safetensors").exists()


def test_training_offline_on_shakespeare_is_refused(tmp_path):
    result = run("train.py", *TINY, "--data", "shakespeare", cwd=tmp_path,
                 environ={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert_refused(result.returncode, result.stdout, result.stderr, "could not fetch Shakespeare", "--data FILE")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif("SHAKESPEARE_FILE" not in os.environ, reason="SHAKESPEARE_FILE names no copy of Tiny Shakespeare")
def test_tiny_shakespeare_has_the_tutorials_numbers():
    path = os.environ["SHAKESPEARE_FILE"]
    text = load_corpus((path,))
    known = Vocabulary.of(text.text)
    ids = known.encode(text.text)
    assert text.sha256 == corpus.SHAKESPEARE_SHA256
    assert (len(known), len(ids), ids.dtype) == (66, 1_115_394, "uint8")
    assert len(ids) // 101 == 11_043
    assert ShuffledWindows(ids, B=64, T=100, seed=0).batches_per_epoch == 172
