"""Global norm and Adam on the device against the specification."""

import importlib

import numpy as np
import pytest

from char_gru.kernels import runtime
from char_gru.rnn import reference
from tests import host_cuda
from tests.helpers.compare import assert_close
from tests.helpers.variants import each_sanitizer, each_variant

launchers = importlib.import_module("char_gru.kernels.adam")  # the package's attribute of that name is the op
SIZES = [1, 3, 4, 5, 1023, 1024, 1025, 2051]  # a block takes 4 * 256
STEP_SIZE = 0.003


def parameters(N: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Float64 params, grads and moments in the middle of training."""
    rng = np.random.default_rng(N)
    return {"params": rng.standard_normal(N), "grads": scale * rng.standard_normal(N),
            "m": 0.1 * scale * rng.standard_normal(N), "v": scale**2 * rng.random(N)}


def device_norm(grads: np.ndarray, ops=launchers) -> np.ndarray:
    norm = runtime.empty((1,), np.float32)
    ops.global_norm(runtime.to_device(grads.astype(np.float32)), norm)
    return runtime.to_host(norm)


def device_adam(arrays: dict[str, np.ndarray], norm: float, *options, offset: int = 0,
                ops=launchers) -> dict[str, np.ndarray]:
    """params, m and v after a step on the device, the arrays being slices of larger ones otherwise left alone."""
    N, buffers = len(arrays["params"]), {}
    for name, array in arrays.items():
        host = np.full(N + offset + 1, 7.0, np.float32)
        host[offset:-1] = array
        buffers[name] = runtime.to_device(host)
    scalars = (runtime.to_device(np.array([x], np.float32)) for x in (norm, STEP_SIZE))
    ops.adam(*(buffer[offset:-1] for buffer in buffers.values()), *scalars, *options)
    results = {name: runtime.to_host(buffer) for name, buffer in buffers.items()}
    for name, result in results.items():
        assert (result[:offset] == 7).all() and result[-1] == 7, f"{name}: neighbours were written"
    assert (results["grads"][offset:-1] == arrays["grads"].astype(np.float32)).all()
    return {name: results[name][offset:-1] for name in ("params", "m", "v")}


def reference_adam(arrays: dict[str, np.ndarray], norm: float, *options, dtype) -> dict[str, np.ndarray]:
    arrays = (array.astype(dtype) for array in arrays.values())
    results = reference.adam(*arrays, dtype(norm), dtype(STEP_SIZE), *options)
    return dict(zip(("params", "m", "v"), results))


def assert_adam_matches_reference(arrays: dict[str, np.ndarray], norm: float, *options, offset: int = 0,
                                  ops=launchers) -> None:
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    actual = device_adam(arrays, norm, *options, offset=offset, ops=ops)
    exact, rounded = (reference_adam(arrays, np.float32(norm), *options, dtype=dtype)
                      for dtype in (np.float64, np.float32))
    for name, result in actual.items():
        assert_close(name, result, exact[name], rounded[name])


@each_variant(launchers)
@pytest.mark.parametrize("N", [*SIZES, 300_007])  # the last: more sums than norm_of_sums has threads
def test_global_norm_matches_reference(executor, ops, N):
    grads = parameters(N)["grads"].astype(np.float32)
    exact, rounded = ([reference.global_norm(grads.astype(dtype))] for dtype in (np.float64, np.float32))
    assert_close("norm", device_norm(grads, ops), exact, rounded)


def test_global_norm_of_more_gradients_than_the_grid_has_threads_for(executor, monkeypatch):
    monkeypatch.setattr(launchers, "MAX_BLOCKS", 2)
    grads = parameters(10_007)["grads"]
    assert_close("norm", device_norm(grads), [np.linalg.norm(grads.astype(np.float32).astype(float))], dtype=np.float32)


@pytest.mark.parametrize("N", SIZES)
def test_global_norm_of_a_slice_that_no_float4_fits(executor, N):
    grads = runtime.to_device(np.arange(N + 2, dtype=np.float32))
    norm = runtime.empty((1,), np.float32)
    launchers.global_norm(grads[1:N + 1], norm)
    assert_close("norm", runtime.to_host(norm), [np.linalg.norm(np.arange(1.0, N + 1))], dtype=np.float32)


@each_variant(launchers)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_global_norm_shows_one_bad_gradient(executor, ops, bad):
    grads = np.ones(2051)
    grads[1500] = bad
    assert not np.isfinite(device_norm(grads, ops)[0])


@each_variant(launchers)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("N", SIZES)
def test_adam_matches_reference(executor, ops, N, offset):
    assert_adam_matches_reference(parameters(N), 2.0, offset=offset, ops=ops)


@each_variant(launchers)
@pytest.mark.parametrize("clip_norm", [0.5, 1e9])
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_adam_clips_as_the_reference(executor, ops, scale, clip_norm):
    arrays = parameters(1025, scale)
    assert_adam_matches_reference(arrays, np.linalg.norm(arrays["grads"]), clip_norm, 0.8, 0.99, 1e-6,
                                  ops=ops)


@each_variant(launchers)
def test_first_step_of_adam_matches_reference(executor, ops):
    """Moments from zero on are 1 - beta_1 and 1 - beta_2 times something, which shows how these are rounded."""
    arrays = parameters(1025)
    assert_adam_matches_reference(arrays | dict.fromkeys(("m", "v"), np.zeros(1025)), 2.0, ops=ops)


@each_variant(launchers)
@pytest.mark.parametrize("norm", [np.nan, np.inf])
def test_adam_changes_nothing_when_the_norm_is_not_finite(executor, ops, norm):
    arrays = parameters(1025)
    for name, result in device_adam(arrays, norm, 1.0, ops=ops).items():
        np.testing.assert_array_equal(result, arrays[name].astype(np.float32), name)


@each_variant(launchers)
def test_zero_gradient_is_not_divided_by(executor, ops):
    arrays = dict.fromkeys(("params", "grads", "m", "v"), np.zeros(5))
    assert all((result == 0).all() for result in device_adam(arrays, 0.0, 1.0, ops=ops).values())


@each_variant(launchers)
def test_norm_and_adam_do_not_depend_on_the_order_of_threads(ops):
    results = []
    for order in host_cuda.ORDERS:
        with runtime.use(host_cuda.HostExecutor(order)):
            arrays = parameters(5003)
            norm = device_norm(arrays["grads"], ops)
            results.append([norm, *device_adam(arrays, norm[0], 0.5, ops=ops).values()])
    for other in results[1:]:
        assert all((a == b).all() for a, b in zip(results[0], other))


@each_variant(launchers)
@each_sanitizer
def test_sanitizer_finds_nothing_in_norm_and_adam(ops, sanitizer):
    def step():
        arrays = parameters(1031)
        device_norm(arrays["grads"], ops)
        device_adam(arrays, 2.0, offset=1, ops=ops)

    assert host_cuda.run_sanitized(step, sanitizer) == ""


@each_variant(launchers)
@pytest.mark.parametrize("name", ["params", "grads", "m", "v", "norm", "step_size"])
def test_adam_names_the_argument_that_does_not_fit(executor, ops, name):
    arguments = {key: runtime.zeros((1 if key in ("norm", "step_size") else 5,), np.float32)
                 for key in ("params", "grads", "m", "v", "norm", "step_size")}
    arguments[name] = runtime.zeros(arguments[name].shape, np.float64)
    with pytest.raises(ValueError, match=f"^{name}: expected .* float32"):
        ops.adam(**arguments)
