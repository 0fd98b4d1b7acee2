"""The folder of a run: made and locked for one process, and its files written so that a killed run can be resumed.

A process that trains holds a lock on the file `.lock` in the folder, which has the process's id; the kernel releases
the lock when the process ends, however it ends. Files that grow are flushed to disk before a checkpoint counts their
bytes; all other files are replaced whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Self

from char_gru.rnn.config import UserError
from char_gru.rnn.terminal import complain

LOCK = ".lock"

GROWING = ("metrics.jsonl", "samples.txt")
"""Files that a run appends to."""

_LEFTOVER = re.compile(r"((last|best|epoch-\d+)\.safetensors|(config|timing)\.json|loss\.png)(\.[0-9a-f]{16})?\.tmp")
"""Names of the temporary files that a killed run leaves behind."""

_OF_RUN = re.compile(r"(config|timing)\.json|metrics\.jsonl|samples\.txt|loss\.png|events\.out\.tfevents\..*|.*\.tmp")
"""Names of the files of a run beside its checkpoints."""

PAUSE_SECONDS = 0.1
"""Enough for a process that has just locked a folder to write its id, or to find another run there and give it back."""


_TYPES = {"epoch": (int,), "step": (int,), "loss": (float,), "train_loss": (float,), "val_loss": (float, type(None))}
"""Of the values in a line of `metrics.jsonl`."""


class InUse(UserError):
    """Another process holds the folder."""


class RunFolder:
    """A run's folder, held by this process until `close`, which is also the end of a `with` block."""

    def __init__(self, path: Path, missing: tuple[Path, ...] = ()) -> None:
        """Lock the folder and remove what a killed run left behind.

        missing: the folders that were made for the run, innermost first; `close` removes them if they are empty.

        Raises: InUse, naming the process, if another process holds the folder.
        """
        self.path, self._missing = path, missing
        self._lock = _lock(path)
        for name in os.listdir(path):
            if _LEFTOVER.fullmatch(name):
                (path / name).unlink()

    @staticmethod
    def new(out: Path | None, name: str) -> RunFolder:
        """The folder of a new run: `out`, or with None the first of runs/NAME, runs/NAME-2, ... that does not exist.

        Raises: UserError if the folder cannot be made, is held by another process, or has another run in it.
        """
        if out is not None:
            folder = RunFolder(out, _make(out, exist_ok=True))
            if holds_run(out):
                folder.close()
                resumes = (out / "last.safetensors").exists()
                raise UserError(f"{out} holds another run" + ("; continue it with --resume, or give" if resumes else
                                ", which has lost its last.safetensors; give") + " another --out")
            return folder
        for number in itertools.count(1):
            path = Path("runs", name if number == 1 else f"{name}-{number}")
            if not os.path.lexists(path):
                with contextlib.suppress(FileExistsError, InUse):  # made, or taken, by another run at this moment
                    return RunFolder(path, _make(path, exist_ok=False))
        raise AssertionError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder; a folder that was made for the run and is still empty goes with it."""
        if self._lock is None:
            return
        if self._is_held():
            (self.path / LOCK).unlink()
        os.close(self._lock)
        self._lock = None
        with contextlib.suppress(OSError):
            for made in self._missing:
                made.rmdir()

    def append(self, name: str, text: str) -> int:
        """Append to a file that grows; returns how many bytes. They are on disk after the next `flush`.

        Raises: OSError; UserError for a symbolic link, and if the folder was taken away from this run.
        """
        self._check_held()
        _refuse_link(self.path / name)
        with open(self.path / name, "ab", opener=_open_no_link) as file:
            return file.write(text.encode())

    def flush(self) -> None:
        """Wait until the files that grow are on disk, before a checkpoint counts their bytes.

        Raises: as `append`.
        """
        self._check_held()
        for name in GROWING:
            with contextlib.suppress(FileNotFoundError):
                _sync(self.path / name)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file, durably and all at once.

        Raises: as `append`; the file is then unchanged.
        """
        self._check_held()
        write_atomically(self.path / name, data)

    def recover(self, name: str, size: int, is_whole: Callable[[bytes], bool]) -> int:
        """Cut a file that grows back to the `size` bytes that a checkpoint counts, and of these keep the lines that are
        complete and that `is_whole` accepts; returns the size of the result, which is smaller if lines were lost.

        Raises: OSError; UserError for a symbolic link.
        """
        path = self.path / name
        _refuse_link(path)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return 0
        data = content[:size]
        *lines, _ = data.split(b"\n")
        kept = b"".join(line + b"\n" for line in lines if is_whole(line))
        if kept != data:
            self.write(name, kept)
        elif len(content) > size:
            os.truncate(path, size)
        return len(kept)

    def _is_held(self) -> bool:
        return _is_same_file(self._lock, self.path / LOCK)

    def _check_held(self) -> None:
        if not self._is_held():
            raise UserError(f"{self.path} was removed, moved, or given to another run while this run trained in it")


def holds_run(folder: Path) -> bool:
    """Whether a folder holds anything of a run that a new run would overwrite or go on with."""
    return any(os.path.lexists(folder / name) for name in ("last.safetensors", "config.json", *GROWING))


def check_output(path: Path, force: bool, source: Path) -> None:
    """Check that a file may be written, which is made from the file `source`.

    Raises: UserError for a file that exists, unless force is given; in any case for the source itself, and for a
    checkpoint in the folder of a run, which the run may need to be resumed.
    """
    if path.exists() and not force:
        raise UserError(f"{path} exists; give another name, or --force to replace it")
    if path.exists() and path.samefile(source):
        raise UserError(f"{path} is the model itself, and would be lost; give another name")
    if path.suffix == ".safetensors" and is_run(path.parent):
        raise UserError(f"{path} lies in the folder of a run, where checkpoints are the run's own; give another folder")


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or what is left of one."""
    return (folder / "config.json").exists() and any(
        (folder / name).exists() for name in ("last.safetensors", *GROWING))


def is_of_run(file: Path) -> bool:
    """Whether a file is a checkpoint, or lies among the files of a run as one of them."""
    return file.suffix == ".safetensors" or bool(_OF_RUN.fullmatch(file.name)) and is_run(file.parent)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`, without those that are damaged; none if there is no such file.

    Raises: OSError.
    """
    raw = path.read_bytes() if path.exists() else b""
    return [line for line in map(_metrics_line, raw.split(b"\n")) if line is not None]


def is_metrics_line(line: bytes) -> bool:
    """Whether a line of `metrics.jsonl` is undamaged."""
    return _metrics_line(line) is not None


def _metrics_line(line: bytes) -> dict | None:
    try:
        value = json.loads(line)
        whole = all(type(value[name]) in types for name, types in _TYPES.items() if name in value) and (
            {"epoch", "step", "loss"} <= value.keys() or {"epoch", "train_loss"} <= value.keys())
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return value if whole else None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A block that writes a file, which takes the place of the one at `path` when the block has ended, durably and all
    at once; after an exception the path is as it was. A link to a file is replaced, and not what it leads to.

    Raises: OSError that names the path if the file cannot be written. UserError for a path that is there and is no
    file, but a folder, a pipe or a device.
    """
    _refuse_other_than_file(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a folder cannot be opened, or synced, on every system
        _sync(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content, durably and all at once. Raises: as `replacing`."""
    with replacing(path) as file:
        file.write(data)


def _refuse_other_than_file(path: Path) -> None:
    """Raises: UserError, so that no device makes place for a file, nor the link to an open file that /dev/stdout is."""
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(path.stat().st_mode) or path.is_symlink() and os.readlink(path).startswith("/proc/"):
            kind = "a folder" if path.is_dir() else "a pipe, a device or a socket"
            raise UserError(f"cannot write {path}: it is no file, but {kind}; name a file")


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which a run does not follow; put a file in its place")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make(path: Path, exist_ok: bool) -> tuple[Path, ...]:
    """Make a folder; returns the folders that were missing, innermost first."""
    try:
        missing = tuple(itertools.takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
        path.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        if isinstance(error, FileExistsError) and not exist_ok and path.is_dir():
            raise
        raise UserError(f"cannot make the folder {path}: {error.strerror}; give another --out") from None
    return missing


def _lock(folder: Path) -> int:
    """The open file `.lock` of a folder, locked by this process.

    Raises: InUse if another process has locked it.
    """
    while True:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if not _try_lock(lock, folder):
            time.sleep(PAUSE_SECONDS)
            if not _try_lock(lock, folder):
                process = os.pread(lock, 20, 0).decode(errors="replace").strip()
                os.close(lock)
                raise InUse(f"another run trains in {folder}, in process {process}; wait until it has ended, stop it, "
                            "or give another --out")
        if _is_same_file(lock, folder / LOCK):  # not one that its process has removed in the meantime
            os.ftruncate(lock, 0)
            os.write(lock, f"{os.getpid()}\n".encode())
            return lock
        os.close(lock)


def _try_lock(lock: int, folder: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        complain("train.py", f"{folder} cannot be locked ({error.strerror}); start no other run in it")
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False
