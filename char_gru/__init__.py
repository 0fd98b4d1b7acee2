"""A character-level GRU language model made from scratch on CUDA: write text with it, train it, read its kernels.

The packages `char_gru.rnn` and `char_gru.kernels` are installed inside this one; in a checkout they are the folders
`rnn/` and `kernels/` beside it. The names below are the public ones, each imported from its module at first use.
"""

import importlib
import pathlib

__version__ = "0.1.0"

_PUBLIC = {
    "Generator": "rnn.sampler", "Score": "rnn.scoring", "LanguageModel": "rnn.model", "Sizes": "rnn.config",
    "UserError": "rnn.config", "load_corpus": "rnn.corpus", "Vocabulary": "rnn.vocabulary",
    "ShuffledWindows": "rnn.batches", "ContiguousStreams": "rnn.batches", "op_set": "rnn.devices",
}
__all__ = list(_PUBLIC)

_checkout = pathlib.Path(__file__).parents[1]
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
