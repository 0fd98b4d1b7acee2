"""Drawing one character per row."""

import numpy as np
import pytest

from bench import floors, tutorial
from bench.implementations import (
    in_float64,
    on,
    op_candidates,
    random_inputs,
    runnable,
)
from bench.side_by_side import Benchmark
from char_gru.rnn import reference


def inputs(R, V):
    """At the default sizes each number is at least 1.7e-5 from a border of shares: rounding decides no character."""
    uniforms = np.random.default_rng(2).random(R, np.float32)
    return random_inputs({"logits": (R, V)}) | {"uniforms": uniforms}


def sample_of(ops, inputs):
    logits, uniforms = on(ops, inputs["logits"]), on(ops, inputs["uniforms"])
    ids = ops.empty((len(logits),), np.int32)
    return runnable(ops, lambda: ops.sample(logits, uniforms, ids), ids=ids)


def by_reference(inputs):
    arrays = in_float64(inputs)
    return {"ids": reference.sample(arrays["logits"], arrays["uniforms"])}


def plain(library, inputs):
    logits, uniforms = library.array(inputs["logits"]), library.array(inputs["uniforms"])

    def run():
        p = library.xp.exp(logits[:, 1:] - logits[:, 1:].max(axis=1, keepdims=True))
        cumulative = library.xp.cumsum(p, axis=1)
        return {"ids": 1 + (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(axis=1)}

    return library.runnable(run)


def pytorch(library, inputs):
    """By inverse CDF from the given uniform numbers; torch.multinomial would draw numbers of its own."""
    logits, uniforms = library.array(inputs["logits"]), library.array(inputs["uniforms"])

    def run():
        cumulative = library.torch.softmax(logits[:, 1:], dim=1).cumsum(dim=1)
        return {"ids": 1 + (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(dim=1)}

    return library.runnable(run)


SAMPLE = Benchmark("sample", floors.sample, inputs, by_reference,
                   op_candidates(sample_of, plain, pytorch, products=False), sizes=({"R": 64, "V": tutorial.SIZES.V},),
                   tolerances={"fp32": 0.0})


@pytest.mark.side_by_side(SAMPLE)
def test_sample(turn):
    """A character by inverse CDF, at temperature 1."""
    turn()
