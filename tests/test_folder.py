"""A run's folder is held by one process, and its files survive kills, full disks and lost power."""

import errno
import os

import pytest

from char_gru.rnn.config import UserError
from char_gru.rnn.folder import LOCK, RunFolder, is_metrics_line, read_metrics, write_atomically
from tests.helpers.commands import ROOT, running


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Holding a folder

HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from char_gru.rnn.folder import RunFolder
folder = RunFolder(Path("run"))
print("held", flush=True)
time.sleep(100)
"""


def test_second_process_is_told_the_first_ones_id_until_the_first_is_killed(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).write_text("the id of an earlier process\n")
    with running(HOLD, ROOT, cwd=tmp_path) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"in process {holder.pid};") as caught:
            RunFolder(run)
        assert len(str(caught.value).splitlines()) == 1
        holder.kill()
        holder.wait()
    with RunFolder(run):
        assert (run / LOCK).read_text() == f"{os.getpid()}\n"
    assert names(run) == []


def test_folders_without_a_name_are_all_different(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "text-2").write_text("a file")
    with RunFolder.new(None, "text") as first, RunFolder.new(None, "text") as second:
        assert (str(first.path), str(second.path)) == ("runs/text", "runs/text-3")
    assert names(tmp_path / "runs") == ["text-2"]


@pytest.mark.parametrize("race", ["mkdir", "lock"])
def test_folder_that_another_run_takes_at_the_same_moment_is_left_to_it(tmp_path, monkeypatch, race):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    others, mkdir = [], type(tmp_path).mkdir

    def taken(path, *arguments, **options):
        if race == "mkdir" and not others:
            others.append(mkdir(path))
        mkdir(path, *arguments, **options)
        if race == "lock" and not others:
            others.append(RunFolder(path))

    monkeypatch.setattr(type(tmp_path), "mkdir", taken)
    with RunFolder.new(None, "text") as folder:
        assert str(folder.path) == "runs/text-2"
    assert others


def test_lock_that_its_process_removes_between_opening_and_locking_is_not_taken(tmp_path, monkeypatch):
    first, opening = RunFolder(tmp_path), os.open

    def open_then_release(path, *arguments):
        descriptor = opening(path, *arguments)
        first.close()
        return descriptor

    monkeypatch.setattr(os, "open", open_then_release)
    with RunFolder(tmp_path):
        assert names(tmp_path) == [LOCK]
        monkeypatch.undo()
        with pytest.raises(UserError, match="another run trains"):
            RunFolder(tmp_path)


def test_lock_that_another_process_gives_back_at_once_is_taken(tmp_path, monkeypatch):
    first = RunFolder(tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: first.close())
    with RunFolder(tmp_path):
        assert names(tmp_path) == [LOCK]


def test_run_whose_folder_was_taken_away_writes_nothing_more(tmp_path):
    with RunFolder.new(tmp_path / "run", "text") as old:
        (tmp_path / "run").rename(tmp_path / "moved")
        with RunFolder.new(tmp_path / "run", "text"):
            for write in (lambda: old.append("metrics.jsonl", "x"), lambda: old.write("config.json", b"x"), old.flush):
                with pytest.raises(UserError, match="given to another run"):
                    write()
            assert names(tmp_path / "run") == [LOCK]


@pytest.mark.parametrize("name", ["last.safetensors", "config.json", "metrics.jsonl", "samples.txt"])
def test_folder_that_has_a_run_is_no_folder_for_a_new_one(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="holds another run"):
        RunFolder.new(tmp_path, "text")
    assert names(tmp_path) == [name]


def test_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capfd):
    def unlockable(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unlockable)
    with RunFolder(tmp_path) as folder:
        folder.append("metrics.jsonl", "{}\n")
    assert "cannot be locked (No locks available)" in capfd.readouterr().err


# Temporary files

def fail(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_failed_write_leaves_the_old_content_and_no_other_file(tmp_path, monkeypatch, function):
    target = tmp_path / "file"
    write_atomically(target, b"old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


def test_write_follows_no_link(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda size: "planted")
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "file.planted.tmp").symlink_to("victim")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", b"new")
    (tmp_path / "link").symlink_to("victim")
    monkeypatch.undo()
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert (tmp_path / "link").read_bytes() == b"new" and not (tmp_path / "link").is_symlink()


def test_write_replaces_no_folder_pipe_or_link_to_one_or_to_an_open_file(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "victim").write_bytes(b"precious")
    with open(tmp_path / "victim", "ab") as opened:
        (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{opened.fileno()}")
        before = {path.name: path.lstat().st_ino for path in tmp_path.iterdir()}
        for name in ("folder", "pipe", "link", "stdout"):
            if (tmp_path / name).exists():  # not every system has /proc
                with pytest.raises(UserError, match=f"cannot write {tmp_path / name}: it is no file"):
                    write_atomically(tmp_path / name, b"new")
    assert {path.name: path.lstat().st_ino for path in tmp_path.iterdir()} == before
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    leftovers = ["last.safetensors.0123456789abcdef.tmp", "epoch-0012.safetensors.tmp", "timing.json.tmp"]
    kept = ["last.safetensors", "notes.tmp", "last.safetensors.mine.tmp"]
    for name in (*leftovers, *kept):
        (tmp_path / name).touch()
    (tmp_path / "loss.png.tmp").symlink_to("notes.tmp")
    with RunFolder(tmp_path):
        assert names(tmp_path) == sorted([LOCK, *kept])


# Files that grow

def never_damaged(line: bytes) -> bool:
    return b"damaged" not in line


@pytest.mark.parametrize(("content", "size", "expected"), [
    (b"1\n2\n", 4, b"1\n2\n"), (b"1\n2\n3\n4", 4, b"1\n2\n"), (b"", 0, b""), (b"x", 0, b""),
    (b"1\n2\n3", 6, b"1\n2\n"), (b"1\n2\n", 6, b"1\n2\n"), (b"1\n22\n", 4, b"1\n"), (b"", 9, b""), (None, 9, b""),
    (b"1\ndamaged\n2\n", 12, b"1\n2\n"), (b"1\n2\ndamaged", 4, b"1\n2\n"), (b"12", 2, b""), (b"1\n", 10**30, b"1\n"),
])
def test_file_that_grows_is_cut_back_to_its_whole_lines(tmp_path, content, size, expected):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    with RunFolder(tmp_path) as folder:
        assert folder.recover(path.name, size, never_damaged) == len(expected)
    assert (path.read_bytes() if content is not None else b"") == expected
    assert names(tmp_path) == ([path.name] if content is not None else [])


def test_flush_brings_the_files_that_grow_to_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    with RunFolder(tmp_path) as folder:
        folder.flush()
        assert synced == []
        for name in ("metrics.jsonl", "samples.txt"):
            assert folder.append(name, "é\n") == 3
        folder.flush()
    assert synced == [(tmp_path / name).stat().st_ino for name in ("metrics.jsonl", "samples.txt")]


@pytest.mark.parametrize(("line", "whole"), [
    (b'{"step": 1, "epoch": 1, "loss": 3.5}', True), (b'{"epoch": 1, "train_loss": 3.5, "val_loss": null}', True),
    (b'{"epoch": 1, "step": 7, "train_loss": 3.5, "val_loss": 1e-5, "val_bits_per_char": 2.0}', True),
    (b'{"step": 1, "loss": 3.5}', False), (b'{"step": [1], "epoch": 1, "loss": 3.5}', False), (b"{}", False),
    (b'{"step": 1, "epoch": 1, "loss": "3.5"}', False), (b'{"step": true, "epoch": 1, "loss": 3.5}', False),
    (b'{"epoch": null, "train_loss": 3.5}', False), (b"[]", False), (b"3", False), (b"null", False), (b"\xff", False),
    (b'"step"', False), (b"", False), (b"[" * 100_000, False), (b'{"step": 1, "epoch": 1, "loss": 3.5', False),
])
def test_line_of_metrics_is_whole_if_it_says_a_loss_and_where(tmp_path, line, whole):
    (tmp_path / "metrics.jsonl").write_bytes(line + b"\n")
    assert is_metrics_line(line) == whole == (len(read_metrics(tmp_path / "metrics.jsonl")) == 1)
