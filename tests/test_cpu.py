"""The CPU op set against the specification, in every memory order and on every path of its own."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from char_gru.rnn import cpu, reference, reference_ops
from tests.helpers.cases import MODELS, Case, random_case
from tests.helpers.compare import assert_close
from tests.helpers.golden import KERAS_FILES, TORCH_FILES, load
from tests.helpers.recurrence import both_passes, by_reference, layer, mapped

DTYPES = [np.float32, np.float64]


def activations(array: np.ndarray, dtype) -> np.ndarray:
    """The same values in the memory order of sequences."""
    copy = cpu.empty_activations(array.shape, dtype)
    copy[...] = array
    return copy


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normally distributed numbers of float32, in float64."""
    return rng.standard_normal(shape, np.float32).astype(np.float64)


def assert_matches(names: str, actual, exact, single, dtype) -> None:
    """Assert that float32 results err little more than the specification in float32 does, float64 results hardly."""
    for name, result, right, rounded in zip(names.split(), actual, exact, single, strict=True):
        assert_close(name, result, right, rounded if dtype == np.float32 else None, dtype=dtype)


def by_specification(op, *arguments):
    """The results of an op of the specification, in float64 and in float32, from arguments in float64."""
    for dtype in (np.float64, np.float32):
        results = op(*(x.astype(dtype) if getattr(x, "dtype", None) == np.float64 else x for x in arguments))
        yield results if isinstance(results, tuple) else (results,)


# Ops

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, E, H", [(1, 1, 1), (7, 4, 5), (66, 17, 22)])
def test_input_table_matches_reference(N, E, H, dtype):
    rng = np.random.default_rng(1)
    x, W_ih, b_ih, dP = (normal(rng, *shape) for shape in ((N, E), (3 * H, E), (3 * H,), (N, 3 * H)))
    for order in (np.array, activations):
        P, dx, dW_ih, db_ih = (order(np.zeros_like(array), dtype) for array in (dP, x, W_ih, b_ih))
        cpu.input_table_forward(order(x, dtype), W_ih.astype(dtype), b_ih.astype(dtype), P)
        cpu.input_table_backward(order(dP, dtype), order(x, dtype), W_ih.astype(dtype), dx, dW_ih, db_ih)
        assert_matches("P", [P], *by_specification(reference.input_table_forward, x, W_ih, b_ih), dtype)
        assert_matches("dx dW_ih db_ih", [dx, dW_ih, db_ih],
                       *by_specification(reference.input_table_backward, dP, x, W_ih), dtype)


@pytest.mark.parametrize("M", [None, 6])
@pytest.mark.parametrize("order", [np.array, activations], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, B, H, V", [(1, 1, 1, 1), (3, 2, 5, 7), (4, 9, 3, 2), (2, 3, 17, 66)])
def test_gru_matches_reference(T, B, H, V, dtype, order, M):
    case, saved = layer(T, B, H, V, M), cpu.gru_saved(T, B, H, dtype)
    in_order = mapped(lambda x: x if x.dtype == np.int32 else x.astype(dtype), case)
    in_order = in_order._replace(P=order(in_order.P, dtype), dy_tb=order(in_order.dy_tb, dtype))
    exact, single = (by_reference(case, of) for of in (np.float64, np.float32))
    for name, result in both_passes(cpu, in_order, saved, array=lambda x: x).items():
        assert_close(name, result, exact[name], single[name] if dtype == np.float32 else None, dtype=dtype)


def test_gru_forward_in_several_blocks_of_weights_matches_reference(monkeypatch):
    monkeypatch.setattr(cpu, "PRODUCT_BLOCK", 100)
    case, saved = layer(3, 4, 20, 7), cpu.gru_saved(3, 4, 20, np.float32)
    exact, single = (by_reference(case, dtype) for dtype in (np.float64, np.float32))
    for name, result in both_passes(cpu, case, saved).items():
        assert_close(name, result, exact[name], single[name])


def test_window_may_be_shorter_than_saved():
    case, long, exact = layer(3, 2, 5, 7), cpu.gru_saved(5, 2, 5), cpu.gru_saved(3, 2, 5)
    for name, result in both_passes(cpu, case, long).items():
        np.testing.assert_array_equal(result, both_passes(cpu, case, exact)[name], name)


def test_gru_forward_takes_ids_of_any_integer_dtype():
    rng = np.random.default_rng(4)
    P, W_hh, b_hh, h0 = (rng.standard_normal(shape) for shape in ((9, 12), (12, 4), (12,), (2, 4)))
    ids_tb, states = rng.integers(0, 9, (3, 2)), []
    for dtype in (np.uint8, np.int32, np.uint32, np.int64):
        saved = cpu.gru_saved(3, 2, 4, np.float64)
        cpu.gru_forward(P, ids_tb.astype(dtype), W_hh, b_hh, h0, saved)
        states.append(saved.h_tb)
    assert all((state == states[0]).all() for state in states)


def test_saturated_gates_do_not_overflow():
    """Pre-activations of 1e4: sigmoid and tanh reach their limits without a warning."""
    H = 3
    P = np.array([[1e4] * 3 * H, [-1e4] * 3 * H], np.float32)
    saved = cpu.gru_saved(2, 1, H)
    zero = np.zeros((3 * H, H), np.float32)
    cpu.gru_forward(P, np.array([[0], [1]]), zero, zero[:, 0], np.full((1, H), 0.25, np.float32), saved)
    np.testing.assert_array_equal(saved.gates_tb[:, 0, [0, H, 2 * H]], [[1, 1, 1], [0, 0, -1]])
    np.testing.assert_array_equal(saved.h_tb[:, 0, 0], [0.25, 0.25, -1])


@pytest.mark.parametrize("rate, seed, layer, step", [(0.3, 0, 0, 0), (0.5, 2**63 - 1, 1, 2**40), (0.0, 7, 0, 1)])
@pytest.mark.parametrize("order", [np.array, activations], ids=["rows", "columns"])
def test_dropout_equals_reference(order, rate, seed, layer, step):
    x_tb = np.random.default_rng(1).standard_normal((5, 3, 7), np.float32)
    keep_tb, y_tb, dx_tb = (order(np.zeros(x_tb.shape), dtype) for dtype in (bool, np.float32, np.float32))
    cpu.dropout_forward(order(x_tb, np.float32), rate, seed, layer, np.array([step], np.uint64), keep_tb, y_tb)
    cpu.dropout_backward(order(x_tb, np.float32), rate, keep_tb, dx_tb)
    expected_keep_tb, expected_y_tb = reference.dropout_forward(x_tb, rate, seed, layer, step)
    for actual, expected in ((keep_tb, expected_keep_tb), (y_tb, expected_y_tb), (dx_tb, expected_y_tb)):
        np.testing.assert_array_equal(actual, expected)


def test_dropout_backward_in_place():
    keep = np.array([[[True, False, True]]])
    dy = np.array([[[2.0, 3.0, -4.0]]])
    cpu.dropout_backward(dy, 0.5, keep, dy)
    np.testing.assert_array_equal(dy, [[[4.0, 0.0, -8.0]]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("order", [np.array, activations], ids=["rows", "columns"])
def test_cross_entropy_matches_reference(order, scale, dtype):
    T, B, H, V = 3, 2, 5, 7
    rng = np.random.default_rng(5)
    h_tb, W_out, b_out = normal(rng, T, B, H), np.float32(scale) * normal(rng, V, H), normal(rng, V)
    upstream_tb = normal(rng, T, B, V)
    targets_tb = rng.integers(0, V, (T, B))
    loss, dlogits_tb = np.empty(1, dtype), order(np.zeros((T, B, V)), dtype)
    dW_out, db_out, dh_tb = np.empty((V, H), dtype), np.empty(V, dtype), order(np.zeros((T, B, H)), dtype)
    cpu.cross_entropy_forward(order(h_tb, dtype), W_out.astype(dtype), b_out.astype(dtype), targets_tb, loss,
                              dlogits_tb)
    assert_matches("loss dlogits_tb", [loss[0], dlogits_tb],
                   *by_specification(reference.cross_entropy_forward, h_tb, W_out, b_out, targets_tb), dtype)
    cpu.cross_entropy_backward(order(upstream_tb, dtype), order(h_tb, dtype), dW_out, db_out, W_out.astype(dtype),
                               dh_tb)
    assert_matches("dW_out db_out dh_tb", [dW_out, db_out, dh_tb],
                   *by_specification(reference.cross_entropy_backward, upstream_tb, h_tb, W_out), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 65, cpu.ADAM_CHUNK, cpu.ADAM_CHUNK + 1])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e9])
def test_adam_matches_reference(dtype, N, clip_norm):
    rng = np.random.default_rng(6)
    arrays = [rng.standard_normal(N), rng.standard_normal(N), rng.standard_normal(N), rng.random(N)]
    exact = reference.adam(*arrays, reference.global_norm(arrays[1]), 0.003, clip_norm)
    p, g, m, v = actual = [x.astype(dtype) for x in arrays]
    norm = np.empty(1, dtype)
    cpu.global_norm(g, norm)
    np.testing.assert_allclose(norm[0], reference.global_norm(arrays[1]), rtol=10 * np.finfo(dtype).eps)
    cpu.adam(*actual, norm, np.array([0.003], dtype), clip_norm)
    for result, expected in zip((p, g, m, v), (exact[0], arrays[1], *exact[1:])):
        np.testing.assert_allclose(result, expected, rtol=0, atol=20 * np.finfo(dtype).eps * np.abs(expected).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_adam_changes_nothing_when_the_norm_is_not_finite(bad):
    p, g, m, v = (np.full(3, value, np.float32) for value in (1, 2, 3, 4))
    g[1] = bad
    norm = np.empty(1, np.float32)
    cpu.global_norm(g, norm)
    cpu.adam(p, g, m, v, norm, np.array([0.1], np.float32))
    assert (p == 1).all() and (m == 3).all() and (v == 4).all()


def test_zero_gradient_is_not_divided_by():
    p, g, m, v = (np.zeros(3, np.float32) for _ in range(4))
    cpu.adam(p, g, m, v, np.zeros(1, np.float32), np.array([0.1], np.float32), clip_norm=1.0)
    assert (p == 0).all()


# Sampling

options = st.fixed_dictionaries({
    "temperature": st.sampled_from([0.0, 1e-46, 1e-40, 0.1, 0.7, 1.0, 3.0, 1e39]), "top_k": st.integers(0, 9),
    "top_p": st.sampled_from([1.0, 0.9, 0.5, 0.01]), "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0])})


def assert_draws_as_the_reference(logits: np.ndarray, uniforms: np.ndarray, options: dict) -> None:
    ids = np.empty(len(logits), np.int32)
    cpu.sample(logits, uniforms, ids, **options)
    np.testing.assert_array_equal(ids, reference.sample(logits, uniforms, **options))


@given(options, st.integers(2, 9), st.integers(0, 2**32), st.sampled_from(DTYPES))
def test_sample_equals_reference(options, V, seed, dtype):
    rng = np.random.default_rng(seed)
    assert_draws_as_the_reference((3 * rng.standard_normal((4, V))).astype(dtype), rng.random(4).astype(dtype), options)


@given(options, hnp.arrays(np.float32, (3, 6), elements=st.sampled_from([-80.0, 0.0, 0.5, 80.0])),
       st.sampled_from([0.0, 0.5, 1 - 2**-24]))
def test_ties_certainties_and_extreme_numbers_are_drawn_as_the_reference_draws_them(options, logits, uniform):
    assert_draws_as_the_reference(logits, np.full(3, uniform, np.float32), options)


# Whole models

@pytest.mark.parametrize("R", [1, 3, cpu.FEW_ROWS, cpu.FEW_ROWS + 1])
@pytest.mark.parametrize("T, layers, V", [(6, 1, 7), (6, 2, 7), (6, 2, 100), (0, 1, 7)])
def test_generation_matches_reference(R, T, layers, V):
    """By matrix-vector products, small products and large ones, with a table P that is copied for its columns or not.
    """
    H, rng = 5, np.random.default_rng(9)
    case = random_case(T=1, B=R, V=V, H=H, layers=layers, scale=1.0)
    params = case.model().params
    P = reference.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"])
    forced_tr, uniforms_tr = np.full((T, R), -1, np.int32), rng.random((T, R))
    for row in range(R if T else 0):
        prompt = rng.integers(1, V, row % (T - 1))
        forced_tr[:len(prompt), row] = prompt
    first = rng.integers(1, V, R).astype(np.int32)
    h, ids, ids_tr = case.h0.copy(), first.copy(), np.empty((T, R), np.int32)
    cpu.generate(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, cpu.generation_saved(R, H, V, np.float64), 0.8)
    expected_h, *expected_ids = reference.generate(params, P, case.h0, first, forced_tr, uniforms_tr, 0.8)
    np.testing.assert_allclose(h, expected_h, rtol=1e-12, atol=1e-12)
    for actual, expected in zip((ids, ids_tr), expected_ids):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("N, K, R", [(48, 10, 2), (48, 10, 5), (30, 7, 8), (61, 10, 3), (1021, 10, 3)])
@pytest.mark.parametrize("threads", [1, 2, 3, 40])
def test_small_products_have_the_same_bits_on_any_number_of_threads(N, K, R, threads, monkeypatch):
    monkeypatch.setattr(cpu, "SMALL_ROWS", 8)
    monkeypatch.setattr(cpu, "SHARE", 20)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", str(threads))
    cpu._rows_of_small_product.cache_clear()
    cpu._pool.cache_clear()
    rng = np.random.default_rng(N)
    W, x = rng.standard_normal((N, K), np.float32), activations(rng.standard_normal((R, K)), np.float32)
    out = activations(np.full((R, N), np.nan), np.float32)
    cpu._rows_times(x, W, out)
    rows = cpu._rows_of_small_product(N, K, R)
    assert rows == {48: 8, 30: 6}.get(N, 0)
    cpu._rows_of_small_product.cache_clear()
    cpu._pool.cache_clear()
    np.testing.assert_allclose(out, x.astype(float) @ W.T.astype(float), rtol=0, atol=1e-5)
    if rows:
        one_by_one = [W[first:first + rows] @ x.T for first in range(0, N, rows)]
        np.testing.assert_array_equal(out, np.concatenate(one_by_one).T)


def test_small_products_work_in_a_forked_process():
    code = """
import os, sys
import numpy as np
from char_gru.rnn import cpu
cpu.SHARE = 20
x, W, out = np.ones((10, 2), np.float32).T, np.ones((960, 10), np.float32), cpu.empty_activations((2, 960))
cpu._rows_times(x, W, out)
child = os.fork()
if child == 0:
    out[...] = 0
    cpu._rows_times(x, W, out)
    os._exit(0 if (out == 10).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment,
                          timeout=60).returncode == 0


@pytest.mark.parametrize("variables, expected", [
    ({"OPENBLAS_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3), ({"OMP_NUM_THREADS": "5"}, 5),
    ({"OPENBLAS_NUM_THREADS": "0", "OMP_NUM_THREADS": "x"}, 4), ({}, 4)])
def test_threads_are_those_of_the_variables_or_of_the_machine(variables, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 4, 6}, raising=False)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cpu._threads() == expected


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_model_gradients_match_reference(name, dropout):
    case = random_case(**MODELS[name])
    actual, expected = (case.model(ops, dropout=dropout).gradients(case.inputs_tb, case.targets_tb)
                        for ops in (cpu, reference_ops))
    for parameter, gradient in expected.items():
        np.testing.assert_allclose(actual[parameter], gradient, rtol=1e-11, atol=1e-13 * np.abs(gradient).max(),
                                   err_msg=parameter)


def trained(case: Case, ops) -> dict[str, np.ndarray]:
    """Losses, parameters and state after ten steps."""
    model = case.model(ops, carry_state=True, dropout=0.3, clip_norm=0.1, seed=5)
    losses = [model.train_step(case.inputs_tb, case.targets_tb)["loss"] for _ in range(10)]
    return model.params | {"losses": losses, "state": model.state}


def test_ten_steps_of_training_match_reference():
    case = random_case(T=4, B=3, H=9, layers=2)
    actual, expected = (trained(case, ops) for ops in (cpu, reference_ops))
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=1e-9, atol=1e-11, err_msg=name)


def test_gaps_between_gradients_stay_zero():
    """The gaps that align parameters: the norm of the flat buffer is that of the gradients."""
    case = random_case()
    model = case.model(cpu)
    model.train_step(case.inputs_tb, case.targets_tb)
    total = sum(float((gradient**2).sum()) for gradient in model.grads.values())
    norm = np.zeros(1)
    cpu.global_norm(model._grads, norm)
    np.testing.assert_allclose(norm[0]**2, total, rtol=1e-12)


@pytest.mark.parametrize("path", TORCH_FILES + KERAS_FILES, ids=lambda path: path.stem)
def test_float32_gradients_match_golden(path):
    case, gradients, data = load(path)
    actual = case.model(cpu, np.float32).gradients(case.inputs_tb, case.targets_tb)
    assert actual["loss"] == pytest.approx(float(data["loss"]), rel=2e-6)
    for name, expected in gradients.items():
        np.testing.assert_allclose(actual[name], expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=name)
        assert actual[name].dtype == np.float32
