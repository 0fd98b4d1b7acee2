"""Global norm of the gradients, and Adam: passes over all parameters."""

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
from char_gru.rnn.model import BETA_1, BETA_2, EPSILON
from char_gru.rnn.params import flat_size

STEP_SIZE = 1e-3


def inputs(N):
    arrays = random_inputs({name: (N,) for name in ("params", "grads", "m", "v")})
    return arrays | {"v": np.abs(arrays["v"])}


def norm_by_reference(inputs):
    return {"norm": reference.global_norm(in_float64(inputs)["grads"])[None]}


def adam_by_reference(inputs):
    arrays = (in_float64(inputs)[name] for name in ("params", "grads", "m", "v"))
    results = reference.adam(*arrays, 1.0, STEP_SIZE, 0.0, BETA_1, BETA_2, EPSILON)
    return dict(zip(("params", "m", "v"), results))


def norm_of(ops, inputs):
    grads = on(ops, inputs["grads"])
    norm = ops.empty((1,), grads.dtype)
    return runnable(ops, lambda: ops.global_norm(grads, norm), norm=norm)


def adam_of(ops, inputs):
    params, grads, m, v = (on(ops, inputs[name]) for name in ("params", "grads", "m", "v"))
    norm, step_size = (on(ops, np.array([value], params.dtype)) for value in (1, STEP_SIZE))
    return runnable(ops, lambda: ops.adam(params, grads, m, v, norm, step_size, 0.0, BETA_1, BETA_2, EPSILON),
                    params=params, m=m, v=v)


def plain_norm(library, inputs):
    grads = library.array(inputs["grads"])
    return library.runnable(lambda: {"norm": library.xp.sqrt((grads * grads).sum())[None]})


def plain_adam(library, inputs):
    params, grads, m, v = (library.array(inputs[name]) for name in ("params", "grads", "m", "v"))

    def run():
        m[...] = BETA_1 * m + (1 - BETA_1) * grads
        v[...] = BETA_2 * v + (1 - BETA_2) * grads * grads
        params[...] -= STEP_SIZE * m / (library.xp.sqrt(v) + EPSILON)
        return {"params": params, "m": m, "v": v}

    return library.runnable(run)


def torch_norm(library, inputs):
    grads = library.array(inputs["grads"])
    return library.runnable(lambda: {"norm": library.torch.linalg.vector_norm(grads)[None]})


def torch_adam(library, inputs):
    """PyTorch's fused Adam, at so late a step that its bias corrections are 1: only then is it Keras's Adam."""
    torch = library.torch
    params = library.array(inputs["params"], requires_grad=True)
    params.grad = library.array(inputs["grads"])
    optimizer = torch.optim.Adam([params], lr=STEP_SIZE, betas=(BETA_1, BETA_2), eps=EPSILON, fused=True)
    state = {"step": torch.tensor(1e7, device=params.device), "exp_avg": library.array(inputs["m"]),
             "exp_avg_sq": library.array(inputs["v"])}
    optimizer.state[params] = state

    def run():
        optimizer.step()
        return {"params": params, "m": state["exp_avg"], "v": state["exp_avg_sq"]}

    return library.runnable(run)


SIZES = ({"N": flat_size(tutorial.SIZES)},)

NORM = Benchmark("global_norm", floors.global_norm, inputs, norm_by_reference,
                 op_candidates(norm_of, plain_norm, torch_norm, products=False), SIZES)

ADAM = Benchmark("adam", floors.adam, inputs, adam_by_reference,
                 op_candidates(adam_of, plain_adam, torch_adam, products=False), SIZES)


@pytest.mark.side_by_side(NORM)
def test_global_norm(turn):
    """The Euclidean norm of all gradients."""
    turn()


@pytest.mark.side_by_side(ADAM)
def test_adam(turn):
    """One update of parameters and moments."""
    turn()
