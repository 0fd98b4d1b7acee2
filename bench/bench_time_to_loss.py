"""How long training takes until a validation loss is reached: the steps that a candidate needs, and their time."""

import functools
import itertools

import numpy as np
import pytest

from bench import floors, tutorial
from bench.implementations import OURS
from bench.peers import training_peers
from bench.side_by_side import Benchmark, Candidate, Runnable
from char_gru import kernels
from char_gru.rnn import cpu
from char_gru.rnn.batches import Batch, ShuffledWindows
from char_gru.rnn.config import Sizes
from char_gru.rnn.corpus import load_corpus
from char_gru.rnn.model import LanguageModel
from char_gru.rnn.params import initial_parameters, named_views
from char_gru.rnn.vocabulary import Vocabulary

TARGET = 2.3
"""Validation loss to reach, in nats per character."""

EVALUATED_EVERY, MOST_STEPS = 10, 2000

VALIDATION_SHARE, VALIDATION_WINDOWS = 0.05, 4

CPU_SIZES = {"T": 50, "B": 32, "E": 64, "H": 128}
"""Small, since the tutorial's model would take minutes."""


@functools.cache
def characters():
    """The ids of the default text, and V."""
    text = load_corpus(()).text
    vocabulary = Vocabulary.of(text)
    return vocabulary.encode(text), len(vocabulary)


def inputs(T, B, E, H):
    ids, V = characters()
    sizes, kept = Sizes(V, E, H), int(VALIDATION_SHARE * len(ids))
    params = named_views(initial_parameters(sizes, "pytorch", 0), sizes)
    return params | {"training_ids": ids[:-kept], "validation_ids": ids[-kept:], "window": np.array([T, B])}


def learner(make, inputs):
    """Training by a library: make(sizes, params, T, B) -> (train_step, loss). Verifying finds out how many steps reach
    the target; a timed run trains for as many."""
    T, B = map(int, inputs["window"])
    params = {name: array for name, array in inputs.items() if name.partition(".")[0] in
              ("W_emb", "W_ih", "W_hh", "b_ih", "b_hh", "W_out", "b_out")}
    (V, E), H = params["W_emb"].shape, params["W_hh.0"].shape[1]
    train_step, loss = make(Sizes(V, E, H), params, T, B)
    windows = ShuffledWindows(inputs["training_ids"], B, T, seed=0)
    batches = (windows.batch(epoch, index) for epoch in itertools.count() for index in range(windows.batches_per_epoch))
    validation = ShuffledWindows(inputs["validation_ids"], B, T, seed=0)
    kept = [validation.batch(0, index) for index in range(min(VALIDATION_WINDOWS, validation.batches_per_epoch))]
    steps = 0

    def train(count):
        for batch in itertools.islice(batches, count):
            train_step(*batch, tutorial.LEARNING_RATE)

    def results():
        nonlocal steps
        reached = np.inf
        while reached > TARGET and steps < MOST_STEPS:
            train(EVALUATED_EVERY)
            steps += EVALUATED_EVERY
            reached = np.mean([float(loss(*batch)) for batch in kept])
        return {"validation_loss": np.array(reached)}

    return Runnable(lambda: train(steps), results, lambda: {"steps": steps})


def ours(ops, sizes, params, T, B):
    model = LanguageModel(sizes, T, B, initial_parameters(sizes, "pytorch", 0), ops=ops)
    return lambda *batch: model.train_step(*batch)["loss"], lambda *batch: model.evaluate([Batch(*batch)])


def candidates(device, **sizes):
    for precision in device.precisions:
        ops = cpu if device.kind == "cpu" else kernels.op_set(precision)
        yield Candidate(OURS if device.kind == "cpu" else f"{OURS} {precision}", precision,
                        functools.partial(learner, functools.partial(ours, ops)))
    for peer in training_peers(device, tutorial=True):
        def make(sizes, params, T, B, peer=peer):
            made = peer.make(sizes, params)
            return made.train_step, made.loss

        yield Candidate(peer.name, peer.precision, functools.partial(learner, make))


TIME_TO_LOSS = Benchmark(
    "time_to_loss", lambda T, B, E, H: floors.train_step(T, B, characters()[1], E, H), inputs,
    lambda inputs: {"validation_loss": np.array(TARGET)}, candidates,
    sizes=({"T": tutorial.T, "B": tutorial.B, "E": tutorial.SIZES.E, "H": tutorial.SIZES.H},), cpu_sizes=(CPU_SIZES,),
    whole_job=True, tolerances=dict.fromkeys(("fp32", "tf32", "bf16"), 0.03))


@pytest.mark.side_by_side(TIME_TO_LOSS)
def test_time_to_loss(turn):
    """All training steps, without the evaluations between them."""
    turn()
