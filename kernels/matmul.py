"""Launchers of matmul.cu and matmul_multistage.cu: products of two matrices, and sums over the rows of a matrix."""

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.plan.products import (
    ALIGNMENT,
    MULTISTAGE_COLUMNS,
    SPLIT_BLOCKS,
    STAGE_BYTES,
    STAGES,
    TILES,
    product_plan,
)
from char_gru.kernels.scratch import scratch
from char_gru.kernels.sizes import ceil_div

PRECISIONS = {"fp32": 0, "tf32": 1, "bf16": 2}
OPERANDS = (("fp32", 4), ("tf32", 4), ("bf16", 4), ("bf16", 2))  # precision, and bytes of an element
TILE_THREADS = 256  # of tile.cuh
SUM_THREADS, SUM_COLUMNS = 1024, 32  # of a block of column_sums


def check_precision(precision: str) -> None:
    """Check a precision. Raises: ValueError for an unknown one."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def constants(precision: str, tile: int = TILES[0]) -> dict[str, int]:
    """The constants of tile.cuh.

    Raises: ValueError for an unknown precision.
    """
    check_precision(precision)
    return {"PRECISION": PRECISIONS[precision], "TILE_M": tile, "TILE_N": tile,
            "TILE_K": 32 if precision == "bf16" else 16}


def tiled_constants(precision: str, operand_bytes: int = 4, tile: int = TILES[0]) -> dict[str, int]:
    """The constants of matmul.cu."""
    return constants(precision, tile) | {"OPERAND_BYTES": operand_bytes}


def multistage_constants(precision: str, operand_bytes: int, tile: int) -> dict[str, int]:
    """The constants of matmul_multistage.cu."""
    return constants(precision) | {"TILE_M": tile, "TILE_N": MULTISTAGE_COLUMNS, "TILE_K": STAGE_BYTES // operand_bytes,
                                   "OPERAND_BYTES": operand_bytes, "STAGES": STAGES}


_SOURCES = {"tiled": ("matmul", tiled_constants), "multistage": ("matmul_multistage", multistage_constants)}
"""Variant -> stem of its .cu file, and the function that gives its constants."""


def matmul(A, B, C, *, transpose_a=False, transpose_b=False, bias=None, precision="fp32", variant=None,
           tile=None) -> None:
    """C = A B, with one operand transposed if asked for, plus a bias for each column.

    tf32 and bf16 round the operands, not the sums; in bf16 both operands may be given as bfloat16 bits. `variant` and
    `tile`, the rows of C that a block owns, are for tests and benchmarks. At most one operand may be transposed.

    Shapes: A (M, K), or (K, M) if transposed; B (K, N), or (N, K); both float32, or uint16 in bf16; bias (N,) float32;
    result C (M, N) float32.
    Raises: ValueError.
    Equals: A @ B + bias
    """
    check_precision(precision)
    dtype = np.dtype(np.uint16 if precision == "bf16" and A.dtype == np.uint16 else np.float32)
    M, N, K = check_matmul(A, B, C, transpose_a, transpose_b, bias, dtype)
    layout = "tn" if transpose_a else "nt" if transpose_b else "nn"
    gpu, rows_aligned = runtime.current_executor().gpu, aligned(A) and aligned(B)
    plan = product_plan(gpu, M, N, K, precision, dtype.itemsize, rows_aligned, variant, tile)
    sizes = np.int32(M), np.int32(N)
    # All products with few partial sums share one scratch array, of the size that every tiled product fits into.
    result = C if plan.splits == 1 else scratch("matmul", (max(plan.splits * M * N, SPLIT_BLOCKS * TILES[0]**2),))
    add_bias, bias = bias is not None, C if bias is None else bias  # without a bias, C stands in and is not read
    args = [result, A, B, bias, *sizes, np.int32(K), np.int32(plan.K_split), np.int32(add_bias and plan.splits == 1)]
    stem, constants_of = _SOURCES[plan.variant]
    runtime.launch(stem, f"{stem}_{layout}", plan.grid(M, N), TILE_THREADS, args,
                   constants=constants_of(precision, dtype.itemsize, plan.TILE_M), shared_bytes=plan.shared_bytes)
    if plan.splits > 1:
        runtime.launch("matmul", "add_partial_sums", ceil_div(M * N, TILE_THREADS), TILE_THREADS,
                       [C, result, bias, *sizes, np.int32(plan.splits), np.int32(add_bias)],
                       constants=tiled_constants("fp32"))


def check_matmul(A, B, C, transpose_a: bool, transpose_b: bool, bias, dtype=np.float32) -> tuple[int, int, int]:
    """Check the arrays of `matmul`, its operands of `dtype`; returns M, N and K. Raises: ValueError."""
    if transpose_a and transpose_b:
        raise ValueError("transpose_a, transpose_b: expected at most one of them, got both")
    (M, N), K = C.shape, A.shape[0 if transpose_a else 1]
    runtime.check("A", A, dtype, (K, M) if transpose_a else (M, K))
    runtime.check("B", B, dtype, (N, K) if transpose_b else (K, N))
    runtime.check("C", C, np.float32, (M, N))
    if bias is not None:
        runtime.check("bias", bias, np.float32, (N,))
    return M, N, K


def aligned(array) -> bool:
    """Whether every row starts at a multiple of 16 bytes, as asynchronous copies of 16 bytes need."""
    return runtime.address(array) % ALIGNMENT == 0 and array.shape[-1] * array.itemsize % ALIGNMENT == 0


def add_partial_sums(partial_sums, sums) -> None:
    """Sums over the first axis, in ascending order.

    Shapes: partial_sums (splits, M, N) or (splits, N); result sums (M, N) or (N,); all float32.
    Raises: ValueError.
    Equals: partial_sums.sum(axis=0)
    """
    runtime.check("partial_sums", partial_sums, np.float32, (len(partial_sums), *sums.shape))
    runtime.check("sums", sums, np.float32, sums.shape)
    runtime.launch("matmul", "add_partial_sums", ceil_div(sums.size, TILE_THREADS), TILE_THREADS,
                   [sums, partial_sums, sums, *map(np.int32, (sums.size, 1, len(partial_sums), 0))],
                   constants=tiled_constants("fp32"))


def column_sums(A, sums) -> None:
    """Sums over the rows of a matrix.

    Shapes: A (M, N); result sums (N,); all float32.
    Raises: ValueError.
    Equals: A.sum(axis=0)
    """
    check_column_sums(A, sums)
    M, N = A.shape
    runtime.launch("matmul", "column_sums", ceil_div(N, SUM_COLUMNS), SUM_THREADS, [sums, A, np.int32(M), np.int32(N)],
                   constants=tiled_constants("fp32"))


def check_column_sums(A, sums) -> None:
    """Check the arrays of `column_sums`. Raises: ValueError."""
    M, N = A.shape
    runtime.check("A", A, np.float32, (M, N))
    runtime.check("sums", sums, np.float32, (N,))
