"""Checks of all kernels by name, for tests/host_ptx: those of `python -m kernels --check`, and sizes that it has not.

A module takes seconds to compile, so all checks share few modules: one width H, and other numbers of rows, characters,
layers and options, on which constants do not depend.
"""

import contextlib
import functools
import itertools
import re
import types
from collections.abc import Callable, Iterator

import numpy as np

from char_gru.kernels import naive, op_set, runtime
from char_gru.kernels.adam import adam, global_norm
from char_gru.kernels.generate import sample
from char_gru.kernels.gru_persistent import constants
from char_gru.kernels.input_table import sum_by_id, sum_by_id_scratch_size
from char_gru.kernels.matmul import OPERANDS, column_sums, matmul
from char_gru.kernels.plan.generation import STATIC_SHARED_BYTES, WEIGHTS, generation_plan
from char_gru.kernels.plan.gpus import precisions
from char_gru.kernels.plan.products import MULTISTAGE_TILES, TILES
from char_gru.kernels.plan.recurrence import backward_plan, forward_plan
from char_gru.kernels.sizes import ceil_div
from char_gru.rnn import check, reference
from tests.helpers.compare import assert_close
from tests.helpers.recurrence import assert_matches_reference, layer, on_device
from tests.helpers.texts import OPTIONS, assert_text_matches_reference, text_case

__all__ = ["SHARED_BYTES", "WINDOW", "checks"]

WINDOW = check.Window(T=2, B=6, E=36, H=134, V=48, rows=(1, 17))
SHARED_BYTES = 227 * 1024
"""Shared memory of the GPU that the checks are planned for, as of an H100."""

LAYOUTS = {"nn": {}, "tn": {"transpose_a": True}, "nt": {"transpose_b": True}}


def checks() -> dict[str, Callable[[], None]]:
    """Name of each check for the executor in use -> a function that raises AssertionError where results are wrong."""
    found = dict(_of_a_gpu())
    gpu = runtime.current_executor().gpu
    for generator in (_naive, _products, _recurrences, _texts, _others):
        found |= dict(generator(gpu))
    return found


def _of_a_gpu() -> Iterator[tuple[str, Callable]]:
    def passes(name: str, function: Callable) -> None:
        result = function(name)
        assert result.passed, result

    for name, function in check.checks_of((WINDOW,)):
        yield re.sub(r" ([TBH]=\d+)+", "", name), functools.partial(passes, name, function)


def _ops(op: Callable, window: check.Window, ops: types.SimpleNamespace, precision: str = "fp32") -> None:
    result = check._check_op(op, window, ops, precision, op.__name__)
    assert result.passed, result


def _naive(gpu) -> Iterator[tuple[str, Callable]]:
    ops, small = naive.op_set(), WINDOW._replace(B=5, E=7, H=18)
    for op in (check._input_table, check._gru, check._output_layer, check._update):
        for window in (small, small._replace(H=3), small._replace(B=31, E=31, H=63, V=63)):
            yield f"naive {op.__name__[1:]} H={window.H}", functools.partial(_ops, op, window, ops)
    yield "naive output_layer H=0", functools.partial(_loss, ops, "fp32", 5, 0, 63)
    yield "naive sample", functools.partial(_sampled, naive.sample, 20, 30)


def _products(gpu) -> Iterator[tuple[str, Callable]]:
    for (precision, size), variant in ((operands, variant) for operands in OPERANDS
                                       for variant in ("tiled", "multistage")):
        if precision not in precisions(gpu) or (variant == "multistage" and gpu.capability < 80):
            continue
        for tile in TILES if variant == "tiled" else MULTISTAGE_TILES[precision]:
            for layout, options in LAYOUTS.items():
                yield (f"product {variant} {tile} {precision}{' of bf16' * (size == 2)} {layout}",
                       functools.partial(_product, precision, size, variant=variant, tile=tile, **options))
    yield ("product split along K",
           functools.partial(_product, "fp32", 4, sizes=((4, 8, 700), (4, 8, 31 * 256)), variant="tiled", tile=64))
    yield "column_sums", _column_sums


PRODUCT_SIZES = (264, 136, 104), (8, 8, 8), (72, 8, 0)
"""M, N, K: several tiles, the last one not full; less than a round of K; nothing to add."""


def _product(precision: str, size: int, sizes=PRODUCT_SIZES, transpose_a=False, transpose_b=False, **options) -> None:
    """With a bias and without; of positive numbers, too, where rounding in one direction adds up."""
    for (M, N, K), least in ((sizes, least) for sizes in sizes for least in (-1.0, 0.0)):
        rng = np.random.default_rng(K)
        A, B = (rng.uniform(least, 1, shape).astype(np.float32) for shape in ((M, K), (K, N)))
        b = rng.standard_normal(N).astype(np.float32)
        C, operands = runtime.empty((M, N), np.float32), [A.T if transpose_a else A, B.T if transpose_b else B]
        if size == 2:
            operands = [(reference.rounded(x, "bf16").view(np.uint32) >> 16).astype(np.uint16) for x in operands]
        operands = [runtime.to_device(np.ascontiguousarray(x)) for x in operands]
        for bias in (b, 0 * b):
            matmul(*operands, C, bias=runtime.to_device(bias) if bias.any() else None, precision=precision,
                   transpose_a=transpose_a, transpose_b=transpose_b, **options)
            exact, single = (reference.product(A.astype(dtype), B.astype(dtype), precision) + bias.astype(dtype)
                             for dtype in (np.float64, np.float32))
            assert_close("C", runtime.to_host(C), exact, single)


def _column_sums() -> None:
    A = np.random.default_rng(0).standard_normal((300, 70)).astype(np.float32)
    sums = runtime.empty((70,), np.float32)
    column_sums(runtime.to_device(A), sums)
    assert_close("sums", sums, A.astype(float).sum(axis=0), A.sum(axis=0))


def _recurrences(gpu) -> Iterator[tuple[str, Callable]]:
    for precision in precisions(gpu):
        ops = op_set(precision)
        odd = WINDOW._replace(B=5, E=7)
        for B, H, V in ((75, WINDOW.H, 1021), (75, 0, 1021), (75, WINDOW.H, 75), (75, 0, 75), (31744, 0, 2),
                        (75, 36, 1021), (300, 36, 1021), (300, 164, 75), (75, 164, 75)):
            yield f"loss {precision} B={B} H={H} V={V}", functools.partial(_loss, ops, precision, B, H, V)
        yield f"input_table {precision} E=7", functools.partial(_ops, check._input_table, odd, ops, precision)
        yield f"gru persistent {precision} in many tiles", functools.partial(_many_tiles, precision)
        yield f"gru persistent {precision} of split K", functools.partial(_split, precision)
        yield f"gru stepwise {precision} in many tiles", functools.partial(_many_tiles, precision, "stepwise")


def _loss(ops: types.SimpleNamespace, precision: str, B: int, H: int, V: int) -> None:
    rng = np.random.default_rng(V)
    h_tb, W_out, b_out = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, B, H), (V, H), (V,)))
    W_out *= np.float32(max(H, 1)**-0.5)
    targets_tb, loss, dlogits_tb = rng.integers(0, V, (1, B)).astype(np.int32), *map(
        functools.partial(runtime.empty, dtype=np.float32), ((1,), (1, B, V)))
    targets_tb[0, :3] = np.arange(29, 32) % V  # with V 1,021, of lanes that take an odd number of turns
    ops.cross_entropy_forward(*map(runtime.to_device, (h_tb, W_out, b_out, targets_tb)), loss, dlogits_tb)
    exact, single = (reference.cross_entropy_forward(h_tb.astype(dtype), W_out.astype(dtype), b_out.astype(dtype),
                                                     targets_tb, precision) for dtype in (np.float64, np.float32))
    for name, *values in zip(("loss", "dlogits_tb"), (loss, dlogits_tb), exact, single):
        assert_close(name, *map(np.atleast_1d, values))
    ops.cross_entropy_forward(*map(runtime.to_device, (h_tb, W_out, np.nan * b_out, targets_tb)), loss, dlogits_tb)
    assert np.isnan(loss).all() and np.isnan(dlogits_tb).all()


def _many_tiles(precision: str, variant: str = "persistent") -> None:
    """The plans that are chosen for a layer, alone or with another, for so many rows that a group has six tiles of them
    and another group one."""
    _, B, _, H, V, _ = WINDOW
    gpu, done = runtime.current_executor().gpu, []
    forward = forward_plan(gpu, B, H, precision, variant=variant)
    for V_out, V_in in ((V, V), (V, 0), (0, V)):
        backward = backward_plan(gpu, B, H, precision, V_out=V_out, V_in=V_in, variant=variant)
        module = variant == "persistent" and constants(backward)
        if module not in done:
            done.append(module)
            rows = 37 if variant == "stepwise" else 6 * max(forward.rows, backward.rows) + 3
            _both_ways(precision, layer(2, rows, H, 147, 300), forward, backward, groups=2)
            _both_ways(precision, layer(1, rows, H, V), forward, backward, groups=2)


def _split(precision: str) -> None:
    """Plans as large models have them: larger tiles, K split in two, and weights in registers."""
    T, B, _, H, V, _ = WINDOW
    gpu, register_steps = runtime.current_executor().gpu, int(precision != "fp32")
    forward = forward_plan(gpu, B, H, precision, variant="persistent")
    backward = backward_plan(gpu, B, H, precision, V_out=V, V_in=V, variant="persistent")
    forward, backward = (plan._replace(rows=32, register_steps=register_steps) for plan in (forward, backward))
    backward = backward._replace(splits=2, units=36, columns=40, blocks=ceil_div(H, 36))
    _both_ways(precision, layer(T, 70, H, 147, V), forward, backward, groups=1)
    _both_ways(precision, layer(T, 70, H, 30), forward, backward, groups=1)


def _both_ways(precision: str, case, forward, backward, groups: int) -> None:
    """With the output layer on top, fused, and sums on chip; without a W_y and with sums elsewhere."""
    B, fused = case.h0.shape[0], case.W_y is not None
    plans = [forward, backward]
    if forward.variant == "persistent":
        backward = backward._replace(V_in=len(case.P), sums_on_chip=fused, fused_output_steps=0)
        if fused:
            backward = backward._replace(V_out=len(case.W_y)).with_fused_output()
        plans = [plan._replace(B=B, groups=groups, row_tiles=ceil_div(ceil_div(B, plan.rows), groups))
                 for plan in (forward, backward)]
    assert_matches_reference(case, on_device(case, precision, plans), precision)


def _texts(gpu) -> Iterator[tuple[str, Callable]]:
    """With options; with more characters than a block has threads; the most likely characters; where one block has
    many units, or weights do not fit."""
    for (R, layers), weights in itertools.product(((1, 1), (17, 1), (1, 2), (17, 2)), WEIGHTS):
        chosen = generation_plan(gpu, R, WINDOW.V, WINDOW.H, layers, weights).variant
        batched = ("batched",) * (R > 1 and layers == 1 and gpu.capability >= 80)
        for variant in dict.fromkeys((chosen, *batched, "stepwise")):
            name = f"text {variant} {weights} rows={R} layers={layers}"
            written = functools.partial(_text, R, layers, weights, variant)
            yield f"{name} with options", functools.partial(written, **OPTIONS)
            yield f"{name} V=7900", functools.partial(written, V=7900, top_k=40, top_p=0.9)
            yield f"{name} temperature=0", functools.partial(written, temperature=0)
            if variant == "batched":
                same = generation_plan(gpu, R, WINDOW.V, WINDOW.H, layers, weights, variant).constants
                yield f"{name} in large groups", functools.partial(_large_groups, weights, same)
            if variant == "persistent":
                for V in (300, 400, 600, 7900):  # of which several threads share a sum over the blocks, or one
                    yield f"{name} V={V} top_p=0.9", functools.partial(
                        written, V=V, multiprocessors=16 if R > 1 else 0, top_p=0.9)
                yield f"{name} with 23 units a block", functools.partial(written, multiprocessors=6)
                yield f"{name} with weights off chip", functools.partial(
                    written, V=11, multiprocessors=4, off_chip=128)
                for V in (WINDOW.V, 300, 7900):
                    yield f"{name} in one block V={V}", functools.partial(
                        written, V=V, H=1700 if R == 1 else 234, multiprocessors=1, **OPTIONS)


    for weights in WEIGHTS:
        for multiprocessors, V in ((16, WINDOW.V), (40, 256), (40, 248)):
            for options in (OPTIONS, {"temperature": 0}, {"top_p": 0.9}, {}):
                said = " ".join(f"{name}={value}" for name, value in options.items())
                yield f"text one-text {weights} V={V} {said}".rstrip(), functools.partial(
                    _text, 1, 1, weights, "one-text", V=V, multiprocessors=multiprocessors, **options)


def _text(R: int, layers: int, weights: str, variant: str, V: int = WINDOW.V, H: int = WINDOW.H,
          multiprocessors: int = 0, off_chip: int = 0, **options) -> None:
    executor = runtime.current_executor()
    before = executor.gpu
    gpu = before._replace(shared_bytes=2**30, multiprocessors=multiprocessors or before.multiprocessors)
    if off_chip:
        plan = generation_plan(gpu, R, V, H, layers, weights, variant)
        column = (2 * layers - 1) * 3 * plan.units * 4 // (1 + plan.constants["BF16"])
        gpu = gpu._replace(shared_bytes=plan.shared_bytes + STATIC_SHARED_BYTES - off_chip * column)
        assert generation_plan(gpu, R, V, H, layers, weights, variant).off_chip == off_chip
    executor.gpu = gpu
    try:
        assert_text_matches_reference(text_case(R, H, V, layers, scale=1.7 * H**-0.5), T=3, variant=variant,
                                      weights=weights, **options)
    finally:
        executor.gpu = before


def _large_groups(weights: str, constants: dict[str, int]) -> None:
    """Batched text in groups of 31 rows or more, on a GPU whose plan has these constants."""
    gpu = runtime.current_executor().gpu._replace(shared_bytes=2**30)
    for multiprocessors, R in itertools.product(range(2, 17), (33, 70)):
        with contextlib.suppress(ValueError):  # no such plan
            plan = generation_plan(gpu._replace(multiprocessors=multiprocessors), R, WINDOW.V, WINDOW.H, 1, weights,
                                   "batched")
            if plan.constants == constants and plan.group_rows > 30:
                _text(R, 1, weights, "batched", multiprocessors=multiprocessors)
                return
    raise AssertionError("no GPU has such a plan")


def _others(gpu) -> Iterator[tuple[str, Callable]]:
    for V in (WINDOW.V, 7900):
        yield f"sample V={V}", functools.partial(_sampled, sample, V, 20)
    yield "sum_by_id of many positions", functools.partial(_sum_by_id, 2500, 3, 50)
    yield "sum_by_id of 31 warps", functools.partial(_sum_by_id, 190, 3, 2)
    yield "sum_by_id of two digits", functools.partial(_sum_by_id, 300, 300, 2)
    yield "global_norm of several turns", _global_norm
    yield "adam of slices", _adam_of_slices
    yield "adam without a finite norm", _adam_without_a_finite_norm


def _sampled(sample: Callable, V: int, R: int) -> None:
    """Characters drawn with every filter, away from the borders between two of them."""
    rng, logits = np.random.default_rng(V), np.random.default_rng(R).standard_normal((R, V)).astype(np.float32)
    for options in ({}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 5, "top_p": 0.97}, OPTIONS):
        uniforms = check._away_from_borders(
            lambda numbers, options=options: reference.sample(logits, numbers, **options), rng, R)
        ids = runtime.empty((R,), np.int32)
        sample(runtime.to_device(logits), runtime.to_device(uniforms), ids, **options)
        np.testing.assert_array_equal(runtime.to_host(ids), reference.sample(logits, uniforms, **options))
    sample(runtime.to_device(np.nan * logits), runtime.to_device(uniforms), ids)
    assert ((runtime.to_host(ids) > 0) & (runtime.to_host(ids) < V)).all()


def _sum_by_id(N: int, V: int, H: int) -> None:
    rng = np.random.default_rng(N)
    da, di_n = (rng.standard_normal((1, N, n)).astype(np.float32) for n in (3 * H, H))
    ids, dP = rng.integers(0, V, (1, N)).astype(np.int32), runtime.empty((V, 3 * H), np.float32)
    sum_by_id(*map(runtime.to_device, (da, di_n, ids)), dP, runtime.empty((sum_by_id_scratch_size(N),), np.int32))
    di, exact = np.concatenate([da[0, :, :2 * H], di_n[0]], axis=1), np.zeros((V, 3 * H))
    single = exact.astype(np.float32)
    for sums in (exact, single):
        np.add.at(sums, ids[0], di)
    assert_close("dP", runtime.to_host(dP), exact, single)


def _global_norm() -> None:
    """So many numbers that each thread takes eleven groups of four, or twelve."""
    grads = np.random.default_rng(0).standard_normal(4 * 1024 * 256 * 11 + 70, np.float32)
    norm = runtime.empty((1,), np.float32)
    global_norm(runtime.to_device(grads), norm)
    exact = np.sqrt(np.sum(grads.astype(float)**2, keepdims=True))
    assert_close("norm", runtime.to_host(norm), exact, np.sqrt(np.sum(grads**2, keepdims=True)))


def _adam_arrays(N: int, offset: int) -> tuple[list, list]:
    """Device arrays params, grads, m, v that start `offset` numbers behind a multiple of 16 bytes, and their copies."""
    rng = np.random.default_rng(N)
    host = [np.abs(rng.standard_normal(N + offset).astype(np.float32)) for _ in range(4)]
    return [runtime.to_device(array)[offset:] for array in host], [array[offset:].copy() for array in host]


def _adam_of_slices() -> None:
    arrays, host = _adam_arrays(701, offset=1)
    norm, step_size = runtime.empty((1,), np.float32), runtime.to_device(np.array([1e-3], np.float32))
    global_norm(arrays[1], norm)
    adam(*arrays, norm, step_size, 0.5)
    results = []
    for dtype in (np.float64, np.float32):
        values = [array.astype(dtype) for array in host]
        expected = np.sqrt(np.sum(values[1]**2))
        results.append((expected, *reference.adam(*values, expected, dtype(np.float32(1e-3)), 0.5)))
    actual = [runtime.to_host(array) for array in (norm, arrays[0], arrays[2], arrays[3])]
    for name, *result in zip(("norm", "params", "m", "v"), actual, *results):
        assert_close(name, np.ravel(result[0]), *map(np.ravel, result[1:]))


def _adam_without_a_finite_norm() -> None:
    arrays, host = _adam_arrays(70, offset=0)
    adam(*arrays, *(runtime.to_device(np.array([x], np.float32)) for x in (np.inf, 1e-3)))
    for array, before in zip(arrays, host):
        np.testing.assert_array_equal(runtime.to_host(array), before)
