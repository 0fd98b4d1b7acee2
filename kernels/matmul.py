"""Launchers of matmul.cu and matmul_pipelined.cu: products of two matrices, and sums over the rows of one."""

from typing import NamedTuple

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.scratch import scratch

PRECISIONS = {"fp32": 0, "tf32": 1, "bf16": 2}
OPERANDS = (("fp32", 4), ("tf32", 4), ("bf16", 4), ("bf16", 2))  # precision, and bytes of an element
TILES = (64, 128)  # rows and columns of C that a block of the tiled variant owns
TILE_THREADS = 256  # of tile.cuh
LARGE_TILES_FROM = 128  # with fewer of them, small ones occupy more of a GPU
SPLIT_BLOCKS = 512  # a tiled product split along K has at most so many blocks, a few per multiprocessor of a large GPU
SPLIT_K_FROM = 256  # a split sums at least so many products
PIPELINED_TILES = {"fp32": (192,), "tf32": (192, 256), "bf16": (192, 256)}  # rows of C that a pipelined block owns
PIPELINED_COLUMNS = 128  # and columns
STAGES, STAGE_BYTES = 3, 64  # parts of k on the way, and bytes of k in each of them
PIPELINED_FROM = 2**19  # elements of C; less is no work for a whole GPU in such tiles
PIPELINED_CAPABILITY = 80  # compute capability, times ten, from which on there are asynchronous copies
MAX_SPLITS, MAX_PARTIALS = 8, 2**24  # of a pipelined product: along K; elements that all of them have
ALIGNMENT = 16  # bytes of an asynchronous copy
SUM_THREADS, SUM_COLUMNS = 1024, 32  # of a block of column_sums


class Plan(NamedTuple):
    """Which kernels compute a product, and how it is divided among blocks."""

    variant: str
    TILE_M: int
    TILE_N: int
    splits: int  # of K, among blocks
    K_split: int  # what each of them sums


def check_precision(precision: str) -> None:
    """Raises: ValueError for an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def constants(precision: str, tile: int = TILES[0]) -> dict[str, int]:
    """What tile.cuh is compiled with.

    Raises: ValueError for an unknown precision.
    """
    check_precision(precision)
    return {"PRECISION": PRECISIONS[precision], "TILE_M": tile, "TILE_N": tile,
            "TILE_K": 32 if precision == "bf16" else 16}


def tiled_constants(precision: str, operand_bytes: int = 4, tile: int = TILES[0]) -> dict[str, int]:
    """What matmul.cu is compiled with."""
    return constants(precision, tile) | {"OPERAND_BYTES": operand_bytes}


def pipelined_constants(precision: str, operand_bytes: int, tile: int) -> dict[str, int]:
    """What matmul_pipelined.cu is compiled with."""
    return constants(precision) | {"TILE_M": tile, "TILE_N": PIPELINED_COLUMNS, "TILE_K": STAGE_BYTES // operand_bytes,
                                   "OPERAND_BYTES": operand_bytes, "STAGES": STAGES}


VARIANTS = {"tiled": ("matmul", tiled_constants), "pipelined": ("matmul_pipelined", pipelined_constants)}
"""Name -> stem of its .cu file, and what that is compiled with."""


def matmul(A, B, C, *, transpose_a=False, transpose_b=False, bias=None, precision="fp32", variant=None,
           tile=None) -> None:
    """C = A B, with one operand transposed if asked for, plus a bias for each column.

    tf32 and bf16 round the operands, not the sums; in bf16 both operands may be given as bfloat16 bits. `variant` and
    `tile`, its rows, are for tests and benchmarks. To transpose both operands, transpose B A.

    Shapes: A (M, K), or (K, M) if transposed; B (K, N), or (N, K); both float32, or uint16 in bf16; bias (N,); result
    C (M, N).
    Raises: ValueError.
    Equals: A @ B + bias
    """
    check_precision(precision)
    dtype = np.dtype(np.uint16 if precision == "bf16" and A.dtype == np.uint16 else np.float32)
    M, N, K = check_matmul(A, B, C, transpose_a, transpose_b, bias, dtype)
    layout = "tn" if transpose_a else "nt" if transpose_b else "nn"
    plan = _plan(M, N, K, precision, dtype.itemsize, _aligned(A) and _aligned(B), variant, tile)
    sizes = np.int32(M), np.int32(N)
    # Small partial sums share one array.
    result = C if plan.splits == 1 else scratch("matmul", (max(plan.splits * M * N, SPLIT_BLOCKS * TILES[0]**2),))
    add_bias, bias = bias is not None, C if bias is None else bias  # without a bias, any array does: it is not read
    args = [result, A, B, bias, *sizes, np.int32(K), np.int32(plan.K_split), np.int32(add_bias and plan.splits == 1)]
    grid = -(-M // plan.TILE_M), -(-N // plan.TILE_N), plan.splits
    stem, constants_of = VARIANTS[plan.variant]
    runtime.launch(stem, f"{stem}_{layout}", grid, TILE_THREADS, args,
                   constants=constants_of(precision, dtype.itemsize, plan.TILE_M),
                   shared_bytes=_pipelined_shared_bytes(plan.TILE_M) if plan.variant == "pipelined" else 0)
    if plan.splits > 1:
        runtime.launch("matmul", "add_partials", -(-M * N // TILE_THREADS), TILE_THREADS,
                       [C, result, bias, *sizes, np.int32(plan.splits), np.int32(add_bias)],
                       constants=tiled_constants("fp32"))


def check_matmul(A, B, C, transpose_a: bool, transpose_b: bool, bias, dtype=np.float32) -> tuple[int, int, int]:
    """M, N and K of a product whose operands have that dtype. Raises: ValueError."""
    if transpose_a and transpose_b:
        raise ValueError("transpose_a, transpose_b: expected at most one of them, got both")
    (M, N), K = C.shape, A.shape[0 if transpose_a else 1]
    runtime.check("A", A, dtype, (K, M) if transpose_a else (M, K))
    runtime.check("B", B, dtype, (N, K) if transpose_b else (K, N))
    runtime.check("C", C, np.float32, (M, N))
    if bias is not None:
        runtime.check("bias", bias, np.float32, (N,))
    return M, N, K


def _aligned(array) -> bool:
    """Whether rows can be copied by 16 bytes."""
    address = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return address % ALIGNMENT == 0 and array.shape[1] * array.itemsize % ALIGNMENT == 0


def _plan(M: int, N: int, K: int, precision: str, operand_bytes: int, aligned: bool, variant: str | None,
          tile: int | None) -> Plan:
    """The pipelined variant for large products where the GPU can run it; equal for equal sizes on equal GPUs."""
    gpu = runtime.current_executor().gpu
    if variant is None:
        fits = gpu.shared_bytes >= _pipelined_shared_bytes(max(PIPELINED_TILES[precision]))
        large = min(M, N) >= PIPELINED_COLUMNS and M * N >= PIPELINED_FROM
        can = aligned and fits and gpu.capability >= PIPELINED_CAPABILITY
        variant = "pipelined" if can and large else "tiled"
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    if variant == "tiled":
        tile = tile or (TILES[1] if _tiles(M, N, TILES[1], TILES[1]) >= LARGE_TILES_FROM else TILES[0])
        return Plan(variant, tile, tile, *_split(M, N, K, tile))
    if not aligned:
        raise ValueError(f"A, B: expected rows at multiples of {ALIGNMENT} bytes for the pipelined variant, "
                         f"got M, N, K = {M}, {N}, {K}")
    return _balanced(M, N, K, STAGE_BYTES // operand_bytes, gpu.multiprocessors,
                     (tile,) if tile else PIPELINED_TILES[precision])


def _pipelined_shared_bytes(tile: int) -> int:
    """All stages of both operands, in rows along k with 16 bytes of padding; rows along m or n take less."""
    return STAGES * (tile + PIPELINED_COLUMNS) * (STAGE_BYTES + ALIGNMENT)


def _tiles(M: int, N: int, rows: int, columns: int) -> int:
    return -(-M // rows) * -(-N // columns)


def _split(M: int, N: int, K: int, tile: int) -> tuple[int, int]:
    """Among how many blocks K is split, and how much of it each of them sums: several if C alone has too few blocks."""
    splits = min(SPLIT_BLOCKS // _tiles(M, N, tile, tile), K // SPLIT_K_FROM, SPLIT_BLOCKS * TILES[0]**2 // (M * N))
    if splits <= 1:
        return 1, K
    K_split = -(-K // splits)
    return -(-K // K_split), K_split


def _balanced(M: int, N: int, K: int, TILE_K: int, multiprocessors: int, tiles: tuple[int, ...]) -> Plan:
    """The fewest splits, and of these the fastest and largest tile, that take at most a fifth longer than any others:
    partial sums have to gain what it costs to write and add them. A multiprocessor holds one block.
    """
    def time(plan: Plan) -> int:
        """Rows of C times K that the busiest multiprocessor goes through, tile after tile."""
        return -(-_tiles(M, N, plan.TILE_M, plan.TILE_N) * plan.splits // multiprocessors) * plan.TILE_M * plan.K_split

    plans = []
    for splits in range(1, MAX_SPLITS + 1):
        K_split = -(-K // (splits * TILE_K)) * TILE_K
        if splits == 1 or (splits * M * N <= MAX_PARTIALS and K_split >= SPLIT_K_FROM and (splits - 1) * K_split < K):
            plans += [Plan("pipelined", tile, PIPELINED_COLUMNS, splits, K_split) for tile in tiles]
    least = min(map(time, plans))
    return min((plan for plan in plans if 5 * time(plan) <= 6 * least),
               key=lambda plan: (plan.splits, time(plan), -plan.TILE_M))


def sum_partials(partials, sums) -> None:
    """Sums over the first axis, in ascending order.

    Shapes: partials (splits, M, N) or (splits, N); result sums (M, N) or (N,).
    Raises: ValueError.
    Equals: partials.sum(axis=0)
    """
    runtime.check("partials", partials, np.float32, (len(partials), *sums.shape))
    runtime.check("sums", sums, np.float32, sums.shape)
    runtime.launch("matmul", "add_partials", -(-sums.size // TILE_THREADS), TILE_THREADS,
                   [sums, partials, sums, np.int32(sums.size), np.int32(1), np.int32(len(partials)), np.int32(0)],
                   constants=tiled_constants("fp32"))


def column_sums(A, sums) -> None:
    """Sums over the rows of a matrix.

    Shapes: A (M, N); result sums (N,).
    Raises: ValueError.
    Equals: A.sum(axis=0)
    """
    check_column_sums(A, sums)
    M, N = A.shape
    runtime.launch("matmul", "column_sums", -(-N // SUM_COLUMNS), SUM_THREADS, [sums, A, np.int32(M), np.int32(N)],
                   constants=tiled_constants("fp32"))


def check_column_sums(A, sums) -> None:
    """The arrays of `column_sums`. Raises: ValueError."""
    M, N = A.shape
    runtime.check("A", A, np.float32, (M, N))
    runtime.check("sums", sums, np.float32, (N,))
