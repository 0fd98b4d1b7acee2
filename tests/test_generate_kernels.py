"""Writing text on the device against the reference: states, prompts, and the characters drawn."""

import itertools
import weakref

import numpy as np
import pytest

from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.kernels.generate import GRAPH_STEPS
from char_gru.kernels.plan.generation import (
    MAX_ROWS,
    STATIC_SHARED_BYTES,
    WEIGHTS,
    generation_plan,
    generation_plans,
)
from char_gru.kernels.plan.gpus import GPU
from char_gru.rnn.params import named_views
from char_gru.rnn.sampler import Generator
from char_gru.rnn.vocabulary import Vocabulary
from tests import host_cuda
from tests.helpers.cases import random_case
from tests.helpers.texts import (
    OPTIONS,
    assert_text_matches_reference,
    assert_texts_drawn,
    assert_written,
    prompts,
    skip_unless_it_fits,
    slow,
    text_case,
    written_on_device,
)

VARIANTS = ("stepwise", "persistent")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("R, layers", [
    slow(1, 1), slow(1, 2), (2, 3), (3, 1), slow(MAX_ROWS, 2), slow(MAX_ROWS + 1, 1),
])
def test_text_and_states_match_reference(executor, R, layers, variant):
    assert_text_matches_reference(text_case(R, H=9, V=11, layers=layers), T=5, temperature=0.8, variant=variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("H, V", [(1, 2), (8, 7), (31, 66), (32, 8), (33, 9), slow(65, 66)])
def test_sizes_below_at_and_above_a_warp(executor, H, V, variant):
    assert_text_matches_reference(text_case(3, H, V, layers=1), T=3, **OPTIONS, variant=variant)


# How the plan cuts the persistent kernel for so many multiprocessors: more units than warps; a last tile of units that
# overlaps the tile before it; a last group of fewer rows; a group of one block, more rows than blocks; several passes
# of the rows; inputs of one, two and three stages, a ring that comes round; more logits than threads.
@pytest.mark.parametrize("multiprocessors, R, H, V, layers, groups, blocks, units", [
    slow(8, 1, 65, 3, 1, 1, 8, 9), (3, 3, 33, 9, 2, 1, 3, 14), slow(8, 17, 9, 11, 3, 2, 2, 8),
    slow(8, 19, 70, 3, 1, 1, 8, 9), slow(24, 64, 20, 5, 2, 8, 3, 8), slow(3, 64, 20, 5, 2, 1, 3, 8),
    slow(8, 64, 130, 3, 1, 2, 4, 34), slow(8, 40, 30, 300, 1, 4, 2, 16), slow(24, 1, 300, 5, 1, 1, 24, 13),
    slow(1, 2, 7, 700, 1, 1, 1, 8), (2, 2, 9, 260, 1, 1, 2, 8),
])
def test_however_the_work_is_cut_the_text_is_the_same(executor, monkeypatch, multiprocessors, R, H, V, layers, groups,
                                                      blocks, units):
    monkeypatch.setattr(executor, "gpu", GPU("of this test", 90, multiprocessors, 96 * 1024))
    plan = generation_plan(executor.gpu, R, V, H, layers, variant="persistent")
    assert (plan.groups, plan.blocks, plan.units) == (groups, blocks, units)
    assert_text_matches_reference(text_case(R, H, V, layers, scale=0.3), T=3, variant="persistent")


@pytest.mark.parametrize("R, layers, weights, variant", [
    (1, 1, "fp32", "persistent"), slow(9, 2, "bf16", "persistent"), slow(3, 2, "fp32", "persistent"),
])
def test_wherever_weights_lie_the_bits_are_the_same(executor, monkeypatch, R, layers, weights, variant):
    """All columns on chip, all but one chunk of 128, all but two chunks, none. The last chunk is not full."""
    H, V = 320, 5
    case, sizes = text_case(R, H, V, layers, scale=0.3), (R, V, H, layers, weights, variant)
    gpu = GPU("of this test", 90, 8, 2**30)
    plan = generation_plan(gpu, *sizes)
    skip_unless_it_fits(executor, plan)
    column = (2 * layers - 1) * 3 * plan.units * 4 // (1 + plan.constants["BF16"])
    results = []
    for off_chip in (0, 128, 256, H):
        limit = plan.shared_bytes + STATIC_SHARED_BYTES - off_chip * column
        monkeypatch.setattr(executor, "gpu", gpu._replace(shared_bytes=limit))
        assert generation_plan(executor.gpu, *sizes).off_chip == off_chip
        results.append(written_on_device(case, 4, variant, weights=weights))
    for other in results[1:]:
        for array, expected in zip(other, results[0]):
            np.testing.assert_array_equal(array, expected)


def test_more_logits_than_a_block_sums_at_once(executor, monkeypatch):
    gpu = GPU("of this test", 90, 1, 227 * 1024)
    skip_unless_it_fits(executor, generation_plan(gpu, 2, 1100, 7, 1, variant="persistent"))
    monkeypatch.setattr(executor, "gpu", gpu)
    assert_text_matches_reference(text_case(2, H=7, V=1100, layers=1), T=3, variant="persistent")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("R, layers", [slow(1, 1), (2, 3), slow(9, 1)])
def test_weights_of_bf16_are_the_rounded_ones(executor, R, layers, variant):
    assert_text_matches_reference(text_case(R, H=19, V=11, layers=layers), T=5, weights="bf16", variant=variant)


# An odd H and V; one block and several, with one logit each, several and none; k for one pair of a thread and for two,
# and threads without k; more logits than a warp has on their way at once.
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("H, V", [(1, 2), (9, 11), slow(8, 7), slow(31, 66), slow(100, 150), slow(600, 5)])
def test_one_text_and_its_states_match_reference(executor, H, V, weights, monkeypatch):
    monkeypatch.setattr(executor, "gpu", executor.gpu._replace(multiprocessors=75))
    case = text_case(1, H, V, layers=1, scale=0.3)
    assert_text_matches_reference(case, T=6, **OPTIONS, variant="one-text", weights=weights)


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, OPTIONS],
                         ids=str)
@pytest.mark.parametrize("H, V", [(6, 13), slow(100, 150)])
def test_options_reach_the_drawing_of_one_warp(executor, H, V, options, monkeypatch):
    monkeypatch.setattr(executor, "gpu", executor.gpu._replace(multiprocessors=75))
    assert_text_matches_reference(text_case(1, H, V, layers=1, scale=0.3), T=20, **options, variant="one-text")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, OPTIONS], ids=str)
def test_options_reach_the_drawing(executor, options, variant):
    assert_text_matches_reference(text_case(4, H=6, V=13, layers=1), T=20, **options, variant=variant)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.slow
def test_many_texts_are_those_of_the_reference(executor, seed):
    case = random_case(T=1, B=8, E=3, H=10, V=40, seed=seed, scale=0.4)
    assert_text_matches_reference(case, 50, variant="persistent")


@pytest.mark.parametrize("R, layers, variant", [(2, 1, "persistent"), (1, 2, "persistent"), (1, 1, "one-text")])
@pytest.mark.parametrize("T", [100, slow(2000)])
def test_a_long_text_is_that_of_the_reference(executor, T, R, layers, variant):
    """A wait that is missing or misplaced shows after many steps."""
    assert_text_matches_reference(text_case(R, H=9, V=5, layers=layers, scale=0.3), T, variant=variant)


@pytest.mark.parametrize("R, layers, variant", [*((2, 2, variant) for variant in VARIANTS), (1, 1, "one-text")])
def test_a_prompt_is_read_without_drawing(executor, R, layers, variant):
    """Every character forced: the text is the prompt, and the logits, which no character needs, stay NaN."""
    case = text_case(R, H=5, V=7, layers=layers)
    params = {name: runtime.to_device(array.astype(np.float32)) for name, array in
              named_views(case.flat_params, case.sizes).items()}
    forced_tr = np.array([[3, 0], [1, 6], [0, 2]], np.int32)[:, :R]
    ids, ids_tr = runtime.to_device(np.array([1, 2], np.int32)[:R]), runtime.empty((3, R), np.int32)
    saved = kernels.generation_saved(R, 5, 7)._replace(logits_r=runtime.to_device(np.full((R, 7), np.nan, np.float32)))
    kernels.generate(params, runtime.zeros((7, 15), np.float32), runtime.to_device(case.h0.astype(np.float32)), ids,
                     runtime.to_device(forced_tr), runtime.zeros((3, R), np.float32), ids_tr, saved, variant=variant)
    np.testing.assert_array_equal(runtime.to_host(ids_tr), forced_tr)
    np.testing.assert_array_equal(runtime.to_host(ids), forced_tr[-1])
    assert np.isnan(runtime.to_host(saved.logits_r)).all()


@pytest.mark.parametrize("R, layers, variant", [
    *((3, layers, variant) for layers in (1, 2) for variant in VARIANTS), (1, 1, "one-text"),
])
def test_text_goes_on_where_it_stopped(executor, R, layers, variant):
    """Calls of one step, of two and of more write what one call of all steps writes."""
    case, T = text_case(R, H=9, V=9, layers=layers), 9
    params = {name: runtime.to_device(array.astype(np.float32)) for name, array in
              named_views(case.flat_params, case.sizes).items()}
    P = runtime.to_device(np.random.default_rng(1).standard_normal((9, 27)).astype(np.float32))
    results = []
    for cuts in ([0, T], [0, 1, 2, 4, T]):
        first, forced_tr, uniforms_tr = prompts(T, R, 9)
        h, ids = runtime.to_device(case.h0.astype(np.float32)), runtime.to_device(first)
        ids_tr, saved = runtime.empty((T, R), np.int32), kernels.generation_saved(R, 9, 9)
        forced_tr, uniforms_tr = runtime.to_device(forced_tr), runtime.to_device(uniforms_tr)
        for a, b in itertools.pairwise(cuts):
            kernels.generate(params, P, h, ids, forced_tr[a:b], uniforms_tr[a:b], ids_tr[a:b], saved, variant=variant)
        results.append((runtime.to_host(ids_tr), runtime.to_host(h)))
    for whole, halves in zip(*results):
        np.testing.assert_array_equal(whole, halves)


@pytest.fixture
def captures(executor, monkeypatch):
    """The functions that are captured in the test."""
    captured, capture = [], executor.capture
    monkeypatch.setattr(executor, "capture", lambda function: captured.append(function) or capture(function))
    return captured


class Chunks:
    """Text of three rows in chunks of up to `most` steps, by the stepwise variant, in arrays that stay where they are:
    params by name; P, h and ids; forced_tr, uniforms_tr and ids_tr."""

    def __init__(self, most: int):
        self.rng = np.random.default_rng(0)
        case, P = text_case(3, H=7, V=9, layers=2), self.rng.standard_normal((9, 21), np.float32)
        params = named_views(case.flat_params.astype(np.float32), case.sizes)
        self.params = {name: runtime.to_device(array) for name, array in params.items()}
        self.arrays = [runtime.to_device(array) for array in
                       (P, case.h0.astype(np.float32), np.arange(1, 4, dtype=np.int32))]
        self.text = [runtime.zeros((most, 3), dtype) for dtype in (np.int32, np.float32, np.int32)]
        self.saved = kernels.generation_saved(3, 7, 9)

    def write(self, T: int, **options) -> None:
        """Write T more steps, and compare them with the specification."""
        forced_tr = np.where(self.rng.random((T, 3)) < 0.2, self.rng.integers(0, 9, (T, 3)), -1).astype(np.int32)
        uniforms_tr = self.rng.random((T, 3), np.float32)
        P, h, first = map(runtime.to_host, self.arrays)
        forced, uniforms, ids_tr = (array[:T] for array in self.text)
        kernels.copy_in(forced, forced_tr)
        kernels.copy_in(uniforms, uniforms_tr)
        kernels.generate(self.params, *self.arrays, forced, uniforms, ids_tr, self.saved, variant="stepwise", **options)
        _, h_after, ids = map(runtime.to_host, self.arrays)
        assert_written({name: runtime.to_host(array) for name, array in self.params.items()}, h, first, forced_tr,
                       uniforms_tr, (runtime.to_host(ids_tr), ids, h_after), P=P, **options)


def test_steps_are_captured_once_and_repeated_in_every_chunk(captures):
    chunks, N = Chunks(most=5 * GRAPH_STEPS), GRAPH_STEPS
    for T, captured in ((1, 0), (N - 1, 0), (N, 0), (3 * N + 2, 1), (5 * N, 1), (N + 1, 1), (0, 1)):
        chunks.write(T)
        assert len(captures) == captured


def test_repeated_steps_read_what_is_in_the_arrays_now(captures):
    chunks = Chunks(most=2 * GRAPH_STEPS)
    for _ in range(3):
        chunks.write(2 * GRAPH_STEPS)
        kernels.copy_in(chunks.params["b_out"], runtime.to_host(chunks.params["W_out"])[:, 0])
    assert len(captures) == 1


def test_steps_with_other_options_are_captured_anew(captures):
    chunks = Chunks(most=2 * GRAPH_STEPS)
    for options in ({}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.2}):
        before = len(captures)
        chunks.write(2 * GRAPH_STEPS, **options)
        assert len(captures) == before + 1
    assert len(chunks.saved.graphs) == 1


@pytest.mark.parametrize("each", [6, slow(1)])
def test_steps_with_another_array_are_captured_anew(captures, each):
    """Another array in the place of each one that a step has, or of every sixth."""
    chunks = Chunks(most=2 * GRAPH_STEPS)
    chunks.write(2 * GRAPH_STEPS)
    kept = [(chunks.params, name) for name in chunks.params if name not in ("W_emb", "W_ih.0", "b_ih.0")]  # are in P
    kept += [(group, i) for group in (chunks.arrays, chunks.text) for i in range(3)]
    for group, key in kept[::each]:
        before = len(captures)
        group[key] = runtime.to_device(runtime.to_host(group[key]))
        chunks.write(2 * GRAPH_STEPS)
        assert len(captures) == before + 1
    assert len(chunks.saved.graphs) == 1


def test_captured_steps_are_freed_with_the_room_they_worked_in(executor):
    chunks = Chunks(most=2 * GRAPH_STEPS)
    chunks.write(2 * GRAPH_STEPS)
    freed = weakref.ref(*chunks.saved.graphs.values())
    del chunks
    assert freed() is None


def test_a_writer_on_a_gpu_that_cannot_hold_the_model_captures_once(captures, executor, monkeypatch):
    characters = "\nabcdefg"
    case, vocabulary = text_case(1, H=7, V=len(characters) + 1, layers=1), Vocabulary(characters)
    params = named_views(case.flat_params.astype(np.float32), case.sizes)
    on_device = {name: runtime.to_device(array) for name, array in params.items()}
    generator = Generator(case.sizes, vocabulary, on_device, kernels)
    monkeypatch.setattr(executor, "gpu", GPU("of this test", 75, 2, 1024))
    texts = generator.generate(["ab"], 100, seed=1)
    assert_texts_drawn(params, vocabulary, ["ab"], texts, seed=1)
    assert len(captures) == 1


@pytest.mark.parametrize("R, layers, variant", [
    *((3, 2, variant) for variant in VARIANTS), slow(17, 1, "persistent"), (1, 1, "one-text"),
])
def test_generation_does_not_depend_on_the_order_of_threads(ordered_executor, R, layers, variant):
    assert_text_matches_reference(text_case(R, H=11, V=13, layers=layers), T=4, **OPTIONS, variant=variant)


@pytest.mark.parametrize("variant, R, layers", [("stepwise", 2, 2), ("persistent", 2, 3), ("one-text", 1, 1)])
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.slow
def test_sanitizer_finds_nothing_in_generation(sanitizer, variant, R, layers):
    def run():
        written_on_device(text_case(R, H=9, V=10, layers=layers), 1 if variant == "stepwise" else 4, variant)

    assert host_cuda.run_sanitized(run, sanitizer) == ""


@pytest.mark.parametrize("sanitizer, H, shared_kib, off_chip", [("address,undefined", 130, 60, 128),
                                                                ("thread", 9, 6, 16)])
@pytest.mark.slow
def test_sanitizer_finds_nothing_in_weights_off_chip(sanitizer, H, shared_kib, off_chip):
    def run():
        executor = runtime.current_executor()
        executor.gpu = GPU("of this test", 90, 2, int(shared_kib * 1024))
        assert generation_plan(executor.gpu, 1, 3, H, 1, variant="persistent").off_chip == off_chip
        written_on_device(text_case(1, H, V=3, layers=1), 2, "persistent")

    assert host_cuda.run_sanitized(run, sanitizer) == ""


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.slow
def test_sanitizer_finds_nothing_in_groups_and_passes(sanitizer):
    def run():
        plan = generation_plan(runtime.current_executor().gpu, 20, 7, 20, 1, "bf16", "persistent")
        assert plan.groups == 2 and plan.blocks > 1 and plan.gathered_rows > plan.constants["ROWS"]
        written_on_device(text_case(20, H=20, V=7, layers=1), 1, "persistent", weights="bf16")

    assert host_cuda.run_sanitized(run, sanitizer) == ""


# ---- The plan -------------------------------------------------------------------------------------------------------

H100 = GPU("H100", 90, 132, 227 * 1024)
A100 = GPU("A100", 80, 108, 163 * 1024)
RTX_4090 = GPU("RTX 4090", 89, 128, 99 * 1024)
T4 = GPU("T4", 75, 40, 64 * 1024)


@pytest.mark.parametrize("gpu, R, layers, weights, variant, groups", [
    (H100, 1, 1, "fp32", "one-text", 1), (H100, 1, 1, "bf16", "one-text", 1), (H100, 2, 1, "fp32", "persistent", 1),
    (H100, 5, 1, "fp32", "persistent", 1), (A100, 1, 1, "fp32", "one-text", 1), (RTX_4090, 1, 1, "fp32", "one-text", 1),
    (H100, 1, 2, "bf16", "persistent", 1),
    (T4, 64, 1, "fp32", "stepwise", 0),
])
def test_plan_of_the_tutorial_model(gpu, R, layers, weights, variant, groups):
    plan = generation_plan(gpu, R, V=66, H=1024, layers=layers, weights=weights)
    assert (plan.variant, plan.groups, plan.off_chip) == (variant, groups, 0), plan.reason
    assert f"; predicted: {variant} " in plan.reason


@pytest.mark.parametrize("gpu, R, weights, on_chip", [
    (RTX_4090, 2, "fp32", "84 of 96"), (RTX_4090, 5, "fp32", "72 of 96"), (T4, 1, "bf16", "20 of 156"),
    (GPU("RTX 5090", 120, 170, 99 * 1024), 2, "fp32", "84 of 96"),
    (GPU("L4", 89, 58, 99 * 1024), 1, "fp32", "54 of 216"),
])
def test_weights_that_do_not_fit_come_through_l2_where_that_is_quicker(gpu, R, weights, on_chip):
    plan = generation_plan(gpu, R, V=66, H=1024, layers=1, weights=weights)
    assert plan.variant == "persistent" and plan.off_chip > 0
    assert f" blocks, {on_chip} KiB of {weights} weights a block on chip, the rest through L2, in " in plan.reason


def test_the_plan_says_why_it_is_stepwise():
    assert generation_plan(T4, 1, 66, 2048, 1).reason.startswith("for any sizes; predicted: stepwise 169.3 us, pers")
    assert "; persistent would take 2052 KiB of shared memory a block" in generation_plan(T4, 1, 5000, 1024, 1).reason


@pytest.mark.parametrize("gpu, units, tile", [(H100, 8, 1), (A100, 10, 2), (GPU("L4", 89, 58, 99 * 1024), 18, 4)])
def test_warps_pass_over_the_states_of_one_row_once(gpu, units, tile):
    plan = generation_plan(gpu, 1, 66, 1024, 1, variant="persistent")
    assert (plan.units, plan.constants["TILE_UNITS"]) == (units, tile)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("R", [1, 2, 7, 8, 9, 17, 64, 65, 300])
def test_plans_keep_to_what_the_gpu_has(R, weights):
    for H, V, layers in ((1, 2, 1), (7, 300, 3), (250, 66, 2), (1000, 66, 1), (1024, 5000, 1), (2048, 66, 1)):
        plans = generation_plans(H100, R, V, H, layers, weights)
        variants = {plan.variant for plan in plans}
        assert "stepwise" in variants and ("persistent" in variants or V == 5000 or H == 2048), (H, V, layers)
        for plan in (plan for plan in plans if plan.variant == "one-text"):
            module = plan.constants
            assert plan.blocks <= H100.multiprocessors and plan.blocks * module["UNITS"] >= H
            assert plan.blocks * module["OUTPUTS"] >= V and module["PAIRS"] * 512 >= H
            weights_and_sums = (3 * module["UNITS"] + module["OUTPUTS"]) * (2 * module["PAIRS"] + 1)
            assert R == layers == 1 and weights_and_sums <= 165  # more have not been seen to fit without a spill
        for plan in (plan for plan in plans if plan.variant == "persistent"):
            assert plan.groups * plan.blocks <= H100.multiprocessors
            assert (plan.groups - 1) * plan.group_rows < R <= plan.groups * plan.group_rows
            assert plan.blocks * plan.units >= H and plan.units >= plan.constants["TILE_UNITS"]
            assert plan.shared_bytes + STATIC_SHARED_BYTES <= H100.shared_bytes
            assert (plan.off_chip > 0) == ("the rest through L2" in plan.reason)


def test_what_the_gpu_cannot_hold_is_written_stepwise(executor):
    case = text_case(1, H=5, V=3000, layers=1)
    assert generation_plan(executor.gpu, 1, 3000, 5, 1).variant == "stepwise"
    assert_text_matches_reference(case, T=2)
    with pytest.raises(ValueError, match="^variant: expected stepwise, got 'persistent': for any sizes; predicted"):
        written_on_device(case, 1, variant="persistent")


def test_generate_names_the_options_there_are(executor):
    case = text_case(1, H=5, V=7, layers=1)
    with pytest.raises(ValueError, match="^variant: expected one-text or persistent or stepwise, got 'fast': "):
        written_on_device(case, 1, variant="fast")
    with pytest.raises(ValueError, match="^weights: expected fp32 or bf16, got 'fp16'"):
        written_on_device(case, 1, weights="fp16")


@pytest.mark.parametrize("name, bad", [("P", np.zeros((7, 14), np.float32)), ("h", np.zeros((1, 2, 5))),
                                       ("ids", np.zeros(2)), ("uniforms_tr", np.zeros((4, 2), np.float32)),
                                       ("ids_tr", np.zeros((3, 2), np.int64))])
def test_generate_names_the_argument_that_does_not_fit(executor, name, bad):
    case = text_case(2, H=5, V=7, layers=1)
    params = {key: runtime.to_device(array.astype(np.float32)) for key, array in
              named_views(case.flat_params, case.sizes).items()}
    arguments = {"P": np.zeros((7, 15), np.float32), "h": np.zeros((1, 2, 5), np.float32), "ids": np.zeros(2, np.int32),
                 "forced_tr": np.zeros((3, 2), np.int32), "uniforms_tr": np.zeros((3, 2), np.float32),
                 "ids_tr": np.zeros((3, 2), np.int32)}
    arguments = {key: runtime.to_device(array) for key, array in (arguments | {name: bad}).items()}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        kernels.generate(params, **arguments, saved=kernels.generation_saved(2, 5, 7))
