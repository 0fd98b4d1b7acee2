"""How a file is read or written, by its suffix.

| suffix | written | read |
|---|---|---|
| `.safetensors` | a checkpoint without what resuming needs | a checkpoint, or tensors of a PyTorch model |
| `.keras`, `.weights.h5` | by Keras | with h5py |
| `.onnx` | the generator, or the plain network | |
| `.html` | a page that writes, and shows the model's inside | |
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from char_gru.rnn.checkpoint import Checkpoint, checkpoint_bytes, find_checkpoint, is_of_other_software, load_checkpoint
from char_gru.rnn.config import ExportConfig, UserError
from char_gru.rnn.corpus import load_corpus
from char_gru.rnn.folder import check_output, write_atomically
from char_gru.rnn.texts import open_file
from char_gru.rnn.vocabulary import Vocabulary

KERAS = (".keras", ".weights.h5")
READ = (".safetensors", *KERAS)
WRITTEN = (".onnx", ".html", ".safetensors", *KERAS)


def export(config: ExportConfig) -> int:
    """Write the file that a command line asks for; returns its bytes.

    Raises: UserError, one line, for a model that cannot be read, and a file that cannot be written.
    """
    suffix = next((suffix for suffix in WRITTEN if config.out.name.endswith(suffix)), None)
    if suffix is None:
        raise UserError(f"{config.out} has none of the suffixes {', '.join(WRITTEN)}, which tell the format")
    if config.logits and suffix != ".onnx":
        raise UserError(f"--logits is for .onnx, but {config.out} is another format; leave it out")
    if config.weights != "fp16" and suffix != ".html":
        raise UserError(f"--weights is for .html, but {config.out} is another format; leave it out")
    source = find_checkpoint(config.source)
    check_output(config.out, config.force, source)
    checkpoint = read_model(source, config.vocabulary_of)
    if suffix == ".html" and checkpoint.vocabulary.of_bytes:
        raise UserError(f"{config.source} is a model of bytes, which .html does not show; export it as "
                        f"{', '.join(other for other in WRITTEN if other != suffix)}")
    if suffix == ".onnx":
        written = _module("onnx_graph").onnx_bytes(checkpoint, config.logits)
    elif suffix == ".html":
        written = _module("page").page_bytes(checkpoint, config.weights)
    elif suffix in KERAS:
        written = _module("keras_model").keras_bytes(checkpoint, suffix)
    else:
        written = checkpoint_bytes(Checkpoint(checkpoint.sizes, checkpoint.vocabulary, checkpoint.params))
    write_atomically(config.out, written)
    return len(written)


def read_model(path: Path, vocabulary_of: tuple[str, ...] = ()) -> Checkpoint:
    """The model of a checkpoint, or of another framework's file.

    vocabulary_of: texts, as `train.py --data` takes them, whose characters are the vocabulary of a file that has none.

    Raises: UserError.
    """
    if not path.name.endswith(READ):
        raise UserError(f"{path} has none of the suffixes {', '.join(READ)}; name a run, or a model in such a file")
    open_file(path).close()  # before a text is fetched
    keras = path.name.endswith(KERAS)
    if not keras and not is_of_other_software(path):
        if vocabulary_of:
            raise UserError(f"--vocabulary-of is for files of other frameworks; {path} has its own vocabulary")
        return load_checkpoint(path)
    try:
        corpus = load_corpus(vocabulary_of) if vocabulary_of else None
    except UserError as error:
        raise UserError(f"--vocabulary-of: {error}") from None
    vocabulary = Vocabulary.of(corpus.text) if corpus else None
    return _module("keras_model").from_keras(path, vocabulary) if keras else (
        _module("pytorch_model").from_pytorch(path, vocabulary))


def _module(name: str) -> ModuleType:
    """A module of this package. Raises: UserError that names the extra, where what the module needs is missing."""
    try:
        return importlib.import_module(f"char_gru.rnn.export.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("char_gru"):
            raise
        raise UserError(f"the format needs the package {error.name}: pip install 'char-gru[export]'") from None
