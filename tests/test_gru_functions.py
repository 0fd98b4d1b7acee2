"""The GRU layer as two functions on the arrays of an op set, compared with the specification."""

from typing import NamedTuple

import numpy as np
import pytest

from char_gru import kernels
from char_gru.rnn import cpu, gru, reference
from tests.helpers.compare import assert_close

T, B, I, H = 4, 3, 6, 5


class Case(NamedTuple):
    """Arguments of `gru.forward`, and dy_tb, a gradient of its output."""

    x_tb: np.ndarray
    h0: np.ndarray
    W_ih: np.ndarray
    W_hh: np.ndarray
    b_ih: np.ndarray
    b_hh: np.ndarray
    dy_tb: np.ndarray

    def on(self, ops, dtype=np.float32) -> "Case":
        """The arrays on an op set."""
        arrays = [ops.empty(array.shape, dtype) for array in self]
        for array, source in zip(arrays, self):
            ops.copy_in(array, source)
        return Case(*arrays)


def random_case(T=T, B=B, I=I, H=H) -> Case:
    rng = np.random.default_rng(T + B)
    shapes = (T, B, I), (B, H), (3 * H, I), (3 * H, H), (3 * H,), (3 * H,), (T, B, H)
    return Case(*(rng.standard_normal(shape).astype(np.float32).astype(np.float64) for shape in shapes))


def by_reference(case: Case, dtype) -> dict[str, np.ndarray]:
    """States and gradients by the specification."""
    x_tb, h0, W_ih, W_hh, b_ih, b_hh, dy_tb = (array.astype(dtype) for array in case)
    T, B, I = x_tb.shape
    x, ids_tb = x_tb.reshape(T * B, I), np.arange(T * B).reshape(T, B)
    saved = reference.gru_forward(reference.input_table_forward(x, W_ih, b_ih), ids_tb, W_hh, b_hh, h0)
    dP, dW_hh, db_hh, dh0 = reference.gru_backward(dy_tb, None, ids_tb, W_hh, saved, T * B)
    dx, dW_ih, db_ih = reference.input_table_backward(dP, x, W_ih)
    return {"h_tb": saved.h_tb} | gru.Gradients(dx.reshape(x_tb.shape), dh0, dW_ih, dW_hh, db_ih, db_hh)._asdict()


def computed(case: Case, ops, **options) -> dict[str, np.ndarray]:
    """States and gradients by the functions."""
    saved = gru.forward(*case[:-1], ops)
    gradients = gru.backward(case.dy_tb, case.x_tb, case.W_ih, case.W_hh, saved, ops, **options)
    return {name: None if array is None else ops.to_host(array)
            for name, array in ({"h_tb": saved.h_tb} | gradients._asdict()).items()}


def assert_agree(results: dict[str, np.ndarray], case: Case) -> None:
    """Assert that results in float32 are those of the specification."""
    exact, single = by_reference(case, np.float64), by_reference(case, np.float32)
    assert results.keys() == exact.keys()
    for name, array in results.items():
        assert_close(name, array, exact[name], single[name])


@pytest.mark.parametrize("sizes", [{}, {"T": 1}, {"B": 1}, {"I": 1}, {"H": 1}, {"I": 40, "H": 33}], ids=str)
def test_functions_match_reference(sizes):
    case = random_case(**sizes)
    assert_agree(computed(case.on(cpu), cpu), case)


def test_functions_match_reference_in_float64():
    case = random_case()
    exact = by_reference(case, np.float64)
    for name, array in computed(case, cpu).items():
        np.testing.assert_allclose(array, exact[name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_functions_on_the_kernels_match_reference(executor):
    ops, case = kernels.op_set("fp32"), random_case()
    assert_agree(computed(case.on(ops), ops), case)


@pytest.mark.parametrize("on_kernels", [False, True])
def test_gradient_of_the_input_is_left_out_and_the_others_stay(executor, on_kernels):
    ops = kernels.op_set("fp32") if on_kernels else cpu
    case = random_case()
    results, without = (computed(case.on(ops), ops, needs_dx=needs_dx) for needs_dx in (True, False))
    assert without.pop("dx_tb") is None
    exact = by_reference(case, np.float64)
    for name, array in without.items():
        assert_close(name, array, exact[name], results[name])


def test_gradient_of_the_last_state_is_that_of_the_last_step():
    case, dh_last = random_case(), np.random.default_rng(1).standard_normal((B, H))
    dy_tb = case.dy_tb.copy()
    dy_tb[-1] += dh_last

    def loss(h0):
        h_tb = gru.forward(case.x_tb, h0, *case[2:-1]).h_tb
        return np.sum(h_tb[1:] * case.dy_tb) + np.sum(h_tb[T] * dh_last)

    step = np.zeros((B, H))
    step[1, 2] = 1e-6
    slope = (loss(case.h0 + step) - loss(case.h0 - step)) / 2e-6
    saved = gru.forward(*case[:-1])
    assert gru.backward(dy_tb, case.x_tb, case.W_ih, case.W_hh, saved).dh0[1, 2] == pytest.approx(slope, rel=1e-7)


def test_any_memory_order_will_do_on_the_cpu():
    case = random_case()
    turned = Case(*(np.asfortranarray(array) for array in case))
    for name, array in computed(case, cpu).items():
        np.testing.assert_allclose(computed(turned, cpu)[name], array, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("on_kernels", [False, True])
def test_batch_of_no_rows_has_zero_gradients(executor, on_kernels):
    ops = kernels.op_set("fp32") if on_kernels else cpu
    results = computed(random_case(B=0).on(ops), ops)
    assert results["h_tb"].shape == (T + 1, 0, H) and results["dx_tb"].shape == (T, 0, I)
    assert results["dW_hh"].shape == (3 * H, H) and not any(array.any() for array in results.values())


@pytest.mark.parametrize("argument, shape, message", [
    ("x_tb", (0, B, I), r"^x_tb: expected .* T and I at least 1, got float64 \(0, 3, 6\)$"),
    ("x_tb", (B, I), r"^x_tb: expected .* \(T, B, I\), .*, got float64 \(3, 6\)$"),
    ("x_tb", (T, B, I + 1), r"^W_ih: expected float64 \(15, 7\), got float64 \(15, 6\)$"),
    ("h0", (B + 1, H), r"^h0: expected float64 \(3, 5\), got float64 \(4, 5\)$"),
    ("W_ih", (I, 3 * H), r"^W_ih: expected float64 \(15, 6\), got float64 \(6, 15\)$"),
    ("W_hh", (H, 3 * H), r"^W_ih: expected float64 \(45, 6\)"),
    ("W_hh", (3 * H,), r"^W_hh: expected \(3H, H\), H at least 1, got \(15,\)$"),
    ("b_ih", (H,), r"^b_ih: expected float64 \(15,\), got float64 \(5,\)$"),
    ("b_hh", (3 * H, 1), r"^b_hh: expected float64 \(15,\), got float64 \(15, 1\)$"),
])
def test_other_shapes_are_refused(argument, shape, message):
    with pytest.raises(ValueError, match=message):
        gru.forward(*random_case()._replace(**{argument: np.ones(shape)})[:-1])


@pytest.mark.parametrize("argument", Case._fields[:-1])
def test_other_dtypes_are_refused(argument):
    case = random_case()
    with pytest.raises(ValueError, match=r"expected float(32|64) .*, got float(32|64) "):
        gru.forward(*case._replace(**{argument: getattr(case, argument).astype(np.float32)})[:-1])
    with pytest.raises(ValueError, match="^x_tb: expected float32 or float64 .*, got int64 "):
        gru.forward(*case._replace(x_tb=np.ones((T, B, I), np.int64))[:-1])


@pytest.mark.parametrize("dy_tb, saved_steps, message", [
    (np.ones((T, B, I)), T, r"^dy_tb: expected float64 \(4, 3, 5\), got float64 \(4, 3, 6\)$"),
    (np.ones((T, B, H)), T + 1, r"^saved.h_tb: expected float64 \(5, 3, 5\), got float64 \(6, 3, 5\)$"),
])
def test_backward_refuses_other_arrays(dy_tb, saved_steps, message):
    case, saved = random_case(), cpu.gru_saved(saved_steps, B, H, np.float64)
    with pytest.raises(ValueError, match=message):
        gru.backward(dy_tb, case.x_tb, case.W_ih, case.W_hh, saved)
