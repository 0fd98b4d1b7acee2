"""How text is written on a GPU: which variant of `kernels.generate.generate` runs, how its work is cut, and why.

    stepwise              layers + 2 launches per character, for any sizes (generate.cu)
    one-text              one launch, for one row and layer, weights in registers (generate_one_text.cu)
    persistent            one launch, weights on chip; the owner of a row draws its characters (generate_persistent.cu)
    batched               one launch, for one layer and many rows, on tensor cores (generate_batched.cu)

Each variant has a section below: its plans, the dynamic shared memory of its kernel, and what a character of every row
waits for, in the terms of costs.py.
"""

import functools
import operator
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from char_gru.kernels.plan.costs import Parts, Rates
from char_gru.kernels.plan.gpus import GPU, rates_of
from char_gru.kernels.plan.recurrence import (
    CELL_CYCLES,
    REGISTERS,
    REGISTERS_OTHER,
    THREADS,
    WARPS,
    accumulators,
    operand_registers,
    reduction_bytes,
    weight_registers,
)
from char_gru.kernels.sizes import ceil_div, kib, round_up

WEIGHTS = ("fp32", "bf16")
GATES = 3  # of a unit
STATIC_SHARED_BYTES = 96  # of a block, for drawing
DRAW_CYCLES = 1100  # of latency: two maxima and a scan among the threads of a block; more with top-k or top-p
LITTLE_L2 = (75, 86)  # compute capabilities, times ten, with up to 6 MB of L2: larger weights come from memory

MAX_ROWS = 8  # of states that a warp multiplies its weights with in fp32; more do not fit into registers
ONE_TEXT_CHARACTERS = 257  # most of them: one warp draws, in V^2 / 32 steps with top-k or top-p
ONE_TEXT_REGISTERS = 90  # of a thread, beside weights and sums
WARP_DRAW_CYCLES = 700  # of latency: drawing by one warp
CHUNK = 128  # elements of k that a warp multiplies at a time
CHUNKS = (8, 4, 2, 1)  # of states that are in shared memory at a time
TILE_UNITS = (1, 2, 4)  # of a warp's tile, which is GATES times as many rows of a matrix
WORD_BYTES = 8  # of a state or a partial logit that blocks hand each other, with its tag

STEP_K = 8  # batched: elements of k that a warp multiplies in a step
PRECISION_3XTF32 = 3  # as precision numbers go in the kernels
TILE_ROWS = (16, 32)  # batched: of a tile; with more rows, sums take the registers of weights
FEWEST_ROWS = 9  # batched: of text; with fewer, half of the rows of a fragment would be empty
LOGIT_ROWS = 8  # batched: rows for which a thread sums one logit each
REGISTERS_3XTF32 = {16: 68, 32: 76}  # of a thread, by rows of a tile, as compiled: high and low parts, sums of a step


class GenerationPlan(NamedTuple):
    """How `generate` runs: the variant, the reason for it, and the sizes that its kernel is compiled or called with."""

    variant: str
    reason: str
    constants: dict[str, int]
    groups: int = 0  # of blocks; a group owns some of the rows, and no group waits for another
    group_rows: int = 0  # rows of a group
    blocks: int = 0  # of a group
    units: int = 0  # of a block, in every layer
    gathered_rows: int = 0  # persistent: rows of states that are in shared memory at a time
    shared_bytes: int = 0
    off_chip: int = 0  # persistent: columns of W_hh and W_ih that are read through L2 in every step
    predicted_us: float = 0.0  # of a character of every row

    def fits(self, gpu: GPU) -> bool:
        """Whether a block gets the shared memory that it asks for."""
        return self.shared_bytes + STATIC_SHARED_BYTES <= gpu.shared_bytes


def generation_plan(gpu: GPU, R: int, V: int, H: int, layers: int, weights: str = "fp32",
                    variant: str | None = None) -> GenerationPlan:
    """The quickest of `generation_plans`, or the plan of a variant.

    Raises: ValueError for a variant that none of the plans has.
    """
    plans = generation_plans(gpu, R, V, H, layers, weights)
    for plan in plans:
        if variant in (None, plan.variant):
            return plan
    expected = " or ".join(plan.variant for plan in plans)
    raise ValueError(f"variant: expected {expected}, got {variant!r}: {plans[-1].reason}")


@functools.lru_cache
def generation_plans(gpu: GPU, R: int, V: int, H: int, layers: int,
                     weights: str = "fp32") -> tuple[GenerationPlan, ...]:
    """The best plan of each variant that a GPU can run with these sizes, the quickest first, as predicted."""
    one_text = _one_text_plans(gpu, R, V, H, layers, weights)
    persistent = list(_persistent_plans(gpu, R, V, H, layers, weights))
    batched = sorted(_batched_plans(gpu, R, V, H, layers, weights), key=operator.itemgetter(0))[:1]
    stepwise = (_stepwise_parts(gpu, R, V, H, layers, rates_of(gpu)).cycles,
                GenerationPlan("stepwise", "for any sizes", constants(R, weights)))
    plans = (*one_text, *persistent, *batched, stepwise)
    fitting = sorted([(cycles, plan._replace(predicted_us=rates_of(gpu).microseconds(cycles)))
                      for cycles, plan in plans if plan.fits(gpu)],
                     key=operator.itemgetter(0))
    notes = ["predicted: " + ", ".join(f"{plan.variant} {plan.predicted_us:.1f} us" for _, plan in fitting)
             + " a character"]
    notes += [f"{plan.variant} would take {kib(plan.shared_bytes)} of shared memory a block"
              for _, plan in persistent if not plan.fits(gpu)]
    if layers > 1 and R >= FEWEST_ROWS:
        notes.append("batched is for one layer")
    return tuple(plan._replace(reason="; ".join([plan.reason, *notes])) for _, plan in fitting)


def constants(R: int, weights: str = "fp32") -> dict[str, int]:
    """The constants of generate.cu for R rows; generate_persistent.cu has these, for groups of R rows, and more."""
    return {"ROWS": tile_rows(R), "BF16": int(weights == "bf16")}


def tile_rows(R: int) -> int:
    """The smallest power of two that is not below R, but at most MAX_ROWS."""
    return min(1 << (R - 1).bit_length(), MAX_ROWS)


def padded_width(H: int) -> int:
    """H, padded so that a row of bf16 weights is a multiple of 16 bytes."""
    return round_up(H, 8)


def character_parts(gpu: GPU, plan: GenerationPlan, R: int, V: int, H: int, layers: int, rates: Rates) -> Parts:
    """What a character of R rows waits for."""
    if plan.variant == "batched":
        return _batched_parts(plan, V, rates)
    if plan.variant == "stepwise":
        return _stepwise_parts(gpu, R, V, H, layers, rates)
    if plan.variant == "one-text":
        return _one_text_parts(plan, V, H, rates)
    return _persistent_parts(gpu, plan, V, H, layers, rates)


def _chunks(width: int) -> Iterable[int]:
    """How many chunks of states may be in shared memory at a time: no more than there are."""
    most = ceil_div(width, CHUNK)
    return dict.fromkeys(min(chunks, most) for chunks in CHUNKS)


def _weights_rate(gpu: GPU, rates: Rates) -> float:
    """Bytes of weights off chip that a multiprocessor reads per cycle."""
    return rates.memory if gpu.capability in LITTLE_L2 else rates.l2


def _logits_bytes(V: int) -> int:
    """Shared memory for the logits of one row: several threads share four logits, each with partial sums of its own."""
    quads = ceil_div(V, 4)
    return max(THREADS // quads, 1) * 16 * quads


# ---- Stepwise -------------------------------------------------------------------------------------------------------

def _stepwise_parts(gpu: GPU, R: int, V: int, H: int, layers: int, rates: Rates) -> Parts:
    """A launch for each layer and two for drawing; and for each tile of rows all weights, multiplied as they come
    through L2."""
    weights, rows = ((2 * layers - 1) * GATES * H + V) * H, tile_rows(R)
    product = rates.overlapped(gather=4 / _weights_rate(gpu, rates), multiply=rows / rates.multiply["fp32"])
    return (product * (ceil_div(R, rows) * weights / gpu.multiprocessors)
            + Parts(launch=(layers + 2) * rates.launch, cell=DRAW_CYCLES))


# ---- One text ------------------------------------------------------------------------------------------------------

def _one_text_plans(gpu: GPU, R: int, V: int, H: int, layers: int,
                    weights: str) -> Iterator[tuple[float, GenerationPlan]]:
    """Cycles and plan, where a thread has registers for its weights."""
    if R > 1 or layers > 1 or V > ONE_TEXT_CHARACTERS:
        return
    units = max(WARPS, ceil_div(H, gpu.multiprocessors))
    blocks = ceil_div(H, units)
    outputs, pairs = ceil_div(V, blocks), ceil_div(H, 2 * THREADS)
    rows = GATES * units + outputs
    if max(units, outputs) > 32 or rows * (2 * pairs + 1) + ONE_TEXT_REGISTERS > REGISTERS:
        return
    module = {"BF16": int(weights == "bf16"), "UNITS": units, "OUTPUTS": outputs, "PAIRS": pairs}
    shared_bytes = 4 * (WARPS * (2 * GATES * units + outputs) + V * GATES * units + round_up(V, 2))
    plan = GenerationPlan("one-text", f"{blocks} blocks hold {weights} weights in registers", module, 1, 1, blocks,
                          units, shared_bytes=shared_bytes)
    yield _one_text_parts(plan, V, H, rates_of(gpu)).cycles, plan


def _one_text_parts(plan: GenerationPlan, V: int, H: int, rates: Rates) -> Parts:
    """Two exchanges, of states and of logits; the product with W_hh goes on while logits travel."""
    _, units, outputs, pairs = plan.constants.values()
    product = Parts(multiply=(GATES * units + outputs) * 2 * pairs * THREADS / rates.multiply["fp32"])
    beside = max(Parts(chain=rates.chain), product, key=operator.attrgetter("cycles"))
    return (Parts(chain=rates.chain, gather=WORD_BYTES * (H + V) / rates.l2) + beside
            + Parts(cell=WARP_DRAW_CYCLES + CELL_CYCLES))


# ---- Persistent -----------------------------------------------------------------------------------------------------

def _persistent_plans(gpu: GPU, R: int, V: int, H: int, layers: int,
                      weights: str) -> Iterator[tuple[float, GenerationPlan]]:
    """Cycles and plan; the plan may ask for more shared memory than the GPU has.

    With more groups, a block reads the states of fewer rows, but the weights are held more times. Of the plans
    that fit with all weights on chip and have groups of at least MAX_ROWS rows, the plan is taken whose warps have the
    least to multiply, and of equal ones the plan with the most groups; where none fits so, the plan that takes the
    fewest cycles.
    """
    most = max(1, min(R // MAX_ROWS, gpu.multiprocessors))
    plans = [_persistent_plan(gpu, ceil_div(R, groups), R, V, H, layers, weights) for groups in range(1, most + 1)]
    fitting = [plan for plan in plans if plan.fits(gpu)] or plans
    on_chip = [plan for plan in fitting if plan.fits(gpu) and not plan.off_chip]
    best = (min(on_chip, key=lambda plan: (_warp_work(plan), -plan.groups)) if on_chip else
            min(fitting, key=lambda plan: _persistent_parts(gpu, plan, V, H, layers, rates_of(gpu)).cycles))
    yield (_persistent_parts(gpu, best, V, H, layers, rates_of(gpu)).cycles,
           best._replace(reason=_persistent_reason(best, H, layers, weights)))


def _persistent_plan(gpu: GPU, group_rows: int, R: int, V: int, H: int, layers: int, weights: str) -> GenerationPlan:
    """The plan with groups of `group_rows` rows: as few columns off chip as possible, then as many chunks of states in
    shared memory as fit. If no plan fits, the last one that was tried."""
    width, groups, rows = padded_width(H), ceil_div(R, group_rows), tile_rows(group_rows)
    # With fewer units than warps in a block, warps would idle, and drawing would sum the partial_logits of more blocks.
    units = max(WARPS, ceil_div(width, gpu.multiprocessors // groups))
    row_tiles = ceil_div(group_rows, rows)
    # A warp has no registers for the largest tile by MAX_ROWS. With fewer rows, latency decides how long the warps take
    # for a round: the fewest rounds, then the most warps at work.
    tile_units = 2 if rows == MAX_ROWS else min(TILE_UNITS, key=lambda n: ceil_div(units, n * WARPS))
    gathered_rows = rows * min(row_tiles, max(1, WARPS // ceil_div(units, tile_units)))
    for off_chip in (*range(0, width, CHUNK), width):
        for chunks in _chunks(width):
            module = constants(group_rows, weights) | {"TILE_UNITS": tile_units, "CHUNKS": chunks}
            shared_bytes = _persistent_shared_bytes(V, width, layers, units, group_rows, gathered_rows, off_chip,
                                                    module)
            plan = GenerationPlan("persistent", "", module, groups, group_rows, ceil_div(width, units), units,
                                  gathered_rows, shared_bytes, off_chip)
            if plan.fits(gpu):
                return plan
    return plan


def _warp_work(plan: GenerationPlan) -> int:
    """Units times rows of text that a warp multiplies for each element of k in a product."""
    tile_units = plan.constants["TILE_UNITS"]
    rounds = ceil_div(ceil_div(plan.units, tile_units), WARPS)
    return ceil_div(plan.group_rows, plan.gathered_rows) * rounds * tile_units * plan.constants["ROWS"]


def _persistent_shared_bytes(V: int, width: int, layers: int, units: int, group_rows: int, gathered_rows: int,
                             off_chip: int, module: dict[str, int]) -> int:
    """Dynamic shared memory of generate_persistent, in the order of its Block."""
    matrices, gates, padded_rows = 2 * layers - 1, GATES * units, round_up(group_rows, module["ROWS"])
    floats = [matrices * gates * (width - off_chip) // (1 + module["BF16"]), gathered_rows * module["CHUNKS"] * CHUNK,
              _logits_bytes(V) // 4, layers * units * padded_rows, V * gates, V * units, matrices * gates,
              gates * (padded_rows | 1) * min(layers, 2), group_rows]
    return 4 * sum(floats)


def _persistent_reason(plan: GenerationPlan, H: int, layers: int, weights: str) -> str:
    width = padded_width(H)
    column = (2 * layers - 1) * GATES * plan.units * 4 // (1 + plan.constants["BF16"])  # bytes
    held = f"{weights} weights on chip"
    if plan.off_chip:
        held = (f"{column * (width - plan.off_chip) / 1024:.0f} of {kib(column * width)} of {weights} weights a block "
                "on chip, the rest through L2")
    return f"{plan.groups} x {plan.blocks} blocks, {held}, in {kib(plan.shared_bytes)} each"


def _persistent_parts(gpu: GPU, plan: GenerationPlan, V: int, H: int, layers: int, rates: Rates) -> Parts:
    """The states of a layer travel to all blocks while these multiply with W_hh, in layer 0 while the characters
    travel. The partial_logits of a row come from all blocks, through L2."""
    W_hh, chain = _product_parts(gpu, plan, H, rates), Parts(chain=rates.chain)
    beside_W_hh = max(chain, W_hh, key=operator.attrgetter("cycles"))
    drawing = Parts(gather=plan.blocks * V * WORD_BYTES / rates.l2, cell=DRAW_CYCLES)  # of a row
    publishing = Parts(multiply=plan.group_rows * plan.units * V / rates.multiply["fp32"])  # own partial_logits
    return (publishing + chain + drawing * ceil_div(plan.group_rows, plan.blocks) + beside_W_hh
            + (beside_W_hh + W_hh) * (layers - 1) + Parts(cell=layers * CELL_CYCLES))


def _product_parts(gpu: GPU, plan: GenerationPlan, H: int, rates: Rates) -> Parts:
    """The product of one matrix with the states of a group: the states through L2, with a latency for each further part
    of them. Then, overlapped: both operands through shared memory; weights through L2; the multiply-adds, and one
    operation to unpack each weight of bf16. To these comes a wait for each chunk of weights through L2."""
    rows, bf16, width = plan.constants["ROWS"], plan.constants["BF16"], padded_width(H)
    passes, row_tiles = ceil_div(plan.group_rows, plan.gathered_rows), ceil_div(plan.group_rows, rows)
    gates, tile = GATES * plan.units, GATES * plan.constants["TILE_UNITS"]
    rounds, parts = ceil_div(gates, tile * WARPS), ceil_div(width, plan.constants["CHUNKS"] * CHUNK)
    gathers, weight_bytes = parts * rounds if parts > 1 else 1, 4 / (1 + bf16)
    waits = passes * gathers - 1 + passes * rounds * ceil_div(plan.off_chip, CHUNK)
    states = Parts(gather=gathers / parts * plan.group_rows * width * WORD_BYTES / rates.l2,
                   latency=waits * rates.l2_latency)
    return states + rates.overlapped(
        gather=gates * row_tiles * plan.off_chip * weight_bytes / _weights_rate(gpu, rates),
        weights=gates * row_tiles * ((width - plan.off_chip) * weight_bytes + width * 4 * rows / tile) / rates.shared,
        multiply=gates * row_tiles * width * (rows + bf16) / rates.multiply["fp32"])


# ---- Batched --------------------------------------------------------------------------------------------------------

def _batched_plans(gpu: GPU, R: int, V: int, H: int, layers: int,
                   weights: str) -> Iterator[tuple[float, GenerationPlan]]:
    """Cycles and plan for each cut that fits. For one layer only: a second layer's weights would take the shared memory
    of the first layer's weights."""
    if layers > 1 or R < FEWEST_ROWS or "tf32" not in rates_of(gpu).multiply:
        return
    bf16, k_steps = int(weights == "bf16"), ceil_div(H, WARPS * STEP_K)
    for groups in range(1, min(ceil_div(R, TILE_ROWS[0]), gpu.multiprocessors) + 1):
        group_rows = ceil_div(R, groups)
        if group_rows * (groups - 1) >= R:
            continue  # the last group would own no row
        columns = round_up(GATES * ceil_div(H, gpu.multiprocessors // groups), 8)
        units = columns // GATES
        blocks, step_bytes = ceil_div(H, units), _step_bytes(columns, bf16)
        for rows in TILE_ROWS:
            shared_bytes = (k_steps * step_bytes + reduction_bytes(rows, columns, "tf32")
                            + _batched_other_bytes(V, group_rows, units))
            too_much = max(0, shared_bytes + STATIC_SHARED_BYTES - gpu.shared_bytes)
            register_steps = ceil_div(too_much, step_bytes)
            registers = (REGISTERS_OTHER + REGISTERS_3XTF32[rows] + operand_registers(rows, "tf32")
                         + accumulators(rows, columns) + (register_steps * weight_registers(columns) >> bf16))
            if registers > REGISTERS or register_steps > k_steps:
                continue
            shared_bytes -= register_steps * step_bytes
            module = {"PRECISION": PRECISION_3XTF32, "BF16": bf16, "ROWS": rows, "COLUMNS": GATES * units,
                      "K_GROUPS": k_steps, "REGISTER_STEPS": register_steps}
            reason = (f"{groups} x {blocks} blocks hold {weights} weights on chip, in {kib(shared_bytes)} each, "
                      "1 barrier per character")
            plan = GenerationPlan("batched", reason, module, groups, group_rows, blocks, units,
                                  shared_bytes=shared_bytes)
            yield _batched_parts(plan, V, rates_of(gpu)).cycles, plan


def _step_bytes(columns: int, bf16: int) -> int:
    """Weights that all warps of a block multiply with in a step."""
    return WARPS * STEP_K * columns * 4 >> bf16


def _batched_other_bytes(V: int, group_rows: int, units: int) -> int:
    """Dynamic shared memory of generate_batched for all but its product: logits and states, gates, the block's part of
    P, W_out and b_hh, and characters."""
    padded_rows = round_up(group_rows, LOGIT_ROWS) + 4
    return (_logits_bytes(V) + 4 * units * (padded_rows + GATES * group_rows + (GATES + 1) * V + GATES)
            + 4 * group_rows)


def _batched_parts(plan: GenerationPlan, V: int, rates: Rates) -> Parts:
    """One barrier; the way of the characters overlaps the product of the next step. For each tile of rows,
    gathering the states, multiplying in 3xTF32 and reading the weights overlap; then come the reduction of the warps'
    sums, and the gates. All rows and columns of a tile count, used or not."""
    _, bf16, rows, columns, k_steps, register_steps = plan.constants.values()
    columns, tiles = round_up(columns, 8), ceil_div(plan.group_rows, rows)
    tile = rates.overlapped(
        gather=rows * k_steps * WARPS * STEP_K * 4 / rates.l2,
        multiply=(3 - bf16) * rows * columns * k_steps * WARPS * STEP_K / rates.multiply["tf32"],
        weights=(k_steps - register_steps) * _step_bytes(columns, bf16) / rates.shared)
    tile += Parts(latency=rates.l2_latency, cell=CELL_CYCLES + 2 * WARPS * rows * columns * 4 / rates.shared)
    drawing = Parts(gather=plan.blocks * V * WORD_BYTES / rates.l2, cell=DRAW_CYCLES)  # of a row
    publishing = Parts(multiply=plan.group_rows * plan.units * V / rates.multiply["fp32"])  # own partial_logits
    chains = Parts(chain=rates.barrier + rates.chain)
    return chains + tile * tiles + publishing + drawing * ceil_div(plan.group_rows, plan.blocks)
