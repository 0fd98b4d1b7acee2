"""Models and data for tests: sizes that differ pairwise, nothing symmetric, every parameter away from zero."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from char_gru.rnn import reference_ops
from char_gru.rnn.config import Sizes
from char_gru.rnn.model import LanguageModel
from char_gru.rnn.params import flat_size, named_views

MODELS = {
    "one layer": {},
    "one step": {"T": 1},
    "one row": {"B": 1},
    "one unit": {"H": 1, "scale": 2.0},
    "two characters": {"V": 2},
    "two layers": {"layers": 2},
    "three layers": {"layers": 3, "T": 4},
    "saturated gates": {"scale": 3.0},
}
"""Name -> arguments of `random_case`, for tests of whole models."""


class Case(NamedTuple):
    """A model's sizes, its flat parameters (flat_size,) in float64, ids and targets (T, B), and h0 (layers, B, H)."""

    sizes: Sizes
    flat_params: np.ndarray
    inputs_tb: np.ndarray
    targets_tb: np.ndarray
    h0: np.ndarray

    def model(self, ops=reference_ops, dtype=np.float64, **options) -> LanguageModel:
        """The model on an op set (default: the specification in float64), its state set to h0."""
        T, B = self.inputs_tb.shape
        model = LanguageModel(self.sizes, T, B, self.flat_params, ops=ops, dtype=dtype, **options)
        ops.copy_in(model.state, self.h0)
        return model


def random_case(T=3, B=2, E=4, H=5, V=7, layers=1, seed=0, scale=0.5) -> Case:
    """A case with normally distributed parameters of the given scale."""
    sizes, rng = Sizes(V, E, H, layers), np.random.default_rng(seed)
    flat = np.zeros(flat_size(sizes))
    for view in named_views(flat, sizes).values():
        view[...] = scale * rng.standard_normal(view.shape)
    return Case(sizes, flat, rng.integers(0, V, (T, B)), rng.integers(0, V, (T, B)),
                scale * rng.standard_normal((layers, B, H)))
