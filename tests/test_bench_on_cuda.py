"""The GPU half of the benchmark suite under the real CuPy, for its logic: no time that it takes here means anything.

`python -m pytest --cuda-device` runs these tests.
"""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import devices, fit
from bench.devices import Gpu, queued_sample
from char_gru.kernels.plan.gpus import GPU
from tests import cuda_device
from tests.helpers.commands import TINY, make_text
from tests.test_bench import BENCHMARKS, measured, one_call_a_sample

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu(executor, device, monkeypatch) -> Gpu:
    """The GPU of this process, with a product of NumPy's in the place of cuBLAS, which [test] does not install."""
    monkeypatch.setattr(devices, "cublas_products", lambda: {"fp32": (lambda: None, 10**6)})
    return devices.current_gpu()


def test_facts_name_the_gpu_and_the_versions(gpu, request):
    facts, name = gpu.facts(), request.config.getoption("device_like")
    assert fit.gpu_of({"machine": facts}) == cuda_device.gpu_named(name)
    assert facts.keys() == {"gpu", *GPU._fields[1:], "cupy", "driver", "cuda_runtime", "nvrtc"}
    assert facts["driver"] == f"for CUDA {facts['cuda_runtime'].partition('.')[0]}.0"
    assert "fp32" in gpu.precisions and gpu.cache_bytes > 0


def test_events_time_what_lies_between_them(gpu, device):
    device.work_at_once(False)
    driver, order = gpu._driver, []
    start = driver.record()
    end = driver.record()
    assert not driver.passed(start)
    assert driver.seconds(start, end) >= 0
    assert driver.passed(start)
    assert queued_sample(driver, [lambda: order.append(0)] * 3).seconds >= 0 and order == [0] * 3
    driver.synchronize()


def test_memory_of_the_gpu_is_what_is_allocated(gpu, device):
    import cupy

    held = cupy.zeros(2**20, np.uint8)
    before = gpu.memory_bytes(release=True)
    assert before == device.used_memory() >= 2**20
    del held
    assert gpu.memory_bytes(release=True) <= before - 2**20


def test_ceilings_are_measured(gpu, monkeypatch):
    monkeypatch.setattr(devices, "COPIED_BYTES", 4096)
    monkeypatch.setattr(devices, "PROBE_LAUNCHES", 3)
    monkeypatch.setattr(devices, "PROBE_BARRIERS", 4)
    monkeypatch.setattr(devices, "PROBE_LOADS", 5)
    ceilings = gpu.ceilings()
    assert ceilings.bytes_per_second > 0 and ceilings.launch_seconds >= 0 and ceilings.barrier_seconds >= 0
    assert ceilings.exchange_seconds >= 0 and ceilings.load_seconds >= 0


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_candidates_on_the_gpu_compute_what_the_reference_does(gpu, name, monkeypatch):
    one_call_a_sample(monkeypatch)
    assert measured(BENCHMARKS[name], gpu, lambda name: name.startswith("char-gru"))


PYTHON = """#!/usr/bin/env bash
# python, on the device. What the harness would take hours for is listed or made small; nothing is downloaded.
set -- "${{@/python-docs/{text}}}"
case "$*" in
    "-m pytest"*"--device cuda"*) exec {python} -m pytest --collect-only -q --device cpu "${{@:6}}" ;;
    "-m pytest"*"--gpu"*) exec {python} "$@" --collect-only ;;
    "train.py"*) exec {python} tests/cuda_device "$@" {tiny} ;;
    *) exec {python} tests/cuda_device "$@" ;;
esac
"""

STUBS = {
    "nvidia-smi": "#!/bin/sh\necho a device\n",
    "timeout": '#!/bin/bash\nshift\nexec "$@"\n',
    "compute-sanitizer": '#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n',
}


@pytest.mark.slow
def test_on_gpu_quick_runs_all_its_parts(device, tmp_path):
    text = make_text(tmp_path / "text.txt")
    text.write_text(text.read_text() + "ROMEO:\n")
    python = PYTHON.format(python=sys.executable, tiny=" ".join(TINY), text=str(text).replace("/", "\\/"))
    for name, content in {"python": python, **STUBS}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(["bash", ROOT / "bench" / "on_gpu.sh", "--quick", tmp_path / "out", text], check=False,
                          capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    parts = {line.split()[0]: line.split()[2] for line in done.stdout.splitlines()}
    logs = {name: (tmp_path / "out" / f"{name}.log").read_text()[-2000:] for name in parts if parts[name] != "0"}
    assert parts.keys() == {"device", "suite", "tests", "memcheck-train", "memcheck-generate", "one-epoch-graph",
                            "one-epoch-no-graph", "graph-equal-bytes", "generate"}
    assert logs == {}, logs
