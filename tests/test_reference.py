"""Single ops of the reference against plain formulas, and what they promise of every input."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from char_gru.rnn import cpu
from tests.helpers.compare import assert_close

DTYPES = [np.float32, np.float64]


def activations(array: np.ndarray, dtype) -> np.ndarray:
    """The same values in the memory order of sequences."""
    copy = cpu.empty_activations(array.shape, dtype)
    copy[...] = array
    return copy


# The GRU, written as one reads it

def gru_by_formula(P, ids_tb, W_hh, b_hh, h0) -> np.ndarray:
    """States (T+1, B, H) by the formulas, one number after the other."""
    H = W_hh.shape[1]
    h_tb = [h0]
    for ids in ids_tb:
        rows = []
        for v, h in zip(ids, h_tb[-1]):
            a = W_hh @ h + b_hh
            r, z = (1 / (1 + np.exp(-(P[v] + a)[k * H:(k + 1) * H])) for k in (0, 1))
            n = np.tanh(P[v, 2 * H:] + r * a[2 * H:])
            rows.append((1 - z) * n + z * h)
        h_tb.append(np.array(rows))
    return np.array(h_tb)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, B, H, V", [(1, 1, 1, 1), (3, 2, 5, 7), (4, 9, 3, 2), (2, 3, 17, 66)])
def test_gru_forward_matches_formula(T, B, H, V, dtype):
    rng = np.random.default_rng(3)
    P, W_hh, b_hh, h0 = (rng.standard_normal(shape) for shape in ((V, 3 * H), (3 * H, H), (3 * H,), (B, H)))
    ids_tb = rng.integers(0, V, (T, B))
    saved = cpu.gru_saved(T, B, H, dtype)
    cpu.gru_forward(activations(P, dtype), ids_tb, W_hh.astype(dtype), b_hh.astype(dtype), h0.astype(dtype), saved)
    exact = gru_by_formula(P, ids_tb, W_hh, b_hh, h0)
    plain = gru_by_formula(*(x.astype(dtype) if x.dtype == float else x for x in (P, ids_tb, W_hh, b_hh, h0)))
    assert_close("h_tb", saved.h_tb, exact, plain, dtype=dtype)


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


# Output layer and loss

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy_matches_formula(dtype, scale):
    T, B, H, V = 3, 2, 5, 7
    rng = np.random.default_rng(5)
    h_tb, W_out, b_out = rng.standard_normal((T, B, H)), scale * rng.standard_normal((V, H)), rng.standard_normal(V)
    targets = rng.integers(0, V, (T, B))
    logits = h_tb @ W_out.T + b_out
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, targets[..., None], -1).mean()
    loss, dlogits = np.empty(1, dtype), cpu.empty_activations((T, B, V), dtype)
    cpu.cross_entropy_forward(activations(h_tb, dtype), W_out.astype(dtype), b_out.astype(dtype), targets, loss,
                                    dlogits)
    relative = 1e-12 if dtype == np.float64 else 1e-6
    np.testing.assert_allclose(loss[0], expected, rtol=relative)
    softmax_error = relative * max(1.0, np.abs(logits).max())
    np.testing.assert_allclose(dlogits, (np.exp(log_p) - np.eye(V)[targets]) / (T * B), rtol=0, atol=softmax_error)


# Dropout

def test_dropout_keeps_the_share_and_the_mean_and_is_a_function_of_its_arguments():
    x = np.ones((20, 10, 50))
    masks = {}
    for seed, layer, step in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]:
        keep, y = np.empty(x.shape, bool), np.empty_like(x)
        cpu.dropout_forward(x, 0.3, seed, layer, np.array([step], np.uint64), keep, y)
        assert abs(keep.mean() - 0.7) < 0.02
        np.testing.assert_array_equal(y, keep / 0.7)
        masks[seed, layer, step] = keep
        again, y_again = cpu.empty_activations(x.shape, bool), cpu.empty_activations(x.shape, x.dtype)
        cpu.dropout_forward(activations(x, float), 0.3, seed, layer, np.array([step], np.uint64), again, y_again)
        np.testing.assert_array_equal(again, keep)
    agreement = [(a == b).mean() for a in masks.values() for b in masks.values() if a is not b]
    assert max(agreement) < 0.62, "masks of different seeds, layers or steps repeat one another"


def test_dropout_backward_scales_what_was_kept():
    keep = np.array([[[True, False, True]]])
    dy = np.array([[[2.0, 3.0, -4.0]]])
    cpu.dropout_backward(dy, 0.5, keep, dy)
    np.testing.assert_array_equal(dy, [[[4.0, 0.0, -8.0]]])


# Optimiser

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 65, cpu.ADAM_CHUNK, cpu.ADAM_CHUNK + 1])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e9])
def test_adam_matches_formula(dtype, N, clip_norm):
    rng = np.random.default_rng(6)
    p, g, m = (rng.standard_normal(N) for _ in range(3))
    v, step_size = rng.random(N), 0.003
    scale = min(1, clip_norm / np.linalg.norm(g)) if clip_norm else 1
    expected_m = 0.9 * m + 0.1 * (scale * g)
    expected_v = 0.999 * v + 0.001 * (scale * g)**2
    expected_p = p - step_size * expected_m / (np.sqrt(expected_v) + 1e-7)
    arrays = [x.astype(dtype) for x in (p, g, m, v)]
    norm = np.empty(1, dtype)
    cpu.global_norm(arrays[1], norm)
    np.testing.assert_allclose(norm[0], np.linalg.norm(g), rtol=10 * np.finfo(dtype).eps)
    cpu.adam(*arrays, norm, np.array([step_size], dtype), clip_norm)
    for actual, expected in zip(arrays, (expected_p, g, expected_m, expected_v)):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=20 * np.finfo(dtype).eps * np.abs(expected).max())


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

def sample_by_definition(logits, u, temperature, top_k, top_p, min_p) -> int:
    """One row, with a list of (probability, id) instead of arrays."""
    known = [(float(logit), v) for v, logit in enumerate(logits) if v > 0]
    ranked = sorted(known, key=lambda item: (-item[0], item[1]))
    if temperature == 0:
        return ranked[0][1]
    weights = [(math.exp((logit - ranked[0][0]) / temperature), v) for logit, v in ranked]
    if top_k:
        weights = weights[:top_k]
    if top_p < 1:
        total, reached, kept = sum(w for w, _ in weights), 0.0, []
        for w, v in weights:
            kept.append((w, v))
            reached += w
            if reached >= top_p * total:
                break
        weights = kept
    weights = [(w, v) for w, v in weights if w >= min_p]
    total, reached = sum(w for w, _ in weights), 0.0
    for w, v in sorted(weights, key=lambda item: item[1]):
        reached += w
        if reached > u * total:
            return v
    return max(v for w, v in weights if w > 0)


options = st.fixed_dictionaries({
    "temperature": st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]), "top_k": st.integers(0, 9),
    "top_p": st.sampled_from([1.0, 0.9, 0.5, 0.01]), "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0])})


@given(options, st.integers(2, 9), st.integers(0, 2**32))
def test_sample_matches_definition(options, V, seed):
    rng = np.random.default_rng(seed)
    logits, uniforms, ids = 3 * rng.standard_normal((4, V)), rng.random(4), np.empty(4, np.int32)
    cpu.sample(logits, uniforms, ids, **options)
    assert ids.tolist() == [sample_by_definition(row, u, **options) for row, u in zip(logits, uniforms)]


@given(options, st.integers(0, 2**32), hnp.arrays(np.float32, (3, 6), elements=st.sampled_from([-80.0, 0.0, 0.5, 80.0])),
       st.sampled_from([0.0, 0.5, 1 - 2**-24]))
def test_sample_draws_a_kept_character_for_any_logits(options, seed, logits, uniform):
    """Ties, certainties and the largest uniform number: what is drawn is never [UNK] and always among the kept."""
    ids = np.empty(3, np.int32)
    cpu.sample(logits, np.full(3, uniform, np.float32), ids, **options)
    for row, drawn in zip(logits, ids):
        assert drawn > 0
        rank = sorted(range(1, 6), key=lambda v: (-row[v], v)).index(drawn)
        assert options["top_k"] == 0 or rank < options["top_k"]
        if options["temperature"] == 0 or options["top_p"] == 0.01:
            assert rank == 0
        if options["temperature"] > 0:
            share = math.exp(min(0.0, float(row[drawn] - row[1:].max())) / options["temperature"])
            assert share >= options["min_p"] - 1e-6


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-30, 1e39])
def test_temperatures_beyond_float32_are_the_limits_they_stand_for(temperature):
    """Towards 0 the most likely character, towards infinity all alike."""
    logits, ids = np.array([[0, 1, 3, 2]], np.float32), np.empty(1, np.int32)
    cpu.sample(logits, np.array([0.1], np.float32), ids, temperature)
    assert ids[0] == (2 if temperature < 1 else 1)


def test_sample_frequencies_are_the_softmax():
    logits = np.log(np.array([0.3, 0.1, 0.2, 0.4])) * 0.5
    drawn, rng = np.empty(40_000, np.int32), np.random.default_rng(8)
    cpu.sample(np.tile(logits, (40_000, 1)), rng.random(40_000), drawn, temperature=0.5)
    counts = np.bincount(drawn, minlength=4) / 40_000
    np.testing.assert_allclose(counts, np.array([0, 0.1, 0.2, 0.4]) / 0.7, atol=0.01)


# Generation

@pytest.mark.parametrize("R", [1, 3, cpu.MATRIX_VECTOR_ROWS, cpu.MATRIX_VECTOR_ROWS + 1])
@pytest.mark.parametrize("layers, V", [(1, 7), (2, 7), (2, 100)])
def test_generation_reads_prompts_as_the_model_does_and_draws_from_its_logits(R, layers, V):
    """Characters written step by step are those that `sample` draws from the states of a whole-window forward pass."""
    from tests.helpers.cases import random_case

    T, H = 6, 5
    case = random_case(T=T, B=R, V=V, H=H, layers=layers, scale=1.0)
    model = case.model()
    P = np.empty((V, 3 * H))
    cpu.input_table_forward(model.params["W_emb"], model.params["W_ih.0"], model.params["b_ih.0"], P)
    rng = np.random.default_rng(9)
    forced_tr, uniforms_tr = np.full((T, R), -1, np.int32), rng.random((T, R))
    for row in range(R):
        prompt = rng.integers(1, V, row % (T - 1))
        forced_tr[:len(prompt), row] = prompt
    first = rng.integers(1, V, R).astype(np.int32)
    ids, ids_tr, h = first.copy(), np.empty((T, R), np.int32), case.h0.copy()
    cpu.generate(model.params, P, h, ids, forced_tr, uniforms_tr, ids_tr,
                       cpu.generation_saved(R, H, V, np.float64), temperature=0.8)
    assert (ids_tr[forced_tr >= 0] == forced_tr[forced_tr >= 0]).all()
    assert (ids == ids_tr[-1]).all()
    model.gradients(np.concatenate([[first], ids_tr[:-1]]), np.zeros((T, R), int))
    np.testing.assert_allclose(h[-1], model._layers[-1].saved.h_tb[-1], rtol=1e-12, atol=1e-12)
    for t in range(T):
        logits = model._layers[-1].saved.h_tb[t + 1] @ model.params["W_out"].T + model.params["b_out"]
        drawn = np.empty(R, np.int32)
        cpu.sample(logits, uniforms_tr[t], drawn, temperature=0.8)
        free = forced_tr[t] < 0
        assert (ids_tr[t][free] == drawn[free]).all()
