"""One training step, data in host memory, loss left where it is; how long until a loss is reached; and the memory."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import floors, tutorial
from bench.implementations import OURS
from bench.peers import training_peers
from bench.side_by_side import Benchmark, Candidate, Runnable, one_at_a_time
from bench.timing import peak_memory_mib
from char_gru import kernels
from char_gru.rnn import cpu
from char_gru.rnn.config import Sizes
from char_gru.rnn.model import LanguageModel
from char_gru.rnn.params import initial_parameters, named_views

VERIFIED_STEPS = 4

TOLERANCES = {"fp32": 3e-5, "tf32": 1e-3, "bf16": 1e-2}
"""Of the losses of the first steps."""

TRAIN = Path(__file__).parent.parent / "train.py"

RUN_BATCHES = 4
"""Length of the measured run's text; the part kept for validation comes off it."""


def inputs(T, B, V, E, H):
    rng, sizes = np.random.default_rng(0), Sizes(V, E, H)
    windows_tb = rng.integers(1, V, (T + 1, B), np.int32)
    params = named_views(initial_parameters(sizes, "pytorch", 0), sizes)
    return params | {"inputs_tb": windows_tb[:-1], "targets_tb": windows_tb[1:]}


def params_of(inputs):
    params = {name: array for name, array in inputs.items() if not name.endswith("_tb")}
    (V, E), H = params["W_emb"].shape, params["W_hh.0"].shape[1]
    return Sizes(V, E, H), params


def steps(train_step, inputs):
    """Steps on one batch, by any library's train_step."""
    def run():
        return train_step(inputs["inputs_tb"], inputs["targets_tb"], tutorial.LEARNING_RATE)

    return Runnable(run, lambda: {"losses": np.array([float(run()) for _ in range(VERIFIED_STEPS)])})


def ours(ops, inputs, **options):
    sizes, _ = params_of(inputs)
    flat_params = initial_parameters(sizes, "pytorch", 0)
    model = LanguageModel(sizes, *inputs["inputs_tb"].shape, flat_params, ops=ops, **options)
    return steps(lambda *batch: model.train_step(*batch)["loss"], inputs)


def reference(inputs):
    return ours(cpu, inputs).results()


def candidates(device, **sizes):
    if device.kind == "cpu":
        yield Candidate(OURS, "fp32", functools.partial(ours, cpu))
    else:
        for precision in device.precisions:
            ops = kernels.op_set(precision)
            yield Candidate(f"{OURS} {precision}", precision, functools.partial(ours, ops))
        yield Candidate(f"{OURS} no graph {precision}", precision, functools.partial(ours, ops, graph=False))
    for peer in training_peers(device, tutorial=sizes == BASE):
        yield of_peer(peer)


def of_peer(peer):
    return Candidate(peer.name, peer.precision,
                     lambda inputs: steps(peer.make(*params_of(inputs)).train_step, inputs))


BASE = {"T": tutorial.T, "B": tutorial.B, "V": tutorial.SIZES.V, "E": tutorial.SIZES.E, "H": tutorial.SIZES.H}

TRAIN_STEP = Benchmark(
    "train_step", floors.train_step, inputs, reference, candidates,
    sizes=(BASE, *one_at_a_time(BASE, B=(16,), H=(256, 512))),
    sweep=one_at_a_time(BASE, B=(1, 256, 1024), H=(128, 2048, 4096), T=(10, 1000, 2000)),
    whole_job=True, tolerances=TOLERANCES)


@pytest.mark.side_by_side(TRAIN_STEP)
def test_train_step(turn):
    """Forward, backward, Adam."""
    turn()


def test_peak_memory(record_figure, tmp_path):
    """MiB of one epoch of `train.py` with its default options on a short text: steps, validation, sample, files."""
    text = tmp_path / "text"
    text.write_text(tutorial.random_text(RUN_BATCHES * tutorial.B * (tutorial.T + 1)))
    record_figure("train_memory", peak_memory_mib=peak_memory_mib(
        [sys.executable, str(TRAIN), "--data", str(text), "--out", str(tmp_path / "run"), "--epochs", "1",
         "--device", "cpu"]))
