"""The runtime refuses what CuPy would let pass, builds one text per module, and says plainly what is missing."""

import functools
import pathlib
import subprocess
import sys
import types
import warnings

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
def executor(monkeypatch):
    """A recording executor in use, over a package with one kernel file that includes two headers."""
    files = {
        "scale.cu": ('#include "outer.cuh"\n#include "inner.cuh"\n'
                     'extern "C" __global__ void scale(float *x) { *x *= FACTOR; }\n'),
        "outer.cuh": '// outer\n#include "inner.cuh"\n',
        "inner.cuh": "// inner\n",
    }
    monkeypatch.setattr(runtime, "_read", files.__getitem__)
    runtime._source.cache_clear()
    with runtime.use(RecordingExecutor()) as executor:
        yield executor
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
def test_check_names_argument_expectation_and_fact(executor, array, got):
    with pytest.raises(ValueError) as error:
        runtime.check("h0", array, np.float32, (2, 3))
    assert str(error.value) == f"h0: expected a C-contiguous numpy.ndarray of float32 (2, 3), {got}"
    runtime.check("h0", np.zeros((2, 3), np.float32), np.float32, (2, 3))


def test_arrays_come_from_the_executor_in_use(executor):
    assert runtime.empty((2,), np.float32).tolist() == [7, 7]
    assert runtime.zeros((2,), np.int32).tolist() == [0, 0]
    values = np.arange(3)
    assert runtime.to_host(runtime.to_device(values)).tolist() == [0, 1, 2]


def test_use_gives_back_the_executor_before(executor):
    with runtime.use(RecordingExecutor()) as inner:
        assert runtime.current_executor() is inner
    assert runtime.current_executor() is executor


# ---- Launches --------------------------------------------------------------------------------------------------------

def test_launch_passes_arrays_and_exact_scalars_on(executor):
    x = np.zeros(4, np.float32)
    launch([x, np.int32(4), np.uint64(5), np.float32(0.5)], grid=(2, 3), shared_bytes=64, cooperative=False)
    ((kernel, grid, block, args, shared_bytes, cooperative),) = executor.launched
    assert (kernel, grid, block, shared_bytes, cooperative) == ("scale", (2, 3, 1), (32, 1, 1), 64, False)
    assert args[0] is x and [type(arg) for arg in args[1:]] == [np.int32, np.uint64, np.float32]


@pytest.mark.parametrize("arg", [1, 1.0, True, None, np.float64(1), np.int16(1), [1], "1"])
def test_launch_refuses_scalars_without_an_exact_width(executor, arg):
    with pytest.raises(TypeError, match="scale: argument 1 is a"):
        launch([np.zeros(4, np.float32), arg])
    assert executor.launched == []


def test_launch_refuses_an_array_with_strides(executor):
    with pytest.raises(ValueError, match=r"argument 0 is not C-contiguous: float32 \(2, 2\), strides \(4, 8\)"):
        launch([np.zeros((2, 2), np.float32).T])


@pytest.mark.parametrize("grid, block", [(0, 32), ((1, 2, 3, 4), 32), (1.0, 32), (1, 0), (1, ())])
def test_launch_refuses_extents_out_of_range(executor, grid, block):
    with pytest.raises(ValueError, match="expected one to three positive integers"):
        launch(grid=grid, block=block)


def test_launch_refuses_more_threads_than_a_block_has(executor):
    with pytest.raises(ValueError, match="1056 threads per block; at most 1024"):
        launch(block=(33, 32))


def test_cooperative_grid_larger_than_the_device_holds_is_refused(executor):
    launch(grid=4, cooperative=True)
    launch(grid=5)
    with pytest.raises(ValueError, match="a cooperative grid of 5 blocks.*the device holds 4 at once"):
        launch(grid=5, cooperative=True)
    assert len(executor.launched) == 2


# ---- Sources ---------------------------------------------------------------------------------------------------------

def test_source_has_constants_each_header_once_and_true_line_numbers(executor):
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
def test_include_that_the_compiler_may_skip_is_refused(executor, condition):
    text = f'#include "inner.cuh"\n{condition}\n#include "outer.cuh"\n#endif\n'
    line = 2 + len(condition.splitlines())
    complaint = rf'^kernels/scale.cu:{line}: #include "outer.cuh" inside #if; .* move the #include'
    with pytest.raises(ValueError, match=complaint):
        runtime.assemble("scale.cu", text, {})
    assert "// outer" in runtime.assemble("scale.cu", '#if WIDE\n#endif\n#include "outer.cuh"\n', {})


@pytest.mark.parametrize("value", [1.0, True, "1", np.int32(1)])
def test_constant_that_is_no_int_is_refused(executor, value):
    with pytest.raises(TypeError, match="constant FACTOR of scale.cu: expected an int"):
        runtime.assemble("scale.cu", "", {"FACTOR": value})


def test_compile_error_names_the_file_and_line_that_a_person_wrote():
    text = '#include "common.cuh"\n\nextern "C" __global__ void broken() { missing(); }\n'
    with pytest.raises(runtime.CompileError, match=r'sm_90: kernels/broken.cu\(3\): error: identifier "missing"'):
        runtime.compile_for(runtime.assemble("broken.cu", text, {}), "sm_90")


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
    code = "import sys, char_gru.kernels.runtime; assert not {'cupy', 'cuda', 'cuda.bindings'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parent.parent)


def test_missing_cupy_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(runtime.DeviceError, match=r"pip install 'char-gru\[cuda13\]' \(or 'char-gru\[cuda12\]'"):
        runtime.empty((1,), np.float32)


def test_missing_gpu_is_said_plainly(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(is_available=lambda: False))
    with pytest.raises(runtime.DeviceError, match="CuPy finds no GPU"):
        runtime.empty((1,), np.float32)


def test_missing_nvrtc_ends_the_command_with_status_2(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert command.main() == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err == "NVRTC is not installed: pip install 'char-gru[test]'\n"


def test_command_prints_a_line_per_kernel_and_architecture(executor, monkeypatch, capsys):
    monkeypatch.setattr(command, "modules_for",
                        lambda architecture: [("scale", {"FACTOR": 3}), ("scale", {"FACTOR": 5})])
    assert command.main(("sm_75", "sm_90")) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == command.row(command.HEADER)
    assert [[cell.strip() for cell in line.split("|")][:4] for line in lines] == [
        [architecture, "scale", f"FACTOR={factor}", "scale"]
        for architecture in ("sm_75", "sm_90") for factor in (3, 5)]


def test_command_ends_with_status_1_where_a_source_does_not_compile(executor, monkeypatch, capsys):
    monkeypatch.setattr(command, "modules_for", lambda architecture: [("scale", {})])
    assert command.main(("sm_90",)) == 1
    assert 'kernels/scale.cu(3): error: identifier "FACTOR" is undefined' in capsys.readouterr().err


# ---- CuPy ------------------------------------------------------------------------------------------------------------

class FakeCupy:
    """As much of CuPy as CupyExecutor calls, on a GPU of 10 multiprocessors that hold two blocks each."""

    ndarray = np.ndarray

    def __init__(self):
        self.modules, self.calls, self.shrinks, self.limits = [], [], False, {}
        self.streams = [FakeStream(self, is_null=True)]
        device = types.SimpleNamespace(id=0, compute_capability="89",
                                       attributes={"MultiProcessorCount": 10, "MaxSharedMemoryPerBlockOptin": 100_000})
        self.cuda = types.SimpleNamespace(
            Device=lambda: device, Stream=functools.partial(FakeStream, self),
            get_current_stream=lambda: self.streams[-1],
            runtime=types.SimpleNamespace(getDeviceProperties=lambda device: {"name": b"NVIDIA L5"}),
            driver=types.SimpleNamespace(
                occupancyMaxActiveBlocksPerMultiprocessor=lambda pointer, threads, shared_bytes: 2))

    def is_available(self):
        return True

    def RawModule(self, code, options, enable_cooperative_groups):
        self.modules.append((code, enable_cooperative_groups))
        return types.SimpleNamespace(get_function=lambda name: FakeKernel(self, name, enable_cooperative_groups))


class FakeStream:
    """A stream that captures the launches made while it is current, as CUDA does: the null stream cannot, an error in
    between shows again at the end of the capture, and until then a blocking stream makes the null stream unusable."""

    def __init__(self, cupy, is_null=False, non_blocking=False):
        self.cupy, self.is_null, self.blocks, self.captured, self.invalid = cupy, is_null, not non_blocking, None, False

    def __enter__(self):
        self.cupy.streams.append(self)

    def __exit__(self, *_):
        assert self.cupy.streams.pop() is self

    def begin_capture(self):
        if self.is_null:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        assert not self.blocks, "other threads may be using the null stream"
        self.captured, self.invalid = [], False

    def end_capture(self):
        captured, self.captured = self.captured, None
        if self.invalid:
            raise RuntimeError("cudaErrorStreamCaptureInvalidated")
        return types.SimpleNamespace(launch=lambda: self.cupy.calls.append(captured))


class FakeKernel:
    """Every object of the same kernel has one limit of dynamic shared memory, as the driver has it."""

    shared_size_bytes = 1000

    def __init__(self, cupy, name, cooperative):
        self.cupy, self.name, self.cooperative = cupy, name, cooperative
        self.kernel = types.SimpleNamespace(ptr=1)

    @property
    def max_dynamic_shared_size_bytes(self):
        return self.cupy.limits.get(self.name, 47 * 1024)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, limit):
        self.cupy.limits[self.name] = limit

    def __call__(self, grid, block, args, shared_mem):
        if self.cupy.shrinks and self.cooperative:
            warnings.warn("The grid size will be reduced from 4 to 2")
        captured = self.cupy.streams[-1].captured
        calls = self.cupy.calls if captured is None else captured
        calls.append((self.name, grid, block, args, shared_mem, self.cooperative, self.max_dynamic_shared_size_bytes))


@pytest.fixture
def cupy(executor, monkeypatch):
    """A fake in place of CuPy, with an executor over it in use."""
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    with runtime.use(runtime.CupyExecutor()):
        yield fake


def test_cupy_executor_tells_what_gpu_it_has(cupy):
    gpu = runtime.GPU("NVIDIA L5", capability=89, multiprocessors=10, shared_bytes=100_000)
    assert runtime.current_executor().gpu == gpu


def test_cupy_kernels_are_compiled_once_and_cooperative_ones_apart(cupy):
    for cooperative in (False, True, False, True):
        launch([np.int32(1)], cooperative=cooperative)
    text = runtime.source("scale", {"FACTOR": 3})
    assert cupy.modules == [(text, False), (text, True)]
    assert [call[5] for call in cupy.calls] == [False, True, False, True]
    assert cupy.calls[0][:5] == ("scale", (2, 1, 1), (32, 1, 1), (np.int32(1),), 0)


def test_cupy_kernels_ask_for_more_than_48_kib_of_shared_memory(cupy):
    for shared_bytes in (40_000, 99_000, 60_000, 99_000):
        launch(shared_bytes=shared_bytes)
    assert [call[6] for call in cupy.calls] == [47 * 1024, 99_000, 99_000, 99_000]
    with pytest.raises(ValueError, match="100001 bytes of shared memory per block; this GPU has 100000"):
        launch(shared_bytes=99_001)


def test_static_shared_memory_counts_towards_the_48_kib(cupy):
    launch(shared_bytes=48 * 1024 - 10)
    assert [call[6] for call in cupy.calls] == [48 * 1024 - 10]


def test_cupy_cooperative_limit_is_the_occupancy_of_all_multiprocessors(cupy):
    launch(grid=20, cooperative=True)
    with pytest.raises(ValueError, match="a cooperative grid of 21 blocks.*holds 20 at once"):
        launch(grid=21, cooperative=True)


def test_cupy_warning_of_a_shrunk_grid_is_an_error(cupy):
    cupy.shrinks = True
    with pytest.raises(UserWarning, match="will be reduced"):
        launch(cooperative=True)
    assert cupy.calls == []


# ---- Graphs ----------------------------------------------------------------------------------------------------------

def names_of(calls):
    """The kernels of calls; the kernels of a graph's launch are in a list of their own."""
    return [names_of(call) if isinstance(call, list) else call[0] for call in calls]


def test_replayable_function_is_run_then_captured_then_only_launched(cupy):
    runs = []

    def step(*arguments):
        runs.append(arguments)
        launch([np.int32(len(runs))])
        launch(cooperative=True)

    replayed = runtime.replayable(step)
    for calls in (["scale", "scale"], [["scale", "scale"]], [["scale", "scale"]]):
        replayed("model")
        assert names_of(cupy.calls) == calls
        last = cupy.calls[-1]
        cupy.calls.clear()
    assert runs == [("model",)] * 2 and last[0][3] == (np.int32(2),)
    assert [call[5] for call in last] == [False, True]


def test_function_that_failed_at_first_is_not_captured(cupy):
    failures = [ValueError("h0")]

    def step():
        launch()
        if failures:
            raise failures.pop()

    replayed = runtime.replayable(step)
    with pytest.raises(ValueError, match="h0"):
        replayed()
    replayed()
    assert names_of(cupy.calls) == ["scale", "scale"]


def test_the_thread_of_the_executor_keeps_a_stream_of_its_own(cupy):
    with cupy.cuda.Stream():
        pass
    assert not cupy.cuda.get_current_stream().is_null


def test_a_thread_that_works_on_the_null_stream_captures_too(cupy):
    with cupy.streams[0]:
        graph = runtime.current_executor().capture(launch)
        assert cupy.cuda.get_current_stream().is_null and cupy.calls == []
        graph.launch()
    assert names_of(cupy.calls) == [["scale"]]


def test_capture_that_fails_names_the_way_without(cupy):
    stream = cupy.cuda.get_current_stream()

    def invalid():
        cupy.cuda.get_current_stream().invalid = True

    def invalid_at_once():
        invalid()
        raise RuntimeError("operation not permitted when stream is capturing")

    for function in (invalid, invalid_at_once):
        with pytest.raises(runtime.DeviceError, match=r"^CUDA .*Invalidated\): .* use --no-graph, or graph=False"):
            runtime.current_executor().capture(function)
        assert cupy.cuda.get_current_stream() is stream


def test_error_of_the_function_ends_the_capture_and_stays_what_it_is(cupy):
    def wrong():
        launch(block=2000)

    with pytest.raises(ValueError, match="2000 threads per block"):
        runtime.current_executor().capture(wrong)
    launch()
    assert names_of(cupy.calls) == ["scale"]
