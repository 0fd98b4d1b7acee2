"""Launcher of generate_batched.cu: many rows of text, written with tensor cores."""

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.gru_persistent import COUNTER_WORDS
from char_gru.kernels.plan.generation import STEP_K, GenerationPlan
from char_gru.kernels.plan.recurrence import THREADS, WARPS
from char_gru.kernels.scratch import scratch
from char_gru.kernels.sizes import ceil_div, round_up


def generate_batched(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, options: list,
                     plan: GenerationPlan) -> None:
    """`kernels.generate.generate` by a batched plan, on arguments that are already checked."""
    if len(forced_tr) == 0:
        return
    (T, R), V, H, rows = forced_tr.shape, len(P), h.shape[2], plan.constants["ROWS"]
    # Zero at k >= H in exchange: no kernel writes there.
    shape = 2, plan.groups, ceil_div(plan.group_rows, rows), WARPS * plan.constants["K_GROUPS"], STEP_K * rows
    exchange = scratch(f"generate batched exchange {H}", shape, np.uint32, zeros=True)
    # Only launches that are cut alike share words and the counters of their exchanges.
    cut, grid = f"generate batched {R} {V} {H} {plan.groups} {plan.blocks}", plan.groups * plan.blocks
    partial_logits = scratch(f"{cut} partial_logits", (2, grid, plan.group_rows, round_up(V, 4)), np.uint64, zeros=True)
    characters = scratch(f"{cut} characters", (2, plan.groups, plan.group_rows, 2), np.uint64, zeros=True)
    numbers = scratch(f"{cut} numbers", (plan.groups, COUNTER_WORDS), np.uint32, zeros=True)
    counters = scratch("generate batched counters", (plan.groups, COUNTER_WORDS), np.uint32, zeros=True)
    runtime.launch("generate_batched", "generate_batched", grid, THREADS,
                   [h, ids, ids_tr, exchange, partial_logits, characters, numbers, counters, P, params["W_hh.0"],
                    params["b_hh.0"], params["W_out"], params["b_out"], forced_tr, uniforms_tr,
                    *map(np.int32, (T, R, V, H, plan.group_rows)), *options],
                   constants=plan.constants, shared_bytes=plan.shared_bytes, cooperative=True)
