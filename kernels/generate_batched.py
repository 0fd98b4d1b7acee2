"""Launcher of generate_batched.cu: many rows of text, written with tensor cores."""

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.plan.generation import STEP_K, GenerationPlan
from char_gru.kernels.plan.recurrence import THREADS, WARPS
from char_gru.kernels.scratch import scratch
from char_gru.kernels.sizes import ceil_div, round_up


def generate_batched(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, counters, options: list,
                     plan: GenerationPlan) -> None:
    """`kernels.generate.generate` by a batched plan, on arguments that are already checked."""
    if len(forced_tr) == 0:
        return
    (T, R), V, H, rows = forced_tr.shape, len(P), h.shape[2], plan.constants["ROWS"]
    # Zero at k >= H in exchange and at v >= V in partial_logits: no kernel writes there.
    shape = 2, plan.groups, ceil_div(plan.group_rows, rows), WARPS * plan.constants["K_GROUPS"], STEP_K * rows
    exchange = scratch(f"generate batched exchange {H}", shape, np.uint32, zeros=True)
    partial_logits = scratch("generate partial_logits",
                             (plan.groups * plan.blocks, plan.group_rows, round_up(V, 4)), zeros=True)
    runtime.launch("generate_batched", "generate_batched", plan.groups * plan.blocks, THREADS,
                   [h, ids, ids_tr, exchange, partial_logits, counters, P, params["W_hh.0"], params["b_hh.0"],
                    params["W_out"], params["b_out"], forced_tr, uniforms_tr,
                    *map(np.int32, (T, R, V, H, plan.group_rows)), *options],
                   constants=plan.constants, shared_bytes=plan.shared_bytes, cooperative=True)
