"""Plans and launcher of generate_persistent.cu: text written with weights that stay on chip, or as many as fit."""

import itertools
from collections.abc import Iterator

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.plan.generation import DRAW, GenerationPlan, kib, weights_rate
from char_gru.kernels.plan.gpus import GPU, rates_of
from char_gru.kernels.plan.recurrence import BARRIER_CYCLES, CELL_CYCLES, SHARED_RATE, THREADS, WARPS
from char_gru.kernels.scratch import scratch

VARIANTS = ("persistent", "persistent-parts", "persistent-states")
"""By who draws, as generate_persistent.cu numbers them: the owner of a row; every block, from what all blocks add to
the logits, or from the states and all of W_out."""

MAX_ROWS = 8  # that a warp multiplies its weights with; more do not fit into registers
CHUNK = 128  # k of a stage of the ring
STAGES = (8, 4, 2)
GATES = 3  # of a unit
TILE_UNITS = (1, 2, 4)  # of a warp's tile, which is GATES times as many rows of a matrix
STAGE_LATENCY, L2_LATENCY = 130, 300  # cycles: of a stage of the ring, and of weights that come through L2


def persistent_plans(gpu: GPU, R: int, V: int, H: int, layers: int,
                     weights: str) -> Iterator[tuple[float, GenerationPlan]]:
    """Cycles of a character, and plan, for each of VARIANTS. It may ask for more shared memory than the GPU has.

    More groups read fewer states, each its own, but hold the weights as many times: of the numbers of groups that fit
    and leave each MAX_ROWS rows, the largest whose blocks have the least to multiply; where none fits with all weights
    on chip, the one that takes the fewest cycles. That is found for the first variant; the others take the same groups.
    """
    sizes = R, V, H, layers, weights
    most = max(1, min(R // MAX_ROWS, gpu.multiprocessors))
    plans = [_plan(gpu, -(-R // groups), *sizes) for groups in range(1, most + 1)]
    on_chip = [(work, plan) for work, plan in plans if plan.fits(gpu) and not plan.off_chip]
    fitting = [plan for work, plan in plans if plan.fits(gpu)] or [plan for work, plan in plans]
    owner = (min(on_chip, key=lambda fit: (fit[0], -fit[1].groups))[1] if on_chip else
             min(fitting, key=lambda plan: _cycles(gpu, plan, V, H, layers)))
    # With fewer stages, the product would wait for states where the other variants' does not.
    stages = (owner.constants["STAGES"],)
    for variant in VARIANTS:
        plan = _plan(gpu, owner.group_rows, *sizes, variant, stages)[1]
        yield _cycles(gpu, plan, V, H, layers), plan


def _plan(gpu: GPU, group_rows: int, R: int, V: int, H: int, layers: int, weights: str, variant: str = VARIANTS[0],
          stages: tuple[int, ...] = STAGES) -> tuple[int, GenerationPlan]:
    """What a warp multiplies per k, and the plan with groups of so many rows, in as many of the stages as fit."""
    width, groups, rows = padded_width(H), -(-R // group_rows), tile_rows(group_rows)
    # With fewer units than warps in a block, warps would idle, and drawing would have more parts to sum.
    units = max(WARPS, -(-width // (gpu.multiprocessors // groups)))
    blocks, row_tiles = -(-width // units), -(-group_rows // rows)
    from_states = variant == "persistent-states"
    # A warp has registers for the largest tile by MAX_ROWS, but not for unpacking its weights as well.
    possible = TILE_UNITS[:-1] if rows == MAX_ROWS and weights == "bf16" else TILE_UNITS
    if from_states:
        # Of tiles that leave a warp equally many rows of matrices, the largest passes over the states most rarely.
        warp_rows = {n: sum(-(-count // (GATES * n * WARPS)) * n for count in _matrix_rows(V, layers, units, n, True))
                     for n in possible}
        tile_units = min(warp_rows, key=lambda n: (warp_rows[n], -n))
    elif rows == MAX_ROWS:
        # A tile of 3 * tile_units gates by rows needs as many loads from shared memory as their sum, for as many
        # products as their product: the larger the better, as long as there are tiles for the warps.
        tile_units = possible[-1] if row_tiles * -(-units // 4) >= WARPS else 2
    else:
        # A round of the warps over the states is all latency: the fewest rounds, then the most warps at work.
        tile_units = min(possible, key=lambda n: -(-units // (n * WARPS)))
    tiles = -(-max(_matrix_rows(V, layers, units, tile_units, from_states)) // (GATES * tile_units))
    stage_rows = rows * min(row_tiles, max(1, WARPS // tiles))
    passes = -(-group_rows // stage_rows) * -(-tiles // WARPS)
    # First all columns on chip, with as many stages as fit. W_out is ahead of W_hh only where that is all on chip.
    columns = [0] if from_states else [*range(0, width, CHUNK), width]
    for off_chip, count in itertools.product(columns, stages):
        module = constants(group_rows, weights) | {"UNITS": tile_units, "STAGES": count,
                                                   "DRAWS": VARIANTS.index(variant)}
        shared_bytes = _shared_bytes(V, width, layers, units, group_rows, stage_rows, off_chip, module)
        plan = GenerationPlan(variant, "", module, groups, group_rows, blocks, units, stage_rows, shared_bytes,
                              off_chip)
        if plan.fits(gpu):
            break
    column = (2 * layers - 1) * GATES * units * 4 // (1 + module["BF16"])  # bytes
    held = (f"{column * (width - off_chip) / 1024:.0f} of {kib(column * width)} of {weights} weights a block on chip, "
            "the rest through L2" if off_chip else f"{weights} weights on chip")
    barriers = layers + (variant == "persistent")
    reason = (f"{groups} x {blocks} blocks, {held}, in {kib(shared_bytes)} each, {barriers} "
              f"barrier{'s' * (barriers > 1)} per character")
    return passes * tile_units * rows, plan._replace(reason=reason)


def _matrix_rows(V: int, layers: int, units: int, tile_units: int, from_states: bool) -> list[int]:
    """Rows of the matrices of a block's products in a step: gates of its units, and logits."""
    gates = [GATES * units] * (2 * layers - 1)
    if not from_states:
        return gates
    out_rows = max(V, GATES * tile_units)
    return [*gates, out_rows] if layers > 1 else [gates[0] + out_rows]


def _shared_bytes(V: int, width: int, layers: int, units: int, group_rows: int, stage_rows: int, off_chip: int,
                  module: dict[str, int]) -> int:
    """Dynamic shared memory of write_text, in its order."""
    matrices, gates, from_states = 2 * layers - 1, GATES * units, VARIANTS[module["DRAWS"]] == "persistent-states"
    padded_rows, quads = -(-group_rows // module["ROWS"]) * module["ROWS"], -(-V // 4)
    out_rows = max(V, GATES * module["UNITS"]) * from_states
    floats = [(out_rows + matrices * gates) * (width - off_chip) // (1 + module["BF16"]),
              module["STAGES"] * stage_rows * CHUNK,
              (group_rows if from_states else max(THREADS // quads, 1)) * 4 * quads, layers * units * padded_rows,
              V * gates, V * units * (1 - from_states), out_rows + matrices * gates,
              (gates + max(out_rows, gates if layers > 1 else 0)) * (padded_rows | 1), group_rows]
    return 4 * sum(floats)


def _cycles(gpu: GPU, plan: GenerationPlan, V: int, H: int, layers: int) -> float:
    """What a character of every row takes.

    Behind a barrier hides the product with W_hh, but not with one layer where every block draws: there all follows the
    only barrier. The parts of a row come from all blocks, through L2.
    """
    rates, rows, bf16, width = rates_of(gpu), plan.constants["ROWS"], plan.constants["BF16"], padded_width(H)
    passes, row_tiles = -(-plan.group_rows // plan.stage_rows), -(-plan.group_rows // rows)
    tile, ffma = GATES * plan.constants["UNITS"], rates.multiply["fp32"]

    def product(matrix_rows: int, off_chip: int = 0) -> float:
        """As long as the states through L2, or both operands through shared memory, or weights through L2, or the
        multiply-adds, with an operation more for each weight of bf16; no less than the stages of the ring, and with a
        wait for each chunk of weights that comes through L2."""
        loads = (((width - off_chip) / SHARED_RATE + off_chip / weights_rate(gpu)) * 4 / (1 + bf16)
                 + width * 4 * rows / tile / SHARED_RATE)
        multiply = width * (rows + bf16) / ffma
        rounds = -(-matrix_rows // (tile * WARPS))
        gather = rounds * plan.group_rows * width * 4 / rates.l2
        latency = passes * rounds * -(-width // CHUNK) * STAGE_LATENCY
        return (max(gather, matrix_rows * row_tiles * max(loads, multiply), latency)
                + passes * rounds * -(-off_chip // CHUNK) * L2_LATENCY)

    W_hh = product(GATES * plan.units, plan.off_chip)
    parts = plan.blocks * V * 4 / rates.l2
    logits = plan.group_rows * plan.units * V / ffma  # what a block's units add to them
    first_layer = max(BARRIER_CYCLES, W_hh) if layers > 1 else BARRIER_CYCLES + W_hh
    drawing = {
        "persistent": (BARRIER_CYCLES + max(BARRIER_CYCLES, W_hh) - first_layer + logits
                       + -(-plan.group_rows // plan.blocks) * (parts + DRAW)),
        "persistent-parts": logits + plan.group_rows * (parts + DRAW),
        "persistent-states": product(V) + plan.group_rows * DRAW,
    }
    others = (layers - 1) * (max(BARRIER_CYCLES, W_hh) + W_hh)
    return first_layer + drawing[plan.variant] + others + layers * CELL_CYCLES


def generate_persistent(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, counters, options: list,
                        plan: GenerationPlan) -> None:
    """`kernels.generate.generate`, its arguments checked, as a plan of `persistent_plans` says."""
    layers, R, H = h.shape
    if len(forced_tr) == 0:
        return
    T, V, width, matrices = len(forced_tr), len(P), padded_width(H), 2 * layers - 1
    padded_units = plan.blocks * plan.units
    weights = scratch("generate weights", (matrices, padded_units, 3, width // (1 + plan.constants["BF16"])), np.uint32)
    biases = scratch("generate biases", (matrices, padded_units, 3))
    states = scratch("generate states", (2, layers, R, width))
    logits = scratch("generate logits", (2, plan.groups * plan.blocks, plan.group_rows, -(-V // 4) * 4), zeros=True)
    for matrix in range(matrices):
        of = f"hh.{matrix // 2}" if matrix % 2 == 0 else f"ih.{matrix // 2 + 1}"
        runtime.launch("generate_persistent", "pack", -(-weights[matrix].size // THREADS), THREADS,
                       [weights[matrix], biases[matrix], params[f"W_{of}"], params[f"b_{of}"], np.int32(H),
                        np.int32(width), np.int32(padded_units)], constants=plan.constants)
    sizes = [T, R, V, H, layers, plan.group_rows, plan.units, plan.stage_rows, plan.off_chip]
    runtime.launch("generate_persistent", "write_text", plan.groups * plan.blocks, THREADS,
                   [h, ids, ids_tr, states, logits, counters, weights, biases, P, params["W_out"], params["b_out"],
                    forced_tr, uniforms_tr, *map(np.int32, sizes), *options],
                   constants=plan.constants, shared_bytes=plan.shared_bytes, cooperative=True)


def constants(R: int, weights: str = "fp32") -> dict[str, int]:
    """What generate.cu is compiled with, and generate_persistent.cu for groups of R rows, with UNITS, STAGES, DRAWS."""
    return {"ROWS": tile_rows(R), "BF16": int(weights == "bf16")}


def tile_rows(R: int) -> int:
    """The power of two that is enough for R rows, up to MAX_ROWS."""
    return min(1 << (R - 1).bit_length(), MAX_ROWS)


def padded_width(H: int) -> int:
    """Units of a layer with those that pad it, so that rows of bf16 are multiples of 16 bytes."""
    return -(-H // 8) * 8
