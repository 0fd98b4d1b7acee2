"""Kills training runs at random moments and resumes them, until they end as a run that nothing disturbed.

    python -m tests.campaigns.kills            # 500 kills
    python -m tests.campaigns.kills 20 --seed 3

Every run saves after every step. Half of the kills (SIGKILL) come after a random time, half right before a random file
operation of the run: opening, replacing, cutting or removing a file, making or locking the folder. A run that has no
checkpoint yet is started again, any other one is resumed. Exit status 1, and the folder is kept, if a run fails, or has
other files, or other bytes, at its end.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.campaigns.children import TEXT, differences, options_of, prepare, start, wait
from tests.helpers.commands import make_text

OPTIONS = (
    ("--epochs", 3, "--save-every", 1),
    ("--steps", 16),
    ("--steps", 21, "--stateful", "--clip-norm", 0.5, "--eval-every", 5),
    ("--epochs", 2, "--val-fraction", 0, "--lr-schedule", "cosine", "--warmup-steps", 3),
    ("--epochs", 9, "--patience", 1, "--learning-rate", 1),
    ("--epochs", 2, "--layers", 2, "--dropout", 0.3),
)
"""Options of the runs. An epoch has eight steps, so that their last steps lie at the end of an epoch and inside one."""

FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.listdir", "fcntl.flock"}
"""Audit events of Python."""

LATEST_OPERATION = 512


class Chain:
    """A run that is killed and resumed again and again, and one with the same options that nothing disturbs."""

    def __init__(self, options: tuple, folder: Path) -> None:
        self.folder, self.options = folder, (*TEXT, *options, "--out", "run")
        folder.mkdir()
        make_text(folder / "text.txt")
        began = time.monotonic()
        status = wait(self._start())
        assert status == 0, f"an undisturbed run ended with status {status}\n{self.said()}"
        self.seconds = time.monotonic() - began
        (folder / "run").rename(folder / "expected")

    def said(self) -> str:
        return (self.folder / "stderr.txt").read_text()

    def _start(self, before=lambda: None) -> int:
        resume = ["--resume"] if (self.folder / "run" / "last.safetensors").exists() else []
        return start((*self.options, *resume), self.folder, self.folder / "stderr.txt", before)

    def disturbed(self, rng: random.Random) -> tuple[int, int]:
        """Run, with kills, to the end; returns how many kills came by the clock, and how many at a file operation.

        Raises: AssertionError if the run fails or ends in another way than the undisturbed one.
        """
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        kills = [0, 0]
        while True:
            at_operation = rng.randrange(2)
            if at_operation:
                number = int(LATEST_OPERATION ** rng.random())
                status = wait(self._start(lambda number=number: kill_before(number)))
            else:
                child = self._start()
                time.sleep(rng.uniform(0, self.seconds))
                os.kill(child, signal.SIGKILL)
                status = wait(child)
            if status == 0:
                break
            assert status == -signal.SIGKILL, f"a run ended with status {status}\n{self.said()}"
            kills[at_operation] += 1
        found = differences(self.folder / "run", self.folder / "expected")
        assert not found, "\n".join(found)
        return tuple(kills)


def kill_before(number: int) -> None:
    """Have this process killed right before one of its file operations, counted from 1."""
    left = [number]

    def audit(event: str, arguments: tuple) -> None:
        if event in FILE_OPERATIONS:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def main() -> int:
    options = options_of("kills", __doc__, 500, "kills")
    prepare()
    rng, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="kills-"))
    by_clock = at_operation = runs = 0
    chains = []
    try:
        while by_clock + at_operation < options.count:
            if len(chains) < len(OPTIONS):
                chains.append(Chain(OPTIONS[len(chains)], folder / str(len(chains))))
            kills = chains[runs % len(OPTIONS)].disturbed(rng)
            by_clock, at_operation, runs = by_clock + kills[0], at_operation + kills[1], runs + 1
    except AssertionError as error:
        print(f"{error}\nafter {by_clock + at_operation} kills, {runs} runs: {folder} holds what is left")
        return 1
    shutil.rmtree(folder)
    print(f"{by_clock + at_operation} kills, {by_clock} by the clock and {at_operation} before a file operation; "
          f"{runs} runs, each ended as the undisturbed one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
