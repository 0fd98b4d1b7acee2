"""Models as ONNX graphs: onnxruntime writes the texts of `Generator.generate`, and has the specification's logits."""

import json
import re
import sys
from dataclasses import asdict

import numpy as np
import onnx
import onnxruntime
import pytest

from bench import bench_generate
from bench.devices import Cpu
from char_gru.rnn import commands, reference
from char_gru.rnn.checkpoint import Checkpoint, save_checkpoint
from char_gru.rnn.config import Sizes, UserError
from char_gru.rnn.export import onnx_graph
from char_gru.rnn.export.onnx_graph import onnx_bytes
from char_gru.rnn.params import initial_parameters, named_views
from char_gru.rnn.sampler import Generator
from char_gru.rnn.vocabulary import Vocabulary
from tests.helpers.cases import random_case
from tests.helpers.commands import ROOT, assert_refused, run
from tests.helpers.compare import assert_close

README = ROOT / "README.md"
CHARACTERS = "\n !,.:;AEJLMORSTaehilnorstuw"
PROMPTS = ["ROMEO:", "", "J", "no answer, so she tells\n", "TALE"]
OPTIONS = {
    "argmax": {"temperature": 0.0}, "cold": {"temperature": 0.5}, "hot": {"temperature": 1.7}, "top_k": {"top_k": 4},
    "one character": {"top_k": 1}, "all characters": {"top_k": 1000}, "top_p": {"top_p": 0.8},
    "one most likely": {"top_p": 1e-6}, "min_p": {"min_p": 0.1}, "only equally likely": {"min_p": 1.0},
    "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.05}}


def random_checkpoint(layers: int, characters: str = CHARACTERS) -> Checkpoint:
    """A model whose distributions are neither flat nor certain."""
    sizes = Sizes(len(characters) + 1, 7, 15, layers)
    return Checkpoint(sizes, Vocabulary(characters), named_views(3 * initial_parameters(sizes, "pytorch", 5), sizes))


@pytest.fixture(scope="module", params=[1, 2], ids=["one layer", "two layers"])
def checkpoint(request) -> Checkpoint:
    return random_checkpoint(request.param)


def loaded(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that inputs with default values are no constants
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def inputs_of(checkpoint: Checkpoint, prompts: list[str], length: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs of the graph for whole texts: character k of row b is drawn with uniform number (k, b)."""
    vocabulary, rows = checkpoint.vocabulary, len(prompts)
    ids_of_rows = [vocabulary.encode(prompt or vocabulary.beginning).astype(np.int32) for prompt in prompts]
    T = max(map(len, ids_of_rows)) - 1 + length
    forced_tr, uniforms_tr = np.full((T, rows), -1, np.int32), np.zeros((T, rows), np.float32)
    numbers = np.random.Generator(np.random.Philox(key=seed)).random((length, rows), np.float32)
    for row, ids in enumerate(ids_of_rows):
        forced_tr[:len(ids) - 1, row] = ids[1:]
        uniforms_tr[len(ids) - 1:len(ids) - 1 + length, row] = numbers[:, row]
    sizes = checkpoint.sizes
    return {"ids": np.array([ids[0] for ids in ids_of_rows]), "forced_tr": forced_tr, "uniforms_tr": uniforms_tr,
            "state": np.zeros((sizes.layers, rows, sizes.H), np.float32)}


def scalars(**options: float) -> dict[str, np.ndarray]:
    with np.errstate(over="ignore"):
        return {name: np.array(value, onnx_graph.OPTIONS[name].dtype) for name, value in options.items()}


def texts_by_onnx(checkpoint: Checkpoint, model: bytes, prompts: list[str], length: int, seed: int,
                  cuts: tuple[int, ...] = (), **options: float) -> list[str]:
    """The texts that onnxruntime writes, in calls that end before each step of `cuts` and at the end."""
    inputs, session = inputs_of(checkpoint, prompts, length, seed) | scalars(**options), loaded(model)
    pieces = []
    for forced_tr, uniforms_tr in zip(*(np.split(inputs[name], cuts) for name in ("forced_tr", "uniforms_tr"))):
        ids_tr, inputs["state"], inputs["ids"] = session.run(
            ["ids_tr", "state_out", "last_ids"], inputs | {"forced_tr": forced_tr, "uniforms_tr": uniforms_tr})
        np.testing.assert_array_equal(inputs["ids"], ids_tr[-1])
        pieces.append(ids_tr)
    ids_tr = np.concatenate(pieces)
    assert ids_tr.dtype == np.int32
    starts = [max(len(prompt), 1) - 1 for prompt in prompts]
    return [checkpoint.vocabulary.decode(ids_tr[start:start + length, row]) for row, start in enumerate(starts)]


def generated(checkpoint: Checkpoint, prompts: list[str], length: int, seed: int, **options: float) -> list[str]:
    generator = Generator(checkpoint.sizes, checkpoint.vocabulary, checkpoint.params)
    return generator.generate(prompts, length, seed=seed, **options)


def by_specification(params: dict[str, np.ndarray], ids_tb: np.ndarray, h0: np.ndarray) -> tuple[np.ndarray, ...]:
    """logits_tbv (T, B, V) and the states (layers, B, H) after the last character, in the dtype of the parameters."""
    x, ids, states = params["W_emb"], ids_tb, []
    for layer, h in enumerate(h0):
        P = reference.input_table_forward(x, params[f"W_ih.{layer}"], params[f"b_ih.{layer}"])
        h_tb = reference.gru_forward(P, ids, params[f"W_hh.{layer}"], params[f"b_hh.{layer}"], h).h_tb
        x, ids = h_tb[1:].reshape(-1, h.shape[1]), np.arange(ids.size).reshape(ids.shape)
        states.append(h_tb[-1])
    return reference.product(h_tb[1:], params["W_out"].T) + params["b_out"], np.array(states)


def exact_and_single(params: dict[str, np.ndarray], ids_tb: np.ndarray, h0: np.ndarray) -> list[tuple]:
    """`by_specification` in float64 and in float32."""
    return [by_specification({name: array.astype(dtype) for name, array in params.items()}, ids_tb, h0.astype(dtype))
            for dtype in (np.float64, np.float32)]


# The generator


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_onnx_draws_the_characters_of_generate(checkpoint, options):
    model = onnx_bytes(checkpoint, logits=False)
    texts = texts_by_onnx(checkpoint, model, PROMPTS, 200, seed=3, **options)
    assert texts == generated(checkpoint, PROMPTS, 200, seed=3, **options)
    every = options == OPTIONS["all characters"]
    assert (texts == generated(checkpoint, PROMPTS, 200, seed=3)) == every, "the option is without effect"


def test_onnx_writes_the_texts_of_generate_in_pieces_of_any_length(checkpoint):
    model = onnx_bytes(checkpoint, logits=False)
    expected = generated(checkpoint, PROMPTS, 1000, seed=2**63)
    for cuts in ((), (1, 8), (500, 501)):
        assert texts_by_onnx(checkpoint, model, PROMPTS, 1000, seed=2**63, cuts=cuts) == expected


def test_onnx_carries_the_states_of_the_specification(checkpoint):
    inputs = inputs_of(checkpoint, PROMPTS, 300, seed=1)
    inputs["state"] = np.random.default_rng(1).uniform(-1, 1, inputs["state"].shape).astype(np.float32)
    ids_tr, state, _ = loaded(onnx_bytes(checkpoint, logits=False)).run(None, inputs)
    read_tr = np.concatenate([inputs["ids"][None], ids_tr[:-1]])
    (_, exact), (_, single) = exact_and_single(checkpoint.params, read_tr, inputs["state"])
    assert_close("state_out", state, exact, single)


def test_options_that_are_left_out_have_their_defaults(checkpoint):
    model = onnx_bytes(checkpoint, logits=False)
    given = texts_by_onnx(checkpoint, model, PROMPTS, 100, seed=1, temperature=1, top_k=0, top_p=1, min_p=0)
    assert given == texts_by_onnx(checkpoint, model, PROMPTS, 100, seed=1)


@pytest.mark.parametrize("temperature", [1e-50, 1e-45, 1e-40, 1e-6, 1e30, 3e38, 1e39])
def test_huge_and_tiny_temperatures_draw_the_characters_of_generate(checkpoint, temperature):
    model = onnx_bytes(checkpoint, logits=False)
    texts = texts_by_onnx(checkpoint, model, PROMPTS, 100, seed=1, temperature=temperature)
    assert texts == generated(checkpoint, PROMPTS, 100, seed=1, temperature=temperature)
    assert len(set(texts[0])) < 12 if temperature < 1 else len(set(texts[0])) > 20


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {"top_k": 2}, {"top_k": 5}, {"top_p": 0.6},
                                     {"top_k": 4, "top_p": 0.7}, {"min_p": 0.9}, {"top_k": 3, "temperature": 3e38}])
def test_equal_logits_rank_by_id(options):
    """Every logit is one unit of the state times 4, so rounding cannot tell characters of the same unit apart."""
    checkpoint = random_checkpoint(layers=1)
    W_out, unit = np.zeros_like(checkpoint.params["W_out"]), np.arange(checkpoint.sizes.V) * 7 % 5
    W_out[np.arange(len(unit)), unit] = 4
    params = checkpoint.params | {"W_out": W_out, "b_out": np.zeros_like(checkpoint.params["b_out"])}
    tied = Checkpoint(checkpoint.sizes, checkpoint.vocabulary, params)
    texts = texts_by_onnx(tied, onnx_bytes(tied, logits=False), PROMPTS, 300, seed=4, **options)
    assert texts == generated(tied, PROMPTS, 300, seed=4, **options)
    assert len({*"".join(texts)}) > 1


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"min_p": 1}, {"top_k": 6, "top_p": 0.5}, {"top_k": 3}])
@pytest.mark.parametrize("logits", [[0.0] * 8, [-18.5] * 7 + [0.0]], ids=["equal", "seven below rounding"])
def test_numbers_on_the_border_of_two_characters_draw_as_in_the_specification(logits, options):
    """The logits are b_out, so equal ones have shares without rounding; the seven add up to nothing beside the last,
    and still are drawn by the smallest numbers."""
    random = random_checkpoint(1, "abcdefgh")
    b_out, W_out = np.array([9, *logits], np.float32), np.zeros_like(random.params["W_out"])
    checkpoint = Checkpoint(random.sizes, random.vocabulary, random.params | {"b_out": b_out, "W_out": W_out})
    uniforms = np.array([0, 1e-9, 3e-8, *np.arange(1, 8) / 8, 1 - 2**-24], np.float32)
    inputs = inputs_of(checkpoint, ["a"] * len(uniforms), 1, seed=1) | {"uniforms_tr": uniforms[None]}
    [ids], *_ = loaded(onnx_bytes(checkpoint, logits=False)).run(None, inputs | scalars(**options))
    np.testing.assert_array_equal(ids, reference.sample(np.tile(b_out, (len(uniforms), 1)), uniforms, **options))


def test_vocabulary_of_one_character_is_drawn():
    checkpoint = random_checkpoint(1, "a")
    assert texts_by_onnx(checkpoint, onnx_bytes(checkpoint, logits=False), ["", "aa"], 9, seed=1) == ["a" * 9] * 2


def test_ids_beyond_the_vocabulary_are_read_as_its_first_and_last(checkpoint):
    V, session = checkpoint.sizes.V, loaded(onnx_bytes(checkpoint, logits=False))
    inputs = inputs_of(checkpoint, ["R", "O", "M"], 9, seed=1)
    inputs["forced_tr"][:3] = [[0, V - 1, -1], [V - 1, -1, V - 1], [-1, V - 1, 0]]
    expected = session.run(None, inputs | {"ids": np.array([0, V - 1, 0], np.int32)})
    forced_tr = np.where(inputs["forced_tr"] == V - 1, [[V, 2**31 - 1, V + 7]], inputs["forced_tr"])
    forced_tr[forced_tr == -1] = -(2**31)
    beyond = {"ids": np.array([-1, V, -(2**31)], np.int32), "forced_tr": forced_tr.astype(np.int32)}
    for actual, wanted in zip(session.run(None, inputs | beyond), expected):
        np.testing.assert_array_equal(actual, wanted)
    assert expected[0][0, 1] == V - 1 and expected[0][:, 2].min() == 0


def test_unknown_characters_are_read_and_never_drawn():
    """`[UNK]` would be drawn always, if it were not left out."""
    checkpoint = random_checkpoint(layers=1)
    params = checkpoint.params | {"b_out": checkpoint.params["b_out"] + 100 * (np.arange(checkpoint.sizes.V) == 0)}
    certain = Checkpoint(checkpoint.sizes, checkpoint.vocabulary, {n: a.astype(np.float32) for n, a in params.items()})
    inputs = inputs_of(certain, ["#RO#", "TALE"], 50, seed=1)
    ids_tr, *_ = loaded(onnx_bytes(certain, logits=False)).run(None, inputs)
    assert ids_tr[2, 0] == 0 and ids_tr[3:].min() > 0


def test_onnxruntime_of_the_benchmark_writes_the_texts_of_the_specification():
    sizes = {"T": 40, "R": 3, "V": 12, "E": 5, "H": 8}
    inputs = bench_generate.inputs(**sizes)
    [candidate] = [one for one in bench_generate.candidates(Cpu(), **sizes) if one.name == "onnxruntime"]
    texts = candidate.make(inputs)
    np.testing.assert_array_equal(texts.results()["fp32_tr"], bench_generate.by_reference(inputs)["fp32_tr"])
    drawn_tr = texts.run()
    assert drawn_tr.shape == (40, 3) and len({*drawn_tr.flat}) > 5 and (drawn_tr[:, 0] != drawn_tr[:, 1]).any()


# The network alone


@pytest.mark.parametrize("layers", [1, 3])
def test_logits_and_states_are_those_of_the_specification(layers):
    sizes, flat, ids_tb, _, h0 = random_case(T=6, B=3, E=4, H=5, V=7, layers=layers)
    params = named_views(flat.astype(np.float32), sizes)
    model = onnx_bytes(Checkpoint(sizes, Vocabulary("abcdef"), params), logits=True)
    inputs = {"ids_tb": ids_tb.astype(np.int32), "state": h0.astype(np.float32)}
    actual, session = {}, loaded(model)
    actual["whole"] = session.run(["logits_tbv", "state_out"], inputs)
    first, state = session.run(None, inputs | {"ids_tb": inputs["ids_tb"][:2]})
    second, state = session.run(None, {"ids_tb": inputs["ids_tb"][2:], "state": state})
    actual["two pieces"] = np.concatenate([first, second]), state
    exact, single = exact_and_single(params, ids_tb, inputs["state"])
    for pieces, results in actual.items():
        for name, *compared in zip(("logits_tbv", "state_out"), results, exact, single):
            assert_close(f"{name} of {pieces}", *compared)


def test_ids_beyond_the_vocabulary_have_the_logits_of_its_first_and_last(checkpoint):
    sizes, session = checkpoint.sizes, loaded(onnx_bytes(checkpoint, logits=True))
    state = np.zeros((sizes.layers, 2, sizes.H), np.float32)
    inside = session.run(None, {"ids_tb": np.array([[0, 5], [sizes.V - 1, 6]], np.int32), "state": state})
    beyond = session.run(None, {"ids_tb": np.array([[-3, 5], [sizes.V, 6]], np.int32), "state": state})
    for actual, wanted in zip(beyond, inside):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("order", ["r z n", "n r z", "z n r", "r n z", "n z r"])
def test_comparisons_notice_gates_in_another_order(checkpoint, monkeypatch, order):
    monkeypatch.setattr(onnx_graph, "gates_z_first", lambda array: np.concatenate(
        [dict(zip("rzn", np.split(array, 3)))[gate] for gate in order.split()]))
    with pytest.raises(AssertionError):
        test_onnx_draws_the_characters_of_generate(checkpoint, {"temperature": 0.5})
    with pytest.raises(AssertionError):
        test_logits_and_states_are_those_of_the_specification(checkpoint.sizes.layers)


# The file


@pytest.mark.parametrize("logits", [False, True])
def test_file_tells_vocabulary_beginning_sizes_and_use(logits):
    vocabulary = Vocabulary('\x00\t "\\az\x85é\ud800🦊', beginning="🦊")
    sizes = Sizes(len(vocabulary), 2, 3, layers=2)
    params = named_views(initial_parameters(sizes, "keras", 1), sizes)
    session = loaded(onnx_bytes(Checkpoint(sizes, vocabulary, params), logits))
    told = session.get_modelmeta().custom_metadata_map
    assert told.keys() == {"vocabulary", "beginning", "sizes", "how_to"}
    assert json.loads(told["vocabulary"]) == vocabulary.characters
    assert json.loads(told["beginning"]) == vocabulary.beginning == "🦊"
    assert Sizes(**json.loads(told["sizes"])) == sizes and json.loads(told["sizes"]) == asdict(sizes)
    used = [*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs()]
    assert len(used) == (4 if logits else 11) and all(re.search(rf"\b{array.name}\b", told["how_to"]) for array in used)


def test_file_is_valid_and_has_its_matrices_where_no_step_packs_them(checkpoint):
    for logits in (True, False):
        model = onnx.load_from_string(onnx_bytes(checkpoint, logits))
        onnx.checker.check_model(model, full_check=True)
        assert (model.ir_version, model.opset_import[0].version) == (8, 17)
    [scan] = [node for node in model.graph.node if node.op_type == "Scan"]
    [body] = [attribute.g for attribute in scan.attribute if attribute.name == "body"]
    matrices = {name for node in body.node for name in node.input if name.startswith("W_")}
    assert matrices == {"W_emb", "W_out"} | {f"{W}_{layer}" for W in ("W_ih", "W_hh")
                                             for layer in range(checkpoint.sizes.layers)}
    assert not body.initializer and not {node.op_type for node in body.node} & {"Transpose", "Reshape", "Concat"}


def test_model_beyond_the_format_is_refused(checkpoint, monkeypatch):
    size = sum(array.nbytes for array in checkpoint.params.values())
    monkeypatch.setattr(onnx_graph, "LARGEST", size)
    onnx_bytes(checkpoint, logits=True)
    monkeypatch.setattr(onnx_graph, "LARGEST", size - 1)
    with pytest.raises(UserError, match="too large for .onnx"):
        onnx_bytes(checkpoint, logits=True)


# The command line


@pytest.fixture
def saved(tmp_path):
    """The file of a checkpoint, alone in its folder."""
    save_checkpoint(tmp_path / "model.safetensors", random_checkpoint(layers=2))
    return tmp_path / "model.safetensors"


def refused(capfd, *arguments: object) -> str:
    """Assert that `rnn.export` refuses its arguments; returns its line on stderr."""
    status = commands.export(list(map(str, arguments)))
    stdout, stderr = capfd.readouterr()
    assert_refused(status, stdout, stderr)
    return stderr


def test_command_writes_both_graphs(saved, capfd):
    checkpoint, out = random_checkpoint(layers=2), saved.with_name("model.onnx")
    assert commands.export([str(saved), str(out)]) == 0
    assert out.read_bytes() == onnx_bytes(checkpoint, logits=False)
    assert commands.export([str(saved), str(out), "--force", "--logits"]) == 0
    assert out.read_bytes() == onnx_bytes(checkpoint, logits=True)
    stdout, stderr = capfd.readouterr()
    assert stdout == "" and stderr.count(f"{out}: ") == 2


def test_existing_file_is_replaced_only_with_force(saved, capfd):
    out = saved.with_name("model.onnx")
    out.write_text("precious")
    assert f"{out} exists" in refused(capfd, saved, out)
    assert out.read_text() == "precious"


def test_model_and_checkpoints_of_runs_are_not_replaced(saved, capfd):
    """Not even with --force: a run could not be resumed from a checkpoint of its weights alone."""
    before = saved.read_bytes()
    assert "is the model itself" in refused(capfd, saved, saved, "--force")
    run_folder = saved.parent / "run"
    run_folder.mkdir()
    for name in ("config.json", "last.safetensors"):
        (run_folder / name).write_text(name)
    assert "folder of a run" in refused(capfd, saved, run_folder / "last.safetensors", "--force")
    assert "folder of a run" in refused(capfd, saved, run_folder / "other.safetensors")
    assert commands.export([str(saved), str(run_folder / "model.onnx")]) == 0
    assert saved.read_bytes() == before and (run_folder / "last.safetensors").read_text() == "last.safetensors"


def test_logits_are_for_onnx_only(saved, capfd):
    assert "--logits is for .onnx" in refused(capfd, saved, saved.with_name("copy.safetensors"), "--logits")
    assert [*saved.parent.iterdir()] == [saved]


def test_unknown_suffix_is_refused(saved, capfd):
    assert "model.onx has none of the suffixes .onnx, " in refused(capfd, saved, saved.with_name("model.onx"))
    assert [*saved.parent.iterdir()] == [saved]


def test_missing_package_is_named_with_the_extra(saved, capfd, monkeypatch):
    monkeypatch.delitem(sys.modules, "char_gru.rnn.export.onnx_graph")
    monkeypatch.setitem(sys.modules, "onnx", None)
    said = refused(capfd, saved, saved.with_name("model.onnx"))
    assert "package onnx:" in said and "pip install 'char-gru[export]'" in said
    assert [*saved.parent.iterdir()] == [saved]


def test_script_of_the_readme_writes_the_text_of_generate(saved, capfd):
    scripts = re.findall(r"(?s)```python\n(.*?)```", README.read_text(encoding="utf-8"))
    [script] = [script for script in scripts if "onnxruntime.InferenceSession" in script]
    assert commands.export([str(saved), str(saved.with_name("shakespeare.onnx"))]) == 0
    capfd.readouterr()
    assert commands.generate([str(saved), "--prompt", "ROMEO:", "--temperature", "0.8", "--seed", "1"]) == 0
    expected, _ = capfd.readouterr()
    result = run(script, cwd=saved.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected and len(expected) == len("ROMEO:") + 1000 + 1


def test_graph_of_a_model_of_bytes_says_so_and_draws_its_bytes():
    known, params = Vocabulary(CHARACTERS, of_bytes=True), random_checkpoint(1).params
    checkpoint = Checkpoint(random_checkpoint(1).sizes, known, params)
    model = onnx_bytes(checkpoint, logits=False)
    texts = texts_by_onnx(checkpoint, model, PROMPTS, 50, seed=3)
    assert texts == Generator(checkpoint.sizes, known, params).generate(PROMPTS, 50, seed=3, raw=True)
    for logits in (False, True):
        how_to = loaded(onnx_bytes(checkpoint, logits)).get_modelmeta().custom_metadata_map["how_to"]
        assert how_to.endswith("stands for the byte of its code point, U+0000 to U+00FF.")
        assert "byte" not in loaded(onnx_bytes(random_checkpoint(1), logits)).get_modelmeta(
            ).custom_metadata_map["how_to"]
