"""The op sets of the CPU and of the GPU are interchangeable, and the specification has every op."""

import collections
import inspect
import subprocess
import sys
import types
import weakref

import numpy as np
import pytest

from char_gru import kernels
from char_gru.kernels import arrays, runtime
from char_gru.rnn import cpu, reference
from tests.helpers import reference_ops


def functions(module) -> dict[str, types.FunctionType]:
    return {name: value for name, value in vars(module).items()
            if inspect.isfunction(value) and not name.startswith("_") and value.__module__.startswith(module.__name__)}


OPS = functions(cpu)
HOUSEKEEPING = {"empty", "empty_activations", "copy_in", "copy", "to_host", "read", "read_scalar", "peak_memory_mib",
                "replayable", "gru_saved", "generation_saved"}
"""Functions of an op set that compute nothing."""


def positional(op) -> list[tuple[str, object]]:
    """Names and defaults of the parameters that both op sets have."""
    parameters = inspect.signature(op).parameters.values()
    return [(parameter.name, parameter.default) for parameter in parameters if parameter.kind != parameter.KEYWORD_ONLY]


def test_both_have_the_same_ops():
    assert functions(kernels).keys() - {"op_set"} == OPS.keys()
    assert set(kernels.__all__) == OPS.keys() | {"op_set", "GRUSaved", "GenerationSaved"}


@pytest.mark.parametrize("name", OPS)
def test_op_takes_the_same_arguments(name):
    assert positional(getattr(kernels, name)) == positional(OPS[name])
    extra = [parameter for parameter in inspect.signature(getattr(kernels, name)).parameters.values()
             if parameter.kind == parameter.KEYWORD_ONLY]
    assert all(parameter.default is not parameter.empty for parameter in extra)


def test_the_cpu_has_no_parameter_of_its_own():
    assert not any(parameter.kind == parameter.KEYWORD_ONLY for op in OPS.values()
                   for parameter in inspect.signature(op).parameters.values())


def test_reference_has_every_op_and_what_ops_are_made_of():
    assert functions(reference).keys() - {"product", "rounded", "gru_cell", "gru_cell_backward"} == (
        OPS.keys() - HOUSEKEEPING)


@pytest.mark.parametrize("name", sorted(OPS.keys() - HOUSEKEEPING))
def test_reference_takes_the_inputs_of_the_op_in_their_order(name):
    """All but the arrays for its results and to work in; `gru_backward` is given the number of rows of dP instead."""
    inputs = [parameter for parameter in positional(getattr(reference, name))
              if parameter[0] not in ("precision", "weights", "N")]
    remaining = iter(positional(OPS[name]))
    assert all(parameter in remaining for parameter in inputs)


@pytest.mark.parametrize("name", OPS)
def test_reference_as_an_op_set_takes_the_same_arguments(name):
    if name != "empty_activations":
        assert positional(getattr(reference_ops, name)) == positional(OPS[name])


@pytest.mark.parametrize("precision", ["auto", "fp32", "tf32", "bf16"])
def test_op_set_binds_the_precision_of_every_product(executor, precision):
    if runtime.current_executor().array_type is not np.ndarray and precision == "auto":
        pytest.skip("what auto is on a GPU depends on the GPU")
    ops = vars(kernels.op_set(precision))
    assert ops.keys() == OPS.keys()
    for name, op in ops.items():
        has_products = "precision" in inspect.signature(getattr(kernels, name)).parameters
        expected = {"precision": precision.replace("auto", "fp32")} if has_products else {}
        if (name, precision) == ("generate", "bf16"):
            expected = {"weights": "bf16"}
        assert getattr(op, "keywords", {}) == expected, name


def test_op_set_names_the_precisions_there_are(executor):
    with pytest.raises(ValueError, match="^precision: expected auto, fp32, tf32, bf16, got 'fp8'"):
        kernels.op_set("fp8")


def test_importing_the_kernels_needs_no_gpu():
    program = "import sys; sys.modules['cupy'] = None; import char_gru.kernels.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# Arrays

@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint64, bool])
def test_arrays_come_back_as_they_went_in(executor, dtype):
    values = np.random.default_rng(1).integers(0, 2, (3, 2, 5)).astype(dtype)
    for make in (kernels.empty, kernels.empty_activations):
        array, other = make(values.shape, dtype), make(values.shape, dtype)
        kernels.copy_in(array, values.astype(np.float64))
        kernels.copy(other[1:], array[:2])
        kernels.copy_in(other[0], np.broadcast_to(dtype(1), (2, 5)))
        values_back = kernels.to_host(other)
        assert values_back.dtype == dtype and values_back.flags.c_contiguous
        np.testing.assert_array_equal(values_back, np.concatenate([np.ones((1, 2, 5)), values[:2]]))


def test_what_was_copied_in_may_change_at_once(executor):
    array, source = kernels.empty((4,)), np.ones(4)
    kernels.copy_in(array, source)
    source[...] = 2
    np.testing.assert_array_equal(kernels.to_host(array), 1)


def test_a_scalar_is_read_as_it_was(executor):
    array = kernels.empty((1,))
    scalars = []
    for value in range(5):
        kernels.copy_in(array, np.array([value / 4]))
        scalars.append(kernels.read_scalar(array))
    assert [float(scalar) for scalar in scalars] == [0, 0.25, 0.5, 0.75, 1]


def test_an_array_is_read_as_it_was(executor):
    array, values = kernels.empty((2, 3), np.int32), np.arange(6).reshape(2, 3)
    reads = []
    for step in range(3):
        kernels.copy_in(array, values + step)
        reads.append(kernels.read(array[step % 2:]))
    for step in (2, 0, 1, 0):
        content = reads[step]()
        assert content.dtype == np.int32
        np.testing.assert_array_equal(content, values[step % 2:] + step)


def test_floats_are_32_bits_wide_unless_told(executor):
    assert kernels.empty((2,)).dtype == kernels.empty_activations((2,)).dtype == np.float32


class FakeStream:
    """Work that is done in its order, when somebody waits for it."""

    def __init__(self, device):
        self.device, self.started = device, []

    def __enter__(self):
        self.before, self.device.current = self.device.current, self

    def __exit__(self, *_):
        self.device.current = self.before

    def synchronize(self):
        while self.started:
            self.started.pop(0)()

    def wait_event(self, event):
        self.started.append(event.synchronize)


class FakeEvent:
    def __init__(self, device):
        self.device, self.done = device, False

    def record(self, stream=None):
        self.stream = stream or self.device.current
        self.stream.started.append(lambda: setattr(self, "done", True))

    def synchronize(self):
        if not self.done:
            self.stream.synchronize()


class FakeDevice:
    """As much of CuPy as copies call, with the stream that computes and that of copies."""

    def __init__(self):
        self.computing = self.current = FakeStream(self)
        self.copying = FakeStream(self)
        self.memory = []

    def empty_pinned(self, shape, dtype):
        memory = np.full(shape, 77, dtype)
        self.memory.append(weakref.ref(memory))
        return memory

    def empty(self, shape, dtype):
        content = np.full(shape, 88, dtype)
        self.memory.append(weakref.ref(content))
        return self.array(content)

    def array(self, content):
        """An array that is not NumPy's."""
        def start(destination, source) -> None:
            self.current.started.append(lambda: np.copyto(destination, source))

        data = types.SimpleNamespace(content=content)
        data.copy_from_device_async = lambda source, nbytes: start(content, source.content)
        return types.SimpleNamespace(
            shape=content.shape, dtype=content.dtype, nbytes=content.nbytes, content=content, data=data,
            set=lambda memory: start(content, memory), get=lambda out, blocking: start(out, content))


@pytest.fixture
def device(monkeypatch):
    device = FakeDevice()
    cuda = types.SimpleNamespace(Event=lambda disable_timing: FakeEvent(device),
                                 Stream=lambda non_blocking: device.copying,
                                 get_current_stream=lambda: device.current)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda, empty=device.empty))
    monkeypatch.setitem(sys.modules, "cupyx", types.SimpleNamespace(empty_pinned=device.empty_pinned))
    monkeypatch.setattr(arrays, "_in_flight", collections.deque())
    arrays._copy_stream.cache_clear()
    yield device
    arrays._copy_stream.cache_clear()


def test_asynchronous_copies_move_what_was_there_when_they_were_started(device):
    array, source = device.array(np.zeros(1)), np.array([1.0])
    kernels.copy_in(array, source)
    first = kernels.read_scalar(array)
    source[0] = 2
    kernels.copy_in(array, source)
    second = kernels.read_scalar(array)
    assert array.content == [0], "starting a copy waited for it"
    assert [float(second), float(first), float(second)] == [2, 1, 2]
    assert array.content == [2]


def test_reading_waits_when_the_content_is_wanted(device):
    array = device.array(np.zeros(3))
    kernels.copy_in(array, np.arange(3))
    read = kernels.read(array)
    kernels.copy_in(array, np.zeros(3))
    assert len(device.computing.started) > 0, "starting to read waited for it"
    np.testing.assert_array_equal(read(), [0, 1, 2])


def test_data_of_the_next_step_reaches_the_device_while_this_step_is_computed(device):
    array = device.array(np.zeros(1))
    kernels.copy_in(array, np.array([1.0]))
    kernels.copy_in(array, np.array([2.0]))
    device.copying.synchronize()
    assert array.content == [0], "the stream of copies touched what a step may still read"
    device.computing.synchronize()
    assert array.content == [2]


def test_large_arrays_are_copied_at_once_and_without_pinned_memory(device):
    values = np.arange(arrays.PINNED_BYTES // 4 + 1, dtype=np.float64)
    array = device.array(np.zeros(len(values), np.float32))
    kernels.copy_in(array, values)
    np.testing.assert_array_equal(array.content, values)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(arrays.runtime, "to_host", lambda array: array.content.copy())
        np.testing.assert_array_equal(kernels.read(array)(), values)
    assert device.memory == []


def test_memory_of_an_asynchronous_copy_lives_until_its_end(device):
    array = device.array(np.zeros(1))
    for value in range(3):
        kernels.copy_in(array, np.array([value]))
        kernels.read_scalar(array)
    assert len(device.memory) == 9 and all(memory() is not None for memory in device.memory)
    device.computing.synchronize()
    kernels.read_scalar(array)
    assert [memory() is not None for memory in device.memory] == 9 * [False] + [True]
