"""The op sets of the CPU and of the GPU are interchangeable, and the specification has every op."""

import inspect
import subprocess
import sys
import types

import numpy as np
import pytest

from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.rnn import cpu, reference, reference_ops


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


def test_reference_has_every_op():
    assert functions(reference).keys() - {"product", "rounded", "gru_cell", "gru_cell_backward"} == (
        OPS.keys() - HOUSEKEEPING)


@pytest.mark.parametrize("name", sorted(OPS.keys() - HOUSEKEEPING))
def test_reference_takes_the_inputs_of_the_op_in_their_order(name):
    """All parameters but result arrays and buffers; instead of dP, `gru_backward` is given its number of rows."""
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
        pytest.skip("which precision auto takes depends on the GPU")
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


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 1), (3, 2), (6,), ()])
def test_copying_in_broadcasts_and_reshapes_nothing(executor, shape):
    for ops in (kernels, cpu):
        with pytest.raises(ValueError, match="destination: expected .* of the source's shape .*, got "):
            ops.copy_in(ops.empty((2, 3)), np.zeros(shape))


@pytest.mark.parametrize("count", [6, 2**19])  # with pinned memory, and without
def test_strided_destination_is_refused_by_the_kernels_and_filled_by_the_cpu(executor, count):
    values = np.arange(count).reshape(2, -1)
    array = kernels.empty(values.shape[::-1])
    with pytest.raises(ValueError, match=r"destination: expected a C-contiguous array .* with strides \(4, "):
        kernels.copy_in(array.T, values)
    activations = cpu.empty_activations(values.shape)
    assert not activations.flags.c_contiguous
    cpu.copy_in(activations, values)
    np.testing.assert_array_equal(activations, values)


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
