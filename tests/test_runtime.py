"""The runtime refuses what CuPy would let pass, builds one text per module, and says plainly what is missing."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from char_gru.kernels import __main__ as command
from char_gru.kernels import runtime


class RecordingExecutor:
    """Executor that only records its launches; its device holds four blocks."""

    array_type = np.ndarray

    def __init__(self):
        self.launched = []

    def empty(self, shape, dtype):
        return np.full(shape, 7, dtype)

    def zeros(self, shape, dtype):
        return np.zeros(shape, dtype)

    def to_device(self, array):
        return array.copy()

    def to_host(self, array):
        return array.copy()

    def resident_blocks(self, source, kernel, threads, shared_bytes):
        return 4

    def launch(self, source, kernel, grid, block, args, shared_bytes, cooperative):
        self.launched.append((kernel, grid, block, args, shared_bytes, cooperative))


@pytest.fixture
def recording(monkeypatch):
    """A RecordingExecutor in use, over a package with one kernel file that includes two headers."""
    files = {
        "scale.cu": ('#include "outer.cuh"\n#include "inner.cuh"\n'
                     'extern "C" __global__ void scale(float *x) { *x *= FACTOR; }\n'),
        "outer.cuh": '// outer\n#include "inner.cuh"\n',
        "inner.cuh": "// inner\n",
    }
    monkeypatch.setattr(runtime, "_read", files.__getitem__)
    runtime._source.cache_clear()
    with runtime.use(RecordingExecutor()) as recording:
        yield recording
    runtime._source.cache_clear()


def launch(args=(), grid=2, block=32, **options):
    runtime.launch("scale", "scale", grid, block, args, constants={"FACTOR": 3}, **options)


# ---- Arrays ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("array, got", [
    (np.zeros((2, 3), np.float64), "got float64 (2, 3), C-contiguous"),
    (np.zeros((3, 2), np.float32), "got float32 (3, 2), C-contiguous"),
    (np.zeros((3, 2), np.float32).T, "got float32 (2, 3), strided (4, 8)"),
    ([1.0], "got builtins.list"),
])
def test_check_names_argument_expectation_and_fact(recording, array, got):
    with pytest.raises(ValueError) as error:
        runtime.check("h0", array, np.float32, (2, 3))
    assert str(error.value) == f"h0: expected a C-contiguous numpy.ndarray of float32 (2, 3), {got}"
    runtime.check("h0", np.zeros((2, 3), np.float32), np.float32, (2, 3))


def test_arrays_come_from_the_executor_in_use(recording):
    assert runtime.empty((2,), np.float32).tolist() == [7, 7]
    assert runtime.zeros((2,), np.int32).tolist() == [0, 0]
    values = np.arange(3)
    assert runtime.to_host(runtime.to_device(values)).tolist() == [0, 1, 2]


def test_use_gives_back_the_executor_before(recording):
    with runtime.use(RecordingExecutor()) as inner:
        assert runtime.current_executor() is inner
    assert runtime.current_executor() is recording


# ---- Launches --------------------------------------------------------------------------------------------------------

def test_launch_passes_arrays_and_exact_scalars_on(recording):
    x = np.zeros(4, np.float32)
    launch([x, np.int32(4), np.uint64(5), np.float32(0.5)], grid=(2, 3), shared_bytes=64, cooperative=False)
    ((kernel, grid, block, args, shared_bytes, cooperative),) = recording.launched
    assert (kernel, grid, block, shared_bytes, cooperative) == ("scale", (2, 3, 1), (32, 1, 1), 64, False)
    assert args[0] is x and [type(arg) for arg in args[1:]] == [np.int32, np.uint64, np.float32]


@pytest.mark.parametrize("arg", [1, 1.0, True, None, np.float64(1), np.int16(1), [1], "1"])
def test_launch_refuses_scalars_without_an_exact_width(recording, arg):
    with pytest.raises(TypeError, match="scale: argument 1 is a"):
        launch([np.zeros(4, np.float32), arg])
    assert recording.launched == []


def test_launch_refuses_an_array_with_strides(recording):
    with pytest.raises(ValueError, match=r"argument 0 is not C-contiguous: float32 \(2, 2\), strides \(4, 8\)"):
        launch([np.zeros((2, 2), np.float32).T])


@pytest.mark.parametrize("grid, block", [(0, 32), ((1, 2, 3, 4), 32), (1.0, 32), (1, 0), (1, ())])
def test_launch_refuses_extents_out_of_range(recording, grid, block):
    with pytest.raises(ValueError, match="expected one to three positive integers"):
        launch(grid=grid, block=block)


def test_launch_refuses_more_threads_than_a_block_has(recording):
    with pytest.raises(ValueError, match="1056 threads per block; at most 1024"):
        launch(block=(33, 32))


def test_cooperative_grid_larger_than_the_device_holds_is_refused(recording):
    launch(grid=4, cooperative=True)
    launch(grid=5)
    with pytest.raises(ValueError, match="a cooperative grid of 5 blocks.*the device holds 4 at once"):
        launch(grid=5, cooperative=True)
    assert len(recording.launched) == 2


# ---- Sources ---------------------------------------------------------------------------------------------------------

def test_source_has_constants_each_header_once_and_true_line_numbers(recording):
    assert runtime.source("scale", {"FACTOR": 3}).splitlines() == [
        "#define FACTOR 3",
        '#line 1 "kernels/scale.cu"',
        '#line 1 "kernels/outer.cuh"',
        "// outer",
        '#line 1 "kernels/inner.cuh"',
        "// inner",
        "",
        '#line 3 "kernels/outer.cuh"',
        "",
        '#line 2 "kernels/scale.cu"',
        '#line 3 "kernels/scale.cu"',
        'extern "C" __global__ void scale(float *x) { *x *= FACTOR; }',
    ]


@pytest.mark.parametrize("condition", ["#if WIDE", "# ifdef WIDE", "#ifndef WIDE", "#if 1\n#if 1\n#endif"])
def test_include_that_the_compiler_may_skip_is_refused(recording, condition):
    text = f'#include "inner.cuh"\n{condition}\n#include "outer.cuh"\n#endif\n'
    line = 2 + len(condition.splitlines())
    complaint = rf'^kernels/scale.cu:{line}: #include "outer.cuh" inside #if; .* move the #include'
    with pytest.raises(ValueError, match=complaint):
        runtime.assemble("scale.cu", text, {})
    assert "// outer" in runtime.assemble("scale.cu", '#if WIDE\n#endif\n#include "outer.cuh"\n', {})


@pytest.mark.parametrize("value", [1.0, True, "1", np.int32(1)])
def test_constant_that_is_no_int_is_refused(recording, value):
    with pytest.raises(TypeError, match="constant FACTOR of scale.cu: expected an int"):
        runtime.assemble("scale.cu", "", {"FACTOR": value})


def test_compile_error_names_the_file_and_line_that_a_person_wrote():
    text = '#include "common.cuh"\n\nextern "C" __global__ void broken() { missing(); }\n'
    with pytest.raises(runtime.CompileError, match=r'sm_90: kernels/broken.cu\(3\): error: identifier "missing"'):
        runtime.compile_for(runtime.assemble("broken.cu", text, {}), "sm_90")


def test_compiler_that_cannot_start_says_why(monkeypatch):
    from cuda.bindings import nvrtc

    failed = nvrtc.nvrtcResult.NVRTC_ERROR_OUT_OF_MEMORY
    monkeypatch.setattr(nvrtc, "nvrtcCreateProgram", lambda *arguments: (failed, None))
    with pytest.raises(runtime.CompileError, match="nvrtcCreateProgram: .*OUT_OF_MEMORY"):
        runtime.compile_for("", "sm_90")


def test_resource_use_reports_registers_shared_memory_and_spills():
    text = """
    extern "C" __global__ void plain(float *x)
    {
        __shared__ float tile[64];
        tile[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        x[threadIdx.x] = tile[63 - threadIdx.x];
    }
    extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float *x)
    {
        float y[80];
        #pragma unroll
        for (int i = 0; i < 80; ++i) y[i] = x[i * 1024 + threadIdx.x];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 80; ++i) x[i * 1024 + threadIdx.x] = y[79 - i] * y[(i * 7) % 80];
    }
    """
    use = runtime.compile_for(text, "sm_80")
    assert use["plain"].shared_bytes == 256 and use["plain"].registers > 0
    assert use["plain"].spill_stores == use["plain"].spill_loads == 0
    assert use["spilling"].spill_stores > 0 and use["spilling"].spill_loads > 0 and use["spilling"].shared_bytes == 0


# ---- What is missing -------------------------------------------------------------------------------------------------

def test_importing_the_runtime_imports_no_cupy():
    code = ("import sys; before = {*sys.modules}; "  # a .pth file of cuda-bindings may have imported some of it
            "import char_gru.kernels.runtime; "
            "assert not {'cupy', 'cuda', 'cuda.bindings', 'cuda.bindings.nvrtc'} & {*sys.modules} - before")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parent.parent)


def test_missing_cupy_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(runtime.DeviceError, match=r"pip install 'char-gru\[cuda13\]' \(or 'char-gru\[cuda12\]'"):
        runtime.empty((1,), np.float32)


def test_missing_gpu_is_said_plainly():
    pytest.importorskip("cupy")
    code = "import numpy; from char_gru.kernels import runtime; runtime.empty((1,), numpy.float32)"
    done = subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parent.parent, check=False,
                          capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, text=True)
    assert "DeviceError: CuPy finds no GPU: check the driver with nvidia-smi" in done.stderr


def test_missing_nvrtc_ends_the_command_with_status_2(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert command.main() == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err == "NVRTC is not installed: pip install 'char-gru[test]'\n"


def test_command_prints_a_line_per_kernel_and_architecture(recording, monkeypatch, capsys):
    monkeypatch.setattr(command, "modules_for",
                        lambda architecture: [("scale", {"FACTOR": 3}), ("scale", {"FACTOR": 5})])
    assert command.main(("sm_75", "sm_90")) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == command.row(command.HEADER)
    assert [[cell.strip() for cell in line.split("|")][:4] for line in lines] == [
        [architecture, "scale", f"FACTOR={factor}", "scale"]
        for architecture in ("sm_75", "sm_90") for factor in (3, 5)]


def test_command_ends_with_status_1_where_a_source_does_not_compile(recording, monkeypatch, capsys):
    monkeypatch.setattr(command, "modules_for", lambda architecture: [("scale", {})])
    assert command.main(("sm_90",)) == 1
    assert 'kernels/scale.cu(3): error: identifier "FACTOR" is undefined' in capsys.readouterr().err
