"""Both programs as processes: streams that are closed, full or lose their reader; signals; exit statuses."""

import functools
import os
import shutil
import signal
import subprocess
from contextlib import chdir
from pathlib import Path

import pytest

from char_gru.rnn import process as programs
from char_gru.rnn import training
from char_gru.rnn.checkpoint import load_checkpoint
from tests.helpers.commands import (
    ROOT,
    TINY,
    assert_equal_runs,
    finish,
    make_text,
    run,
    running,
    train,
    train_here,
    wait_until,
)

TEXT = ("--data", "text.txt", *TINY)
CLOSED, FULL, UNREAD = "closed", "full", "unread"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a text and a run of an epoch; read it, do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    make_text(folder / "text.txt")
    train("--epochs", 1, *TEXT, cwd=folder)
    return folder


@pytest.fixture
def folder(tmp_path, trained) -> Path:
    """A folder with the same text."""
    shutil.copy(trained / "text.txt", tmp_path)
    return tmp_path


def run_with(streams: dict[int, str], *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run a program with some of its streams, by number, closed, full, or without a reader; the others are pipes."""
    if FULL in streams.values() and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")

    def change() -> None:
        for number, kind in streams.items():
            if kind == CLOSED:
                os.close(number)
            elif kind == FULL:
                os.dup2(os.open("/dev/full", os.O_WRONLY), number)
            else:
                reader, writer = os.pipe()
                os.close(reader)
                os.dup2(writer, number)

    return run(*arguments, cwd=cwd, preexec_fn=change)


# Streams

@pytest.mark.parametrize("streams", [
    {1: CLOSED}, {2: CLOSED}, {0: CLOSED, 1: CLOSED, 2: CLOSED}, {1: FULL}, {2: FULL}, {1: FULL, 2: FULL},
    {1: UNREAD, 2: UNREAD}], ids=str)
def test_training_outlives_the_readers_of_its_streams(folder, trained, streams):
    result = run_with(streams, "train.py", *TEXT, "--epochs", 1, "--out", "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert_equal_runs(folder / "run", trained / "run")
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr
    if 1 not in streams:
        assert f"--- epoch 1\n{result.stdout}" == (folder / "run" / "samples.txt").read_bytes().decode()
    if 2 not in streams:
        assert "validation loss" in result.stderr


@pytest.mark.parametrize("kind", [CLOSED, FULL, UNREAD])
def test_message_that_nobody_can_read_changes_neither_text_nor_status(trained, kind):
    arguments = ("generate.py", "run", "--prompt", "the ", "--length", 30)
    result = run_with({2: kind}, *arguments, cwd=trained)
    assert result.returncode == 0
    assert result.stdout.startswith("the ") and len(result.stdout) == 4 + 30 + 1
    assert run_with({2: kind}, *arguments, "--temperature", -1, cwd=trained).returncode == 2


@pytest.mark.parametrize(("kind", "part"), [(CLOSED, "stdout is closed"), (FULL, "No space left")])
@pytest.mark.parametrize("arguments", [("--length", 5, "--seed", 1), ("--score", "text.txt")])
def test_text_that_cannot_be_written_is_an_error_of_one_line(trained, kind, part, arguments):
    result = run_with({1: kind}, "generate.py", "run", *arguments, cwd=trained)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and part in result.stderr


def test_prompt_from_a_closed_stdin_is_refused(trained):
    result = run_with({0: CLOSED}, "generate.py", "run", "--prompt", "-", "--length", 5, "--seed", 1, cwd=trained)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and "stdin is closed" in result.stderr


def test_closed_streams_do_not_matter_where_nothing_uses_them(trained):
    arguments = ("generate.py", "run", "--length", 5, "--seed", 1)
    assert run_with({0: CLOSED, 2: CLOSED}, *arguments, cwd=trained).stdout == run(*arguments, cwd=trained).stdout
    assert run_with({1: CLOSED, 2: CLOSED}, "train.py", "--help", cwd=trained).returncode == 0


# Signals

def test_hangup_is_handled_like_a_request_to_end(folder):
    with running("train.py", *TEXT, "--epochs", 10**6, "--out", "run", cwd=folder) as process:
        wait_until(lambda: (folder / "run" / "metrics.jsonl").exists(), process)
        process.send_signal(signal.SIGHUP)
        result = finish(process)
    assert result.returncode == 128 + signal.SIGHUP
    assert "SIGHUP" in result.stderr and "Traceback" not in result.stderr
    steps = load_checkpoint(folder / "run" / "last.safetensors").resumable.progress["step"]
    assert (folder / "run" / "metrics.jsonl").read_text().count("loss\": ") >= steps > 0
    train_here("--resume", "--epochs", 10**6, "--steps", steps + 1, cwd=folder)


def test_run_that_is_told_to_ignore_hangups_does(folder):
    def ignore_hangup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with running("train.py", *TEXT, "--epochs", 10**6, "--out", "run", cwd=folder, preexec_fn=ignore_hangup) as process:
        metrics = folder / "run" / "metrics.jsonl"
        wait_until(metrics.exists, process)
        process.send_signal(signal.SIGHUP)
        lines = metrics.read_bytes().count(b"\n")
        wait_until(lambda: metrics.read_bytes().count(b"\n") > lines + 20, process)
        process.send_signal(signal.SIGTERM)
        assert finish(process).returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_ends_the_texts_where_they_are(trained, number):
    arguments = ("generate.py", "run", "--prompt", "the ", "--prompt", "fox ", "--seed", 1, "--length")
    with running(*arguments, 0, cwd=trained) as process:
        written = process.stdout.read(40)
        process.send_signal(number)
        written = (written + process.stdout.read()).decode()
        assert process.stderr.read() == b""
        assert process.wait() == 128 + number
    first, second = written.removesuffix("\n").split("\n----------\n")
    assert len(first) == len(second)


IMPORTING = """
import os, signal, sys, time
os.kill(os.getpid(), {number})
time.sleep(30)
"""


@pytest.mark.parametrize("module", ["tyro", "safetensors"])
@pytest.mark.parametrize("program", ["train.py", "generate.py"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_while_modules_are_imported_ends_the_program_without_a_traceback(trained, tmp_path, program, module,
                                                                               number):
    (tmp_path / f"{module}.py").write_text(IMPORTING.format(number=int(number)))
    result = run(program, *(TEXT if program == "train.py" else ("run",)), cwd=trained,
                 environ={"PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stdout, result.stderr) == (128 + number, "", "")
    assert not (trained / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_before_the_first_step_leaves_no_folder(folder, monkeypatch, request, number):
    request.addfinalizer(functools.partial(signal.signal, number, signal.getsignal(number)))
    heeded = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, heeded)  # nohup, and a shell's background, have it ignored
    monkeypatch.setattr(training, "initial_parameters", lambda *_: os.kill(os.getpid(), number))
    with chdir(folder):
        assert programs.train([*TEXT]) == 128 + number
    assert [path.name for path in folder.iterdir()] == ["text.txt"]


def test_ctrl_c_that_a_library_turns_into_an_error_is_still_ctrl_c(folder, monkeypatch, capfd):
    def clean_up_what_is_not_there(*_):
        try:
            raise KeyboardInterrupt
        finally:
            folder.lock.release()

    monkeypatch.setattr(training, "initial_parameters", clean_up_what_is_not_there)
    with chdir(folder):
        assert programs.train([*TEXT]) == 130
    assert "Traceback" not in capfd.readouterr().err


# Exit statuses

def test_fault_of_the_program_has_a_status_of_its_own(folder, monkeypatch, capfd):
    def faulty(*_):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(training, "initial_parameters", faulty)
    with chdir(folder):
        assert programs.train([*TEXT]) == 70
    said = capfd.readouterr().err
    assert "ZeroDivisionError: planted" in said and "train.py: " in said.splitlines()[-1]


def test_missing_package_is_no_divergence(tmp_path):
    (tmp_path / "tqdm.py").write_text("raise ImportError('planted')")
    (tmp_path / "tyro.py").write_text("raise ImportError('planted')")
    for name in ("tyro", "tqdm"):
        result = run("train.py", *TEXT, cwd=tmp_path, environ={"PYTHONPATH": str(tmp_path)})
        assert result.returncode == 70 and "planted" in result.stderr
        (tmp_path / f"{name}.py").unlink()


def test_programs_start_by_their_installed_names():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, function = target.split(":")
        result = run(f"import sys; sys.path.insert(0, sys.argv.pop(1)); import {module}; {module}.{function}()",
                     ROOT, "--help", cwd=ROOT)
        assert result.returncode == 0 and "usage" in result.stdout
