"""The tutorial's sizes, with parameters and data to measure at."""

from __future__ import annotations

import string

import numpy as np

from rnn.config import Sizes, TrainConfig
from rnn.params import initial_parameters
from rnn.vocabulary import Vocabulary

_DEFAULTS = TrainConfig()

T, B = _DEFAULTS.seq_length, _DEFAULTS.batch_size

CHARACTERS = "".join(sorted("\n !$&',-.3:;?" + string.ascii_letters))
"""The characters of Tiny Shakespeare."""

VOCABULARY = Vocabulary(CHARACTERS)

SIZES = Sizes(len(VOCABULARY), _DEFAULTS.embedding_dim, _DEFAULTS.rnn_units, _DEFAULTS.layers)

LEARNING_RATE = _DEFAULTS.learning_rate


def flat_params() -> np.ndarray:
    """Initial parameters as a training run draws them, in the layout of `rnn.params`."""
    return initial_parameters(SIZES, _DEFAULTS.init, _DEFAULTS.seed)


def random_text(length: int) -> str:
    """Characters that all occur, in no order: time and memory do not depend on what is written."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.arange(1, SIZES.V), rng.integers(1, SIZES.V, length - SIZES.V + 1)])
    return VOCABULARY.decode(ids)


def random_batch() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (T, B), targets one character ahead."""
    windows_tb = np.random.default_rng(0).integers(1, SIZES.V, (T + 1, B), np.int32)
    return windows_tb[:-1], windows_tb[1:]
