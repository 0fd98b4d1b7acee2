"""The reference against central differences in float64, every parameter and h0."""

import numpy as np
import pytest

from char_gru.rnn import cpu
from tests.helpers.cases import random_case

STEP = 1e-5
CASES = {
    "one layer": {},
    "one step": {"T": 1},
    "one row": {"B": 1},
    "one unit": {"H": 1, "scale": 2.0},
    "two characters": {"V": 2},
    "two layers": {"layers": 2},
    "three layers": {"layers": 3, "T": 4},
    "saturated gates": {"scale": 3.0},
}


def central_differences(loss, array: np.ndarray) -> np.ndarray:
    """Gradient of loss() with respect to `array`, which it reads, by central differences."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + STEP
        above = loss()
        array[index] = kept - STEP
        below = loss()
        array[index] = kept
        gradient[index] = (above - below) / (2 * STEP)
    return gradient


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_model_gradients_match_central_differences(name, dropout):
    case = random_case(**CASES[name])
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
    saved = cpu.gru_saved(T, B, H, np.float64)

    def weighted_states() -> float:
        cpu.gru_forward(P, ids_tb, W_hh, b_hh, h0, saved)
        return float((saved.h_tb[1:] * (dy_tb @ W_y if M else dy_tb)).sum())

    weighted_states()
    results = {"P": np.empty_like(P), "W_hh": np.empty_like(W_hh), "b_hh": np.empty_like(b_hh), "h0": np.empty_like(h0)}
    cpu.gru_backward(dy_tb, W_y, ids_tb, W_hh, saved, *results.values())
    for name, array in (("P", P), ("W_hh", W_hh), ("b_hh", b_hh), ("h0", h0)):
        np.testing.assert_allclose(results[name], central_differences(weighted_states, array), rtol=1e-7, atol=1e-7,
                                   err_msg=name)


def test_what_aligns_the_gradients_stays_zero():
    """So that the norm of the flat buffer is that of the gradients."""
    case = random_case()
    model = case.model()
    model.train_step(case.inputs_tb, case.targets_tb)
    total = sum(float((gradient**2).sum()) for gradient in model.grads.values())
    norm = np.zeros(1)
    cpu.global_norm(model._grads, norm)
    np.testing.assert_allclose(norm[0]**2, total, rtol=1e-12)
