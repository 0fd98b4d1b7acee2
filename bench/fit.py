"""The terms of predicted times that a GPU's recorded results give: `python -m bench.fit bench/results/FILE.json`.

Prints each term of kernels/plan/costs.py as it is predicted and as it is measured; the line of kernels/plan/gpus.py
with the measured ones; and, of every op, of a training step and of writing text, the measured time beside the time that
both lines predict. Terms in cycles are nominal: at the clock rate of kernels/plan/gpus.py.

    memory, launch_us, barrier, chain, l2_latency   the ceilings, measured in the same run
    multiply                                        our multistage kernel's dW_hh at the tutorial's sizes
    l2, exposed                                     the pair with which the persistent recurrences are predicted best:
                                                    least squares of the logarithms of predicted / measured
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import tutorial
from bench.floors import Ceilings
from bench.implementations import OURS
from char_gru.kernels.plan.costs import Rates
from char_gru.kernels.plan.generation import WEIGHTS, character_parts, generation_plan
from char_gru.kernels.plan.gpus import GPU, rates_of
from char_gru.kernels.plan.products import product_plan
from char_gru.kernels.plan.recurrence import backward_plan, forward_plan
from char_gru.kernels.plan.training_step import training_step
from char_gru.kernels.sizes import ceil_div

L2 = range(8, 65)  # bytes per cycle that are tried
EXPOSED = tuple(share / 10 for share in range(11))  # shares that are tried
TUTORIAL = {"T": tutorial.T, "B": tutorial.B, **{axis: getattr(tutorial.SIZES, axis) for axis in "VEH"}}


def gpu_of(entry: dict) -> GPU:
    """The GPU that an entry was measured on.

    Raises: ValueError where it was no GPU.
    """
    facts = entry["machine"]
    if "gpu" not in facts:
        raise ValueError("these are results of a CPU")
    return GPU(facts["gpu"], *(facts[name] for name in GPU._fields[1:]))


def fitted(groups: dict[str, dict]) -> Rates:
    """The terms that results give; those that no result gives are as they are predicted."""
    entry = next(iter(groups.values()))
    gpu, ceilings = gpu_of(entry), Ceilings(**entry["ceilings"])
    rates = rates_of(gpu)
    hertz = rates.gigahertz * 1e9
    measured = {"memory": ceilings.bytes_per_second / (gpu.multiprocessors * hertz),
                "launch_us": ceilings.launch_seconds * 1e6, "barrier": ceilings.barrier_seconds * hertz,
                "chain": ceilings.exchange_seconds * hertz, "l2_latency": ceilings.load_seconds * hertz}
    rates = rates._replace(**{name: value for name, value in measured.items() if value > 0})
    rates = rates._replace(multiply=rates.multiply | dict(_multiplied(gpu, groups, rates)))
    recurrences = [(*job, seconds) for *job, seconds in _measured(gpu, groups) if job[0].startswith("gru_")]
    if not recurrences:
        return rates

    def error(pair: tuple[float, float]) -> float:
        tried = rates._replace(l2=pair[0], exposed=pair[1])
        return sum(math.log(predicted_seconds(gpu, *job, tried) / seconds)**2 for *job, seconds in recurrences)

    l2, exposed = min(itertools.product(L2, EXPOSED), key=error)
    return rates._replace(l2=l2, exposed=exposed)


def _multiplied(gpu: GPU, groups: dict[str, dict], rates: Rates) -> Iterator[tuple[str, float]]:
    """Precision, and multiply-adds per cycle of a multiprocessor in the multistage kernel's largest product."""
    for entry in groups.values():
        if entry["benchmark"] != "matmul" or not entry["tutorial"]:
            continue
        M, N, K = (entry["sizes"][axis] for axis in "MNK")
        for precision in rates.multiply:
            stored = precision == "bf16"  # the operands of dW_hh are bfloat16 bits then
            made = entry["candidates"].get(f"{OURS} multistage {precision}{' operands' * stored}")
            if made:
                plan = product_plan(gpu, M, N, K, precision, 2 if stored else 4, True, "multistage")
                cycles = statistics.median(made["seconds"]) * rates.gigahertz * 1e9 - rates.launch
                of_each = ceil_div(math.prod(plan.grid(M, N)), gpu.multiprocessors)
                yield precision, of_each * plan.TILE_M * plan.TILE_N * plan.K_split / cycles


def predicted_seconds(gpu: GPU, name: str, precision: str, sizes: dict[str, int], rates: Rates) -> float:
    """The predicted time of a benchmark: train_step, generate, or an op of a training step."""
    if name == "generate":
        T, R, V, H = (sizes[axis] for axis in "TRVH")
        parts = character_parts(gpu, generation_plan(gpu, R, V, H, 1, precision), R, V, H, 1, rates)
        return rates.microseconds(T * parts.cycles + rates.launch) / 1e6
    launches = training_step(gpu, **sizes, layers=1, precision=precision, rates=rates)
    return sum(row.us for row in launches if name in (row.op, "train_step")) / 1e6


def _measured(gpu: GPU, groups: dict[str, dict]) -> Iterator[tuple[str, str, dict[str, int], float]]:
    """Benchmark, precision, all sizes, and the median of the seconds of the variant that the plan takes."""
    ops = {row.op for row in training_step(gpu, 1, 1, 1, 1, 1, 1, "fp32")}
    for entry in groups.values():
        name, sizes = entry["benchmark"], dict(entry["sizes"])
        if name not in ops | {"train_step", "generate"}:
            continue
        if name.startswith("input_table"):
            sizes["V"] = sizes.pop("N")
        sizes.pop("N", None)  # of parameters: those of the tutorial's sizes
        if name != "generate":
            sizes = TUTORIAL | sizes
        for precision in rates_of(gpu).multiply:
            words = [OURS, _variant(gpu, name, precision, sizes), precision]
            made = entry["candidates"].get(" ".join(filter(None, words)))
            if made:
                yield name, precision, sizes, statistics.median(made["seconds"])


def _variant(gpu: GPU, name: str, precision: str, sizes: dict[str, int]) -> str:
    """The variant that the plan takes, as candidates are named; empty where there is one only."""
    if name == "generate":
        weights = precision if precision in WEIGHTS else "fp32"  # there is no candidate in tf32
        return generation_plan(gpu, *(sizes[axis] for axis in "RVH"), 1, weights).variant
    if name == "gru_forward":
        return forward_plan(gpu, sizes["B"], sizes["H"], precision).variant
    if name == "gru_backward":
        V = sizes["V"]
        return backward_plan(gpu, sizes["B"], sizes["H"], precision, V_out=V, V_in=V).variant
    return ""


def lines(groups: dict[str, dict]) -> Iterator[str]:
    """What the command prints.

    Raises: ValueError as `gpu_of`.
    """
    gpu = gpu_of(next(iter(groups.values())))
    predicted, rates = rates_of(gpu), fitted(groups)
    yield f"{gpu.name}, {gpu.multiprocessors} multiprocessors"
    yield ""
    term = "{:<18}{:>12}{:>12}".format
    yield term("term", "predicted", "measured")
    for name, before, after in zip(Rates._fields, predicted, rates):
        values = {name: (before, after)} if name != "multiply" else {
            f"multiply {precision}": (before[precision], after[precision]) for precision in before}
        for label, pair in values.items():
            yield term(label, *(f"{value:.4g}" for value in pair))
    yield ""
    rounded = {name: {precision: float(f"{rate:.3g}") for precision, rate in value.items()} if name == "multiply" else
               float(f"{value:.4g}") for name, value in rates._asdict().items()}
    yield f"    {gpu.capability}: Rates({', '.join(f'{name}={value}' for name, value in rounded.items())}),"
    yield ""
    row = "{:<22}{:<6}{:<34}{:>10}{:>10}{:>10}{:>8}".format
    yield row("milliseconds", "", "sizes", "predicted", "fitted", "measured", "ratio")
    for name, precision, sizes, seconds in _measured(gpu, groups):
        before, after = (predicted_seconds(gpu, name, precision, sizes, used) for used in (predicted, rates))
        yield row(name, precision, " ".join(f"{axis}={size}" for axis, size in sizes.items()),
                  *(f"{1e3 * value:.4g}" for value in (before, after, seconds)), f"{seconds / before:.2f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the terms. Exit status 0, or 2 with a line that says why there are none."""
    parser = argparse.ArgumentParser(prog="python -m bench.fit", description="Fit the terms of predicted times.")
    parser.add_argument("results", type=Path, help="a file of bench/results, of a GPU")
    path = parser.parse_args(arguments).results
    try:
        print("\n".join(lines(json.loads(path.read_text()))))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {path}: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
