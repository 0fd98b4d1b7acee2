"""The output layer with softmax, loss and dlogits in one pass, and the gradients of its parameters."""

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


def inputs(T, B, V, H):
    arrays = random_inputs({"h_tb": (T, B, H), "W_out": (V, H), "b_out": (V,), "dlogits_tb": (T, B, V)},
                           targets_tb=((T, B), V))
    arrays["W_out"] /= np.float32(np.sqrt(H))
    return arrays


def forward_by_reference(inputs):
    arguments = map(in_float64(inputs).get, ("h_tb", "W_out", "b_out", "targets_tb"))
    loss, dlogits_tb = reference.cross_entropy_forward(*arguments)
    return {"loss": loss[None], "dlogits_tb": dlogits_tb}


def backward_by_reference(inputs):
    arrays = in_float64(inputs)
    gradients = reference.cross_entropy_backward(arrays["dlogits_tb"], arrays["h_tb"])
    return dict(zip(("dW_out", "db_out"), gradients))


def forward_of(ops, inputs):
    h_tb = on(ops, inputs["h_tb"], activations=True)
    W_out, b_out, targets_tb = (on(ops, inputs[name]) for name in ("W_out", "b_out", "targets_tb"))
    loss, dlogits_tb = ops.empty((1,), W_out.dtype), ops.empty_activations((*targets_tb.shape, len(W_out)), W_out.dtype)
    return runnable(ops, lambda: ops.cross_entropy_forward(h_tb, W_out, b_out, targets_tb, loss, dlogits_tb),
                    loss=loss, dlogits_tb=dlogits_tb)


def backward_of(ops, inputs):
    dlogits_tb, h_tb = (on(ops, inputs[name], activations=True) for name in ("dlogits_tb", "h_tb"))
    V, H, dtype = dlogits_tb.shape[2], h_tb.shape[2], h_tb.dtype
    dW_out, db_out = ops.empty((V, H), dtype), ops.empty((V,), dtype)
    return runnable(ops, lambda: ops.cross_entropy_backward(dlogits_tb, h_tb, dW_out, db_out),
                    dW_out=dW_out, db_out=db_out)


def plain_forward(library, inputs):
    """One array after another: logits, softmax, gradient."""
    xp = library.xp
    h_tb, W_out, b_out, targets_tb = (library.array(inputs[name]) for name in ("h_tb", "W_out", "b_out", "targets_tb"))
    h, targets, V = h_tb.reshape(-1, h_tb.shape[2]), targets_tb.reshape(-1), len(W_out)
    logits, rows = xp.empty((len(h), V), h.dtype), xp.arange(len(h))

    def run():
        library.matmul(h, W_out.T, logits)
        shifted = logits + b_out
        shifted -= shifted.max(axis=1, keepdims=True)
        p = xp.exp(shifted)
        total = p.sum(axis=1, keepdims=True)
        loss = xp.mean(xp.log(total[:, 0]) - shifted[rows, targets])
        p /= total
        p[rows, targets] -= 1
        return {"loss": loss[None], "dlogits_tb": (p / len(h)).reshape(*targets_tb.shape, V)}

    return library.runnable(run)


def plain_backward(library, inputs):
    dlogits_tb, h_tb = (library.array(inputs[name]) for name in ("dlogits_tb", "h_tb"))
    dlogits, h = (array.reshape(-1, array.shape[2]) for array in (dlogits_tb, h_tb))
    dW_out = library.xp.empty((dlogits.shape[1], h.shape[1]), h.dtype)

    def run():
        library.matmul(dlogits.T, h, dW_out)
        return {"dW_out": dW_out, "db_out": dlogits.sum(axis=0)}

    return library.runnable(run)


def torch_forward(library, inputs):
    """Loss and its gradient with respect to the logits, by autograd."""
    functional = library.torch.nn.functional
    h_tb, W_out, b_out, targets_tb = (library.array(inputs[name]) for name in ("h_tb", "W_out", "b_out", "targets_tb"))

    def run():
        logits = functional.linear(h_tb, W_out, b_out).requires_grad_()
        loss = functional.cross_entropy(logits.flatten(0, 1), targets_tb.flatten())
        [dlogits_tb] = library.torch.autograd.grad(loss, logits)
        return {"loss": loss[None], "dlogits_tb": dlogits_tb}

    return library.runnable(run)


def torch_backward(library, inputs):
    dlogits_tb, h_tb = (library.array(inputs[name]).flatten(0, 1) for name in ("dlogits_tb", "h_tb"))
    return library.runnable(lambda: {"dW_out": dlogits_tb.T @ h_tb, "db_out": dlogits_tb.sum(0)})


SIZES = ({"T": tutorial.T, "B": tutorial.B, "V": tutorial.SIZES.V, "H": tutorial.SIZES.H},)

FORWARD = Benchmark("cross_entropy_forward", floors.cross_entropy_forward, inputs, forward_by_reference,
                    op_candidates(forward_of, plain_forward, torch_forward), SIZES)

BACKWARD = Benchmark("cross_entropy_backward", floors.cross_entropy_backward, inputs, backward_by_reference,
                     op_candidates(backward_of, plain_backward, torch_backward), SIZES)


@pytest.mark.side_by_side(FORWARD)
def test_cross_entropy_forward(turn):
    """The loss, and dlogits, from h."""
    turn()


@pytest.mark.side_by_side(BACKWARD)
def test_cross_entropy_backward(turn):
    """dW_out and db_out from dlogits."""
    turn()
