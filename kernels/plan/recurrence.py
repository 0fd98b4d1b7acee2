"""How the recurrence runs on a GPU: the cut of its persistent kernels, or stepwise where none fits or pays.

A persistent launch runs all steps of a window, with one block of 256 threads on a multiprocessor. In both directions a
step multiplies rows of the batch, which other blocks have written, with a slice of W_hh that stays on chip:

    forward    a (B, 3H) = h (B, H) W_hh^T      K = H;  a block owns the three gates of its units
    backward   dh (B, H) = da (B, 3H) W_hh      K = 3H; a block owns its units' columns of one part of K

The batch is cut into tiles of `rows`. Of the `groups`, which never wait for each other, each owns `row_tiles` tiles,
one after the other in every step, and all of H. K is cut into `splits`, and each of those among the 8 warps of a block;
a warp takes `k_steps` steps of 8 words: one element of k in a word (fp32, tf32), or two (bf16). With more than one
split, the blocks that share units exchange what they have summed, and each finishes some of the units. The weights of
`register_steps` of the steps stay in registers, those of the others in shared memory. Backward, two things ride along
where that fits and pays: the output layer's share of dh, dlogits W_out, as V more rows of K (`fold_steps`, cut as K
is), and the sums of di by character (`sums_on_chip`).

What a step costs, in cycles of a multiprocessor, whose rates are in RATES:

    barrier          BARRIER; twice where K is split
    for each of the row tiles, the longest of
        gather       rows x K / splits words through L2
        multiply     rows x columns x K / splits, padded
        weights      those in shared memory, read once
      and then
        exchange     rows x columns sums: the others' share written, the own read, through L2
        reduction    rows x columns sums of 8 warps, written to shared memory and read
        gates        GATES: the latency of the first load and the last, arithmetic
    elsewhere        what does not ride along, through memory: 8 B H bytes for dh, 16 B H for di

and never less than what memory takes for the states and gates of a step, 20 B H bytes written forward, 32 B H read and
written backward. Stepwise (gru.cu), a step is a launch, LAUNCH after the last one, whose waves of tiles bring both
operands through L2; as if L2 held W_hh, which flatters it on a GPU with less. What a launch costs once, such as
bringing the weights on chip, is in neither.

Rates and latencies come from data sheets and from other people's measurements; they rank the cuts, and no more.
"""

import functools
import operator
from collections.abc import Iterator
from typing import NamedTuple

from char_gru.kernels.plan.gpus import GPU, precisions, rates_of
from char_gru.kernels.sizes import ceil_div, round_up

WARPS, WORDS = 8, 8  # warps of a block; words of k that a warp multiplies in a step
THREADS = 32 * WARPS
PACK = {"fp32": 1, "tf32": 1, "bf16": 2}  # elements of k per word
ROWS = (16, 32, 64)  # of a tile
SPLITS = (1, 2, 4, 8)  # of K, backward
REGISTERS = 255  # of a thread
REGISTERS_OTHER = 72  # addresses, counters, sums of other warps
REGISTERS_PER_UNIT = {False: 8, True: 12}  # backward or not: what a thread keeps of each row and unit that it finishes
STEPWISE_ROWS, STEPWISE_COLUMNS = 32, 48  # a tile of gru.cu

BARRIER, GATES = 1900, 600  # cycles
LAUNCH = 2.0  # microseconds from one node of a CUDA graph to the next
SHARED_RATE = 128  # bytes per cycle


class RecurrencePlan(NamedTuple):
    """How one direction of one layer runs, and who owns what. Stepwise, everything from `groups` on is 0."""

    variant: str  # "persistent" or "stepwise"
    precision: str
    B: int
    H: int
    K: int  # H forward, 3H backward
    V_out: int = 0  # characters of the output layer, if it lies on top
    V_in: int = 0  # characters that are the inputs of the layer, if it is layer 0
    predicted_us: float = 0.0  # of a step
    reason: str = ""
    groups: int = 0
    blocks: int = 0  # among which a group, and each of its splits, shares the units
    splits: int = 0
    rows: int = 0  # of a tile
    row_tiles: int = 0  # of a group
    units: int = 0  # of a block; even: the two bf16 of a word never come from two blocks
    columns: int = 0  # of a block's product: the gates of its units, padded to a multiple of 8
    k_steps: int = 0  # of a warp
    register_steps: int = 0
    fold_steps: int = 0  # of a warp; 0: another launch computes dlogits W_out
    sums_on_chip: bool = False

    @property
    def gates(self) -> int:
        """Columns of the product for each unit: W_hh, 3H x H, is K rows of it either way."""
        return 3 * self.H // self.K

    @property
    def grid(self) -> int:
        """Blocks of the launch, one per multiprocessor."""
        return self.groups * self.blocks * self.splits

    @property
    def finished_units(self) -> int:
        """Units of a block that it finishes, having the other splits' sums of them; even, as `units`."""
        return round_up(ceil_div(self.units, self.splits), 2)

    @property
    def registers(self) -> int:
        """Of a thread, as estimated."""
        weights = self.register_steps * weight_registers(self.columns)
        finished = ceil_div(self.rows * self.finished_units, THREADS) * REGISTERS_PER_UNIT[self.K > self.H]
        operands = operand_registers(self.rows, self.columns, self.precision)
        return REGISTERS_OTHER + operands + accumulators(self.rows, self.columns) + weights + finished

    @property
    def shared_bytes(self) -> int:
        """Of a block, all of it dynamic."""
        weights = weights_bytes(self.k_steps + self.fold_steps - self.register_steps, self.columns)
        return weights + reduction_bytes(self.rows, self.columns) + gradients_bytes(self)

    def rows_of(self, group: int) -> range:
        """Rows of the batch."""
        return _part(self.row_tiles * self.rows, group, self.B)

    def units_of(self, block: int) -> range:
        """Hidden units, of which the block multiplies with all weights of its part of K."""
        return _part(self.units, block, self.H)

    def finished_of(self, block: int, split: int) -> range:
        """Hidden units whose gates and states, or gradients, the block computes."""
        units = self.units_of(block)
        return units[split * self.finished_units:(split + 1) * self.finished_units]

    def k_of(self, split: int, warp: int) -> range:
        """Part of K that a warp sums."""
        return _part(self.k_steps * WORDS * PACK[self.precision], split * WARPS + warp, self.K)

    def fold_of(self, split: int, warp: int) -> range:
        """Characters whose dlogits times W_out a warp adds to that."""
        return _part(self.fold_steps * WORDS * PACK[self.precision], split * WARPS + warp, self.V_out)


def _part(size: int, index: int, end: int) -> range:
    return range(min(index * size, end), min((index + 1) * size, end))


# What a block takes

def steps_of(n: int, splits: int, precision: str) -> int:
    """Steps in which the warps of all splits get through n of k."""
    return ceil_div(n, splits * WARPS * WORDS * PACK[precision])


def weights_bytes(steps: int, columns: int) -> int:
    """Weights that all warps of a block multiply with in so many steps."""
    return steps * WARPS * WORDS * columns * 4


def weight_registers(columns: int) -> int:
    """Registers of a thread for the weights of one step."""
    return columns // 8 * 2


def accumulators(rows: int, columns: int) -> int:
    """Registers of a thread for its share of a warp's sums."""
    return rows * columns // 32


def operand_registers(rows: int, columns: int, precision: str) -> int:
    """Registers of a thread for what it has gathered and what is on its way, for which resident.cuh has X_STEPS; with
    64 rows, the compiler has been seen to take more."""
    if precision != "fp32":
        return 48 if rows == 64 else 32
    return 2 * rows * (1 if rows * columns > 1024 or rows == 64 else 2)


def reduction_bytes(rows: int, columns: int) -> int:
    """Sums of half the warps of a block, on their way to the other half; rows of sums are padded against bank
    conflicts."""
    padding = 8 if columns % 16 == 0 else 0
    return WARPS // 2 * rows * (columns + padding) * 4


def gradients_bytes(plan: "RecurrencePlan") -> int:
    """Backward: di of a tile and of a block's finished units, their sums by character, and the ids of a tile's rows."""
    if plan.variant == "stepwise" or plan.K == plan.H:
        return 0
    characters = plan.V_in if plan.sums_on_chip else 0
    return (plan.rows + characters) * 3 * plan.finished_units * 4 + plan.rows * 4


# Plans

def forward_plan(gpu: GPU, B: int, H: int, precision: str, *, variant: str = "auto") -> RecurrencePlan:
    """The plan for `gru_forward` with B rows and H units, the quickest there is.

    `variant` is for tests and benchmarks: auto, or persistent or stepwise whatever that costs.

    Raises: ValueError for sizes below 1, for a precision that there is not, or not on this GPU, and where what is to be
    persistent does not fit.
    """
    return _plan(gpu, RecurrencePlan("stepwise", precision, B, H, K=H), variant)


def backward_plan(gpu: GPU, B: int, H: int, precision: str, *, V_out: int = 0, V_in: int = 0,
                  variant: str = "auto") -> RecurrencePlan:
    """The plan for `gru_backward` with B rows and H units, the quickest there is.

    V_out is the number of characters if the output layer lies on top (dlogits W_out may be folded in), V_in if the
    layer's inputs are characters (the sums of di by character may stay on chip); 0 if not.

    Raises: ValueError as `forward_plan`.
    """
    return _plan(gpu, RecurrencePlan("stepwise", precision, B, H, K=3 * H, V_out=V_out, V_in=V_in), variant)


@functools.cache
def _plan(gpu: GPU, stepwise: RecurrencePlan, variant: str) -> RecurrencePlan:
    if variant not in ("auto", "persistent", "stepwise"):
        raise ValueError(f"variant: expected auto, persistent or stepwise, got {variant!r}")
    if min(stepwise.B, stepwise.H) < 1:
        raise ValueError(f"B, H: expected at least 1, got {stepwise.B} and {stepwise.H}")
    if stepwise.precision not in precisions(gpu):
        expected = " or ".join(precisions(gpu))
        raise ValueError(f"precision: expected {expected} on {gpu.name}, got {stepwise.precision!r}")
    stepwise = stepwise._replace(predicted_us=_microseconds(gpu, stepwise, _stepwise_cycles(gpu, stepwise)))
    if variant == "stepwise":
        return stepwise._replace(reason=f"as asked for; predicted {stepwise.predicted_us:.1f} us")
    persistent = list(_persistent_plans(gpu, stepwise))
    fitting = [plan for plan in persistent if plan.registers <= REGISTERS and plan.shared_bytes <= gpu.shared_bytes]
    if not fitting:
        smallest = min(persistent, key=operator.attrgetter("shared_bytes"))
        misfit = (f"nothing persistent fits: cut for {gpu.multiprocessors} multiprocessors, W_hh takes "
                  f"{_kib(smallest.shared_bytes)} of shared memory a block, of {_kib(gpu.shared_bytes)}, and "
                  f"{smallest.registers} registers a thread, of {REGISTERS}")
        if variant == "persistent":
            raise ValueError(f"variant: {misfit}")
        return stepwise._replace(reason=f"{misfit}; predicted {stepwise.predicted_us:.1f} us")
    cycles = [_persistent_cycles(gpu, plan) for plan in fitting]
    best = fitting[cycles.index(min(cycles))]
    best = best._replace(predicted_us=_microseconds(gpu, best, min(cycles)))
    reason = f"{_cut(best)}; predicted {best.predicted_us:.1f} us, stepwise {stepwise.predicted_us:.1f} us"
    chosen = stepwise if variant == "auto" and stepwise.predicted_us < best.predicted_us else best
    return chosen._replace(reason=reason)


def _persistent_plans(gpu: GPU, stepwise: RecurrencePlan) -> Iterator[RecurrencePlan]:
    """All cuts with a multiprocessor for every block, whether or not registers and shared memory are enough. Of equally
    good ones, the first is the one to take."""
    _, precision, B, H, K, V_out, V_in, *_ = stepwise
    for rows in ROWS:
        tiles = ceil_div(B, rows)
        for groups in range(1, min(tiles, gpu.multiprocessors) + 1):
            row_tiles = ceil_div(tiles, groups)
            if ceil_div(tiles, row_tiles) < groups:
                continue  # the last group would own nothing
            for splits in SPLITS if K > H else (1,):
                most_blocks = gpu.multiprocessors // (groups * splits)
                if most_blocks == 0:
                    continue
                columns = round_up(stepwise.gates * round_up(ceil_div(H, most_blocks), 2), 8)
                units, k_steps = columns // stepwise.gates // 2 * 2, steps_of(K, splits, precision)
                plan = stepwise._replace(
                    variant="persistent", groups=groups, blocks=ceil_div(H, units), splits=splits, rows=rows,
                    row_tiles=row_tiles, units=units, columns=columns, k_steps=k_steps)
                most = 0 if precision == "fp32" else min(
                    k_steps, max(REGISTERS - plan.registers, 0) // weight_registers(columns))
                for fold_steps in (steps_of(V_out, splits, precision), 0) if V_out else (0,):
                    for sums_on_chip in (True, False) if V_in else (False,):
                        plan = plan._replace(register_steps=0, fold_steps=fold_steps, sums_on_chip=sums_on_chip)
                        too_much = max(plan.shared_bytes - gpu.shared_bytes, 0)
                        fewest = min(ceil_div(too_much, weights_bytes(1, columns)), most)
                        # More in registers is quicker where shared memory is what limits a step.
                        for register_steps in sorted({fewest, (fewest + most) // 2, most}):
                            yield plan._replace(register_steps=register_steps)


def _cut(plan: RecurrencePlan) -> str:
    groups = f"{plan.groups} group{'s' * (plan.groups > 1)} of {plan.blocks * plan.splits} blocks"
    splits = f", K cut in {plan.splits}" if plan.splits > 1 else ""
    in_registers = weights_bytes(plan.register_steps, plan.columns)
    registers = f" ({_kib(in_registers)} in registers)" if in_registers else ""
    return (f"{groups}{splits}: W_hh takes {_kib(weights_bytes(plan.k_steps, plan.columns))} a block{registers}, "
            f"a step gathers {_kib(_gathered_bytes(plan) * plan.row_tiles)} per block")


# Costs

def _persistent_cycles(gpu: GPU, plan: RecurrencePlan) -> float:
    rates, sums = rates_of(gpu), plan.rows * plan.columns
    steps = plan.k_steps + plan.fold_steps
    gather = _gathered_bytes(plan) / rates.l2
    multiply = sums * steps * WARPS * WORDS * PACK[plan.precision] / rates.multiply[plan.precision]
    weights = weights_bytes(steps - plan.register_steps, plan.columns) / SHARED_RATE
    exchange = 2 * sums * 4 * (plan.splits - 1) / plan.splits / rates.l2
    reduction = 2 * WARPS * sums * 4 / SHARED_RATE
    barriers = BARRIER * (2 if plan.splits > 1 else 1)
    tile = max(gather, multiply, weights) + exchange + reduction + GATES
    return barriers + plan.row_tiles * tile + _elsewhere_cycles(gpu, plan)


def _stepwise_cycles(gpu: GPU, plan: RecurrencePlan) -> float:
    rates = rates_of(gpu)
    units, splits = STEPWISE_COLUMNS // plan.gates, plan.K // plan.H  # backward, each gate has a block of its own
    tiles = ceil_div(plan.B, STEPWISE_ROWS) * ceil_div(plan.H, units) * splits
    gather = (STEPWISE_ROWS + STEPWISE_COLUMNS) * plan.H * 4 / rates.l2
    multiply = STEPWISE_ROWS * STEPWISE_COLUMNS * plan.H / rates.multiply[plan.precision]
    waves = ceil_div(tiles, gpu.multiprocessors)
    return LAUNCH * rates.gigahertz * 1000 + waves * (max(gather, multiply) + GATES) + _elsewhere_cycles(gpu, plan)


def _elsewhere_cycles(gpu: GPU, plan: RecurrencePlan) -> float:
    """What other launches take, per step, for what the plan leaves to them."""
    moved = (8 if plan.V_out and not plan.fold_steps else 0) + (16 if plan.V_in and not plan.sums_on_chip else 0)
    return _memory_cycles(gpu, moved * plan.B * plan.H)


def _microseconds(gpu: GPU, plan: RecurrencePlan, cycles: float) -> float:
    """Of a step that takes so many cycles, or as long as memory takes for what it moves."""
    moved = (20 if plan.K == plan.H else 32) * plan.B * plan.H
    return max(cycles, _memory_cycles(gpu, moved)) / (rates_of(gpu).gigahertz * 1000)


def _memory_cycles(gpu: GPU, size: int) -> float:
    return size / (gpu.multiprocessors * rates_of(gpu).memory)


def _gathered_bytes(plan: RecurrencePlan) -> float:
    """What a block gathers for each row tile."""
    k = plan.K + (plan.V_out if plan.fold_steps else 0)
    return min(plan.rows, plan.B) * k / plan.splits * 4 / PACK[plan.precision]


def _kib(size: float) -> str:
    return f"{size / 2**10:.0f} KiB"
