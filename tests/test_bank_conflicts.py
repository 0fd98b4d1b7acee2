"""Bank conflicts as tests/host_ptx counts them: of patterns that are known, and of the kernels at the tutorial's sizes.

`python -m tests.host_ptx.bank_conflicts > tests/bank_conflicts.txt` renews the table.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest

from char_gru.kernels import runtime
from char_gru.kernels.runtime import assemble
from tests import host_cuda
from tests.helpers.recurrence import on_device
from tests.host_ptx import bank_conflicts
from tests.host_ptx.bank_conflicts import Counts
from tests.test_gru_persistent import Cut

pytest.importorskip("cuda.bindings")  # with it comes NVRTC
pytestmark = pytest.mark.skipif(host_cuda.compiler() is None, reason="needs a C++ compiler")

TABLE = Path(__file__).with_name("bank_conflicts.txt")

PATTERNS = {  # type, index of a thread's element -> wavefronts of the access of a warp, and the fewest
    ("float", "i"): (1, 1),
    ("float", "2 * i"): (2, 1),
    ("float", "4 * i"): (4, 1),
    ("float", "32 * i"): (32, 1),
    ("float", "33 * i"): (1, 1),
    ("float", "i / 2"): (1, 1),
    ("float", "0"): (1, 1),
    ("float2", "i"): (2, 2),
    ("float2", "3 * i"): (2, 2),
    ("float2", "2 * i"): (4, 2),
    ("float4", "i"): (4, 4),
    ("float4", "8 * i"): (32, 4),
    ("float4", "9 * i"): (4, 4),
}


def counts_of(text: str, threads: int = 32, blocks: int = 1) -> dict[str, Counts]:
    """Instruction -> its accesses, in a kernel that is given an array."""
    with runtime.use(bank_conflicts.Recorder()) as executor:
        executor.launch(assemble("kernel.cu", text, {}), "kernel", (blocks, 1, 1), (threads, 1, 1),
                        [runtime.zeros((1024,), np.float32)], 0, False)
    [row] = executor.rows()
    found = dict.fromkeys(("ld", "st"), Counts())
    for (_, operation), counts in row.lines.items():
        found[operation[:2]] += counts
    return found


@pytest.mark.parametrize("type_, index", PATTERNS)
def test_pattern_takes_the_wavefronts_that_its_banks_say(type_, index):
    wavefronts, least = PATTERNS[type_, index]
    found = counts_of(f"""
    extern "C" __global__ void kernel({type_} *out)
    {{
        __shared__ {type_} all[1100];
        const int i = threadIdx.x;
        all[{index}] = out[i];
        __syncthreads();
        out[i] = all[{index}];
    }}""")
    assert found == {"ld": Counts(1, wavefronts, least), "st": Counts(1, wavefronts, least)}


def test_lanes_without_an_access_take_nothing_and_only_the_first_block_counts():
    for blocks in (1, 5):  # in a module of its own: counts are of all launches of a module
        found = counts_of(f"""
        extern "C" __global__ void kernel(float *out)
        {{
            __shared__ float all[4 * 64 + {blocks}];
            all[threadIdx.x] = out[threadIdx.x];
            __syncthreads();
            if (threadIdx.x % 16 == 0)
                out[threadIdx.x] = all[threadIdx.x % 32 / 16 * 32];
        }}""", threads=64, blocks=blocks)
        assert found == {"ld": Counts(2, 2 * 2, 2), "st": Counts(2, 2, 2)}


def counts_of_sums(units: int, units_back: int, precision: str) -> list[Counts]:
    """Of the accesses with which warps of both passes of a recurrence add their sums."""
    lines = (Path(runtime.__file__).parent / "resident.cuh").read_text().splitlines()
    size = Cut(T=2, B=17, H=80, V=3, M=2, groups=1, rows=16, units=units, units_back=units_back)
    with runtime.use(bank_conflicts.Recorder()) as executor:
        on_device(size.case, precision, size.plans(precision))
    found = [(line.split(":"), counts) for row in executor.rows() for (line, _), counts in row.lines.items()]
    return [counts for (file, number), counts in found if file == "resident.cuh" and "mine[" in lines[int(number) - 1]]


@pytest.mark.slow
@pytest.mark.parametrize("units, units_back, precision", [  # in tiles of 8 columns: 6 and 8, or 5 and 5
    (16, 64, "fp32"), (12, 40, "fp32"), (16, 64, "bf16")])
def test_sums_of_warps_are_added_without_conflicts(units, units_back, precision):
    found = counts_of_sums(units, units_back, precision)
    assert len(found) >= 2 * 2 and all(counts.wavefronts == counts.least for counts in found), found


def read(lines: list[str]) -> dict[tuple[str, str], float]:
    """Job and kernel -> wavefronts, as many times as at best."""
    heads = [line.split(" | ") for line in lines if line.count(" | ") == 2]
    return {(job, kernel): float(counts.rpartition("(")[2].split()[0]) for job, kernel, counts in heads}


def test_table_has_all_jobs_in_their_order():
    jobs = [job for job, _ in read(TABLE.read_text().splitlines())]
    assert [job for job, _ in itertools.groupby(jobs)] == list(bank_conflicts.JOBS)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["1 text, fp32", "5 texts, fp32", "64 texts, bf16"])
def test_kernels_have_no_more_conflicts_than_the_table_says(job):
    found, expected = read(list(bank_conflicts.table(job, bank_conflicts.measured(job)))), read(
        TABLE.read_text().splitlines())
    assert found
    for name, times in found.items():
        assert times <= expected[name] + 0.01, (name, times, expected[name])
