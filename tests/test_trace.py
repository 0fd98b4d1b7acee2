"""`python -m kernels --run` runs one op on the CPU, and its trace says what the threads did."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from char_gru.kernels import __main__ as kernels_main
from char_gru.kernels import runtime
from tests import host_cuda
from tests.host_cuda import HostExecutor, run, trace

pytestmark = pytest.mark.skipif(host_cuda.compiler() is None, reason="no C++ compiler")

TINY = """
#include "common.cuh"
#include "barrier.cuh"
extern "C" __global__ void __launch_bounds__(64)
tiny(float *out, unsigned *counters, const float *__restrict__ in, int n)  // out (2, 2, 32), in (3, 64)
{
    __shared__ float tile[64];
    extern __shared__ float scratch[];
    if (blockIdx.x == 0)
        tile[threadIdx.x] = in[threadIdx.x] + in[2 * 64 + 63];
    else if (threadIdx.x >= n)
        scratch[threadIdx.x] = in[2 * threadIdx.x];
    __syncthreads();
    __syncthreads();
    const float sum = warp_sum(1.0f);
    Group(counters, 0, blockIdx.x, 2).barrier();
    out[(blockIdx.x * 2 + threadIdx.x / 32) * 32 + lane()] = sum;
    if (threadIdx.x == 5)
        atomicAdd(counters + 2, 1u);
}
"""


def traced(order="ascending"):
    """The trace of TINY."""
    executor = HostExecutor(order, record=True)
    args = [executor.empty((2, 2, 32), np.float32), executor.zeros((1, 3), np.uint32),
            executor.to_device(np.ones((3, 64), np.float32)), np.int32(62)]
    executor.launch(runtime.assemble("tiny.cu", TINY, {}), "tiny", (2, 1, 1), (64, 1, 1), args, 256, True)
    (launch,) = executor.launches
    return launch


@pytest.mark.parametrize("order", host_cuda.ORDERS)
def test_trace_says_who_loads_stores_computes_and_waits(order):
    launch = traced(order)
    assert [*trace.header(launch), *trace.trace(launch)] == [
        "tiny: 2 blocks of 64 threads, 256 bytes of dynamic shared memory, cooperative",
        "  out (2, 2, 32), counters (1, 3), in (3, 64), n=62",
        "  block 0   loads    in[0, 0:64], [2, 63] by threads 0-63",
        "  block 0   stores   shared memory, 256 bytes, by threads 0-63",
        "  block 0   2 barriers",
        "  block 0   calls    __shfl_xor_sync x 10 by warps 0-1",
        "  block 0   barrier",
        "  block 0   arrives  at counters[0, 0] by thread 0",
        "  block 0   waits    until counters[0, 0] is 2",
        "  block 1   loads    in[1, 60], [1, 62] by threads 62-63",
        "  block 1   stores   shared memory, 8 bytes, by threads 62-63",
        "  block 1   2 barriers",
        "  block 1   calls    __shfl_xor_sync x 10 by warps 0-1",
        "  block 1   barrier",
        "  block 1   arrives  at counters[0, 0] by thread 0",
        "  block 1   waits    until counters[0, 0] is 2",
        "  block 0   barrier",
        "  block 0   stores   out[0, 0:2, 0:32] by threads 0-63",
        "  block 0   atomics  on counters[0, 2] by thread 5",
        "  block 1   barrier",
        "  block 1   stores   out[1, 0:2, 0:32] by threads 0-63",
        "  block 1   atomics  on counters[0, 2] by thread 5",
    ]


def test_summary_counts_bytes_barriers_and_instructions_of_warps():
    assert list(trace.summary(traced())) == [
        "  loads    bytes: in 520",
        "  stores   bytes: out 512",
        "  waits    barriers: 8 in blocks, 2 arrivals of blocks at a group's",
        "  calls    __shfl_xor_sync x 20, counted by warp",
    ]


def test_many_parts_of_an_array_become_one_with_the_number_of_elements():
    text = 'extern "C" __global__ void some(float *out) { out[threadIdx.x * threadIdx.x] = 0.0f; }'
    executor = HostExecutor(record=True)
    executor.launch(text, "some", (1, 1, 1), (8, 1, 1), [executor.empty((50,), np.float32)], 0, False)
    assert list(trace.trace(executor.launches[0])) == [
        "  block 0   stores   out[0:50] (8 elements of it) by threads 0-7"]


def test_nothing_is_recorded_without_the_switch():
    executor = HostExecutor(count_bytes=True)
    executor.launch('extern "C" __global__ void f(int *x) { *x = 1; }', "f", (1, 1, 1), (1, 1, 1),
                    [np.zeros(1, np.int32)], 0, False)
    assert executor.launches[0].recording is None


# ---- The command ----------------------------------------------------------------------------------------------------

def lines_of(capsys, *arguments):
    """The output of `python -m kernels --run`, which ends with status 0."""
    assert kernels_main.command(["--run", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("op", run.OPS)
def test_every_op_runs_and_is_right(op, capsys):
    lines = lines_of(capsys, op)
    assert re.match(r"\w+: \d+ blocks? of \d+ threads", lines[0])
    assert ": right, largest error" in lines[-1]


def test_stepwise_forward_pass_is_a_launch_for_each_step(capsys):
    lines = lines_of(capsys, "gru_forward", "--sizes", "T=3,B=2,H=8", "--variant", "stepwise", "--trace")
    starts = [i for i, line in enumerate(lines) if line.startswith("gru_forward_step: 1 block of 256 threads")]
    assert len(starts) == 3
    for t, (first, last) in enumerate(zip(starts, [*starts[1:], None])):
        step = lines[first:last]
        (load,) = (line for line in step if "loads    W_hh" in line)
        assert "W_hh[0:24, 0:8]" in load
        (store,) = (line for line in step if "stores   h_tb" in line)
        assert f"h_tb[{t + 1}, 0:2, 0:8]" in store or t == 0 and "h_tb[0:2, 0:2, 0:8]" in store


def test_persistent_forward_pass_loads_weights_once_and_waits_for_the_tag_of_each_step(capsys):
    lines = lines_of(capsys, "gru_forward", "--sizes", "T=3,B=2,H=8", "--variant", "persistent", "--trace")
    assert lines[0].startswith("gru_forward_persistent: 4 blocks of 256 threads") and lines[0].endswith("cooperative")
    for block in range(4):
        mine = [line for line in lines if line.startswith(f"  block {block} ")]
        (load,) = (line for line in mine if "loads    W_hh" in line)
        j = 2 * block
        assert f"W_hh[{j}:{j + 2}, 0:8], [{8 + j}:{10 + j}, 0:8], [{16 + j}:{18 + j}, 0:8]" in load
        waits = [line.split()[-1] for line in mine if "waits" in line]
        assert waits == [str(tag << 16) for tag in (1, 2, 3)]  # in the upper half of the half of a word
        assert not any("arrives" in line for line in mine)
        stores = [line for line in mine if "stores   h_tb" in line]
        assert [f"h_tb[{t}, 0:2, {j}:{j + 2}]" in store for t, store in enumerate(stores)] == [True] * 4
    wait = [i for i, line in enumerate(lines) if "waits" in line]
    assert [lines[i].split()[1] for i in wait[:5]] == ["0", "1", "2", "3", "0"]


def test_naive_variant_runs_and_is_right(capsys):
    pytest.importorskip("char_gru.kernels.naive")
    for op in ("gru_forward", "matmul", "adam"):
        assert ": right, largest error" in lines_of(capsys, op, "--variant", "naive")[-1]
    assert_refused(["dropout_forward", "--variant", "naive"], "--variant: dropout_forward has no naive", capsys)
    assert_refused(["matmul", "--variant", "naive", "--precision", "tf32"], "--variant: matmul has no naive", capsys)


def test_trace_names_the_tensor_core_instruction(capsys):
    lines = lines_of(capsys, "matmul", "--precision", "bf16", "--trace")
    assert any("calls    mma_m16n8k16_bf16 x 64 by warps 0-7" in line for line in lines), lines


def test_readme_of_the_harness_shows_what_happens(tmp_path, capsys):
    text = (Path(host_cuda.__file__).parent / "README.md").read_text()
    (tmp_path / "example.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    runpy.run_path(str(tmp_path / "example.py"))
    assert capsys.readouterr().out.startswith("[63. 62. 61.")
    command, *shown = re.findall(r"^    (.*)", text.split("```")[0], re.MULTILINE)
    lines = lines_of(capsys, *command.split()[4:])
    assert command.startswith("python -m kernels --run ") and shown.pop(1).strip() == "..."
    assert all(any(re.fullmatch(re.escape(line).replace(r"counters\[0,\ 0", r"counters\[0, 0(, 0)?"), printed)
                   for printed in lines) for line in shown)


def test_wrong_result_ends_with_status_1(monkeypatch, capsys):
    monkeypatch.setattr(run, "ROUNDOFFS", 0)
    assert kernels_main.command(["--run", "adam"]) == 1
    assert "params: WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, complaint", [
    (["gru"], "--run: expected one of matmul, .*, generate, got 'gru'"),
    (["adam", "--sizes", "T=3"], "--sizes: adam has the sizes N, got 'T=3'"),
    (["gru_forward", "--sizes", "T=3,B"], "--sizes: expected a positive integer for B, got ''"),
    (["gru_forward", "--sizes", "T=0"], "--sizes: expected a positive integer for T, got '0'"),
    (["gru_forward", "--variant", "fast"], "variant: expected auto, persistent or stepwise, got 'fast'"),
    (["adam", "--variant", "stepwise"], "--variant: adam has no variants"),
    (["adam", "--precision", "bf16"], "--precision: adam does not compute in bf16"),
    (["adam", "--layers", "2"], "--layers is for --plan"),
])
def test_a_bad_run_is_one_line_and_status_2(arguments, complaint, capsys):
    assert_refused(arguments, complaint, capsys)


def test_run_without_a_compiler_or_outside_a_checkout_is_one_line_and_status_2(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(host_cuda, "compiler", lambda: None)
    assert_refused(["adam"], r"no C\+\+ compiler: install g\+\+", capsys)
    monkeypatch.setattr(kernels_main, "_ROOT", tmp_path)
    assert_refused(["adam"], "--run needs the harness in tests/host_cuda: use a checkout", capsys)


def assert_refused(arguments, complaint, capsys):
    """`python -m kernels --run` ends with one line on stderr and status 2."""
    with pytest.raises(SystemExit) as stop:
        kernels_main.command(["--run", *arguments])
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    assert re.match(rf"python -m kernels: {complaint}", output.err) and output.err.count("\n") == 1
