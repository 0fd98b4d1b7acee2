"""Models of Keras: written by Keras itself, read with h5py alone.

The model is the tutorial's: Embedding, one or several GRU with `reset_after=True`, Dense that gives logits. Keras holds
a kernel as (inputs, outputs), the gates of a GRU as z, r, h, where h is our n, and the two biases of a GRU as one array
(2, 3H), that of the input product first.

A `.keras` file is a zip of `config.json`, which has the settings of each layer, and `model.weights.h5`, which has the
numbers. A functional or Sequential model keeps the variables of a layer under the layer's class and its number among
those of this class (`layers/gru_1/cell/vars/0`), whatever its name; another model under the attribute that has the
layer (`gru/cell/vars/0`), or also under its class. Hence layers are found by the shapes of their variables, and several
GRU layers are taken in the order of the numbers that their groups' names end with. A `.weights.h5` file, and the
`config.json` of a model that is neither functional nor Sequential, tell no settings; Keras's defaults are assumed.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple

import h5py
import numpy as np

from char_gru.rnn.checkpoint import Checkpoint
from char_gru.rnn.config import Sizes, UserError
from char_gru.rnn.export.foreign import checked_arrays, vocabulary_for
from char_gru.rnn.params import gates_z_first
from char_gru.rnn.texts import open_file
from char_gru.rnn.vocabulary import Vocabulary

VOCABULARY = "char-gru.json"
"""Name of the zip's member, or of the attribute of the HDF5 file's root, with JSON: vocabulary, beginning, and bytes,
whether each character stands for a byte."""

CONFIG, WEIGHTS = "config.json", "model.weights.h5"

LIMITS = {CONFIG: 1 << 20, VOCABULARY: 16 << 20, WEIGHTS: 8 << 30}
"""Member of the zip -> the most bytes that it may have; a layer takes 3 KB of `config.json`."""

EXPANSION, EXPANDED = 100, 16 << 20
"""A member of more than `EXPANDED` bytes may be so many times larger than it is in the zip."""

BACKENDS = ("tensorflow", "jax", "torch")

SETTINGS = {
    "InputLayer": {},
    "Embedding": {"mask_zero": False},
    "GRU": {"activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": True, "reset_after": True,
            "go_backwards": False, "stateful": False},
    "Dropout": {},
    "Dense": {"activation": "linear", "use_bias": True},
}
"""Class of a layer -> the settings that it must have."""

_WANTED = "expected one Embedding, one or several GRU, and one Dense"


class _Group(NamedTuple):
    """Variables of a layer: the path of their group, and path -> dataset."""

    path: str
    variables: dict[str, h5py.Dataset]

    def shapes(self) -> list[tuple[int, ...]]:
        return [variable.shape for variable in self.variables.values()]


def keras_bytes(checkpoint: Checkpoint, suffix: str) -> bytes:
    """The file of a functional Keras model: ids (B, T) int32 in, logits (B, T, V) float32 out. suffix: `.keras`, or
    `.weights.h5` for its numbers alone. It also has the vocabulary, under `VOCABULARY`.

    Raises: UserError where Keras, or a backend of it, is missing.
    """
    model = _model(_keras(), checkpoint.sizes)
    model.set_weights(_keras_arrays(checkpoint))
    vocabulary = json.dumps({"vocabulary": checkpoint.vocabulary.characters,
                             "beginning": checkpoint.vocabulary.beginning, "bytes": checkpoint.vocabulary.of_bytes})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"model{suffix}")
        if suffix == ".keras":
            model.save(path)
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(VOCABULARY, vocabulary)
        else:
            model.save_weights(path)
            with h5py.File(path, "r+") as file:
                file.attrs[VOCABULARY] = vocabulary
        return path.read_bytes()


def from_keras(path: Path, vocabulary: Vocabulary | None) -> Checkpoint:
    """The model of a `.keras` or `.weights.h5` file of Keras 3. vocabulary: for a file that has none.

    Raises: UserError, one line, for a file that cannot be read or is damaged, for layers or settings that a model of
    char-gru cannot have, and for a vocabulary that is missing or of another size.
    """
    with open_file(path) as file:
        weights, described = _unzipped(path, file) if path.name.endswith(".keras") else (file, None)
        try:
            with h5py.File(weights, "r") as h5:
                return _checkpoint(path, h5, _vocabulary(path, described or h5.attrs.get(VOCABULARY)), vocabulary)
        except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError):
            raise UserError(f"{path} has no HDF5 that Keras 3 wrote, or is damaged or cut short; save the model anew "
                            "with Keras 3") from None


def _keras() -> ModuleType:
    """Keras on the backend that `KERAS_BACKEND` names, or else on the first of `BACKENDS` that is installed.

    Raises: UserError.
    """
    if importlib.util.find_spec("keras") is None:
        raise UserError("the format needs the package keras: pip install 'char-gru[export]'")
    if not os.environ.get("KERAS_BACKEND"):
        installed = [backend for backend in BACKENDS if importlib.util.find_spec(backend)]
        if not installed:
            raise UserError("Keras needs tensorflow, jax or torch to write this format; pip install jax is enough")
        os.environ["KERAS_BACKEND"] = installed[0]
    try:
        import keras
    except (ImportError, ValueError) as error:
        raise UserError(f"Keras does not start with KERAS_BACKEND={os.environ['KERAS_BACKEND']} ({error}); set it to "
                        f"one of {', '.join(BACKENDS)} that is installed") from None
    return keras


def _model(keras: ModuleType, sizes: Sizes):
    layers = keras.layers
    inputs = x = keras.Input((None,), dtype="int32", name="ids")
    x = layers.Embedding(sizes.V, sizes.E, dtype="float32", name="embedding")(x)
    for layer in range(sizes.layers):
        x = layers.GRU(sizes.H, return_sequences=True, reset_after=True, dtype="float32", name=f"gru_{layer}")(x)
    return keras.Model(inputs, layers.Dense(sizes.V, dtype="float32", name="logits")(x), name="char_gru")


def _keras_arrays(checkpoint: Checkpoint) -> list[np.ndarray]:
    """The parameters as Keras shapes and orders them: (V, E); (inputs, 3H), (H, 3H), (2, 3H) of each GRU; (H, V),
    (V,)."""
    params, arrays = checkpoint.params, [checkpoint.params["W_emb"]]
    for layer in range(checkpoint.sizes.layers):
        biases = np.stack([params[f"b_ih.{layer}"], params[f"b_hh.{layer}"]])
        arrays += (gates_z_first(array, 1) for array in (params[f"W_ih.{layer}"].T, params[f"W_hh.{layer}"].T, biases))
    return [*arrays, params["W_out"].T, params["b_out"]]


def _unzipped(path: Path, file: BinaryIO) -> tuple[BinaryIO, bytes | None]:
    """The weights of a `.keras` file and, where `keras_bytes` wrote it, the JSON of its vocabulary.

    Raises: UserError, also for settings of layers that a model of char-gru cannot have.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            config, weights = _member(path, archive, CONFIG), io.BytesIO(_member(path, archive, WEIGHTS))
            described = _member(path, archive, VOCABULARY) if VOCABULARY in archive.namelist() else None
    except (zipfile.BadZipFile, zlib.error, OSError, LookupError, ValueError, EOFError, RuntimeError):
        raise UserError(f"{path} is no file that Keras 3 wrote, or is damaged or cut short; save the model anew with "
                        "Keras 3") from None
    try:
        _check_config(path, json.loads(config))
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} has a {CONFIG} that is not Keras 3's; save the model anew with Keras 3") from None
    return weights, described


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """Raises: UserError for a member that is larger than it may be; others for one that is missing or damaged."""
    info = archive.getinfo(name)
    if info.file_size > min(LIMITS[name], max(EXPANDED, EXPANSION * info.compress_size)):
        raise UserError(f"{path}: {name} would have {info.file_size:,} bytes when unpacked, more than it may have; "
                        "use another file")
    return archive.read(info)


def _check_config(path: Path, config: dict) -> None:
    """Check the layers of a functional or Sequential model, their settings, and that each reads the one before it.

    Raises: UserError; LookupError, TypeError and others for what is no config.
    """
    if config["class_name"] not in ("Functional", "Sequential"):
        return
    layers, before = config["config"]["layers"], None
    for layer in layers:
        kind, name, settings = layer["class_name"], layer["config"]["name"], layer["config"]
        if kind not in SETTINGS or layer["module"] != "keras.layers":
            raise UserError(f"{path}: layer {name} is {kind} of {layer['module'] or 'your own code'}; {_WANTED}")
        for setting, wanted in SETTINGS[kind].items():
            if settings[setting] != wanted:
                raise UserError(f"{path}: {kind} {name} has {setting}={settings[setting]!r}, but a model of char-gru "
                                f"has {setting}={wanted!r}; save a model with this setting")
        if before and [*_tensors(layer["inbound_nodes"])] != [[before, 0, 0]]:
            raise UserError(f"{path}: {kind} {name} does not read the output of {before} once, and nothing else; "
                            f"{_WANTED}, each reading the one before it")
        before = name if config["class_name"] == "Functional" else None
    kinds = [layer["class_name"] for layer in layers if layer["class_name"] not in ("InputLayer", "Dropout")]
    if kinds != ["Embedding", *["GRU"] * (len(kinds) - 2), "Dense"] or len(kinds) < 3:
        raise UserError(f"{path} has the layers {', '.join(kinds)}; {_WANTED}, in this order")


def _tensors(node: object) -> Iterator[list]:
    """[layer, call, output] of each tensor among the arguments of a layer's calls."""
    if isinstance(node, dict):
        if "keras_history" in node:
            yield node["keras_history"]
        node = [*node.values()]
    if isinstance(node, list):
        for item in node:
            yield from _tensors(item)


def _vocabulary(path: Path, described: object) -> Vocabulary | None:
    """The vocabulary that `keras_bytes` has described. Raises: UserError."""
    if described is None:
        return None
    try:
        description = json.loads(described)
        return Vocabulary(description["vocabulary"], description["beginning"], description.get("bytes") is True)
    except (LookupError, ValueError, TypeError, RecursionError, UserError):
        raise UserError(f"{path} has a damaged {VOCABULARY}, which has the vocabulary; use another file") from None


def _checkpoint(path: Path, h5: h5py.File, own: Vocabulary | None, given: Vocabulary | None) -> Checkpoint:
    """Raises: UserError; OSError, ValueError and others for damaged HDF5."""
    embedding, grus, dense = _layers(path, h5)
    (V, E), (_, (H, _), _) = embedding.shapes()[0], grus[0].shapes()
    shapes = dict(zip(embedding.variables, [(V, E)]))
    for layer, gru in enumerate(grus):
        shapes |= zip(gru.variables, [(H if layer else E, 3 * H), (H, 3 * H), (2, 3 * H)])
    shapes |= zip(dense.variables, [(H, V), (V,)])
    vocabulary = vocabulary_for(path, own, given, V)
    arrays = checked_arrays(path, embedding.variables | dense.variables | {
        name: variable for gru in grus for name, variable in gru.variables.items()}, shapes)
    [W_emb], [W_out, b_out] = ([arrays[name] for name in group.variables] for group in (embedding, dense))
    params = {"W_emb": W_emb}
    for layer, gru in enumerate(grus):
        kernel, recurrent_kernel, biases = (gates_z_first(arrays[name], 1) for name in gru.variables)
        params |= {f"W_ih.{layer}": kernel.T, f"W_hh.{layer}": recurrent_kernel.T,
                   f"b_ih.{layer}": biases[0], f"b_hh.{layer}": biases[1]}
    params |= {"W_out": W_out.T, "b_out": b_out}
    return Checkpoint(Sizes(V, E, H, len(grus)), vocabulary,
                      {name: np.ascontiguousarray(array) for name, array in params.items()})


def _layers(path: Path, h5: h5py.File) -> tuple[_Group, list[_Group], _Group]:
    """The variables of the Embedding, of the GRU layers in their order, and of the Dense layer.

    Raises: UserError; OSError, ValueError and others for damaged HDF5.
    """
    found: dict[str, list[_Group]] = {"Embedding": [], "GRU": [], "Dense": []}
    for group in _groups(path, h5):
        kind = _kind(group)
        if kind is None:
            shapes = ", ".join(map(str, group.shapes()))
            raise UserError(f"{path}: {group.path} has variables of shapes {shapes}, which no Embedding, no GRU of "
                            "one direction with biases and reset_after=True, and no Dense with a bias has; "
                            f"{_WANTED} with such settings")
        found[kind].append(group)
    counts = [len(groups) for groups in found.values()]
    if counts != [1, max(1, counts[1]), 1]:
        raise UserError(f"{path} has variables of {counts[0]} Embedding, {counts[1]} GRU and {counts[2]} Dense with a "
                        f"bias; {_WANTED}")
    numbered = {}
    for gru in found["GRU"]:
        stem, number = re.fullmatch(r"(.*?)_?(\d*)", gru.path.removesuffix("/cell"), re.DOTALL).groups()
        numbered[stem, int(number or 0)] = gru
    if len({stem for stem, _ in numbered}) > 1 or len(numbered) < len(found["GRU"]):
        names = " and ".join(group.path for group in found["GRU"])
        raise UserError(f"{path}: the names {names} do not tell the order of the GRU layers; call the model's "
                        "attributes gru_1, gru_2 and so on")
    return found["Embedding"][0], [numbered[key] for key in sorted(numbered)], found["Dense"][0]


def _groups(path: Path, h5: h5py.File) -> Iterator[_Group]:
    """The groups of a file's variables, without those of the optimizer.

    Raises: UserError for a variable whose numbers are not all in the file; others for damaged HDF5.
    """
    items: list[tuple[str, h5py.Group | h5py.Dataset]] = []
    h5.visititems(lambda name, item: items.append((name, item)))  # follows no soft or external link
    for name, item in items:
        if not name.endswith("/vars") or name.startswith("optimizer/"):
            continue
        variables = {f"{name}/{key}": item[key] for key in sorted(item)}
        for variable_name, variable in variables.items():
            if variable.external or variable.is_virtual or variable.id.get_storage_size() < variable.nbytes:
                raise UserError(f"{path}: the numbers of {variable_name} are compressed, or not in the file; save the "
                                "model anew with Keras 3")
        if variables:
            yield _Group(name.removesuffix("/vars"), variables)


def _kind(group: _Group) -> str | None:
    """The class of the layer whose variables have these shapes; None for no known one."""
    match group.shapes():
        case [(rows, columns)] if rows and columns:
            return "Embedding"
        case [(rows, columns), (biases,)] if rows and columns == biases > 0:
            return "Dense"
        case [(rows, _), (H, gates), (2, _)] if rows and gates == 3 * H > 0 and "backward_layer" not in group.path:
            return "GRU"
    return None
