"""The persistent recurrence: equal to the specification and to the stepwise one, however its work is cut."""

import functools
import re
from typing import NamedTuple

import numpy as np
import pytest

from char_gru.kernels import runtime
from char_gru.kernels.gru_persistent import constants
from char_gru.kernels.matmul import PRECISIONS
from char_gru.kernels.plan.recurrence import RecurrencePlan, backward_plan, forward_plan
from char_gru.kernels.sizes import ceil_div, round_up
from tests import host_cuda
from tests.helpers.compare import assert_close
from tests.helpers.recurrence import Layer, assert_equal_bits, assert_matches_reference, by_reference, layer, on_device


class Cut(NamedTuple):
    """Sizes of a case, and how both directions are cut; M is the number of rows of W_y, None without it."""

    T: int
    B: int
    H: int
    V: int
    M: int | None
    groups: int
    rows: int
    units: int  # forward
    units_back: int
    splits: int = 1
    register_steps: int = 0  # tf32 and bf16

    @property
    def case(self) -> Layer:
        return layer(self.T, self.B, self.H, self.V, self.M)

    def plans(self, precision: str, fused_output: bool = True,
              sums_on_chip: bool = True) -> tuple[RecurrencePlan, RecurrencePlan]:
        gpu, M = runtime.current_executor().gpu, self.M or 0
        forward = forward_plan(gpu, self.B, self.H, precision, variant="stepwise")
        backward = backward_plan(gpu, self.B, self.H, precision, V_out=M, V_in=self.V, variant="stepwise")
        backward = self._persistent(backward, self.units_back, self.splits)._replace(sums_on_chip=sums_on_chip)
        return self._persistent(forward, self.units, 1), backward.with_fused_output() if fused_output else backward

    def _persistent(self, plan: RecurrencePlan, units: int, splits: int) -> RecurrencePlan:
        row_tiles = ceil_div(ceil_div(self.B, self.rows), self.groups)
        return plan._replace(
            variant="persistent", groups=self.groups, blocks=ceil_div(self.H, units), splits=splits, rows=self.rows,
            row_tiles=row_tiles, units=units, columns=round_up(plan.unit_columns * units, 8),
            register_steps=self.register_steps if plan.precision != "fp32" else 0)


CUTS = [
    Cut(T=1, B=1, H=1, V=1, M=1, groups=1, rows=16, units=2, units_back=2),
    Cut(T=3, B=5, H=10, V=7, M=6, groups=1, rows=16, units=6, units_back=4),
    Cut(T=4, B=33, H=20, V=5, M=9, groups=2, rows=16, units=6, units_back=10, splits=2),  # a group with one tile less
    Cut(T=2, B=32, H=63, V=4, M=None, groups=1, rows=32, units=64, units_back=32, splits=2),  # one below a step of K
    Cut(T=2, B=31, H=64, V=4, M=65, groups=1, rows=32, units=32, units_back=64),
    Cut(T=2, B=65, H=65, V=9, M=None, groups=2, rows=32, units=24, units_back=22, splits=4),  # one above
    Cut(T=3, B=50, H=70, V=5, M=9, groups=2, rows=16, units=12, units_back=18, splits=4),
    Cut(T=2, B=17, H=129, V=3, M=11, groups=2, rows=16, units=44, units_back=34, splits=8),
    Cut(T=2, B=20, H=400, V=3, M=5, groups=1, rows=16, units=88, units_back=96, register_steps=4),
    Cut(T=2, B=40, H=300, V=3, M=70, groups=1, rows=32, units=50, units_back=76, splits=2, register_steps=2),
]
QUICK = CUTS[2]  # has groups, tiles, splits and a fused output layer


def plans_that_fit(size: Cut, precision: str, **options) -> tuple[RecurrencePlan, RecurrencePlan]:
    """The plans of a cut; a GPU whose blocks have less shared memory skips the test. The CPU runs every cut."""
    plans, executor = size.plans(precision, **options), runtime.current_executor()
    needed = max(plan.shared_bytes for plan in plans)
    if not isinstance(executor, host_cuda.HostExecutor) and needed > executor.gpu.shared_bytes:
        pytest.skip(f"needs {needed} bytes of shared memory per block; this GPU has {executor.gpu.shared_bytes}")
    return plans


def slow(*values):
    """Values of a parametrised test that take seconds."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [size if size == QUICK else slow(size) for size in CUTS], ids=str)
def test_persistent_gru_matches_reference(executor, size, precision):
    assert_matches_reference(size.case, on_device(size.case, precision, plans_that_fit(size, precision)), precision)


@pytest.mark.parametrize("options", [{"fused_output": False}, {"sums_on_chip": False}], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_work_that_does_not_fit_on_chip_is_done_elsewhere(executor, precision, options):
    case = QUICK.case
    assert_matches_reference(case, on_device(case, precision, plans_that_fit(QUICK, precision, **options)), precision)


@pytest.mark.parametrize("B, H", [(2, 5), slow(33, 70), slow(65, 129)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_plan_of_the_device_at_hand_is_persistent_and_right(executor, B, H, precision):
    """Plans of the planner itself, for the small GPU that the CPU passes for."""
    case, gpu = layer(3, B, H, 5, 7), runtime.current_executor().gpu
    plans = (forward_plan(gpu, B, H, precision, variant="persistent"),
             backward_plan(gpu, B, H, precision, V_out=7, V_in=5, variant="persistent"))
    assert_matches_reference(case, on_device(case, precision, plans), precision)
    best = forward_plan(gpu, B, H, precision), backward_plan(gpu, B, H, precision, V_out=7, V_in=5)
    assert_equal_bits(on_device(case, precision, (None, None)), on_device(case, precision, best))


@pytest.mark.parametrize("T", [10, slow(100)])
def test_persistent_equals_stepwise(executor, T):
    """fp32: the same numbers but for the order of sums, over a window so long that a lost step would show."""
    size = Cut(T, B=17, H=33, V=5, M=6, groups=2, rows=16, units=6, units_back=12, splits=2)
    expected = by_reference(size.case, np.float64)
    persistent, plain = on_device(size.case, "fp32", size.plans("fp32")), on_device(size.case)
    for name, result in persistent.items():
        assert_close(name, result, expected[name], plain[name])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [QUICK, slow(CUTS[8])], ids=str)
def test_persistent_gru_does_not_depend_on_the_order_of_threads(ordered_executor, size, precision):
    results = on_device(size.case, precision, size.plans(precision))
    with runtime.use(ordered_executor.ascending()):
        assert_equal_bits(results, on_device(size.case, precision, size.plans(precision)))


@pytest.mark.parametrize("T, precision, seed", [
    (200, "fp32", 0), slow(2000, "fp32", 0), slow(2000, "fp32", 1), slow(2000, "bf16", 0), slow(2000, "bf16", 1)])
def test_thousands_of_steps_in_random_order(T, precision, seed):
    """A barrier that is missing shows only now and then."""
    size = Cut(T, B=17, H=6, V=3, M=2, groups=2, rows=16, units=4, units_back=6, splits=2)
    with runtime.use(host_cuda.HostExecutor(order="random", seed=seed)):
        results = on_device(size.case, precision, size.plans(precision))
    assert_matches_reference(size.case, results, precision)


FEW_THREADS = Cut(T=3, B=17, H=6, V=3, M=2, groups=2, rows=16, units=4, units_back=6, splits=2)


@pytest.mark.parametrize("sanitizer, size, precision", [
    ("address,undefined", QUICK, "fp32"),
    *(slow("address,undefined", QUICK, precision) for precision in ("tf32", "bf16")),
    *(slow("thread", FEW_THREADS, precision) for precision in PRECISIONS)])
def test_sanitizer_finds_nothing_in_persistent_gru(sanitizer, size, precision):
    report = host_cuda.run_sanitized(lambda: on_device(size.case, precision, size.plans(precision)), sanitizer)
    assert report == ""


def test_launches_follow_each_other_on_the_same_counters(executor):
    """Window after window, of any length: barriers end where they began."""
    size = QUICK
    plans = size.plans("fp32")
    long, short = size.case, layer(2, size.B, size.H, size.V, size.M)
    for case in (long, short, long):
        first = on_device(case, "fp32", plans, T_saved=size.T)
        assert_equal_bits(first, on_device(case, "fp32", plans, T_saved=size.T))


@pytest.mark.capability(80)
def test_data_of_one_precision_is_not_read_by_another(executor):
    """All precisions have buffers of the same size here; the words behind K, which no block writes, lie elsewhere."""
    size = QUICK
    first = {precision: on_device(size.case, precision, size.plans(precision)) for precision in PRECISIONS}
    for precision in reversed(PRECISIONS):
        assert all(np.isfinite(result).all() for result in first[precision].values())
        assert_equal_bits(on_device(size.case, precision, size.plans(precision)), first[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_batch_rows_do_not_interact(executor, precision):
    """With other ids, initial state and gradients in one row, every other row keeps its bits."""
    size, row = QUICK, 32
    case, other = size.case, layer(size.T, size.B, size.H, 4, size.M)
    ids_tb, h0, dy_tb = case.ids_tb.copy(), case.h0.copy(), case.dy_tb.copy()
    ids_tb[:, row], h0[row], dy_tb[:, row] = other.ids_tb[:, row], other.h0[row] + 1, other.dy_tb[:, row] + 1
    plans = size.plans(precision)
    before = on_device(case, precision, plans)
    after = on_device(case._replace(ids_tb=ids_tb, h0=h0, dy_tb=dy_tb), precision, plans)
    for name in ("h_tb", "gates_tb", "a_n_tb", "dh0"):
        a, b = (np.moveaxis(result[name], result[name].ndim - 2, 0) for result in (before, after))
        assert (a[row] != b[row]).any(), name
        np.testing.assert_array_equal(np.delete(a, row, 0), np.delete(b, row, 0), name)


# Bytes, barriers and multiply-adds

FITTING = {  # sizes without padding, so that the counted bytes are the needed ones
    precision: Cut(T=3, B=32, H=128, V=5, M=64, groups=2, rows=16, units=32, units_back=64, splits=splits)
    for precision, splits in {"fp32": 2, "tf32": 2, "bf16": 1}.items()}


@functools.cache
def counted(size: Cut, precision: str) -> dict[str, tuple[RecurrencePlan, host_cuda.LaunchCounts, dict]]:
    """Direction -> plan, counts of its launch, and the bytes that it read from and wrote to each array, by name."""
    results = {}
    with runtime.use(host_cuda.HostExecutor(count_bytes=True)) as executor:
        plans = size.plans(precision)
        on_device(size.case, precision, plans)
        for direction, plan in zip(("forward", "backward"), plans):
            stem = f"gru_{direction}_persistent"
            signature = re.search(rf"\n{stem}\((.*?)\)\n", runtime.source(stem, constants(plan)), re.DOTALL)[1]
            names = [re.findall(r"\w+", parameter)[-1] for parameter in signature.split(",")]
            [launch] = [launch for launch in executor.launches if launch.kernel == stem]
            results[direction] = plan, launch, dict(zip(names, zip(launch.bytes_read, launch.bytes_written)))
    return results


@pytest.mark.parametrize("precision, size", [
    (precision, size) if precision == "tf32" else slow(precision, size) for precision, size in FITTING.items()])
def test_blocks_have_no_barrier_among_each_other(precision, size):
    assert all(launch.group_barriers == 0 for _, launch, _ in counted(size, precision).values())


@pytest.mark.parametrize("precision", ["tf32", slow("bf16")])
def test_multiply_adds_are_those_of_the_products(precision):
    size, step = FITTING[precision], {"tf32": 8, "bf16": 16}[precision]
    for direction, (plan, launch, _) in counted(size, precision).items():
        K_fused = size.splits * 8 * step if direction == "backward" else 0  # every warp takes a step of W_y
        K = round_up(plan.packets, step) * 3  # packets come in groups, of three values each
        assert launch.mma_calls * 16 * 8 * step == size.T * size.B * size.H * (plan.unit_columns * K + K_fused)


@pytest.mark.parametrize("precision", [slow("fp32"), "tf32", slow("bf16")])
def test_a_step_moves_little_more_than_its_plan_needs(precision):
    """Bytes of all blocks, through L2 or from memory; the weights, once, are apart."""
    size = FITTING[precision]
    T, B, H, _, M = size[:5]
    state = T * B * H * 4
    for direction, (plan, launch, arrays) in counted(size, precision).items():
        assert arrays["W_hh"] == (size.groups * 3 * H * H * 4, 0)
        _, published = arrays["exchange"]  # how often a block reads a word depends on when the word comes
        total = sum(r + w for name, (r, w) in arrays.items() if name not in ("W_hh", "W_y"))
        assert published == T * B * plan.packets * (16 if precision == "fp32" else 8)
        own = 10 * state  # forward: input products, their ids, and h; h, gates and a_n
        if direction == "backward":  # gates, a_n, h and dh_z; da and dh_z; dy; partial sums
            own += T * B * M * 4 * launch.grid[0] // size.groups // size.splits
            sums = (T + 1) * B * H * 8 * size.splits if size.splits > 1 else 0
            assert arrays["partial_sums"] == (0, sums)
            own += sums
        assert total <= 1.3 * (published + own), (direction, arrays)
