"""Properties of the whole model, on the specification and on the CPU."""

import math
import os

import numpy as np
import pytest

from char_gru.rnn import cpu, reference_ops
from char_gru.rnn.batches import Batch, ShuffledWindows
from char_gru.rnn.checkpoint import Checkpoint, save_checkpoint
from char_gru.rnn.config import Sizes, UserError
from char_gru.rnn.devices import op_set
from char_gru.rnn.model import LanguageModel
from char_gru.rnn.params import initial_parameters, named_views, parameter_count, parameter_shapes
from char_gru.rnn.sampler import Generator
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


@pytest.mark.parametrize(("ids_tb", "part"), [
    (np.full((3, 2), 7), r"expected ids in \[0, 7\), got some from 7 to 7"),
    (np.full((3, 2), -1), r"got some from -1 to -1"),
    (np.full((3, 2), 255, np.uint8), r"got some from 255"),
    (np.zeros((3, 2)), "expected integers, got float64"), (np.zeros((3, 2), bool), "expected integers, got bool"),
    (np.zeros((2, 3), int), r"expected shape \(3, 2\): \(T, B\), got \(2, 3\)"),
    (np.zeros((3, 1), int), "expected shape"), (np.zeros((1, 2), int), "expected shape"), (0, "expected shape"),
    (np.zeros((3, 2, 1), int), "expected shape"), (np.zeros(6, int), "expected shape")])
def test_ids_that_are_none_of_the_model_are_refused_before_they_reach_the_device(ops, ids_tb, part):
    case = random_case(T=3, B=2, V=7)
    model = case.model(ops)
    before = model._flat.copy()
    for compute in (model.train_step, model.gradients):
        with pytest.raises(ValueError, match=f"^inputs: .*{part}"):
            compute(ids_tb, case.targets_tb)
        with pytest.raises(ValueError, match=f"^targets: .*{part}"):
            compute(case.inputs_tb, ids_tb)
    np.testing.assert_array_equal(model._flat, before)
    assert model.step == 0


@pytest.mark.parametrize("rate", [-1e-3, math.inf, math.nan, "0.1", None, [1e-3], True])
def test_learning_rate_that_is_none_is_refused_and_changes_nothing(ops, rate):
    case = random_case(T=3, B=2)
    model = case.model(ops)
    with pytest.raises(ValueError, match="learning_rate: expected a finite number of at least 0, got"):
        model.train_step(case.inputs_tb, case.targets_tb, rate)
    assert model.step == 0
    model.train_step(case.inputs_tb, case.targets_tb, np.float32(1e-3))


@pytest.mark.parametrize(("options", "part"), [
    ({"dropout": 1.0}, r"dropout: expected a finite number in \[0, 1\), got 1.0"), ({"dropout": 2}, "dropout"),
    ({"dropout": -0.1}, "dropout"), ({"dropout": math.nan}, "dropout"), ({"clip_norm": -1}, "clip_norm"),
    ({"clip_norm": math.inf}, "clip_norm"), ({"T": 0}, "T, B"), ({"B": 2.5}, "T, B"), ({"B": "2"}, "T, B")])
def test_model_of_other_options_is_refused(options, part):
    with pytest.raises(ValueError, match=f"^{part}"):
        LanguageModel(Sizes(V=3, E=4, H=5), **{"T": 2, "B": 2} | options)


@pytest.mark.parametrize("size", [{"V": 0}, {"layers": 0}, {"H": -1}, {"E": 2.5}, {"V": "3"}, {"V": True}])
def test_sizes_are_whole_numbers_of_at_least_one(size):
    with pytest.raises(ValueError, match=f"^{next(iter(size))}: expected a whole number of at least 1, got"):
        Sizes(**{"V": 3, "E": 4, "H": 5} | size)


def test_sizes_of_numpy_can_be_saved(tmp_path):
    sizes = Sizes(*np.array([3, 4, 5]))
    LanguageModel(sizes, T=2, B=2).save(tmp_path / "model.safetensors", Vocabulary("ab"))
    assert LanguageModel.load(tmp_path / "model.safetensors", 2, 2)[0].sizes == sizes


@pytest.mark.parametrize(("options", "part"), [
    ({"device": "tpu"}, "--device is 'tpu', but must be"), ({"device": None}, "--device is None"),
    ({"device": "cpu", "precision": "fp8"}, "--precision is 'fp8', but must be"),
    ({"device": "cpu", "precision": "bf16"}, "--precision bf16 needs an NVIDIA GPU")])
def test_op_set_of_another_device_or_precision_is_refused(options, part):
    with pytest.raises(UserError, match=part):
        op_set(**options)


def test_windows_that_cannot_be_evaluated_are_refused(ops):
    model = random_case(T=3, B=2, V=7).model(ops)
    for shape, part in (((4, 2), "1 to 3 steps, got 4"), ((0, 2), "1 to 3 steps, got 0"), ((2, 3), "inputs: expected")):
        with pytest.raises(ValueError, match=part):
            model.evaluate([Batch(*np.zeros((2, *shape), int))])
    with pytest.raises(ValueError, match="at least one, got none"):
        model.evaluate([])


def test_model_of_other_sizes_is_refused():
    for T, B in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="T, B: expected whole numbers of at least 1"):
            LanguageModel(Sizes(4, 2, 3), T, B)
    with pytest.raises(ValueError, match=r"flat_params: expected shape \(\d+,\), got \(1,\)"):
        LanguageModel(Sizes(4, 2, 3), 2, 2, np.zeros(1))


# Saving

def continued(model: LanguageModel, case) -> bytes:
    for _ in range(3):
        model.train_step(case.inputs_tb, case.targets_tb)
    return model._flat.tobytes() + np.array(model.state).tobytes()


def test_saved_model_goes_on_exactly_where_it_was(ops, tmp_path):
    case, vocabulary = random_case(T=5, B=4, V=7, layers=2), Vocabulary("abcdef", "c")
    options = {"carry_state": True, "dropout": 0.3, "ops": ops}
    model = case.model(dtype=np.float32, **options)
    continued(model, case)
    model.save(tmp_path / "model.safetensors", vocabulary)
    for path in (tmp_path / "model.safetensors", str(tmp_path / "model.safetensors")):
        loaded, its_vocabulary = LanguageModel.load(path, 5, 4, **options)
        assert its_vocabulary == vocabulary and its_vocabulary.beginning == "c"
        assert (loaded.step, loaded.sizes) == (3, case.sizes)
        again, _ = LanguageModel.load(path, 5, 3, **options)
        assert not again.state.any()
    assert continued(loaded, case) == continued(model, case)
    [text], [expected] = (generator.generate("ab", 20, seed=1) for generator in (
        Generator.load(tmp_path / "model.safetensors", "cpu"),
        Generator(case.sizes, vocabulary, {name: its.astype(np.float32) for name, its in again.params.items()})))
    assert text == expected


def test_parameters_alone_load_as_a_model_before_its_first_step(tmp_path):
    case = random_case(T=2, B=2, V=7)
    params = named_views(case.flat_params.astype(np.float32), case.sizes)
    save_checkpoint(tmp_path / "best.safetensors", Checkpoint(case.sizes, Vocabulary("abcdef"), params))
    for path in (tmp_path, tmp_path / "best.safetensors"):
        model, _ = LanguageModel.load(path, 4, 3)
        assert model.step == 0 and not any(array.any() for array in model.m.values())
        for name, array in params.items():
            np.testing.assert_array_equal(model.params[name], array)


def test_model_is_not_saved_with_the_vocabulary_of_another(tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary: expected 7 characters, \[UNK\] included, got 3"):
        random_case(V=7).model(cpu).save(tmp_path / "model.safetensors", Vocabulary("ab"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("group", ["params", "m", "v", "state"])
def test_model_that_is_not_finite_does_not_replace_the_last_good_one(tmp_path, group):
    model, path = random_case(V=7).model(cpu), tmp_path / "model.safetensors"
    model.save(path, Vocabulary("abcdef"))
    good = path.read_bytes()
    array = model.state if group == "state" else getattr(model, group)["b_out"]
    array[-1] = np.nan
    with pytest.raises(ValueError, match=f"^{group}: expected finite numbers, but (b_out|state) has others"):
        model.save(path, Vocabulary("abcdef"))
    assert path.read_bytes() == good


def test_model_is_saved_as_a_file_or_not_at_all(tmp_path):
    model = random_case(V=7).model(cpu)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match=f"cannot write .*{name}: it is no file, but a {name}"):
            model.save(tmp_path / name, Vocabulary("abcdef"))
    with pytest.raises(FileNotFoundError) as caught:
        model.save(tmp_path / "none" / "model.safetensors", Vocabulary("abcdef"))
    assert caught.value.filename == str(tmp_path / "none" / "model.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "folder"}


def test_checkpoint_whose_steps_are_no_number_is_refused(tmp_path):
    case = random_case(V=7)
    model = case.model(cpu)
    for step in ("three", -1, None, 1.5, True):
        model.step = step
        model.save(tmp_path / "model.safetensors", Vocabulary("abcdef"))
        with pytest.raises(UserError, match="does not tell how many steps"):
            LanguageModel.load(tmp_path / "model.safetensors", 2, 2)


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
