"""The recurrence and back-propagation through time on the device, stepwise, against the reference."""

from typing import NamedTuple

import numpy as np
import pytest

from char_gru.kernels import gru as launchers
from char_gru.kernels import runtime
from char_gru.kernels.matmul import PRECISIONS
from char_gru.kernels.plan.recurrence import RecurrencePlan, backward_plan, forward_plan
from char_gru.rnn import reference
from tests import host_cuda
from tests.helpers.compare import assert_close, rounded

UNITS = launchers.TILE_N // 3
SIZES = [  # T, B, H, V: one below, at and above each tile, of rows, of units in either direction, of the sums
    (1, 1, 1, 1), (3, 2, 5, 7), (12, 3, 4, 5),
    (2, launchers.TILE_M - 1, UNITS - 1, 3), (2, launchers.TILE_M, UNITS, 9), (2, launchers.TILE_M + 1, UNITS + 1, 4),
    (3, 5, launchers.TILE_N - 1, 8), (2, 4, launchers.TILE_N, 6), (2, 3, launchers.TILE_N + 1, 11),
    (2, 3, 31, 5), (3, 4, 32, 6), (2, 5, 33, 7), (2, 3, 63, 4), (1, 2, 64, 3), (3, 2, 65, 4)]


class Layer(NamedTuple):
    """What both passes take, as NumPy arrays; the floating ones in float32."""

    P: np.ndarray
    ids_tb: np.ndarray
    W_hh: np.ndarray
    b_hh: np.ndarray
    h0: np.ndarray
    dy_tb: np.ndarray
    W_y: np.ndarray | None = None


def layer(T: int, B: int, H: int, V: int, M: int | None = None) -> Layer:
    """A random case; with M, the gradient of each state comes through a matrix W_y of M rows."""
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
    """Every result of the two passes of `ops`, whose arrays `array(values)` and `new(shape, dtype)` make; `plans` are
    for the kernels, one for each pass."""
    (T, B), (V, H3), dtype = case.ids_tb.shape, case.P.shape, saved.h_tb.dtype
    case = mapped(array, case)
    shapes = {"dP": (V, H3), "dW_hh": (H3, H3 // 3), "db_hh": (H3,), "dh0": (B, H3 // 3)}
    gradients = {name: new(shape, dtype) for name, shape in shapes.items()}
    forward, backward = ({"plan": plan} for plan in plans) if plans else ({}, {})
    ops.gru_forward(case.P, case.ids_tb, case.W_hh, case.b_hh, case.h0, saved, **options, **forward)
    ops.gru_backward(case.dy_tb, case.W_y, case.ids_tb, case.W_hh, saved, *gradients.values(), **options, **backward)
    return {"h_tb": saved.h_tb[:T + 1], "gates_tb": saved.gates_tb[:T], "a_n_tb": saved.a_n_tb[:T]} | gradients


def stepwise(case: Layer, precision: str = "fp32") -> tuple[RecurrencePlan, RecurrencePlan]:
    B, H = case.h0.shape
    M = 0 if case.W_y is None else len(case.W_y)
    gpu = runtime.current_executor().gpu
    return (forward_plan(gpu, B, H, precision, variant="stepwise"),
            backward_plan(gpu, B, H, precision, V_out=M, V_in=len(case.P), variant="stepwise"))


def on_device(case: Layer, precision: str = "fp32", plans=None, T_saved: int | None = None) -> dict[str, np.ndarray]:
    """Every result of both passes, stepwise unless there are plans."""
    (T, B), H = case.ids_tb.shape, case.W_hh.shape[1]
    saved = launchers.gru_saved(T_saved or T, B, H, precision=precision)
    results = both_passes(launchers, case, saved, runtime.to_device, runtime.empty, plans or stepwise(case, precision),
                          precision=precision)
    return {name: runtime.to_host(result) for name, result in results.items()}


def by_reference(case: Layer, dtype) -> dict[str, np.ndarray]:
    (T, B), H = case.ids_tb.shape, case.W_hh.shape[1]
    case = mapped(lambda x: x if x.dtype == np.int32 else x.astype(dtype), case)
    return both_passes(reference, case, reference.gru_saved(T, B, H, dtype))


def assert_matches_reference(case: Layer, actual: dict[str, np.ndarray]) -> None:
    exact, plain = (by_reference(case, dtype) for dtype in (np.float64, np.float32))
    for name, result in actual.items():
        assert_close(name, result, exact[name], plain[name])


def assert_equal_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, result in actual.items():
        np.testing.assert_array_equal(result.view(np.uint32), expected[name].view(np.uint32), name)


@pytest.mark.parametrize("T, B, H, V", SIZES)
def test_gru_matches_reference(executor, T, B, H, V):
    case = layer(T, B, H, V)
    assert_matches_reference(case, on_device(case))


@pytest.mark.parametrize("M", [1, 7, 66])
@pytest.mark.parametrize("T, B, H, V", SIZES[:4])
def test_gradient_through_the_output_layer_matches_reference(executor, T, B, H, V, M):
    case = layer(T, B, H, V, M)
    assert_matches_reference(case, on_device(case))


class RoundingNumPy:
    """NumPy whose matrix products see their operands rounded to a precision."""

    def __init__(self, precision: str):
        self._precision = precision

    def __getattr__(self, name):
        return getattr(np, name)

    def matmul(self, a, b, out):
        return np.matmul(*(rounded(x, self._precision) for x in (a, b)), out=out)


@pytest.mark.parametrize("precision", [precision for precision in PRECISIONS if precision != "fp32"])
@pytest.mark.parametrize("T, B, H, V", SIZES[1:])
def test_rounded_operands_err_like_the_reference_with_rounded_operands(executor, monkeypatch, T, B, H, V, precision):
    case = layer(T, B, H, V, M=6)
    actual, exact = on_device(case, precision=precision), by_reference(case, np.float64)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "np", RoundingNumPy(precision))
        by_rounding = by_reference(case, np.float32)
    for name, result in actual.items():
        assert_close(name, result, exact[name], by_rounding[name])


def test_precisions_differ(executor):
    case = layer(3, 2, 5, 7)
    results = [on_device(case, precision=precision) for precision in PRECISIONS]
    for name in ("h_tb", "dh0", "dW_hh"):
        assert len({result[name].tobytes() for result in results}) == len(PRECISIONS), name


def test_window_may_be_shorter_than_saved(executor):
    case = layer(3, 33, 17, 4)
    assert_equal_bits(on_device(case, T_saved=5), on_device(case))


def test_saved_serves_window_after_window(executor):
    """What one window leaves in `saved` does not reach the next one, which may be shorter or longer."""
    long, short = layer(4, 3, 49, 5), layer(2, 3, 49, 7)
    saved = launchers.gru_saved(4, 3, 49)
    for case in (long, short, long):
        results = both_passes(launchers, case, saved, runtime.to_device, runtime.empty, stepwise(case))
        assert_equal_bits({name: runtime.to_host(result) for name, result in results.items()}, on_device(case))


def test_only_the_window_is_written(executor):
    case = layer(2, 3, 5, 4)
    saved = launchers.gru_saved(4, 3, 5)
    sequences = {name: runtime.to_device(np.full(array.shape, 7, np.float32))
                 for name, array in saved._asdict().items() if name.endswith("_tb") and len(array)}
    saved = saved._replace(**sequences)
    both_passes(launchers, case, saved, runtime.to_device, runtime.empty, stepwise(case))
    for name, array in sequences.items():
        assert (runtime.to_host(array)[3 if name == "h_tb" else 2:] == 7).all(), name


def test_saturated_gates_are_exact(executor):
    """Pre-activations of 1e4: r, z and n reach 0, 1 and -1, and their gradients vanish."""
    H = 3
    P = np.repeat(np.array([[1e4], [-1e4]], np.float32), 3 * H, axis=1)
    ids_tb = np.array([[0], [1]], np.int32)
    W_hh, h0 = np.zeros((3 * H, H), np.float32), np.full((1, H), 0.25, np.float32)
    actual = on_device(Layer(P, ids_tb, W_hh, W_hh[:, 0], h0, np.ones((2, 1, H), np.float32)))
    np.testing.assert_array_equal(actual["gates_tb"][:, 0, [0, H, 2 * H]], [[1, 1, 1], [0, 0, -1]])
    np.testing.assert_array_equal(actual["h_tb"][:, 0, 0], [0.25, 0.25, -1])
    np.testing.assert_array_equal(actual["dh0"], np.ones((1, H)))
    assert not actual["dP"].any() and not actual["dW_hh"].any() and not actual["db_hh"].any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_huge_weights_give_finite_results(executor, precision):
    case = layer(3, 2, 5, 7)
    results = on_device(case._replace(W_hh=np.float32(1e5) * case.W_hh), precision=precision)
    assert all(np.isfinite(result).all() for result in results.values())


def test_batch_rows_do_not_interact(executor):
    """With other ids, initial state and gradients in one row, every other row keeps its bits."""
    row, case, other = 32, layer(3, 34, 17, 5), layer(3, 34, 17, 4)
    ids_tb, h0, dy_tb = case.ids_tb.copy(), case.h0.copy(), case.dy_tb.copy()
    ids_tb[:, row], h0[row], dy_tb[:, row] = other.ids_tb[:, row], other.h0[row], other.dy_tb[:, row]
    before, after = on_device(case), on_device(case._replace(ids_tb=ids_tb, h0=h0, dy_tb=dy_tb))
    for name in ("h_tb", "gates_tb", "a_n_tb", "dh0"):
        axis = before[name].ndim - 2
        a, b = (np.moveaxis(result[name], axis, 0) for result in (before, after))
        assert (a[row] != b[row]).any(), name
        np.testing.assert_array_equal(np.delete(a, row, 0), np.delete(b, row, 0), name)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gru_does_not_depend_on_the_order_of_threads(ordered_executor, precision):
    case = layer(3, 33, 49, 5)
    results = on_device(case, precision=precision)
    with runtime.use(host_cuda.HostExecutor()):
        assert_equal_bits(results, on_device(case, precision=precision))


@pytest.mark.parametrize("sanitizer, sizes", [
    ("address,undefined", (2, 33, 17, 3)), pytest.param("thread", (1, 2, 5, 1), marks=pytest.mark.slow)])
def test_sanitizer_finds_nothing_in_gru(sanitizer, sizes):
    assert host_cuda.run_sanitized(lambda: on_device(layer(*sizes)), sanitizer) == ""


def test_gru_names_the_argument_that_does_not_fit(executor):
    T, B, H = 2, 3, 5
    P, ids_tb, W_hh, b_hh, h0, dy_tb, W_y = map(runtime.to_device, layer(T, B, H, 7, M=4))
    saved = launchers.gru_saved(T, B, H)
    dP, dW_hh, db_hh, dh0 = (runtime.empty(array.shape, np.float32) for array in (P, W_hh, b_hh, h0))
    with pytest.raises(ValueError, match="^ids_tb: expected .* int32"):
        launchers.gru_forward(P, ids_tb.astype(np.int64), W_hh, b_hh, h0, saved)
    with pytest.raises(ValueError, match="^ids_tb: expected 1 to 2 steps, .* got 4"):
        launchers.gru_forward(P, runtime.zeros((4, B), np.int32), W_hh, b_hh, h0, saved)
    with pytest.raises(ValueError, match="^W_hh: expected .* strided"):
        launchers.gru_forward(P, ids_tb, runtime.zeros((H, 3 * H), np.float32).T, b_hh, h0, saved)
    with pytest.raises(ValueError, match=r"^saved.h_tb: expected .* \(3, 3, 5\), got float32 \(3, 4, 5\)"):
        launchers.gru_forward(P, ids_tb, W_hh, b_hh, h0, launchers.gru_saved(T, B + 1, H))
    with pytest.raises(ValueError, match="^precision: expected fp32 or tf32 or bf16 on .*, got 'fp16'"):
        launchers.gru_backward(dy_tb, W_y, ids_tb, W_hh, saved, dP, dW_hh, db_hh, dh0, precision="fp16")
    with pytest.raises(ValueError, match=r"^dy_tb: expected .* \(2, 3, 5\), got float32 \(2, 3, 4\)"):
        launchers.gru_backward(dy_tb, None, ids_tb, W_hh, saved, dP, dW_hh, db_hh, dh0)
    with pytest.raises(ValueError, match="^W_y: expected"):
        launchers.gru_backward(dy_tb, runtime.zeros((4, H + 1), np.float32), ids_tb, W_hh, saved, dP, dW_hh, db_hh, dh0)
    with pytest.raises(ValueError, match="^dh0: expected"):
        launchers.gru_backward(dy_tb, W_y, ids_tb, W_hh, saved, dP, dW_hh, db_hh, db_hh)
