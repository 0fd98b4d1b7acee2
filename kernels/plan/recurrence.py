"""How the recurrence runs on a GPU: the cut of its persistent kernels, or stepwise where none fits or pays.

A persistent launch runs all steps of a window, with one block of 256 threads on a multiprocessor. In both directions a
step multiplies rows of the batch, which other blocks have written, with a slice of W_hh that stays on chip:

    forward    a (B, 3H) = h (B, H) W_hh^T      K = H;  a block owns the three gates of its units
    backward   dh (B, H) = da (B, 3H) W_hh      K = 3H; a block owns its units' columns of one part of K

The batch is cut into tiles of `rows` rows. The `groups` never wait for each other; each owns `row_tiles` tiles, one
after the other in every step, and all of H. Blocks hand each other rows of packets of `values` elements of k
(kernels/exchange.cuh). K is cut into `splits` parts, one for each block of a range of units, and a part is cut
among the 8 warps of a block, each of which takes `k_groups` groups of its packets, in `k_steps` steps of its product.
With more than one split (split-K), the blocks of a range exchange their partial sums, and each finishes some of the
units. The weights of `register_steps` of the steps stay in registers, the weights of the other
steps in shared memory. The backward launch may do two more things, where they fit and pay: add the output layer's
share of dh, dlogits W_out, as V more rows of K (`fused_output_steps` steps of each warp), and sum di by character
(`sums_on_chip`).

A step costs, in the terms of costs.py:

    chain            from the store of a word with a tag to the poll that finds it; once more where K is split
    for each of the row tiles, overlapped,
        gather       rows x K / splits words through L2
        multiply     rows x columns x K / splits, padded
        weights      the weights in shared memory, read once
        issue        the product's instructions beside FFMA, counted in the machine code: of tensor cores, loads of
                     weights, and INSTRUCTIONS_PER_VALUE for each gathered value
      and then
        gather       where K is split: rows x columns partial sums as words of 8 bytes, those of the other splits' units
                     written, as many read
        cell         rows x columns sums of 8 warps, written to shared memory and read; CELL_CYCLES
    elsewhere        other launches, where they compute dh or di, through memory: 8 B H bytes for dh, 16 B H for di

A chain passes while the block loads and saves the numbers of its elements, INSTRUCTIONS_PER_ELEMENT each, and works on
the other row tiles of its group. A step is never shorter than memory takes for its states and gates, 20 B H bytes
written forward, 32 B H read and written backward. Stepwise (gru.cu), a step is a launch whose waves of tiles bring both
operands through L2; as if L2 held W_hh, which flatters it on a GPU with a smaller L2. Neither estimate includes the
costs that arise once per launch, such as bringing the weights on chip: training_step.py adds them.
"""

import functools
import itertools
import operator
from collections.abc import Iterator
from typing import NamedTuple

from char_gru.kernels.plan.costs import Parts, Rates
from char_gru.kernels.plan.gpus import GPU, precisions, rates_of
from char_gru.kernels.sizes import ceil_div, kib, round_up

WARPS = 8  # of a block
THREADS = 32 * WARPS
ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}  # of an operand
PACKET_BYTES = {"fp32": 16, "tf32": 8, "bf16": 8}
GROUP_PACKETS = {"fp32": 4, "tf32": 8, "bf16": 16}  # packets of a row that a warp loads together
GROUP_STEPS = {"fp32": 1, "tf32": 3, "bf16": 3}  # steps of a product that it makes of them
ROWS = (16, 32)  # of a tile
SPLITS = (1, 2, 4, 8)  # of K, backward
REGISTERS = 255  # of a thread
REGISTERS_OTHER = 72  # of a thread: addresses, counters, sums of other warps
REGISTERS_PER_ELEMENT = {"forward": 8, "backward": 12}  # of a thread; an element: a row and a unit that it finishes
STEPWISE_ROWS, STEPWISE_COLUMNS = 32, 48  # a tile of gru.cu

CELL_CYCLES = 400  # of a row tile: the latency of its gates, and three barriers of the block
INSTRUCTIONS_PER_VALUE = 2  # of a thread, for a gathered value: its share of a word loaded, compared, unpacked
INSTRUCTIONS_PER_ELEMENT = {"forward": 115, "backward": 200}  # of a thread, to load and save the numbers of an element


class RecurrencePlan(NamedTuple):
    """How one direction of one layer runs, and which block owns which rows, units and part of K. Stepwise, everything
    from `groups` on is 0."""

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
    blocks: int = 0  # of a group and a split: each owns some of the units
    splits: int = 0
    rows: int = 0  # of a tile
    row_tiles: int = 0  # of a group
    units: int = 0  # of a block
    columns: int = 0  # of a block's product: unit_columns for each of its units, padded to a multiple of 8
    register_steps: int = 0
    fused_output_steps: int = 0  # of a warp; 0: another launch computes dlogits W_out
    sums_on_chip: bool = False  # of di by character; False: another launch computes them

    @property
    def direction(self) -> str:
        """`forward` or `backward`."""
        return "forward" if self.K == self.H else "backward"

    @property
    def unit_columns(self) -> int:
        """Columns of the product for each unit: forward the three gates, backward 1."""
        return 3 * self.H // self.K

    @property
    def grid(self) -> int:
        """Blocks of the launch, one per multiprocessor."""
        return self.groups * self.blocks * self.splits

    @property
    def finished_units(self) -> int:
        """Units that a block takes through the gates, with the partial sums of the other splits."""
        return ceil_div(self.units, self.splits)

    @property
    def values(self) -> int:
        """Elements of k of a packet. Forward these are units of a block, and packets that are not full take memory for
        weights, which fp32 cannot keep in registers: so there, there are only two. Backward they are a unit's gates."""
        return 2 if self.precision == "fp32" and self.direction == "forward" else 3

    @property
    def packets(self) -> int:
        """Packets of a row of the batch."""
        return self.blocks * ceil_div(self.units, self.values) if self.direction == "forward" else self.H

    @property
    def k_groups(self) -> int:
        """Groups of packets that a warp multiplies."""
        return ceil_div(self.packets, self.splits * WARPS * GROUP_PACKETS[self.precision])

    @property
    def step_k(self) -> int:
        """Elements of k that a warp multiplies in a step."""
        return GROUP_PACKETS[self.precision] * self.values // GROUP_STEPS[self.precision]

    @property
    def k_steps(self) -> int:
        """Steps of a warp's product."""
        return self.k_groups * GROUP_STEPS[self.precision]

    @property
    def finished_elements(self) -> int:
        """Rows and units that a thread takes through the gates: forward those of a word together."""
        together = self.values if self.direction == "forward" else 1
        return ceil_div(self.rows * ceil_div(self.finished_units, together), THREADS) * together

    @property
    def registers(self) -> int:
        """Estimated registers of a thread."""
        weights = self.register_steps * weight_registers(self.columns)
        finished = self.finished_elements * REGISTERS_PER_ELEMENT[self.direction]
        operands = operand_registers(self.rows, self.precision)
        return REGISTERS_OTHER + operands + accumulators(self.rows, self.columns) + weights + finished

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block of the persistent launch, all of it dynamic."""
        if self.variant == "stepwise":
            return 0
        weights = self.weights_bytes(self.k_steps + self.fused_output_steps - self.register_steps)
        return weights + reduction_bytes(self.rows, self.columns, self.precision) + gradients_bytes(self)

    def weights_bytes(self, steps: int) -> int:
        """Weights that all warps of a block multiply with in a number of steps."""
        return steps * WARPS * self.step_k * self.columns * ELEMENT_BYTES[self.precision]

    def with_fused_output(self) -> "RecurrencePlan":
        """The plan with as many `fused_output_steps` as `V_out` needs."""
        return self._replace(fused_output_steps=ceil_div(self.V_out, self.splits * WARPS * self.step_k))

    def rows_of(self, group: int) -> range:
        """Rows of the batch that a group owns."""
        return _part(self.row_tiles * self.rows, group, self.B)

    def units_of(self, block: int) -> range:
        """Hidden units whose columns of W_hh the block multiplies with, in its part of K."""
        return _part(self.units, block, self.H)

    def finished_of(self, block: int, split: int) -> range:
        """Hidden units whose gates and states, or gradients, the block computes."""
        units = self.units_of(block)
        return units[split * self.finished_units:(split + 1) * self.finished_units]

    def packets_of(self, split: int, warp: int) -> range:
        """Packets of a row that a warp waits for and multiplies."""
        return _part(self.k_groups * GROUP_PACKETS[self.precision], split * WARPS + warp, self.packets)

    def fused_output_of(self, split: int, warp: int) -> range:
        """Characters whose dlogits a warp multiplies with W_out and adds to its sums."""
        return _part(self.fused_output_steps * self.step_k, split * WARPS + warp, self.V_out)


def _part(size: int, index: int, end: int) -> range:
    """Part `index` of range(end), cut into parts of a size; the last part may be shorter, or empty."""
    return range(min(index * size, end), min((index + 1) * size, end))


# Memory of a block and registers of a thread

def weight_registers(columns: int) -> int:
    """Registers of a thread for the weights of one step."""
    return columns // 8 * 2


def accumulators(rows: int, columns: int) -> int:
    """Registers of a thread for its share of a warp's sums."""
    return rows * columns // 32


def operand_registers(rows: int, precision: str) -> int:
    """Registers of a thread for the group of words that it multiplies and the group that it loads ahead."""
    return {"fp32": 7 * rows // 2, "tf32": rows, "bf16": 2 * rows + 20}[precision]  # 20: to pair the halves of words


def reduction_bytes(rows: int, columns: int, precision: str) -> int:
    """Shared memory for the sums of half the warps of a block, to which the other half adds its own sums; rows are
    padded against bank conflicts, those of 3xTF32 as those of tf32."""
    padding = 4 if precision == "fp32" else 8 if columns % 16 == 0 else 0
    return WARPS // 2 * rows * (columns + padding) * 4


def gradients_bytes(plan: "RecurrencePlan") -> int:
    """Shared memory of the backward pass for di of a tile and a block's finished units, its sums by character, and the
    ids of the tile's rows."""
    if plan.direction == "forward":
        return 0
    characters = plan.V_in if plan.sums_on_chip else 0
    return (plan.rows + characters) * 3 * plan.finished_units * 4 + plan.rows * 4


# Plans

def forward_plan(gpu: GPU, B: int, H: int, precision: str, *, variant: str = "auto") -> RecurrencePlan:
    """The quickest plan for `gru_forward` with B rows and H units.

    `variant` is for tests and benchmarks: auto, or persistent or stepwise even if it is slower.

    Raises: ValueError for sizes below 1, for a precision that is unknown or that this GPU lacks, and where persistent
    is asked for and does not fit.
    """
    return _plan(gpu, RecurrencePlan("stepwise", precision, B, H, K=H), variant)


def backward_plan(gpu: GPU, B: int, H: int, precision: str, *, V_out: int = 0, V_in: int = 0,
                  variant: str = "auto") -> RecurrencePlan:
    """The quickest plan for `gru_backward` with B rows and H units.

    V_out is the number of characters if the output layer lies on top (dlogits W_out may be fused), V_in if the layer's
    inputs are characters (the sums of di by character may stay on chip); 0 if not.

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
    stepwise = stepwise._replace(predicted_us=_predicted_us(gpu, stepwise))
    if variant == "stepwise":
        return stepwise._replace(reason=f"as asked for; predicted {stepwise.predicted_us:.1f} us")
    persistent = list(_persistent_plans(gpu, stepwise))
    fitting = [plan for plan in persistent if plan.registers <= REGISTERS and plan.shared_bytes <= gpu.shared_bytes]
    if not fitting:
        smallest = min(persistent, key=operator.attrgetter("shared_bytes"))
        misfit = (f"nothing persistent fits: cut for {gpu.multiprocessors} multiprocessors, W_hh takes "
                  f"{kib(smallest.shared_bytes)} of shared memory a block, of {kib(gpu.shared_bytes)}, and "
                  f"{smallest.registers} registers a thread, of {REGISTERS}")
        if variant == "persistent":
            raise ValueError(f"variant: {misfit}")
        return stepwise._replace(reason=f"{misfit}; predicted {stepwise.predicted_us:.1f} us")
    predicted_us = [_predicted_us(gpu, plan) for plan in fitting]
    best = fitting[predicted_us.index(min(predicted_us))]._replace(predicted_us=min(predicted_us))
    reason = f"{_described(best)}; predicted {best.predicted_us:.1f} us, stepwise {stepwise.predicted_us:.1f} us"
    chosen = stepwise if variant == "auto" and stepwise.predicted_us < best.predicted_us else best
    return chosen._replace(reason=reason)


def _persistent_plans(gpu: GPU, stepwise: RecurrencePlan) -> Iterator[RecurrencePlan]:
    """All plans with a multiprocessor for every block, whether or not registers and shared memory are enough. Of
    equally quick plans, the caller takes the first."""
    for cut in _cuts(gpu, stepwise):
        output_steps = (cut.with_fused_output().fused_output_steps, 0) if cut.V_out else (0,)
        sums_on_chip = (True, False) if cut.V_in else (False,)
        most = 0 if cut.precision == "fp32" else min(
            cut.k_steps, max(REGISTERS - cut.registers, 0) // weight_registers(cut.columns))
        for fused_output_steps, on_chip in itertools.product(output_steps, sums_on_chip):
            plan = cut._replace(fused_output_steps=fused_output_steps, sums_on_chip=on_chip)
            too_much = max(plan.shared_bytes - gpu.shared_bytes, 0)
            fewest = min(ceil_div(too_much, plan.weights_bytes(1)), most)
            # More weights in registers are quicker where reading shared memory limits a step.
            for register_steps in sorted({fewest, (fewest + most) // 2, most}):
                yield plan._replace(register_steps=register_steps)


def _cuts(gpu: GPU, stepwise: RecurrencePlan) -> Iterator[RecurrencePlan]:
    """Persistent plans with all weights in shared memory and nothing fused: tiles, groups, splits and units."""
    for rows in ROWS:
        tiles = ceil_div(stepwise.B, rows)
        for groups in range(1, min(tiles, gpu.multiprocessors) + 1):
            row_tiles = ceil_div(tiles, groups)
            if ceil_div(tiles, row_tiles) < groups:
                continue  # the last group would own no tile
            for splits in SPLITS if stepwise.direction == "backward" else (1,):
                most_blocks = gpu.multiprocessors // (groups * splits)
                if most_blocks == 0:
                    continue
                fewest = ceil_div(stepwise.H, most_blocks)
                together = stepwise.values if stepwise.direction == "forward" else 1
                for units in sorted({fewest, round_up(fewest, together)}):  # with packets that are full
                    columns = round_up(stepwise.unit_columns * units, 8)
                    units = columns // stepwise.unit_columns
                    yield stepwise._replace(
                        variant="persistent", groups=groups, blocks=ceil_div(stepwise.H, units), splits=splits,
                        rows=rows, row_tiles=row_tiles, units=units, columns=columns)


def _described(plan: RecurrencePlan) -> str:
    groups = f"{plan.groups} group{'s' * (plan.groups > 1)} of {plan.blocks * plan.splits} blocks"
    splits = f", K cut in {plan.splits}" if plan.splits > 1 else ""
    in_registers = plan.weights_bytes(plan.register_steps)
    registers = f" ({kib(in_registers)} in registers)" if in_registers else ""
    return (f"{groups}{splits}: W_hh takes {kib(plan.weights_bytes(plan.k_steps))} a block{registers}, "
            f"a step gathers {kib(_gathered_bytes(plan) * plan.row_tiles)} per block")


# Costs

def step_parts(gpu: GPU, plan: RecurrencePlan, rates: Rates) -> Parts:
    """What a step waits for in the plan's own launch; stepwise, in the launch of a step."""
    parts = _stepwise_parts(gpu, plan, rates) if plan.variant == "stepwise" else _persistent_parts(plan, rates)
    memory = Parts(memory=_memory_cycles(gpu, rates, (20 if plan.direction == "forward" else 32) * plan.B * plan.H))
    return max(parts, memory, key=operator.attrgetter("cycles"))


def _persistent_parts(plan: RecurrencePlan, rates: Rates) -> Parts:
    sums, steps = plan.rows * plan.columns, plan.k_steps + plan.fused_output_steps
    tile = rates.overlapped(
        gather=_gathered_bytes(plan) / rates.l2,
        multiply=sums * steps * WARPS * plan.step_k / rates.multiply[plan.precision],
        weights=plan.weights_bytes(steps - plan.register_steps) / rates.shared,
        issue=WARPS * steps * _step_instructions(plan) / rates.issue)
    tile += Parts(cell=CELL_CYCLES + 2 * WARPS * sums * 4 / rates.shared)
    if plan.splits > 1:
        tile += Parts(gather=2 * sums * 8 * (plan.splits - 1) / plan.splits / rates.l2, chain=rates.chain)
    saving = Parts(issue=WARPS * plan.finished_elements * INSTRUCTIONS_PER_ELEMENT[plan.direction] / rates.issue)
    return max(tile + Parts(chain=rates.chain), (tile + saving) * plan.row_tiles, key=operator.attrgetter("cycles"))


def _step_instructions(plan: RecurrencePlan) -> float:
    """Instructions of a warp for a step of its product. FFMA's rate allows for those beside it."""
    if plan.precision == "fp32":
        return 0
    fragments = plan.columns // 8 * (plan.rows // 16 + 1)  # products, and the weights that each of 8 columns loads
    return fragments + INSTRUCTIONS_PER_VALUE * plan.rows * plan.step_k / 32


def _stepwise_parts(gpu: GPU, plan: RecurrencePlan, rates: Rates) -> Parts:
    units, splits = STEPWISE_COLUMNS // plan.unit_columns, plan.K // plan.H  # backward, a block per gate
    tiles = ceil_div(plan.B, STEPWISE_ROWS) * ceil_div(plan.H, units) * splits
    wave = rates.overlapped(
        gather=(STEPWISE_ROWS + STEPWISE_COLUMNS) * plan.H * 4 / rates.l2,
        multiply=STEPWISE_ROWS * STEPWISE_COLUMNS * plan.H / rates.multiply[plan.precision])
    wave += Parts(cell=CELL_CYCLES, latency=rates.l2_latency)
    return Parts(launch=rates.launch) + wave * ceil_div(tiles, gpu.multiprocessors)


def _predicted_us(gpu: GPU, plan: RecurrencePlan) -> float:
    """Microseconds of a step, with those of other launches that compute dlogits W_out and the sums by character where
    the plan's own launch does not."""
    rates = rates_of(gpu)
    dh = 8 if plan.V_out and not plan.fused_output_steps else 0
    di = 16 if plan.V_in and not plan.sums_on_chip else 0
    elsewhere = _memory_cycles(gpu, rates, (dh + di) * plan.B * plan.H)
    return rates.microseconds(step_parts(gpu, plan, rates).cycles + elsewhere)


def _memory_cycles(gpu: GPU, rates: Rates, size: int) -> float:
    """Cycles for a number of bytes, shared among all multiprocessors."""
    return size / (gpu.multiprocessors * rates.memory)


def _gathered_bytes(plan: RecurrencePlan) -> float:
    """Bytes that a block gathers for each row tile: packets, and dlogits where the output layer is fused."""
    dlogits = 4 * plan.V_out if plan.fused_output_steps else 0
    return plan.rows * (PACKET_BYTES[plan.precision] * plan.packets + dlogits) / plan.splits
