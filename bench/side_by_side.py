"""An op, its candidates, and measuring them in turns.

A benchmark is an op with the ways to compute it: char-gru's variants, other libraries, plain array code. At each of its
sizes, every candidate is first verified against the reference; a candidate that is wrong or fails is not timed, and its
test fails. The right candidates are then timed in turns, all of them within each round, so that a machine that slows
down slows all of them. conftest.py says how pytest-benchmark, the front end, takes part.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from bench.devices import Device, Sample
from bench.floors import Work

PAUSE_SECONDS = {"cpu": 0.1, "cuda": 0.002}
"""Rest before each sample: the worker threads of BLAS libraries spin for a while after the product that woke them."""

SAMPLE_SECONDS, JOB_SECONDS = {"cpu": 0.02, "cuda": 0.001}, 0.05
"""The least seconds of a sample of an op, by device, and of a whole job: many times the error of clocks and events."""

MAX_CALLS, MAX_SETS = 1000, 64
"""The most calls of a sample, and the most sets of arrays that they take in turn."""

TOLERANCES = {"fp32": 2**-13, "tf32": 2**-7, "bf16": 2**-4}
"""How far a result may lie from the reference, as a share of the largest entry. Bounds for plainly wrong results, over
sums as long as a benchmark's; tests/ holds the bounds that rounding allows."""

Arrays = Mapping[str, np.ndarray]

Result = TypeVar("Result")


class Runnable(NamedTuple):
    """A candidate on arrays of its own. run() queues or does the work; results() does it once and gives the results to
    be verified, as NumPy arrays; notes(), called after results(), gives further numbers to record."""

    run: Callable[[], object]
    results: Callable[[], Arrays]
    notes: Callable[[], dict[str, float]] = dict


class Candidate(NamedTuple):
    """A way to compute an op: its name in tables, the precision of its products, and the function that makes its
    Runnable from the inputs."""

    name: str
    precision: str
    make: Callable[[Arrays], Runnable]


class Benchmark(NamedTuple):
    """An op with its candidates, and the sizes at which it is measured.

    work, inputs and candidates are functions of the sizes by name; candidates also takes the device. reference maps the
    inputs to the expected results; a candidate's results are some or all of these. The first of the sizes are the
    tutorial's; cpu_sizes, if there are any, take the place of all sizes on a CPU. whole_job: timed by the host's clock,
    not by events, and on one set of arrays.
    """

    name: str
    work: Callable[..., Work]
    inputs: Callable[..., Arrays]
    reference: Callable[[Arrays], Arrays]
    candidates: Callable[..., Iterable[Candidate]]
    sizes: Sequence[Mapping[str, int]]
    cpu_sizes: Sequence[Mapping[str, int]] = ()
    whole_job: bool = False
    tolerances: Mapping[str, float] = TOLERANCES

    def sizes_on(self, device: Device) -> Sequence[Mapping[str, int]]:
        """The sizes at which the benchmark is measured on a device."""
        return self.cpu_sizes if device.kind == "cpu" and self.cpu_sizes else self.sizes

    def group(self, sizes: Mapping[str, int]) -> str:
        """The name of the benchmark at some sizes."""
        return " ".join([self.name, *(f"{axis}={size}" for axis, size in sizes.items())])


class Measured(NamedTuple):
    """What was measured of one candidate: seconds of a call in each round; whether the host was slower than the device
    in some round; and notes: the candidate's own and, of a whole job on a GPU, `memory_mib`, the memory that it takes
    from its making to its verification."""

    seconds: list[float]
    host_bound: bool
    notes: dict[str, float]


class Failed(NamedTuple):
    """Why a candidate was not timed."""

    error: Exception


def measure(benchmark: Benchmark, sizes: Mapping[str, int], candidates: Sequence[Candidate], device: Device,
            rounds: int, pause: Callable[[float], None] = time.sleep) -> dict[str, Measured | Failed]:
    """Verify candidates, then time the right ones in turns; outcomes by name."""
    inputs = benchmark.inputs(**sizes)
    expected = benchmark.reference(inputs)
    outcomes: dict[str, Measured | Failed] = {}
    prepared: dict[str, Prepared] = {}
    for candidate in candidates:
        try:
            prepared[candidate.name] = prepare(benchmark, sizes, candidate, device, inputs, expected)
        except Exception as error:  # noqa: BLE001 any error: the other candidates are measured all the same
            outcomes[candidate.name] = Failed(error)
    samplers = {name: functools.partial(sample, device, made) for name, made in prepared.items()}
    samples = interleave(samplers, rounds, lambda: pause(PAUSE_SECONDS[device.kind]))
    return outcomes | {
        name: Measured([sample.seconds for sample in row], any(sample.host_bound for sample in row),
                       prepared[name].notes) for name, row in samples.items()}


class Prepared(NamedTuple):
    """A candidate that was verified: its runs, to be called in turn, how many calls a sample takes, and its notes;
    by_clock: whether its time is taken by the host's clock."""

    runs: Iterator[Callable[[], object]]
    calls: int
    by_clock: bool
    notes: dict[str, float]


def prepare(benchmark: Benchmark, sizes: Mapping[str, int], candidate: Candidate, device: Device, inputs: Arrays,
            expected: Arrays) -> Prepared:
    """Make and verify a candidate, and find out how many calls a sample takes.

    An op is called on other arrays from call to call, so that each array has left the cache when it comes again.

    Raises: AssertionError for a candidate that is wrong; any error of the candidate.
    """
    before = device.memory_bytes(release=True) if benchmark.whole_job else 0
    runnable = candidate.make(inputs)
    assert_right(candidate.name, runnable.results(), expected, benchmark.tolerances[candidate.precision])
    notes, rotation = runnable.notes(), [runnable]
    if benchmark.whole_job:
        taken = device.memory_bytes(release=False) - before
        notes |= {"memory_mib": taken / 2**20} if taken else {}
        once, shortest = device.clock_sample([runnable.run]).seconds, JOB_SECONDS
    else:
        copies = copies_beyond_cache(benchmark.work(**sizes).bytes, device.cache_bytes)
        rotation += [candidate.make(inputs) for _ in range(copies - 1)]
        for made in (*rotation, *rotation):  # compiles, fills caches of plans, records graphs
            made.run()
        once, shortest = device.sample([runnable.run]).seconds, SAMPLE_SECONDS[device.kind]
    calls = max(1, min(math.ceil(shortest / once), MAX_CALLS))
    return Prepared(itertools.cycle([made.run for made in rotation]), calls,
                    benchmark.whole_job or device.kind == "cpu", notes)


def sample(device: Device, prepared: Prepared) -> Sample:
    """One sample of a candidate."""
    calls = [next(prepared.runs) for _ in range(prepared.calls)]
    return (device.clock_sample if prepared.by_clock else device.sample)(calls)


def assert_right(name: str, actual: Arrays, expected: Arrays, tolerance: float) -> None:
    """Assert that results have the reference's shapes and lie within the tolerance of it.

    Raises: AssertionError.
    """
    assert actual, f"{name}: nothing to verify"
    for key, result in actual.items():
        exact, result = expected[key], np.asarray(result)
        assert result.shape == np.shape(exact), f"{name}: {key} has shape {result.shape}, not {np.shape(exact)}"
        error = np.abs(result.astype(np.float64) - exact).max()
        allowed = tolerance * np.abs(exact).max()
        assert error <= allowed, f"{name}: {key} errs by {error:.3g}, allowed {allowed:.3g}"  # NaN is not <=


def copies_beyond_cache(size: int, cache_bytes: int) -> int:
    """How many copies of an op's arrays, of so many bytes, to take in turn so that each has left the cache when it
    comes: between two calls on the same copy, the calls on the other copies move more than twice the cache's bytes."""
    return min(math.ceil(2 * cache_bytes / size) + 1, MAX_SETS) if size < 2 * cache_bytes else 1


def interleave(candidates: Mapping[str, Callable[[], Result]], rounds: int,
               pause: Callable[[], None]) -> dict[str, list[Result]]:
    """The result of each candidate in each round.

    In a round each candidate is called once, and each round starts with the next candidate. Entry k of every list is
    from round k: ratios are taken within a round.
    """
    names = list(candidates)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % max(len(names), 1)
        for name in names[first:] + names[:first]:
            pause()
            results[name].append(candidates[name]())
    return results


class Clock:
    """The timer that pytest-benchmark reads: seconds since some start, or, while `replay` plays, seconds that were
    measured before."""

    def __init__(self) -> None:
        self._played: float | None = None
        self.synchronize: Callable[[], None] = lambda: None

    def now(self) -> float:
        if self._played is not None:
            return self._played
        self.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def replay(self, seconds: Iterable[float]) -> Iterator[Callable[[], None]]:
        """Inside the `with` block, the k-th call of the function takes as long as the k-th entry."""
        remaining, self._played = iter(seconds), 0.0

        def advance() -> None:
            self._played += next(remaining)

        try:
            yield advance
        finally:
            self._played = None
