"""Products of two matrices: the large ones of a training step at the tutorial's sizes."""

import functools

import pytest

from bench import floors
from bench.floors import FLOAT
from bench.implementations import (
    OURS,
    bfloat16_bits,
    in_float64,
    on,
    plain_candidates,
    random_inputs,
    runnable,
    torch_candidates,
)
from bench.side_by_side import Benchmark, Candidate
from char_gru.kernels import naive, op_set
from char_gru.kernels.matmul import OPERANDS, matmul
from char_gru.kernels.plan.products import ALIGNMENT, VARIANTS


def inputs(M, N, K):
    return random_inputs({"A": (K, M), "B": (K, N)})


def reference(inputs):
    A, B = in_float64(inputs).values()
    return {"C": A.T @ B}


def ours_naive(inputs):
    ops = naive.op_set()
    A, B = (on(ops, array) for array in inputs.values())
    C = ops.empty((A.shape[1], B.shape[1]))
    return runnable(ops, lambda: naive.matmul(A, B, C, transpose_a=True), C=C)


def ours(variant, precision, stored, inputs):
    """stored: whether the operands are given as bfloat16 bits, as the recurrence stores them in bf16."""
    ops = op_set(precision)
    A, B = (on(ops, bfloat16_bits(array) if stored else array) for array in inputs.values())
    C = ops.empty((A.shape[1], B.shape[1]))
    return runnable(ops, lambda: matmul(A, B, C, transpose_a=True, precision=precision, variant=variant), C=C)


def plain(library, inputs):
    A, B = map(library.array, inputs.values())
    C = library.xp.empty((A.shape[1], B.shape[1]), A.dtype)

    def run():
        library.matmul(A.T, B, C)
        return {"C": C}

    return library.runnable(run)


def pytorch(library, inputs):
    A, B = map(library.array, inputs.values())
    return library.runnable(lambda: {"C": A.T @ B})


def candidates(device, M, N, K):
    if device.kind == "cuda":
        yield Candidate(f"{OURS} naive fp32", "fp32", ours_naive)
        for precision, operand_bytes in OPERANDS:
            stored, aligned = operand_bytes < FLOAT, all(operand_bytes * rows % ALIGNMENT == 0 for rows in (M, N))
            for variant in VARIANTS:
                if precision in device.precisions and (variant == "tiled" or aligned and len(device.precisions) > 1):
                    yield Candidate(f"{OURS} {variant} {precision}{' operands' * stored}", precision,
                                    functools.partial(ours, variant, precision, stored))
    yield from plain_candidates(device, plain)
    yield from torch_candidates(device, pytorch)


MATMUL = Benchmark("matmul", floors.matmul, inputs, reference, candidates,
                   sizes=({"M": 3072, "N": 1024, "K": 6400}, {"M": 66, "N": 1024, "K": 6400}))


@pytest.mark.side_by_side(MATMUL)
def test_matmul(turn):
    """C = A^T B: dW_hh and dW_out."""
    turn()
