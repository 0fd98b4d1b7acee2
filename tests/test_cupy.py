"""CupyExecutor and the copies of arrays.py under the real CuPy, on a device that does its work as late as it may.

`python -m pytest --cuda-device` runs these tests; tests/test_cuda_device.py has the device's own.
"""

import contextlib
import ctypes
import functools
import gc
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import cuda.pathfinder
import numpy as np
import pytest

from char_gru import kernels
from char_gru.kernels import arrays, runtime
from char_gru.kernels.scratch import scratch
from char_gru.rnn.config import Sizes
from char_gru.rnn.model import LanguageModel
from tests.cuda_device import gpu_named

ROOT = Path(__file__).parent.parent
CUDA_ERROR_INVALID_IMAGE, CUDA_ERROR_LAUNCH_FAILED = 200, 719

SOURCES = {
    "add": 'extern "C" __global__ void add(float *x, float value) { x[threadIdx.x] += value; }',
    "shared": """
        extern "C" __global__ void shared(float *x, int count)
        {
            __shared__ float kept[256];
            extern __shared__ float filling[];
            kept[threadIdx.x] = threadIdx.x;
            for (int i = threadIdx.x; i < count; i += 32)
                filling[i] = kept[i % 32];
            __syncthreads();
            x[threadIdx.x] = filling[count - 1 - threadIdx.x];
        }""",
    "meet": """
        #include "barrier.cuh"
        extern "C" __global__ void meet(unsigned *counters, float *x)
        {
            Group group(counters, 0, blockIdx.x, gridDim.x);
            x[blockIdx.x] += 1;
            group.barrier();
            if (x[(blockIdx.x + 1) % gridDim.x] != 1) x[blockIdx.x] = -1;
            group.leave();
        }""",
    "widths": """
        extern "C" __global__ void widths(long long *to, int a, unsigned b, long long c, unsigned long long d, float e)
        {
            to[0] = a; to[1] = b; to[2] = c; to[3] = d; to[4] = __float_as_int(e);
        }""",
}


@pytest.fixture
def cupy(executor, device, monkeypatch):
    """CuPy, with the kernels above in the place of the project's, and every copy ended before and after."""
    import cupy

    device.work_at_once(False)
    read = runtime._read
    monkeypatch.setattr(runtime, "_read", lambda name: SOURCES.get(name.removesuffix(".cu")) or read(name))
    runtime._source.cache_clear()
    cupy.cuda.runtime.deviceSynchronize()
    yield cupy
    runtime._source.cache_clear()
    if not device.failed:
        cupy.cuda.runtime.deviceSynchronize()


def launch(name, args, grid=1, block=32, **options):
    runtime.launch(name, name, grid, block, args, constants={}, **options)


def add(x, value):
    launch("add", [x, np.float32(value)], block=x.size)


def peek(array):
    """The first element at this moment, which a program could not see."""
    return ctypes.c_float.from_address(array.data.ptr).value


def on_device(values):
    array = runtime.to_device(np.asarray(values, np.float32))
    runtime.to_host(array)
    return array


# ---- The device, modules, launches -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["t4", "5090", "small"])
def test_executor_says_what_gpu_it_has(device, name):
    code = "from char_gru.kernels import runtime; print(repr(runtime.CupyExecutor().gpu))"
    done = subprocess.run([sys.executable, "tests/cuda_device", "--gpu", name, "-c", code], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    assert done.stdout == f"{gpu_named(name)!r}\n"


def test_versions_are_those_of_cupy_and_its_libraries(cupy, executor):
    versions, nvrtc = executor.versions(), cupy.cuda.nvrtc.getVersion()
    assert versions["cupy"] == cupy.__version__ and versions["nvrtc"] == f"{nvrtc[0]}.{nvrtc[1]}"
    assert versions["driver"].startswith(f"for CUDA {nvrtc[0]}.")
    assert versions["cuda_runtime"].startswith(f"{nvrtc[0]}.")


def test_cupy_that_finds_no_gpu_is_said_plainly(cupy, monkeypatch):
    monkeypatch.setattr(cupy, "is_available", lambda: False)
    with pytest.raises(runtime.DeviceError, match="CuPy finds no GPU: check the driver with nvidia-smi"):
        runtime.CupyExecutor()


def test_arrays_are_made_and_copied(cupy, executor):
    zeros = runtime.zeros((3, 2), np.float32)
    np.testing.assert_array_equal(runtime.to_host(zeros), np.zeros((3, 2)))
    strided = np.arange(6.0).reshape(2, 3).T
    np.testing.assert_array_equal(runtime.to_host(runtime.to_device(strided)), strided)
    assert runtime.to_device(strided).flags.c_contiguous
    assert runtime.to_device(np.array(2.0)).shape == ()
    empty = runtime.empty((3, 2), np.float32)
    executor.copy(empty, zeros)
    np.testing.assert_array_equal(runtime.to_host(empty), np.zeros((3, 2)))
    assert runtime.address(empty) == empty.data.ptr
    before = runtime.peak_memory_mib()
    big = runtime.empty((2**21,), np.float32)
    assert kernels.peak_memory_mib() == runtime.peak_memory_mib() >= max(before, big.nbytes / 2**20)


def test_scalars_have_the_width_of_the_parameter(cupy):
    to = runtime.zeros((5,), np.int64)
    launch("widths", [to, np.int32(-3), np.uint32(2**32 - 1), np.int64(-2**40), np.uint64(2**41), np.float32(0.125)])
    assert runtime.to_host(to).tolist() == [-3, 2**32 - 1, -2**40, 2**41, np.float32(0.125).view(np.int32)]


def test_kernels_are_compiled_once_and_cooperative_ones_apart(cupy):
    executor = runtime.CupyExecutor()
    with runtime.use(executor):
        x = on_device(np.zeros(32))
        for cooperative in (False, True, False, True):
            launch("add", [x, np.float32(1)], cooperative=cooperative)
        assert len(executor._modules) == 2
        assert runtime.to_host(x).tolist() == [4] * 32


def test_shared_memory_is_asked_for_and_never_lowered(cupy, executor):
    x, limit = on_device(np.zeros(32)), executor.gpu.shared_bytes
    sizes = (48 * 1024 - 1000, 40_000, 64_000, 56_000, 64_000, limit - 1024)
    for shared_bytes in (*sizes, *sizes):
        count = shared_bytes // 4
        launch("shared", [x, np.int32(count)], shared_bytes=shared_bytes)
        assert runtime.to_host(x).tolist() == [(count - 1 - i) % 32 for i in range(32)]
    with pytest.raises(ValueError, match=f"{limit + 4} bytes of shared memory per block; this GPU has {limit}"):
        launch("shared", [x, np.int32(1)], shared_bytes=limit - 1020)


def test_blocks_of_a_cooperative_launch_run_together(cupy):
    counters, x = runtime.zeros((2,), np.uint32), on_device(np.zeros(40))
    launch("meet", [counters, x], grid=40, block=1, cooperative=True)
    assert runtime.to_host(x).tolist() == [1] * 40


def test_a_cooperative_grid_is_limited_by_the_occupancy_of_all_multiprocessors(cupy, executor):
    x, gpu = on_device(np.zeros(1024)), executor.gpu
    held = gpu.multiprocessors * (2 if gpu.capability in (80, 90) else 1)  # of 1024 threads
    launch("add", [x, np.float32(0)], grid=held, block=1024, cooperative=True)
    with pytest.raises(ValueError, match=f"a cooperative grid of {held + 1} blocks.*holds {held} at once"):
        launch("add", [x, np.float32(0)], grid=held + 1, block=1024, cooperative=True)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="will be reduced"):
        warnings.simplefilter("ignore")
        executor.launch(runtime.source("add", {}), "add", (held + 1, 1, 1), (1024, 1, 1), [x, np.float32(0)], 0, True)


def load(source, kernel):
    """A new executor compiles the source and loads the kernel."""
    runtime.CupyExecutor().launch(source, kernel, (1, 1, 1), (1, 1, 1), [], 0, False)


def test_source_that_does_not_compile_is_said_with_the_first_error(cupy):
    source = runtime.assemble("broken.cu", "\nnonsense", {})
    with pytest.raises(runtime.CompileError, match=r"^any: kernels/broken.cu\(2\): error: this declaration [^\n]*$"):
        load(source, "any")


@pytest.mark.parametrize("disturb, said", [
    ("architecture", r"^NVRTC \d+\.\d+ does not compile for compute capability \d+\.\d: char-gru needs 7\.5 "),
    ("headers", r"^CuPy cannot compile \(Failed to find CUDA headers.*\): install it as 'char-gru\[cuda13\]' or "),
    ("nvrtc", r"^CuPy cannot compile \(no libnvrtc\): install it as 'char-gru\[cuda13\]' or "),
    ("newer", r"^the driver cannot load fresh \(CUDA_ERROR_NO_BINARY_FOR_GPU: .*\): .* a newer CuPy and NVRTC$"),
    ("image", r"^the driver cannot load fresh \(CUDA_ERROR_INVALID_IMAGE: .*: update the driver, or "),
])
def test_what_keeps_a_kernel_from_loading_is_told_apart(cupy, executor, monkeypatch, disturb, said):
    source = SOURCES["add"].replace("add", "fresh") + f"  // {disturb}"
    if disturb in ("architecture", "newer"):  # one that NVRTC does not know, or one of another GPU
        other = 30 if disturb == "architecture" else 80 if executor.gpu.capability >= 90 else 90
        monkeypatch.setattr(cupy.cuda.compiler, "_get_arch_for_options_for_nvrtc",
                            lambda arch=None: (f"-arch=sm_{other}", "cubin"))
    elif disturb == "nvrtc":
        error = cuda.pathfinder.DynamicLibNotFoundError("no libnvrtc")
        for module, name in ((cupy.cuda.compiler, "_compile_module_with_cache"), (cupy.cuda.nvrtc, "getVersion")):
            monkeypatch.setattr(module, name, raising(error))
    elif disturb == "headers":  # what CuPy raises where neither CUDA_PATH nor a package has them
        message = "Failed to find CUDA headers. Please install CUDA toolkit headers"
        monkeypatch.setattr(cupy.cuda.compiler, "_compile_module_with_cache", raising(RuntimeError(message)))
    else:
        error = cupy.cuda.driver.CUDADriverError(CUDA_ERROR_INVALID_IMAGE)
        monkeypatch.setattr(cupy.cuda.compiler, "_compile_module_with_cache", raising(error))
    with pytest.raises(runtime.DeviceError, match=said):
        load(source, "fresh")


def raising(error):
    def function(*arguments, **options):
        raise error

    return function


def test_kernel_that_its_module_lacks_is_named(cupy):
    source = runtime.source("add", {})
    with pytest.raises(ValueError, match="^kernels/add.cu has no kernel subtract$"):
        load(source, "subtract")


def test_failure_of_the_driver_stays_what_it_is(cupy, monkeypatch):
    for kind in (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError):
        error = kind(CUDA_ERROR_LAUNCH_FAILED)
        monkeypatch.setattr(cupy.cuda.compiler, "_compile_module_with_cache", raising(error))
        with pytest.raises(kind, match="LAUNCH_FAILED|LaunchFailure") as raised:
            load(SOURCES["add"] + "  // failure", "add")
        assert raised.value is error


# ---- Streams, graphs, threads ----------------------------------------------------------------------------------------

def test_the_thread_of_the_executor_keeps_a_stream_of_its_own(cupy):
    with cupy.cuda.Stream():
        pass
    assert cupy.cuda.get_current_stream() != cupy.cuda.Stream.null


def test_replayable_function_is_run_then_captured_then_only_launched(cupy):
    x, y, runs = on_device(np.zeros(4)), on_device(np.zeros(4)), []

    def step(*arguments):
        runs.append(arguments)
        add(x, 1)
        kernels.copy(y, x)
        launch("add", [y, np.float32(10)], block=4, cooperative=True)

    replayed = runtime.replayable(step)
    for count in range(1, 5):
        replayed("model")
        assert len(runs) == min(count, 2)
        assert runtime.to_host(x).tolist() == [count] * 4 and runtime.to_host(y).tolist() == [count + 10] * 4
    assert runs == [("model",)] * 2


def test_a_capture_does_nothing_and_a_graph_does_it_each_time(cupy, executor):
    x = on_device([1, 1])
    graph = executor.capture(lambda: add(x, 1))
    assert runtime.to_host(x).tolist() == [1, 1]
    graph.launch()
    graph.launch()
    assert runtime.to_host(x).tolist() == [3, 3]


def test_function_that_failed_at_first_is_not_captured(cupy):
    x, failures = on_device([0]), [ValueError("h0")]

    def step():
        add(x, 1)
        if failures:
            raise failures.pop()

    replayed = runtime.replayable(step)
    with pytest.raises(ValueError, match="h0"):
        replayed()
    replayed()
    replayed()
    assert runtime.to_host(x).tolist() == [3]


def test_a_thread_that_works_on_the_null_stream_captures_too(cupy, executor):
    x = on_device([0])
    add(x, 1)
    with cupy.cuda.Stream.null:
        graph = executor.capture(lambda: add(x, 1))
        assert cupy.cuda.get_current_stream() == cupy.cuda.Stream.null
        graph.launch()
    assert runtime.to_host(x).tolist() == [2]


def test_other_threads_launch_while_one_captures(cupy, executor):
    x, y = on_device([0]), on_device([0])
    add(y, 1)

    def capturing():
        add(x, 1)
        in_another_thread(lambda: add(y, 1))
        add(x, 1)

    executor.capture(capturing).launch()
    assert runtime.to_host(x).tolist() == runtime.to_host(y).tolist() == [2]


def test_threads_step_at_once(cupy):
    """Three threads replay graphs of their own at the same time."""
    results = []

    def work(n):
        x = runtime.zeros((3,), np.float32)
        replayed = runtime.replayable(lambda: add(x, n))
        for _ in range(20):
            replayed()
        results.append((runtime.to_host(x) / n).tolist())

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    work(3)
    for thread in threads:
        thread.join()
    assert results == [[20] * 3] * 3


@pytest.mark.slow
def test_models_train_in_threads_of_their_own(executor, device):
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, 7, (2, 4, 3))

    def train(seed, losses):
        model = LanguageModel(Sizes(7, 5, 6, 1), 4, 3, seed=seed, ops=kernels.op_set("fp32"))
        steps = [model.train_step(inputs, targets)["loss"] for _ in range(5)]
        losses[seed] = [float(loss) for loss in steps]

    expected, losses = {}, {}
    for seed in range(3):
        train(seed, expected)
    threads = [threading.Thread(target=train, args=(seed, losses)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert losses == expected


def in_another_thread(function):
    failures = []

    def run():
        try:
            function()
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == []


def test_capture_that_fails_names_the_way_without(cupy, executor):
    stream = cupy.cuda.get_current_stream()
    with pytest.raises(runtime.DeviceError, match=r"^CUDA cannot capture .*Capture.* use --no-graph, or graph=False"):
        executor.capture(lambda: cupy.cuda.get_current_stream().synchronize())
    assert cupy.cuda.get_current_stream() == stream


def test_launch_that_fails_during_a_capture_is_not_blamed_on_it(cupy, executor, device):
    x, stream = on_device([0]), cupy.cuda.Stream(non_blocking=True)
    add(x, 1)
    runtime.to_host(x)

    def function():
        with stream:
            add(x, 1)
        with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
            stream.synchronize()
        add(x, 1)

    device.fail_launch("add")
    with pytest.raises(RuntimeError, match="unspecified launch failure") as error:
        executor.capture(function)
    assert device.reports() == ["add fails, as a test asked for"] and not isinstance(error.value, runtime.DeviceError)
    device.reset()  # before the streams that the traceback keeps are freed


@pytest.mark.parametrize("error", [runtime.DeviceError, runtime.CompileError, RuntimeError, KeyboardInterrupt])
def test_error_of_the_function_stays_what_it_is(cupy, executor, error):
    def function():
        raise error("said inside")

    with pytest.raises(error, match="^said inside$") as raised:
        executor.capture(function)
    assert raised.type is error
    x = on_device([0])
    add(x, 1)
    assert runtime.to_host(x).tolist() == [1]


@pytest.mark.parametrize("make", [lambda: runtime.empty((2, 3), np.float32), lambda: runtime.zeros((2, 3), np.int32),
                                  lambda: runtime.to_device(np.zeros((2, 3)))], ids=["empty", "zeros", "to_device"])
def test_array_made_in_a_capture_is_refused(cupy, executor, make):
    """CuPy's pool would give memory that it has, and give it to others while the graph uses it."""
    make()
    with pytest.raises(runtime.DeviceError, match=r"^an array of shape \(2, 3\) is made while launches are captured"):
        executor.capture(make)
    assert make().shape == (2, 3)


def test_step_from_another_thread_has_scratch_and_a_graph_of_its_own(cupy):
    x, runs = on_device([0]), []

    def step():
        runs.append(threading.get_ident())
        kernels.copy(scratch("a test", (1,), zeros=True), x)
        add(x, 1)

    replayed = runtime.replayable(step)
    for _ in range(3):
        replayed()
        in_another_thread(replayed)
        in_another_thread(lambda: [replayed() for _ in range(3)])
    assert runtime.to_host(x).tolist() == [3 + 3 + 9]
    assert max(map(runs.count, runs)) == 2  # a new thread may get the number of one that ended


def test_error_of_the_function_ends_the_capture(cupy, executor):
    x = on_device([0])
    with pytest.raises(ValueError, match="2000 threads per block") as error:
        executor.capture(lambda: launch("add", [x, np.float32(1)], block=2000))
    cupy.cuda.runtime.deviceSynchronize()
    del error  # and with it the traceback, which would keep a stream that is still captured
    add(x, 1)
    assert runtime.to_host(x).tolist() == [1]


# ---- Copies of arrays.py ---------------------------------------------------------------------------------------------

def test_copies_move_what_was_there_when_they_were_started(cupy):
    x, source = on_device([0]), np.array([1.0])
    kernels.copy_in(x, source)
    first = kernels.read_scalar(x)
    source[0] = 2
    kernels.copy_in(x, source)
    second = kernels.read_scalar(x)
    assert peek(x) == 0, "starting a copy waited for it"
    assert [float(second), float(first), float(second)] == [2, 1, 2]
    assert peek(x) == 2


def test_reading_waits_when_the_content_is_wanted(cupy):
    x = on_device([5, 5, 5])
    add(x, 1)
    read = kernels.read(x)
    add(x, 1)
    assert peek(x) == 5, "starting to read waited for it"
    assert read().tolist() == [6, 6, 6]


def test_data_of_the_next_step_reaches_the_device_while_this_step_is_computed(cupy):
    x = on_device([0])
    kernels.copy_in(x, np.array([1.0]))
    first = kernels.read_scalar(x)
    kernels.copy_in(x, np.array([2.0]))
    _, (buffer,) = arrays._in_flight[-1]
    arrays._copy_stream().synchronize()
    assert peek(buffer) == 2, "the data is not there"
    assert peek(x) == 0, "the stream of copies touched what a step may still read"
    assert float(first) == 1
    assert runtime.to_host(x).tolist() == [2]


def test_the_stream_of_copies_does_not_wait_for_steps_on_the_null_stream(cupy):
    x, other = on_device([0]), on_device([0])
    with cupy.cuda.Stream.null:
        add(other, 1)
        kernels.copy_in(x, np.array([1.0]))
        arrays._copy_stream().synchronize()
        assert peek(other) == 0
        assert float(kernels.read_scalar(x)) == 1


def test_data_of_the_next_step_does_not_land_in_memory_that_this_step_still_reads(cupy):
    """An array that was dropped goes back to the pool of its stream, while a launch that reads it waits."""
    x, dropped = on_device(np.zeros(32)), on_device(np.full(32, 3))
    kernels.copy(x, dropped)
    del dropped
    other = on_device_without_wait(cupy, 32)
    arrays._copy_stream().synchronize()
    assert runtime.to_host(x).tolist() == [3] * 32
    assert runtime.to_host(other).tolist() == [7] * 32


def on_device_without_wait(cupy, n):
    with cupy.cuda.Stream():
        array = kernels.empty((n,))
    kernels.copy_in(array, np.full(n, 7))
    return array


def test_memory_of_a_copy_is_not_used_again_before_its_end(cupy):
    """Pinned memory goes back to a pool of CuPy's that hands it out at once."""
    several = [on_device([0]) for _ in range(6)]
    for value, x in enumerate(several):
        kernels.copy_in(x, np.array([value]))
    assert [runtime.to_host(x)[0] for x in several] == list(range(6))
    x, reads = on_device([0]), []
    for value in range(6):
        kernels.copy_in(x, np.array([value]))
        reads.append(kernels.read_scalar(x))
        gc.collect()
    assert [float(read) for read in reads] == list(range(6))
    kernels.copy_in(x, np.array([9]))
    kernels.read(x)  # nobody keeps what is copied to
    gc.collect()
    other = arrays._pinned(x)
    other[...] = 1
    assert runtime.to_host(x).tolist() == [9] and other.tolist() == [1]


def test_memory_of_an_interrupted_copy_is_kept_to_its_end(cupy, monkeypatch):
    class Interrupted:
        """The current stream, on which Ctrl-C comes before it waits for the copied data."""

        def __init__(self, stream):
            self.ptr = stream.ptr

        def wait_event(self, event):
            raise KeyboardInterrupt

    x, current = on_device([0]), cupy.cuda.get_current_stream
    with monkeypatch.context() as patched:
        patched.setattr(cupy.cuda, "get_current_stream", lambda: Interrupted(current()))
        with pytest.raises(KeyboardInterrupt):
            kernels.copy_in(x, np.array([9]))
    gc.collect()
    other = arrays._pinned(x)
    other[...] = 1
    _, (_, buffer) = arrays._in_flight[-1]
    arrays._copy_stream().synchronize()
    assert peek(buffer) == 9 and other.tolist() == [1]


def test_memory_of_copies_that_ended_is_given_back(cupy):
    x = on_device([0])
    for value in range(5):
        kernels.copy_in(x, np.array([value]))
    assert len(arrays._in_flight) >= 5
    cupy.cuda.runtime.deviceSynchronize()
    kernels.read_scalar(x)
    assert len(arrays._in_flight) == 1


def test_large_arrays_are_copied_and_waited_for_without_pinned_memory(cupy, monkeypatch):
    monkeypatch.setattr(arrays, "_pinned", None)
    values = np.arange(arrays.PINNED_BYTES // 4 + 1, dtype=np.float64)
    x = kernels.empty(values.shape)
    kernels.copy_in(x, values)
    assert peek(x) == 0
    np.testing.assert_array_equal(kernels.read(x)(), values)


def test_arrays_of_numpy_are_copied_at_once(cupy):
    destination = np.zeros(3, np.float32)
    kernels.copy_in(destination, np.arange(3))
    assert destination.tolist() == [0, 1, 2] and kernels.read(destination)().tolist() == [0, 1, 2]


def test_arrays_may_be_freed_while_launches_use_them(cupy, device):
    """With no pool, CuPy frees an array when Python drops it, and CUDA waits; a graph then must not be launched."""
    of_the_pool = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(None)
    try:
        x = kernels.empty((4,))
        kernels.copy_in(x, np.zeros(4))
        add(x, 1)
        assert kernels.read(x)().tolist() == [1] * 4
        step = functools.partial(add, x, 1)
        graph = runtime.current_executor().capture(step)
        del x, step
        gc.collect()
        arrays._in_flight.clear()
        graph.launch()
        with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
            cupy.cuda.runtime.deviceSynchronize()
        assert "add: argument 0 is freed memory" in device.reports()[0]
        device.reset()
    finally:
        cupy.cuda.set_allocator(of_the_pool)
