"""The state_dict of a PyTorch model comes in as a checkpoint, and what is no such model is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from char_gru.rnn import commands
from char_gru.rnn.checkpoint import Checkpoint, load_checkpoint
from char_gru.rnn.config import Sizes
from char_gru.rnn.export.pytorch_model import VOCABULARY_KEY
from char_gru.rnn.params import checkpoint_name, parameter_shapes
from tests.helpers.commands import assert_refused
from tests.helpers.compare import assert_close
from tests.helpers.texts import read_by_reference

B, E, H, V = 2, 4, 5, 7
CHARACTERS = ";\nad🦊é"  # not sorted: their order is that of the ids
IDS_TB = np.array([[1, 6], [0, 3], [5, 2]])


def state_dict(layers: int = 1, E: int = E, H: int = H) -> dict[str, np.ndarray]:
    """Random tensors under the names of README's model."""
    rng = np.random.default_rng(layers)
    return {checkpoint_name(name): rng.standard_normal(shape, np.float32)
            for name, shape in parameter_shapes(Sizes(V, E, H, layers)).items()}


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Writes tensors to a file, with the characters as its vocabulary unless told otherwise."""
    def written(tensors: dict[str, np.ndarray], vocabulary: str | None = CHARACTERS) -> Path:
        path = tmp_path / "model.safetensors"
        metadata = None if vocabulary is None else {VOCABULARY_KEY: vocabulary, "format": "pt"}
        path.write_bytes(safetensors_numpy.save(tensors, metadata))
        return path

    return written


def exported(source: Path, *arguments: object) -> Checkpoint:
    """The checkpoint that the command makes of a file."""
    out = source.with_name("out.safetensors")
    assert commands.export(list(map(str, (source, out, *arguments)))) == 0
    return load_checkpoint(out)


def refused(capfd, source: Path, *parts: str, arguments: tuple = ()) -> None:
    """Assert that the command refuses a file in one line that has the parts, and writes nothing."""
    out = source.with_name("out.safetensors")
    capfd.readouterr()
    status = commands.export(list(map(str, (source, out, *arguments))))
    assert_refused(status, *capfd.readouterr(), str(source), *parts)
    assert not out.exists()


def assert_holds(checkpoint: Checkpoint, tensors: dict[str, np.ndarray], prefix: str = "") -> None:
    """Assert that a checkpoint has the tensors, bit for bit."""
    assert {prefix + checkpoint_name(name) for name in checkpoint.params} == tensors.keys()
    for name, array in checkpoint.params.items():
        assert array.dtype == np.float32 and array.tobytes() == tensors[prefix + checkpoint_name(name)].tobytes()


@pytest.mark.parametrize("layers", [1, 3])
def test_model_of_pytorch_comes_in_with_its_bits_and_logits(tmp_path, layers):
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(V, E)
            self.gru = torch.nn.GRU(E, H, layers)
            self.output = torch.nn.Linear(H, V)

        def forward(self, ids_tb):
            return self.output(self.gru(self.embedding(ids_tb))[0])

    torch.manual_seed(layers)
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.8)
        logits_tb = model(torch.from_numpy(IDS_TB)).numpy()
    path = tmp_path / "model.safetensors"
    safetensors_torch.save_file(model.state_dict(), path, metadata={VOCABULARY_KEY: CHARACTERS})
    checkpoint = exported(path)
    assert checkpoint.sizes == Sizes(V, E, H, layers) and checkpoint.vocabulary.characters == CHARACTERS
    assert_holds(checkpoint, {name: tensor.numpy() for name, tensor in model.state_dict().items()})
    exact, single = (read_by_reference(checkpoint.params, np.zeros((layers, B, H)), IDS_TB[0],
                                       np.append(IDS_TB[1:], IDS_TB[:1], axis=0), dtype)[0]
                     for dtype in (np.float64, np.float32))
    assert_close("logits", logits_tb, exact, single)


def test_vocabulary_of_a_text_serves_a_file_that_has_none(write, tmp_path):
    (tmp_path / "text.txt").write_text(CHARACTERS * 2, encoding="utf-8", newline="")
    checkpoint = exported(write(state_dict(), vocabulary=None), "--vocabulary-of", tmp_path / "text.txt")
    assert checkpoint.vocabulary.characters == "".join(sorted(CHARACTERS))


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "a.b.", "("])
def test_common_prefix_of_names_is_left_out(write, prefix):
    tensors = {prefix + name: tensor for name, tensor in state_dict(layers=2).items()}
    assert_holds(exported(write(tensors)), tensors, prefix)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floating_point_types_become_float32(write, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in state_dict().items()}
    assert_holds(exported(write(tensors)), {name: tensor.astype(np.float32) for name, tensor in tensors.items()})


def test_bfloat16_becomes_float32(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    tensors = {name: torch.from_numpy(tensor).bfloat16() for name, tensor in state_dict().items()}
    path = tmp_path / "model.safetensors"
    safetensors_torch.save_file(tensors, path, metadata={VOCABULARY_KEY: CHARACTERS})
    assert_holds(exported(path), {name: tensor.float().numpy() for name, tensor in tensors.items()})


def changed(**changes) -> dict[str, np.ndarray]:
    """Tensors of a model, some replaced, added or (None) left out; __ stands for a point."""
    tensors = state_dict() | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def with_suffix(suffix: str) -> dict[str, np.ndarray]:
    """A GRU's tensors once more, with a suffix to their names."""
    return {name + suffix: tensor for name, tensor in state_dict().items() if name.startswith("gru.")}


def infinite() -> np.ndarray:
    values = np.ones((V, H))
    values[2, 3] = 1e39
    return values


OTHER_TENSORS = {
    "nothing": ({}, "has no embedding.weight"),
    "another model": ({"lstm.weight_ih_l0": np.ones((4 * H, E), np.float32)}, "has no embedding.weight"),
    "no GRU": (changed(gru__weight_hh_l0=None), "has no gru.weight_hh_l0"),
    "no bias": (changed(gru__bias_ih_l0=None, gru__bias_hh_l0=None), "has no gru.bias_hh_l0", "with biases"),
    "output without bias": (changed(output__bias=None), "has no output.bias", "with bias"),
    "both directions": (state_dict() | with_suffix("_reverse"), "has a tensor gru.bias_hh_l0_reverse", "one direction"),
    "layer missing": ({name: tensor for name, tensor in state_dict(layers=3).items() if "_l1" not in name},
                      "has no gru.bias_hh_l1"),
    "unknown name": (changed(norm__weight=np.ones(H, np.float32)), "has a tensor norm.weight"),
    "name of two lines": (state_dict() | {"a\nb": np.ones(2, np.float32)}, r"has a tensor a\nb"),
    "two prefixes": ({("a." if name[0] == "e" else "b.") + name: tensor for name, tensor in state_dict().items()},
                     "has no a.gru.weight_hh_l0"),
    "transposed": (changed(output__weight=np.ones((H, V), np.float32)), "output.weight has shape (5, 7)", "(7, 5)"),
    "LSTM's gates": (changed(gru__weight_ih_l0=np.ones((4 * H, E), np.float32)),
                     "gru.weight_ih_l0 has shape (20, 4)", "(15, 4)"),
    "vector": (changed(embedding__weight=np.ones(V, np.float32)), "embedding.weight has shape (7,)", "a matrix"),
    "no units": (changed(gru__weight_hh_l0=np.ones((0, 0), np.float32)), "gru.weight_hh_l0 has shape (0, 0)"),
    "integers": (changed(embedding__weight=np.ones((V, E), np.int32)), "embedding.weight holds I32"),
    "not a number": (changed(gru__bias_hh_l0=np.full(3 * H, np.nan, np.float32)), "gru.bias_hh_l0", "not finite"),
    "too large": (changed(output__weight=infinite()), "output.weight", "not finite in float32"),
}


@pytest.mark.parametrize("name", OTHER_TENSORS)
def test_other_tensors_are_refused(write, capfd, name):
    tensors, *parts = OTHER_TENSORS[name]
    refused(capfd, write(tensors), *parts)


def test_texts_of_every_vocabulary_of_count(write, tmp_path):
    for name, text in (("a.txt", CHARACTERS[:3]), ("b.txt", CHARACTERS[3:])):
        (tmp_path / name).write_text(text, "utf-8")
    texts = (tmp_path / "a.txt", tmp_path / "b.txt")
    checkpoint = exported(write(state_dict(), None), "--vocabulary-of", texts[0], f"--vocabulary-of={texts[1]}")
    assert checkpoint.vocabulary.characters == "".join(sorted(CHARACTERS))


def test_vocabulary_of_without_a_text_is_refused(write, capfd):
    path = write(state_dict(), None)
    status = commands.export([str(path), str(path.with_name("out.safetensors")), "--vocabulary-of"])
    assert_refused(status, *capfd.readouterr(), "--vocabulary-of has no value")


def test_file_of_no_format_that_is_read_is_refused(write, capfd):
    path = write(state_dict()).rename(write(state_dict()).with_name("model.pt"))
    refused(capfd, path, "none of the suffixes .safetensors, .keras, .weights.h5")


@pytest.mark.parametrize("vocabulary, parts", [
    (None, ("has no vocabulary; give --vocabulary-of TEXT",)),
    ("abc", ("embeddings for 7 characters, [UNK] included", "its vocabulary has 4")),
    ("abcdee", ("the metadata vocabulary cannot be used", "distinct")),
    ("", ("the metadata vocabulary cannot be used", "at least one")),
])
def test_vocabulary_that_does_not_fit_is_refused(write, capfd, vocabulary, parts):
    refused(capfd, write(state_dict(), vocabulary), *parts)


def test_text_whose_characters_do_not_fit_is_refused(write, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("abc")
    refused(capfd, write(state_dict(), None), "--vocabulary-of has 4", arguments=("--vocabulary-of", text))
    refused(capfd, write(state_dict()), "has its own vocabulary", arguments=("--vocabulary-of", text))


def test_file_cut_short_is_refused_at_every_length(write, tmp_path, capfd):
    raw = write(state_dict()).read_bytes()
    path = tmp_path / "short.safetensors"
    for length in [*range(0, 700, 7), *range(700, len(raw), 101)]:
        path.write_bytes(raw[:length])
        refused(capfd, path, "damaged or cut short")


def test_file_that_cannot_be_opened_is_refused(tmp_path, capfd):
    refused(capfd, tmp_path / "missing.safetensors", "No such file")
