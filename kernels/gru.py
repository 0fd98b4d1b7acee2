"""The recurrence over a window and back through time: launchers of gru.cu, and of gru_persistent.py by the plan."""

from typing import Any, NamedTuple

import numpy as np

from char_gru.kernels import gru_persistent, runtime
from char_gru.kernels.input_table import sum_by_id, sum_by_id_scratch_size
from char_gru.kernels.matmul import TILE_THREADS, column_sums, matmul
from char_gru.kernels.matmul import constants as matmul_constants
from char_gru.kernels.plan.recurrence import RecurrencePlan, backward_plan, forward_plan
from char_gru.kernels.scratch import scratch
from char_gru.kernels.sizes import ceil_div

TILE_M, TILE_N = 32, 48  # rows, and columns: forward the three gates of 16 units, backward 48 units for one gate


class GRUSaved(NamedTuple):
    """The arrays that one layer's forward pass leaves to its backward pass, and scratch arrays of both.

    Shapes: h_tb (T+1, B, H): states, `h_tb[0]` the initial one; gates_tb (T, B, 3H): r, z, n; a_n_tb (T, B, H): the
    recurrent product of gate n; da_tb (T, B, 3H) and di_n_tb (T, B, H): gradients, written by the backward pass; h16_tb
    (T, B, H) and da16_tb (T, B, 3H), bfloat16 bits as uint16: the operands of dW_hh, with T = 0 unless the precision is
    bf16; dh_z_b (B, H), products_gb (3, B, H) and arrived (tiles of dh,) uint32: scratch of gru_backward_step, as
    gru.cu says; sorting (sum_by_id_scratch_size(T*B),) int32: scratch of `sum_by_id`. All other arrays are float32.
    """

    h_tb: Any
    gates_tb: Any
    a_n_tb: Any
    da_tb: Any
    di_n_tb: Any
    h16_tb: Any
    da16_tb: Any
    dh_z_b: Any
    products_gb: Any
    arrived: Any
    sorting: Any


def gru_saved(T: int, B: int, H: int, dtype=np.float32, *, precision="fp32") -> GRUSaved:
    """Arrays for `gru_forward` and `gru_backward` in a precision, over windows of up to T steps; the kernels take
    float32 only."""
    def bf16(n: int):
        return runtime.empty((_bf16_steps(T, precision), B, n), np.uint16)

    return GRUSaved(
        h_tb=runtime.empty((T + 1, B, H), dtype), gates_tb=runtime.empty((T, B, 3 * H), dtype),
        a_n_tb=runtime.empty((T, B, H), dtype), da_tb=runtime.empty((T, B, 3 * H), dtype),
        di_n_tb=runtime.empty((T, B, H), dtype), h16_tb=bf16(H), da16_tb=bf16(3 * H),
        dh_z_b=runtime.empty((B, H), dtype),
        products_gb=runtime.empty((3, B, H), dtype), arrived=runtime.zeros((_dh_tiles(B, H),), np.uint32),
        sorting=runtime.empty((sum_by_id_scratch_size(T * B),), np.int32))


def gru_forward(P, ids_tb, W_hh, b_hh, h0, saved: GRUSaved, *, precision="fp32",
                plan: RecurrencePlan | None = None) -> None:
    """One GRU layer over a window; the input product of step t, row b is `P[ids_tb[t, b]]`.

    tf32 and bf16 round the operands of W_hh h, nothing else. The window may be shorter than `saved` was made for.
    `plan` is for tests and benchmarks; the default is the plan of this GPU.

    Shapes: P (N, 3H); ids_tb (T, B) int32, in [0, N); W_hh (3H, H); b_hh (3H,); h0 (B, H), not a view of `saved`;
    result in `saved`: the states `saved.h_tb[:T + 1]`, of which the last is the state to carry on. Floating arrays are
    float32.
    Raises: ValueError.
    Equals: `rnn.reference.gru_forward`.
    """
    check_gru_forward(P, ids_tb, W_hh, b_hh, h0, saved, precision)
    (T, B), H = ids_tb.shape, W_hh.shape[1]
    plan = plan or forward_plan(runtime.current_executor().gpu, B, H, precision)
    if plan.variant == "persistent":
        gru_persistent.forward(plan, P, ids_tb, W_hh, b_hh, h0, saved)
        return
    grid, module = (ceil_div(H, TILE_N // 3), ceil_div(B, TILE_M)), constants(precision)
    for t in range(T):
        runtime.launch("gru", "gru_forward_step", grid, TILE_THREADS,
                       [saved.h_tb, saved.gates_tb, saved.a_n_tb, saved.h16_tb, P, ids_tb, W_hh, b_hh, h0,
                        np.int32(t), np.int32(B), np.int32(H)], constants=module)


def gru_backward(dy_tb, W_y, ids_tb, W_hh, saved: GRUSaved, dP, dW_hh, db_hh, dh0, *, precision="fp32",
                 plan: RecurrencePlan | None = None) -> None:
    """Back through time over the window of the last `gru_forward`. The gradient that reaches each state from outside
    the recurrence is dy_tb W_y; where W_y is None it is dy_tb itself.

    tf32 and bf16 round the operands of dy_tb W_y, of W_hh^T da and of dW_hh, nothing else. `plan` is for tests and
    benchmarks; the default is the plan of this GPU.

    Shapes: dy_tb (T, B, M) and W_y (M, H), which are dlogits_tb and W_out for the layer below the output, or dy_tb
    (T, B, H) and None; ids_tb (T, B) int32; W_hh (3H, H); results dP (N, 3H), dW_hh (3H, H), db_hh (3H,), dh0 (B, H).
    Floating arrays are float32.
    Raises: ValueError.
    Equals: `rnn.reference.gru_backward`.
    """
    check_gru_backward(dy_tb, W_y, ids_tb, W_hh, saved, dP, dW_hh, db_hh, dh0, precision)
    (T, B, M), H = dy_tb.shape, W_hh.shape[1]
    plan = plan or backward_plan(runtime.current_executor().gpu, B, H, precision,
                                 V_out=0 if W_y is None else M, V_in=len(dP))
    if W_y is not None and not plan.fused_output_steps:
        dh_tb = scratch("gru_backward", (T, B, H))
        matmul(dy_tb.reshape(T * B, M), W_y, dh_tb.reshape(T * B, H), precision=precision)
        dy_tb, W_y = dh_tb, None
    if plan.variant == "persistent":
        gru_persistent.backward(plan, dy_tb, W_y, ids_tb, W_hh, saved, dP, db_hh, dh0)
    else:
        _backward_stepwise(dy_tb, W_hh, saved, db_hh, dh0, T, precision)
    da, h = (saved.da_tb, saved.h_tb) if precision != "bf16" else (saved.da16_tb, saved.h16_tb)
    matmul(da[:T].reshape(T * B, 3 * H), h[:T].reshape(T * B, H), dW_hh, transpose_a=True, precision=precision)
    if not plan.sums_on_chip:
        sum_by_id(saved.da_tb[:T], saved.di_n_tb[:T], ids_tb, dP, saved.sorting[:sum_by_id_scratch_size(T * B)])


def _backward_stepwise(dh_tb, W_hh, saved: GRUSaved, db_hh, dh0, T: int, precision: str) -> None:
    """Computes da, di_n, db_hh and dh0 with one launch per time step."""
    B, H = dh0.shape
    grid, module = (ceil_div(H, TILE_N), ceil_div(B, TILE_M), 3), constants(precision)
    for t in range(T - 1, -2, -1):
        runtime.launch("gru", "gru_backward_step", grid, TILE_THREADS,
                       [saved.da_tb, saved.da16_tb, saved.di_n_tb, dh0, saved.dh_z_b, saved.products_gb,
                        saved.arrived, dh_tb, W_hh, saved.h_tb, saved.gates_tb, saved.a_n_tb,
                        *map(np.int32, (t, T, B, H))], constants=module)
    column_sums(saved.da_tb[:T].reshape(T * B, 3 * H), db_hh)


def check_gru_forward(P, ids_tb, W_hh, b_hh, h0, saved: GRUSaved, precision: str) -> None:
    """Check the arrays of `gru_forward`. Raises: ValueError."""
    B, H = ids_tb.shape[1], W_hh.shape[1]
    runtime.check("P", P, np.float32, (len(P), 3 * H))
    runtime.check("b_hh", b_hh, np.float32, (3 * H,))
    runtime.check("h0", h0, np.float32, (B, H))
    _check_both(ids_tb, W_hh, saved, precision)


def check_gru_backward(dy_tb, W_y, ids_tb, W_hh, saved: GRUSaved, dP, dW_hh, db_hh, dh0, precision: str) -> None:
    """Check the arrays of `gru_backward`. Raises: ValueError."""
    (T, B), H = ids_tb.shape, W_hh.shape[1]
    M = H if W_y is None else len(W_y)
    runtime.check("dy_tb", dy_tb, np.float32, (T, B, M))
    if W_y is not None:
        runtime.check("W_y", W_y, np.float32, (M, H))
    runtime.check("dP", dP, np.float32, (len(dP), 3 * H))
    runtime.check("dW_hh", dW_hh, np.float32, (3 * H, H))
    runtime.check("db_hh", db_hh, np.float32, (3 * H,))
    runtime.check("dh0", dh0, np.float32, (B, H))
    _check_both(ids_tb, W_hh, saved, precision)


def _check_both(ids_tb, W_hh, saved: GRUSaved, precision: str) -> None:
    """Check the arrays that both directions take. Raises: ValueError."""
    (T, B), H = ids_tb.shape, W_hh.shape[1]
    T_saved = len(saved.gates_tb)
    if not 1 <= T <= T_saved:
        raise ValueError(f"ids_tb: expected 1 to {T_saved} steps, for which saved was made, got {T}")
    runtime.check("ids_tb", ids_tb, np.int32, (T, B))
    runtime.check("W_hh", W_hh, np.float32, (3 * H, H))
    shapes = {"h_tb": (T_saved + 1, B, H), "gates_tb": (T_saved, B, 3 * H), "a_n_tb": (T_saved, B, H),
              "da_tb": (T_saved, B, 3 * H), "di_n_tb": (T_saved, B, H), "dh_z_b": (B, H), "products_gb": (3, B, H)}
    for name, shape in shapes.items():
        runtime.check(f"saved.{name}", getattr(saved, name), np.float32, shape)
    for name, n in (("h16_tb", H), ("da16_tb", 3 * H)):
        runtime.check(f"saved.{name}", getattr(saved, name), np.uint16, (_bf16_steps(T_saved, precision), B, n))
    runtime.check("saved.arrived", saved.arrived, np.uint32, (_dh_tiles(B, H),))
    runtime.check("saved.sorting", saved.sorting, np.int32, (sum_by_id_scratch_size(T_saved * B),))


def _bf16_steps(T: int, precision: str) -> int:
    """Steps for which the operands of dW_hh are kept in bfloat16."""
    return T if precision == "bf16" else 0


def constants(precision: str) -> dict[str, int]:
    """The constants that gru.cu is compiled with.

    Raises: ValueError for an unknown precision.
    """
    module = matmul_constants(precision)
    return module | {"TILE_M": TILE_M, "TILE_N": TILE_N, "TILE_K": 2 * module["TILE_K"]}


def _dh_tiles(B: int, H: int) -> int:
    """Tiles of dh (B, H) in gru_backward_step."""
    return ceil_div(B, TILE_M) * ceil_div(H, TILE_N)
