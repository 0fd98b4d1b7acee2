"""The specification against central differences, Keras, PyTorch and definitions, and its promises for any input."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from char_gru.rnn import reference, reference_ops
from char_gru.rnn.batches import Batch
from tests.helpers.cases import MODELS, random_case
from tests.helpers.golden import DROPOUT_FILE, GOLDEN_DIR, KERAS_FILES, TORCH_FILES, load

DTYPES = [np.float32, np.float64]
DIFFERENCE = 1e-5
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


# Matrix products

@pytest.mark.parametrize("precision, x, expected", [
    ("tf32", 0x3F800FFF, 0x3F800000), ("tf32", 0x3F801000, 0x3F802000), ("tf32", 0xBF801000, 0xBF802000),
    ("tf32", 0x3F803000, 0x3F804000), ("bf16", 0x3F807FFF, 0x3F800000), ("bf16", 0x3F808000, 0x3F800000),
    ("bf16", 0x3F818000, 0x3F820000), ("bf16", 0xBF808001, 0xBF810000), ("fp32", 0x3F800001, 0x3F800001)])
def test_operands_round_to_nearest_with_ties_as_the_precision_has_them(precision, x, expected):
    """tf32 keeps 10 bits, ties away from zero; bf16 keeps 7, ties to even."""
    operand, nearest = (np.array([bits], np.uint32).view(np.float32) for bits in (x, expected))
    for dtype in DTYPES:
        result = reference.rounded(operand.astype(dtype), precision)
        assert result.dtype == dtype and result == nearest


@pytest.mark.parametrize("precision, bits", [("tf32", 10), ("bf16", 7)])
def test_rounded_operands_are_the_nearest_of_their_precision(precision, bits):
    x = np.random.default_rng(1).standard_normal(1000, np.float32)
    result = reference.rounded(x, precision)
    unit = 2.0**(np.floor(np.log2(np.abs(x))) - bits)
    assert (result / unit == np.round(result / unit)).all() and (np.abs(result - x) <= unit / 2).all()


def test_product_rounds_both_operands_and_sums_in_their_dtype():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((3, 40)), rng.standard_normal((40, 5))
    for precision, dtype in itertools.product(("fp32", "tf32", "bf16"), DTYPES):
        operands = [reference.rounded(x.astype(dtype), precision) for x in (a, b)]
        result = reference.product(a.astype(dtype), b.astype(dtype), precision)
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, operands[0] @ operands[1])


def test_product_knows_no_other_precision():
    with pytest.raises(KeyError, match="fp16"):
        reference.product(np.ones((1, 1)), np.ones((1, 1)), "fp16")


# Central differences

def central_differences(loss, array: np.ndarray) -> np.ndarray:
    """Gradient of loss() with respect to `array`, which it reads, by central differences."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + DIFFERENCE
        above = loss()
        array[index] = kept - DIFFERENCE
        below = loss()
        array[index] = kept
        gradient[index] = (above - below) / (2 * DIFFERENCE)
    return gradient


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_model_gradients_match_central_differences(name, dropout):
    """Of every parameter and of h0."""
    case = random_case(**MODELS[name])
    model = case.model(dropout=dropout)
    gradients = model.gradients(case.inputs_tb, case.targets_tb)

    def loss() -> float:
        return model.gradients(case.inputs_tb, case.targets_tb)["loss"]

    for parameter in [*model.params, "dh0"]:
        array = model.state if parameter == "dh0" else model.params[parameter]
        expected = central_differences(loss, array)
        np.testing.assert_allclose(gradients[parameter], expected, rtol=1e-6, atol=1e-8 + 1e-7 * np.abs(expected).max(),
                                   err_msg=parameter)
        assert np.abs(expected).max() > 1e-6, f"{parameter} has no influence in this case, so this shows nothing"


@pytest.mark.parametrize("M", [None, 7])
def test_gru_backward_takes_any_upstream_gradient(M):
    """The loss reaches h only through the output layer; here every state, or M sums of it, has a random gradient."""
    T, B, H, V = 4, 3, 5, 6
    rng = np.random.default_rng(2)
    P, W_hh, b_hh, h0 = (rng.standard_normal(shape) for shape in ((V, 3 * H), (3 * H, H), (3 * H,), (B, H)))
    dy_tb, W_y = rng.standard_normal((T, B, M or H)), rng.standard_normal((M, H)) if M else None
    ids_tb = np.array([[1, 1, 4], [1, 5, 0], [2, 2, 2], [0, 3, 1]])

    def weighted_states() -> float:
        h_tb = reference.gru_forward(P, ids_tb, W_hh, b_hh, h0).h_tb
        return float((h_tb[1:] * (dy_tb @ W_y if M else dy_tb)).sum())

    saved = reference.gru_forward(P, ids_tb, W_hh, b_hh, h0)
    gradients = reference.gru_backward(dy_tb, W_y, ids_tb, W_hh, saved, V)
    for name, array, gradient in zip(("P", "W_hh", "b_hh", "h0"), (P, W_hh, b_hh, h0), gradients):
        np.testing.assert_allclose(gradient, central_differences(weighted_states, array), rtol=1e-7, atol=1e-7,
                                   err_msg=name)


# Keras and PyTorch

def test_golden_cases_are_there():
    assert TORCH_FILES and KERAS_FILES, f"{GOLDEN_DIR} holds no golden cases"


@pytest.mark.parametrize("path", TORCH_FILES + KERAS_FILES, ids=lambda path: path.stem)
def test_reference_matches_golden(path):
    case, gradients, data = load(path)
    model = case.model()
    actual = model.gradients(case.inputs_tb, case.targets_tb)
    np.testing.assert_allclose(actual["loss"], data["loss"], **TOLERANCE)
    for name, expected in gradients.items():
        np.testing.assert_allclose(actual[name], expected, **TOLERANCE, err_msg=name)
    h_tb = model._layers[-1].saved.h_tb
    np.testing.assert_allclose(h_tb[-1], data["h_T"][-1] if data["h_T"].ndim == 3 else data["h_T"], **TOLERANCE)
    if "h_tb" in data:
        np.testing.assert_allclose(h_tb[1:], data["h_tb"], **TOLERANCE)
    logits = data["logits_tbv"]
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    dlogits = (softmax - np.eye(case.sizes.V)[case.targets_tb]) / case.inputs_tb.size
    np.testing.assert_allclose(model._dlogits_tb, dlogits, **TOLERANCE)


def test_reference_with_dropout_behind_every_layer_matches_pytorch(monkeypatch):
    """With the elements that PyTorch kept; that ours are another draw is all that differs."""
    def dropout_forward(x_tb, rate, seed, layer, step, keep_tb, y_tb):
        keep_tb[...] = data["keep_ltbh"][layer]
        reference_ops.dropout_backward(x_tb, rate, keep_tb, y_tb)

    monkeypatch.setattr(reference_ops, "dropout_forward", dropout_forward)
    case, gradients, data = load(DROPOUT_FILE)
    actual = case.model(dropout=float(data["dropout"])).gradients(case.inputs_tb, case.targets_tb)
    for name, expected in (gradients | {"loss": data["loss"]}).items():
        np.testing.assert_allclose(actual[name], expected, **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("path", TORCH_FILES + KERAS_FILES, ids=lambda path: path.stem)
def test_float32_reference_matches_golden(path):
    case, gradients, data = load(path)
    model = case.model(dtype=np.float32)
    actual = model.gradients(case.inputs_tb, case.targets_tb)
    assert actual["loss"] == pytest.approx(float(data["loss"]), rel=2e-6)
    for name, expected in gradients.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual[name], expected, rtol=0, atol=2e-5 * scale, err_msg=name)
        assert actual[name].dtype == np.float32


def keras_learning_rate(t: int) -> float:
    """Keras's 1e-3 at step t: it rounds both betas to float32 before it computes the bias correction."""
    def correction(beta_1: float, beta_2: float) -> float:
        return np.sqrt(1 - beta_2**t) / (1 - beta_1**t)

    rounded = correction(float(np.float32(0.9)), float(np.float32(0.999)))
    return 1e-3 * rounded / correction(0.9, 0.999)


@pytest.mark.parametrize("path", KERAS_FILES, ids=lambda path: path.stem)
def test_adam_follows_keras(path):
    case, _, data = load(path)
    model = case.model(carry_state=True)
    for step, expected in enumerate(data["adam_losses"]):
        reference_ops.copy_in(model.state, case.h0)
        loss = model.train_step(case.inputs_tb, case.targets_tb, keras_learning_rate(step + 1))["loss"]
        np.testing.assert_allclose(loss, expected, rtol=1e-9)
    for name, array in model.params.items():
        expected = data[f"adam_{name.removesuffix('.0')}"]
        np.testing.assert_allclose(array, expected, rtol=1e-8, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("path", TORCH_FILES, ids=lambda path: path.stem)
def test_evaluation_matches_golden_loss_in_any_windows(path):
    case, _, _ = load(path)
    case = case._replace(h0=np.zeros_like(case.h0))
    expected = case.model().gradients(case.inputs_tb, case.targets_tb)["loss"]
    T = len(case.inputs_tb)
    for cuts in ([0, T], [0, T // 2, T], [0, 1, T], list(range(T + 1))):
        windows = [Batch(case.inputs_tb[a:b], case.targets_tb[a:b]) for a, b in itertools.pairwise(cuts)]
        assert case.model().evaluate(windows) == pytest.approx(expected, rel=1e-12)


# Recurrence

@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_gates_do_not_overflow(dtype):
    """Pre-activations of 1e4: sigmoid and tanh reach their limits without a warning."""
    H = 3
    P = np.array([[1e4] * 3 * H, [-1e4] * 3 * H], dtype)
    zero = np.zeros((3 * H, H), dtype)
    saved = reference.gru_forward(P, np.array([[0], [1]]), zero, zero[:, 0], np.full((1, H), 0.25, dtype))
    np.testing.assert_array_equal(saved.gates_tb[:, 0, [0, H, 2 * H]], [[1, 1, 1], [0, 0, -1]])
    np.testing.assert_array_equal(saved.h_tb[:, 0, 0], [0.25, 0.25, -1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_recurrence_keeps_its_dtype(dtype, precision):
    rng = np.random.default_rng(3)
    P, W_hh, b_hh, h0, dy_tb = (rng.standard_normal(shape).astype(dtype)
                                for shape in ((7, 15), (15, 5), (15,), (2, 5), (3, 2, 5)))
    ids_tb = rng.integers(0, 7, (3, 2))
    saved = reference.gru_forward(P, ids_tb, W_hh, b_hh, h0, precision)
    gradients = reference.gru_backward(dy_tb, None, ids_tb, W_hh, saved, 7, precision)
    assert all(array.dtype == dtype for array in (*saved, *gradients))


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
    loss, dlogits = reference.cross_entropy_forward(*(x.astype(dtype) for x in (h_tb, W_out, b_out)), targets)
    assert loss.dtype == dlogits.dtype == dtype
    relative = 1e-12 if dtype == np.float64 else 1e-6
    np.testing.assert_allclose(loss, expected, rtol=relative)
    softmax_error = relative * max(1.0, np.abs(logits).max())
    np.testing.assert_allclose(dlogits, (np.exp(log_p) - np.eye(V)[targets]) / (T * B), rtol=0, atol=softmax_error)


# Dropout

def test_dropout_keeps_the_share_and_the_mean_and_is_a_function_of_its_arguments():
    x = np.ones((20, 10, 50))
    masks = {}
    for seed, layer, step in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]:
        keep, y = reference.dropout_forward(x, 0.3, seed, layer, step)
        assert abs(keep.mean() - 0.7) < 0.02
        np.testing.assert_array_equal(y, keep / 0.7)
        masks[seed, layer, step] = keep
        np.testing.assert_array_equal(reference.dropout_forward(x, 0.3, seed, layer, step)[0], keep)
    agreement = [(a == b).mean() for a in masks.values() for b in masks.values() if a is not b]
    assert max(agreement) < 0.62, "masks of different seeds, layers or steps repeat one another"


def test_dropout_backward_scales_the_elements_that_are_kept():
    keep = np.array([[[True, False, True]]])
    dx = reference.dropout_backward(np.array([[[2.0, 3.0, -4.0]]]), 0.5, keep)
    np.testing.assert_array_equal(dx, [[[4.0, 0.0, -8.0]]])


# Optimiser

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 65, 2**16 + 1])
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
    norm = reference.global_norm(arrays[1])
    np.testing.assert_allclose(norm, np.linalg.norm(g), rtol=10 * np.finfo(dtype).eps)
    results = reference.adam(*arrays, norm, dtype(step_size), clip_norm)
    for actual, expected in zip(results, (expected_p, expected_m, expected_v)):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, expected, rtol=0, atol=20 * np.finfo(dtype).eps * np.abs(expected).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_adam_changes_nothing_when_the_norm_is_not_finite(bad):
    p, g, m, v = (np.full(3, value, np.float32) for value in (1, 2, 3, 4))
    g[1] = bad
    p, m, v = reference.adam(p, g, m, v, reference.global_norm(g), np.float32(0.1))
    assert (p == 1).all() and (m == 3).all() and (v == 4).all()


def test_zero_gradient_is_not_divided_by():
    zeros = np.zeros(3, np.float32)
    p, _, _ = reference.adam(zeros, zeros, zeros, zeros, np.float32(0), np.float32(0.1), clip_norm=1.0)
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
    logits, uniforms = 3 * rng.standard_normal((4, V)), rng.random(4)
    ids = reference.sample(logits, uniforms, **options)
    assert ids.tolist() == [sample_by_definition(row, u, **options) for row, u in zip(logits, uniforms)]


@given(options, hnp.arrays(np.float32, (3, 6), elements=st.sampled_from([-80.0, 0.0, 0.5, 80.0])),
       st.sampled_from([0.0, 0.5, 1 - 2**-24]))
def test_sample_draws_a_kept_character_for_any_logits(options, logits, uniform):
    """Ties, certainties and the largest uniform number: the character drawn is never [UNK] and is always a kept one."""
    for row, drawn in zip(logits, reference.sample(logits, np.full(3, uniform, np.float32), **options)):
        assert drawn > 0
        rank = sorted(range(1, 6), key=lambda v, row=row: (-row[v], v)).index(drawn)
        assert options["top_k"] == 0 or rank < options["top_k"]
        if options["temperature"] == 0 or options["top_p"] == 0.01:
            assert rank == 0
        if options["temperature"] > 0:
            share = math.exp(min(0.0, float(row[drawn] - row[1:].max())) / options["temperature"])
            assert share >= options["min_p"] - 1e-6


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-30, 1e39])
def test_temperatures_beyond_float32_are_the_limits_they_stand_for(temperature):
    """Towards 0 the most likely character, towards infinity all alike."""
    ids = reference.sample(np.array([[0, 1, 3, 2]], np.float32), np.array([0.1], np.float32), temperature)
    assert ids[0] == (2 if temperature < 1 else 1)


def test_sample_frequencies_are_the_softmax():
    logits, rng = np.log(np.array([0.3, 0.1, 0.2, 0.4])) * 0.5, np.random.default_rng(8)
    drawn = reference.sample(np.tile(logits, (40_000, 1)), rng.random(40_000), temperature=0.5)
    counts = np.bincount(drawn, minlength=4) / 40_000
    np.testing.assert_allclose(counts, np.array([0, 0.1, 0.2, 0.4]) / 0.7, atol=0.01)


# Generation

@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.parametrize("layers, V", [(1, 7), (2, 7), (2, 100)])
def test_generation_reads_prompts_as_the_model_does_and_draws_from_its_logits(R, layers, V):
    """`sample` draws the characters written step by step from the states of a whole-window forward pass, too."""
    T = 6
    case = random_case(T=T, B=R, V=V, H=5, layers=layers, scale=1.0)
    model = case.model()
    params = model.params
    P = reference.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"])
    rng = np.random.default_rng(9)
    forced_tr, uniforms_tr = np.full((T, R), -1, np.int32), rng.random((T, R))
    for row in range(R):
        prompt = rng.integers(1, V, row % (T - 1))
        forced_tr[:len(prompt), row] = prompt
    first = rng.integers(1, V, R).astype(np.int32)
    h, ids, ids_tr = reference.generate(params, P, case.h0, first, forced_tr, uniforms_tr, temperature=0.8)
    assert (ids_tr[forced_tr >= 0] == forced_tr[forced_tr >= 0]).all()
    assert (ids == ids_tr[-1]).all()
    model.gradients(np.concatenate([[first], ids_tr[:-1]]), np.zeros((T, R), int))
    h_tb = model._layers[-1].saved.h_tb
    np.testing.assert_allclose(h[-1], h_tb[-1], rtol=1e-12, atol=1e-12)
    for t in range(T):
        drawn = reference.sample(h_tb[t + 1] @ params["W_out"].T + params["b_out"], uniforms_tr[t], temperature=0.8)
        free = forced_tr[t] < 0
        assert (ids_tr[t][free] == drawn[free]).all()


def test_rounded_weights_are_those_of_the_recurrence_and_the_output_layer():
    case = random_case(T=4, B=2, V=7, H=5, layers=2, scale=1.0)
    params, ids = case.model().params, np.array([1, 2])
    free = np.full((4, 2), -1), np.random.default_rng(1).random((4, 2))
    P = reference.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"])
    before = {name: reference.rounded(array, "bf16") if name in ("W_hh.0", "W_hh.1", "W_ih.1", "W_out") else array
              for name, array in params.items()}
    actual = reference.generate(params, P, case.h0, ids, *free, weights="bf16")
    for result, expected in zip(actual, reference.generate(before, P, case.h0, ids, *free)):
        np.testing.assert_array_equal(result, expected)
    assert (actual[0] != reference.generate(params, P, case.h0, ids, *free)[0]).any()
