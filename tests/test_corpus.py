"""Text from files, from the download and from Python's own documentation."""

import codecs
import contextlib
import gzip
import hashlib
import http.server
import io
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from char_gru.rnn import corpus, texts
from char_gru.rnn.batches import ShuffledWindows
from char_gru.rnn.config import UserError
from char_gru.rnn.corpus import load_corpus
from char_gru.rnn.vocabulary import Vocabulary
from tests.helpers.commands import ROOT, TINY, assert_refused, run, running, wait_until

NO_PROXY = {name: "" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"


@pytest.mark.parametrize("chunk", [1 << 20, 1, 2, 3])
def test_line_ends_become_newlines_unless_they_are_kept(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(texts, "CHUNK", chunk)
    raw = "one\r\ntwo é🦊\nthree\rfour\r\r\n\n\r".encode()
    (tmp_path / "lines.txt").write_bytes(raw)
    kept = load_corpus((str(tmp_path / "lines.txt"),), newline="keep")
    assert kept.text.encode() == raw
    assert kept.name == "lines"
    assert kept.sha256 == hashlib.sha256(raw).hexdigest()
    text = load_corpus((str(tmp_path / "lines.txt"),)).text
    assert text == "one\ntwo é🦊\nthree\nfour\n\n\n\n"


@pytest.mark.parametrize("newline", ["unix", "keep"])
def test_byte_order_mark_of_every_file_is_dropped(tmp_path, newline):
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for name in names:
        Path(name).write_bytes(b"\xef\xbb\xbfone \xef\xbb\xbf")
    assert load_corpus(tuple(names), newline=newline).text == "one \ufeffone \ufeff"
    assert load_corpus((names[0],), "utf-8-sig").text == "one \ufeff"


@pytest.mark.parametrize(("written", "encoding"), [
    ("utf-16", "utf-8"), ("utf-32", "utf-8"), ("utf-16", "UTF8"), ("utf-16", "utf-16"), ("utf-16", "utf-16-le")])
def test_utf_16_is_known_by_its_byte_order_mark(tmp_path, written, encoding):
    (tmp_path / "notepad.txt").write_bytes("naïve 🦊\r\n".encode(written))
    assert load_corpus((str(tmp_path / "notepad.txt"),), encoding).text == "naïve 🦊\n"


def test_big_endian_utf_16_is_known_by_its_byte_order_mark(tmp_path):
    (tmp_path / "text.txt").write_bytes(codecs.BOM_UTF16_BE + "naïve".encode("utf-16-be"))
    assert load_corpus((str(tmp_path / "text.txt"),)).text == "naïve"


@pytest.mark.parametrize("name", ["a.txt.gz", "packed"])
def test_gzip_is_known_by_its_first_bytes_and_unpacked(tmp_path, monkeypatch, name):
    monkeypatch.setattr(texts, "CHUNK", 3)
    (tmp_path / name).write_bytes(gzip.compress(b"one\r\n") + gzip.compress("zwölf\n".encode()))
    text = load_corpus((str(tmp_path / name),))
    assert text.text == "one\nzwölf\n"
    assert text.name == name.removesuffix(".txt.gz")


def test_damaged_gzip_is_refused(tmp_path):
    path, packed = tmp_path / "a.gz", bytearray(gzip.compress(b"any text"))
    path.write_bytes(packed[:-9])
    refused_text(path, "is damaged or cut short")
    packed[-1] ^= 1
    path.write_bytes(packed)
    refused_text(path, "is damaged or cut short")
    packed[12] ^= 0xff
    path.write_bytes(packed)
    refused_text(path, "is damaged or cut short")


def test_bytes_of_files_of_any_kind_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "CHUNK", 3)
    monkeypatch.chdir(tmp_path)
    contents = {"a.pdf": b"%PDF-1.7\r\n", "b.bin": bytes(range(256)), "c.txt": b"\xef\xbb\xbfone\r",
                "d.txt": "naïve".encode("utf-16"), "e": bytes(9)}
    for name, raw in contents.items():
        Path(name).write_bytes(raw)
    Path("f.gz").write_bytes(gzip.compress(b"packed\xff"))
    expected = "→".encode().join([*contents.values(), b"packed\xff"])
    for data in (tuple(contents) + ("f.gz",), (".",), ("[a-f]*",)):
        corpus = load_corpus(data, separator="→", as_bytes=True)
        assert corpus.text.encode("latin-1") == expected
        assert corpus.sha256 == hashlib.sha256(expected).hexdigest()
    Path("empty").touch()
    with pytest.raises(UserError, match="empty is empty"):
        load_corpus("empty", as_bytes=True)
    docs = load_corpus("python-docs")
    assert load_corpus("python-docs", as_bytes=True).text.encode("latin-1") == docs.text.encode()


def refused_text(path: Path, *parts: str, **options) -> None:
    """Assert that the text of a file is refused in one line that names it."""
    with pytest.raises(UserError) as caught:
        load_corpus((str(path),), **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message and all(part in message for part in parts), message


@pytest.mark.parametrize(("raw", "part"), [
    (b"ab\0c", "is binary, or not {encoding}: its character 2 is NUL"), (bytes(100), "character 0 is NUL"),
    (b"%PDF-1.7 text", "a PDF document"), (b"{\\rtf1 text}", "an RTF document"), (b"PK\x03\x04", ".docx"),
    (gzip.compress(bytes(10), mtime=0), "binary")])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_what_is_no_plain_text_is_refused(tmp_path, raw, part, encoding):
    (tmp_path / "file").write_bytes(raw)
    refused_text(tmp_path / "file", part.format(encoding=encoding), encoding=encoding)


def test_gigabytes_of_zeros_are_refused_at_once(tmp_path):
    with open(tmp_path / "zeros", "wb") as file:
        file.truncate(2 << 30)
    started = time.perf_counter()
    refused_text(tmp_path / "zeros", "binary")
    assert time.perf_counter() - started < 0.5


def test_devices_are_refused():
    for name in ("/dev/zero", "/dev/null", "/dev/random"):
        refused_text(Path(name), "is no file, but a device")


def test_named_pipe_is_read_and_bounded(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")

    def write() -> None:
        with contextlib.suppress(BrokenPipeError):
            (tmp_path / "pipe").write_bytes(b"one\r\ntwo")

    for limit in (8, 7):
        monkeypatch.setattr(texts, "UNSIZED_LIMIT", limit)
        thread = threading.Thread(target=write)
        thread.start()
        if limit == 8:
            assert load_corpus((str(tmp_path / "pipe"),)).text == "one\ntwo"
        else:
            refused_text(tmp_path / "pipe", "more than 0 MiB", "save it in a file")
        thread.join()


def test_what_a_gzip_unpacks_to_is_bounded(tmp_path, monkeypatch):
    (tmp_path / "bomb").write_bytes(gzip.compress(b"a" * (1 << 22)))
    (tmp_path / "text").write_bytes(b"a" * (1 << 22))
    monkeypatch.setattr(texts, "UNSIZED_LIMIT", 3 << 20)
    refused_text(tmp_path / "bomb", "more than 3 MiB")
    assert len(load_corpus((str(tmp_path / "text"),)).text) == 1 << 22


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """A folder of texts, its files made in another order than that of their paths; the current folder is above it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shelf" / "c").mkdir(parents=True)
    for name, text in (("d.txt", "d"), ("b.txt", "b"), ("c/e.txt.gz", "e"), ("c/a.md", "a"), ("c/empty", ""),
                       (".hidden", "h"), ("c/.git", "g")):
        raw = text.encode()
        (tmp_path / "shelf" / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return Path("shelf")


@pytest.mark.parametrize(("data", "text", "name"), [
    (("shelf",), "b|a|e|d", "shelf"), (("shelf/",), "b|a|e|d", "shelf"), (("shelf/*.txt",), "b|d", "b"),
    (("shelf/**/*.[tm]*",), "b|a|e|d", "b"), (("shelf/d.txt", "shelf/c"), "d|a|e", "d"),
    (("shelf/*",), "b|a|e|d", "b"), (("shelf/**",), "b|a|e|d", "b"), (("shelf/[c]",), "a|e", "a"),
    ((".",), "b|a|e|d", None)])
def test_folder_and_pattern_are_read_in_the_order_of_paths(shelf, data, text, name):
    corpus = load_corpus(data, separator="|")
    assert corpus.text == text
    assert corpus.source == data
    assert corpus.name == (name or Path.cwd().name)
    assert "".join(Path(file).stem[0] for file in corpus.files) == text.replace("|", "")
    assert load_corpus(data).text == text.replace("|", "")


def test_runs_and_checkpoints_in_a_folder_or_pattern_are_no_text(shelf):
    for name in ("runs/x/config.json", "runs/x/last.safetensors", "runs/x/metrics.jsonl", "runs/x/log",
                 "runs/x/more/log", "runs/gone/config.json", "runs/gone/samples.txt", "best.safetensors"):
        (shelf / name).parent.mkdir(parents=True, exist_ok=True)
        (shelf / name).write_text("x")
    (shelf / "runs" / "config.json").write_text("f")  # no run's
    assert load_corpus(("shelf",)).text == "baedf"
    for name in ("config.json", "last.safetensors", "samples.txt"):
        (shelf / name).write_text("x")
    assert load_corpus(("shelf",)).text == "baedf"  # the run that learns the folder lies in it
    assert load_corpus(("shelf/*.*",)).text == "bd"
    assert load_corpus(("shelf/samples.txt",)).text == "x"


def test_folder_or_pattern_without_text_is_refused(shelf):
    (shelf / "none").mkdir()
    for name in ("shelf/none", "shelf/*.pdf", "shelf/non*"):
        refused_text(name, "no file with text")


def test_empty_file_that_a_pattern_names_is_refused_as_if_it_were_named_itself(shelf):
    for name in ("shelf/c/empty", "shelf/c/*"):
        with pytest.raises(UserError, match="^shelf/c/empty is empty; give a file with text$"):
            load_corpus((name,))


def test_texts_that_stand_alone_are_refused_beside_others_unless_they_are_files(shelf):
    for data in (("shelf", "python-docs"), ("shakespeare", "shelf"), ("shakespeare", "shakespeare")):
        with pytest.raises(UserError, match="--data (python-docs|shakespeare) stands alone; name no other"):
            load_corpus(data)
    Path("python-docs").write_text("p", "utf-8")
    assert load_corpus(("shelf/b.txt", "python-docs")).text == "bp"


def test_file_that_is_no_text_is_named_among_those_of_a_folder(shelf):
    (shelf / "c" / "picture").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    with pytest.raises(UserError, match="shelf/c/picture is binary, or not utf-8: byte 0x89 at offset 0"):
        load_corpus(("shelf",))


def test_offset_of_a_bad_byte_is_that_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "CHUNK", 4)
    for raw, offset in (("12🦊45".encode() + b"\xff", 8), ("123🦊".encode()[:-1], 3), (b"12345\xc3ab", 5)):
        (tmp_path / "text").write_bytes(b"\xef\xbb\xbf" + raw)
        refused_text(tmp_path / "text", f"at offset {offset + 3};")


def test_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("text", "utf-8")
    assert load_corpus(str(tmp_path / "a[1].txt")).text == "text"


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


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file.*--data takes.*shakespeare and python-docs alone"):
        load_corpus((str(tmp_path / "missing.txt"),))


def test_paths_and_lists_are_taken_as_strings_and_tuples_are(shelf):
    expected = load_corpus(("shelf/b.txt",))
    for data in (Path("shelf/b.txt"), (Path("shelf/b.txt"),), ["shelf/b.txt"], "shelf/b.txt"):
        assert load_corpus(data) == expected
    for data in (5, None, [5], (b"shelf",)):
        with pytest.raises(UserError, match="data: expected strings or paths, got "):
            load_corpus(data)


def test_python_docs_are_a_long_text_and_need_no_network():
    docs = load_corpus(("python-docs",))
    assert docs.name == "python-docs"
    assert len(docs.text) > 300_000
    assert docs == load_corpus(("python-docs",))


class Mirrors:
    """Web servers' files by path, on 127.0.0.1, and addresses to which paths are redirected; `requested` lists the
    paths asked for; `pause`: seconds before each byte that is sent."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.requested: list[str] = []
        self.pause = 0.0

    @contextmanager
    def serving(self, monkeypatch, paths: tuple[str, ...]):
        """Serve, with `paths` as the download's mirrors."""
        mirrors = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirrors.requested.append(self.path)
                body = mirrors.files.get(self.path)
                if self.path in mirrors.redirects:
                    self.send_response(302)
                    self.send_header("Location", mirrors.redirects[self.path])
                else:
                    self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    for start in range(0, len(body or b""), 1 if mirrors.pause else 1 << 16):
                        time.sleep(mirrors.pause)
                        self.wfile.write(body[start:start + (1 if mirrors.pause else 1 << 16)])

            def log_message(self, *_) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
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
    assert load_corpus(("shakespeare",)) == load_corpus(()) == load_corpus([]) == fetched


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


def test_server_that_sends_byte_after_byte_is_given_up(mirrors, monkeypatch):
    monkeypatch.setattr(corpus, "DOWNLOAD_SECONDS", 0.3)
    mirrors.files["/play"], mirrors.pause = PLAY, 0.02
    started = time.perf_counter()
    with mirrors.serving(monkeypatch, ("/play",)), pytest.raises(UserError, match=r"Shakespeare \(TimeoutError\)"):
        load_corpus(("shakespeare",))
    assert time.perf_counter() - started < 2


def test_download_that_is_longer_than_shakespeare_is_given_up(mirrors, monkeypatch):
    monkeypatch.setattr(corpus, "SHAKESPEARE_BYTES", len(PLAY) - 1)
    mirrors.files["/play"] = PLAY
    with mirrors.serving(monkeypatch, ("/play",)), pytest.raises(UserError, match="ValueError"):
        load_corpus(("shakespeare",))


def test_redirect_stays_with_the_kind_of_address(mirrors, monkeypatch):
    """As the true mirrors' addresses begin with https, no redirect leaves it."""
    assert all(url.startswith("https://") for url in corpus.SHAKESPEARE_URLS)
    mirrors.files["/play"] = PLAY
    mirrors.redirects = {"/away": "https://127.0.0.1:9/", "/near": "/play"}
    with mirrors.serving(monkeypatch, ("/away",)), pytest.raises(UserError, match="InvalidSchema"):
        load_corpus(("shakespeare",))
    with mirrors.serving(monkeypatch, ("/near",)):
        assert load_corpus(("shakespeare",)).text.encode() == PLAY


def test_killed_download_leaves_nothing_in_the_cache(mirrors, monkeypatch, tmp_path):
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        from char_gru.rnn import corpus
        corpus.SHAKESPEARE_URLS = sys.argv[2:]
        corpus.load_corpus(("shakespeare",))"""
    mirrors.files["/play"], mirrors.pause = PLAY, 0.02
    with mirrors.serving(monkeypatch, ("/play",)):
        with running(code, ROOT, *corpus.SHAKESPEARE_URLS, cwd=tmp_path, environ=NO_PROXY) as process:
            wait_until(lambda: mirrors.requested, process)
            time.sleep(0.1)
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_terminal_shows_how_far_a_download_is(mirrors, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    mirrors.files["/play"] = PLAY
    with mirrors.serving(monkeypatch, ("/play",)), contextlib.redirect_stderr(terminal):
        load_corpus(("shakespeare",))
    assert "fetching Shakespeare" in terminal.getvalue()


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
