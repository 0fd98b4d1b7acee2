"""Launcher of generate_persistent.cu: text written with weights that stay on chip, as many of them as fit."""

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.gru_persistent import COUNTER_WORDS
from char_gru.kernels.plan.generation import GenerationPlan, padded_width
from char_gru.kernels.plan.recurrence import THREADS
from char_gru.kernels.scratch import scratch
from char_gru.kernels.sizes import ceil_div, round_up


def generate_persistent(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, options: list,
                        plan: GenerationPlan) -> None:
    """`kernels.generate.generate` by a persistent plan, on arguments that are already checked."""
    if len(forced_tr) == 0:
        return
    (layers, R, H), T, V = h.shape, len(forced_tr), len(P)
    width, matrices, padded_units = padded_width(H), 2 * layers - 1, plan.blocks * plan.units
    grid = plan.groups * plan.blocks
    weights = scratch("generate weights", (matrices, padded_units, 3, width // (1 + plan.constants["BF16"])), np.uint32)
    biases = scratch("generate biases", (matrices, padded_units, 3))
    # Only launches that are cut alike share words and the counters of their exchanges.
    cut = f"generate persistent {layers} {R} {V} {H} {plan.groups} {plan.blocks}"
    states = scratch(f"{cut} states", (2, layers, R, width), np.uint64, zeros=True)
    partial_logits = scratch(f"{cut} partial_logits", (2, grid, plan.group_rows, round_up(V, 4)), np.uint64, zeros=True)
    characters = scratch(f"{cut} characters", (2, plan.groups, plan.group_rows, 2), np.uint64, zeros=True)
    counters = scratch(f"{cut} counters", (plan.groups, COUNTER_WORDS), np.uint32, zeros=True)
    for matrix in range(matrices):
        name = f"hh.{matrix // 2}" if matrix % 2 == 0 else f"ih.{matrix // 2 + 1}"
        runtime.launch("generate_persistent", "pack_weights", ceil_div(weights[matrix].size, THREADS), THREADS,
                       [weights[matrix], biases[matrix], params[f"W_{name}"], params[f"b_{name}"], np.int32(H),
                        np.int32(width), np.int32(padded_units)], constants=plan.constants)
    sizes = [T, R, V, H, layers, plan.group_rows, plan.units, plan.gathered_rows, plan.off_chip]
    runtime.launch("generate_persistent", "generate_persistent", grid, THREADS,
                   [h, ids, ids_tr, states, partial_logits, characters, counters, weights, biases, P,
                    params["W_out"], params["b_out"], forced_tr, uniforms_tr, *map(np.int32, sizes), *options],
                   constants=plan.constants, shared_bytes=plan.shared_bytes, cooperative=True)
