"""The recurrence and back-propagation through time on the device, stepwise, against the specification."""

import numpy as np
import pytest

from char_gru.kernels import gru as launchers
from char_gru.kernels import naive, runtime
from char_gru.kernels.matmul import PRECISIONS
from char_gru.rnn import reference
from tests import host_cuda
from tests.helpers.compare import assert_close
from tests.helpers.recurrence import (
    Layer,
    assert_equal_bits,
    assert_matches_reference,
    by_reference,
    layer,
    on_device,
)
from tests.helpers.variants import each_variant, each_variant_and_precision

UNITS = launchers.TILE_N // 3
SIZES = [  # T, B, H, V: one below, at and above each tile, of rows, of units in either direction, of the sums
    (1, 1, 1, 1), (3, 2, 5, 7), (12, 3, 4, 5),
    (2, launchers.TILE_M - 1, UNITS - 1, 3), (2, launchers.TILE_M, UNITS, 9), (2, launchers.TILE_M + 1, UNITS + 1, 4),
    (3, 5, launchers.TILE_N - 1, 8), (2, 4, launchers.TILE_N, 6), (2, 3, launchers.TILE_N + 1, 11),
    (2, 3, 31, 5), (3, 4, 32, 6), (2, 5, 33, 7), (2, 3, 63, 4), (1, 2, 64, 3), (3, 2, 65, 4)]


@each_variant(launchers)
@pytest.mark.parametrize("T, B, H, V", SIZES)
def test_gru_matches_reference(executor, ops, T, B, H, V):
    case = layer(T, B, H, V)
    assert_matches_reference(case, on_device(case, ops=ops))


@each_variant(launchers)
@pytest.mark.parametrize("M", [1, 7, 66])
@pytest.mark.parametrize("T, B, H, V", SIZES[:4])
def test_gradient_through_the_output_layer_matches_reference(executor, ops, T, B, H, V, M):
    case = layer(T, B, H, V, M)
    assert_matches_reference(case, on_device(case, ops=ops))


@pytest.mark.parametrize("precision", [precision for precision in PRECISIONS if precision != "fp32"])
@pytest.mark.parametrize("T, B, H, V", SIZES[1:])
def test_rounded_operands_err_like_the_reference_with_rounded_operands(executor, T, B, H, V, precision):
    case = layer(T, B, H, V, M=6)
    assert_matches_reference(case, on_device(case, precision=precision), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_first_step_rounds_the_operands_of_its_product_and_nothing_else(executor, precision):
    """Operands are inputs here, so that the specification in float64 rounds exactly the same numbers."""
    case = layer(1, 5, 50, 7)
    actual = on_device(case, precision=precision)
    exact, single = (by_reference(case, dtype, precision) for dtype in (np.float64, np.float32))
    for name in ("h_tb", "gates_tb", "a_n_tb"):
        assert_close(name, actual[name], exact[name], single[name])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradient_of_recurrent_weights_is_a_product_of_rounded_operands(executor, precision):
    T, B, H = 3, 5, 50
    case, saved = layer(T, B, H, 7), launchers.gru_saved(T, B, H, precision=precision)
    results = on_device(case, precision=precision, saved=saved)
    da, h = (runtime.to_host(x)[:T].reshape(T * B, -1) for x in (saved.da_tb, saved.h_tb))
    exact, single = (reference.product(da.astype(dtype).T, h.astype(dtype), precision)
                     for dtype in (np.float64, np.float32))
    assert_close("dW_hh", results["dW_hh"], exact, single)


@pytest.mark.capability(80)
def test_precisions_differ(executor):
    case = layer(3, 2, 5, 7)
    results = [on_device(case, precision=precision) for precision in PRECISIONS]
    for name in ("h_tb", "dh0", "dW_hh"):
        assert len({result[name].tobytes() for result in results}) == len(PRECISIONS), name


@each_variant(launchers)
def test_window_may_be_shorter_than_saved(executor, ops):
    case = layer(3, 33, 17, 4)
    assert_equal_bits(on_device(case, T_saved=5, ops=ops), on_device(case, ops=ops))


@each_variant(launchers)
def test_saved_serves_window_after_window(executor, ops):
    """Data that one window leaves in `saved` does not reach the next window, which may be shorter or longer."""
    long, short = layer(4, 3, 49, 5), layer(2, 3, 49, 7)
    saved = launchers.gru_saved(4, 3, 49)
    for case in (long, short, long):
        assert_equal_bits(on_device(case, saved=saved, ops=ops), on_device(case, ops=ops))


@each_variant(launchers)
def test_only_the_window_is_written(executor, ops):
    case = layer(2, 3, 5, 4)
    saved = launchers.gru_saved(4, 3, 5)
    sequences = {name: runtime.to_device(np.full(array.shape, 7, np.float32))
                 for name, array in saved._asdict().items() if name.endswith("_tb") and len(array)}
    on_device(case, saved=saved._replace(**sequences), ops=ops)
    for name, array in sequences.items():
        assert (runtime.to_host(array)[3 if name == "h_tb" else 2:] == 7).all(), name


@each_variant(launchers)
def test_saturated_gates_are_exact(executor, ops):
    """Pre-activations of 1e4: r, z and n reach 0, 1 and -1, and their gradients vanish."""
    H = 3
    P = np.repeat(np.array([[1e4], [-1e4]], np.float32), 3 * H, axis=1)
    ids_tb = np.array([[0], [1]], np.int32)
    W_hh, h0 = np.zeros((3 * H, H), np.float32), np.full((1, H), 0.25, np.float32)
    actual = on_device(Layer(P, ids_tb, W_hh, W_hh[:, 0], h0, np.ones((2, 1, H), np.float32)), ops=ops)
    np.testing.assert_array_equal(actual["gates_tb"][:, 0, [0, H, 2 * H]], [[1, 1, 1], [0, 0, -1]])
    np.testing.assert_array_equal(actual["h_tb"][:, 0, 0], [0.25, 0.25, -1])
    np.testing.assert_array_equal(actual["dh0"], np.ones((1, H)))
    assert not actual["dP"].any() and not actual["dW_hh"].any() and not actual["db_hh"].any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_huge_weights_give_finite_results(executor, precision):
    case = layer(3, 2, 5, 7)
    results = on_device(case._replace(W_hh=np.float32(1e5) * case.W_hh), precision=precision)
    assert all(np.isfinite(result).all() for result in results.values())


@each_variant(launchers)
def test_batch_rows_do_not_interact(executor, ops):
    """With other ids, initial state and gradients in one row, every other row keeps its bits."""
    row, case, other = 32, layer(3, 34, 17, 5), layer(3, 34, 17, 4)
    ids_tb, h0, dy_tb = case.ids_tb.copy(), case.h0.copy(), case.dy_tb.copy()
    ids_tb[:, row], h0[row], dy_tb[:, row] = other.ids_tb[:, row], other.h0[row], other.dy_tb[:, row]
    before, after = (on_device(c, ops=ops) for c in (case, case._replace(ids_tb=ids_tb, h0=h0, dy_tb=dy_tb)))
    for name in ("h_tb", "gates_tb", "a_n_tb", "dh0"):
        axis = before[name].ndim - 2
        a, b = (np.moveaxis(result[name], axis, 0) for result in (before, after))
        assert (a[row] != b[row]).any(), name
        np.testing.assert_array_equal(np.delete(a, row, 0), np.delete(b, row, 0), name)


@each_variant_and_precision(launchers)
def test_gru_does_not_depend_on_the_order_of_threads(ordered_executor, ops, precision):
    case = layer(3, 33, 49, 5)
    results = on_device(case, precision, ops=ops)
    with runtime.use(ordered_executor.ascending()):
        assert_equal_bits(results, on_device(case, precision, ops=ops))


@each_variant(launchers)
@pytest.mark.parametrize("sanitizer, sizes", [
    ("address,undefined", (2, 33, 17, 3)), pytest.param("thread", (1, 2, 5, 1), marks=pytest.mark.slow)])
def test_sanitizer_finds_nothing_in_gru(monkeypatch, ops, sanitizer, sizes):
    monkeypatch.setattr(naive, "THREADS", 32)  # a sanitizer is slow to start a thread
    assert host_cuda.run_sanitized(lambda: on_device(layer(*sizes), ops=ops), sanitizer) == ""


@each_variant(launchers)
def test_gru_names_the_argument_that_does_not_fit(executor, ops):
    T, B, H = 2, 3, 5
    P, ids_tb, W_hh, b_hh, h0, dy_tb, W_y = map(runtime.to_device, layer(T, B, H, 7, M=4))
    saved = launchers.gru_saved(T, B, H)
    dP, dW_hh, db_hh, dh0 = (runtime.empty(array.shape, np.float32) for array in (P, W_hh, b_hh, h0))
    with pytest.raises(ValueError, match="^ids_tb: expected .* int32"):
        ops.gru_forward(P, runtime.zeros((T, B), np.int64), W_hh, b_hh, h0, saved)
    with pytest.raises(ValueError, match="^ids_tb: expected 1 to 2 steps, .* got 4"):
        ops.gru_forward(P, runtime.zeros((4, B), np.int32), W_hh, b_hh, h0, saved)
    with pytest.raises(ValueError, match="^W_hh: expected .* strided"):
        ops.gru_forward(P, ids_tb, runtime.zeros((H, 3 * H), np.float32).T, b_hh, h0, saved)
    with pytest.raises(ValueError, match=r"^saved.h_tb: expected .* \(3, 3, 5\), got float32 \(3, 4, 5\)"):
        ops.gru_forward(P, ids_tb, W_hh, b_hh, h0, launchers.gru_saved(T, B + 1, H))
    with pytest.raises(ValueError, match="^precision: expected fp32( or tf32 or bf16|, the only one)? .*, got 'fp16'"):
        ops.gru_backward(dy_tb, W_y, ids_tb, W_hh, saved, dP, dW_hh, db_hh, dh0, precision="fp16")
    with pytest.raises(ValueError, match=r"^dy_tb: expected .* \(2, 3, 5\), got float32 \(2, 3, 4\)"):
        ops.gru_backward(dy_tb, None, ids_tb, W_hh, saved, dP, dW_hh, db_hh, dh0)
    with pytest.raises(ValueError, match="^W_y: expected"):
        ops.gru_backward(dy_tb, runtime.zeros((4, H + 1), np.float32), ids_tb, W_hh, saved, dP, dW_hh, db_hh, dh0)
    with pytest.raises(ValueError, match="^dh0: expected"):
        ops.gru_backward(dy_tb, W_y, ids_tb, W_hh, saved, dP, dW_hh, db_hh, db_hh)
