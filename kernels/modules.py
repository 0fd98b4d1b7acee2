"""Which sources there are to compile, and with which constants."""

from collections.abc import Iterator

from .cross_entropy import constants as cross_entropy_constants
from .generate import MAX_ROWS, constants as generate_constants
from .gru import constants as gru_constants
from .matmul import OPERANDS, PIPELINED_TILES, PRECISIONS, TILES, pipelined_constants, tiled_constants

TENSOR_CORES_FROM = 80
"""Compute capability, times ten, of the first GPUs that multiply tf32 and bf16, and that copy asynchronously."""

MODULES: dict[str, tuple[dict[str, int], ...]] = {
    "adam": ({},),
    "cross_entropy": tuple(cross_entropy_constants(precision) for precision in PRECISIONS),
    "dropout": ({},),
    "generate": tuple(generate_constants(R) for R in (1, 2, 4, MAX_ROWS)),
    "gru": tuple(gru_constants(precision) for precision in PRECISIONS),
    "input_table": ({},),
    "matmul": tuple(tiled_constants(*operands, tile) for operands in OPERANDS for tile in TILES),
    "matmul_pipelined": tuple(pipelined_constants(*operands, tile) for operands in OPERANDS
                              for tile in PIPELINED_TILES[operands[0]]),
}
"""Stem of a .cu file -> the sets of constants that its launchers compile it with, each name -> value."""


def modules_for(architecture: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Stem and constants of everything that an architecture such as "sm_90" can run."""
    has_all = int(architecture.removeprefix("sm_")) >= TENSOR_CORES_FROM
    for stem, variants in MODULES.items():
        for constants in variants:
            if has_all or (constants.get("PRECISION", 0) == PRECISIONS["fp32"] and stem != "matmul_pipelined"):
                yield stem, constants
