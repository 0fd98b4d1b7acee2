"""Measuring side by side: interleaved timing, memory, facts about the machine, and the files that keep the results."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

RESULTS = Path(__file__).parent / "results"

PAUSE_SECONDS = 0.1
"""Rest before each timing: the worker threads of BLAS libraries spin for a while after the product that woke them."""


def interleave(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each candidate takes in each round.

    Each runs once untimed. In a round each runs once, and every round starts with another one, so that a machine that
    slows down or is disturbed does so for all of them. Entry k of every list is from round k: ratios are taken within
    a round.
    """
    for candidate in candidates.values():
        candidate()
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE_SECONDS)
            started = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


class Spread(NamedTuple):
    """Median, lowest and highest of some measurements."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one measurement."""
    return Spread(statistics.median(values), min(values), max(values))


def peak_memory_mib(command: Sequence[str]) -> float:
    """Largest resident memory that a command takes, in MiB; what it prints to stdout is dropped.

    The command is started by a small process: Linux counts the memory of the process that starts another as the
    other's own, and this one may be large.

    Raises: subprocess.CalledProcessError if the command fails.
    """
    small_process = ("import resource, subprocess, sys\n"
                     "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
                     "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", small_process, *command], check=True, stdout=subprocess.PIPE,
                          text=True)
    unit = 1 if sys.platform == "darwin" else 1024
    return int(done.stdout) * unit / 2**20


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine() -> dict:
    """Facts that a result depends on, as JSON values; the version of a library that is not installed is None."""
    blas = np.show_config("dicts")["Build Dependencies"]["blas"]
    return {
        "cpu": _cpu_model(), "cores": cores(), "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(), "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}", **_openblas(),
        "torch": _version("torch"), "jax": _version("jax"),
        "torch_threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
        "commit": _commit(), "date": datetime.now(UTC).date().isoformat(),
    }


def record(name: str, sizes: dict, results: dict, folder: Path = RESULTS) -> dict:
    """Write a benchmark's results into the file of this machine, in place of those of an earlier run.

    The file maps the name of each benchmark to an entry with `machine`, `sizes` and `results`. Returns the entry.
    """
    entry = {"machine": machine(), "sizes": sizes, "results": results}
    path = folder / f"cpu-{_slug(entry['machine'])}.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[name] = entry
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(entries, indent=1) + "\n")
    return entry


def _cpu_model() -> str:
    try:
        return re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def _slug(facts: dict) -> str:
    model = re.sub(r"\(.*?\)|\bCPU\b|@.*", "", facts["cpu"])
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {facts['cores']} cores".lower()).strip("-")


def _openblas() -> dict:
    """The processor whose kernels OpenBLAS chose when loaded, and its threads; None if NumPy has another BLAS."""
    library = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    try:
        corename, threads = library.scipy_openblas_get_corename64_, library.scipy_openblas_get_num_threads64_
    except AttributeError:
        return {"blas_kernels": None, "blas_threads": None}
    corename.restype = ctypes.c_char_p
    return {"blas_kernels": corename().decode(), "blas_threads": threads()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit that was measured; results themselves do not count as changes."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=RESULTS.parent.parent, check=True, capture_output=True,
                              text=True).stdout.strip()

    try:
        if git("status", "--porcelain", "--", ".", ":!bench/results"):
            return "uncommitted changes"
        return git("rev-parse", "--short=12", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
