"""The spread of measurements, facts about the machine that they depend on, and the files that keep the results."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.devices import Device, cores
from bench.floors import Ceilings
from bench.side_by_side import Benchmark, Measured

RESULTS = Path(__file__).parent / "results"


class Spread(NamedTuple):
    """Median, lowest and highest of some measurements."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one measurement."""
    return Spread(statistics.median(values), min(values), max(values))


def machine() -> dict:
    """Facts that a result depends on, as JSON values; the version of a library that is not installed is None."""
    blas = np.show_config("dicts")["Build Dependencies"]["blas"]
    return {
        "cpu": _cpu_model(), "cores": cores(), "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(), "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}", **_openblas(),
        "torch": version("torch"), "jax": version("jax"), "keras": version("keras"),
        "onnxruntime": version("onnxruntime"), "flashrnn": version("flashrnn"),
        "torch_threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
        "commit": _commit(), "date": datetime.now(UTC).date().isoformat(),
    }


def entry(benchmark: Benchmark, sizes: Mapping[str, int], device: Device, ceilings: Ceilings,
          measured: Mapping[str, Measured], precisions: Mapping[str, str]) -> dict:
    """A group's results as JSON values."""
    candidates = {name: {"precision": precisions[name], "seconds": outcome.seconds, "host_bound": outcome.host_bound,
                         **outcome.notes}
                  for name, outcome in measured.items()}
    tutorial = sizes == benchmark.sizes_on(device)[0]
    return {"benchmark": benchmark.name, "sizes": dict(sizes), "tutorial": tutorial,
            "machine": machine() | device.facts(), "work": benchmark.work(**sizes)._asdict(),
            "ceilings": ceilings._asdict(), "candidates": candidates}


def record(group: str, entry: dict, folder: Path = RESULTS) -> None:
    """Write a group's results into the file of this device, in place of the results of an earlier run.

    The file maps the name of each group to its entry.
    """
    path = folder / f"{_slug(entry['machine'])}.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[group] = entry
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")


def _cpu_model() -> str:
    try:
        return re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def _slug(facts: dict) -> str:
    if "gpu" in facts:
        name = f"cuda {facts['gpu']}"
    else:
        model = re.sub(r"\(.*?\)|\bCPU\b|@.*", "", facts["cpu"])
        name = f"cpu {model} {facts['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _openblas() -> dict:
    """The processor whose kernels OpenBLAS chose when loaded, and its threads; None if NumPy has another BLAS."""
    library = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    try:
        corename, threads = library.scipy_openblas_get_corename64_, library.scipy_openblas_get_num_threads64_
    except AttributeError:
        return {"blas_kernels": None, "blas_threads": None}
    corename.restype = ctypes.c_char_p
    return {"blas_kernels": corename().decode(), "blas_threads": threads()}


def version(package: str) -> str | None:
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
