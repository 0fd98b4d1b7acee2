"""Which sources there are to compile, and for which sizes.

``python -m kernels`` and the tests compile every entry for every architecture.
"""

from .cross_entropy import TILE as CROSS_ENTROPY_TILE
from .generate import MAX_ROWS, constants as generate_constants
from .gru import _constants as gru_constants
from .matmul import TILES, constants as matmul_constants


def _with_products(*precisions: str) -> dict[str, tuple[dict[str, int], ...]]:
    return {
        "cross_entropy": tuple(matmul_constants(precision) | CROSS_ENTROPY_TILE for precision in precisions),
        "gru": tuple(gru_constants(precision) for precision in precisions),
        "matmul": tuple(matmul_constants(precision, tile) for precision in precisions for tile in TILES),
    }


# Stem of a .cu file -> the sets of constants to compile it with, each name -> value.
MODULES: dict[str, tuple[dict[str, int], ...]] = {
    "adam": ({},),
    "dropout": ({},),
    "generate": (generate_constants(R=1), generate_constants(R=MAX_ROWS)),
    "input_table": ({},),
} | _with_products("fp32")

# The same for what only GPUs from sm_80 on compute.
TENSOR_CORE_MODULES = _with_products("tf32", "bf16")
