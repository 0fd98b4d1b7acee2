"""A whole training step as a timeline: what each launch is predicted to take, and what bounds it.

The launches are those of rnn/model.py without dropout, in its order, as the launchers of the ops cut them. A launch
takes the sum of its parts (costs.py). Beside it stands its floor: the time of its launch, its chains, and the longer of
its bytes from and to memory and its multiply-adds.

    product      (matmul.cu, matmul_multistage.cu) each block brings its tiles of both operands through L2. A turn of
                 the tiled variant waits for the loads of the next turn; stages of the multistage one hide that
    recurrence   W_hh is brought on chip, a step of a warp after the other; then the steps (recurrence.py)
    passes       (sums, norm, Adam) bytes through memory; and turns, after each of which a thread needs what it loaded
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from char_gru.kernels.plan.costs import Parts, Rates
from char_gru.kernels.plan.gpus import GPU, rates_of
from char_gru.kernels.plan.products import (
    ALIGNMENT,
    MULTISTAGE_CAPABILITY,
    OUTPUT_K,
    STAGE_BYTES,
    TILED_OUTPUT,
    output_tile,
    product_plan,
)
from char_gru.kernels.plan.recurrence import (
    CELL_CYCLES,
    WARPS,
    RecurrencePlan,
    backward_plan,
    forward_plan,
    step_parts,
)
from char_gru.kernels.sizes import ceil_div

TILED_K = {"fp32": 16, "tf32": 16, "bf16": 32}  # of a turn of matmul.cu
BLOCKS_AT_ONCE = 2  # of a tiled product, in a multiprocessor: one waits while the other multiplies
SUM_ROWS = 256  # that a block of column_sums loads at once
LOADS_AT_ONCE = 4  # of a thread in the other sums
SORT_POSITIONS = 256  # of a chunk of input_table.cu
NORM_BLOCKS, NORM_THREADS = 1024, 256  # the most blocks of square_sums; threads of norm_of_sums
MEAN_THREADS = 1024  # of mean_loss


class Launches(NamedTuple):
    """Launches of a kernel, one after the other."""

    op: str  # of the op set
    kernel: str
    count: int
    us: float  # predicted, of all of them
    floor_us: float
    bound: str  # the longest part


class _Op(NamedTuple):
    """What the launches of an op depend on beside its sizes."""

    name: str
    gpu: GPU
    rates: Rates
    precision: str

    def launches(self, kernel: str, parts: Parts, *, count: int = 1, size: float = 0, multiplied: float = 0,
                 chains: int = 0) -> Launches:
        """Launches that take parts each, without that of the launch itself; of all together, `size` bytes, and numbers
        of multiply-adds and of chains."""
        parts += Parts(launch=self.rates.launch)
        floor = max(self.memory(size), multiplied / self.gpu.multiprocessors / self.rates.multiply[self.precision])
        floor += count * self.rates.launch + chains * self.rates.chain
        return Launches(self.name, kernel, count, self.rates.microseconds(count * parts.cycles),
                        self.rates.microseconds(floor), parts.bound)

    def memory(self, size: float) -> float:
        """Cycles for a number of bytes, shared among all multiprocessors."""
        return size / (self.gpu.multiprocessors * self.rates.memory)

    def passing(self, kernel: str, size: float, turns: int = 1, cell: float = 0) -> Launches:
        """A pass over a number of bytes, in which a thread waits for loads `turns` times."""
        latency = self.rates.memory_latency + (turns - 1) * self.rates.l2_latency
        return self.launches(kernel, Parts(latency=latency, memory=self.memory(size), cell=cell), size=size)

    def product(self, layout: str, M: int, N: int, K: int, operand_bytes: int = 4) -> Iterator[Launches]:
        """C (M, N) = A (M, K) B (K, N); layout: n or t for A and for B, t if it is given transposed."""
        rows = M if layout == "tn" else K, K if layout == "nt" else N
        aligned = all(row * operand_bytes % ALIGNMENT == 0 for row in rows)
        plan = product_plan(self.gpu, M, N, K, self.precision, operand_bytes, aligned)
        tiled = plan.variant == "tiled"
        size = operand_bytes * (M * K + K * N) + 4 * plan.splits * M * N
        yield self.launches(
            f"matmul_{layout}" if tiled else f"matmul_multistage_{layout}",
            self.tiles(ceil_div(M, plan.TILE_M) * ceil_div(N, plan.TILE_N) * plan.splits, plan.TILE_M, plan.TILE_N,
                       plan.K_split, TILED_K[self.precision] if tiled else STAGE_BYTES // operand_bytes,
                       operand_bytes, size, hidden=not tiled), size=size, multiplied=M * N * K)
        if plan.splits > 1:
            yield self.partial_sums(plan.splits, M * N)

    def tiles(self, blocks: int, rows: int, columns: int, K: int, turn: int, operand_bytes: int, size: float, *,
              hidden: bool) -> Parts:
        """Tiles of a product, rows x columns each, in turns of so many k, whose loads are hidden or not."""
        of_each, turns = ceil_div(blocks, self.gpu.multiprocessors), ceil_div(K, turn)
        waits = 0 if hidden else ceil_div(of_each, BLOCKS_AT_ONCE) * turns * self.rates.l2_latency
        return Parts(latency=self.rates.memory_latency) + self.rates.overlapped(
            turns=turns if hidden else 1, latency=waits, memory=self.memory(size),
            gather=of_each * (rows + columns) * K * operand_bytes / self.rates.l2,
            multiply=of_each * rows * columns * K / self.rates.multiply[self.precision])

    def partial_sums(self, splits: int, count: int) -> Launches:
        """Sums of that many partial sums each."""
        return self.passing("add_partial_sums", 4 * (splits + 1) * count, ceil_div(splits, LOADS_AT_ONCE))

    def column_sums(self, M: int, N: int) -> Launches:
        """Sums over the rows of a matrix (M, N)."""
        return self.passing("column_sums", 4 * M * N, ceil_div(M, SUM_ROWS), CELL_CYCLES)


def training_step(gpu: GPU, T: int, B: int, V: int, E: int, H: int, layers: int, precision: str,
                  rates: Rates | None = None) -> list[Launches]:
    """The launches of a training step in their order. `rates`, for what has been measured: by default those of the GPU,
    which choose the plans in any case.

    Raises: ValueError as `forward_plan`.
    """
    def op(name: str) -> _Op:
        return _Op(name, gpu, rates or rates_of(gpu), precision)

    found: list[Launches] = []
    for layer in range(layers):
        found += op("input_table_forward").product("nt", *((V, 3 * H, E) if layer == 0 else (T * B, 3 * H, H)))
        found += _gru_forward(op("gru_forward"), T, B, H)
    found += _cross_entropy_forward(op("cross_entropy_forward"), T * B, V, H)
    found += op("cross_entropy_backward").product("tn", V, H, T * B)
    found.append(op("cross_entropy_backward").column_sums(T * B, V))
    for layer in reversed(range(layers)):
        rows, width = (V, E) if layer == 0 else (T * B, H)  # of the layer's distinct inputs
        plan = backward_plan(gpu, B, H, precision, V_out=V if layer == layers - 1 else 0, V_in=rows)
        found += _gru_backward(op("gru_backward"), plan, T)
        found += op("input_table_backward").product("nn", rows, width, 3 * H)
        found += op("input_table_backward").product("tn", 3 * H, width, rows)
        found.append(op("input_table_backward").column_sums(rows, 3 * H))
    found += _update(op, V * E + 3 * H * (E + H + 2) + (layers - 1) * 6 * H * (H + 1) + V * (H + 1))
    return found


def _gru_forward(op: _Op, T: int, B: int, H: int) -> Iterator[Launches]:
    plan = forward_plan(op.gpu, B, H, op.precision)
    yield _recurrence(op, plan, T, T)


def _recurrence(op: _Op, plan: RecurrencePlan, T: int, stepwise: int) -> Launches:
    """All steps of a window: one launch, or `stepwise` launches."""
    step, B, H = step_parts(op.gpu, plan, op.rates), plan.B, plan.H
    size = 12 * H * H + T * (20 if plan.direction == "forward" else 32) * B * H
    counts = {"size": size, "multiplied": T * B * 3 * H * H}
    if plan.variant == "stepwise":
        step = Parts({name: cycles for name, cycles in step.items() if name != "launch"})
        return op.launches(f"gru_{plan.direction}_step", step, count=stepwise, **counts)
    k_steps = plan.k_steps + plan.fused_output_steps
    weights = op.rates.overlapped(
        gather=k_steps * WARPS * plan.step_k * plan.columns * 4 / op.rates.l2,
        latency=k_steps * op.rates.memory_latency)
    return op.launches(f"gru_{plan.direction}_persistent", step * T + weights, chains=T, **counts)


def _cross_entropy_forward(op: _Op, positions: int, V: int, H: int) -> Iterator[Launches]:
    """A product, after each tile of which a warp goes through its rows one after the other; and a sum."""
    copied = op.gpu.capability >= MULTISTAGE_CAPABILITY and H * 4 % ALIGNMENT == 0
    rows, columns, _ = output_tile(op.gpu, positions, V, op.precision) if copied else TILED_OUTPUT
    blocks, sweeps = ceil_div(positions, rows), ceil_div(V, columns)
    size = 4 * positions * (H + V)
    tiles = op.tiles(blocks, rows, columns, sweeps * H, OUTPUT_K, 4, size, hidden=copied)
    softmax = Parts(cell=ceil_div(blocks, op.gpu.multiprocessors) * sweeps * rows / WARPS * CELL_CYCLES)
    yield op.launches("cross_entropy_forward", tiles + softmax, size=size, multiplied=positions * V * H)
    yield op.passing("mean_loss", 4 * positions, ceil_div(positions, MEAN_THREADS * LOADS_AT_ONCE), CELL_CYCLES)


def _gru_backward(op: _Op, plan: RecurrencePlan, T: int) -> Iterator[Launches]:
    B, H, V = plan.B, plan.H, plan.V_in
    if plan.V_out and not plan.fused_output_steps:
        yield from op.product("nn", T * B, H, plan.V_out)
    yield _recurrence(op, plan, T, T + 1)
    if plan.variant == "stepwise":
        yield op.column_sums(T * B, 3 * H)
    elif plan.groups > 1:
        yield op.partial_sums(plan.groups, 3 * H)
        if plan.sums_on_chip:
            yield op.partial_sums(plan.groups, V * 3 * H)
    yield from op.product("tn", 3 * H, H, T * B, operand_bytes=2 if op.precision == "bf16" else 4)
    if not plan.sums_on_chip:
        for _ in range(max(ceil_div((V - 1).bit_length(), 8), 1)):
            yield op.passing("count_digits", 4 * T * B)
            yield op.passing("scan_digits", 4 * T * B, ceil_div(T * B, SORT_POSITIONS * LOADS_AT_ONCE), CELL_CYCLES)
            yield op.passing("place_by_digit", 16 * T * B, 1, CELL_CYCLES)
        yield op.passing("sum_by_id", 12 * H * (T * B + V), 2, CELL_CYCLES)


def _update(op, N: int) -> Iterator[Launches]:
    """Global norm and Adam of N parameters."""
    yield op("global_norm").passing("square_sums", 4 * N, 1, CELL_CYCLES)
    yield op("global_norm").passing("norm_of_sums", 4 * NORM_BLOCKS, ceil_div(NORM_BLOCKS, NORM_THREADS), CELL_CYCLES)
    yield op("adam").passing("adam", 28 * N)


def table(launches: list[Launches]) -> Iterator[str]:
    """A line for each, and one for their sum."""
    line = "{:<24}{:<28}{:>8}{:>10}{:>10}  {}".format
    yield line("op", "kernel", "launches", "us", "floor", "bound")
    for op, kernel, count, us, floor_us, bound in launches:
        yield line(op, kernel, count, f"{us:.1f}", f"{floor_us:.1f}", bound)
    sums = (sum(column) for column in zip(*(row[2:5] for row in launches)))
    yield line("a training step", "", *(f"{value:.1f}" if index else value for index, value in enumerate(sums)), "")
