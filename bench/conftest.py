"""The suite's front end: `python -m pytest bench/` measures, prints and records, with pytest-benchmark's options.

    python -m pytest bench/                                     # all sizes, on a GPU if there is one
    python -m pytest bench/ --device cpu --rounds 3             # a look; fewer than 5 rounds are not recorded
    python -m pytest bench/bench_gru.py --tutorial              # only the tutorial's sizes
    python -m pytest bench/ -k 'adam and PyTorch' --benchmark-sort name --benchmark-json out.json

A test is a candidate, a group the candidates of a benchmark at some sizes. Where several candidates of a group were
selected, its first test measures all of them in turns (bench/side_by_side.py), since their times can be compared only
within a round; pytest-benchmark, which would finish one test before it starts the next, is given the measured seconds
through its timer. A candidate that was selected alone is called and timed by pytest-benchmark itself, unless it is a
single op on a GPU, which only events on the device can time. The results of a group go into bench/results/ if all its
candidates were selected, the rounds are enough, and no candidate of char-gru is wrong; `python -m bench.report`
makes tables and plots from these files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest

from bench import floors, timing
from bench.devices import Cpu, Device, current_gpu
from bench.implementations import OURS
from bench.side_by_side import (
    Benchmark,
    Candidate,
    Clock,
    Failed,
    Measured,
    measure,
    prepare,
)
from char_gru.kernels.runtime import DeviceError

RECORDED_ROUNDS = 5
"""Fewer rounds than these are for trying something out: their results are printed and not recorded."""

_CLOCK = Clock()


class Turn(NamedTuple):
    """The candidate that one test measures, with its benchmark and sizes."""

    benchmark: Benchmark
    sizes: dict[str, int]
    candidate: Candidate

    @property
    def group(self) -> str:
        return self.benchmark.group(self.sizes)


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("char-gru")
    options.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto",
                      help="the device to measure; auto takes an NVIDIA GPU if there is one")
    options.addoption("--rounds", type=int, default=7,
                      help=f"rounds of each benchmark; fewer than {RECORDED_ROUNDS} are printed and not recorded")
    options.addoption("--tutorial", action="store_true", help="only the first of each benchmark's sizes")
    options.addoption("--results", default=timing.RESULTS, type=timing.Path, help="folder of the recorded results")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("filterwarnings", "default")  # a library's warning is no failure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("side_by_side")
    if marker is None:
        return
    [benchmark] = marker.args
    device = _device(metafunc.config.getoption("device"))
    turns = [Turn(benchmark, sizes, candidate)
             for sizes in benchmark.sizes_on(device)[:1 if metafunc.config.getoption("tutorial") else None]
             for candidate in benchmark.candidates(device, **sizes)]
    metafunc.parametrize("turn", indirect=True, argvalues=[
        pytest.param(turn, id=f"{turn.group.removeprefix(benchmark.name + ' ')}-{turn.candidate.name}",
                     marks=pytest.mark.benchmark(group=turn.group, timer=_CLOCK.now))
        for turn in turns])


@pytest.fixture
def turn(request: pytest.FixtureRequest, benchmark) -> Callable[[], None]:
    """A function that measures a test's candidate, or takes its seconds from the measurement of its group."""
    turn: Turn = request.param

    def measured_turn() -> None:
        group = _group(request, turn, may_be_alone=benchmark.enabled)
        outcome = group.outcomes.get(turn.candidate.name)
        if isinstance(outcome, Failed):
            raise outcome.error
        if outcome is None:
            outcome = group.outcomes[turn.candidate.name] = _measured_by(benchmark, turn, group)
            _record(request.config, group)
        else:
            with _CLOCK.replay(outcome.seconds) as advance:
                benchmark.pedantic(advance, rounds=len(outcome.seconds))

    return measured_turn


class Group(NamedTuple):
    """The selected candidates of a benchmark at some sizes, and the outcomes so far, by name."""

    turns: list[Turn]
    device: Device
    rounds: int
    ceilings: floors.Ceilings
    outcomes: dict[str, Measured | Failed]


_GROUPS = pytest.StashKey[dict]()


def _group(request: pytest.FixtureRequest, turn: Turn, may_be_alone: bool) -> Group:
    """The group of a test, its candidates measured in turns unless pytest-benchmark may time the only one."""
    config, stash = request.config, request.config.stash.setdefault(_GROUPS, {})
    if turn.group not in stash:
        turns = [other for other in map(_turn_of, request.session.items) if other and other.group == turn.group]
        device, rounds = _device(config.getoption("device")), config.getoption("rounds")
        group = stash[turn.group] = Group(turns, device, rounds, _ceilings(device), {})
        by_clock = device.kind == "cpu" or turn.benchmark.whole_job
        if len(turns) > 1 or not (may_be_alone and by_clock):
            candidates = [other.candidate for other in turns]
            group.outcomes.update(measure(turn.benchmark, turn.sizes, candidates, device, rounds))
            _record(config, group)
    return stash[turn.group]


def _measured_by(benchmark, turn: Turn, group: Group) -> Measured:
    """A candidate that is alone in its group, called and timed by pytest-benchmark."""
    inputs = turn.benchmark.inputs(**turn.sizes)
    made = prepare(turn.benchmark, turn.sizes, turn.candidate, group.device, inputs, turn.benchmark.reference(inputs))
    _CLOCK.synchronize = group.device.synchronize
    benchmark.pedantic(lambda: next(made.runs)(), rounds=group.rounds, iterations=made.calls)
    return Measured(list(benchmark.stats.stats.data), False, made.notes)


def _record(config: pytest.Config, group: Group) -> None:
    """Keep the results of a group that ran whole, with enough rounds, and with no candidate of char-gru wrong."""
    benchmark, sizes = group.turns[0].benchmark, group.turns[0].sizes
    whole = {candidate.name for candidate in benchmark.candidates(group.device, **sizes)} == group.outcomes.keys()
    measured = {name: outcome for name, outcome in group.outcomes.items() if isinstance(outcome, Measured)}
    ours_right = all(name in measured for name in group.outcomes if name.startswith(OURS))
    if whole and measured and ours_right and group.rounds >= RECORDED_ROUNDS:
        precisions = {turn.candidate.name: turn.candidate.precision for turn in group.turns}
        timing.record(benchmark.group(sizes),
                      timing.entry(benchmark, sizes, group.device, group.ceilings, measured, precisions),
                      config.getoption("results"))


def _turn_of(item: pytest.Item) -> Turn | None:
    return item.callspec.params.get("turn") if hasattr(item, "callspec") else None


@functools.cache
def _device(kind: str) -> Device:
    """The device of an option.

    Raises: pytest.UsageError for cuda where there is no GPU.
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
    """The ceilings of a device, measured once, in the same run as the candidates."""
    return device.ceilings()
