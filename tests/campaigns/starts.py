"""Starts pairs of training runs at the same moment: no run may be lost, mixed with another, or differ in a byte.

    python -m tests.campaigns.starts            # 200 pairs
    python -m tests.campaigns.starts 10 --seed 3

The runs of a pair take their folder in one of several ways (see PAIRS); a few milliseconds, at random, lie between the
two starts. Two that may both train must both end as a run on its own would; of two that want the same folder, one does,
and the other is refused with one line that names the first one's process, or the run that is there by then. Exit status
1, and the folder is kept, if anything else happens.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.campaigns.children import TEXT, differences, options_of, prepare, start, wait
from tests.helpers.commands import make_text

NEW = (*TEXT, "--epochs", 3, "--steps", 20)
RESUMED = ("--resume", "--steps", 20)
NAMED = ("--out", "runs/text")

PAIRS = {
    "new, without a name": (NEW, NEW),
    "new, by the same name": ((*NEW, *NAMED), (*NEW, *NAMED)),
    "new, one by the name that the other one would take": ((*NEW, *NAMED), NEW),
    "resumed, by name": ((*RESUMED, *NAMED), (*RESUMED, *NAMED)),
    "resumed, as the newest": (RESUMED, RESUMED),
    "one resumed, one new in its folder": (RESUMED, (*NEW, *NAMED)),
}
"""Kind of pair -> the arguments of both runs."""

LONGEST_PAUSE = 0.02
"""Seconds between two starts."""


def begin(folder: Path) -> None:
    """Train, each on its own: a new run, one that ends in its second epoch, and the same resumed."""
    def train(*arguments: object) -> None:
        assert wait(start(arguments, folder, folder / "stderr.txt")) == 0, (folder / "stderr.txt").read_text()

    make_text(folder / "text.txt")
    train(*NEW, "--out", "new")
    train(*NEW, "--steps", 11, "--out", "stopped")
    shutil.copytree(folder / "stopped", folder / "resumed")
    train(*RESUMED, "--out", "resumed")


def try_pair(kind: str, pause: float, folder: Path) -> tuple[int, ...]:
    """Start a pair of runs in a folder where `begin` was; returns their exit statuses.

    Raises: AssertionError for any end but those that the module's docstring allows.
    """
    shutil.rmtree(folder / "runs", ignore_errors=True)
    expected = folder / ("resumed" if "resumed" in kind else "new")
    if expected.name == "resumed":
        shutil.copytree(folder / "stopped", folder / "runs" / "text")
    said = [folder / "first.txt", folder / "second.txt"]
    children = []
    for arguments, path in zip(PAIRS[kind], said, strict=True):
        children.append(start(arguments, folder, path))
        time.sleep(pause)
    statuses = tuple(map(wait, children))
    runs = sorted((folder / "runs").iterdir())
    for run in runs:
        assert not (found := differences(run, expected)), f"{run}: {found}"
    for status, path, other in zip(statuses, said, reversed(children), strict=True):
        text = path.read_text()
        assert status == 0 or status == 2 and len(text.splitlines()) == 1 and (
            f"in process {other};" in text or "runs/text holds another run" in text), f"status {status}\n{text}"
    assert 0 in statuses, "no run has trained"
    if expected.name == "new":
        assert len(runs) == statuses.count(0), f"{statuses.count(0)} runs trained in {len(runs)} folders"
    assert statuses == (0, 0) or kind != "new, without a name"
    return statuses


def main() -> int:
    options = options_of("starts", __doc__, 200, "pairs")
    prepare()
    rng, folder, trained = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="starts-")), Counter()
    kinds = list(PAIRS)
    try:
        begin(folder)
        for number in range(options.count):
            statuses = try_pair(kinds[number % len(kinds)], rng.choice((0, rng.uniform(0, LONGEST_PAUSE))), folder)
            trained[statuses.count(0)] += 1
    except AssertionError as error:
        kind = kinds[trained.total() % len(kinds)]
        print(f"{error}\nafter {trained.total()} pairs, in one of the kind '{kind}': {folder} holds what is left")
        return 1
    shutil.rmtree(folder)
    print(f"{options.count} pairs: in {trained[2]} both runs trained, in {trained[1]} one, and the other was refused; "
          "each run ended as the one on its own")
    return 0


if __name__ == "__main__":
    sys.exit(main())
