"""A layer's recurrence, both passes: random cases, and their results by kernels, CPU and specification."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from char_gru.kernels import gru as launchers
from char_gru.kernels import runtime
from char_gru.kernels.plan.recurrence import RecurrencePlan, backward_plan, forward_plan
from char_gru.rnn import reference
from tests.helpers.compare import assert_close


class Layer(NamedTuple):
    """The inputs of both passes, as NumPy arrays.

    Shapes: P (V, 3H); ids_tb (T, B) int32; W_hh (3H, H); b_hh (3H,); h0 (B, H); dy_tb (T, B, M) and W_y (M, H), or
    dy_tb (T, B, H) and None. Floating arrays are float32.
    """

    P: np.ndarray
    ids_tb: np.ndarray
    W_hh: np.ndarray
    b_hh: np.ndarray
    h0: np.ndarray
    dy_tb: np.ndarray
    W_y: np.ndarray | None = None


def layer(T: int, B: int, H: int, V: int, M: int | None = None) -> Layer:
    """A random case; with M, the gradient of each state is dy_tb W_y, for a W_y of M rows."""
    rng = np.random.default_rng(H)
    shapes = {"P": (V, 3 * H), "W_hh": (3 * H, H), "b_hh": (3 * H,), "h0": (B, H), "dy_tb": (T, B, M or H)}
    shapes |= {"W_y": (M, H)} if M else {}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    arrays["W_hh"] /= np.float32(np.sqrt(H))
    return Layer(**arrays, ids_tb=rng.integers(0, V, (T, B)).astype(np.int32))


def mapped(function, case: Layer) -> Layer:
    """The case with a function applied to each of its arrays."""
    return Layer(*(None if array is None else function(array) for array in case))


def both_passes(ops, case: Layer, saved, array=np.array, new=np.empty, plans=None, **options) -> dict:
    """Every result of the two passes of an op set. `array` copies a NumPy array to the op set, `new(shape, dtype)`
    makes one there; `plans`, one for each pass, and `options` are for the kernels."""
    (T, B), (V, H3), dtype = case.ids_tb.shape, case.P.shape, saved.h_tb.dtype
    case = mapped(array, case)
    shapes = {"dP": (V, H3), "dW_hh": (H3, H3 // 3), "db_hh": (H3,), "dh0": (B, H3 // 3)}
    gradients = {name: new(shape, dtype) for name, shape in shapes.items()}
    forward, backward = ({"plan": plan} for plan in plans) if plans else ({}, {})
    ops.gru_forward(case.P, case.ids_tb, case.W_hh, case.b_hh, case.h0, saved, **options, **forward)
    ops.gru_backward(case.dy_tb, case.W_y, case.ids_tb, case.W_hh, saved, *gradients.values(), **options, **backward)
    return {"h_tb": saved.h_tb[:T + 1], "gates_tb": saved.gates_tb[:T], "a_n_tb": saved.a_n_tb[:T]} | gradients


def stepwise(case: Layer, precision: str = "fp32") -> tuple[RecurrencePlan, RecurrencePlan]:
    """The plans of the two passes, both stepwise."""
    B, H = case.h0.shape
    M = 0 if case.W_y is None else len(case.W_y)
    gpu = runtime.current_executor().gpu
    return (forward_plan(gpu, B, H, precision, variant="stepwise"),
            backward_plan(gpu, B, H, precision, V_out=M, V_in=len(case.P), variant="stepwise"))


def on_device(case: Layer, precision: str = "fp32", plans=None, T_saved: int | None = None, saved=None,
              ops=launchers) -> dict[str, np.ndarray]:
    """Every result of both passes by the kernels; the fast kernels run stepwise unless plans are given."""
    (T, B), H = case.ids_tb.shape, case.W_hh.shape[1]
    saved = saved or launchers.gru_saved(T_saved or T, B, H, precision=precision)
    if ops is launchers and plans is None:
        plans = stepwise(case, precision)
    results = both_passes(ops, case, saved, runtime.to_device, runtime.empty, plans, precision=precision)
    return {name: runtime.to_host(result) for name, result in results.items()}


def by_reference(case: Layer, dtype, precision: str = "fp32") -> dict[str, np.ndarray]:
    """Every result of both passes by the specification, in `dtype`, with products in `precision`."""
    case = mapped(lambda x: x if x.dtype == np.int32 else x.astype(dtype), case)
    saved = reference.gru_forward(case.P, case.ids_tb, case.W_hh, case.b_hh, case.h0, precision)
    gradients = reference.gru_backward(case.dy_tb, case.W_y, case.ids_tb, case.W_hh, saved, len(case.P), precision)
    return saved._asdict() | dict(zip(("dP", "dW_hh", "db_hh", "dh0"), gradients))


def assert_matches_reference(case: Layer, actual: dict[str, np.ndarray], precision: str = "fp32") -> None:
    """Assert that results err little more than the specification in float32 does with products in `precision`."""
    exact, rounded = by_reference(case, np.float64), by_reference(case, np.float32, precision)
    for name, result in actual.items():
        assert_close(name, result, exact[name], rounded[name])


def assert_equal_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Assert that float32 results are equal bit for bit."""
    for name, result in actual.items():
        np.testing.assert_array_equal(result.view(np.uint32), expected[name].view(np.uint32), name)
