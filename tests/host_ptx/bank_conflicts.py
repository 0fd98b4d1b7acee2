"""Bank conflicts of the kernels at the tutorial's sizes, as a table: tests/bank_conflicts.txt.

    python -m tests.host_ptx.bank_conflicts > tests/bank_conflicts.txt    # minutes

The kernels run from their PTX, planned for an H100, and the addresses of what the first block of each launch loads from
shared memory and stores there are kept (banks.h). For each kernel: how many accesses of a warp, how many wavefronts
they take, and how many they would take at best; then the source lines at which they take more. A training step is one
of two time steps, whose prologues weigh more than in a step of a hundred. `ptxas` may merge accesses to neighbouring
words, so what machine code takes can differ (tests/kernel_loops.txt has its widths).
"""

import collections
import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from bench import tutorial
from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.kernels.matmul import PRECISIONS
from char_gru.kernels.plan.gpus import GPUS
from char_gru.rnn.model import LanguageModel
from tests import host_ptx
from tests.helpers.texts import text_case, written_on_device

__all__ = ["JOBS", "Counts", "Recorder", "Row", "measured", "table"]


class Counts(NamedTuple):
    """Accesses of warps to shared memory, the wavefronts that they take, and the fewest that they would take."""

    accesses: int = 0
    wavefronts: int = 0
    least: int = 0

    def __add__(self, other):
        return Counts(*map(sum, zip(self, other)))


class Row(NamedTuple):
    """A kernel's accesses, by source line and instruction."""

    kernel: str
    lines: dict[tuple[str, str], Counts]

    @property
    def all(self) -> Counts:
        return sum(self.lines.values(), Counts())


class Recorder(host_ptx.PtxExecutor):
    """Pretends to be a GPU of its architecture and keeps the accesses to shared memory."""

    def __init__(self, architecture: str = "sm_90", gpu=GPUS["h100"]):
        super().__init__(architecture, banks=True)
        self.gpu = gpu
        self._ran: dict[tuple[str, str], None] = {}  # source and kernel, in the order of their first launches

    def _run(self, source, module, request, parameters, args):
        self._ran[source, request.kernel.decode()] = None
        return super()._run(source, module, request, parameters, args)

    def rows(self) -> Iterator[Row]:
        """Of all that this process has launched with banks kept, of the kernels that this executor launched."""
        for source, kernel in self._ran:
            built = host_ptx.build(source, self.architecture, banks=True)
            lines = collections.defaultdict(Counts)
            for statement in built.coverage(kernel).instructions:
                counted = (ctypes.c_uint64 * 3)()
                built.library.ptx_wavefronts(statement.line, counted)
                lines[str(statement.location).removeprefix("kernels/"), statement.operation] += Counts(*counted)
            yield Row(kernel, {line: counts for line, counts in lines.items() if counts.accesses})


def _training_step(precision: str) -> None:
    model = LanguageModel(tutorial.SIZES, 2, tutorial.B, ops=kernels.op_set(precision))
    model.train_step(*np.random.default_rng(0).integers(0, tutorial.CHARACTERS, (2, 2, tutorial.B)), 1e-3)


def _text(rows: int, weights: str) -> None:
    written_on_device(text_case(rows, tutorial.SIZES.H, tutorial.CHARACTERS, 1, scale=0.03), 2, weights=weights)


JOBS: dict[str, Callable[[], None]] = {
    **{f"training step, {precision}": lambda precision=precision: _training_step(precision)
       for precision in PRECISIONS},
    **{f"{rows} text{'s' * (rows > 1)}, {weights}": lambda rows=rows, weights=weights: _text(rows, weights)
       for rows in (1, 5, 64) for weights in ("fp32", "bf16")},
}
"""Name -> what is run for it."""


def measured(job: str) -> list[Row]:
    """The rows of a job; to be called once for each in a process."""
    with runtime.use(Recorder()) as executor:
        JOBS[job]()
    assert not executor.from_source, executor.from_source
    return list(executor.rows())


def table(job: str, rows: list[Row]) -> Iterator[str]:
    """The lines of the table for a job; kernels that do not use shared memory are left out."""
    for row in rows:
        if row.lines:
            yield f"{job} | {row.kernel} | {_said(row.all)}"
        for (line, operation), counts in row.lines.items():
            if counts.wavefronts > counts.least:
                yield f"    {line}: {re.sub('[.]shared', '', operation)}: {_said(counts)}"


def _said(counts: Counts) -> str:
    return (f"{counts.accesses:,} accesses, {counts.wavefronts:,} wavefronts, {counts.least:,} at best "
            f"({counts.wavefronts / counts.least:.2f} times)")


def main() -> None:
    print("Wavefronts of shared memory in the first block of each launch on an H100, at the tutorial's sizes; a "
          "training step of two time steps.\nMade by python -m tests.host_ptx.bank_conflicts")
    for job in JOBS:
        print(f"{job}\r", end="", file=sys.stderr, flush=True)
        print(*table(job, measured(job)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
