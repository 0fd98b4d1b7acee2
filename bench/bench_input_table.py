"""The input products of all characters, and their gradients."""

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


def inputs(N, E, H):
    return random_inputs({"x": (N, E), "W_ih": (3 * H, E), "b_ih": (3 * H,), "dP": (N, 3 * H)})


def forward_by_reference(inputs):
    arrays = in_float64(inputs)
    return {"P": reference.input_table_forward(arrays["x"], arrays["W_ih"], arrays["b_ih"])}


def backward_by_reference(inputs):
    arrays = in_float64(inputs)
    gradients = reference.input_table_backward(arrays["dP"], arrays["x"], arrays["W_ih"])
    return dict(zip(("dx", "dW_ih", "db_ih"), gradients))


def forward_of(ops, inputs):
    x, W_ih, b_ih = (on(ops, inputs[name]) for name in ("x", "W_ih", "b_ih"))
    P = ops.empty_activations((len(x), len(W_ih)), W_ih.dtype)
    return runnable(ops, lambda: ops.input_table_forward(x, W_ih, b_ih, P), P=P)


def backward_of(ops, inputs):
    dP, x, W_ih = (on(ops, inputs[name]) for name in ("dP", "x", "W_ih"))
    gradients = {name: ops.empty(shape, W_ih.dtype)
                 for name, shape in (("dx", x.shape), ("dW_ih", W_ih.shape), ("db_ih", W_ih.shape[:1]))}
    return runnable(ops, lambda: ops.input_table_backward(dP, x, W_ih, *gradients.values()), **gradients)


def plain_forward(library, inputs):
    x, W_ih, b_ih = (library.array(inputs[name]) for name in ("x", "W_ih", "b_ih"))
    P = library.xp.empty((len(x), len(W_ih)), W_ih.dtype)

    def run():
        library.matmul(x, W_ih.T, P)
        return {"P": library.xp.add(P, b_ih, out=P)}

    return library.runnable(run)


def plain_backward(library, inputs):
    dP, x, W_ih = (library.array(inputs[name]) for name in ("dP", "x", "W_ih"))
    dx, dW_ih = library.xp.empty_like(x), library.xp.empty_like(W_ih)

    def run():
        library.matmul(dP, W_ih, dx)
        library.matmul(dP.T, x, dW_ih)
        return {"dx": dx, "dW_ih": dW_ih, "db_ih": dP.sum(axis=0)}

    return library.runnable(run)


def torch_forward(library, inputs):
    x, W_ih, b_ih = (library.array(inputs[name]) for name in ("x", "W_ih", "b_ih"))
    return library.runnable(lambda: {"P": library.torch.nn.functional.linear(x, W_ih, b_ih)})


def torch_backward(library, inputs):
    dP = library.array(inputs["dP"])
    arguments = [library.array(inputs[name], requires_grad=True) for name in ("x", "W_ih", "b_ih")]
    with library.switched():
        P = library.torch.nn.functional.linear(*arguments)

    def run():
        gradients = library.torch.autograd.grad(P, arguments, dP.to(P.dtype), retain_graph=True)
        return dict(zip(("dx", "dW_ih", "db_ih"), gradients))

    return library.runnable(run)


SIZES = ({"N": tutorial.SIZES.V, "E": tutorial.SIZES.E, "H": tutorial.SIZES.H},)

FORWARD = Benchmark("input_table_forward", floors.input_table_forward, inputs, forward_by_reference,
                    op_candidates(forward_of, plain_forward, torch_forward), SIZES)

BACKWARD = Benchmark("input_table_backward", floors.input_table_backward, inputs, backward_by_reference,
                     op_candidates(backward_of, plain_backward, torch_backward), SIZES)


@pytest.mark.side_by_side(FORWARD)
def test_input_table_forward(turn):
    """P = x W_ih^T + b_ih."""
    turn()


@pytest.mark.side_by_side(BACKWARD)
def test_input_table_backward(turn):
    """The gradients dx, dW_ih and db_ih from dP."""
    turn()
