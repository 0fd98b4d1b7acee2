"""The language model computes on the kernels what it computes on the specification."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest

from char_gru import kernels
from char_gru.kernels import naive, runtime
from char_gru.kernels.plan.gpus import GPUS
from char_gru.rnn import training
from char_gru.rnn.batches import Batch
from char_gru.rnn.config import Sizes
from char_gru.rnn.model import LanguageModel
from char_gru.rnn.params import named_views
from char_gru.rnn.sampler import Generator
from char_gru.rnn.vocabulary import Vocabulary
from tests import host_cuda
from tests.helpers.cases import Case, random_case
from tests.helpers.commands import TINY, assert_equal_runs, make_text, stop_here, train_here
from tests.helpers.compare import assert_close, assert_within
from tests.helpers.golden import KERAS_FILES, TORCH_FILES, load
from tests.helpers.texts import assert_samples_drawn, assert_texts_drawn


@pytest.fixture
def ops(executor):
    return kernels.op_set("fp32")


def gradients_of(case: Case):
    """Loss and gradients of the case's window, as a function of the model."""
    return lambda model: model.gradients(case.inputs_tb, case.targets_tb)


def results(case: Case, compute, ops, **options) -> tuple[dict, dict, dict]:
    """`compute(model)` on the kernels, on the specification in float64 and on it in float32."""
    on_reference = [compute(case.model(dtype=dtype, **options)) for dtype in (np.float64, np.float32)]
    return compute(case.model(ops, np.float32, **options)), *on_reference


def assert_all_close(actual: dict, exact: dict, rounded: dict) -> None:
    assert actual.keys() == exact.keys()
    for name, value in exact.items():
        assert_close(name, np.asarray(actual[name], np.float32), value, rounded[name])


@pytest.mark.parametrize("layers, dropout", [(1, 0.0), (1, 0.4), (2, 0.0), (3, 0.4)])
def test_loss_and_gradients_match_reference(ops, layers, dropout):
    case = random_case(T=6, B=3, E=5, H=17, V=11, layers=layers)
    assert_all_close(*results(case, gradients_of(case), ops, dropout=dropout))


@pytest.mark.slow
def test_large_vocabulary(ops):
    case = random_case(T=3, B=2, E=3, H=5, V=20_000)
    assert_all_close(*results(case, gradients_of(case), ops))


@pytest.mark.parametrize("precision, epsilon", [("tf32", 2**-11), ("bf16", 2**-8)])
def test_gradients_in_other_precisions_err_by_their_rounding(executor, precision, epsilon):
    case = random_case(T=6, B=3, E=5, H=17, V=11, layers=2)
    actual, exact, _ = results(case, gradients_of(case), kernels.op_set(precision))
    for name, value in exact.items():
        error = np.abs(actual[name] - value).max() / np.abs(value).max()
        assert_within(name, error, 4 * epsilon)
        assert error > 0, name


@pytest.mark.parametrize("path", TORCH_FILES + KERAS_FILES, ids=lambda path: path.stem)
def test_gradients_match_golden(ops, path):
    case, gradients, data = load(path)
    actual, _, rounded = results(case, gradients_of(case), ops)
    for name, expected in (gradients | {"loss": data["loss"]}).items():
        assert_close(name, np.asarray(actual[name], np.float32), expected, rounded[name])


def trained(case: Case, steps: int):
    """Losses, norms, parameters, moments and state after some steps, as a function of the model."""
    def compute(model) -> dict:
        values = {}
        for step in range(steps):
            rolled = [np.roll(ids, step, axis=0) for ids in (case.inputs_tb, case.targets_tb)]
            values |= {f"{name} {step}": float(value) for name, value in model.train_step(*rolled).items()}
        arrays = {"params": model.params, "m": model.m, "v": model.v}
        values |= {f"{kind} {name}": model.ops.to_host(array) for kind, by_name in arrays.items()
                   for name, array in by_name.items()}
        return values | {"state": model.ops.to_host(model.state)}

    return compute


@pytest.mark.parametrize("layers, options", [
    (1, {}), (1, {"carry_state": True, "clip_norm": 0.3}),
    (2, {"carry_state": True, "dropout": 0.3, "clip_norm": 0.1, "seed": 5})], ids=str)
@pytest.mark.parametrize("op_set", [lambda: kernels.op_set("fp32"), naive.op_set], ids=["fast", "naive"])
def test_ten_steps_of_training_match_reference(executor, op_set, layers, options):
    case = random_case(T=4, B=3, H=9, layers=layers)
    assert_all_close(*results(case, trained(case, 10), op_set(), **options))


def test_evaluation_in_shorter_windows_matches_reference(ops):
    case = random_case(T=5, B=3, layers=2)
    rng = np.random.default_rng(2)
    windows = [Batch(*rng.integers(0, 7, (2, T, 3))) for T in (5, 5, 2, 1)]

    def compute(model) -> dict:
        losses = [model.evaluate(windows), model.evaluate(windows[2:])]
        return {"losses": losses, "loss after it": model.gradients(case.inputs_tb, case.targets_tb)["loss"]}

    assert_all_close(*results(case, compute, ops))


def test_equal_runs_give_equal_bits(ops):
    case = random_case(T=4, B=3, H=9, layers=2)
    first, again = (trained(case, 3)(case.model(ops, np.float32, dropout=0.3, clip_norm=0.1)) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name], err_msg=name)


REPLAYED = [  # layers, options
    (1, {}), (2, {"carry_state": True, "dropout": 0.3, "clip_norm": 0.1, "seed": 5})]


@pytest.mark.parametrize("layers, options", REPLAYED, ids=str)
def test_replayed_steps_give_the_bits_of_steps_launched_kernel_by_kernel(ops, layers, options):
    """Other data, learning rate and dropout in every step, and other work on the model between them."""
    case = random_case(T=4, B=3, H=9, layers=layers)
    vocabulary = Vocabulary("\n abcd")

    def compute(graph: bool) -> list[bytes]:
        model, bits = case.model(ops, np.float32, graph=graph, **options), []
        for step in range(5):
            inputs, targets = (np.roll(ids, step, axis=1) for ids in (case.inputs_tb, case.targets_tb))
            result = model.train_step(inputs, targets, learning_rate=1e-2 / (step + 1))
            if step == 2:
                model.evaluate([Batch(targets, inputs), Batch(targets[:2], inputs[:2])])
                model.gradients(targets, inputs)
                Generator(case.sizes, vocabulary, model.params, ops).generate(["a"], 3, seed=step)
            if step == 3:
                model.reset_state()
                for arrays in (model.params, model.m, model.v):  # as a resumed run does
                    ops.copy_in(arrays["b_out"], 0.5 * ops.to_host(arrays["b_out"]))
            arrays = (*model.params.values(), *model.m.values(), *model.v.values(), model.state)
            bits += [np.float32(float(value)).tobytes() for value in result.values()]
            bits += [ops.to_host(array).tobytes() for array in arrays]
        return bits

    assert compute(graph=True) == compute(graph=False)


@pytest.mark.parametrize("graph, runs", [(True, 2), (False, 5)])
def test_a_step_runs_once_is_captured_once_and_is_then_only_launched(ops, monkeypatch, graph, runs):
    steps, step_ops = [], LanguageModel._step_ops
    monkeypatch.setattr(LanguageModel, "_step_ops", lambda model: (steps.append(model.step), step_ops(model)))
    case = random_case()
    model = case.model(ops, np.float32, graph=graph)
    for _ in range(5):
        model.train_step(case.inputs_tb, case.targets_tb)
    assert steps == list(range(runs))


def test_a_model_is_freed_with_its_last_name(ops):
    """Its graph does not hold it, nor does it hold itself in a cycle."""
    case = random_case()
    model = case.model(ops, np.float32)
    for _ in range(3):
        model.train_step(case.inputs_tb, case.targets_tb)
    reference_to_model = weakref.ref(model)
    del model
    assert reference_to_model() is None


def test_gradient_that_is_not_finite_leaves_the_model_as_it_was(ops):
    case = random_case()
    model = case.model(ops, np.float32)
    b_out = np.zeros(case.sizes.V)
    b_out[2] = np.inf
    ops.copy_in(model.params["b_out"], b_out)
    before = ops.to_host(model._flat)
    with np.errstate(all="ignore"):
        result = model.train_step(case.inputs_tb, case.targets_tb)
    assert not np.isfinite(float(result["grad_norm"]))
    np.testing.assert_array_equal(ops.to_host(model._flat), before)


def generator(ops, layers: int) -> tuple[Generator, dict[str, np.ndarray]]:
    """A model on the kernels, and its parameters."""
    characters = "\n abcdefgh"
    case = random_case(E=4, H=10, V=len(characters) + 1, layers=layers, scale=1.0)
    params, on_device = named_views(case.flat_params, case.sizes), {}
    for name, view in params.items():
        on_device[name] = ops.empty(view.shape)
        ops.copy_in(on_device[name], view)
    return Generator(case.sizes, Vocabulary(characters), on_device, ops, seed=3), params


@pytest.mark.parametrize("layers", [1, 2])
def test_generator_writes_the_text_of_the_reference(ops, layers):
    (model, params), prompts = generator(ops, layers), ["", "abc", "h"]
    for seed, options in enumerate([{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 6}, {"top_p": 0.8}]):
        texts = model.generate(prompts, 25, seed=seed, **options)
        assert_texts_drawn(params, model.vocabulary, prompts, texts, seed, **options)


def test_generator_steps_as_on_the_reference(ops):
    model, params = generator(ops, layers=2)
    prompts, state, texts = ["a", "e"], None, ["", ""]
    chars = prompts
    for _ in range(12):
        chars, state = model.step(chars, state)
        texts = [text + char for text, char in zip(texts, chars, strict=True)]
    assert_texts_drawn(params, model.vocabulary, prompts, texts, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--stateful", "--layers", "2", "--dropout", "0.3", "--clip-norm", "0.5")],
                         ids=["one layer", "stateful, two layers with dropout"])
def test_run_on_the_kernels_resumes_on_the_cpu(ops, tmp_path, monkeypatch, options):
    """One checkpoint serves both devices: a run begun on the kernels and ended on the CPU is a run on the CPU."""
    make_text(tmp_path / "text.txt")
    arguments = ("--data", "text.txt", *TINY, *options, "--epochs", 1, "--save-every", 1)
    expected = train_here(*arguments, cwd=tmp_path)
    moved = tmp_path / "moved"
    moved.mkdir()
    make_text(moved / "text.txt")
    with monkeypatch.context() as patched:
        patched.setattr(training, "op_set", lambda device, precision: ops)
        stop_here(3, *arguments, cwd=moved)
    train_here("--resume", cwd=moved)
    lines, wanted = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                     for folder in (moved / "run", expected))
    assert [line.keys() for line in lines] == [line.keys() for line in wanted]
    for line, right in zip(lines, wanted):
        for name, value in right.items():
            assert_within(name, abs(line[name] - value), 1e-5 * abs(value))
    assert_samples_drawn(moved / "run")


@pytest.mark.slow
def test_run_without_graphs_writes_the_same_files(ops, tmp_path, monkeypatch):
    """`--no-graph` tells how steps are launched, so that it may change whenever a run resumes."""
    monkeypatch.setattr(training, "op_set", lambda device, precision: ops)
    executor, captured = runtime.current_executor(), []
    capture = executor.capture
    monkeypatch.setattr(executor, "capture", lambda function: captured.append(function) or capture(function))
    folders = [tmp_path / name for name in ("graph", "no-graph")]
    for folder in folders:
        folder.mkdir()
        make_text(folder / "text.txt")
    arguments = ("--data", "text.txt", *TINY, "--stateful", "--epochs", 1)
    expected = train_here(*arguments, cwd=folders[0])
    assert len(captured) == 1
    stop_here(3, *arguments, "--no-graph", cwd=folders[1])
    stop_here(5, "--resume", "--no-graph", cwd=folders[1])
    assert len(captured) == 1
    train_here("--resume", cwd=folders[1])
    assert len(captured) == 2
    assert_equal_runs(folders[1] / "run", expected)


@pytest.mark.parametrize("precision, said", [
    ("tf32", "({} at the tutorial's sizes where the recurrence is persistent,"), ("bf16", ", {} in bf16,")])
def test_a_training_step_is_as_few_launches_as_readme_says(precision, said):
    """At the tutorial's sizes on a large GPU; launches are recorded, and not run."""
    class Recorder(host_cuda.HostExecutor):
        gpu = GPUS["h100"]

        def launch(self, source, kernel, *arguments):
            self.launches.append(kernel)

    readme = " ".join((Path(__file__).parents[1] / "README.md").read_text().split())
    with runtime.use(Recorder()) as recorder:
        model = LanguageModel(Sizes(V=66, E=256, H=1024), T=100, B=64, ops=kernels.op_set(precision), graph=False)
        model.train_step(*np.zeros((2, 100, 64), int))
    assert {"gru_forward_persistent", "gru_backward_persistent", "matmul_multistage_tn"} <= set(recorder.launches)
    assert said.format(len(recorder.launches)) in readme
