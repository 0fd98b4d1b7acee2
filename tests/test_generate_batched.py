"""Many rows of text written with tensor cores: equal to the reference and to other variants, however work is cut."""

import itertools

import numpy as np
import pytest

from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.kernels.plan.generation import STATIC_SHARED_BYTES, WEIGHTS, generation_plan, generation_plans
from char_gru.kernels.plan.gpus import GPU, GPUS
from char_gru.rnn.params import named_views
from tests import host_cuda
from tests.helpers.texts import (
    OPTIONS,
    assert_text_matches_reference,
    prompts,
    skip_unless_it_fits,
    slow,
    text_case,
    written_on_device,
)

pytestmark = pytest.mark.capability(80)


def small_gpu(multiprocessors: int, shared_kib: int) -> GPU:
    return GPU("of this test", 90, multiprocessors, shared_kib * 1024)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("R", [*map(slow, (9, 16)), 17, *map(slow, (33, 64, 65))])
def test_batched_text_and_states_match_reference(executor, R, weights):
    assert_text_matches_reference(text_case(R, H=21, V=11, layers=1), T=4, temperature=0.8, variant="batched",
                                  weights=weights)


@pytest.mark.parametrize("H, V", [
    slow(1, 2), (7, 66), (8, 3), slow(9, 260), slow(63, 8), slow(64, 9), (65, 7), slow(130, 5),
])
def test_sizes_below_at_and_above_a_fragment_and_a_block(executor, H, V):
    assert_text_matches_reference(text_case(17, H, V, layers=1, scale=0.3), T=3, **OPTIONS, variant="batched")


# `cut` is what a plan makes of so many multiprocessors and so much shared memory: groups, their rows, blocks, their
# units, rows of a tile, steps of K in registers. One tile of a group and several, the last tile of fewer rows; one
# block and several, the last block of fewer units; fewer blocks than rows to draw; no step of K in registers, some,
# all; warps without a step.
@pytest.mark.parametrize("multiprocessors, shared_kib, R, H, weights, cut", [
    slow(2, 64, 70, 20, "fp32", (2, 35, 1, 21, 16, 0)), (3, 28, 70, 20, "fp32", (1, 70, 3, 8, 32, 1)),
    slow(8, 64, 40, 66, "fp32", (2, 20, 4, 18, 32, 1)), slow(4, 64, 40, 66, "bf16", (2, 20, 2, 34, 16, 1)),
    slow(2, 40, 9, 66, "bf16", (1, 9, 2, 34, 16, 2)), slow(8, 40, 40, 130, "bf16", (1, 40, 8, 18, 16, 2)),
])
def test_however_the_work_is_cut_batched_text_is_the_same(executor, monkeypatch, multiprocessors, shared_kib, R, H,
                                                          weights, cut):
    monkeypatch.setattr(executor, "gpu", small_gpu(multiprocessors, shared_kib))
    plan = generation_plan(executor.gpu, R, 5, H, 1, weights, "batched")
    assert (*plan[3:7], plan.constants["ROWS"], plan.constants["REGISTER_STEPS"]) == cut
    assert_text_matches_reference(text_case(R, H, V=5, layers=1, scale=0.3), T=3, variant="batched", weights=weights)


def test_more_logits_than_a_block_sums_at_once(executor, monkeypatch):
    skip_unless_it_fits(executor, generation_plan(small_gpu(2, 227), 9, 1100, 7, 1, variant="batched"))
    monkeypatch.setattr(executor, "gpu", small_gpu(2, 227))
    assert_text_matches_reference(text_case(9, H=7, V=1100, layers=1), T=2, variant="batched")


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, OPTIONS], ids=str)
def test_options_reach_the_drawing(executor, options):
    assert_text_matches_reference(text_case(9, H=6, V=13, layers=1), T=20, **options, variant="batched")


@pytest.mark.parametrize("weights", ["fp32", slow("bf16")])
def test_all_variants_write_the_same_text(executor, weights):
    """Up to a character that rounding decides, which differs from the reference's."""
    case = text_case(18, H=17, V=19, layers=1, scale=0.4)
    for variant in ("batched", "persistent", "stepwise"):
        assert_text_matches_reference(case, 12, variant=variant, weights=weights)


@pytest.mark.parametrize("T", [100, slow(2000)])
def test_a_long_batched_text_is_that_of_the_reference(executor, monkeypatch, T):
    """A barrier that is missing or misplaced shows after many steps."""
    monkeypatch.setattr(executor, "gpu", small_gpu(2, 64))
    case = text_case(9, H=4, V=5, layers=1, scale=0.3)
    assert generation_plan(executor.gpu, 9, 5, 4, 1, variant="batched").blocks == 2
    assert_text_matches_reference(case, T, variant="batched")


def test_batched_text_goes_on_where_it_stopped(executor):
    """Calls of three steps, of none and of one write what one call of four steps writes."""
    R, H, V = 17, 12, 9
    case = text_case(R, H, V, layers=1)
    params = {name: runtime.to_device(array.astype(np.float32)) for name, array in
              named_views(case.flat_params, case.sizes).items()}
    P = runtime.to_device(np.random.default_rng(1).standard_normal((V, 3 * H)).astype(np.float32))
    results = []
    for cuts in ([0, 4], [0, 3, 3, 4]):
        first, forced_tr, uniforms_tr = map(runtime.to_device, prompts(4, R, V))
        h, ids_tr = runtime.to_device(case.h0.astype(np.float32)), runtime.empty((4, R), np.int32)
        saved = kernels.generation_saved(R, H, V)
        for a, b in itertools.pairwise(cuts):
            kernels.generate(params, P, h, first, forced_tr[a:b], uniforms_tr[a:b], ids_tr[a:b], saved,
                             variant="batched")
        results.append([runtime.to_host(array) for array in (ids_tr, first, h)])
    for whole, cut in zip(*results):
        np.testing.assert_array_equal(whole, cut)


def test_rows_do_not_interact(executor):
    """With another state in one row, every other row keeps its bits."""
    case, row = text_case(33, H=20, V=11, layers=1), 20
    h0 = case.h0.copy()
    h0[:, row] += 1
    before, after = (written_on_device(one, 5, variant="batched") for one in (case, case._replace(h0=h0)))
    assert (before[2][:, row] != after[2][:, row]).any()
    for a, b, axis in zip(before, after, (1, 0, 1)):
        np.testing.assert_array_equal(np.delete(a, row, axis), np.delete(b, row, axis))


@pytest.mark.parametrize("weights", ["fp32", slow("bf16")])
def test_batched_text_does_not_depend_on_the_order_of_threads(ordered_executor, weights):
    case = text_case(33, H=20, V=13, layers=1)
    result = written_on_device(case, 4, **OPTIONS, variant="batched", weights=weights)
    with runtime.use(ordered_executor.ascending()):
        expected = written_on_device(case, 4, **OPTIONS, variant="batched", weights=weights)
    for a, b in zip(result, expected):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.slow
def test_sanitizer_finds_nothing_in_batched_generation(sanitizer, weights, monkeypatch):
    """Two groups of two tiles and two blocks, whose last tile, unit and step of K are not full."""
    monkeypatch.setattr(host_cuda.HostExecutor, "gpu", small_gpu(4, 28))

    def run():
        plan = generation_plan(runtime.current_executor().gpu, 40, 6, 20, 1, weights, "batched")
        assert (*plan[3:7], plan.constants["ROWS"]) == (2, 20, 2, 10, 16)
        written_on_device(text_case(40, H=20, V=6, layers=1), 2, variant="batched", weights=weights)

    assert host_cuda.run_sanitized(run, sanitizer) == ""


def test_one_barrier_per_character():
    executor, T = host_cuda.HostExecutor(), 5
    with runtime.use(executor):
        written_on_device(text_case(33, H=20, V=5, layers=1), T, variant="batched")
    [text] = executor.launches
    assert text.kernel == "generate_batched" and text.group_barriers == text.grid[0] * T


@pytest.mark.parametrize("weights, products", [("fp32", 3), slow("bf16", 2)])
def test_multiply_adds_are_those_of_3xtf32(weights, products):
    executor, (T, R, H) = host_cuda.HostExecutor(), (2, 32, 64)  # no padding
    with runtime.use(executor):
        written_on_device(text_case(R, H, V=5, layers=1), T, variant="batched", weights=weights)
    [text] = executor.launches
    assert text.mma_calls * 16 * 8 * 8 == products * T * R * 3 * H * H


# ---- The plan -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gpu, R, weights, variant, groups", [
    ("h100", 8, "fp32", "persistent", 1), ("h100", 9, "fp32", "batched", 1), ("h100", 64, "fp32", "batched", 2),
    ("h100", 64, "bf16", "batched", 4), ("a100", 64, "fp32", "batched", 1), ("a100", 64, "bf16", "batched", 2),
    ("3090", 64, "bf16", "batched", 1), ("l4", 64, "fp32", "stepwise", 0), ("t4", 64, "fp32", "stepwise", 0),
])
def test_plan_of_the_tutorial_model_for_many_rows(gpu, R, weights, variant, groups):
    plan = generation_plan(GPUS[gpu], R, V=66, H=1024, layers=1, weights=weights)
    assert (plan.variant, plan.groups) == (variant, groups), plan.reason


def test_reason_has_the_predictions_that_decided():
    plan = generation_plan(GPUS["h100"], 64, V=66, H=1024, layers=1)
    assert plan.reason.startswith("2 x 64 blocks hold fp32 weights on chip, in 225 KiB each, 1 barrier per character; "
                                  "predicted: batched 10.2 us, persistent 30.1 us, stepwise ")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_batched_plans_keep_to_what_the_gpu_has(gpu, weights):
    for R in (8, 9, 17, 64, 65, 300):
        for H, V, layers in ((1, 2, 1), (7, 300, 1), (256, 66, 1), (1000, 66, 1), (1024, 5000, 1), (256, 66, 2)):
            for plan in generation_plans(gpu, R, V, H, layers, weights):
                if plan.variant == "batched":
                    assert layers == 1 and R > 8 and gpu.capability >= 80
                    assert_fits(plan, gpu, R, V, H)


def assert_fits(plan, gpu: GPU, R: int, V: int, H: int) -> None:
    """The limits of the GPU, with what a block holds counted again."""
    _, bf16, rows, columns, k_steps, register_steps = plan.constants.values()
    assert plan.groups * plan.blocks <= gpu.multiprocessors
    assert (plan.groups - 1) * plan.group_rows < R <= plan.groups * plan.group_rows
    assert (plan.blocks - 1) * plan.units < H <= plan.blocks * plan.units and columns == 3 * plan.units
    assert (k_steps - 1) * 64 < H <= k_steps * 64 and 0 <= register_steps <= k_steps
    tiles_n, quads = -(-columns // 8), -(-V // 4)
    weights = 8 * (k_steps - register_steps) * tiles_n * 32 * (1 if bf16 else 2)
    sums = 4 * rows * (tiles_n * 8 + (8 if tiles_n % 2 == 0 else 0))
    logits = max(256 // quads, 1) * quads * 4
    states = plan.units * (-(-plan.group_rows // 8) * 8 + 4) + plan.group_rows * columns
    assert 4 * (weights + sums + logits + states + V * columns + V * plan.units + columns
                + plan.group_rows) == plan.shared_bytes
    assert plan.shared_bytes + STATIC_SHARED_BYTES <= gpu.shared_bytes


def test_what_batched_does_not_write_is_refused(executor):
    for R, layers in ((8, 1), (9, 2)):
        with pytest.raises(ValueError, match="^variant: expected [^:]*, got 'batched': "):
            written_on_device(text_case(R, H=5, V=7, layers=layers), 1, variant="batched")
