"""Dropout between layers. Libraries drop different elements, so forward only char-gru is measured."""

import numpy as np
import pytest

from bench import floors, tutorial
from bench.implementations import (
    in_float64,
    on,
    op_candidates,
    our_candidates,
    random_inputs,
    runnable,
)
from bench.side_by_side import Benchmark
from char_gru.rnn import reference

RATE, SEED, LAYER, STEP = 0.2, 1, 0, 3

TOLERANCE = {"fp32": 2**-20}


def inputs(T, B, H):
    keep_tb = np.random.default_rng(1).random((T, B, H), np.float32) >= RATE
    return random_inputs({"x_tb": (T, B, H)}) | {"keep_tb": keep_tb}


def forward_by_reference(inputs):
    _, y_tb = reference.dropout_forward(in_float64(inputs)["x_tb"], RATE, SEED, LAYER, STEP)
    return {"y_tb": y_tb}


def backward_by_reference(inputs):
    return {"dx_tb": reference.dropout_backward(in_float64(inputs)["x_tb"], RATE, inputs["keep_tb"])}


def forward_of(ops, inputs):
    x_tb = on(ops, inputs["x_tb"], activations=True)
    step = on(ops, np.array([STEP], np.uint64))
    keep_tb, y_tb = (ops.empty_activations(x_tb.shape, dtype) for dtype in (bool, x_tb.dtype))
    return runnable(ops, lambda: ops.dropout_forward(x_tb, RATE, SEED, LAYER, step, keep_tb, y_tb), y_tb=y_tb)


def backward_of(ops, inputs):
    dy_tb, keep_tb = (on(ops, inputs[name], activations=True) for name in ("x_tb", "keep_tb"))
    dx_tb = ops.empty_activations(dy_tb.shape, dy_tb.dtype)
    return runnable(ops, lambda: ops.dropout_backward(dy_tb, RATE, keep_tb, dx_tb), dx_tb=dx_tb)


def plain_backward(library, inputs):
    dy_tb, keep_tb = (library.array(inputs[name]) for name in ("x_tb", "keep_tb"))
    return library.runnable(lambda: {"dx_tb": dy_tb * keep_tb / np.float32(1 - RATE)})


def torch_backward(library, inputs):
    dy_tb, keep_tb = (library.array(inputs[name]) for name in ("x_tb", "keep_tb"))
    return library.runnable(lambda: {"dx_tb": dy_tb * keep_tb / (1 - RATE)})


def forward_candidates(device, **sizes):
    return our_candidates(device, forward_of, products=False, twin=False)


def benchmark(name, work, by_reference, candidates):
    return Benchmark(name, lambda T, B, H: work(T * B * H), inputs, by_reference, candidates,
                     sizes=({"T": tutorial.T, "B": tutorial.B, "H": tutorial.SIZES.H},), tolerances=TOLERANCE)


FORWARD = benchmark("dropout_forward", floors.dropout_forward, forward_by_reference, forward_candidates)
BACKWARD = benchmark("dropout_backward", floors.dropout_backward, backward_by_reference,
                     op_candidates(backward_of, plain_backward, torch_backward, products=False, twin=False))


@pytest.mark.side_by_side(FORWARD)
def test_dropout_forward(turn):
    """A mask drawn by Philox, and the elements that stay."""
    turn()


@pytest.mark.side_by_side(BACKWARD)
def test_dropout_backward(turn):
    """The same mask on the gradient."""
    turn()
