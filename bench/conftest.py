"""The suite's front end: `python -m pytest bench/` measures, prints and records, with pytest-benchmark's options.

    python -m pytest bench/                                     # default sizes, on a GPU if there is one
    python -m pytest bench/ --device cpu --rounds 3             # a look; fewer than 5 rounds are not recorded
    python -m pytest bench/bench_gru.py --sizes all             # the whole sweep
    python -m pytest bench/ -k 'adam and PyTorch' --benchmark-sort name --benchmark-json out.json

A test is a candidate, a group the candidates of a benchmark at some sizes. The first test of a group measures all of
those that were selected, in turns (bench/side_by_side.py), and each test plays its seconds back to pytest-benchmark. A
group that ran whole, with enough rounds and none of ours wrong, goes into bench/results/, from which
`python -m bench.report` writes README's tables and the plots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from bench import floors, timing
from bench.devices import Cpu, Device, current_gpu
from bench.implementations import OURS
from bench.side_by_side import SIZES, Benchmark, Candidate, Failed, Measured, ReplayedClock, measure
from char_gru.kernels.runtime import DeviceError

RECORDED_ROUNDS = 5
"""Fewer rounds than these are for trying something out: their results are printed and not recorded."""

_CLOCK = ReplayedClock()


class Turn(NamedTuple):
    """What one test measures."""

    benchmark: Benchmark
    sizes: dict[str, int]
    candidate: Candidate

    @property
    def group(self) -> str:
        return self.benchmark.group(self.sizes)


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("char-gru")
    options.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto",
                      help="what to measure; auto takes an NVIDIA GPU if there is one")
    options.addoption("--rounds", type=int, default=7,
                      help=f"rounds of each benchmark; fewer than {RECORDED_ROUNDS} are printed and not recorded")
    options.addoption("--sizes", choices=SIZES, default="default",
                      help="tutorial: the first of each benchmark's sizes; all: the whole sweep")
    options.addoption("--results", default=timing.RESULTS, type=timing.Path, help="folder of the recorded results")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("filterwarnings", "default")  # those of libraries are no failures


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("side_by_side")
    if marker is None:
        return
    [benchmark] = marker.args
    device = _device(metafunc.config.getoption("device"))
    turns = [Turn(benchmark, sizes, candidate)
             for sizes in benchmark.sizes_on(device, metafunc.config.getoption("sizes"))
             for candidate in benchmark.candidates(device, **sizes)]
    metafunc.parametrize("turn", indirect=True, argvalues=[
        pytest.param(turn, id=f"{turn.group.removeprefix(benchmark.name + ' ')}-{turn.candidate.name}",
                     marks=pytest.mark.benchmark(group=turn.group, timer=_CLOCK.now))
        for turn in turns])


@pytest.fixture
def turn(request: pytest.FixtureRequest, benchmark) -> Callable[[], None]:
    """A function that measures a test's candidate, or takes its part of what was measured with its group."""
    turn: Turn = request.param

    def measured_turn() -> None:
        outcome, ceilings = _outcomes(request, turn.group)[turn.candidate.name]
        if isinstance(outcome, Failed):
            raise outcome.error
        benchmark.extra_info.update(_figures(turn, outcome, ceilings))
        benchmark.pedantic(_CLOCK.replay(outcome.seconds), rounds=len(outcome.seconds))

    return measured_turn


_GROUPS = pytest.StashKey[dict]()


def _outcomes(request: pytest.FixtureRequest, group: str) -> dict[str, tuple[Measured | Failed, floors.Ceilings]]:
    """What was measured of all selected candidates of a group, measured now if it was not before."""
    config, stash = request.config, request.config.stash.setdefault(_GROUPS, {})
    if group not in stash:
        turns = [turn for turn in map(_turn_of, request.session.items) if turn is not None and turn.group == group]
        benchmark, sizes, candidates = turns[0].benchmark, turns[0].sizes, [turn.candidate for turn in turns]
        device, rounds = _device(config.getoption("device")), config.getoption("rounds")
        ceilings = _ceilings(device)
        outcomes = measure(benchmark, sizes, candidates, device, rounds)
        stash[group] = {name: (outcome, ceilings) for name, outcome in outcomes.items()}
        whole = {candidate.name for candidate in benchmark.candidates(device, **sizes)} == outcomes.keys()
        measured = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Measured)}
        ours_right = all(name in measured for name in outcomes if name.startswith(OURS))
        if whole and measured and ours_right and rounds >= RECORDED_ROUNDS:
            precisions = {candidate.name: candidate.precision for candidate in candidates}
            timing.record(group, timing.entry(benchmark, sizes, device, ceilings, measured, precisions),
                          config.getoption("results"))
    return stash[group]


def _turn_of(item: pytest.Item) -> Turn | None:
    return item.callspec.params.get("turn") if hasattr(item, "callspec") else None


@pytest.fixture
def record_figure(pytestconfig: pytest.Config) -> Callable[..., None]:
    """A function of a name and figures that are no times: records them, where times would be."""
    def record(name: str, **figures: float) -> None:
        print(name, figures)
        if pytestconfig.getoption("rounds") >= RECORDED_ROUNDS:
            device = _device(pytestconfig.getoption("device"))
            timing.record(name, timing.figure_entry(name, device, **figures), pytestconfig.getoption("results"))

    return record


@functools.cache
def _device(kind: str) -> Device:
    """The device of an option.

    Raises: pytest.UsageError where there is no GPU and one was asked for.
    """
    if kind != "cpu":
        try:
            return current_gpu()
        except DeviceError as error:
            if kind == "cuda":
                raise pytest.UsageError(f"--device cuda: {error}") from None
    return Cpu()


@functools.cache
def _ceilings(device: Device) -> floors.Ceilings:
    """Measured once, in the same run as what they are compared with."""
    return device.ceilings()


def _figures(turn: Turn, outcome: Measured, ceilings: floors.Ceilings) -> dict[str, float]:
    """What pytest-benchmark saves beside the seconds."""
    work, seconds = turn.benchmark.work(**turn.sizes), float(np.median(outcome.seconds))
    return {"GB/s": work.bytes / seconds / 1e9, "GFLOP/s": work.flop / seconds / 1e9,
            "of floor": seconds / floors.floor_seconds(work, ceilings, turn.candidate.precision),
            "host_bound": outcome.host_bound, **outcome.notes}
