"""The rules of CUDA that tests/cuda_device keeps, each in a small case: what works, and what is an error.

Sections name the chapter of the CUDA documentation that has the rules. `python -m pytest --cuda-device` runs these
tests.
"""

import contextlib
import ctypes
import gc
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from char_gru.kernels import runtime
from tests import cuda_device
from tests.cuda_device import elf

ROOT = Path(__file__).parent.parent

KERNELS = r"""
extern "C" __global__ void add(float *x, float value) { x[threadIdx.x] += value; }
extern "C" __global__ void __launch_bounds__(64) turn(float *to, const float *from)
{
    __shared__ float tile[100];
    extern __shared__ float more[];
    tile[threadIdx.x] = from[threadIdx.x];
    __syncthreads();
    more[threadIdx.x] = tile[63 - threadIdx.x];
    __syncthreads();
    to[threadIdx.x] = more[threadIdx.x];
}
extern "C" __global__ void widths(long long *to, int a, unsigned long long b, float c)
{
    to[0] = a; to[1] = b; to[2] = __float_as_int(c);
}
"""

GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2  # cudaStreamCaptureMode
TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
NON_BLOCKING = 1
NOT_READY, UNSUPPORTED, CAPTURED_EVENT = 600, 900, 907  # cudaError
N = 8  # floats of an array here


@pytest.fixture
def cuda(device, request):
    """CuPy's binding of the CUDA Runtime API, on a GPU that works as late as it may."""
    import cupy

    device.set(request.config.getoption("device_like"))
    load_kernels()  # a capture must not
    return cupy.cuda.runtime


def load_kernels():
    import cupy

    if not _functions:
        module = cupy.RawModule(code=KERNELS, options=("--std=c++17",))
        _functions.update({name: module.get_function(name) for name in ("add", "turn", "widths")})
    return _functions


_functions: dict = {}


def filled(cuda, value):
    """Address of N floats on the device."""
    address = cuda.malloc(4 * N)
    cuda.memcpy(address, np.full(N, value, np.float32).ctypes.data, 4 * N, TO_DEVICE)
    return address


def peek(address):
    """What memory of the device holds at this moment, which a program could not see."""
    return ctypes.c_float.from_address(address).value


def add(address, value, stream=0):
    """Launches the kernel that adds a value to N floats."""
    launch(load_kernels()["add"].kernel.ptr, N, stream, np.uint64(address), np.float32(value))


def launch(function, threads, stream, *parameters, blocks=1, cooperative=False):
    """cuLaunchKernel, or cuLaunchCooperativeKernel."""
    import cupy

    values = [np.array([parameter]) for parameter in parameters]
    addresses = np.array([value.ctypes.data for value in values], np.uint64)
    start, extra = ((cupy.cuda.driver.launchCooperativeKernel, ()) if cooperative else
                    (cupy.cuda.driver.launchKernel, (0,)))
    start(function, blocks, 1, 1, threads, 1, 1, 0, stream, addresses.ctypes.data, *extra)


def raises(name):
    """The error of CUDA that a block must end with."""
    return pytest.raises(Exception, match=name)


@contextlib.contextmanager
def captured(cuda, stream, mode=RELAXED):
    """A capture around a block, ended without a look at the result."""
    cuda.streamBeginCapture(stream, mode)
    try:
        yield
    finally:
        with contextlib.suppress(cuda.CUDARuntimeError):
            cuda.streamEndCapture(stream)


def executable(cuda, graph):
    return cuda.graphInstantiate(graph)


# ---- "API synchronization behavior", "Stream synchronization behavior" -----------------------------------------------

def test_work_is_done_when_it_is_waited_for(cuda, device):
    x, stream = filled(cuda, 1), cuda.streamCreate()
    add(x, 1, stream)
    assert peek(x) == 1
    cuda.streamSynchronize(stream)
    assert peek(x) == 2
    device.work_at_once(True)
    add(x, 1, stream)
    assert peek(x) == 3


def test_streams_are_not_ordered(cuda):
    x, a, b = filled(cuda, 1), cuda.streamCreate(), cuda.streamCreate()
    add(x, 1, a)
    cuda.memsetAsync(x, 0, 4 * N, b)
    cuda.streamSynchronize(b)
    assert peek(x) == 0
    cuda.streamSynchronize(a)
    assert peek(x) == 1


@pytest.mark.parametrize("flags, waits", [(0, True), (NON_BLOCKING, False)])
def test_null_stream_and_blocking_streams_wait_for_each_other(cuda, flags, waits):
    x, stream = filled(cuda, 1), cuda.streamCreateWithFlags(flags)
    cuda.memsetAsync(x, 0, 4 * N, stream)
    add(x, 1)
    cuda.streamSynchronize(0)
    assert peek(x) == (1 if waits else 2)
    cuda.deviceSynchronize()
    add(x, 5)
    add(x, 1, stream)
    cuda.streamSynchronize(stream)
    assert peek(x) == (7 if waits else 1)
    cuda.deviceSynchronize()


def test_a_destroyed_stream_ends_its_work(cuda):
    x, stream = filled(cuda, 1), cuda.streamCreate()
    add(x, 1, stream)
    cuda.streamDestroy(stream)
    assert peek(x) == 1
    with raises("cudaErrorInvalidResourceHandle"):
        cuda.streamSynchronize(stream)
    cuda.deviceSynchronize()
    assert peek(x) == 2


def test_query_of_a_stream_says_whether_it_is_done(cuda):
    x, stream = filled(cuda, 1), cuda.streamCreate()
    assert cuda.streamQuery(stream) == 0
    add(x, 1, stream)
    assert cuda.streamQuery(stream) == NOT_READY
    cuda.streamSynchronize(stream)
    assert cuda.streamQuery(stream) == 0


def test_pinned_memory_is_read_and_written_when_the_copy_is_done(cuda):
    host = cuda.hostAlloc(4 * N, 0)
    values = np.frombuffer((ctypes.c_float * N).from_address(host), np.float32)
    x, stream = filled(cuda, 0), cuda.streamCreate()
    values[...] = 1
    cuda.memcpyAsync(x, host, 4 * N, TO_DEVICE, stream)
    values[...] = 2  # too early
    cuda.streamSynchronize(stream)
    assert peek(x) == 2
    add(x, 1, stream)
    cuda.memcpyAsync(host, x, 4 * N, TO_HOST, stream)
    assert values[0] == 2
    cuda.streamSynchronize(stream)
    assert values[0] == 3


def test_pageable_memory_may_be_read_and_written_late_too(cuda):
    """CUDA: "the function might be synchronous with respect to host"."""
    values, x, stream = np.ones(N, np.float32), filled(cuda, 0), cuda.streamCreate()
    cuda.memcpyAsync(x, values.ctypes.data, 4 * N, TO_DEVICE, stream)
    values[...] = 2
    cuda.memcpyAsync(values.ctypes.data, x, 4 * N, TO_HOST, stream)
    cuda.streamSynchronize(stream)
    assert peek(x) == 2 and values[0] == 2


def test_memcpy_waits_but_for_a_copy_inside_the_device(cuda):
    x, y, values = filled(cuda, 1), filled(cuda, 5), np.zeros(N, np.float32)
    add(x, 1)
    cuda.memcpy(values.ctypes.data, x, 4 * N, TO_HOST)
    assert values[0] == 2
    cuda.memcpy(y, x, 4 * N, ON_DEVICE)
    assert peek(y) == 5
    cuda.deviceSynchronize()
    assert peek(y) == 2


# ---- "Event Management" ----------------------------------------------------------------------------------------------

def test_an_event_orders_two_streams(cuda):
    x, a, b, event = filled(cuda, 1), cuda.streamCreate(), cuda.streamCreate(), cuda.eventCreate()
    cuda.memsetAsync(x, 0, 4 * N, a)
    cuda.eventRecord(event, a)
    add(x, 9, a)  # after the event
    cuda.streamWaitEvent(b, event)
    add(x, 1, b)
    cuda.streamSynchronize(b)
    assert peek(x) == 1
    cuda.deviceSynchronize()
    assert peek(x) == 10


def test_a_wait_is_for_the_record_before_it(cuda):
    x, a, b, event = filled(cuda, 1), cuda.streamCreate(), cuda.streamCreate(), cuda.eventCreate()
    cuda.streamWaitEvent(b, event)  # never recorded: no wait
    cuda.eventRecord(event, a)
    cuda.streamWaitEvent(b, event)
    add(x, 1, a)
    cuda.eventRecord(event, a)
    cuda.streamSynchronize(b)
    assert peek(x) == 1
    cuda.eventSynchronize(event)
    assert peek(x) == 2


def test_query_of_an_event_says_whether_it_is_done_and_a_loop_of_queries_ends(cuda):
    import cupy

    x, event = filled(cuda, 1), cupy.cuda.Event()
    assert event.done
    add(x, 1)
    event.record(cupy.cuda.Stream.null)
    assert not event.done
    while not event.done:
        pass
    assert peek(x) == 2


def test_elapsed_time_needs_two_events_that_are_done_and_have_times(cuda):
    start, end, untimed = cuda.eventCreate(), cuda.eventCreate(), cuda.eventCreateWithFlags(2)
    cuda.eventRecord(start, 0)
    cuda.eventRecord(end, 0)
    with raises("cudaErrorNotReady"):
        cuda.eventElapsedTime(start, end)
    cuda.eventSynchronize(end)
    assert cuda.eventElapsedTime(start, end) >= 0
    cuda.eventRecord(untimed, 0)
    cuda.eventSynchronize(untimed)
    with raises("cudaErrorInvalidResourceHandle"):
        cuda.eventElapsedTime(start, untimed)


# ---- "Stream Capture": what is recorded ------------------------------------------------------------------------------

def test_a_capture_records_and_a_graph_repeats(cuda):
    x, stream = filled(cuda, 1), cuda.streamCreateWithFlags(NON_BLOCKING)
    cuda.streamBeginCapture(stream, RELAXED)
    value = np.float32(2)
    add(x, value, stream)
    add(x, 1, stream)
    graph = cuda.streamEndCapture(stream)
    cuda.deviceSynchronize()
    assert peek(x) == 1
    runs = executable(cuda, graph)
    cuda.graphDestroy(graph)
    for expected in (4, 7):
        cuda.graphLaunch(runs, stream)
        cuda.streamSynchronize(stream)
        assert peek(x) == expected


def test_a_graph_has_the_forks_and_joins_of_its_events(cuda):
    """a: x = 0; b and c: y = x + 1 and z = x + 2 on streams of their own; a again: x = y, then + 10."""
    a, b, c = (cuda.streamCreateWithFlags(NON_BLOCKING) for _ in range(3))
    forked, from_b, from_c = (cuda.eventCreate() for _ in range(3))
    x, y, z = (filled(cuda, 5) for _ in range(3))
    cuda.streamBeginCapture(a, THREAD_LOCAL)
    cuda.memsetAsync(x, 0, 4 * N, a)
    cuda.eventRecord(forked, a)
    for stream, target, value, event in ((b, y, 1, from_b), (c, z, 2, from_c)):
        cuda.streamWaitEvent(stream, forked)
        assert cuda.streamIsCapturing(stream)
        cuda.memcpyAsync(target, x, 4 * N, ON_DEVICE, stream)
        add(target, value, stream)
        cuda.eventRecord(event, stream)
        cuda.streamWaitEvent(a, event)
    cuda.memcpyAsync(x, y, 4 * N, ON_DEVICE, a)
    add(x, 10, a)
    graph = cuda.streamEndCapture(a)
    assert not any(cuda.streamIsCapturing(stream) for stream in (a, b, c))
    runs = executable(cuda, graph)
    for _ in range(2):
        cuda.graphLaunch(runs, a)
        cuda.streamSynchronize(a)
        assert [peek(address) for address in (x, y, z)] == [11, 1, 2]


def test_launches_of_a_graph_do_not_overlap(cuda):
    x, a, b = filled(cuda, 1), *(cuda.streamCreateWithFlags(NON_BLOCKING) for _ in range(2))
    cuda.streamBeginCapture(a, RELAXED)
    add(x, 1, a)
    runs = executable(cuda, cuda.streamEndCapture(a))
    cuda.graphLaunch(runs, a)
    cuda.graphLaunch(runs, b)
    cuda.streamSynchronize(b)
    assert peek(x) == 3


def test_an_executable_graph_may_be_destroyed_while_it_runs(cuda):
    x, stream = filled(cuda, 1), cuda.streamCreateWithFlags(NON_BLOCKING)
    cuda.streamBeginCapture(stream, RELAXED)
    add(x, 1, stream)
    runs = executable(cuda, cuda.streamEndCapture(stream))
    cuda.graphLaunch(runs, stream)
    cuda.graphExecDestroy(runs)
    cuda.streamSynchronize(stream)
    assert peek(x) == 2


# ---- "Stream Capture": prohibited and unhandled operations, cross-stream dependencies --------------------------------

def test_the_null_stream_cannot_be_captured(cuda):
    with raises("cudaErrorStreamCaptureUnsupported"):
        cuda.streamBeginCapture(0, RELAXED)


@pytest.mark.parametrize("flags, allowed", [(0, False), (NON_BLOCKING, True)])
def test_the_null_stream_may_be_used_only_while_no_blocking_stream_is_captured(cuda, flags, allowed):
    x, stream = filled(cuda, 1), cuda.streamCreateWithFlags(flags)
    cuda.streamBeginCapture(stream, RELAXED)
    if allowed:
        add(x, 1)
        cuda.streamEndCapture(stream)
    else:
        with raises("CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"):
            add(x, 1)
        with raises("cudaErrorStreamCaptureInvalidated"):
            cuda.streamEndCapture(stream)
        assert not cuda.streamIsCapturing(stream)


@pytest.mark.parametrize("query", [False, True], ids=["wait", "query"])
def test_a_captured_stream_cannot_be_waited_for_or_queried(cuda, query):
    stream = cuda.streamCreateWithFlags(NON_BLOCKING)
    cuda.streamBeginCapture(stream, RELAXED)
    if query:
        assert cuda.streamQuery(stream) == UNSUPPORTED
    else:
        with raises("cudaErrorStreamCaptureUnsupported"):
            cuda.streamSynchronize(stream)
    with raises("cudaErrorStreamCaptureInvalidated"):
        cuda.streamEndCapture(stream)


def test_the_device_cannot_be_waited_for_while_a_stream_is_captured(cuda):
    stream = cuda.streamCreateWithFlags(NON_BLOCKING)
    with captured(cuda, stream), raises("cudaErrorStreamCaptureUnsupported"):
        cuda.deviceSynchronize()


def test_a_captured_event_cannot_be_waited_for_or_queried(cuda):
    stream, event = cuda.streamCreateWithFlags(NON_BLOCKING), cuda.eventCreate()
    with captured(cuda, stream):
        cuda.eventRecord(event, stream)
        assert cuda.eventQuery(event) == CAPTURED_EVENT
        with raises("cudaErrorCapturedEvent"):
            cuda.eventSynchronize(event)


def unsafe_calls(cuda):
    """Calls that CUDA counts among the potentially unsafe ones."""
    event, memory, pinned = cuda.eventCreate(), cuda.malloc(4), cuda.hostAlloc(4, 0)
    return {"cudaMalloc": lambda: cuda.malloc(4), "cudaFree": lambda: cuda.free(memory),
            "cudaHostAlloc": lambda: cuda.hostAlloc(4, 0), "cudaFreeHost": lambda: cuda.freeHost(pinned),
            "cudaEventQuery": lambda: cuda.eventQuery(event)}


@pytest.mark.parametrize("mode, here, elsewhere", [
    (GLOBAL, False, False), (THREAD_LOCAL, False, True), (RELAXED, True, True)],
    ids=["global", "thread-local", "relaxed"])
@pytest.mark.parametrize("call", ["cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost", "cudaEventQuery"])
def test_mode_of_a_capture_says_which_threads_may_make_unsafe_calls(cuda, mode, here, elsewhere, call):
    for in_other_thread, allowed in ((False, here), (True, elsewhere)):
        function, stream = unsafe_calls(cuda)[call], cuda.streamCreateWithFlags(NON_BLOCKING)
        cuda.streamBeginCapture(stream, mode)
        failures = []

        def attempt(function=function, failures=failures):
            try:
                if function() == UNSUPPORTED:
                    failures.append("cudaErrorStreamCaptureUnsupported")
            except cuda.CUDARuntimeError as error:
                failures.append(str(error))

        if in_other_thread:
            thread = threading.Thread(target=attempt)
            thread.start()
            thread.join()
        else:
            attempt()
        if allowed:
            assert failures == []
            cuda.streamEndCapture(stream)
        else:
            assert "cudaErrorStreamCaptureUnsupported" in failures[0]
            with raises("cudaErrorStreamCaptureInvalidated"):
                cuda.streamEndCapture(stream)


@pytest.mark.parametrize("mode, expected", [(THREAD_LOCAL, "cudaErrorStreamCaptureWrongThread"), (RELAXED, None)])
def test_only_the_thread_that_began_a_capture_ends_it_unless_it_is_relaxed(cuda, mode, expected):
    stream, failures = cuda.streamCreateWithFlags(NON_BLOCKING), []
    cuda.streamBeginCapture(stream, mode)

    def end():
        try:
            cuda.streamEndCapture(stream)
        except cuda.CUDARuntimeError as error:
            failures.append(str(error))

    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    if expected is None:
        assert failures == []
    else:
        assert expected in failures[0]
        with raises("cudaErrorStreamCaptureInvalidated"):
            cuda.streamEndCapture(stream)


def test_a_capture_does_not_wait_for_work_outside(cuda):
    stream, other, event = cuda.streamCreateWithFlags(NON_BLOCKING), cuda.streamCreate(), cuda.eventCreate()
    cuda.eventRecord(event, other)
    with captured(cuda, stream), raises("cudaErrorStreamCaptureIsolation"):
        cuda.streamWaitEvent(stream, event)


def test_the_null_stream_does_not_join_a_capture(cuda):
    stream, event = cuda.streamCreateWithFlags(NON_BLOCKING), cuda.eventCreate()
    with captured(cuda, stream):
        cuda.eventRecord(event, stream)
        with raises("cudaErrorStreamCaptureImplicit"):
            cuda.streamWaitEvent(0, event)


def test_two_captures_do_not_become_one(cuda):
    a, b, event = *(cuda.streamCreateWithFlags(NON_BLOCKING) for _ in range(2)), cuda.eventCreate()
    with captured(cuda, a), captured(cuda, b):
        cuda.eventRecord(event, a)
        with raises("cudaErrorStreamCaptureMerge"):
            cuda.streamWaitEvent(b, event)


def test_every_fork_is_joined_before_the_end(cuda):
    a, b = (cuda.streamCreateWithFlags(NON_BLOCKING) for _ in range(2))
    x, event = filled(cuda, 1), cuda.eventCreate()
    cuda.streamBeginCapture(a, RELAXED)
    cuda.eventRecord(event, a)
    cuda.streamWaitEvent(b, event)
    add(x, 1, b)
    with raises("cudaErrorStreamCaptureUnmatched"):
        cuda.streamEndCapture(b)
    with raises("cudaErrorStreamCaptureInvalidated"):
        cuda.streamEndCapture(a)
    cuda.streamBeginCapture(a, RELAXED)
    cuda.eventRecord(event, a)
    cuda.streamWaitEvent(b, event)
    add(x, 1, b)
    with raises("cudaErrorStreamCaptureUnjoined"):
        cuda.streamEndCapture(a)


def test_an_invalid_capture_takes_nothing_more(cuda):
    x, stream = filled(cuda, 1), cuda.streamCreateWithFlags(NON_BLOCKING)
    with captured(cuda, stream):
        with raises("cudaErrorStreamCaptureUnsupported"):
            cuda.streamSynchronize(stream)
        with raises("cudaErrorStreamCaptureInvalidated"):
            cuda.memsetAsync(x, 0, 4 * N, stream)


def test_pinned_memory_is_copied_in_a_capture_and_pageable_memory_is_not_modelled(cuda, device):
    host, x, stream = cuda.hostAlloc(4 * N, 0), filled(cuda, 1), cuda.streamCreateWithFlags(NON_BLOCKING)
    values = np.frombuffer((ctypes.c_float * N).from_address(host), np.float32)
    cuda.streamBeginCapture(stream, RELAXED)
    cuda.memcpyAsync(x, host, 4 * N, TO_DEVICE, stream)
    runs = executable(cuda, cuda.streamEndCapture(stream))
    for value in (3, 4):
        values[...] = value
        cuda.graphLaunch(runs, stream)
        cuda.streamSynchronize(stream)
        assert peek(x) == value
    with captured(cuda, stream), raises("cudaErrorStreamCaptureUnsupported"):
        cuda.memcpyAsync(x, np.ones(N, np.float32).ctypes.data, 4 * N, TO_DEVICE, stream)
    assert "not pinned, inside a capture" in device.reports()[0]


def test_no_module_is_loaded_in_a_capture(cuda, device):
    """Drivers before CUDA 12.3 refuse it."""
    import cupy

    stream = cuda.streamCreateWithFlags(NON_BLOCKING)
    fresh = cupy.RawKernel('extern "C" __global__ void fresh(float *x) { *x = 1; }', "fresh")
    with captured(cuda, stream), raises("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        fresh.compile()
    assert device.reports() == ["a module is loaded while a stream is captured"]


# ---- "Execution Control", "Occupancy", "Compute Capabilities" --------------------------------------------------------

@pytest.mark.parametrize("architecture", runtime.ARCHITECTURES)
def test_a_cubin_says_what_the_compiler_says(architecture):
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(KERNELS.encode(), b"kernels.cu", 0, [], [])
    options = [f"--gpu-architecture={architecture}".encode(), b"-ftz=true", b"--device-as-default-execution-space",
               b"--std=c++17", b"--generate-line-info"]
    assert nvrtc.nvrtcCompileProgram(program, len(options), options)[0] == 0
    image = bytearray(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, image)
    assert elf.file_size(image[:64], lambda offset, size: image[offset:offset + size]) == len(image)
    kernels = {kernel.name: kernel for kernel in elf.kernels(bytes(image))}
    for name, use in runtime.compile_for(KERNELS, architecture).items():
        assert kernels[name].shared_bytes == use.shared_bytes
        assert use.registers <= kernels[name].registers <= use.registers + 2  # sm_75 takes two more than it says
    assert {name: kernel.max_threads for name, kernel in kernels.items()} == {"add": 1024, "turn": 64, "widths": 1024}
    assert kernels["widths"].parameters == (8, 4, 8, 4)


def test_a_parameter_is_as_wide_as_the_kernel_says(cuda):
    import cupy

    to = cupy.zeros(3, np.int64)
    load_kernels()["widths"]((1,), (1,), (to, np.int32(-1), np.uint64(2**40), np.float32(3)))
    assert cupy.asnumpy(to).tolist() == [-1, 2**40, np.float32(3).view(np.int32)]
    load_kernels()["widths"]((1,), (1,), (to, np.int64(2**32 + 5), np.uint64(7), np.float64(3)))  # nobody checks
    assert cupy.asnumpy(to).tolist() == [5, 7, 0]


def test_ptx_is_that_of_the_cubins_compilation_and_that_of_the_harness(cuda, device):
    """tests/host_ptx compiles the same source for the virtual architecture alone, with options of its own."""
    import cupy

    source = runtime.source("adam", {}) + "// compiled by this test alone\n"
    cupy.RawModule(code=source, options=runtime._OPTIONS).get_function("adam")
    [compiled] = (compiled for compiled in device._modules.compiled.values() if compiled.source == source)
    [architecture] = (option.removeprefix("-arch=") for option in compiled.options if option.startswith("-arch="))
    assert architecture.startswith("sm_")
    assert compiled.ptx == runtime.ptx_for(source, architecture)


def test_launches_are_counted_when_they_have_run(cuda, device, request):
    def count(kind):
        found = re.search(rf"launches from {kind}: [^;]*\badd (\d+)", device.summary())
        return int(found[1]) if found else 0

    kind, other = ("PTX", "source") if request.config.getoption("ptx") else ("source", "PTX")
    x, before = filled(cuda, 1), count(kind)
    add(x, 1)
    assert count(kind) == before
    cuda.deviceSynchronize()
    assert (count(kind), count(other)) == (before + 1, 0)


def test_shared_memory_beyond_48_kib_has_to_be_asked_for(cuda):
    import cupy

    kernel = load_kernels()["turn"]
    assert kernel.shared_size_bytes == 400 and kernel.max_dynamic_shared_size_bytes == 48 * 1024 - 400
    x, y = (cupy.asarray(np.arange(64, dtype=np.float32)) for _ in range(2))
    kernel((1,), (64,), (y, x), shared_mem=48 * 1024 - 400)
    assert cupy.asnumpy(y).tolist() == list(range(63, -1, -1))
    with raises("CUDA_ERROR_INVALID_VALUE"):
        kernel((1,), (64,), (y, x), shared_mem=48 * 1024)
    kernel.max_dynamic_shared_size_bytes = 48 * 1024
    kernel((1,), (64,), (y, x), shared_mem=48 * 1024)
    with raises("CUDA_ERROR_INVALID_VALUE"):
        kernel.max_dynamic_shared_size_bytes = 232448 - 399
    kernel.max_dynamic_shared_size_bytes = 48 * 1024 - 400


def test_a_block_has_no_more_threads_than_the_kernel_and_the_gpu_allow(cuda):
    import cupy

    x = cupy.zeros(2048, np.float32)
    with raises("CUDA_ERROR_INVALID_VALUE"):
        load_kernels()["add"]((1,), (1025,), (x, np.float32(1)))
    with raises("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        load_kernels()["turn"]((1,), (65,), (x, x), shared_mem=400)
    with raises("CUDA_ERROR_INVALID_VALUE"):
        launch(load_kernels()["add"].kernel.ptr, 1, 0, np.uint64(x.data.ptr), np.float32(1), blocks=0)


@pytest.mark.parametrize("architecture", [75, 80, 90, 120])
def test_machine_code_of_another_generation_is_refused(cuda, device, monkeypatch, architecture, request):
    import cupy

    monkeypatch.setattr(cupy.cuda.compiler, "_get_arch_for_options_for_nvrtc",
                        lambda arch=None: (f"-arch=sm_{architecture}", "cubin"))
    capability = cuda_device.gpu_named(request.config.getoption("device_like")).capability
    refused = architecture // 10 != capability // 10
    with raises("CUDA_ERROR_NO_BINARY_FOR_GPU") if refused else contextlib.nullcontext():
        cupy.RawModule(code=f"{KERNELS}// {architecture}", options=("--std=c++17",)).get_function("add")


OCCUPANCY = {  # threads, dynamic shared memory -> blocks on a multiprocessor; `add` takes few registers
    "t4": {(256, 0): 4, (32, 0): 16, (128, 48 * 1024): 1, (128, 20 * 1024): 3},
    "a100": {(256, 0): 8, (32, 0): 32, (128, 48 * 1024): 3, (128, 20 * 1024): 7},
    "3060": {(256, 0): 6, (32, 0): 16, (128, 48 * 1024): 2, (128, 20 * 1024): 4},
    "4090": {(256, 0): 6, (32, 0): 24, (128, 48 * 1024): 2, (128, 20 * 1024): 4},
    "h100": {(256, 0): 8, (32, 0): 32, (128, 48 * 1024): 4, (128, 20 * 1024): 10},
    "5090": {(256, 0): 6, (32, 0): 24, (128, 48 * 1024): 2, (128, 20 * 1024): 4},
}


@pytest.mark.parametrize("gpu", OCCUPANCY)
def test_occupancy_is_that_of_the_gpu(cuda, device, gpu):
    kernel = load_kernels()["add"]
    device.set(gpu)
    try:
        for (threads, shared_bytes), blocks in OCCUPANCY[gpu].items():
            assert occupancy(kernel, threads, shared_bytes) == blocks
        limit = cuda_device.gpu_named(gpu).shared_bytes
        assert cuda.deviceGetAttribute(cuda.cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == limit
        assert cuda.getDeviceProperties(0)["name"].decode() == cuda_device.gpu_named(gpu).name
        kernel.max_dynamic_shared_size_bytes = limit
        assert occupancy(kernel, 128, limit) == 1
    finally:
        kernel.max_dynamic_shared_size_bytes = 48 * 1024


def occupancy(kernel, threads, shared_bytes):
    import cupy

    return cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel.kernel.ptr, threads, shared_bytes)


def test_registers_limit_occupancy(cuda):
    import cupy

    names = ", ".join(f"x{i}" for i in range(60))
    loads = " ".join(f"x{i} = p[{i} * 32 + threadIdx.x];" for i in range(60))
    stores = " ".join(f"p[{i} * 32 + threadIdx.x] = x{59 - i};" for i in range(60))
    source = f'extern "C" __global__ void wide(float *p) {{ float {names}; {loads} __syncthreads(); {stores} }}'
    kernel = cupy.RawKernel(source, "wide")
    assert kernel.num_regs > 60
    per_warp = -(-kernel.num_regs * 32 // 256) * 256
    assert occupancy(kernel, 512, 0) == 65536 // (per_warp * 16) < 4


def test_a_cooperative_grid_fits_on_the_device(cuda, request):
    import cupy

    multiprocessors = cuda_device.gpu_named(request.config.getoption("device_like")).multiprocessors

    cooperative = cupy.RawModule(code=KERNELS, options=("--std=c++17",), enable_cooperative_groups=True)
    kernel, x = cooperative.get_function("add"), cupy.zeros(1024, np.float32)
    kernel((2,), (1024,), (x, np.float32(0)))
    too_many = occupancy(kernel, 1024, 0) * multiprocessors + 1
    with pytest.warns(UserWarning, match="will be reduced"):  # by CuPy, which asks for the occupancy as well
        kernel((too_many,), (1024,), (x, np.float32(0)))
    with raises("CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"):
        launch(kernel.kernel.ptr, 1024, 0, np.uint64(x.data.ptr), np.float32(0), blocks=too_many, cooperative=True)


# ---- "Memory Management", "Error Handling" ---------------------------------------------------------------------------

def test_fresh_memory_is_poisoned(cuda):
    assert np.isnan(peek(cuda.malloc(4)))
    assert np.isnan(peek(cuda.hostAlloc(4, 0)))


def test_memory_that_is_not_there_is_an_error_and_what_is_freed_comes_back(cuda, device):
    before = device.used_memory()
    device.limit_memory(before + 2**20)
    memory = cuda.malloc(2**20)
    free, total = cuda.memGetInfo()
    assert (free, total) == (0, before + 2**20)
    with raises("cudaErrorMemoryAllocation"):
        cuda.malloc(1)
    cuda.free(memory)
    cuda.free(cuda.malloc(2**20))
    assert device.used_memory() == before


def test_cupys_pool_gives_back_what_it_keeps_before_it_says_that_memory_is_out(cuda, device):
    import cupy

    gc.collect()  # arrays of earlier tests
    device.limit_memory(device.used_memory())
    with pytest.raises(MemoryError, match="Out of memory"):
        cupy.empty(2**32, np.uint8)  # CuPy has now given back all that it kept
    device.limit_memory(device.used_memory() + 2**20)
    cupy.empty(2**19, np.uint8)
    kept = cupy.empty(2**20, np.uint8)
    with pytest.raises(MemoryError, match="Out of memory"):
        cupy.empty(2**20, np.uint8)  # less might fit between arrays of earlier tests
    del kept
    cupy.get_default_memory_pool().free_all_blocks()


def test_memory_is_freed_once_and_by_its_own_function(cuda):
    memory, pinned = cuda.malloc(4), cuda.hostAlloc(4, 0)
    for free, address in ((cuda.free, pinned), (cuda.freeHost, memory), (cuda.free, memory + 4)):
        with raises("cudaErrorInvalidValue"):
            free(address)
    cuda.free(memory)
    with raises("cudaErrorInvalidValue"):
        cuda.free(memory)
    cuda.freeHost(pinned)


def test_free_waits_for_all_work(cuda):
    x, memory, stream = filled(cuda, 1), cuda.malloc(4), cuda.streamCreateWithFlags(NON_BLOCKING)
    add(x, 1, stream)
    cuda.free(memory)
    assert peek(x) == 2


def test_copies_and_fills_stay_inside_their_memory(cuda, device):
    x, values = cuda.malloc(512), np.zeros(1000, np.uint8)
    for call in (lambda: cuda.memcpy(x, values.ctypes.data, 513, TO_DEVICE), lambda: cuda.memset(x, 0, 513),
                 lambda: cuda.memcpy(values.ctypes.data, values.ctypes.data, 1, TO_DEVICE)):
        with raises("cudaErrorInvalidValue"):
            call()
    assert len(device.reports()) == 3


@pytest.mark.parametrize("freed", [True, False], ids=["freed", "never allocated"])
def test_a_kernel_that_is_given_memory_that_is_not_there_makes_every_later_call_fail(cuda, device, freed):
    x = filled(cuda, 1)
    if freed:
        cuda.free(x)
    else:
        x = np.zeros(N).ctypes.data
    add(x, 1)
    with raises("cudaErrorIllegalAddress"):
        cuda.deviceSynchronize()
    with raises("cudaErrorIllegalAddress"):
        cuda.malloc(4)
    [report] = device.reports()
    memory = "freed memory" if freed else "memory that was never allocated"
    assert report.startswith(f"add: argument 0 is {memory} at 0x")


def test_a_graph_whose_memory_was_freed_is_found_out(cuda, device):
    x, stream = filled(cuda, 1), cuda.streamCreateWithFlags(NON_BLOCKING)
    cuda.streamBeginCapture(stream, RELAXED)
    add(x, 1, stream)
    runs = executable(cuda, cuda.streamEndCapture(stream))
    cuda.free(x)
    cuda.graphLaunch(runs, stream)
    with raises("cudaErrorIllegalAddress"):
        cuda.streamSynchronize(stream)
    assert "add: argument 0 is freed memory" in device.reports()[0]


def test_a_launch_that_fails_shows_later_and_in_every_call(cuda, device):
    x = filled(cuda, 1)
    device.fail_launch("add", 2)
    add(x, 1)
    add(x, 1)
    add(x, 1)  # queued before anybody knew
    with raises("cudaErrorLaunchFailure"):
        cuda.deviceSynchronize()
    for call in (lambda: cuda.malloc(4), lambda: cuda.memGetInfo(), lambda: cuda.streamCreate(), lambda: add(x, 1)):
        with raises("cudaErrorLaunchFailure|CUDA_ERROR_LAUNCH_FAILED"):
            call()
    assert peek(x) == 2
    assert device.reports() == ["add fails, as a test asked for"]


def test_a_launch_after_its_module_is_unloaded_is_found_out(cuda, device):
    import cupy

    kernel = cupy.RawKernel('extern "C" __global__ void gone(float *x) { *x = 1; }', "gone")
    kernel.compile()
    function = kernel.kernel.ptr
    launch(function, 1, 0, np.uint64(cuda.malloc(4)))
    del kernel
    cupy.clear_memo()
    with raises("CUDA_ERROR_INVALID_HANDLE"):
        launch(function, 1, 0, np.uint64(cuda.malloc(4)))


OVERRUN = """
import cupy, numpy as np
kernel = cupy.RawKernel('extern "C" __global__ void overrun(float *x, long long i) { x[i] = 1; }', "overrun")
x = cupy.zeros(128, np.float32)
kernel((1,), (1,), (x, np.int64(127)))
cupy.cuda.runtime.deviceSynchronize()
print("inside", flush=True)
kernel((1,), (1,), (x, np.int64(128)))
cupy.cuda.runtime.deviceSynchronize()
"""


def test_a_kernel_that_leaves_its_memory_ends_the_process_with_its_name(device):
    done = subprocess.run([sys.executable, "tests/cuda_device", "-c", OVERRUN], cwd=ROOT, check=False,
                          capture_output=True, text=True)
    assert done.stdout == "inside\n" and done.returncode < 0
    assert "overrun touches memory beyond an allocation at 0x" in done.stderr


# ---- What is not modelled --------------------------------------------------------------------------------------------

def test_a_function_that_is_not_modelled_says_its_name(cuda, device):
    with raises("cudaErrorNotSupported"):
        cuda.deviceGetLimit(0)
    assert device.reports() == ["cudaDeviceGetLimit is not modelled"]


def test_a_kernel_of_cupys_own_says_its_name(cuda, device):
    import cupy

    x = cupy.zeros(3, np.float32)
    with raises("CUDA_ERROR_NOT_SUPPORTED"):
        x + x
    assert device.reports() == [
        "DoesNotFit: cupy_add__float32_float32_float32: a kernel of CuPy's own, which is not modelled"]


def test_a_wheel_that_lacks_a_function_is_refused_with_the_name(device):
    with pytest.raises(cuda_device.DoesNotFit, match="lacks cudaNeverHeardOf: .* does not know this version of CuPy"):
        cuda_device._replace_runtime(device._library, {"cudaNeverHeardOf": 0, "cudaMalloc": 0})


def test_a_process_has_the_device_before_cupy_or_not_at_all(cuda):
    with pytest.raises(cuda_device.DoesNotFit, match="CuPy is imported already"):
        cuda_device.install()
