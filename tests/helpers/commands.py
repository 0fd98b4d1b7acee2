"""The command lines as a user runs them: in a process, a folder and with texts of their own.

Where a test does not depend on a process of its own, `train_here` calls the same command inside the tests' process,
which saves the time of starting one.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from char_gru.rnn import commands, training

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--rnn-units", "16", "--embedding-dim", "8", "--batch-size", "4", "--seq-length", "10")
"""Options of a model that trains at about a step per millisecond."""

STEPS_PER_EPOCH = 8
"""Steps of an epoch with the options TINY on a text of `make_text`."""

REPRODUCIBLE = ("metrics.jsonl", "samples.txt", "config.json", "last.safetensors", "best.safetensors")
"""Files of a run that hold no clock times; two equal runs hold equal bytes."""

DEADLINE = 120.0
"""Seconds after which a process counts as hanging."""

_CLOSED_PROXY = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}


def make_text(path: Path, length: int = 400) -> Path:
    """Write `length` characters of words, some of them beyond ASCII; the same on every call."""
    rng, words = random.Random(1), ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dög", "🦊\n"]
    text = " ".join(rng.choice(words) for _ in range(length))[:length]
    path.write_bytes(text.encode())
    return path


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child process, with changes: downloads fail at once, matrix products use one thread."""
    kept = {name: value for name, value in os.environ.items() if name.lower() not in ("no_proxy", "all_proxy")}
    return kept | _CLOSED_PROXY | {"OPENBLAS_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"} | changes


def _heed_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(program: str, *arguments: object, cwd: Path, environ: dict[str, str] | None = None,
          cuda_device: Sequence[str] | None = None, **options) -> subprocess.Popen:
    """Start `train.py` or `generate.py`, or Python code if `program` is none of them; output as bytes in pipes. Ctrl-C
    and SIGHUP end it even if the tests themselves run in the background or by nohup, which have them ignored. With
    options of `tests/cuda_device`, it runs on that device."""
    called = [str(ROOT / program)] if program in ("train.py", "generate.py") else ["-c", program]
    if cuda_device is not None:
        called = [str(ROOT / "tests" / "cuda_device"), *cuda_device, *called]
    defaults = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    defaults["preexec_fn"] = _heed_signals
    return subprocess.Popen([sys.executable, *called, *map(str, arguments)], cwd=cwd,
                            env=environment(**(environ or {})), **(defaults | options))


def finish(process: subprocess.Popen, stdin: bytes = b"") -> subprocess.CompletedProcess:
    """Give a started program its stdin and wait for its end; returns its stdout and stderr as text."""
    with process:
        try:
            stdout, stderr = process.communicate(stdin, timeout=DEADLINE)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout.decode(), stderr.decode())


def run(program: str, *arguments: object, cwd: Path, stdin: bytes = b"", **options) -> subprocess.CompletedProcess:
    """Run a program to its end."""
    return finish(start(program, *arguments, cwd=cwd, **options), stdin)


@contextlib.contextmanager
def running(program: str, *arguments: object, cwd: Path, **options) -> Iterator[subprocess.Popen]:
    """A started program, killed at the end if it still runs."""
    with start(program, *arguments, cwd=cwd, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until the condition holds while the process runs.

    Raises: AssertionError if the process ends first or the deadline passes.
    """
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, f"ended too early: {process.stderr.read().decode()}"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def train(*arguments: object, cwd: Path, status: int = 0, **options) -> Path:
    """Train in the folder `run` under cwd, and assert the exit status; returns that folder."""
    result = run("train.py", "--out", "run", *arguments, cwd=cwd, **options)
    assert result.returncode == status, result.stderr
    return cwd / "run"


def train_here(*arguments: object, cwd: Path, status: int = 0) -> Path:
    """As `train`, but in this process."""
    with contextlib.chdir(cwd):
        assert commands.train(["--out", "run", *map(str, arguments)]) == status
    return cwd / "run"


def stop_here(step: int, *arguments: object, cwd: Path) -> Path:
    """As `train_here`, but SIGTERM comes during this step of the run."""
    train_step = training.Run._train_step

    def signalled(self) -> None:
        if self.progress.step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        train_step(self)

    with mock.patch.object(training.Run, "_train_step", signalled):
        return train_here(*arguments, cwd=cwd, status=128 + signal.SIGTERM)


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of the reproducible files that a run has."""
    return {name: (folder / name).read_bytes() for name in REPRODUCIBLE if (folder / name).exists()}


def assert_equal_runs(folder: Path, expected: Path) -> None:
    """Assert that two runs hold equal bytes in every reproducible file."""
    actual, wanted = contents(folder), contents(expected)
    assert actual.keys() == wanted.keys()
    different = [name for name in wanted if actual[name] != wanted[name]]
    assert not different, f"{', '.join(different)} of {folder} and {expected} differ"


def assert_refused(status: int, stdout: str, stderr: str, *parts: str) -> None:
    """Assert exit status 2, nothing on stdout, and one line on stderr that holds all parts."""
    assert "Traceback" not in stderr and len(stderr.splitlines()) == 1, stderr
    assert status == 2
    assert stdout == ""
    missing = [part for part in parts if part not in stderr]
    assert not missing, f"{missing} not in {stderr!r}"


def refused_here(folder: Path, capfd, *arguments: object) -> str:
    """Give `train.py` arguments in a folder, in this process, and assert that it refuses them and leaves the folder as
    it was; returns its line on stderr."""
    before = sorted(folder.rglob("*"))
    with contextlib.chdir(folder):
        status = commands.train(list(map(str, arguments)))
    stdout, stderr = capfd.readouterr()
    assert_refused(status, stdout, stderr)
    assert sorted(folder.rglob("*")) == before
    return stderr
