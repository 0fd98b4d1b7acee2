"""Models go to Keras and come from it: both compute the same logits, and what is no such model is refused."""

import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from char_gru.rnn import commands
from char_gru.rnn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from char_gru.rnn.export import keras_model
from char_gru.rnn.params import named_views
from char_gru.rnn.vocabulary import Vocabulary
from tests.helpers.cases import random_case
from tests.helpers.commands import ROOT, assert_refused, run
from tests.helpers.compare import assert_close
from tests.helpers.texts import read_by_reference

T, B, E, H, V = 3, 2, 4, 5, 7
CHARACTERS = "\n;adé🦊"
IDS_TB = np.array([[1, 6], [0, 3], [5, 2]], np.int32)
SUFFIXES = (".keras", ".weights.h5")

pytestmark = [
    # Of Keras's own variables, as Keras saves them.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    # Of Keras 3.8, which builds the model with a mask all the same.
    pytest.mark.filterwarnings("ignore:The NumPy backend does not support masking:UserWarning"),
]


@pytest.fixture(scope="module")
def keras():
    """Keras on the backend that the environment names (default: NumPy's, which compiles nothing)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "numpy"))
        import keras
    return keras


@pytest.fixture
def text(tmp_path) -> Path:
    """A text of the characters."""
    path = tmp_path / "text.txt"
    path.write_text(CHARACTERS * 2, encoding="utf-8", newline="")
    return path


def of_char_gru(layers: int = 1) -> Checkpoint:
    """A model of random values."""
    case = random_case(T, B, E, H, V, layers, scale=0.8)
    params = named_views(case.flat_params.astype(np.float32), case.sizes)
    return Checkpoint(case.sizes, Vocabulary(CHARACTERS, beginning=";"), params)


def logits(checkpoint: Checkpoint, dtype) -> np.ndarray:
    """The logits (T, B, V) of IDS_TB by the specification."""
    h0 = np.zeros((checkpoint.sizes.layers, B, checkpoint.sizes.H))
    return read_by_reference(checkpoint.params, h0, IDS_TB[0], np.append(IDS_TB[1:], IDS_TB[:1], axis=0), dtype)[0]


def assert_same_logits(model, checkpoint: Checkpoint) -> None:
    """Assert that a model of Keras computes the logits of a checkpoint's model."""
    predicted = np.swapaxes(np.asarray(model(IDS_TB.T)), 0, 1)
    assert_close("logits", predicted, logits(checkpoint, np.float64), logits(checkpoint, np.float32))
    assert np.ptp(predicted) > 1


def exported(source: Path, out: Path, *arguments: object) -> Path:
    """The file that the command writes."""
    assert commands.export(list(map(str, (source, out, *arguments)))) == 0
    return out


def refused(capfd, source: Path, *parts: str, arguments: tuple = ()) -> None:
    """Assert that the command refuses a file in one line that has the parts, and leaves alone the file that it was to
    replace."""
    path = source.with_name("out.safetensors")
    path.write_text("as it was")
    capfd.readouterr()
    status = commands.export(list(map(str, (source, path, "--force", *arguments))))
    assert_refused(status, *capfd.readouterr(), str(source), *parts)
    assert path.read_text() == "as it was"


# Models that a user of Keras builds.

def with_random_weights(model):
    """The model, its weights far from the small ones that Keras begins with."""
    rng = np.random.default_rng(len(model.weights))
    model.set_weights([0.8 * rng.standard_normal(weight.shape) for weight in model.weights])
    return model


def functional(keras, *grus, embedding=None, dense=None):
    """The layers, one after the other (default: the tutorial's), as a functional model."""
    grus = grus or [keras.layers.GRU(H, return_sequences=True)]
    x = inputs = keras.Input((None,), dtype="int32")
    for layer in (embedding or keras.layers.Embedding(V, E), *grus, dense or keras.layers.Dense(V)):
        x = layer(x)
    return with_random_weights(keras.Model(inputs, x))


def two_layers(keras):
    return functional(keras, *(keras.layers.GRU(H, return_sequences=True) for _ in range(2)))


def sequential(keras):
    """Two GRU layers under names of their own, and dropout."""
    layers = keras.layers
    return with_random_weights(keras.Sequential([
        keras.Input((None,), dtype="int32"), layers.Embedding(V, E, name="characters"), layers.Dropout(0.1),
        layers.GRU(H, return_sequences=True, dropout=0.2, name="upper"), layers.Dropout(0.1),
        layers.GRU(H, return_sequences=True, name="gru"), layers.Dense(V, name="to logits")]))


def tutorial(keras):
    """The class of the tutorial "Text generation with an RNN", with the state of its optimizer."""
    class MyModel(keras.Model):
        def __init__(self, vocab_size=V, embedding_dim=E, rnn_units=H):
            super().__init__()
            self.embedding = keras.layers.Embedding(vocab_size, embedding_dim)
            self.gru = keras.layers.GRU(rnn_units, return_sequences=True, return_state=True)
            self.dense = keras.layers.Dense(vocab_size)

        def call(self, inputs, states=None, return_state=False, training=False):
            x = self.embedding(inputs, training=training)
            x, states = self.gru(x, initial_state=states, training=training)
            x = self.dense(x, training=training)
            return (x, states) if return_state else x

    model = MyModel()
    model(IDS_TB.T)
    with_random_weights(model)
    model.compile(optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.optimizer.build(model.trainable_variables)
    return model


def subclassed_with_list(keras):
    """A list of two GRU layers; Keras stores the attribute `output_layer` under the layer's class."""
    class Stack(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = keras.layers.Embedding(V, E)
            self.grus = [keras.layers.GRU(H, return_sequences=True) for _ in range(2)]
            self.output_layer = keras.layers.Dense(V)

        def call(self, inputs):
            x = self.embedding(inputs)
            for gru in self.grus:
                x = gru(x)
            return self.output_layer(x)

    model = Stack()
    model(IDS_TB.T)
    return with_random_weights(model)


def save(model, path: Path) -> Path:
    if path.name.endswith(".keras"):
        model.save(path)
    else:
        model.save_weights(path)
    return path


@pytest.mark.parametrize("build", [functional, two_layers, sequential, tutorial, subclassed_with_list])
def test_model_of_keras_comes_in_with_its_logits(keras, tmp_path, text, build):
    model = build(keras)
    for suffix in SUFFIXES:
        path = save(model, tmp_path / f"model{suffix}")
        out = exported(path, tmp_path / f"{suffix}.safetensors", "--vocabulary-of", text)
        checkpoint = load_checkpoint(out)
        assert checkpoint.vocabulary.characters == CHARACTERS
        assert_same_logits(model, checkpoint)


@pytest.mark.parametrize("layers", [1, 2])
def test_exported_model_gives_its_logits_in_keras(keras, tmp_path, layers):
    checkpoint = of_char_gru(layers)
    save_checkpoint(tmp_path / "a.safetensors", checkpoint)
    model = keras.models.load_model(exported(tmp_path / "a.safetensors", tmp_path / "a.keras"))
    assert_same_logits(model, checkpoint)


@pytest.mark.parametrize("build", [two_layers, sequential])
def test_exported_weights_give_their_logits_in_a_model_built_in_keras(keras, tmp_path, build):
    checkpoint, model = of_char_gru(layers=2), build(keras)
    save_checkpoint(tmp_path / "a.safetensors", checkpoint)
    model.load_weights(exported(tmp_path / "a.safetensors", tmp_path / "a.weights.h5"))
    assert_same_logits(model, checkpoint)


def test_exchanged_gates_are_noticed(keras, tmp_path, text, monkeypatch):
    """The comparison of logits would fail if Keras's gates z, r, h were taken for r, z, n."""
    monkeypatch.setattr(keras_model, "gates_z_first", lambda array, axis: array)
    save_checkpoint(tmp_path / "a.safetensors", of_char_gru())
    written = keras.models.load_model(exported(tmp_path / "a.safetensors", tmp_path / "a.keras"))
    with pytest.raises(AssertionError, match="logits"):
        assert_same_logits(written, of_char_gru())
    model = functional(keras)
    path = save(model, tmp_path / "model.keras")
    read = load_checkpoint(exported(path, tmp_path / "b.safetensors", "--vocabulary-of", text))
    with pytest.raises(AssertionError, match="logits"):
        assert_same_logits(model, read)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("layers", [1, 12])
def test_model_comes_back_from_keras_bit_for_bit_with_its_vocabulary(keras, tmp_path, suffix, layers):
    before = of_char_gru(layers)
    save_checkpoint(tmp_path / "a.safetensors", before)
    exported(tmp_path / "a.safetensors", tmp_path / f"a{suffix}")
    after = load_checkpoint(exported(tmp_path / f"a{suffix}", tmp_path / "b.safetensors"))
    assert after.sizes == before.sizes and after.params.keys() == before.params.keys()
    assert all(after.params[name].tobytes() == array.tobytes() for name, array in before.params.items())
    assert after.vocabulary == before.vocabulary and after.vocabulary.beginning == ";"


@pytest.mark.slow
def test_models_that_keras_computes_with_jax_have_the_same_logits():
    chosen = ["[tutorial]", "gives_its_logits_in_keras[1]"]
    result = run("import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))", "-q", __file__, "-k",
                 " or ".join(chosen), "-p", "no:cacheprovider", cwd=ROOT, environ={"KERAS_BACKEND": "jax"})
    assert result.returncode == 0 and "2 passed" in result.stdout, result.stdout


def test_vocabulary_of_65000_characters_travels_along(keras, tmp_path):
    vocabulary = Vocabulary("".join(map(chr, range(0x10000, 0x20000))))
    case = random_case(V=len(vocabulary), E=1, H=2)
    save_checkpoint(tmp_path / "a.safetensors", Checkpoint(
        case.sizes, vocabulary, named_views(case.flat_params.astype(np.float32), case.sizes)))
    exported(tmp_path / "a.safetensors", tmp_path / "a.weights.h5")
    assert load_checkpoint(exported(tmp_path / "a.weights.h5", tmp_path / "b.safetensors")).vocabulary == vocabulary


# Reading.

@pytest.fixture(scope="module")
def files(keras, tmp_path_factory) -> dict[str, Path]:
    """Suffix -> the file of a model with two layers that Keras wrote; it has no vocabulary."""
    folder = tmp_path_factory.mktemp("files")
    return {suffix: save(two_layers(keras), folder / f"model{suffix}") for suffix in SUFFIXES}


@pytest.fixture
def copied(files, tmp_path) -> Callable[[str], Path]:
    """Copies a file of `files` into the test's folder."""
    return lambda suffix: Path(shutil.copy(files[suffix], tmp_path))


def rewrite(path: Path, changes: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Change members of a zip, add some, or with None remove some."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)


def replace_variable(path: Path, name: str, values) -> None:
    """Give a variable other values, perhaps of another dtype or shape."""
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = values


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reading_imports_no_keras(copied, text, suffix):
    program = ("import sys; from char_gru.rnn import commands; status = commands.export(sys.argv[1:]); "
               "assert not {'keras', 'jax', 'torch', 'tensorflow'} & {*sys.modules}; sys.exit(status)")
    path = copied(suffix)
    result = run(program, path, path.with_name("out.safetensors"), "--vocabulary-of", text, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4", "bfloat16"])
def test_other_floating_point_types_become_float32(copied, text, tmp_path, dtype):
    path, name = copied(".weights.h5"), "layers/embedding/vars/0"
    with h5py.File(path) as file:
        original = file[name][()]
    if dtype == "bfloat16":
        stored = (original.view(np.uint32) >> 16).astype(np.uint16).view("V2")
        wanted = (original.view(np.uint32) & 0xFFFF0000).view(np.float32)
    else:
        stored = original.astype(dtype)
        wanted = stored.astype(np.float32)
    replace_variable(path, name, stored)
    read = load_checkpoint(exported(path, tmp_path / "out.safetensors", "--vocabulary-of", text))
    np.testing.assert_array_equal(read.params["W_emb"], wanted)


def sparse(path: Path) -> None:
    """A variable that claims numbers of a terabyte, and stores none."""
    with h5py.File(path, "r+") as file:
        del file["layers/embedding/vars/0"]
        file.create_dataset("layers/embedding/vars/0", (10**6, 250_000), "f4", chunks=(1000, 1000))


def linked(path: Path) -> None:
    """A variable that lies in another file."""
    shutil.copy(path, path.with_name("other.h5"))
    with h5py.File(path, "r+") as file:
        del file["layers/dense"]
        file["layers/dense"] = h5py.ExternalLink("other.h5", "layers/dense")


def renamed(path: Path) -> None:
    """GRU layers whose names tell no order."""
    with h5py.File(path, "r+") as file:
        file.move("layers/gru_1", "layers/upper")


def without(name: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            del file[name]
    return remove


def with_values(name: str, values) -> Callable[[Path], None]:
    return lambda path: replace_variable(path, name, values)


WEIGHTS_FAULTS = {
    "no HDF5": (lambda path: path.write_text("GRU"), "has no HDF5 that Keras 3 wrote"),
    "empty": (lambda path: path.write_bytes(b""), "has no HDF5 that Keras 3 wrote"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:9000]), "damaged or cut short"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "holds no checkpoint"),
    "nothing": (lambda path: path.unlink(), "No such file"),
    "other HDF5": (lambda path: h5py.File(path, "w").close(), "0 Embedding, 0 GRU and 0 Dense"),
    "kernel missing": (without("layers/gru/cell/vars/0"), "layers/gru/cell has variables of shapes (5, 15), (2, 15)"),
    "bias missing": (without("layers/dense/vars/1"), "2 Embedding, 2 GRU and 0 Dense"),
    "embedding missing": (without("layers/embedding/vars/0"), "0 Embedding, 2 GRU and 1 Dense"),
    "second layer missing": (without("layers/gru/cell"), "layers/gru_1/cell/vars/0 has shape (5, 15)", "(4, 15)"),
    "order unknown": (renamed, "layers/gru/cell and layers/upper/cell do not tell the order"),
    "not finite": (with_values("layers/gru_1/cell/vars/1", np.full((5, 15), np.nan, np.float32)),
                   "layers/gru_1/cell/vars/1 holds numbers that are not finite"),
    "too large": (with_values("layers/dense/vars/1", np.full(7, 1e39)), "layers/dense/vars/1", "not finite in float32"),
    "integers": (with_values("layers/dense/vars/0", np.ones((5, 7), np.int8)), "layers/dense/vars/0 holds int8"),
    "text": (with_values("layers/dense/vars/1", ["a"] * 7), "layers/dense/vars/1 holds object"),
    "other output size": (with_values("layers/dense/vars/0", np.ones((6, 7), np.float32)), "(6, 7)", "(5, 7)"),
    "no rows": (with_values("layers/embedding/vars/0", np.ones((0, 4), np.float32)), "shapes (0, 4)"),
    "sparse": (sparse, "layers/embedding/vars/0 are compressed, or not in the file"),
    "in another file": (linked, "1 Embedding, 2 GRU and 0 Dense"),
}


@pytest.mark.parametrize("fault", WEIGHTS_FAULTS)
def test_weights_that_no_model_has_are_refused(copied, text, capfd, fault):
    damage, *parts = WEIGHTS_FAULTS[fault]
    path = copied(".weights.h5")
    damage(path)
    refused(capfd, path, *parts, arguments=("--vocabulary-of", text))


def deep_json(path: Path) -> None:
    rewrite(path, {"config.json": b"[" * 100_000})


def bomb(member: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, {member: bytes(20 << 20)}, zipfile.ZIP_DEFLATED)


ZIP_FAULTS = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged or cut short"),
    "no zip": (lambda path: path.write_text("GRU"), "is no file that Keras 3 wrote"),
    "no config": (lambda path: rewrite(path, {"config.json": None}), "is no file that Keras 3 wrote"),
    "no weights": (lambda path: rewrite(path, {"model.weights.h5": None}), "is no file that Keras 3 wrote"),
    "weights no HDF5": (lambda path: rewrite(path, {"model.weights.h5": b"GRU"}), "has no HDF5 that Keras 3 wrote"),
    "config no JSON": (lambda path: rewrite(path, {"config.json": b"{"}), "config.json that is not Keras 3's"),
    "config a list": (lambda path: rewrite(path, {"config.json": b"[]"}), "config.json that is not Keras 3's"),
    "config of nothing": (lambda path: rewrite(path, {"config.json": b'{"class_name": "Functional", "config": {}}'}),
                          "config.json that is not Keras 3's"),
    "config deep": (deep_json, "config.json that is not Keras 3's"),
    "config large": (bomb("config.json"), "config.json would have 20,971,520 bytes"),
    "weights large": (bomb("model.weights.h5"), "model.weights.h5 would have 20,971,520 bytes"),
    "vocabulary damaged": (lambda path: rewrite(path, {"char-gru.json": b'{"vocabulary": 3}'}),
                           "damaged char-gru.json"),
    "characters twice": (lambda path: rewrite(path, {"char-gru.json": b'{"vocabulary": "aa", "beginning": "a"}'}),
                         "damaged char-gru.json"),
}


@pytest.mark.parametrize("fault", ZIP_FAULTS)
def test_damaged_file_is_refused(copied, text, capfd, fault):
    damage, *parts = ZIP_FAULTS[fault]
    path = copied(".keras")
    damage(path)
    refused(capfd, path, *parts, arguments=("--vocabulary-of", text))


def test_file_altered_in_any_bytes_is_refused_in_one_line_or_read(files, text, tmp_path, capfd):
    raw, rng = files[".weights.h5"].read_bytes(), np.random.default_rng(0)
    path, arguments = tmp_path / "altered.weights.h5", ["--force", "--vocabulary-of", str(text)]
    for _ in range(100):
        altered = bytearray(raw)
        for place in rng.integers(0, len(raw), 20):
            altered[place] = rng.integers(256)
        path.write_bytes(altered)
        status = commands.export([str(path), str(tmp_path / "out.safetensors"), *arguments])
        stdout, stderr = capfd.readouterr()
        assert status in (0, 2) and stdout == "" and len(stderr.splitlines()) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_vocabulary_that_does_not_fit_is_refused(keras, copied, tmp_path, capfd, suffix):
    path, other = copied(suffix), tmp_path / "other.txt"
    other.write_text("abc")
    refused(capfd, path, "has no vocabulary; give --vocabulary-of TEXT")
    refused(capfd, path, "7 characters, [UNK] included", "--vocabulary-of has 4", arguments=("--vocabulary-of", other))
    save_checkpoint(tmp_path / "a.safetensors", of_char_gru())
    exported(tmp_path / "a.safetensors", tmp_path / f"a{suffix}")
    refused(capfd, tmp_path / f"a{suffix}", "has its own vocabulary", arguments=("--vocabulary-of", other))


def test_own_vocabulary_of_another_size_is_refused(copied, capfd):
    path = copied(".keras")
    rewrite(path, {"char-gru.json": b'{"vocabulary": "ab", "beginning": "a"}'})
    refused(capfd, path, "7 characters, [UNK] included", "its vocabulary has 3")


def gru(keras, units: int = H, **settings):
    return keras.layers.GRU(units, return_sequences=True, **settings)


def residual(keras):
    x = inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(V, H)(x)
    x = keras.layers.Add()([x, gru(keras)(x)])
    return keras.Model(inputs, keras.layers.Dense(V)(x))


def called_twice(keras):
    inputs, layer = keras.Input((None,), dtype="int32"), gru(keras)
    return keras.Model(inputs, keras.layers.Dense(V)(layer(layer(keras.layers.Embedding(V, H)(inputs)))))


def in_parallel(keras):
    """The second GRU layer reads the embeddings, and the output of the first one is not used."""
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(V, E)(inputs)
    first, second = gru(keras)(x), gru(keras)(x)
    return keras.Model(inputs, [keras.layers.Dense(V)(second), first])


def with_state(keras):
    inputs, state = keras.Input((None,), dtype="int32"), keras.Input((H,))
    x = gru(keras)(keras.layers.Embedding(V, E)(inputs), initial_state=state)
    return keras.Model([inputs, state], keras.layers.Dense(V)(x))


def of_own_class(keras):
    class GRU(keras.layers.GRU):
        pass

    return functional(keras, GRU(H, return_sequences=True))


OTHER_MODELS = {
    "reset before": (lambda keras: functional(keras, gru(keras, reset_after=False)), "reset_after=False"),
    "no bias": (lambda keras: functional(keras, gru(keras, use_bias=False)), "use_bias=False"),
    "relu": (lambda keras: functional(keras, gru(keras, activation="relu")), "activation='relu'"),
    "hard gates": (lambda keras: functional(keras, gru(keras, recurrent_activation="hard_sigmoid")),
                   "recurrent_activation='hard_sigmoid'"),
    "backwards": (lambda keras: functional(keras, gru(keras, go_backwards=True)), "go_backwards=True"),
    "stateful": (lambda keras: with_random_weights(keras.Sequential([
        keras.Input(batch_shape=(B, T)), keras.layers.Embedding(V, E), gru(keras, stateful=True),
        keras.layers.Dense(V)])), "stateful=True"),
    "both directions": (lambda keras: functional(keras, keras.layers.Bidirectional(gru(keras))),
                        "is Bidirectional of keras.layers"),
    "LSTM": (lambda keras: functional(keras, keras.layers.LSTM(H, return_sequences=True)), "is LSTM of keras.layers"),
    "own class": (of_own_class, "is GRU of test_export_keras"),
    "other units above": (lambda keras: functional(keras, gru(keras), gru(keras, 6)),
                          "layers/gru_1/cell/vars/0 has shape (5, 18)", "(5, 15)"),
    "softmax": (lambda keras: functional(keras, dense=keras.layers.Dense(V, "softmax")), "activation='softmax'"),
    "output without bias": (lambda keras: functional(keras, dense=keras.layers.Dense(V, use_bias=False)),
                            "use_bias=False"),
    "other output": (lambda keras: functional(keras, dense=keras.layers.Dense(V + 1)),
                     "layers/dense/vars/0 has shape (5, 8)", "(5, 7)"),
    "mask": (lambda keras: functional(keras, embedding=keras.layers.Embedding(V, E, mask_zero=True)),
             "mask_zero=True"),
    "two Dense layers": (lambda keras: functional(keras, gru(keras), keras.layers.Dense(H)), "GRU, Dense, Dense"),
    "no GRU": (lambda keras: functional(keras, keras.layers.Dropout(0.1)), "has the layers Embedding, Dense"),
    "residual": (residual, "is Add"),
    "called twice": (called_twice, "does not read the output of", "once"),
    "in parallel": (in_parallel, "does not read the output of"),
    "state from outside": (with_state, "does not read the output of"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_model_is_refused(keras, tmp_path, text, capfd, name):
    build, *parts = OTHER_MODELS[name]
    refused(capfd, save(build(keras), tmp_path / "model.keras"), *parts, arguments=("--vocabulary-of", text))


@pytest.mark.parametrize("name, part", [
    ("reset before", "layers/gru/cell has variables of shapes (4, 15), (5, 15), (15,)"),
    ("no bias", "layers/gru/cell has variables of shapes (4, 15), (5, 15),"),
    ("both directions", "layers/bidirectional/backward_layer/cell has variables"),
    ("LSTM", "layers/lstm/cell has variables"),
    ("output without bias", "2 Embedding, 1 GRU and 0 Dense"),
])
def test_weights_of_another_model_are_refused(keras, tmp_path, text, capfd, name, part):
    path = save(OTHER_MODELS[name][0](keras), tmp_path / "model.weights.h5")
    refused(capfd, path, part, arguments=("--vocabulary-of", text))


# What writing needs.

@pytest.fixture
def checkpoint_file(tmp_path) -> Path:
    save_checkpoint(tmp_path / "a.safetensors", of_char_gru())
    return tmp_path / "a.safetensors"


def test_missing_keras_is_told(checkpoint_file, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    refused_to_write(capfd, checkpoint_file, "needs the package keras", "pip install 'char-gru[export]'")


def test_missing_backend_is_told(keras, checkpoint_file, capfd, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "")
    monkeypatch.setattr(keras_model, "BACKENDS", ("no_such_package",))
    refused_to_write(capfd, checkpoint_file, "Keras needs tensorflow, jax or torch", "pip install jax")


def test_first_installed_backend_is_chosen(keras, checkpoint_file, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "")
    monkeypatch.setattr(keras_model, "BACKENDS", ("no_such_package", "jax", "torch"))
    exported(checkpoint_file, tmp_path / "a.keras")
    assert os.environ["KERAS_BACKEND"] == "jax"


def test_unknown_backend_is_told(checkpoint_file, tmp_path):
    program = "import sys; from char_gru.rnn import commands; sys.exit(commands.export(sys.argv[1:]))"
    result = run(program, checkpoint_file, tmp_path / "a.keras", cwd=ROOT, environ={"KERAS_BACKEND": "none"})
    assert_refused(result.returncode, result.stdout, result.stderr, "KERAS_BACKEND=none", "jax")


def refused_to_write(capfd, source: Path, *parts: str) -> None:
    """Assert that the command writes no file of Keras."""
    out = source.with_name("out.keras")
    status = commands.export([str(source), str(out)])
    assert_refused(status, *capfd.readouterr(), *parts)
    assert not out.exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_model_of_bytes_comes_back_as_one(keras, tmp_path, suffix):
    checkpoint = of_char_gru()
    known = Vocabulary("\n;ad\x80\xff", beginning=";", of_bytes=True)
    save_checkpoint(tmp_path / "model.safetensors", Checkpoint(checkpoint.sizes, known, checkpoint.params))
    out = exported(tmp_path / "model.safetensors", tmp_path / f"model{suffix}")
    back = load_checkpoint(exported(out, tmp_path / "back.safetensors"))
    assert back.vocabulary == known and back.vocabulary.beginning == ";"
