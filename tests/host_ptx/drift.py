"""How far a training run drifts from the specification where hardware errs as much as it may.

    python -m tests.host_ptx.drift      # bench/results/drift.json; then python -m bench.report, for README's table

A small model learns the text of LICENSE for STEPS steps: by the specification in float64; by the specification in
float32, with the products' operands rounded to each precision; by the op set of the CPU; and by the kernels, run from
their PTX, with sums of tensor cores and approximate instructions rounded once, or at their worst (`--worst` of
README.md beside this file).
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.timing import RESULTS, machine
from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.kernels.matmul import PRECISIONS
from char_gru.rnn import cpu, reference_ops
from char_gru.rnn.batches import ShuffledWindows
from char_gru.rnn.config import Sizes
from char_gru.rnn.model import LanguageModel
from char_gru.rnn.vocabulary import Vocabulary
from tests.host_ptx import PtxExecutor

TEXT = Path(__file__).parents[2] / "LICENSE"
SIZES = {"T": 20, "B": 8, "E": 16, "H": 32}
STEPS, LEARNING_RATE = 200, 5e-3
KERNELS = (("sm_90", False), ("sm_80", True), ("sm_90", True))
"""Architecture of a run of the kernels, and whether it is at its worst."""


class Run(NamedTuple):
    """The losses of a run's steps, and its parameters after them."""

    losses: np.ndarray
    params: dict[str, np.ndarray]


def trained(ops, steps: int, dtype=np.float32) -> Run:
    text, (T, B, E, H) = TEXT.read_text(), SIZES.values()
    vocabulary = Vocabulary.of(text)
    batches = ShuffledWindows(vocabulary.encode(text), B, T, seed=0)
    model = LanguageModel(Sizes(len(vocabulary), E, H), T, B, ops=ops, dtype=dtype)
    losses = [float(model.train_step(*batches.batch(*divmod(step, batches.batches_per_epoch)), LEARNING_RATE)["loss"])
              for step in range(steps)]
    return Run(np.array(losses), {name: ops.to_host(array) for name, array in model.params.items()})


def drift(run: Run, other: Run) -> dict[str, float]:
    """The largest difference of a step's loss and that of the last step, relative to the loss; the largest difference
    of a parameter, relative to the largest entry of its array."""
    losses = np.abs(run.losses - other.losses) / other.losses
    weights = (np.abs(run.params[name] - array).max() / np.abs(array).max() for name, array in other.params.items())
    return {"loss": float(losses.max()), "last loss": float(losses[-1]), "weights": float(max(weights))}


def drifts(steps: int, precisions=PRECISIONS, of_kernels=KERNELS) -> Iterator[dict]:
    """For each run its drift from the specification in float64; for the kernels also that from the specification whose
    operands are rounded to the same precision."""
    exact = trained(reference_ops.op_set(), steps, np.float64)
    yield {"precision": "fp32", "run": "CPU", "from": "float64", **drift(trained(cpu, steps), exact)}
    for precision in precisions:
        specified = trained(reference_ops.op_set(precision), steps)
        yield {"precision": precision, "run": "specification", "from": "float64", **drift(specified, exact)}
        for architecture, worst in of_kernels:
            with runtime.use(PtxExecutor(architecture, worst)):
                run = trained(kernels.op_set(precision), steps)
            for start, values in (("float64", exact), ("specification", specified)):
                yield {"precision": precision, "run": f"kernels, {architecture}{', worst' * worst}", "from": start,
                       **drift(run, values)}


def cpu_seconds() -> float:
    """Of this process, and of the compilers that it has run."""
    return sum(os.times()[:4])


def main() -> None:
    facts, entries = machine(), []
    for entry in drifts(STEPS):
        entries.append(entry)
        print(f"{cpu_seconds():5.0f} s  {entry}", flush=True)
    recorded = {"machine": {name: facts[name] for name in ("cpu", "cores", "numpy", "commit", "date")},
                "cpu_seconds": round(cpu_seconds()), "sizes": SIZES | {"steps": STEPS}, "runs": entries}
    (RESULTS / "drift.json").write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
