"""One training step: data in host memory, loss left on the device."""

import functools

import numpy as np
import pytest

from bench import floors, tutorial
from bench.implementations import OURS, our_candidates
from bench.peers import training_peers
from bench.side_by_side import Benchmark, Candidate, Runnable
from char_gru import kernels
from char_gru.rnn import cpu
from char_gru.rnn.config import Sizes
from char_gru.rnn.model import LanguageModel
from char_gru.rnn.params import initial_parameters, named_views

VERIFIED_STEPS = 4

TOLERANCES = {"fp32": 3e-5, "tf32": 1e-3, "bf16": 1e-2}
"""Errors allowed in the losses of the first VERIFIED_STEPS steps, as shares of the largest loss."""


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
    """Training steps on one batch by a library's train_step."""
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
    yield from our_candidates(device, ours)
    if device.kind == "cuda":
        precision = device.precisions[-1]
        yield Candidate(f"{OURS} no graph {precision}", precision,
                        functools.partial(ours, kernels.op_set(precision), graph=False))
    for peer in training_peers(device, tutorial=sizes == BASE):
        yield of_peer(peer)


def of_peer(peer):
    return Candidate(peer.name, peer.precision,
                     lambda inputs: steps(peer.make(*params_of(inputs)).train_step, inputs))


BASE = {"T": tutorial.T, "B": tutorial.B, "V": tutorial.SIZES.V, "E": tutorial.SIZES.E, "H": tutorial.SIZES.H}

TRAIN_STEP = Benchmark(
    "train_step", floors.train_step, inputs, reference, candidates,
    sizes=(BASE, BASE | {"B": 16}, BASE | {"H": 256}, BASE | {"H": 512}), whole_job=True, tolerances=TOLERANCES)


@pytest.mark.side_by_side(TRAIN_STEP)
def test_train_step(turn):
    """Forward, backward, Adam."""
    turn()
