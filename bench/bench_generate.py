"""Writing 1,000 characters with the tutorial's model, one text and several at once."""

import functools

import numpy as np
import pytest

from bench import floors, tutorial
from bench.bench_train_step import params_of
from bench.implementations import OURS, installed, on
from bench.peers import onnxruntime_generate, writing_peers
from bench.side_by_side import Benchmark, Candidate, Runnable
from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.kernels.plan.generation import WEIGHTS, generation_plans
from char_gru.rnn import cpu, reference
from char_gru.rnn.config import Sizes
from char_gru.rnn.params import initial_parameters, named_views

TEMPERATURE = 1.0

PARAMETER_SCALE = np.float32(2)
"""Factor of the initial parameters: without it, the model soon repeats one character, and verified texts should vary.
With it, the two largest logits of a verified character at the default sizes lie at least 8e-6 apart, and rounding moves
a logit by at most 2e-6: texts have to be equal."""


def inputs(T, R, V, E, H):
    sizes = Sizes(V, E, H)
    params = named_views(PARAMETER_SCALE * initial_parameters(sizes, "pytorch", 0), sizes)
    return params | {"first_ids_tb": 1 + np.arange(R, dtype=np.int32) % (V - 1), "length_tb": np.array(T)}


def texts(generate, inputs, weights="fp32"):
    """Texts by a library's generate(first_ids, length, temperature); verified at temperature 0, which draws nothing."""
    first_ids, length = inputs["first_ids_tb"], int(inputs["length_tb"])
    return Runnable(lambda: generate(first_ids, length, TEMPERATURE),
                    lambda: {f"{weights}_tr": generate(first_ids, length, 0.0)})


def ours(ops, inputs, **options):
    """The op set's generate on all characters in one call, from ids on the host to ids on the host. options: those of
    the launcher."""
    sizes, params = params_of(inputs)
    T, R = int(inputs["length_tb"]), len(inputs["first_ids_tb"])
    params = {name: on(ops, array) for name, array in params.items()}
    P, h = ops.empty((sizes.V, 3 * sizes.H)), ops.empty((1, R, sizes.H))
    ops.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"], P)
    forced_tr = on(ops, np.full((T, R), -1, np.int32))
    ids, ids_tr = ops.empty((R,), np.int32), ops.empty((T, R), np.int32)
    uniforms_tr, saved = ops.empty((T, R)), ops.generation_saved(R, sizes.H, sizes.V)
    rng = np.random.default_rng(0)

    def generate(first_ids, length, temperature):
        ops.copy_in(h, np.zeros(h.shape, np.float32))
        ops.copy_in(ids, first_ids)
        ops.copy_in(uniforms_tr, rng.random((T, R), np.float32))
        ops.generate(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, saved, temperature=temperature, **options)
        return ops.to_host(ids_tr)

    return texts(generate, inputs, options.get("weights", "fp32"))


def by_reference(inputs):
    """Texts of the model as it is, and with its weights rounded to bf16."""
    sizes, params = params_of(inputs)
    first_ids, shape = inputs["first_ids_tb"], (int(inputs["length_tb"]), len(inputs["first_ids_tb"]))
    P = reference.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"])
    h, forced_tr, uniforms_tr = np.zeros((1, shape[1], sizes.H), np.float32), np.full(shape, -1), np.zeros(shape)
    return {f"{weights}_tr": reference.generate(params, P, h, first_ids, forced_tr, uniforms_tr, temperature=0.0,
                                                weights=weights)[2] for weights in WEIGHTS}


def variants(R, V, H, weights):
    """The variants that the GPU runs at these sizes."""
    plans = generation_plans(runtime.current_executor().gpu, R, V, H, layers=1, weights=weights)
    return [plan.variant for plan in plans]


def candidates(device, T, R, V, E, H):
    if device.kind == "cpu":
        yield Candidate(OURS, "fp32", functools.partial(ours, cpu))
        if installed("onnx", "cpu") and installed("onnxruntime", "cpu"):
            yield Candidate("onnxruntime", "fp32",
                            lambda inputs: texts(onnxruntime_generate(*params_of(inputs)), inputs))
    else:
        for weights in (weights for weights in WEIGHTS if weights in device.precisions):
            for variant in variants(R, V, H, weights):
                yield Candidate(f"{OURS} {variant} {weights}", weights,
                                functools.partial(ours, kernels.op_set("fp32"), variant=variant, weights=weights))
    for peer in writing_peers(device):
        yield of_peer(peer)


def of_peer(peer):
    return Candidate(peer.name, peer.precision,
                     lambda inputs: texts(peer.make(*params_of(inputs)).generate, inputs))


BASE = {"T": 1000, "R": 1, "V": tutorial.SIZES.V, "E": tutorial.SIZES.E, "H": tutorial.SIZES.H}

GENERATE = Benchmark(
    "generate", lambda E, **sizes: floors.generate(**sizes), inputs, by_reference, candidates,
    sizes=(BASE, BASE | {"R": 5}, BASE | {"R": 64}), whole_job=True, tolerances=dict.fromkeys(WEIGHTS, 0.0))


@pytest.mark.side_by_side(GENERATE)
def test_generate(turn):
    """Character after character, each drawn at temperature 1."""
    turn()
