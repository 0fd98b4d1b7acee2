"""The recurrence over a window, forward and backward.

A library's recurrence multiplies W_ih with every position, T*B rows, and this product is part of its time; char-gru
multiplies W_ih with the V rows of the input table, in another op. Backward, a library computes the gradient of W_ih,
char-gru the sums of di by character.
"""

import functools

import numpy as np
import pytest

from bench import floors, tutorial
from bench.implementations import (
    flashrnn_gru,
    in_float64,
    on,
    our_candidates,
    plain_candidates,
    random_inputs,
    runnable,
    torch_candidates,
)
from bench.side_by_side import Benchmark
from char_gru.kernels import runtime
from char_gru.kernels.plan.recurrence import backward_plan, forward_plan
from char_gru.rnn import reference

E = tutorial.SIZES.E


def inputs(T, B, V, H):
    shapes = {"W_emb": (V, E), "W_ih": (3 * H, E), "b_ih": (3 * H,), "W_hh": (3 * H, H), "b_hh": (3 * H,),
              "h0": (B, H), "dlogits_tb": (T, B, V), "W_out": (V, H)}
    arrays = random_inputs(shapes, ids_tb=((T, B), V))
    for name in ("W_ih", "b_ih", "W_hh", "b_hh", "W_out"):
        arrays[name] /= np.float32(2 * np.sqrt(H))  # as small as initial values: errors do not grow from step to step
    return arrays | {"P": arrays["W_emb"] @ arrays["W_ih"].T + arrays["b_ih"]}


def by_reference(direction, inputs):
    """The results of a direction, in float64."""
    arrays = in_float64(inputs)
    P, ids_tb, W_hh = arrays["P"], arrays["ids_tb"], arrays["W_hh"]
    saved = reference.gru_forward(P, ids_tb, W_hh, arrays["b_hh"], arrays["h0"])
    if direction == "forward":
        return {"h_tb": saved.h_tb}
    gradients = reference.gru_backward(arrays["dlogits_tb"], arrays["W_out"], ids_tb, W_hh, saved, len(P))
    return dict(zip(("dP", "dW_hh", "db_hh", "dh0"), gradients))


def ours(direction, ops, inputs, **options):
    """The op of a direction on an op set; backward, after a forward pass. options: those of the launcher."""
    P, ids_tb, W_hh, b_hh, h0, W_out = (on(ops, inputs[name])
                                        for name in ("P", "ids_tb", "W_hh", "b_hh", "h0", "W_out"))
    dlogits_tb = on(ops, inputs["dlogits_tb"], activations=True)
    (T, B), H = ids_tb.shape, W_hh.shape[1]
    saved = ops.gru_saved(T, B, H, W_hh.dtype)
    forward = functools.partial(ops.gru_forward, P, ids_tb, W_hh, b_hh, h0, saved)
    if direction == "forward":
        return runnable(ops, functools.partial(forward, **options), h_tb=saved.h_tb)
    gradients = {name: ops.empty(shape, W_hh.dtype)
                 for name, shape in (("dP", P.shape), ("dW_hh", W_hh.shape), ("db_hh", b_hh.shape), ("dh0", h0.shape))}
    forward()
    return runnable(ops, functools.partial(ops.gru_backward, dlogits_tb, W_out, ids_tb, W_hh, saved,
                                           *gradients.values(), **options), **gradients)


def variants(direction, B, V, H, precision):
    """By variant, the options of the launcher: the stepwise plan and, if it is persistent, the plan of this GPU."""
    gpu = runtime.current_executor().gpu
    if direction == "forward":
        chosen = forward_plan(gpu, B, H, precision)
    else:
        chosen = backward_plan(gpu, B, H, precision, V_out=V, V_in=V)
    stepwise = chosen._replace(variant="stepwise", fused_output_steps=0, sums_on_chip=False)
    return {plan.variant: {"plan": plan} for plan in (stepwise, chosen)}


def plain_forward(library, inputs):
    """A step is a product and then one array after another."""
    xp = library.xp
    P, ids_tb, W_hh, b_hh, h0 = (library.array(inputs[name]) for name in ("P", "ids_tb", "W_hh", "b_hh", "h0"))
    (T, B), H = ids_tb.shape, W_hh.shape[1]
    h_tb, a = xp.empty((T + 1, B, H), W_hh.dtype), xp.empty((B, 3 * H), W_hh.dtype)

    def run():
        h_tb[0] = h0
        for t in range(T):
            i = P[ids_tb[t]]
            library.matmul(h_tb[t], W_hh.T, a)
            biased = a + b_hh
            r, z = (1 / (1 + xp.exp(-(i[:, k * H:(k + 1) * H] + biased[:, k * H:(k + 1) * H]))) for k in (0, 1))
            n = xp.tanh(i[:, 2 * H:] + r * biased[:, 2 * H:])
            h_tb[t + 1] = (1 - z) * n + z * h_tb[t]
        return {"h_tb": h_tb}

    return library.runnable(run)


def torch_of(direction):
    """torch.nn.GRU, cuDNN's on a GPU, on embedded characters."""
    def make(library, inputs):
        torch = library.torch
        x_tb = library.array(inputs["W_emb"][inputs["ids_tb"]], requires_grad=direction == "backward")
        h0 = library.array(inputs["h0"][None], requires_grad=direction == "backward")
        dlogits_tb, W_out = library.array(inputs["dlogits_tb"]), library.array(inputs["W_out"])
        gru = torch_gru(library, inputs)

        @torch.no_grad()
        def forward():
            return {"h_tb": torch.cat([h0, gru(x_tb, h0)[0].float()])}

        if direction == "forward":
            return library.runnable(forward)
        with library.switched():
            y_tb, _ = gru(x_tb, h0)

        def backward():
            dh_tb = (dlogits_tb @ W_out).to(y_tb.dtype)
            wanted = (gru.weight_hh_l0, gru.bias_hh_l0, h0, gru.weight_ih_l0, gru.bias_ih_l0, x_tb)
            dW_hh, db_hh, dh0, *_ = torch.autograd.grad(y_tb, wanted, dh_tb, retain_graph=True)
            return {"dW_hh": dW_hh, "db_hh": db_hh, "dh0": dh0[0]}

        return library.runnable(backward)

    return make


def torch_gru(library, inputs):
    """torch.nn.GRU with the parameters of the inputs."""
    gru = library.torch.nn.GRU(E, inputs["h0"].shape[1]).to(library.kind)
    for name in ("W_ih", "W_hh", "b_ih", "b_hh"):
        weight = getattr(gru, f"{name.replace('W', 'weight').replace('b_', 'bias_')}_l0")
        weight.data.copy_(library.array(inputs[name]))
    return gru


def flashrnn_forward(library, inputs):
    """FlashRNN's GRU on embedded characters, all arrays in its dtype."""
    torch = library.torch
    dtype = torch.bfloat16 if library.precision == "bf16" else torch.float32
    gru = flashrnn_gru(library, torch_gru(library, inputs)).to(dtype)
    x_tb = library.array(inputs["W_emb"][inputs["ids_tb"]]).to(dtype)
    h0 = library.array(inputs["h0"][None]).to(dtype)

    @torch.no_grad()
    def run():
        return {"h_tb": torch.cat([h0, gru(x_tb, h0)[0]])}

    return library.runnable(run)


def benchmark(direction, work):
    def candidates(device, T, B, V, H):
        yield from our_candidates(device, functools.partial(ours, direction),
                                  variants=functools.partial(variants, direction, B, V, H))
        if direction == "forward":
            yield from plain_candidates(device, plain_forward)
            yield from torch_candidates(device, flashrnn_forward, name="FlashRNN", package="flashrnn",
                                        precisions=[precision for precision in ("fp32", "bf16")
                                                    if device.kind == "cuda" and precision in device.precisions])
        yield from torch_candidates(device, torch_of(direction))

    base = {"T": tutorial.T, "B": tutorial.B, "V": tutorial.SIZES.V, "H": tutorial.SIZES.H}
    return Benchmark(f"gru_{direction}", work, inputs, functools.partial(by_reference, direction), candidates,
                     sizes=(base, base | {"H": 256}))


FORWARD = benchmark("forward", floors.gru_forward)
BACKWARD = benchmark("backward", floors.gru_backward)


@pytest.mark.side_by_side(FORWARD)
def test_gru_forward(turn):
    """All states of a window."""
    turn()


@pytest.mark.side_by_side(BACKWARD)
def test_gru_backward(turn):
    """Back through time, and the gradient of the recurrent weights."""
    turn()
