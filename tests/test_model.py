"""Properties of the whole model, on the specification and on the CPU."""

import math

import numpy as np
import pytest

from char_gru.rnn import cpu, reference_ops
from char_gru.rnn.batches import Batch, ShuffledWindows
from char_gru.rnn.config import Sizes
from char_gru.rnn.model import LanguageModel
from char_gru.rnn.params import initial_parameters, named_views, parameter_count, parameter_shapes
from char_gru.rnn.vocabulary import Vocabulary
from tests.helpers.cases import random_case


@pytest.fixture(params=[reference_ops, cpu], ids=["specification", "CPU"])
def ops(request):
    return request.param


def test_parameter_count_is_the_tutorials():
    assert parameter_count(Sizes(V=66, E=256, H=1024)) == 4_022_850


@pytest.mark.parametrize("layers", [1, 2])
def test_split_window_equals_whole(ops, layers):
    case = random_case(T=6, layers=layers)
    whole = case.model(ops)
    expected = whole.gradients(case.inputs_tb, case.targets_tb)["loss"]
    states = np.stack([buffers.saved.h_tb[-1] for buffers in whole._layers])
    half = case._replace(inputs_tb=case.inputs_tb[:3], targets_tb=case.targets_tb[:3]).model(ops, carry_state=True)
    losses = [half.train_step(case.inputs_tb[part], case.targets_tb[part], learning_rate=0.0)["loss"]
              for part in (slice(0, 3), slice(3, 6))]
    assert np.mean(losses) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(half.state, states, rtol=1e-12)


def test_batch_rows_do_not_interact(ops):
    case = random_case(T=4, B=3)
    model = case.model(ops)
    model.gradients(case.inputs_tb, case.targets_tb)
    before = np.array(model._layers[0].saved.h_tb)
    changed = case.inputs_tb.copy()
    changed[:, 1] = (changed[:, 1] + 1) % case.sizes.V
    model.gradients(changed, case.targets_tb)
    after = model._layers[0].saved.h_tb
    np.testing.assert_allclose(after[:, [0, 2]], before[:, [0, 2]], rtol=1e-13)
    assert np.abs(after[1:, 1] - before[1:, 1]).min() > 1e-6


def test_state_starts_at_zero_unless_it_is_carried(ops):
    case = random_case(T=4)
    fresh, carried = case.model(ops), case.model(ops, carry_state=True)
    for _ in range(2):
        loss_fresh = fresh.train_step(case.inputs_tb, case.targets_tb, 0.0)["loss"]
        loss_carried = carried.train_step(case.inputs_tb, case.targets_tb, 0.0)["loss"]
    zero = case._replace(h0=np.zeros_like(case.h0)).model(ops)
    assert loss_fresh == zero.gradients(case.inputs_tb, case.targets_tb)["loss"]
    assert abs(loss_carried - loss_fresh) > 1e-6
    carried.reset_state()
    assert carried.train_step(case.inputs_tb, case.targets_tb, 0.0)["loss"] == loss_fresh


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equal_runs_give_equal_bits(ops, dropout):
    case = random_case(T=20, B=4, H=33, layers=2)
    results = []
    for _ in range(2):
        model = case.model(ops, dtype=np.float32, dropout=dropout, clip_norm=0.1)
        losses = [model.train_step(case.inputs_tb, case.targets_tb)["loss"] for _ in range(5)]
        results.append((losses, model._flat.tobytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("layers", [1, 2])
def test_dropout_is_for_training_only_and_differs_between_steps(ops, layers):
    case = random_case(T=5, B=4, H=16, layers=layers)
    with_dropout, without = (case.model(ops, dropout=rate) for rate in (0.5, 0.0))
    batches = [Batch(case.inputs_tb, case.targets_tb)]
    assert with_dropout.evaluate(batches) == without.evaluate(batches)
    losses = [with_dropout.train_step(case.inputs_tb, case.targets_tb, 0.0)["loss"] for _ in range(2)]
    assert losses[0] != losses[1]


def test_evaluation_between_steps_changes_nothing(ops):
    case = random_case(T=5, B=4, layers=2)
    interrupted, plain = (case.model(ops, carry_state=True) for _ in range(2))
    for model in (interrupted, plain):
        for _ in range(3):
            model.train_step(case.inputs_tb, case.targets_tb)
            if model is interrupted:
                model.evaluate([Batch(case.inputs_tb, case.targets_tb)])
    assert interrupted._flat.tobytes() == plain._flat.tobytes()


def test_gradient_that_is_not_finite_leaves_the_model_as_it_was(ops):
    case = random_case()
    model = case.model(ops, dtype=np.float32)
    model.params["b_out"][0] = np.inf
    before = model._flat.copy()
    with np.errstate(all="ignore"):
        result = model.train_step(case.inputs_tb, case.targets_tb)
    assert not math.isfinite(result["grad_norm"])
    np.testing.assert_array_equal(model._flat, before)


def test_clipping_bounds_the_first_update_and_reports_the_norm_before_it(ops):
    case = random_case()
    free, clipped = case.model(ops), case.model(ops, clip_norm=1e-9)
    norms = [model.train_step(case.inputs_tb, case.targets_tb)["grad_norm"] for model in (free, clipped)]
    assert norms[0] == norms[1] > 1e-3
    moved = [np.abs(model._flat - case.flat_params).max() for model in (free, clipped)]
    assert moved[1] < 0.1 * moved[0]


def test_short_text_is_memorised():
    text = "the quick brown fox jumps over the lazy dog, and "
    vocabulary = Vocabulary.of(text)
    windows = ShuffledWindows(vocabulary.encode(text * 40), B=8, T=20, seed=0)
    model = LanguageModel(Sizes(len(vocabulary), 16, 64), T=20, B=8)
    for step in range(300):
        epoch, index = divmod(step, windows.batches_per_epoch)
        loss = model.train_step(*windows.batch(epoch, index), learning_rate=5e-3)["loss"]
    assert loss < 0.25


@pytest.mark.parametrize("layers", [1, 2])
def test_initial_values_are_keras(layers):
    sizes = Sizes(V=11, E=6, H=8, layers=layers)
    params = named_views(initial_parameters(sizes, "keras", seed=1), sizes)
    for name, shape in parameter_shapes(sizes).items():
        values, base = params[name], name.partition(".")[0]
        if base in ("b_ih", "b_hh", "b_out"):
            assert (values == 0).all()
        elif base == "W_hh":
            np.testing.assert_allclose(values.T @ values, np.eye(8), atol=1e-6)
        else:
            bound = 0.05 if base == "W_emb" else math.sqrt(6 / sum(shape))
            assert 0.8 * bound < np.abs(values).max() <= bound


def test_initial_values_are_pytorchs():
    sizes = Sizes(V=40, E=30, H=16, layers=2)
    params = named_views(initial_parameters(sizes, "pytorch", seed=1), sizes)
    assert abs(params["W_emb"].std() - 1) < 0.1
    for name in params.keys() - {"W_emb"}:
        assert 0.2 < np.abs(params[name]).max() <= 0.25


def test_initial_values_depend_on_the_seed_alone():
    sizes = Sizes(V=7, E=4, H=5)
    for init in ("keras", "pytorch"):
        first, again, other = (initial_parameters(sizes, init, seed) for seed in (1, 1, 2))
        assert first.tobytes() == again.tobytes() != other.tobytes()


def test_untrained_loss_is_that_of_a_uniform_guess():
    case = random_case(T=20, B=8, V=66)
    model = LanguageModel(Sizes(66, 16, 32), 20, 8, initial_parameters(Sizes(66, 16, 32), "keras", 0))
    assert model.gradients(case.inputs_tb, case.targets_tb)["loss"] == pytest.approx(math.log(66), abs=0.02)
