"""Launcher of generate_one_text.cu: one text, written with weights that stay in registers."""

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.gru_persistent import COUNTER_WORDS
from char_gru.kernels.plan.generation import GenerationPlan
from char_gru.kernels.plan.recurrence import THREADS
from char_gru.kernels.scratch import scratch
from char_gru.kernels.sizes import round_up


def generate_one_text(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, options: list, plan: GenerationPlan) -> None:
    """`kernels.generate.generate` by the plan of one text, on arguments that are already checked."""
    if len(forced_tr) == 0:
        return
    T, V, H = len(forced_tr), len(P), h.shape[2]
    # Only launches that are cut alike share words and the counters of their exchanges.
    cut = f"generate one text {V} {H} {plan.blocks}"
    states, logits, beginning = (
        scratch(f"{cut} {name}", (2, round_up(words, 2)), np.uint64, zeros=True)
        for name, words in (("states", H), ("logits", V), ("beginning", 2)))
    counters = scratch(f"{cut} counters", (1, COUNTER_WORDS), np.uint32, zeros=True)
    runtime.launch("generate_one_text", "generate_one_text", plan.blocks, THREADS,
                   [h, ids, ids_tr, states, logits, beginning, counters, P, params["W_hh.0"], params["b_hh.0"],
                    params["W_out"], params["b_out"], forced_tr, uniforms_tr, *map(np.int32, (T, V, H)), *options],
                   constants=plan.constants, shared_bytes=plan.shared_bytes, cooperative=True)
