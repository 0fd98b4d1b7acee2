"""The benchmark suite's own logic: verification, turns, clocks and events, ceilings, floors, records, the front end."""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from bench import (
    bench_generate,
    bench_gru,
    bench_train_step,
    devices,
    floors,
    implementations,
    peers,
    side_by_side,
    timing,
)
from bench.devices import Cpu, Gpu, Sample, queued_sample
from bench.side_by_side import Benchmark, Candidate, Failed, Measured, Runnable, measure
from char_gru.kernels import runtime
from tests import host_cuda

ROOT = Path(__file__).parent.parent

TINY = {"T": 3, "B": 2, "V": 9, "E": 5, "H": 8, "N": 304, "M": 24, "K": 40, "R": 9, "I": 6}

MODULES = ("matmul", "input_table", "gru", "cross_entropy", "adam", "dropout", "sample", "train_step", "generate")

BENCHMARKS = {
    value.name: value for module in MODULES for value in vars(importlib.import_module(f"bench.bench_{module}")).values()
    if isinstance(value, Benchmark)}


class FakeDriver:
    """A GPU whose host queues a call in `host_seconds`, while each call takes the device `seconds`."""

    l2_bytes = 1000

    def __init__(self, host_seconds=0.0, seconds=1e-3):
        self._host_seconds, self._seconds = host_seconds, seconds
        self.host = self.device = 0.0
        self.waits = []

    def call(self):
        self.host += self._host_seconds
        self.device = max(self.device, self.host) + self._seconds

    def wait(self, seconds):
        self.waits.append(seconds)
        self.device = max(self.device, self.host) + seconds

    def record(self):
        return max(self.device, self.host)

    def passed(self, event):
        return event <= self.host

    def seconds(self, start, end):
        self.host = max(self.host, end)
        return end - start

    def synchronize(self):
        pass

    def memory_bytes(self, release):
        return 0 if release else 3 * 2**20


def fake_gpu(executor) -> Gpu:
    """The harness as a GPU, timed by a driver for which everything takes equally long."""
    driver = FakeDriver()
    products = {"fp32": (driver.call, 2e9), "bf16": (driver.call, 4e9)}
    return Gpu(executor, Ticking(driver), lambda: products, {"cupy": "0"})


class Ticking:
    """A driver in which a millisecond lies between two events, whatever was queued."""

    def __init__(self, driver):
        self._driver, self._ticks = driver, itertools.count()

    def __getattr__(self, name):
        return getattr(self._driver, name)

    def record(self):
        return next(self._ticks)

    def passed(self, event):
        return False

    def seconds(self, start, end):
        return 1e-3 * (end - start)


@pytest.fixture
def harness():
    """Runs the launches of a test on the CPU, on a machine with a GPU too."""
    if host_cuda.compiler() is None:
        pytest.skip("the kernels run on the CPU only where there is a C++ compiler")
    with runtime.use(host_cuda.HostExecutor()) as executor:
        yield executor


def tiny(benchmark: Benchmark) -> dict[str, int]:
    return {axis: TINY[axis] for axis in benchmark.sizes[0]}


def one_call_a_sample(monkeypatch) -> None:
    monkeypatch.setattr(side_by_side, "SAMPLE_SECONDS", {"cpu": 1e-9, "cuda": 1e-9})
    monkeypatch.setattr(side_by_side, "JOB_SECONDS", 1e-9)
    monkeypatch.setattr(side_by_side, "MAX_SETS", 2)


def measured(benchmark, device, chosen=lambda name: True, **other_sizes):
    candidates = benchmark.candidates(device, **tiny(benchmark) | other_sizes)
    return measured_candidates(benchmark, device, [made for made in candidates if chosen(made.name)], **other_sizes)


def measured_candidates(benchmark, device, candidates, **other_sizes):
    sizes = tiny(benchmark) | other_sizes
    outcomes = measure(benchmark, sizes, candidates, device, rounds=2, pause=lambda seconds: None)
    for outcome in outcomes.values():
        if isinstance(outcome, Failed):
            raise outcome.error
    assert all(len(outcome.seconds) == 2 for outcome in outcomes.values())
    return outcomes


@pytest.mark.parametrize("name", BENCHMARKS)
def test_candidates_on_the_cpu_compute_what_the_reference_does(name, monkeypatch):
    one_call_a_sample(monkeypatch)
    chosen = measured(BENCHMARKS[name], Cpu(), lambda name: name in ("char-gru", "NumPy"))
    assert chosen


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name == "generate")) for name in BENCHMARKS])
def test_candidates_on_the_harness_compute_what_the_reference_does(harness, name, monkeypatch):
    """CuPy's array code runs as well, on NumPy in its place."""
    one_call_a_sample(monkeypatch)
    numpy_as_cupy = types.SimpleNamespace(**vars(np), asnumpy=np.array)
    monkeypatch.setattr(implementations, "_cupy", lambda: numpy_as_cupy)
    monkeypatch.setattr(implementations, "cublas_matmul", lambda A, B, C, precision: np.matmul(A, B, out=C))
    outcomes = measured(BENCHMARKS[name], fake_gpu(harness), lambda name: name.startswith(("char-gru", "CuPy")))
    chosen = {name: outcome for name, outcome in outcomes.items() if name.startswith("char-gru")}
    assert chosen
    has_twin = name not in ("generate", "dropout_forward", "dropout_backward")
    assert (next(iter(chosen)) == "char-gru naive fp32") is has_twin
    if name in ("gru_forward", "gru_backward", "generate"):
        variants = {"stepwise", "persistent"} | (
            {"batched"} if name == "generate" else {"naive"})
        assert variants == {variant.split()[1] for variant in chosen}
        assert {"fp32", "bf16"} <= {variant.split()[2] for variant in chosen}
    if BENCHMARKS[name].whole_job:
        assert {outcome.notes["memory_mib"] for outcome in chosen.values()} == {3}


@pytest.mark.slow
def test_variants_of_one_row_of_text_compute_what_the_reference_does(harness, monkeypatch):
    one_call_a_sample(monkeypatch)
    outcomes = measured(BENCHMARKS["generate"], fake_gpu(harness), lambda name: name.startswith("char-gru"), R=1)
    assert {name.split()[1] for name in outcomes} == {"one-text", "persistent", "stepwise"}


def test_modules_for_pytorch_compute_what_the_reference_does(monkeypatch):
    pytest.importorskip("torch")
    one_call_a_sample(monkeypatch)
    benchmark = importlib.import_module("bench.bench_gru_module").GRU_MODULE
    outcomes = measured(benchmark, Cpu(), lambda name: True)
    assert list(outcomes) == ["char-gru", "PyTorch"]


def test_sizes_of_a_benchmark_are_distinct_and_the_cpu_may_have_its_own():
    for benchmark in BENCHMARKS.values():
        sizes = benchmark.sizes_on(Cpu())
        assert len({benchmark.group(size) for size in sizes}) == len(sizes)
        assert benchmark._replace(cpu_sizes=({"T": 1},)).sizes_on(Cpu()) == ({"T": 1},)


# Verification and turns

def constant(name, value, order=None):
    """A candidate whose result is constant."""
    def make(inputs):
        return Runnable(lambda: order.append(name) if order is not None else None,
                        lambda: {"y": np.float32(value) * np.ones(3)})

    return Candidate(name, "fp32", make)


def doubled(candidates, **options) -> Benchmark:
    return Benchmark("doubled", lambda n: floors.Work(0, 8 * n), lambda n: {"x": np.ones(n)},
                     lambda inputs: {"y": np.full(3, 2.0)}, lambda device, n: candidates, sizes=({"n": 3},), **options)


@pytest.mark.parametrize("wrong", [2.001, np.nan, -2, 0])
def test_wrong_candidate_is_not_timed_and_the_others_are(wrong):
    candidates = [constant("right", 2), constant("wrong", wrong)]
    outcomes = measure(doubled(candidates), {"n": 3}, candidates, Cpu(), 2, pause=lambda seconds: None)
    assert isinstance(outcomes["right"], Measured)
    assert isinstance(outcomes["wrong"].error, AssertionError)


def test_candidate_that_fails_or_verifies_nothing_is_left_out():
    def failing(inputs):
        raise RuntimeError("no such library")

    candidates = [Candidate("failing", "fp32", failing),
                  Candidate("silent", "fp32", lambda inputs: Runnable(lambda: None, dict))]
    outcomes = measure(doubled(candidates), {"n": 3}, candidates, Cpu(), 2, pause=lambda seconds: None)
    assert [str(outcome.error) for outcome in outcomes.values()] == ["no such library", "silent: nothing to verify"]


def test_every_round_times_each_candidate_once_and_starts_with_another():
    calls = []
    results = side_by_side.interleave({name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}, 4,
                                      pause=lambda: None)
    assert "".join(calls) == "abc" "bca" "cab" "abc"
    assert results == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


@pytest.mark.parametrize("nbytes, cache, copies", [
    (100, 0, 1), (100, 50, 1), (100, 51, 3), (100, 1000, 21), (1, 10**6, 64)])
def test_copies_are_more_than_the_cache_holds_twice(nbytes, cache, copies):
    assert side_by_side.copies_beyond_cache(nbytes, cache) == copies


def test_calls_of_a_sample_go_through_all_copies_in_turn(harness):
    calls, made = [], itertools.count()

    def make(inputs):
        k = next(made)
        return Runnable(lambda: calls.append(k), lambda: {"y": np.full(3, 2.0)})

    candidate = Candidate("counting", "fp32", make)
    device = fake_gpu(harness)
    device.cache_bytes = 24
    prepared = side_by_side.prepare(doubled([candidate]), {"n": 3}, candidate, device, {}, {"y": np.full(3, 2.0)})
    assert calls == [0, 1, 2, 0, 1, 2, 0]
    assert prepared.calls == 1
    assert side_by_side.sample(device, prepared) == Sample(1e-3, False)
    assert calls[7:] == [0]


# Clocks, events, ceilings

@pytest.mark.parametrize("host_seconds, waits", [(0, 1), (1e-4, 2), (1e-3, 4)])
def test_wait_is_made_longer_until_the_host_is_ahead(host_seconds, waits):
    driver = FakeDriver(host_seconds)
    sample = queued_sample(driver, [driver.call] * 10)
    assert sample == Sample(pytest.approx(1e-3), False)
    assert driver.waits == list(devices.WAITS[:waits])


def test_host_that_is_never_ahead_is_reported():
    driver = FakeDriver(host_seconds=1.0)
    assert queued_sample(driver, [driver.call] * 10).host_bound
    assert driver.waits == list(devices.WAITS)


def test_ceilings_of_a_gpu_come_from_its_events(harness, monkeypatch):
    monkeypatch.setattr(devices, "COPIED_BYTES", 4096)
    monkeypatch.setattr(devices, "PROBE_LAUNCHES", 3)
    monkeypatch.setattr(devices, "PROBE_BARRIERS", 20)
    monkeypatch.setattr(devices, "PROBE_LOADS", 50)
    ceilings = fake_gpu(harness).ceilings()
    assert ceilings.bytes_per_second == pytest.approx(2 * 4096 / 1e-3)
    assert ceilings.flop_per_second == pytest.approx({"fp32": 2e12, "bf16": 4e12})
    assert ceilings.launch_seconds == pytest.approx(1e-3 / 3)
    # The fake driver's time does not depend on the queued kernels.
    assert ceilings.barrier_seconds == ceilings.exchange_seconds == ceilings.load_seconds == 0
    assert {"empty", "barriers", "exchanges", "loads"} == {launch.kernel for launch in harness.launches}
    assert max(launch.group_barriers for launch in harness.launches if launch.kernel == "barriers") == 21 * 8


def test_every_block_waits_for_the_words_of_all_in_each_exchange(harness):
    """Launches share words and counters; the last words of both halves are those of the last two exchanges."""
    words, counters = harness.zeros((2, 5, 2), np.uint64), harness.zeros((1, 32), np.uint32)
    source = runtime.assemble("probes.cu", devices.PROBES.read_text(), {})
    for count in (1, 4, 2):
        harness.launch(source, "exchanges", (5, 1, 1), (64, 1, 1), [words, counters, np.int32(count)], 0, True)
    assert counters[0, 0] == 7 and not counters[0, 1:].any()
    assert (words >> 32).tolist() == [[[7, 7]] * 5, [[6, 6]] * 5]
    assert (words % 2**32).tolist() == [[[1, 1]] * 5, [[0, 0]] * 5]  # of the last launch, counted from block to block


def test_loads_come_to_other_lines_of_l2_each_time():
    following, place, lines = devices.next_places(), 0, set()
    for _ in range(devices.PROBE_LOADS):
        lines.add(place // devices.LINE_WORDS)
        place = following[place]
    assert len(lines) == devices.PROBE_LOADS


def test_ceilings_of_a_cpu_are_positive(monkeypatch):
    monkeypatch.setattr(devices, "COPIED_BYTES", 2**16)
    monkeypatch.setattr(devices, "PRODUCT_SIZE", 64)
    ceilings = Cpu().ceilings()
    assert ceilings.bytes_per_second > 0 and ceilings.flop_per_second["fp32"] > 0
    assert ceilings.launch_seconds == ceilings.barrier_seconds == 0


@pytest.mark.parametrize("architecture", runtime.ARCHITECTURES)
def test_probes_compile(architecture):
    pytest.importorskip("cuda.bindings.nvrtc")
    for text in (devices.PROBES.read_text(), devices.WAIT):
        for use in runtime.compile_for(runtime.assemble("probes.cu", text, {}), architecture).values():
            assert use.spill_stores == use.spill_loads == 0


# Floors

def test_floor_is_the_slower_of_memory_and_arithmetic_plus_launches_and_barriers():
    ceilings = floors.Ceilings(1e9, {"fp32": 1e12, "bf16": 4e12}, 1e-6, barrier_seconds=3e-6, exchange_seconds=2e-6)
    work = floors.Work(flop=8 * 10**9, bytes=10**6, launches=3, barriers=5)
    assert floors.floor_seconds(work, ceilings, "fp32") == pytest.approx(8e-3 + 3e-6 + 10e-6)
    assert floors.floor_seconds(work._replace(flop=0), ceilings, "bf16") == pytest.approx(1e-3 + 13e-6)


def test_work_at_the_tutorials_sizes_is_that_of_the_formulas():
    sizes = {"T": 100, "B": 64, "V": 66, "H": 1024}
    step = floors.train_step(E=256, **sizes)
    assert step.barriers == 2 * 100 + 2
    recurrence_and_output = 3 * 2 * 6400 * (3 * 1024**2 + 1024 * 66)
    input_products = 3 * 2 * 66 * 256 * 3072
    assert step.flop == recurrence_and_output + input_products
    assert floors.adam(10) == floors.Work(0, 280)
    read, written = 3 * 1024**2 + 3 * 1024 + 66 * 3072 + 64 * 1024 + 6400, 5 * 6400 * 1024
    assert floors.gru_forward(**sizes).bytes == 4 * (read + written)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in ("train_step", "generate")])
def test_bytes_of_an_op_are_those_of_its_arrays_at_least(name):
    """No op can read less than what it returns, nor can it return nothing."""
    benchmark = BENCHMARKS[name]
    inputs = benchmark.inputs(**tiny(benchmark))
    outputs = benchmark.reference(inputs)
    written = sum(4 * np.size(array) for array in outputs.values())
    assert benchmark.work(**tiny(benchmark)).bytes >= written


# Records

@pytest.fixture
def entry():
    candidates = [constant("char-gru", 2), constant("other", 2)]
    benchmark, device = doubled(candidates), Cpu()
    outcomes = {"char-gru": Measured([1.0, 2.0], False, {}), "other": Measured([3.0, 4.0], True, {"memory_mib": 5.0})}
    ceilings = floors.Ceilings(1e9, {"fp32": 1e12}, 0.0, 0.0)
    return timing.entry(benchmark, {"n": 3}, device, ceilings, outcomes, dict.fromkeys(outcomes, "fp32"))


def test_entry_holds_seconds_circumstances_work_and_ceilings(entry):
    assert entry["candidates"] == {
        "char-gru": {"precision": "fp32", "seconds": [1.0, 2.0], "host_bound": False},
        "other": {"precision": "fp32", "seconds": [3.0, 4.0], "host_bound": True, "memory_mib": 5.0}}
    assert floors.Work(**entry["work"]) == (0, 24, 1, 0)
    assert floors.Ceilings(**entry["ceilings"]).bytes_per_second == 1e9
    assert entry["tutorial"] and entry["sizes"] == {"n": 3}
    assert {"cpu", "cores", "numpy", "commit", "date"} <= entry["machine"].keys()


def test_record_replaces_a_group_and_keeps_the_others(entry, tmp_path):
    timing.record("b", entry, tmp_path)
    timing.record("a", entry, tmp_path)
    timing.record("b", entry | {"sizes": {"n": 4}}, tmp_path)
    [path] = tmp_path.iterdir()
    assert path.name.startswith("cpu-")
    assert {name: group["sizes"]["n"] for name, group in json.loads(path.read_text()).items()} == {"a": 3, "b": 4}


def test_results_of_a_gpu_have_a_file_of_their_own(entry, tmp_path):
    timing.record("a", entry | {"machine": entry["machine"] | {"gpu": "NVIDIA X (100)"}}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cuda-nvidia-x-100.json"]


# Front end

SUITE = """
import numpy as np, pytest
from bench import devices, floors
from bench.side_by_side import Benchmark, Candidate, Runnable

devices.COPIED_BYTES, devices.PRODUCT_SIZE, devices._cpu_cache_bytes = 2**16, 64, lambda: 0  # quick

def candidate(name, value):
    return Candidate(name, "fp32", lambda inputs: Runnable(lambda: None, lambda: {"y": np.array(value)}))

COPY = Benchmark("copy", lambda n: floors.Work(0, 8 * n), lambda n: {"x": np.ones(n)},
                 lambda inputs: {"y": np.array(2.0)},
                 lambda device, n: [candidate("char-gru", 2.0), candidate("other", 2.0), candidate("wrong", 3.0)],
                 sizes=({"n": 3}, {"n": 4}))

@pytest.mark.side_by_side(COPY)
def test_copy(turn):
    turn()

def test_of_something_else():
    pass
"""


def run_suite(folder: Path, *options: str, suite: str = SUITE) -> subprocess.CompletedProcess:
    pytest.importorskip("pytest_benchmark")
    (folder / "bench_copy.py").write_text(suite)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(folder), "-p", "bench.conftest",
         "--device", "cpu", "--tutorial", "--results", str(folder / "results"),
         "--benchmark-json", str(folder / "saved.json"), *options, str(folder / "bench_copy.py")],
        cwd=ROOT, capture_output=True, text=True, check=False)


def test_front_end_measures_a_group_in_turns_and_plays_it_back(tmp_path):
    done = run_suite(tmp_path, "--rounds", "5")
    assert "1 failed, 3 passed" in done.stdout and "wrong: y errs by 1" in done.stdout, done.stdout + done.stderr
    [path] = (tmp_path / "results").iterdir()
    [(group, recorded)] = json.loads(path.read_text()).items()
    saved = {run["name"]: run for run in json.loads((tmp_path / "saved.json").read_text())["benchmarks"]}
    assert group == "copy n=3" and recorded["candidates"].keys() == {"char-gru", "other"}
    for name, made in recorded["candidates"].items():
        run = saved[f"test_copy[n=3-{name}]"]
        assert run["group"] == group and run["stats"]["rounds"] == 5
        assert run["stats"]["median"] == pytest.approx(np.median(made["seconds"]))


@pytest.mark.slow
def test_candidate_that_is_alone_is_called_and_timed_by_pytest_benchmark(tmp_path):
    """Every call of it is a real one, and the recorded seconds are those of pytest-benchmark."""
    suite = SUITE.replace("import", "import time,", 1).replace("lambda: None, ", "lambda: time.sleep(0.03), ")
    suite = suite.replace('[candidate("char-gru", 2.0), candidate("other", 2.0), candidate("wrong", 3.0)]',
                          '[candidate("char-gru", 2.0)]')
    done = run_suite(tmp_path, "--rounds", "5", suite=suite)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    [path] = (tmp_path / "results").iterdir()
    [recorded] = json.loads(path.read_text()).values()
    [saved] = json.loads((tmp_path / "saved.json").read_text())["benchmarks"]
    seconds = recorded["candidates"]["char-gru"]["seconds"]
    assert seconds == saved["stats"]["data"] and len(seconds) == 5 and min(seconds) >= 0.03


@pytest.mark.slow
def test_candidate_that_is_alone_and_errs_fails_and_is_not_recorded(tmp_path):
    done = run_suite(tmp_path, "--rounds", "5", "-k", "wrong")
    assert "1 failed" in done.stdout and "wrong: y errs by 1" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--rounds", "2"), ("--rounds", "5", "-k", "other")])
def test_few_rounds_and_part_of_a_group_are_not_recorded(tmp_path, options):
    done = run_suite(tmp_path, *options)
    assert "passed" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "results").exists()


COMMAND = """#!/bin/bash
printf '%s\\0' "$@" >> "$WORDS"
[ "${0##*/}" != compute-sanitizer ] || "${@:7}"
exit 3
"""


@pytest.mark.parametrize("options", [(), ("--quick",)])
def test_on_gpu_goes_on_past_failures_and_names_files_that_exist(tmp_path, options):
    """With commands in place of Python and of the GPU's tools that write down how they are called, and fail."""
    for name in ("python", "nvidia-smi", "compute-sanitizer"):
        (tmp_path / name).write_text(COMMAND)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WORDS": str(tmp_path / "words")}
    done = subprocess.run([str(ROOT / "bench" / "on_gpu.sh"), *options, str(tmp_path / "out")], env=environment,
                          capture_output=True, text=True, check=True)
    parts = [line.split() for line in done.stdout.splitlines()]
    names = [part[0] for part in parts]
    assert {"suite", "tests", "memcheck-train", "memcheck-generate", "one-epoch-graph", "generate"} <= set(names)
    assert all(part[1:3] != ["exit", "0"] for part in parts) and names == list(dict.fromkeys(names))
    assert {f"{name}.log" for name in names} <= {path.name for path in (tmp_path / "out").iterdir()}
    words = (tmp_path / "words").read_text().split("\0")
    files = {word for word in words if word.endswith(".py")}
    assert {"train.py", "generate.py", "tests/test_gru.py", "bench/bench_gru.py"} <= files
    assert all((ROOT / file).exists() for file in files)
    [(module, name)] = {match for word in words
                        for match in re.findall(r"^from (\S+) import (\w+)$", word, re.MULTILINE)}
    assert module == "char_gru.rnn" and importlib.util.find_spec(f"{module}.{name}")


# Other libraries

@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != "PyTorch compiled"])
def test_peer_learns_and_writes_what_the_reference_does(name, monkeypatch):
    """On the CPU: no graphs are recorded, their functions are called instead, and FlashRNN runs its `vanilla`
    backend."""
    library, make = peers.PEERS[name]
    if not implementations.installed(library, "cpu"):
        pytest.skip(f"{library} is not installed")
    one_call_a_sample(monkeypatch)
    maker = peers.Maker(name, "fp32", functools.partial(make, device=Cpu(), precision="fp32"))
    measured_candidates(bench_train_step.TRAIN_STEP, Cpu(), [bench_train_step.of_peer(maker)])
    measured_candidates(bench_generate.GENERATE, Cpu(), [bench_generate.of_peer(maker)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in peers.PEERS if name not in ("PyTorch compiled", "PyTorch FlashRNN")])
def test_peer_draws_every_character_but_unk(name):
    library, make = peers.PEERS[name]
    if not implementations.installed(library, "cpu"):
        pytest.skip(f"{library} is not installed")
    inputs = bench_generate.inputs(T=400, R=3, V=4, E=5, H=8)
    peer = make(*bench_train_step.params_of(inputs), device=Cpu(), precision="fp32")
    ids_tr = peer.generate(inputs["first_ids_tb"], 400, 2.0)
    assert ids_tr.shape == (400, 3) and set(ids_tr.flat) == {1, 2, 3}
    assert len({tuple(ids_r) for ids_r in ids_tr.T}) == 3


def test_flashrnn_is_given_the_model_in_its_own_order():
    """By its backend for a CPU; it stays out of tables where it is not installed."""
    pytest.importorskip("torch")
    pytest.importorskip("flashrnn")
    inputs = bench_gru.inputs(T=3, B=2, V=5, H=8)
    results = bench_gru.flashrnn_forward(implementations.Torch(Cpu(), "fp32"), inputs).results()
    side_by_side.assert_right("FlashRNN", results, bench_gru.FORWARD.reference(inputs), 2**-13)


def test_peers_of_a_device(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda library, kind: True)
    gpu = types.SimpleNamespace(kind="cuda", precisions=("fp32", "tf32", "bf16"))
    anywhere = {f"{name} {precision}" for name in ("PyTorch", "PyTorch graph", "JAX") for precision in gpu.precisions}

    def names(makers):
        listed = [maker.name for maker in makers]
        assert len(set(listed)) == len(listed)
        return set(listed)

    assert names(peers.training_peers(Cpu(), tutorial=False)) == {"PyTorch", "PyTorch compiled", "JAX", "Keras"}
    assert names(peers.writing_peers(Cpu())) == {"PyTorch", "PyTorch compiled", "JAX", "Keras"}
    assert names(peers.training_peers(gpu, tutorial=False)) == anywhere
    assert names(peers.training_peers(gpu, tutorial=True)) == anywhere | {
        "PyTorch compiled tf32", "PyTorch FlashRNN fp32", "PyTorch FlashRNN bf16", "Keras tf32"}
    assert names(peers.writing_peers(gpu)) == {
        "PyTorch fp32", "PyTorch compiled fp32", "PyTorch graph fp32", "JAX fp32", "Keras fp32"}


@pytest.mark.parametrize("torch_gpu, jax_gpu", [(False, True), (True, False)])
def test_library_is_measured_on_a_gpu_where_the_one_it_builds_on_has_one(monkeypatch, torch_gpu, jax_gpu):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(implementations.importlib.util, "find_spec", lambda library: library)
    cuda = types.SimpleNamespace(is_available=lambda: torch_gpu)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    jax = types.SimpleNamespace(default_backend=lambda: "gpu" if jax_gpu else "cpu")
    monkeypatch.setitem(sys.modules, "jax", jax)
    for library, has_gpu in {"torch": torch_gpu, "flashrnn": torch_gpu, "jax": jax_gpu, "keras": jax_gpu}.items():
        assert implementations.installed(library, "cpu")
        assert implementations.installed(library, "cuda") == has_gpu


def test_pytorch_records_a_graph_once_and_then_replays_it():
    calls = []

    @contextlib.contextmanager
    def record(graph):
        calls.append("record")
        yield
        calls.append("recorded")

    graph = types.SimpleNamespace(replay=lambda: calls.append("replay"))
    library = object.__new__(implementations.Torch)
    library.kind = "cuda"
    library.torch = types.SimpleNamespace(cuda=types.SimpleNamespace(CUDAGraph=lambda: graph, graph=record))
    replayed = library.replayable(lambda: calls.append("call"))
    for _ in range(implementations.WARM_UP_CALLS + 2):
        replayed()
    assert calls == ["call"] * implementations.WARM_UP_CALLS + ["record", "call", "recorded", "replay", "replay"]
