"""How a matrix product is cut: tiled, or multistage where a GPU has asynchronous copies and the product is large."""

import functools
from typing import NamedTuple

from char_gru.kernels.plan.gpus import GPU
from char_gru.kernels.sizes import ceil_div, round_up

TILES = (64, 128)  # rows and columns of C that a block of the tiled variant owns
LARGE_TILES_FROM = 128  # large tiles of C; where C has fewer, small tiles occupy more multiprocessors
SPLIT_BLOCKS = 512  # the most blocks of a tiled product split along K: a few per multiprocessor of a large GPU
SPLIT_K_FROM = 256  # the least length of a split of K
MULTISTAGE_TILES = {"fp32": (192,), "tf32": (192, 256), "bf16": (192, 256)}  # rows of C of a multistage block
MULTISTAGE_COLUMNS = 128  # columns of C of a multistage block
STAGES, STAGE_BYTES = 3, 64  # stages of shared memory, and bytes of k in a row of one
MULTISTAGE_FROM = 2**19  # elements of C; a smaller C has too few multistage tiles to occupy a GPU
MULTISTAGE_CAPABILITY = 80  # compute capability, times ten, from which on there are asynchronous copies
MAX_SPLITS, MAX_PARTIAL_SUMS = 8, 2**24  # of a multistage product: splits of K; elements of all partial sums
ALIGNMENT = 16  # bytes of an asynchronous copy
VARIANTS = ("tiled", "multistage")
OUTPUT_K = 32  # of a turn of cross_entropy.cu


class OutputTile(NamedTuple):
    """What a block of cross_entropy.cu owns: positions, and characters of a tile; and its stages of asynchronous
    copies, 0 where operands pass through registers."""

    rows: int
    columns: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return 4 * self.stages * (self.rows + self.columns) * OUTPUT_K

    def rows_read(self, V: int) -> int:
        """Rows of h and of W_out that a block reads in all its sweeps over V."""
        return ceil_div(V, self.columns) * (self.rows + self.columns)


TILED_OUTPUT = OutputTile(64, 80, 0)
NARROW_OUTPUTS = (OutputTile(64, 80, 4), OutputTile(32, 80, 4))  # the tutorial's 66 characters in one sweep
WIDE_OUTPUTS = (OutputTile(64, 256, 4), OutputTile(64, 256, 2))  # bytes in one sweep; the second for 99 KiB a block
OUTPUT_TILES = {"fp32": (TILED_OUTPUT, *NARROW_OUTPUTS),  # wide ones would spill registers
                "tf32": (TILED_OUTPUT, *NARROW_OUTPUTS, *WIDE_OUTPUTS),
                "bf16": (TILED_OUTPUT, *NARROW_OUTPUTS, *WIDE_OUTPUTS)}


class ProductPlan(NamedTuple):
    """Which kernels compute a product, and how it is divided among blocks."""

    variant: str
    TILE_M: int
    TILE_N: int
    splits: int  # of K, among blocks
    K_split: int  # length of a split

    def grid(self, M: int, N: int) -> tuple[int, int, int]:
        """Blocks of the launch for C (M, N)."""
        return ceil_div(M, self.TILE_M), ceil_div(N, self.TILE_N), self.splits

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return multistage_shared_bytes(self.TILE_M) if self.variant == "multistage" else 0


@functools.lru_cache
def product_plan(gpu: GPU, M: int, N: int, K: int, precision: str, operand_bytes: int, aligned: bool,
                 variant: str | None = None, tile: int | None = None) -> ProductPlan:
    """The plan for C (M, N) = A (M, K) B (K, N), equal for equal sizes on equal GPUs.

    `aligned` says whether rows of both operands can be copied by 16 bytes. `variant` and `tile`, the rows of C
    that a block owns, are for tests and benchmarks.

    Raises: ValueError for an unknown variant, and for operands that the multistage variant cannot copy.
    """
    if variant is None:
        fits = gpu.shared_bytes >= multistage_shared_bytes(max(MULTISTAGE_TILES[precision]))
        large = min(M, N) >= MULTISTAGE_COLUMNS and M * N >= MULTISTAGE_FROM
        can = aligned and fits and gpu.capability >= MULTISTAGE_CAPABILITY
        variant = "multistage" if can and large else "tiled"
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    if variant == "tiled":
        tile = tile or (TILES[1] if _tiles(M, N, TILES[1], TILES[1]) >= LARGE_TILES_FROM else TILES[0])
        return ProductPlan(variant, tile, tile, *_tiled_splits(M, N, K, tile))
    if not aligned:
        raise ValueError(f"A, B: expected rows at multiples of {ALIGNMENT} bytes for the multistage variant, "
                         f"got M, N, K = {M}, {N}, {K}")
    return _balanced(M, N, K, STAGE_BYTES // operand_bytes, gpu.multiprocessors,
                     (tile,) if tile else MULTISTAGE_TILES[precision])


def output_tile(gpu: GPU, positions: int, V: int, precision: str) -> OutputTile:
    """The tile of cross_entropy.cu's multistage variant: a wide one that fits, where its sweeps over V read fewer rows
    of h and W_out than those of a narrow one; of the narrow ones, that which gives the busiest multiprocessor the
    fewest positions. Of equal ones the most, since each block reads W_out: the tutorial's 6,400 positions give one of
    an H100's 132 multiprocessors 64, in 100 blocks of 64 that read 27 MB of W_out, or in 200 of 32 that read 54 MB.
    """
    for tile in WIDE_OUTPUTS:
        fewer = tile.rows_read(V) < NARROW_OUTPUTS[0].rows_read(V)
        if fewer and tile in OUTPUT_TILES[precision] and tile.shared_bytes <= gpu.shared_bytes:
            return tile
    return min(NARROW_OUTPUTS, key=lambda tile: (
        ceil_div(ceil_div(positions, tile.rows), gpu.multiprocessors) * tile.rows, -tile.rows))


def multistage_shared_bytes(tile: int) -> int:
    """Shared memory for all stages of both operands, in rows along k with 16 bytes of padding; rows along m or n take
    less."""
    return STAGES * (tile + MULTISTAGE_COLUMNS) * (STAGE_BYTES + ALIGNMENT)


def _tiles(M: int, N: int, rows: int, columns: int) -> int:
    return ceil_div(M, rows) * ceil_div(N, columns)


def _tiled_splits(M: int, N: int, K: int, tile: int) -> tuple[int, int]:
    """The number of splits of K, and their length: more than one split if C has too few tiles to occupy a GPU."""
    splits = min(SPLIT_BLOCKS // _tiles(M, N, tile, tile), K // SPLIT_K_FROM, SPLIT_BLOCKS * TILES[0]**2 // (M * N))
    if splits <= 1:
        return 1, K
    K_split = ceil_div(K, splits)
    return ceil_div(K, K_split), K_split


def _balanced(M: int, N: int, K: int, TILE_K: int, multiprocessors: int, tiles: tuple[int, ...]) -> ProductPlan:
    """Of the plans that take at most a fifth longer than the fastest one, the one with the fewest splits, since partial
    sums cost time, too; of equal ones the fastest, then the one with the largest tile. A multiprocessor holds a block.
    """
    def time(plan: ProductPlan) -> int:
        """Rows of C times K that the busiest multiprocessor goes through, tile after tile."""
        blocks = _tiles(M, N, plan.TILE_M, plan.TILE_N) * plan.splits
        return ceil_div(blocks, multiprocessors) * plan.TILE_M * plan.K_split

    plans = []
    for splits in range(1, MAX_SPLITS + 1):
        K_split = round_up(ceil_div(K, splits), TILE_K)
        can_split = splits * M * N <= MAX_PARTIAL_SUMS and K_split >= SPLIT_K_FROM and (splits - 1) * K_split < K
        if splits == 1 or can_split:
            plans += [ProductPlan("multistage", tile, MULTISTAGE_COLUMNS, splits, K_split) for tile in tiles]
    least = min(map(time, plans))
    return min((plan for plan in plans if 5 * time(plan) <= 6 * least),
               key=lambda plan: (plan.splits, time(plan), -plan.TILE_M))
