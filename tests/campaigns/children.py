"""What the campaigns share: their command lines, and training runs in forked children, which need not import anything,
since hundreds of them are started."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from char_gru.rnn import process
from tests.helpers.commands import REPRODUCIBLE, TINY

TEXT = ("--data", "text.txt", *TINY)


def options_of(campaign: str, about: str, count: int, what: str) -> argparse.Namespace:
    """The command line of a campaign: how many times it tries (`count`), and the seed of its random choices."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.campaigns.{campaign}", description=about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=count, help=f"{what} (default: {count:,})")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    return parser.parse_args()


def prepare() -> None:
    """Import, in this process, all that its children use, and have a checkpoint saved after every step."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    for module in ("char_gru.rnn.training", "tyro", "matplotlib.figure"):
        importlib.import_module(module)
    sys.modules["char_gru.rnn.training"].SAVE_SECONDS = 0


def start(arguments: Sequence[object], folder: Path, said: Path, before: Callable[[], object] = lambda: None) -> int:
    """Start `train.py` with arguments in a folder; returns the child's process id.

    said: the file for its stderr; before: what the child calls first.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = process.FAULT
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the campaign, not one of its runs in order
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        before()
        status = process.train([str(argument) for argument in arguments])
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """The exit status of a child, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differences(run: Path, expected: Path) -> list[str]:
    """How a finished run differs from another one: missing and surplus files, and those that hold other bytes."""
    names = {path.name for path in expected.iterdir()} | {path.name for path in run.iterdir()}
    compared = {*REPRODUCIBLE, "loss.png"} | {name for name in names if name.startswith("epoch-")}
    found = []
    for name in sorted(names):
        here, there = run / name, expected / name
        if not (here.exists() and there.exists()):
            found.append(f"{name} is only in {(here if here.exists() else there).parent}")
        elif name in compared and here.read_bytes() != there.read_bytes():
            found.append(f"{name} has other bytes")
    return found
