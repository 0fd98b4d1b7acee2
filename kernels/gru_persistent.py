"""Launchers of gru_forward_persistent.cu and gru_backward_persistent.cu: a window of the recurrence in one launch."""

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.matmul import PRECISIONS, add_partial_sums
from char_gru.kernels.plan.recurrence import THREADS, WARPS, WORDS, RecurrencePlan
from char_gru.kernels.scratch import scratch

COUNTER_WORDS = 32  # from counter to counter, so that each has a line of L2 to itself


def forward(plan: RecurrencePlan, P, ids_tb, W_hh, b_hh, h0, saved) -> None:
    """`kernels.gru.gru_forward` by a persistent plan, on arguments that are already checked."""
    (T, B), H = ids_tb.shape, W_hh.shape[1]
    runtime.launch("gru_forward_persistent", "gru_forward_persistent", plan.grid, THREADS,
                   [saved.h_tb, saved.gates_tb, saved.a_n_tb, saved.h16_tb, _exchange("gru_forward", plan),
                    _counters("gru_forward", plan.groups), P, ids_tb, W_hh, b_hh, h0, np.int32(T), np.int32(B),
                    np.int32(H), np.int32(plan.groups)],
                   constants=constants(plan), shared_bytes=plan.shared_bytes, cooperative=True)


def backward(plan: RecurrencePlan, dy_tb, W_y, ids_tb, W_hh, saved, dP, db_hh, dh0) -> None:
    """`kernels.gru.gru_backward` by a persistent plan, on arguments that are already checked, but without dW_hh, and
    without dP unless `plan.sums_on_chip`. W_y is None unless the plan has `fused_output_steps`."""
    (T, B), H = ids_tb.shape, W_hh.shape[1]
    groups, N, V = plan.groups, 0 if W_y is None else len(W_y), len(dP) if plan.sums_on_chip else 0
    dP_g = scratch("gru_backward dP", (groups, V, 3 * H)) if V and groups > 1 else dP
    db_g = scratch("gru_backward db", (groups, 3 * H)) if groups > 1 else db_hh
    tiles = groups * plan.row_tiles
    partial_sums = scratch("gru_backward partial sums",
                           (tiles, plan.blocks, plan.splits, plan.rows, plan.units))
    runtime.launch("gru_backward_persistent", "gru_backward_persistent", plan.grid, THREADS,
                   [saved.da_tb, saved.da16_tb, saved.di_n_tb, dh0, dP_g, db_g, saved.dh_z_b,
                    _exchange("gru_backward", plan), partial_sums,
                    _counters("gru_backward", groups), _counters("gru_backward ranges", groups * plan.blocks), dy_tb,
                    W_hh if W_y is None else W_y, W_hh, saved.h_tb, saved.gates_tb, saved.a_n_tb, ids_tb,
                    *map(np.int32, (T, B, H, N, V, groups))],
                   constants=constants(plan), shared_bytes=plan.shared_bytes, cooperative=True)
    if groups > 1:
        add_partial_sums(db_g, db_hh)
        if V:
            add_partial_sums(dP_g, dP)


def constants(plan: RecurrencePlan) -> dict[str, int]:
    """The constants that the kernel of a persistent plan is compiled with."""
    sizes = {"PRECISION": PRECISIONS[plan.precision], "ROWS": plan.rows, "K_STEPS": plan.k_steps,
             "REGISTER_STEPS": plan.register_steps, "COLUMNS": plan.unit_columns * plan.units}
    return sizes if plan.direction == "forward" else sizes | {"SPLITS": plan.splits}


def _exchange(op: str, plan: RecurrencePlan):
    """The array through which blocks hand each other the operands of the next step. Elements at k >= K stay zero: no
    launch in this precision and with this K writes there."""
    steps = plan.splits * WARPS * plan.k_steps
    shape = 2, plan.groups * plan.row_tiles, steps, plan.rows * WORDS
    return scratch(f"{op} {plan.precision} {plan.K}", shape, np.uint32, zeros=True)


def _counters(op: str, groups: int):
    """A barrier's counters for each group, zero before and after a launch (barrier.cuh)."""
    return scratch(f"{op} counters", (groups, COUNTER_WORDS), np.uint32, zeros=True)
