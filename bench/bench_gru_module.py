"""A GRU layer as a module of PyTorch: forward and backward pass by `torch.nn.GRU`, and by the module that takes its
place."""

import numpy as np
import pytest

from bench import floors, tutorial
from bench.implementations import OURS, in_float64, random_inputs, torch_candidates
from bench.side_by_side import Benchmark
from char_gru.rnn import reference

NAMES = {"W_ih": "weight_ih_l0", "W_hh": "weight_hh_l0", "b_ih": "bias_ih_l0", "b_hh": "bias_hh_l0"}
"""Parameter -> its name in the module."""


def inputs(T, B, I, H):
    arrays = random_inputs({"x_tb": (T, B, I), "h0": (B, H), "W_ih": (3 * H, I), "W_hh": (3 * H, H), "b_ih": (3 * H,),
                            "b_hh": (3 * H,), "dy_tb": (T, B, H)})
    for name in NAMES:
        arrays[name] /= 2 * H**0.5  # as small as initial values: errors do not grow from step to step
    return arrays


def by_reference(inputs):
    """Output and gradients in float64."""
    arrays = in_float64(inputs)
    T, B, I = arrays["x_tb"].shape
    x, ids_tb = arrays["x_tb"].reshape(T * B, I), np.arange(T * B).reshape(T, B)
    P = reference.input_table_forward(x, arrays["W_ih"], arrays["b_ih"])
    saved = reference.gru_forward(P, ids_tb, arrays["W_hh"], arrays["b_hh"], arrays["h0"])
    dP, dW_hh, db_hh, dh0 = reference.gru_backward(arrays["dy_tb"], None, ids_tb, arrays["W_hh"], saved, T * B)
    dx, dW_ih, db_ih = reference.input_table_backward(dP, x, arrays["W_ih"])
    return {"y_tb": saved.h_tb[1:], "dx_tb": dx.reshape(T, B, I), "dh0": dh0, "dW_ih": dW_ih, "dW_hh": dW_hh,
            "db_ih": db_ih, "db_hh": db_hh}


def module_of(made):
    """Candidates with the module that `made` gives for a library, I and H."""
    def make(library, inputs):
        torch = library.torch
        x_tb, h0 = (library.array(array, requires_grad=True) for array in (inputs["x_tb"], inputs["h0"][None]))
        dy_tb, gru = library.array(inputs["dy_tb"]), made(library, x_tb.shape[2], h0.shape[2]).to(library.kind)
        for name, of_module in NAMES.items():
            getattr(gru, of_module).data.copy_(library.array(inputs[name]))
        wanted = x_tb, h0, *(getattr(gru, of_module) for of_module in NAMES.values())

        def run():
            y_tb, _ = gru(x_tb, h0)
            dx_tb, dh0, *of_parameters = torch.autograd.grad(y_tb, wanted, dy_tb.to(y_tb.dtype))
            return {"y_tb": y_tb, "dx_tb": dx_tb, "dh0": dh0[0]} | {
                f"d{name}": gradient for name, gradient in zip(NAMES, of_parameters)}

        return library.runnable(run)

    return make


def of_char_gru(library, I, H):
    from char_gru.rnn.torch import GRU

    return GRU(I, H, precision=library.precision)


def candidates(device, **sizes):
    yield from torch_candidates(device, module_of(of_char_gru), name=OURS)
    yield from torch_candidates(device, module_of(lambda library, I, H: library.torch.nn.GRU(I, H)))


BASE = {"T": tutorial.T, "B": tutorial.B, "I": tutorial.SIZES.H, "H": tutorial.SIZES.H}

GRU_MODULE = Benchmark(
    "gru_module", floors.gru_module, inputs, by_reference, candidates,
    sizes=(BASE, BASE | {"B": 16}, *(BASE | {"I": H, "H": H, "B": B} for H in (256, 512) for B in (16, 64)),
           {"T": 1000, "B": 1, "I": 512, "H": 512}))


@pytest.mark.side_by_side(GRU_MODULE)
def test_gru_module(turn):
    """Output and all gradients of a layer."""
    turn()
