"""Golden files: cases that Keras and PyTorch computed in float64."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from char_gru.rnn.config import Sizes
from char_gru.rnn.params import checkpoint_name, flat_size, named_views, parameter_shapes
from tests.helpers.cases import Case

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
DROPOUT_FILE = GOLDEN_DIR / "dropout_torch.npz"
TORCH_FILES = sorted(GOLDEN_DIR.glob("torch_*.npz"))
KERAS_FILES = sorted(GOLDEN_DIR.glob("keras_*.npz"))


def load(path: Path) -> tuple[Case, dict, dict]:
    """The case of a golden file, its gradients by parameter name (and `dh0`), and all arrays of the file by name."""
    data = dict(np.load(path))
    if "sizes_VEHLBT" in data:
        V, E, H, layers, _, _ = data["sizes_VEHLBT"].tolist()
        sizes = Sizes(V, E, H, layers)
        stored = {name: checkpoint_name(name) for name in parameter_shapes(sizes)}
        gradients = {name: data[f"grad.{key}"] for name, key in stored.items()} | {"dh0": data["dh0"]}
        h0 = data["h0"]
    else:
        V, E, H, _, _ = data["sizes_VEHBT"].tolist()
        sizes = Sizes(V, E, H)
        stored = {name: name.removesuffix(".0") for name in parameter_shapes(sizes)}
        gradients = {name: data[f"d{key}"] for name, key in stored.items()}
        h0 = data["h0"][None]
    flat = np.zeros(flat_size(sizes))
    for name, view in named_views(flat, sizes).items():
        view[...] = data[stored[name]]
    return Case(sizes, flat, data["ids_tb"], data["targets_tb"], h0), gradients, data
