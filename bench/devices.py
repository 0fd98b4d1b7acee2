"""The devices to measure on: how time is taken on each device, and the ceilings that the device reaches.

On the CPU, a sample is the clock before and after some calls. On a GPU a clock of the host would mostly measure how
fast Python launches kernels, so a sample is taken by the device's own events: the device first runs a kernel that only
waits, the host meanwhile queues an event, the calls and another event, and the time between the two events is then the
time of kernels which follow each other without a pause. If the first event has passed before the last call is queued,
the host was too slow; the wait is made longer, and a sample for which no wait is long enough is marked `host_bound`.
char-gru's kernels, CuPy and PyTorch all queue on the stream of the executor, so one pair of events times any of them.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.floors import Ceilings
from char_gru.kernels import runtime
from char_gru.kernels.plan.gpus import precisions

WAITS = (0.5e-3, 2e-3, 8e-3, 32e-3, 128e-3)
"""Seconds that a GPU waits while the host queues calls: each is tried until one is long enough."""

PROBES = Path(__file__).with_name("probes.cu")

PROBE_LAUNCHES, PROBE_BARRIERS, PROBE_LOADS = 200, 1000, 4000
"""Launches that follow each other; barriers, or exchanges, in a launch; loads that each wait for the one before."""

LOADED_WORDS, LINE_WORDS = 2**18, 32
"""Words of the array of those loads, small enough for L2, and of a line of L2."""

COPIED_BYTES, PRODUCT_SIZE = 2**28, 2048
"""Bytes of the copy that measures the memory, larger than any cache; rows and columns of the CPU's product."""

CEILING_SAMPLES = 7

WAIT = """
extern "C" __global__ void wait(unsigned long long nanoseconds)
{
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - start < nanoseconds);
}
"""


class Sample(NamedTuple):
    """Seconds of one call, the mean of several calls, and whether the host was slower than the device."""

    seconds: float
    host_bound: bool = False


class Cpu:
    """The processor that NumPy runs on: the bytes of its last cache, and the precisions of its matrix products."""

    kind, precisions = "cpu", ("fp32",)

    def __init__(self) -> None:
        self.cache_bytes = _cpu_cache_bytes()

    def sample(self, calls: Sequence[Callable[[], object]]) -> Sample:
        return self.clock_sample(calls)

    def clock_sample(self, calls: Sequence[Callable[[], object]]) -> Sample:
        """One sample by the host's clock, from the start of the first call to the end of the last."""
        return clocked_sample(calls, self.synchronize)

    def synchronize(self) -> None:
        """Nothing: a call on the CPU is done when it returns."""

    def ceilings(self) -> Ceilings:
        """A product of two matrices by NumPy, and a copy by a thread for each core; or a change in place if that is
        faster, since most processors read the memory that they write to first."""
        source, destination = (np.array_split(array, cores()) for array in np.ones((2, COPIED_BYTES // 4), np.float32))
        A, B, C = np.ones((3, PRODUCT_SIZE, PRODUCT_SIZE), np.float32)
        with ThreadPoolExecutor(cores()) as threads:
            copied = best(self, lambda: list(threads.map(np.copyto, destination, source)))
            changed = best(self, lambda: list(threads.map(np.negative, destination, destination)))
        multiplied = best(self, lambda: np.matmul(A, B, out=C))
        return Ceilings(2 * COPIED_BYTES / min(copied, changed), {"fp32": 2 * PRODUCT_SIZE**3 / multiplied}, 0.0, 0.0)

    def facts(self) -> dict[str, str]:
        """Facts that results depend on, beyond `timing.machine()`."""
        return {}

    def memory_bytes(self, release: bool) -> int:
        """Device memory in use: none."""
        return 0


def clocked_sample(calls: Sequence[Callable[[], object]], synchronize: Callable[[], None]) -> Sample:
    """One sample by the host's clock, the device idle before and after."""
    synchronize()
    started = time.perf_counter()
    for call in calls:
        call()
    synchronize()
    return Sample((time.perf_counter() - started) / len(calls))


def queued_sample(driver: CupyDriver, calls: Sequence[Callable[[], object]]) -> Sample:
    """One sample on a GPU, as the head of this file says."""
    for wait in WAITS:
        driver.wait(wait)
        start = driver.record()
        for call in calls:
            call()
        end = driver.record()
        host_bound = driver.passed(start)
        seconds = driver.seconds(start, end)
        if not host_bound:
            break
    return Sample(seconds / len(calls), host_bound)


class CupyDriver:
    """CUDA events on the current stream, and the device memory that all libraries use together."""

    def __init__(self) -> None:
        import cupy
        self._cupy, self._cuda = cupy, cupy.cuda
        self.l2_bytes = cupy.cuda.Device().attributes["L2CacheSize"]
        self._wait = cupy.RawKernel(WAIT, "wait")

    def wait(self, seconds: float) -> None:
        """Queue a kernel that takes a number of seconds."""
        self._wait((1,), (1,), (np.uint64(seconds * 1e9),))

    def record(self):
        """Queue an event."""
        event = self._cuda.Event()
        event.record()
        return event

    def passed(self, event) -> bool:
        return event.done

    def seconds(self, start, end) -> float:
        """Seconds between two events, after waiting for the second event."""
        end.synchronize()
        return self._cuda.get_elapsed_time(start, end) / 1e3

    def synchronize(self) -> None:
        self._cuda.runtime.deviceSynchronize()

    def memory_bytes(self, release: bool) -> int:
        """Device memory in use; with `release`, after freeing the memory that libraries hold and do not use."""
        if release:
            gc.collect()
            self._cupy.get_default_memory_pool().free_all_blocks()
            if "torch" in sys.modules:
                sys.modules["torch"].cuda.empty_cache()
        free, total = self._cuda.runtime.memGetInfo()
        return total - free


class Gpu:
    """The GPU that the kernels run on."""

    kind = "cuda"

    def __init__(self, executor: runtime.Executor, driver: CupyDriver,
                 products: Callable[[], dict[str, tuple[Callable[[], None], int]]], versions: dict[str, str]) -> None:
        self.cache_bytes, self.precisions = driver.l2_bytes, precisions(executor.gpu)
        self._executor, self._driver, self._products, self._versions = executor, driver, products, versions

    def sample(self, calls: Sequence[Callable[[], object]]) -> Sample:
        """By the device's events."""
        return queued_sample(self._driver, calls)

    def clock_sample(self, calls: Sequence[Callable[[], object]]) -> Sample:
        return clocked_sample(calls, self.synchronize)

    def synchronize(self) -> None:
        self._driver.synchronize()

    def ceilings(self) -> Ceilings:
        """A copy between two arrays, cuBLAS's products, and the kernels of probes.cu."""
        source, destination = (self._executor.zeros((COPIED_BYTES // 4,), np.float32) for _ in range(2))
        copied = best(self, lambda: destination.__setitem__(slice(None), source))
        rates = {precision: flop / best(self, product)
                 for precision, (product, flop) in self._products().items() if precision in self.precisions}
        return Ceilings(2 * COPIED_BYTES / copied, rates, self._launch_seconds(), self._barrier_seconds(),
                        self._exchange_seconds(), self._load_seconds())

    def facts(self) -> dict:
        gpu = self._executor.gpu
        return {"gpu": gpu.name, **{name: getattr(gpu, name) for name in gpu._fields[1:]}} | self._versions

    def memory_bytes(self, release: bool) -> int:
        return self._driver.memory_bytes(release)

    def _launch_seconds(self) -> float:
        launch = functools.partial(self._probe, "empty", 1, [])
        return min(self.sample([launch] * PROBE_LAUNCHES).seconds for _ in range(CEILING_SAMPLES))

    def _barrier_seconds(self) -> float:
        counters = self._executor.zeros((2,), np.uint32)
        return self._seconds_each("barriers", self._executor.gpu.multiprocessors, [counters], PROBE_BARRIERS)

    def _exchange_seconds(self) -> float:
        blocks = self._executor.gpu.multiprocessors
        words, counters = self._executor.zeros((2, blocks, 2), np.uint64), self._executor.zeros((1, 32), np.uint32)
        return self._seconds_each("exchanges", blocks, [words, counters], PROBE_BARRIERS)

    def _load_seconds(self) -> float:
        return self._seconds_each("loads", 1, [self._executor.to_device(next_places())], PROBE_LOADS)

    def _seconds_each(self, kernel: str, blocks: int, args: list, count: int) -> float:
        """Seconds of what a kernel does `count` times more in one launch than in another."""
        few, many = (best(self, functools.partial(self._probe, kernel, blocks, [*args, np.int32(times)]))
                     for times in (1, 1 + count))
        return max(many - few, 0.0) / count

    def _probe(self, kernel: str, blocks: int, args: list) -> None:
        source = runtime.assemble(PROBES.name, PROBES.read_text(), {})
        self._executor.launch(source, kernel, (blocks, 1, 1), (256, 1, 1), args, 0, cooperative=blocks > 1)


Device = Cpu | Gpu


def next_places() -> np.ndarray:
    """The place after each place of an array in L2, an odd number of lines behind it: loads from one place after the
    other come to all lines before they come to one again. Shape (LOADED_WORDS,) uint32."""
    return (np.arange(LOADED_WORDS, dtype=np.uint32) + np.uint32(33 * LINE_WORDS)) % np.uint32(LOADED_WORDS)


def best(device: Device, call: Callable[[], object]) -> float:
    """Seconds of the shortest of CEILING_SAMPLES samples of a call: a ceiling is a rate that was reached."""
    device.sample([call])
    return min(device.sample([call]).seconds for _ in range(CEILING_SAMPLES))


def current_gpu() -> Gpu:
    """The GPU that CuPy finds.

    Raises: DeviceError where CuPy or a GPU is missing.
    """
    executor = runtime.current_executor()
    return Gpu(executor, CupyDriver(), cublas_products, executor.versions())


def cublas_products() -> dict[str, tuple[Callable[[], None], int]]:
    """By precision, a large product by cuBLAS and its floating-point operations. CuPy has no bfloat16, so the bf16
    product multiplies float16, which has the same rate."""
    import cupy

    n, products = 8192, {}
    for precision, dtype in (("fp32", np.float32), ("tf32", np.float32), ("bf16", np.float16)):
        A, B = (cupy.random.standard_normal((n, n), np.float32).astype(dtype) for _ in range(2))
        products[precision] = functools.partial(cublas_matmul, A, B, cupy.empty((n, n), dtype), precision), 2 * n**3
    return products


def cublas_matmul(A, B, C, precision: str) -> None:
    """C = A B by cuBLAS; float32 operands are rounded in tf32 only."""
    import cupy
    from cupy._core import _routines_linalg as linalg

    compute_type = linalg.COMPUTE_TYPE_TF32 if precision == "tf32" else linalg.COMPUTE_TYPE_FP32
    cupy._core.set_compute_type(np.float32, compute_type)
    cupy.matmul(A, B, out=C)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_cache_bytes() -> int:
    """Bytes of the largest cache; 0 where the system does not tell."""
    sizes = [re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
             for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[1]) * {"K": 2**10, "M": 2**20}[size[2]] for size in sizes if size), default=0)
