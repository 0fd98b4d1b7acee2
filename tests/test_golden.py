"""The reference against numbers that Keras and PyTorch computed in float64."""

import numpy as np
import pytest

from char_gru.rnn import cpu
from char_gru.rnn.batches import Batch
from char_gru.rnn.config import Sizes
from char_gru.rnn.params import checkpoint_name, flat_size, named_views, parameter_shapes
from tests.helpers.cases import GOLDEN_DIR, Case

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
TORCH_FILES = sorted(GOLDEN_DIR.glob("torch_*.npz"))
KERAS_FILES = sorted(GOLDEN_DIR.glob("keras_*.npz"))


def load(path) -> tuple[Case, dict, dict]:
    """A golden file as a case, its gradients by our names, and everything in it."""
    data = dict(np.load(path))
    if "sizes_VEHLBT" in data:
        V, E, H, layers, _, _ = data["sizes_VEHLBT"].tolist()
        sizes = Sizes(V, E, H, layers)
        stored = {name: checkpoint_name(name) for name in parameter_shapes(sizes)}
        gradients = {name: data[f"grad.{key}"] for name, key in stored.items()} | {"dh0": data["dh0"]}
        h0 = data["h0"]
    else:
        V, E, H, _, _ = data["sizes_VEHBT"].tolist()
        sizes = Sizes(V, E, H)
        stored = {name: name.removesuffix(".0") for name in parameter_shapes(sizes)}
        gradients = {name: data[f"d{key}"] for name, key in stored.items()}
        h0 = data["h0"][None]
    flat = np.zeros(flat_size(sizes))
    for name, view in named_views(flat, sizes).items():
        view[...] = data[stored[name]]
    return Case(sizes, flat, data["ids_tb"], data["targets_tb"], h0), gradients, data


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
    h_tb = cpu.to_host(model._layers[-1].saved.h_tb)
    np.testing.assert_allclose(h_tb[-1], data["h_T"][-1] if data["h_T"].ndim == 3 else data["h_T"], **TOLERANCE)
    if "h_tb" in data:
        np.testing.assert_allclose(h_tb[1:], data["h_tb"], **TOLERANCE)
    logits = data["logits_tbv"]
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    dlogits = (softmax - np.eye(case.sizes.V)[case.targets_tb]) / case.inputs_tb.size
    np.testing.assert_allclose(cpu.to_host(model._dlogits_tb), dlogits, **TOLERANCE)


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
        cpu.copy_in(model.state, case.h0)
        loss = model.train_step(case.inputs_tb, case.targets_tb, keras_learning_rate(step + 1))["loss"]
        np.testing.assert_allclose(loss, expected, rtol=1e-9)
    for name, array in model.params.items():
        expected = data[f"adam_{name.removesuffix('.0')}"]
        np.testing.assert_allclose(array, expected, rtol=1e-8, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("path", TORCH_FILES, ids=lambda path: path.stem)
def test_evaluation_matches_golden_loss_in_any_windows(path):
    case, _, data = load(path)
    case = case._replace(h0=np.zeros_like(case.h0))
    expected = case.model().gradients(case.inputs_tb, case.targets_tb)["loss"]
    T = len(case.inputs_tb)
    for cuts in ([0, T], [0, T // 2, T], [0, 1, T], list(range(T + 1))):
        windows = [Batch(case.inputs_tb[a:b], case.targets_tb[a:b]) for a, b in zip(cuts, cuts[1:])]
        assert case.model().evaluate(windows) == pytest.approx(expected, rel=1e-12)
