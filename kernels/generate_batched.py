"""Plan and launcher of generate_batched.cu: many rows of text, written with tensor cores."""

from collections.abc import Iterator

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.plan.generation import DRAW, STATIC_SHARED_BYTES, GenerationPlan, kib
from char_gru.kernels.plan.gpus import GPU
from char_gru.kernels.plan.recurrence import (
    BARRIER_CYCLES,
    CELL_CYCLES,
    REGISTERS,
    REGISTERS_OTHER,
    SHARED_RATE,
    THREADS,
    WARPS,
    WORDS,
    accumulators,
    operand_registers,
    rates_of,
    reduction_bytes,
    steps_of,
    weight_registers,
    weights_bytes,
)
from char_gru.kernels.scratch import scratch

PRECISION = 3  # of resident.cuh: fp32 in parts
TILES = (16, 32)  # rows of a tile; with more, sums take the registers of weights
FEWEST_ROWS = 9  # below, half of a fragment's rows would idle
LOGIT_ROWS = 8  # of which a thread sums one logit
REGISTERS_OF_PARTS = {16: 68, 32: 76}  # of a thread, by the rows of a tile, as seen: parts of operands, a step's sums


def batched_plans(gpu: GPU, R: int, V: int, H: int, layers: int,
                  weights: str) -> Iterator[tuple[float, GenerationPlan]]:
    """Cycles of a character, and plan, for each cut that fits. For one layer only: the weights of a second one would
    take the room of the first one's."""
    if layers > 1 or R < FEWEST_ROWS or "tf32" not in rates_of(gpu).multiply:
        return
    bf16, k_steps = int(weights == "bf16"), steps_of(H, 1, "tf32")
    for groups in range(1, min(-(-R // TILES[0]), gpu.multiprocessors) + 1):
        group_rows = -(-R // groups)
        if group_rows * (groups - 1) >= R:
            continue  # the last group would own nothing
        columns = -(-3 * -(-H // (gpu.multiprocessors // groups)) // 8) * 8
        units = columns // 3
        blocks, step_bytes = -(-H // units), weights_bytes(1, columns) >> bf16
        for rows in TILES:
            shared_bytes = k_steps * step_bytes + reduction_bytes(rows, columns) + _other_bytes(V, group_rows, units)
            too_much = max(0, shared_bytes + STATIC_SHARED_BYTES - gpu.shared_bytes)
            register_steps = -(-too_much // step_bytes)
            registers = (REGISTERS_OTHER + REGISTERS_OF_PARTS[rows] + operand_registers(rows, columns, "tf32")
                         + accumulators(rows, columns) + (register_steps * weight_registers(columns) >> bf16))
            if registers > REGISTERS or register_steps > k_steps:
                continue
            shared_bytes -= register_steps * step_bytes
            module = {"PRECISION": PRECISION, "BF16": bf16, "ROWS": rows, "COLUMNS": 3 * units, "K_STEPS": k_steps,
                      "REGISTER_STEPS": register_steps}
            reason = (f"{groups} x {blocks} blocks hold {weights} weights on chip, in {kib(shared_bytes)} each, "
                      "2 barriers per character")
            plan = GenerationPlan("batched", reason, module, groups, group_rows, blocks, units,
                                  shared_bytes=shared_bytes)
            yield _cycles(gpu, plan, V), plan


def generate_batched(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, counters, options: list,
                     plan: GenerationPlan) -> None:
    """`kernels.generate.generate`, its arguments checked, as a batched plan says."""
    if len(forced_tr) == 0:
        return
    (T, R), V, H, rows = forced_tr.shape, len(P), h.shape[2], plan.constants["ROWS"]
    # Zero where k lies behind H, and where logits lie behind V: nobody writes there.
    shape = 2, plan.groups, -(-plan.group_rows // rows), WARPS * plan.constants["K_STEPS"], WORDS * rows
    exchange = scratch(f"generate batched exchange {H}", shape, np.uint32, zeros=True)
    logits = scratch("generate logits", (plan.groups * plan.blocks, plan.group_rows, -(-V // 4) * 4), zeros=True)
    runtime.launch("generate_batched", "write_text", plan.groups * plan.blocks, THREADS,
                   [h, ids, ids_tr, exchange, logits, counters, P, params["W_hh.0"], params["b_hh.0"], params["W_out"],
                    params["b_out"], forced_tr, uniforms_tr, *map(np.int32, (T, R, V, H, plan.group_rows)), *options],
                   constants=plan.constants, shared_bytes=plan.shared_bytes, cooperative=True)


def _other_bytes(V: int, group_rows: int, units: int) -> int:
    """Shared memory for logits and states, gates, and the block's part of P, W_out and b_hh."""
    quads, padded_rows = -(-V // 4), -(-group_rows // LOGIT_ROWS) * LOGIT_ROWS + 4
    return 4 * (max(THREADS // quads, 1) * 4 * quads + units * (padded_rows + 3 * group_rows + 4 * V + 3))


def _cycles(gpu: GPU, plan: GenerationPlan, V: int) -> float:
    """What a character of every row takes. The barrier behind the drawing is over before the product that follows."""
    rates, drawn = rates_of(gpu), -(-plan.group_rows // plan.blocks)
    logits = plan.group_rows * plan.units * V / rates.multiply["fp32"]  # what a block's units add to them
    drawing = drawn * (DRAW + plan.blocks * V * 4 / rates.l2)
    return BARRIER_CYCLES + CELL_CYCLES + _product_cycles(gpu, plan) + logits + drawing


def _product_cycles(gpu: GPU, plan: GenerationPlan) -> float:
    """For each tile, the longest of gathering the states, multiplying their parts with those of the weights, and
    reading the weights; then the sums of the warps. All rows and columns of a tile count, used or not. A tile after the
    first one has its latency for itself, as long as that of the gates."""
    rates, (_, bf16, rows, columns, k_steps, register_steps) = rates_of(gpu), plan.constants.values()
    columns, tiles = -(-columns // 8) * 8, -(-plan.group_rows // rows)
    gather = rows * k_steps * WARPS * WORDS * 4 / rates.l2
    multiply = (3 - bf16) * rows * columns * k_steps * WARPS * WORDS / rates.multiply["tf32"]
    shared = (weights_bytes(k_steps - register_steps, columns) >> bf16) / SHARED_RATE
    reduction = 2 * WARPS * rows * columns * 4 / SHARED_RATE
    return tiles * (max(gather, multiply, shared) + reduction) + (tiles - 1) * CELL_CYCLES
