"""Launchers of gru_forward_persistent.cu and gru_backward_persistent.cu: a window of the recurrence in one launch."""

import itertools

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.matmul import PRECISIONS, add_partial_sums
from char_gru.kernels.plan.recurrence import GROUP_PACKETS, PACKET_BYTES, THREADS, WARPS, RecurrencePlan
from char_gru.kernels.scratch import scratch

COUNTER_WORDS = 32  # of 32 bits, from counter to counter, so that each has a line of L2 to itself


def forward(plan: RecurrencePlan, P, ids_tb, W_hh, b_hh, h0, saved) -> None:
    """`kernels.gru.gru_forward` by a persistent plan, on arguments that are already checked."""
    (T, B), H = ids_tb.shape, W_hh.shape[1]
    counters, exchange = _words(plan, plan.groups, _exchange_words(plan))
    runtime.launch("gru_forward_persistent", "gru_forward_persistent", plan.grid, THREADS,
                   [saved.h_tb, saved.gates_tb, saved.a_n_tb, saved.h16_tb, exchange, counters, P, ids_tb, W_hh, b_hh,
                    h0, *map(np.int32, (T, B, H, plan.groups))],
                   constants=constants(plan), shared_bytes=plan.shared_bytes, cooperative=True)


def backward(plan: RecurrencePlan, dy_tb, W_y, ids_tb, W_hh, saved, dP, db_hh, dh0) -> None:
    """`kernels.gru.gru_backward` by a persistent plan, on arguments that are already checked, but without dW_hh, and
    without dP unless `plan.sums_on_chip`. W_y is None unless the plan has `fused_output_steps`."""
    (T, B), H = ids_tb.shape, W_hh.shape[1]
    groups, N, V = plan.groups, 0 if W_y is None else len(W_y), len(dP) if plan.sums_on_chip else 0
    dP_g = scratch("gru_backward dP", (groups, V, 3 * H)) if V and groups > 1 else dP
    db_g = scratch("gru_backward db", (groups, 3 * H)) if groups > 1 else db_hh
    sums = 2 * groups * plan.row_tiles * plan.blocks * plan.rows * plan.units * plan.splits
    counters, exchange, partial_sums = _words(plan, 2 * groups, _exchange_words(plan), sums)
    runtime.launch("gru_backward_persistent", "gru_backward_persistent", plan.grid, THREADS,
                   [saved.da_tb, saved.da16_tb, saved.di_n_tb, dh0, dP_g, db_g, saved.dh_z_b,
                    exchange, partial_sums, counters, dy_tb, W_hh if W_y is None else W_y, W_hh, saved.h_tb,
                    saved.gates_tb, saved.a_n_tb, ids_tb,
                    *map(np.int32, (T, B, H, N, V, groups))],
                   constants=constants(plan), shared_bytes=plan.shared_bytes, cooperative=True)
    if groups > 1:
        add_partial_sums(db_g, db_hh)
        if V:
            add_partial_sums(dP_g, dP)


def constants(plan: RecurrencePlan) -> dict[str, int]:
    """The constants that the kernel of a persistent plan is compiled with."""
    sizes = {"PRECISION": PRECISIONS[plan.precision], "VALUES": plan.values, "ROWS": plan.rows,
             "K_GROUPS": plan.k_groups, "REGISTER_STEPS": plan.register_steps,
             "COLUMNS": plan.unit_columns * plan.units}
    return sizes if plan.direction == "forward" else sizes | {"SPLITS": plan.splits}


def _exchange_words(plan: RecurrencePlan) -> int:
    """Words through which blocks hand each other the operands of a step, for a step and the one after it."""
    packets = plan.splits * WARPS * plan.k_groups * GROUP_PACKETS[plan.precision]
    return 2 * plan.groups * plan.row_tiles * plan.rows * packets * PACKET_BYTES[plan.precision] // 8


def _words(plan: RecurrencePlan, counters: int, *words: int) -> list:
    """So many counters, and arrays of words of 64 bits, zero before the first launch of a plan. They are its own: each
    of its launches leaves in them where the next one goes on (words.cuh)."""
    cut = plan.direction, plan.B, plan.H, plan.groups, plan.blocks, *constants(plan).values()
    parts = list(itertools.accumulate((COUNTER_WORDS // 2 * counters, *words), initial=0))
    array = scratch(f"recurrence {' '.join(map(str, cut))}", (parts[-1],), np.uint64, zeros=True)
    first, *exchanges = (array[begin:end] for begin, end in itertools.pairwise(parts))
    return [first.view(np.uint32), *exchanges]
