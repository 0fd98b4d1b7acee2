"""One training step at the tutorial's sizes, and the memory of a whole run.

pytest-benchmark is not used: it finishes with one candidate before it starts the next, so that a disturbance of the
machine would hit one of them alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import tutorial
from bench.peers import installed_peers
from bench.timing import interleave, peak_memory_mib
from rnn.model import LanguageModel
from rnn.params import named_views

VERIFIED_STEPS = 4

TRAIN = Path(__file__).parent.parent / "train.py"

RUN_BATCHES = 4
"""Length of the measured run's text; the part kept for validation comes off it."""


def test_training_step(publish, rounds, tmp_path):
    T, B, sizes, flat_params = tutorial.T, tutorial.B, tutorial.SIZES, tutorial.flat_params()
    inputs_tb, targets_tb = tutorial.random_batch()
    ours = LanguageModel(sizes, T, B, flat_params)
    peers = installed_peers(sizes, named_views(flat_params, sizes))
    candidates = {
        "char-gru": lambda: ours.train_step(inputs_tb, targets_tb, tutorial.LEARNING_RATE)["loss"],
        **{name: lambda peer=peer: peer.train_step(inputs_tb, targets_tb, tutorial.LEARNING_RATE)
           for name, peer in peers.items()}}
    for _ in range(VERIFIED_STEPS):
        losses = {name: candidate() for name, candidate in candidates.items()}
        assert losses == pytest.approx(dict.fromkeys(losses, losses["char-gru"]), rel=0, abs=1e-4)

    seconds = interleave(candidates, rounds)
    publish("train_step", {"T": T, "B": B, "V": sizes.V, "E": sizes.E, "H": sizes.H},
            {"seconds": seconds, "peak_memory_mib": peak_memory_of_a_run(tmp_path)})


def peak_memory_of_a_run(folder: Path) -> float:
    """MiB of one epoch of `train.py` with its default options on a short text: steps, validation, sample, files."""
    text = folder / "text"
    text.write_text(tutorial.random_text(RUN_BATCHES * tutorial.B * (tutorial.T + 1)))
    return peak_memory_mib([sys.executable, str(TRAIN), "--data", str(text), "--out", str(folder / "run"),
                            "--epochs", "1", "--device", "cpu"])
