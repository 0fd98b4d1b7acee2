"""Launchers of matmul.cu: products of two matrices, and sums over the rows of one."""

import numpy as np

from . import runtime
from .scratch import scratch

PRECISIONS = {"fp32": 0, "tf32": 1, "bf16": 2}
TILES = (64, 128)  # rows and columns of C that a block owns
TILE_THREADS = 256  # of tile.cuh
LARGE_TILES_FROM = 128  # with fewer of them, small ones occupy more of a GPU
SPLIT_BLOCKS = 512  # a product split along K has at most so many blocks, a few for each multiprocessor of a large GPU
SPLIT_K_FROM = 256  # a split sums at least so many products
SUM_THREADS, SUM_COLUMNS = 1024, 32  # of a block of column_sums


def constants(precision: str, tile: int = TILES[0]) -> dict[str, int]:
    """What matmul.cu is compiled with.

    Raises: ValueError for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    return {"PRECISION": PRECISIONS[precision], "TILE_M": tile, "TILE_N": tile,
            "TILE_K": 32 if precision == "bf16" else 16}


def matmul(A, B, C, *, transpose_a=False, transpose_b=False, bias=None, precision="fp32", tile=None) -> None:
    """C = A B, with one operand transposed if asked for, plus a bias for each column.

    tf32 and bf16 round the operands, not the sums. `tile` is for tests and benchmarks. To transpose both operands,
    transpose B A.

    Shapes: A (M, K), or (K, M) if transposed; B (K, N), or (N, K); bias (N,); result C (M, N).
    Raises: ValueError.
    Equals: A @ B + bias
    """
    if transpose_a and transpose_b:
        raise ValueError("transpose_a, transpose_b: expected at most one of them, got both")
    (M, N), K = C.shape, A.shape[0 if transpose_a else 1]
    runtime.check("A", A, np.float32, (K, M) if transpose_a else (M, K))
    runtime.check("B", B, np.float32, (N, K) if transpose_b else (K, N))
    runtime.check("C", C, np.float32, (M, N))
    if bias is not None:
        runtime.check("bias", bias, np.float32, (N,))
    kernel = "matmul_tn" if transpose_a else "matmul_nt" if transpose_b else "matmul_nn"
    tile = tile or (TILES[1] if _tiles(M, N, TILES[1]) >= LARGE_TILES_FROM else TILES[0])
    splits, K_split = _split(M, N, K, tile)
    module, sizes = constants(precision, tile), (np.int32(M), np.int32(N))
    result = C if splits == 1 else scratch("matmul", (SPLIT_BLOCKS * TILES[0]**2,))
    add_bias, bias = bias is not None, A if bias is None else bias  # without a bias, any array does: it is not read
    runtime.launch("matmul", kernel, (-(-M // tile), -(-N // tile), splits), TILE_THREADS,
                   [result, A, B, bias, *sizes, np.int32(K), np.int32(K_split), np.int32(add_bias and splits == 1)],
                   constants=module)
    if splits > 1:
        runtime.launch("matmul", "add_partials", -(-M * N // TILE_THREADS), TILE_THREADS,
                       [C, result, bias, *sizes, np.int32(splits), np.int32(add_bias)], constants=module)


def _tiles(M: int, N: int, tile: int) -> int:
    return -(-M // tile) * -(-N // tile)


def _split(M: int, N: int, K: int, tile: int) -> tuple[int, int]:
    """Among how many blocks K is split, and how much of it each of them sums: several if C alone has too few blocks."""
    splits = min(SPLIT_BLOCKS // _tiles(M, N, tile), K // SPLIT_K_FROM, SPLIT_BLOCKS * TILES[0]**2 // (M * N))
    if splits <= 1:
        return 1, K
    K_split = -(-K // splits)
    return -(-K // K_split), K_split


def column_sums(A, sums) -> None:
    """Sums over the rows of a matrix.

    Shapes: A (M, N); result sums (N,).
    Raises: ValueError.
    Equals: A.sum(axis=0)
    """
    M, N = A.shape
    runtime.check("A", A, np.float32, (M, N))
    runtime.check("sums", sums, np.float32, (N,))
    runtime.launch("matmul", "column_sums", -(-N // SUM_COLUMNS), SUM_THREADS, [sums, A, np.int32(M), np.int32(N)],
                   constants=constants("fp32"))
