"""Checkpoints come back as they were saved, and nothing else passes for one."""

import io
import json
import os
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy

from char_gru.rnn import checkpoint as module
from char_gru.rnn.checkpoint import (
    METADATA_KEY,
    Checkpoint,
    Resumable,
    find_checkpoint,
    load_checkpoint,
    newest_run,
    read_checkpoint,
    save_checkpoint,
)
from char_gru.rnn.config import Sizes, UserError
from char_gru.rnn.params import checkpoint_name, parameter_shapes
from char_gru.rnn.vocabulary import Vocabulary
from tests.helpers.commands import ROOT, running, wait_until

CHARACTERS = "\n\"\\é\u2028🦊"
SIZES = Sizes(V=len(CHARACTERS) + 1, E=2, H=3)
PROGRESS = {"step": 7, "loss_sum": 0.1 + 0.2, "best_loss": None, "config": {"data": ["é.txt"], "learning_rate": 1e-7}}


def example(sizes: Sizes = SIZES, resumable: bool = True, seed: int = 0) -> Checkpoint:
    """A checkpoint of random values."""
    rng = np.random.default_rng(seed)

    def arrays() -> dict[str, np.ndarray]:
        return {name: rng.standard_normal(shape, np.float32) for name, shape in parameter_shapes(sizes).items()}

    state = rng.standard_normal((sizes.layers, 2, sizes.H), np.float32)
    return Checkpoint(sizes, Vocabulary(CHARACTERS, beginning="é"), arrays(),
                      Resumable(arrays(), arrays(), state, PROGRESS) if resumable else None)


def assert_equal(actual: Checkpoint, expected: Checkpoint) -> None:
    """Assert that two checkpoints are the same, bit for bit."""
    assert actual.sizes == expected.sizes
    assert actual.vocabulary == expected.vocabulary
    assert actual.vocabulary.beginning == expected.vocabulary.beginning
    assert (actual.resumable is None) == (expected.resumable is None)
    groups = [(actual.params, expected.params)]
    if expected.resumable:
        assert actual.resumable.progress == expected.resumable.progress
        groups += [(actual.resumable.m, expected.resumable.m), (actual.resumable.v, expected.resumable.v),
                   ({"state": actual.resumable.state}, {"state": expected.resumable.state})]
    for group, wanted in groups:
        assert group.keys() == wanted.keys()
        for name, array in wanted.items():
            assert group[name].dtype == array.dtype and group[name].shape == array.shape
            assert group[name].tobytes() == array.tobytes(), name


class File:
    """A file whose content lies in memory, since thousands of them are read here."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = content

    def __str__(self) -> str:
        return "runs/text/last.safetensors"


def load(path: Path | File) -> Checkpoint:
    return read_checkpoint(io.BytesIO(path.content), path) if isinstance(path, File) else load_checkpoint(path)


def assert_refused(path: Path | File, *parts: str) -> None:
    """Assert that loading gives one line that names the file."""
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(path) in message
    assert all(part in message for part in parts), message


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    """The bytes of a file that can be resumed."""
    path = tmp_path_factory.mktemp("saved") / "last.safetensors"
    save_checkpoint(path, example())
    return path.read_bytes()


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("resumable", [True, False])
def test_checkpoint_comes_back_bit_for_bit(tmp_path, layers, resumable):
    before = example(replace(SIZES, layers=layers), resumable)
    save_checkpoint(tmp_path / "a.safetensors", before)
    assert_equal(load_checkpoint(tmp_path / "a.safetensors"), before)


def form(raw: bytes) -> int:
    header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    return json.loads(header["__metadata__"][METADATA_KEY])["format"]


@pytest.mark.parametrize("resumable", [True, False])
def test_model_of_bytes_comes_back_and_is_refused_by_versions_that_read_format_1(tmp_path, monkeypatch, resumable):
    text = example(resumable=resumable)
    before = replace(text, vocabulary=Vocabulary("\n\"\\\0\x80\xff", beginning="\xff", of_bytes=True))
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, before)
    assert_equal(load_checkpoint(path), before)
    assert load_checkpoint(path).vocabulary.of_bytes
    assert (form(path.read_bytes()), form(module.checkpoint_bytes(text))) == (2, 1)
    monkeypatch.setattr(module, "FORMAT_OF_BYTES", 1)
    assert_refused(path, "format 2")


def test_model_of_bytes_with_a_character_that_stands_for_none_is_refused(saved):
    assert_refused(forged(saved, lambda description, tensors: description.update(format=2)), "do not fit")


def test_arrays_that_are_not_contiguous_come_back_bit_for_bit(tmp_path):
    before = example()
    strided = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in before.params.items()}
    save_checkpoint(tmp_path / "a.safetensors", replace(before, params=strided))
    assert_equal(load_checkpoint(tmp_path / "a.safetensors"), before)


def test_equal_checkpoints_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, example())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_file_without_progress_holds_pytorchs_names_in_float32_and_nothing_else(tmp_path):
    before = example(replace(SIZES, layers=2), resumable=False)
    save_checkpoint(tmp_path / "best.safetensors", before)
    tensors = safetensors_numpy.load_file(tmp_path / "best.safetensors")
    gru = [f"gru.{name}_l{layer}" for layer in (0, 1) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    assert sorted(tensors) == sorted(["embedding.weight", *gru, "output.weight", "output.bias"])
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}
    for name, array in before.params.items():
        assert (tensors[checkpoint_name(name)] == array).all()


def assert_refused_or_same(raw: bytes) -> None:
    """Assert that the bytes are refused, or load as the saved checkpoint: JSON has several spellings of one text (a tab
    for a space, E for e, a last digit of a float that rounds to the same)."""
    try:
        loaded = load(File(raw))
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert_equal(loaded, example())


def test_truncated_file_is_refused_at_every_length(saved):
    for length in range(len(saved)):
        assert_refused(File(saved[:length]), "no checkpoint of char-gru, or is damaged or cut short")


def test_longer_file_is_refused(saved):
    assert_refused(File(saved + b"\0"))


@pytest.mark.parametrize("bit", [0, 5, 7])
def test_flipped_bit_is_noticed_at_every_byte(saved, bit):
    header_end, damaged = 8 + int.from_bytes(saved[:8], "little"), bytearray(saved)
    for offset in range(len(saved)):
        damaged[offset] ^= 1 << bit
        if offset < header_end:
            assert_refused_or_same(damaged)
        else:
            assert_refused(File(damaged), "altered")
        damaged[offset] ^= 1 << bit


@given(data=st.data())
def test_changed_bytes_are_noticed(saved, data):
    damaged = bytearray(saved)
    for offset in data.draw(st.lists(st.integers(0, len(saved) - 1), min_size=1, max_size=3)):
        damaged[offset] = data.draw(st.integers(0, 255))
    assert_refused_or_same(damaged)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(raw):
    assert_refused(File(raw), "no checkpoint")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3))


def described(text: str) -> File:
    """A safetensors file with a tensor and a text under our metadata key."""
    return File(safetensors_numpy.save({"x": np.zeros(2, np.float32)}, {METADATA_KEY: text}))


@settings(max_examples=50)
@given(JSON)
def test_any_other_header_is_refused(header):
    raw = json.dumps(header).encode()
    assert_refused(File(len(raw).to_bytes(8, "little") + raw))


@settings(max_examples=50)
@given(JSON | st.fixed_dictionaries({"sha256": JSON, "format": st.just(1), "sizes": JSON, "vocabulary": JSON}))
def test_any_other_description_is_refused(description):
    assert_refused(described(json.dumps(description)))


def test_deeply_nested_description_is_refused_at_any_depth():
    for depth in [*range(700, 1010), 100_000]:
        text = '{"sha256": "", "format": 1, "sizes": ' + "[" * depth + "]" * depth + "}"
        assert_refused(described(text))


def test_header_that_is_longer_than_any_model_needs_is_refused_unread(saved, tmp_path):
    """By its first eight bytes; what follows them is sparse."""
    path = tmp_path / "long"
    for length, data in ((96 << 20, 0), (96 << 20, 96 << 20), (5 << 20, 0), (16 << 20, 1 << 19)):
        with open(path, "wb") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(8 + length + data)
        tracemalloc.start()
        assert_refused(path, "no checkpoint of char-gru")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    for length in (0, 1, len(saved) - 8, len(saved), 2**62, 2**64 - 1):
        assert_refused(File(length.to_bytes(8, "little") + saved[8:]), "no checkpoint of char-gru")


def test_header_of_very_many_parts_is_refused_before_it_is_parsed():
    raw = b"[" + b"{}," * (1 << 20) + b"0]"
    tracemalloc.start()
    assert_refused(File(len(raw).to_bytes(8, "little") + raw), "no checkpoint of char-gru")
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_model_of_very_many_characters_or_layers_loads(tmp_path):
    characters = "".join(map(chr, [*range(0x1000, 0xD800), *range(0xE000, 0x50000)]))
    for sizes, known in ((Sizes(len(characters) + 1, 1, 1), characters), (Sizes(2, 1, 1, 500), "a")):
        params = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(sizes).items()}
        save_checkpoint(tmp_path / "model", Checkpoint(sizes, Vocabulary(known), params))
        assert load_checkpoint(tmp_path / "model").sizes == sizes


def test_device_and_named_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), Path("/dev/null"), tmp_path / "pipe"):
        assert_refused(path, "is no file, but a device")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {METADATA_KEY: ""}, {METADATA_KEY: "no JSON"}])
def test_safetensors_file_of_another_program_is_refused(metadata):
    raw = safetensors_numpy.save({"embedding.weight": np.zeros((3, 2), np.float32)}, metadata)
    assert_refused(File(raw), "no checkpoint of char-gru")


def forged(saved: bytes, change) -> File:
    """A file whose description and tensors were changed together with its checksum."""
    tensors = safetensors_numpy.load(saved)
    header = json.loads(saved[8:8 + int.from_bytes(saved[:8], "little")])
    description = json.loads(header["__metadata__"][METADATA_KEY])
    del description["sha256"]
    change(description, tensors)
    description["sha256"] = module._digest(description, tensors)
    return File(safetensors_numpy.save(tensors, {METADATA_KEY: json.dumps(description)}))


def test_forged_file_with_no_change_loads(saved):
    assert_equal(load(forged(saved, lambda description, tensors: None)), example())


@pytest.mark.parametrize("value", [0, -1, 1, 4, 2**31, 2**64, 10**30, -10**30, 2.0, 1e300, True, "3", None, [3], {}])
@pytest.mark.parametrize("name", ["V", "E", "H", "layers"])
def test_wrong_size_is_refused(saved, name, value):
    if value is not True and value == vars(SIZES)[name]:
        value += 1
    assert_refused(forged(saved, lambda description, tensors: description["sizes"].update({name: value})), "do not fit")


def test_checkpoint_from_before_the_beginning_was_kept_begins_lines(saved):
    old = load(forged(saved, lambda description, tensors: description.pop("beginning")))
    assert old.vocabulary == Vocabulary(CHARACTERS) and old.vocabulary.beginning == "\n"


@pytest.mark.parametrize("key", ["sizes", "vocabulary", "beginning", "progress"])
@pytest.mark.parametrize("value", [5, 1.5, True, "", "abc", "ba", [], ["ab"], [1], [["a", 1]]])
def test_wrong_part_of_the_description_is_refused(saved, key, value):
    assert_refused(forged(saved, lambda description, tensors: description.update({key: value})), "do not fit")


@pytest.mark.parametrize("key", ["format", "sizes", "vocabulary", "progress"])
def test_missing_part_of_the_description_is_refused(saved, key):
    assert_refused(forged(saved, lambda description, tensors: description.pop(key)))


def swap(name: str, make):
    """A change that replaces one tensor."""
    return lambda description, tensors: tensors.update({name: make(tensors[name])})


@pytest.mark.parametrize("change", [
    swap("output.bias", lambda array: array.astype(np.float64)),
    swap("output.bias", lambda array: array.view(np.int32)),
    swap("output.bias", lambda array: array[None]),
    swap("embedding.weight", lambda array: np.ascontiguousarray(array.T)),
    swap("adam.m.output.bias", lambda array: array[1:]),
    swap("adam.v.output.weight", lambda array: array.astype(np.float16)),
    swap("state", lambda array: array[0]),
    swap("state", lambda array: np.array(1, np.float32)),
    swap("state", lambda array: array.astype(np.float64)),
    lambda description, tensors: tensors.pop("gru.bias_hh_l0"),
    lambda description, tensors: tensors.pop("adam.v.gru.bias_hh_l0"),
    lambda description, tensors: tensors.pop("state"),
    lambda description, tensors: tensors.update(stranger=np.zeros(1, np.float32)),
    lambda description, tensors: description.update(progress=None),
    lambda description, tensors: description.update(vocabulary=list(CHARACTERS)),
    swap("state", lambda array: array[:, :0]),
])
def test_tensors_that_do_not_fit_are_refused(saved, change):
    assert_refused(forged(saved, change), "do not fit")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["output.bias", "adam.v.embedding.weight", "state"])
def test_numbers_that_are_not_finite_are_refused(saved, name, value):
    assert_refused(forged(saved, swap(name, lambda array: np.where(array == array.max(), np.float32(value), array))),
                   "not finite")


def test_progress_that_is_not_finite_is_refused(saved):
    for value in (np.nan, np.inf):
        assert_refused(forged(saved, lambda description, tensors, value=value: description["progress"].update(
            loss_sum=value)), "no checkpoint of char-gru")


@pytest.mark.parametrize("number", [0, 3, "1", None, [], 10**40])
def test_file_of_another_format_is_refused_with_its_number(saved, number):
    file = forged(saved, lambda description, tensors: description.update(format=number))
    assert_refused(file, f"format {repr(number)[:20]}", "reads 1 and 2")


def test_missing_file_and_folder_are_refused(tmp_path):
    assert_refused(tmp_path / "missing.safetensors", "cannot read", "No such file")
    assert_refused(tmp_path, "Is a directory")


SAVE_FOREVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from char_gru.rnn.checkpoint import load_checkpoint, save_checkpoint
checkpoints = [load_checkpoint(Path(name)) for name in "ab"]
while True:
    for checkpoint in checkpoints:
        save_checkpoint(Path("last.safetensors"), checkpoint)
        print("saved", flush=True)
"""


@pytest.mark.slow
def test_file_is_whole_whenever_the_writer_is_killed(tmp_path):
    rng = random.Random(0)
    for name, seed in (("a", 0), ("b", 1)):
        save_checkpoint(tmp_path / name, example(replace(SIZES, E=200, H=200), seed=seed))
    whole = [(tmp_path / name).read_bytes() for name in "ab"]
    for _ in range(5):
        with running(SAVE_FOREVER, ROOT, cwd=tmp_path) as writer:
            for _ in range(rng.randrange(1, 12)):
                assert writer.stdout.readline() == b"saved\n"
            wait_until(lambda: any(tmp_path.glob("last.safetensors.*.tmp")), writer)
        load_checkpoint(tmp_path / "last.safetensors")
        assert (tmp_path / "last.safetensors").read_bytes() in whole


def test_best_checkpoint_of_the_newest_run_is_found(tmp_path):
    for number, name in enumerate(["newer", "older"]):
        folder = tmp_path / name
        folder.mkdir()
        save_checkpoint(folder / "last.safetensors", example())
        os.utime(folder / "last.safetensors", ns=(0, 10**18 - number))
    assert newest_run(tmp_path).name == "newer"
    assert find_checkpoint(None, tmp_path) == tmp_path / "newer" / "last.safetensors"
    save_checkpoint(tmp_path / "newer" / "best.safetensors", example(resumable=False))
    assert find_checkpoint(None, tmp_path) == tmp_path / "newer" / "best.safetensors"
    assert find_checkpoint(tmp_path / "older") == tmp_path / "older" / "last.safetensors"
    assert find_checkpoint(tmp_path / "older" / "last.safetensors") == tmp_path / "older" / "last.safetensors"


def test_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no run under"):
        find_checkpoint(None, tmp_path)
