"""The tutorial's sizes, with a text to measure at."""

from __future__ import annotations

import string

import numpy as np

from char_gru.rnn.config import Sizes, TrainConfig
from char_gru.rnn.vocabulary import Vocabulary

_DEFAULTS = TrainConfig()

T, B = _DEFAULTS.seq_length, _DEFAULTS.batch_size

CHARACTERS = "".join(sorted("\n !$&',-.3:;?" + string.ascii_letters))
"""The characters of Tiny Shakespeare."""

VOCABULARY = Vocabulary(CHARACTERS)

SIZES = Sizes(len(VOCABULARY), _DEFAULTS.embedding_dim, _DEFAULTS.rnn_units, _DEFAULTS.layers)

LEARNING_RATE = _DEFAULTS.learning_rate


def random_text(length: int) -> str:
    """Characters that all occur, in no order: time and memory do not depend on what is written."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.arange(1, SIZES.V), rng.integers(1, SIZES.V, length - SIZES.V + 1)])
    return VOCABULARY.decode(ids)
