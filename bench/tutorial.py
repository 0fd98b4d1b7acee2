"""The tutorial's sizes."""

from char_gru.rnn.config import Sizes, TrainConfig

_DEFAULTS = TrainConfig()

CHARACTERS = 66  # of Tiny Shakespeare, and [UNK]

T, B = _DEFAULTS.seq_length, _DEFAULTS.batch_size

SIZES = Sizes(CHARACTERS, _DEFAULTS.embedding_dim, _DEFAULTS.rnn_units, _DEFAULTS.layers)

LEARNING_RATE = _DEFAULTS.learning_rate
