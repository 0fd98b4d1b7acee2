"""The input table, its gradients and the sums by id on the device, against the specification and NumPy."""

import numpy as np
import pytest

from char_gru.kernels import input_table as launchers
from char_gru.kernels import matmul, runtime
from char_gru.rnn import reference
from tests import host_cuda
from tests.helpers.compare import assert_close, assert_within
from tests.helpers.variants import each_sanitizer, each_variant, each_variant_and_precision


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def device_table(ops, op: str, results: dict[str, tuple[int, ...]], *inputs: np.ndarray,
                 **options) -> dict[str, np.ndarray]:
    """The results, by name and of these shapes, of an op on the device."""
    arrays = {name: runtime.empty(shape, np.float32) for name, shape in results.items()}
    getattr(ops, op)(*map(runtime.to_device, inputs), *arrays.values(), **options)
    return {name: runtime.to_host(array) for name, array in arrays.items()}


@each_variant_and_precision(launchers)
@pytest.mark.parametrize("N, E, H", [(1, 1, 1), (7, 4, 5), (66, 17, 22)])
def test_input_table_matches_reference(executor, N, E, H, ops, precision):
    x, W_ih, b_ih, dP = random(N, E), random(3 * H, E), random(3 * H), random(N, 3 * H)
    [P] = device_table(ops, "input_table_forward", {"P": dP.shape}, x, W_ih, b_ih, precision=precision).values()
    exact, single = (reference.input_table_forward(*(array.astype(dtype) for array in (x, W_ih, b_ih)), precision)
                     for dtype in (np.float64, np.float32))
    assert_close("P", P, exact, single)
    shapes = {"dx": x.shape, "dW_ih": W_ih.shape, "db_ih": b_ih.shape}
    actual = device_table(ops, "input_table_backward", shapes, dP, x, W_ih, precision=precision)
    exact, single = (reference.input_table_backward(*(array.astype(dtype) for array in (dP, x, W_ih)), precision)
                     for dtype in (np.float64, np.float32))
    for name, *results in zip(shapes, actual.values(), exact, single):
        assert_close(name, *results)


@pytest.mark.parametrize("precision", matmul.PRECISIONS)
def test_input_table_hands_the_precision_on(executor, precision):
    tolerance = {"fp32": 2**-20, "tf32": 2**-9, "bf16": 2**-6}[precision]
    x, W_ih, b_ih = random(3, 16), random(6, 16), random(6)
    exact = x.astype(float) @ W_ih.T + b_ih
    scale = np.abs(x) @ np.abs(W_ih).T
    [P] = device_table(launchers, "input_table_forward", {"P": (3, 6)}, x, W_ih, b_ih, precision=precision).values()
    error = np.abs(P - exact)
    assert_within("P", (error / scale).max(), tolerance)
    assert (precision == "fp32") == (error < 2**-20 * scale).all()


def sums_by_id(ids_tb: np.ndarray, V: int, H: int, ops=launchers) -> tuple[np.ndarray, np.ndarray]:
    """di (T*B, 3H), and dP (V, 3H) of the device, a slice of an array that nothing else may touch."""
    T, B = ids_tb.shape
    da_tb, di_n_tb = random(T, B, 3 * H), random(T, B, H)
    di = np.concatenate([da_tb[:, :, :2 * H], di_n_tb], axis=2).reshape(T * B, 3 * H)
    da_tb[:, :, 2 * H:] = np.nan  # not to be read
    dP = runtime.to_device(np.full((V + 2, 3 * H), 7.0, np.float32))
    scratch = [runtime.empty((launchers.sum_by_id_scratch_size(T * B),), np.int32)] if ops is launchers else []
    ops.sum_by_id(*map(runtime.to_device, (da_tb, di_n_tb, ids_tb.astype(np.int32))), dP[1:-1], *scratch)
    result = runtime.to_host(dP)
    assert (result[[0, -1]] == 7).all(), "neighbours were written"
    return di, result[1:-1]


def skewed_ids(T: int, B: int, V: int) -> np.ndarray:
    """Half of the positions one and the same id, many ids without any."""
    rng = np.random.default_rng((T, B, V))
    return np.where(rng.random((T, B)) < 0.5, V // 2, rng.integers(0, V, (T, B)))


@each_variant(launchers)
@pytest.mark.parametrize("T, B, V, H", [
    (1, 1, 1, 1),  # one digit even so
    (3, 85, 7, 43),  # 255 positions, 129 columns
    (4, 64, 2, 5),  # 256 positions, every warp at work
    (257, 1, 256, 14),  # the largest V of one digit
    (3, 100, 257, 2),  # two digits
    pytest.param(2, 150, 66_000, 1, marks=pytest.mark.slow)])  # three
def test_sum_by_id_matches_numpy(executor, ops, T, B, V, H):
    ids_tb = skewed_ids(T, B, V) if V < 1000 else np.random.default_rng(0).integers(0, 50, (T, B)) * 1319
    di, dP = sums_by_id(ids_tb, V, H, ops)
    exact, rounded = np.zeros((V, 3 * H)), np.zeros((V, 3 * H), np.float32)
    np.add.at(exact, ids_tb.ravel(), di)
    np.add.at(rounded, ids_tb.ravel(), di)
    assert_close("dP", dP, exact, rounded)
    assert (dP[np.setdiff1d(np.arange(V), ids_tb)] == 0).all()


@each_variant(launchers)
def test_sum_by_id_of_distinct_ids_only_reorders(executor, ops):
    ids_tb = np.random.default_rng(0).permutation(300).reshape(3, 100)
    di, dP = sums_by_id(ids_tb, 300, 3, ops)
    np.testing.assert_array_equal(dP[ids_tb.ravel()], di)


def test_positions_are_sorted_stably(executor):
    """Equal ids in ascending order of positions, in the scratch array of ids with two digits."""
    ids_tb = np.random.default_rng(0).integers(0, 300, (6, 100))
    N = ids_tb.size
    scratch = runtime.empty((launchers.sum_by_id_scratch_size(N),), np.int32)
    launchers.sum_by_id(runtime.zeros((6, 100, 3), np.float32), runtime.zeros((6, 100, 1), np.float32),
                        runtime.to_device(ids_tb.astype(np.int32)), runtime.empty((300, 3), np.float32), scratch)
    ids, positions = runtime.to_host(scratch)[2 * N:4 * N].reshape(2, N)  # of the second digit
    np.testing.assert_array_equal(positions, np.argsort(ids_tb.ravel(), kind="stable"))
    np.testing.assert_array_equal(ids, np.sort(ids_tb.ravel()))


def test_sum_by_id_does_not_depend_on_the_order_of_threads(ordered_executor):
    for T, B, V, H in ((9, 64, 11, 3), (3, 100, 257, 2)):
        dP = sums_by_id(skewed_ids(T, B, V), V, H)[1]
        with runtime.use(ordered_executor.ascending()):
            np.testing.assert_array_equal(dP, sums_by_id(skewed_ids(T, B, V), V, H)[1])


@each_variant(launchers)
@each_sanitizer
def test_sanitizer_finds_nothing_in_sum_by_id(monkeypatch, ops, sanitizer):
    monkeypatch.setattr(launchers, "MAX_WARPS", 2)  # a sanitizer is slow to start a thread
    assert host_cuda.run_sanitized(lambda: sums_by_id(skewed_ids(3, 86, 5), 5, 2, ops), sanitizer) == ""


@pytest.mark.parametrize("name", ["da_tb", "di_n_tb", "ids_tb", "dP", "scratch"])
def test_sum_by_id_names_the_argument_that_does_not_fit(executor, name):
    arrays = {"da_tb": runtime.zeros((2, 3, 12), np.float32), "di_n_tb": runtime.zeros((2, 3, 4), np.float32),
              "ids_tb": runtime.zeros((2, 3), np.int32), "dP": runtime.zeros((5, 12), np.float32),
              "scratch": runtime.zeros((launchers.sum_by_id_scratch_size(6),), np.int32)}
    arrays[name] = runtime.zeros(arrays[name].shape, np.float64)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        launchers.sum_by_id(**arrays)


@each_variant(launchers)
@pytest.mark.parametrize("name", ["x", "W_ih", "b_ih", "P"])
def test_input_table_names_the_argument_that_does_not_fit(executor, ops, name):
    arrays = {key: runtime.zeros(shape, np.float64 if key == name else np.float32) for key, shape in
              {"x": (4, 2), "W_ih": (6, 2), "b_ih": (6,), "P": (4, 6)}.items()}
    with pytest.raises(ValueError, match=f"^{name}: expected .* float32"):
        ops.input_table_forward(**arrays)
