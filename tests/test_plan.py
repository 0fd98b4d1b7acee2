"""Every plan fits its GPU and covers the work exactly once, for every known GPU; the choices are the ones that pay."""

import itertools
import pathlib
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from char_gru import kernels
from char_gru.kernels import __main__ as kernels_main
from char_gru.kernels import cross_entropy, gru, input_table, matmul, runtime
from char_gru.kernels.adam import MAX_BLOCKS as NORM_BLOCKS
from char_gru.kernels.adam import THREADS as NORM_THREADS
from char_gru.kernels.plan import recurrence as planning
from char_gru.kernels.plan import training_step as timeline
from char_gru.kernels.plan.costs import Parts, Rates
from char_gru.kernels.plan.generation import character_parts, generation_plans
from char_gru.kernels.plan.gpus import GPU, GPUS, precisions, rates_of
from char_gru.kernels.plan.recurrence import RecurrencePlan, backward_plan, forward_plan
from char_gru.kernels.plan.training_step import training_step
from char_gru.kernels.sizes import ceil_div
from char_gru.rnn.config import Sizes
from char_gru.rnn.model import LanguageModel
from tests.host_cuda import HostExecutor

ALL_GPUS = {**GPUS, "harness": HostExecutor.gpu}
V = 66
BATCHES = (1, 7, 16, 17, 64, 65, 200, 513, 1024)
UNITS = (64, 100, 257, 512, 1000, 1024, 1536, 2047, 3000, 4096)


def both_plans(gpu: GPU, B: int, H: int, precision: str, **options) -> tuple[RecurrencePlan, RecurrencePlan]:
    """Forward, and backward with an output layer and with characters as inputs."""
    return (forward_plan(gpu, B, H, precision, **options),
            backward_plan(gpu, B, H, precision, V_out=V, V_in=V, **options))


# ---- Limits and cover -----------------------------------------------------------------------------------------------

def assert_fits(plan: RecurrencePlan, gpu: GPU) -> None:
    """The limits of the GPU, with everything a block holds counted again."""
    assert 1 <= plan.grid == plan.groups * plan.blocks * plan.splits <= gpu.multiprocessors
    assert plan.units >= 1
    assert plan.columns % 8 == 0 and 0 <= plan.columns - plan.unit_columns * plan.units < plan.unit_columns + 8
    assert plan.rows in (16, 32) and plan.splits in ((1,) if plan.unit_columns == 3 else (1, 2, 4, 8))

    assert 0 <= plan.register_steps <= plan.k_steps
    assert plan.precision != "fp32" or plan.register_steps == 0
    forward = plan.unit_columns == 3
    together = (2 if plan.precision == "fp32" else 3) if forward else 1
    packets = plan.blocks * ceil_div(plan.units, together) if forward else plan.H
    in_group, steps, step_k = {"fp32": (4, 1, 8 if forward else 12), "tf32": (8, 3, 8), "bf16": (16, 3, 16)}[
        plan.precision]
    assert plan.k_steps == ceil_div(packets, plan.splits * 8 * in_group) * steps
    accumulators = plan.rows // 16 * (plan.columns // 8) * 4
    finished = ceil_div(plan.rows * ceil_div(plan.finished_units, together), 256) * together * (8 if forward else 12)
    operands = plan.rows // 16 * {"fp32": 56, "tf32": 16, "bf16": 32}[plan.precision]
    operands += 20 * (plan.precision == "bf16")
    weights = plan.register_steps * (plan.columns // 8) * 2
    assert accumulators + weights + operands + finished + 72 == plan.registers <= 255

    element_bytes = 2 if plan.precision == "bf16" else 4
    weights = (plan.k_steps - plan.register_steps + plan.fused_output_steps) * 8 * plan.columns * step_k * element_bytes
    fp32, tiles = plan.precision == "fp32", plan.columns // 8
    padding = 4 if fp32 else 8 if tiles % 2 == 0 else 0
    reduction = 4 * plan.rows * (plan.columns + padding) * 4
    by_row = plan.rows + (plan.V_in if plan.sums_on_chip else 0)
    gradients = 0 if forward else by_row * 3 * plan.finished_units * 4 + plan.rows * 4
    assert weights + reduction + gradients == plan.shared_bytes <= gpu.shared_bytes


def covers_once(parts, n: int) -> bool:
    """Whether consecutive ranges are 0, 1, ..., n - 1."""
    return list(itertools.chain.from_iterable(parts)) == list(range(n))


def assert_covers(plan: RecurrencePlan) -> None:
    """A block finishes the rows of its group times units of its own, so that rows and units may be counted apart. The
    splits of a range together multiply its units with all of K."""
    splits, warps = range(plan.splits), range(8)
    rows = [plan.rows_of(group) for group in range(plan.groups)]
    assert covers_once(rows, plan.B) and all(rows)
    assert all(len(part) <= plan.row_tiles * plan.rows for part in rows)
    assert covers_once((plan.finished_of(block, split) for block in range(plan.blocks) for split in splits), plan.H)
    for block in range(plan.blocks):
        units = plan.units_of(block)
        assert 1 <= len(units) <= plan.units
        assert list(itertools.chain.from_iterable(plan.finished_of(block, split) for split in splits)) == list(units)
    assert covers_once((plan.packets_of(split, warp) for split in splits for warp in warps), plan.packets)
    characters = plan.V_out if plan.fused_output_steps else 0
    assert covers_once((plan.fused_output_of(split, warp) for split in splits for warp in warps), characters)


@pytest.mark.parametrize("name", [
    name if name in ("t4", "harness") else pytest.param(name, marks=pytest.mark.slow) for name in ALL_GPUS])
def test_every_plan_fits_and_covers_the_work_once(name):
    gpu = ALL_GPUS[name]
    for precision, B, H in itertools.product(precisions(gpu), BATCHES, UNITS):
        for plan in both_plans(gpu, B, H, precision):
            if plan.variant == "persistent":
                assert_fits(plan, gpu)
                assert_covers(plan)
            else:
                assert plan.variant == "stepwise" and plan.groups == plan.shared_bytes == 0


@given(multiprocessors=st.integers(1, 200), shared_kib=st.integers(16, 256), B=st.integers(1, 300),
       H=st.integers(1, 1100), V_out=st.integers(0, 3000), V_in=st.integers(0, 3000),
       precision=st.sampled_from(("fp32", "tf32", "bf16")))
def test_plans_fit_and_cover_on_gpus_and_sizes_of_all_kinds(multiprocessors, shared_kib, B, H, V_out, V_in, precision):
    gpu = GPU("any", 90, multiprocessors, shared_kib << 10)
    for plan in (forward_plan(gpu, B, H, precision), backward_plan(gpu, B, H, precision, V_out=V_out, V_in=V_in)):
        assert plan.predicted_us > 0 and plan.reason
        if plan.variant == "persistent":
            assert_fits(plan, gpu)
            assert_covers(plan)


# ---- Choices --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("name", ["h100", "h200"])
def test_the_tutorials_sizes_are_persistent_on_a_large_gpu(name, precision):
    for plan in both_plans(GPUS[name], 64, 1024, precision):
        assert plan.variant == "persistent"


def test_bf16_on_an_h100_takes_four_groups():
    forward, backward = both_plans(GPUS["h100"], 64, 1024, "bf16")
    assert (forward.groups, forward.blocks, forward.splits, forward.rows, forward.units) == (4, 32, 1, 16, 32)
    assert (backward.groups, backward.rows) == (4, 16) and backward.grid == 128
    assert backward.sums_on_chip
    assert forward.predicted_us < 3.5 and backward.predicted_us < 5.5


def test_the_reason_has_the_numbers_that_decided():
    plan = forward_plan(GPUS["h100"], 64, 1024, "bf16")
    assert plan.reason == ("4 groups of 32 blocks: W_hh takes 216 KiB a block (48 KiB in registers), a step gathers "
                           "44 KiB per block; predicted 2.9 us, stepwise 10.5 us")


@pytest.mark.parametrize("name, precision, H", [("t4", "fp32", 1024), ("l4", "bf16", 4096), ("3060", "tf32", 1024)])
def test_stepwise_where_nothing_fits_says_what_did_not(name, precision, H):
    gpu = GPUS[name]
    for plan in both_plans(gpu, 64, H, precision):
        assert plan.variant == "stepwise"
        assert plan.reason.startswith(
            f"nothing persistent fits: cut for {gpu.multiprocessors} multiprocessors, W_hh takes ")
        assert f" KiB of shared memory a block, of {gpu.shared_bytes >> 10} KiB, and " in plan.reason
    with pytest.raises(ValueError, match="^variant: nothing persistent fits"):
        forward_plan(gpu, 64, H, precision, variant="persistent")


def test_stepwise_where_it_is_quicker_and_persistent_where_that_is_asked_for():
    quickest, persistent, stepwise = (
        forward_plan(GPUS["t4"], 64, 300, "fp32", variant=variant) for variant in ("auto", "persistent", "stepwise"))
    assert (quickest.variant, persistent.variant, stepwise.variant) == ("stepwise", "persistent", "stepwise")
    assert quickest.predicted_us == stepwise.predicted_us < persistent.predicted_us
    assert quickest.reason == persistent.reason  # what the two cost


def test_the_harness_has_persistent_plans_for_sizes_of_tests():
    for precision, B, H in itertools.product(precisions(HostExecutor.gpu), (1, 5, 17, 33), (1, 3, 8, 24, 40, 64)):
        for plan in both_plans(HostExecutor.gpu, B, H, precision, variant="persistent"):
            assert_fits(plan, HostExecutor.gpu)
            assert_covers(plan)


def test_fewer_bits_and_more_shared_memory_are_never_slower():
    for gpu, B, H in itertools.product(ALL_GPUS.values(), (1, 64, 200), (100, 512, 1024)):
        roomier = gpu._replace(shared_bytes=2 * gpu.shared_bytes)
        for plan in (forward_plan, backward_plan):
            predicted = [plan(gpu, B, H, precision).predicted_us for precision in precisions(gpu)]
            for wider, narrower in itertools.pairwise(predicted):
                assert narrower <= 1.06 * wider  # K comes in whole groups of packets, which are longer in bf16
            for precision, us in zip(precisions(gpu), predicted):
                assert plan(roomier, B, H, precision).predicted_us <= us


def test_output_layer_and_sums_by_character_are_fused_only_where_a_layer_has_them():
    middle = backward_plan(GPUS["h100"], 64, 512, "bf16")
    assert middle.variant == "persistent" and middle.fused_output_steps == 0 and not middle.sums_on_chip
    top = backward_plan(GPUS["h100"], 64, 512, "bf16", V_out=V)
    assert top.fused_output_steps == 1 and not top.sums_on_chip
    lowest = backward_plan(GPUS["h100"], 64, 512, "bf16", V_in=V)
    assert lowest.fused_output_steps == 0 and lowest.sums_on_chip
    many = backward_plan(GPUS["h100"], 64, 512, "bf16", V_out=100_000, V_in=100_000)
    assert many.variant == "persistent" and many.fused_output_steps == 0 and not many.sums_on_chip


def test_a_capability_in_between_is_planned_as_the_one_below():
    h100 = GPUS["h100"]
    assert forward_plan(h100._replace(capability=103), 64, 1024, "bf16") == forward_plan(h100, 64, 1024, "bf16")
    assert precisions(GPU("Orin", 87, 16, 166912)) == ("fp32", "tf32", "bf16")


def test_stepwise_tiles_are_those_of_the_launcher():
    assert (planning.STEPWISE_ROWS, planning.STEPWISE_COLUMNS) == (gru.TILE_M, gru.TILE_N)


def test_planning_is_quick_and_done_once():
    times = []
    for B in range(1024, 1034):
        before = time.perf_counter()
        plan = backward_plan(GPUS["h100"], B, 1024, "bf16", V_out=V, V_in=V)
        times.append(time.perf_counter() - before)
        assert backward_plan(GPUS["h100"], B, 1024, "bf16", V_out=V, V_in=V) is plan
    assert min(times) < 0.1


@pytest.mark.parametrize("arguments, message", [
    ((0, 64, "fp32"), "B, H: expected at least 1, got 0 and 64"),
    ((64, 0, "fp32"), "B, H: expected at least 1, got 64 and 0"),
    ((64, 64, "bf16"), "precision: expected fp32 on NVIDIA T4, got 'bf16'"),
    ((64, 64, "fp8"), "precision: expected fp32 on NVIDIA T4, got 'fp8'"),
])
def test_bad_arguments_are_named(arguments, message):
    for plan in (forward_plan, backward_plan):
        with pytest.raises(ValueError) as error:
            plan(GPUS["t4"], *arguments)
        assert str(error.value) == message


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="variant: expected auto, persistent or stepwise, got 'fast'"):
        forward_plan(GPUS["t4"], 64, 64, "fp32", variant="fast")


# ---- Costs ----------------------------------------------------------------------------------------------------------

RATES = Rates(1.0, 10, 10, {"fp32": 10, "tf32": 100, "bf16": 200})


def test_of_parts_that_overlap_the_longest_counts_and_half_of_the_next():
    assert RATES.overlapped(gather=10, multiply=40, weights=20) == {"multiply": 40, "weights": 10}
    assert RATES.overlapped(turns=10, gather=10, multiply=40) == {"multiply": 40, "gather": 1}
    assert RATES._replace(exposed=0).overlapped(gather=10, multiply=40).cycles == 40


def test_parts_add_up_and_name_the_longest():
    parts = Parts(chain=3) + Parts(gather=1, chain=2) * 2
    assert parts == {"chain": 7, "gather": 2} and parts.cycles == 9 and parts.bound == "chain"
    assert RATES.microseconds(parts.cycles) == pytest.approx(0.009)


def persistent(**cut) -> RecurrencePlan:
    """Backward, of a made-up cut: 16 rows by 64 columns, two groups of 16 blocks."""
    plan = RecurrencePlan("persistent", "bf16", 32, 1024, 3072, groups=2, blocks=16, splits=1, rows=16, row_tiles=1,
                          units=64, columns=64)
    return plan._replace(**cut)


def test_a_chain_passes_while_a_block_works_on_another_row_tile():
    long = RATES._replace(chain=10_000)
    one, two, three = (planning.step_parts(GPUS["h100"], persistent(row_tiles=row_tiles), long)
                       for row_tiles in (1, 2, 3))
    assert one["chain"] == 10_000 and "chain" not in two and "chain" not in three
    assert one.cycles - 10_000 < two.cycles / 2 == pytest.approx(three.cycles / 3)  # saving, which no chain hides


def test_splitting_k_costs_a_second_chain():
    rates = RATES._replace(chain=10_000)
    one, two = (planning.step_parts(GPUS["h100"], persistent(splits=splits), rates)
                for splits in (1, 2))
    assert (one["chain"], two["chain"]) == (10_000, 20_000) and two["multiply"] == one["multiply"] / 2


@pytest.mark.parametrize("rate, slower", [("gigahertz", 0.5), ("l2", 0.5), ("chain", 2), ("multiply", 0.5)])
def test_a_slower_gpu_is_never_predicted_to_be_quicker(rate, slower):
    gpu = GPUS["h100"]
    rates = rates_of(gpu)
    value = getattr(rates, rate)
    changed = rates._replace(**{rate: {p: v * slower for p, v in value.items()} if rate == "multiply" else
                                value * slower})
    for precision in precisions(gpu):
        before, after = (sum(row.us for row in training_step(gpu, 100, 64, V, 256, 1024, 1, precision, used))
                         for used in (rates, changed))
        assert after > before
    for R in (1, 5, 64):
        for plan in generation_plans(gpu, R, V, 1024, 1):
            before, after = (used.microseconds(character_parts(gpu, plan, R, V, 1024, 1, used).cycles)
                             for used in (rates, changed))
            assert before == pytest.approx(plan.predicted_us) and after >= before


# ---- A training step ------------------------------------------------------------------------------------------------

class Recorder(HostExecutor):
    """Records the kernels that are launched, and runs none."""

    def __init__(self, gpu: GPU) -> None:
        super().__init__()
        self.gpu = gpu

    def launch(self, source, kernel, *arguments):
        self.launches.append(kernel)


STEPS = [("h100", "tf32", {}), ("h100", "bf16", {"layers": 2}), ("h100", "fp32", {"T": 101}),
         ("h100", "bf16", {"V": 3000, "H": 512}), ("4090", "bf16", {"H": 256, "B": 16}), ("t4", "fp32", {"layers": 2}),
         ("t4", "fp32", {"V": 300, "H": 70, "E": 21, "B": 5}), ("a100", "tf32", {"B": 1, "H": 100, "T": 2})]


@pytest.mark.parametrize("name, precision, other", STEPS)
def test_timeline_names_the_launches_of_a_training_step(name, precision, other):
    sizes = {"T": 9, "B": 64, "V": V, "E": 256, "H": 1024, "layers": 1} | other
    T, B = sizes["T"], sizes["B"]
    rows = training_step(GPUS[name], precision=precision, **sizes)
    with runtime.use(Recorder(GPUS[name])) as recorder:
        model = LanguageModel(Sizes(*(sizes[axis] for axis in ("V", "E", "H", "layers"))), T, B,
                              ops=kernels.op_set(precision), graph=False)
        model.train_step(*np.zeros((2, T, B), int))
    assert [row.kernel for row in rows for _ in range(row.count)] == recorder.launches
    assert all(0 < row.floor_us <= row.us for row in rows)


def test_timeline_counts_the_turns_of_the_launchers():
    assert timeline.TILED_K == {precision: matmul.constants(precision)["TILE_K"] for precision in matmul.PRECISIONS}
    assert (timeline.MEAN_THREADS, timeline.SORT_POSITIONS) == (cross_entropy.MEAN_THREADS, input_table.RADIX)
    assert (timeline.NORM_BLOCKS, timeline.NORM_THREADS) == (NORM_BLOCKS, NORM_THREADS)
    assert timeline.SUM_ROWS == 8 * matmul.SUM_THREADS // matmul.SUM_COLUMNS


def test_narrower_operands_never_make_a_step_slower():
    for name in ("h100", "4090"):
        steps = [sum(row.us for row in training_step(GPUS[name], 100, 64, V, 256, 1024, 1, precision))
                 for precision in ("fp32", "tf32", "bf16")]
        assert steps == sorted(steps, reverse=True)


# ---- The command ----------------------------------------------------------------------------------------------------

def test_command_prints_both_directions_of_every_layer(capsys):
    assert kernels_main.command(["--plan", "--device-like", "h100", "--precision", "bf16", "--layers", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("NVIDIA H100 SXM: 132 multiprocessors, 227 KiB of shared memory a block; "
                        "64 rows, 1024 units, bf16")
    assert [line.split(";")[0] for line in lines[1:9:2]] == [
        f"layer {layer} {direction}: persistent" for layer in (0, 1) for direction in ("forward", "backward")]
    numbers = [dict(word.split("=") for word in line.split()) for line in lines[2:10:2]]
    assert [int(n["groups"]) for n in numbers] == [4, 4, 4, 4]
    assert [line.split(":")[0] for line in lines[9:13:2]] == ["generation, 1 row", "generation, 64 rows"]
    assert [n["sums_on_chip"] for n in numbers] == ["False", "True", "False", "False"]  # layer 0 alone has characters


def test_command_prints_each_launch_of_a_step_and_their_sum(capsys):
    assert kernels_main.command(["--plan", "--device-like", "h100", "--precision", "tf32", "--seq-length", "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [start] = [i for i, line in enumerate(lines) if line.startswith("a training step, 50 characters of each row: ")]
    assert "to be wrong by some 20%" in lines[start]
    rows = training_step(GPUS["h100"], 50, 64, V, 256, 1024, 1, "tf32")
    assert [line.split()[1] for line in lines[start + 2:-1]] == [row.kernel for row in rows]
    assert lines[-1].split()[:6] == ["a", "training", "step", str(sum(row.count for row in rows)),
                                     f"{sum(row.us for row in rows):.1f}", f"{sum(row.floor_us for row in rows):.1f}"]


@pytest.mark.parametrize("name, precision", [("t4", "fp32"), ("4090", "tf32")])
def test_command_takes_tf32_where_the_gpu_has_it(name, precision, capsys):
    assert kernels_main.command(["--plan", "--device-like", name, "--rnn-units", "256", "--batch-size", "16"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f"; 16 rows, 256 units, {precision}")


def test_command_plans_for_the_gpu_there_is(capsys):
    with runtime.use(types.SimpleNamespace(gpu=GPU("NVIDIA L5", 89, 10, 101376))):
        assert kernels_main.command(["--plan"]) == 0
    assert capsys.readouterr().out.startswith("NVIDIA L5: 10 multiprocessors, 99 KiB")


def test_command_is_what_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "kernels", "--plan", "--device-like", "t4"],
                          check=False, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent.parent)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("stepwise; nothing persistent fits") == 2


@pytest.mark.parametrize("arguments, complaint", [
    (["--plan", "--device-like", "h10"], "argument --device-like: invalid choice: 'h10'"),
    (["--plan", "--device-like", "t4", "--precision", "bf16"], "precision: expected fp32 on NVIDIA T4, got 'bf16'"),
    (["--plan", "--device-like", "t4", "--rnn-units", "0"], "argument --rnn-units: '0' is not a positive integer"),
    (["--plan", "--device-like", "t4", "--batch-size", "x"], "argument --batch-size: 'x' is not a positive integer"),
    (["--plan", "--bogus"], "unrecognized arguments: --bogus"),
    (["--device-like", "t4"], "--device-like is for --plan"),
    (["--precision", "tf32"], "--precision is for --plan or --run"),
    (["--plan", "--arch", "sm_75"], "--arch is for compiling or --sass"),
    (["--plan", "--trace"], "--trace is for --run"),
    (["--plan", "--run", "adam"], "--plan and --run exclude each other"),
    (["--check", "--plan"], "--check and --plan exclude each other"),
    (["--json"], "--json is for --check"),
    (["--plan"], "CuPy is not installed"),
    (["--check"], "CuPy is not installed: pip install"),
])
def test_a_bad_command_line_is_one_line_and_status_2(arguments, complaint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(SystemExit) as stop:
        kernels_main.command(arguments)
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    assert output.err.startswith(f"python -m kernels: {complaint}") and output.err.count("\n") == 1
