"""What a model's units do while it reads a text: states and gates are the specification's, the file is whole or not
there, and the table's correlations are NumPy's."""

import contextlib
import hashlib
import json
import math
import resource
import shutil
import sys
import tracemalloc
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy
from safetensors import safe_open

from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.rnn import activations as module
from char_gru.rnn import commands, cpu, reference, reference_ops
from char_gru.rnn.activations import PROPERTIES, Correlations, activations, properties
from char_gru.rnn.checkpoint import Checkpoint, save_checkpoint
from char_gru.rnn.config import Sizes
from char_gru.rnn.params import initial_parameters, named_views
from char_gru.rnn.sampler import Generator
from char_gru.rnn.vocabulary import Vocabulary
from tests import host_cuda
from tests.helpers.commands import assert_refused
from tests.helpers.compare import assert_close

CHARACTERS = '\n\t "()ABab“”🦊'
TEXT = '(aB) "Ab\tba"\n\n“b(A” a🦊A\n"a b\nAA) bb" ab\tab\nB (b)\nbaBa' * 2


def model(layers: int = 1, H: int = 6) -> Checkpoint:
    """A model whose gates and probabilities are far from equal."""
    sizes = Sizes(len(CHARACTERS) + 1, 4, H, layers)
    params = named_views(3 * initial_parameters(sizes, "pytorch", 5), sizes)
    return Checkpoint(sizes, Vocabulary(CHARACTERS, beginning="\t"),
                      {name: array.copy() for name, array in params.items()})


def ids_of(text: str) -> np.ndarray:
    return Vocabulary(CHARACTERS).encode(text)


def specified(checkpoint: Checkpoint, ids: np.ndarray, dtype) -> dict[str, np.ndarray]:
    """The arrays of a text by the specification, which reads it in one piece; of the surprisals, all but the first."""
    params, H, arrays = {name: array.astype(dtype) for name, array in checkpoint.params.items()}, checkpoint.sizes.H, {}
    x, ids_tb, h0 = params["W_emb"], ids[:, None].astype(int), np.zeros((1, H), dtype)
    for layer in range(checkpoint.sizes.layers):
        P = reference.input_table_forward(x, params[f"W_ih.{layer}"], params[f"b_ih.{layer}"])
        saved = reference.gru_forward(P, ids_tb, params[f"W_hh.{layer}"], params[f"b_hh.{layer}"], h0)
        x, ids_tb, gates = saved.h_tb[1:, 0], np.arange(len(ids))[:, None], saved.gates_tb[:, 0]
        of_layer = {"h": x, "r": gates[:, :H], "z": gates[:, H:2 * H], "n": gates[:, 2 * H:]}
        arrays |= {f"{name}.{layer}": array for name, array in of_layer.items()}
    logits = x @ params["W_out"].T + params["b_out"]
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return arrays | {"logits": logits, "surprisal": -log_p[np.arange(len(ids) - 1), ids[1:]] / dtype(math.log(2))}


def joined(pieces) -> dict[str, np.ndarray]:
    pieces = list(pieces)
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def assert_specified(arrays: dict[str, np.ndarray], checkpoint: Checkpoint, ids: np.ndarray) -> None:
    """Assert that the arrays of a text are those of the specification, up to rounding, and no others."""
    exact, rounded = (specified(checkpoint, ids, dtype) for dtype in (np.float64, np.float32))
    assert arrays.keys() == exact.keys() | {"ids"}
    assert arrays["ids"].dtype == np.int32 and np.isnan(arrays["surprisal"][0])
    np.testing.assert_array_equal(arrays["ids"], ids)
    for name in exact:
        assert_close(name, arrays[name][1 if name == "surprisal" else 0:], exact[name], rounded[name])


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a model of two layers and a text."""
    save_checkpoint(tmp_path / "model.safetensors", model(layers=2))
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    return tmp_path


@pytest.fixture
def look(folder, capfd):
    """Calls the command in this process with that model and a text; gives the lines of its table."""
    def lines(text: str, *arguments: object) -> list[str]:
        with contextlib.chdir(folder):
            assert commands.look(["model.safetensors", text, "--device", "cpu", *map(str, arguments)]) == 0
        stdout, stderr = capfd.readouterr()
        assert stderr == ""
        return stdout.splitlines()

    return lines


@pytest.fixture
def refused(folder, capfd):
    """Calls the command in this process, which must refuse, with one line that has these parts, and leave the folder as
    it was."""
    def assert_is_refused(arguments: str, *parts: str) -> None:
        before = contents(folder)
        with contextlib.chdir(folder):
            status = commands.look([*arguments.split(), "--device", "cpu"])
        assert_refused(status, *capfd.readouterr(), *parts)
        assert contents(folder) == before

    return assert_is_refused


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Arrays

@pytest.mark.parametrize("steps", [1, 7, len(TEXT) // 2, len(TEXT) - 1, len(TEXT), len(TEXT) + 3])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("ops", [cpu, reference_ops.op_set()], ids=["cpu", "specification"])
def test_arrays_are_those_of_the_text_read_in_one_piece(ops, layers, steps):
    checkpoint, ids = model(layers), ids_of(TEXT)
    assert_specified(joined(activations(checkpoint, ids, ops, steps)), checkpoint, ids)


def test_surprisals_are_the_log_probabilities_of_the_score_in_bits():
    checkpoint, ids = model(2), ids_of(TEXT)
    generator = Generator(checkpoint.sizes, checkpoint.vocabulary, checkpoint.params)
    [part] = generator.score_parts([ids], exact=True)
    surprisal = joined(activations(checkpoint, ids, cpu, 10))["surprisal"]
    np.testing.assert_allclose(surprisal[1:], part.characters.log_probabilities / -np.log(2), rtol=1e-5, atol=1e-6)


def exchange_r_and_z(saved, T: int) -> None:
    r, z = np.split(saved.gates_tb.copy(), 3, axis=2)[:2]
    saved.gates_tb[...] = np.concatenate([z, r, saved.gates_tb[:, :, 2 * r.shape[2]:]], axis=2)


def delay_states(saved, T: int) -> None:
    saved.h_tb[1:T + 1] = saved.h_tb[:T].copy()


def drop_state(saved, T: int) -> None:
    saved.h_tb[T] = 0


@pytest.mark.parametrize("fault, name", [(exchange_r_and_z, "r.0"), (delay_states, "h.0"), (drop_state, "h.0")])
def test_planted_fault_is_noticed(fault, name):
    def gru_forward(P, ids_tb, W_hh, b_hh, h0, saved):
        cpu.gru_forward(P, ids_tb, W_hh, b_hh, h0, saved)
        fault(saved, len(ids_tb))

    checkpoint, ids = model(), ids_of(TEXT)
    ops = types.SimpleNamespace(**vars(cpu) | {"gru_forward": gru_forward})
    with pytest.raises(AssertionError, match=rf"{name}\["):
        assert_specified(joined(activations(checkpoint, ids, ops, 9)), checkpoint, ids)


class Unlaunched(host_cuda.HostExecutor):
    """The arrays of every launch are checked, but no kernel runs."""

    def launch(self, source, kernel, *arguments):
        pass


@pytest.mark.parametrize("layers", [1, 2])
def test_arrays_are_such_as_the_kernels_take(layers):
    with runtime.use(Unlaunched()), np.errstate(all="ignore"):
        arrays = joined(activations(model(layers), ids_of(TEXT), kernels.op_set("fp32"), 9))
    assert {name: array.shape for name, array in arrays.items()} == {
        name: array.shape for name, array in joined(activations(model(layers), ids_of(TEXT), cpu, 9)).items()}


# The file

@pytest.mark.parametrize("steps", [8, 500])
def test_file_holds_the_arrays(look, folder, monkeypatch, steps):
    monkeypatch.setattr(module, "STEPS", steps)
    look("text.txt", "--save", "acts.safetensors", "--dtype", "float32")
    arrays = safetensors_numpy.load_file(folder / "acts.safetensors")
    assert_specified(arrays, model(2), ids_of(TEXT))
    look("text.txt", "--save", "half.safetensors")
    for name, half in safetensors_numpy.load_file(folder / "half.safetensors").items():
        assert half.dtype == {"ids": np.int32, "surprisal": np.float32}.get(name, np.float16)
        np.testing.assert_array_equal(half, arrays[name].astype(half.dtype))
    assert sorted(contents(folder)) == ["acts.safetensors", "half.safetensors", "model.safetensors", "text.txt"]


def test_metadata_tell_the_characters_of_ids_the_sizes_and_the_text(look, folder):
    look("text.txt", "--save", "acts.safetensors")
    with safe_open(folder / "acts.safetensors", "numpy") as file:
        assert file.metadata().keys() == {"char-gru"}
        described, ids = json.loads(file.metadata()["char-gru"]), file.get_tensor("ids")
    assert described == {"vocabulary": CHARACTERS, "beginning": "\t", "surprisal_in": "bits",
                         "sizes": {"V": 14, "E": 4, "H": 6, "layers": 2},
                         "text_sha256": hashlib.sha256(TEXT.encode()).hexdigest()}
    assert "".join(described["vocabulary"][id_ - 1] for id_ in ids) == TEXT


def test_numbers_begin_at_multiples_of_their_width(look, folder):
    look("text.txt", "--save", "acts.safetensors")
    raw = (folder / "acts.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + length])
    del header["__metadata__"]
    assert len(header) == 2 * 4 + 3
    for name, tensor in header.items():
        assert (8 + length + tensor["data_offsets"][0]) % {"F16": 2, "F32": 4, "I32": 4}[tensor["dtype"]] == 0, name
    assert len(raw) == 8 + length + max(tensor["data_offsets"][1] for tensor in header.values())


def test_file_is_replaced_if_forced(look, folder):
    (folder / "acts.safetensors").write_bytes(b"old")
    look("text.txt", "--save", "acts.safetensors", "--force")
    assert len(safetensors_numpy.load_file(folder / "acts.safetensors")["ids"]) == len(TEXT)


@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_run_leaves_nothing_behind(folder, monkeypatch, existing):
    calls, during, gru_forward = [], [], cpu.gru_forward

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            during.extend(contents(folder))
            raise KeyboardInterrupt
        gru_forward(*arguments)

    if existing:
        (folder / "acts.safetensors").write_bytes(b"old")
    before = contents(folder)
    monkeypatch.setattr(module, "STEPS", 10)
    monkeypatch.setattr(cpu, "gru_forward", interrupted)
    with contextlib.chdir(folder), pytest.raises(KeyboardInterrupt):
        commands.look(["model.safetensors", "text.txt", "--device", "cpu", "--force", "--save", "acts.safetensors"])
    assert len(during) == len(before) + 1 and contents(folder) == before


def test_full_disk_leaves_nothing_behind(refused, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        refused("model.safetensors text.txt --save acts.safetensors", "cannot read or write acts.safetensors: ")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_file_that_has_no_place_on_the_disk_is_refused(refused, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    refused("model.safetensors text.txt --save acts.safetensors", "acts.safetensors takes 1.", "1e-05 GB left")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(look, folder, monkeypatch):
    """A character of this text and its id take some bytes; the arrays would take a thousand for each."""
    peaks, lengths = [], (500, 8_500)
    monkeypatch.setattr(module, "STEPS", 100)
    save_checkpoint(folder / "model.safetensors", model(H=60))
    for length in lengths:
        (folder / "long.txt").write_text(("aB (b) " * length)[:length])
        tracemalloc.start()
        look("long.txt", "--save", "acts.safetensors", "--force")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 10 * (lengths[1] - lengths[0])


# The text

@pytest.mark.parametrize("on_unknown, read", [("skip", "ab\tB"), ("unk", "aXb\tYB")])
def test_unknown_characters_are_left_out_or_read_as_unknown(look, folder, on_unknown, read):
    (folder / "other.txt").write_text("aXb\tYB", "utf-8")
    table = look("other.txt", "--on-unknown", on_unknown, "--save", "acts.safetensors", "--dtype", "float32")
    assert_specified(safetensors_numpy.load_file(folder / "acts.safetensors"), model(2), ids_of(read))
    assert table[-1].startswith(f"{len(read)} characters, ")
    with safe_open(folder / "acts.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["char-gru"])["text_sha256"] == hashlib.sha256(read.encode()).hexdigest()


def test_text_of_stdin_with_other_line_ends_is_read_as_learnt(look, folder, monkeypatch):
    (folder / "dos.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    with open(folder / "dos.txt") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert look("-") == look("text.txt")


# The table

def test_table_tells_the_units_that_follow_each_property_best(look, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 11)
    heading, *rows, _ = look("text.txt", "--units", 3)
    assert heading.split() == ["property", "layer", "unit", "r"]
    arrays = joined(activations(model(2), ids_of(TEXT), cpu, 500))
    h = np.concatenate([arrays["h.0"], arrays["h.1"]], axis=1)
    expected = []
    for name, values in properties(TEXT).items():
        r = np.array([np.corrcoef(values, of_unit)[0, 1] for of_unit in h.T.astype(np.float64)])
        expected += [f"{name:15}{unit // 6:5}{unit % 6:7}{r[unit]:8.3f}" for unit in np.argsort(-abs(r))[:3]]
    assert rows == expected and len({row.split()[-3] for row in rows}) == 2


def test_table_ends_with_the_loss_of_the_text(look, folder):
    checkpoint = model(2)
    loss = Generator(checkpoint.sizes, checkpoint.vocabulary, checkpoint.params).score(TEXT, exact=True).loss
    assert look("text.txt")[-1] == (
        f"{len(TEXT)} characters, mean loss {loss:.4f} nats, {loss / math.log(2):.4f} bits per character")


def test_properties_that_do_not_vary_say_so(look, folder):
    (folder / "plain.txt").write_text("ab ba b a")
    table = look("plain.txt", "--units", 100)
    assert [line.split(" is ")[0].strip() for line in table if "is the same at every character" in line] == [
        "case", "quotes", "brackets"]
    assert sum(line.startswith("spaces") for line in table) == 2 * 6


@pytest.mark.parametrize("steps", [1, 7, 300])
def test_correlations_are_those_of_numpy(steps):
    rng = np.random.default_rng(3)
    x = rng.integers(0, 100, (300, 2)).astype(np.float32)
    y = rng.standard_normal((300, 4)).astype(np.float32) + 0.03 * x[:, :1]
    y[:, 1] = np.tanh(8.4 + 0.02 * x[:, 1])  # a unit close to 1 that hardly moves
    y[:, 2] *= np.linspace(0.01, 10, 300)
    y[200:, 2] += 1000
    correlations = Correlations()
    for start in range(0, 300, steps):
        correlations.add(x[start:start + steps], y[start:start + steps])
    expected = np.corrcoef(x.astype(np.float64), y.astype(np.float64), rowvar=False)[:2, 2:]
    assert 0 < np.ptp(y[:, 1]) < 1e-5 and expected[1, 1] > 0.5
    np.testing.assert_allclose(correlations.r(), expected, rtol=1e-9, atol=1e-12)


def test_columns_without_variation_have_no_correlation():
    x, y = np.full((50, 2), 0.1, np.float32), np.full((50, 3), 0.3, np.float32)
    x[20:, 1], y[7:, 2] = 1, 0
    correlations = Correlations()
    for start in range(0, 50, 9):
        correlations.add(x[start:start + 9], y[start:start + 9])
    r = correlations.r()
    assert np.isnan(r[0]).all() and (r[1, :2] == 0).all() and r[1, 2] < -0.3


# Properties

BY_HAND = [  # character; line position, case, quotes, brackets, spaces after reading it
    ("a", 1, 0, 0, 0, 0), ("B", 2, 1, 0, 0, 0), ('"', 3, 1, 1, 0, 0), ("1", 4, 1, 1, 0, 0), ("c", 5, 0, 1, 0, 0),
    ("(", 6, 0, 1, 1, 0), ("“", 7, 0, 1, 1, 0), ("”", 8, 0, 0, 1, 0), ("\t", 9, 0, 0, 1, 1), ("[", 10, 0, 0, 1, 0),
    ("\n", 0, 0, 0, 1, 1), ("É", 1, 1, 0, 1, 0), ("]", 2, 1, 0, 1, 0), ('"', 3, 1, 1, 1, 0), ("\n", 0, 1, 1, 1, 1),
    ("\n", 0, 1, 0, 0, 1), (")", 1, 1, 0, 0, 0), ("🦊", 2, 1, 0, 0, 0), ("{", 3, 1, 0, 1, 0), ("}", 4, 1, 0, 0, 0),
    ("ß", 5, 0, 0, 0, 0), ("\u3000", 6, 0, 0, 0, 1), ("“", 7, 0, 1, 0, 0), ("“", 8, 0, 1, 0, 0), ('"', 9, 0, 0, 0, 0),
    ("”", 10, 0, 0, 0, 0), ('"', 11, 0, 1, 0, 0), ('"', 12, 0, 0, 0, 0), ("ǅ", 13, 1, 0, 0, 0), ("中", 14, 1, 0, 0, 0),
    ("{", 15, 1, 0, 1, 0), ("(", 16, 1, 0, 1, 0), ("[", 17, 1, 0, 1, 0), ('"', 18, 1, 1, 1, 0), ("\n", 0, 1, 1, 1, 1),
    ("\n", 0, 1, 0, 0, 1), ("\n", 0, 1, 0, 0, 1), ('"', 1, 1, 1, 0, 0), ("\r", 2, 1, 1, 0, 1), ("x", 3, 0, 1, 0, 0),
]


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 1000])
def test_properties_are_those_found_by_hand(monkeypatch, steps):
    monkeypatch.setattr(module, "PART", steps)
    characters, *expected = zip(*BY_HAND)
    values = properties("".join(characters))
    assert tuple(values) == PROPERTIES == ("line position", "case", "quotes", "brackets", "spaces")
    for name, column in zip(PROPERTIES, expected):
        assert values[name].dtype == np.float32
        np.testing.assert_array_equal(values[name], column, name)


def test_line_position_grows_to_100(monkeypatch):
    monkeypatch.setattr(module, "PART", 70)
    values = properties("a" * 230 + "\nb")["line position"]
    np.testing.assert_array_equal(values, [*range(1, 101), *[100] * 130, 0, 1])


def one_by_one(text: str) -> list[list[int]]:
    """The properties of a text, a row for each character, by their definitions."""
    position = case = quotes = depth = 0
    rows, before = [], ""
    for c in text:
        position = 0 if c == "\n" else min(position + 1, 100)
        if c.lower() != c.upper():
            case = int(c != c.lower())
        quotes = {'"': 1 - quotes, "“": 1, "”": 0}.get(c, quotes)
        depth = max(0, depth + (c in "([{") - (c in ")]}"))
        if before + c == "\n\n":
            quotes = depth = 0
        rows.append([position, case, quotes, int(depth > 0), int(c.isspace())])
        before = c
    return rows


@given(st.lists(st.sampled_from(["\n\n", "\n", '"', "“", "”", "((", "[{", ")", "]", " aA", "é", "1"])),
       st.integers(1, 70))
def test_properties_of_any_text_in_any_pieces_follow_their_definitions(parts, steps):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART", steps)
        values = properties(text)
    np.testing.assert_array_equal(np.array(list(values.values())), np.reshape(one_by_one(text), (-1, 5)).T)


# What is refused

@pytest.mark.parametrize("arguments, parts", [
    ("model.safetensors missing.txt", ["missing.txt", "No such file"]),
    ("model.safetensors .", ["cannot read .", "Is a directory"]),
    ("model.safetensors strange.txt", ["strange.txt: ", "'X' 'Y'", "--on-unknown skip"]),
    ("model.safetensors short.txt", ["short.txt is too short"]),
    ("model.safetensors empty.txt", ["empty.txt is too short"]),
    ("model.safetensors strange.txt --on-unknown skip", ["strange.txt is too short"]),
    ("model.safetensors text.txt --units 0", ["--units is 0", "at least 1"]),
    ("model.safetensors text.txt --save acts.npz", ["acts.npz", ".safetensors"]),
    ("model.safetensors text.txt --save missing/acts.safetensors", ["missing", "No such file"]),
    ("model.safetensors text.txt --save text.txt/acts.safetensors", ["text.txt", "Not a directory"]),
    ("text.txt text.txt", ["no checkpoint"]),
])
def test_input_that_cannot_be_used_is_refused(refused, folder, arguments, parts):
    for name, text in (("strange", "YXaX"), ("short", "a"), ("empty", "")):
        (folder / f"{name}.txt").write_text(text)
    refused(arguments, *parts)


def test_model_of_bytes_is_refused(refused, folder):
    text = model(layers=2)
    of_bytes = Vocabulary("".join(map(chr, range(text.sizes.V - 1))), of_bytes=True)
    save_checkpoint(folder / "bytes.safetensors", replace(text, vocabulary=of_bytes))
    refused("bytes.safetensors text.txt", "bytes.safetensors is a model of bytes", "name a model of characters")


def test_file_that_exists_is_refused_before_the_text_is_read(refused, folder, monkeypatch):
    (folder / "acts.safetensors").write_bytes(b"old")
    monkeypatch.setattr(module, "read_text", lambda name: pytest.fail("the text was read"))
    refused("model.safetensors text.txt --save acts.safetensors", "acts.safetensors exists", "--force")


def test_model_is_not_replaced_by_what_it_does(refused):
    refused("model.safetensors text.txt --save model.safetensors --force", "model.safetensors is the model itself")


def test_folder_is_not_replaced(folder, capfd):
    (folder / "acts.safetensors").mkdir()
    with contextlib.chdir(folder):
        status = commands.look(["model.safetensors", "text.txt", "--force", "--save", "acts.safetensors"])
    assert_refused(status, *capfd.readouterr(), "cannot write acts.safetensors", "a folder")
    assert (folder / "acts.safetensors").is_dir() and len(list(folder.iterdir())) == 3
