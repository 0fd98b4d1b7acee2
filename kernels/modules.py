"""All modules: the .cu files, and the sets of constants that each of them is compiled with."""

from collections.abc import Iterator

from char_gru.kernels.cross_entropy import cross_entropy_constants
from char_gru.kernels.gru import constants as gru_constants
from char_gru.kernels.gru_persistent import constants as gru_persistent_constants
from char_gru.kernels.matmul import OPERANDS, PRECISIONS, multistage_constants, tiled_constants
from char_gru.kernels.plan.generation import MAX_ROWS, WEIGHTS, generation_plan
from char_gru.kernels.plan.generation import constants as generate_constants
from char_gru.kernels.plan.gpus import GPUS, precisions
from char_gru.kernels.plan.products import MULTISTAGE_TILES, OUTPUT_TILES, TILES
from char_gru.kernels.plan.recurrence import backward_plan, forward_plan

TENSOR_CORES_FROM = 80
"""Compute capability, times ten, of the first GPUs with tf32, bf16 and asynchronous copies."""

CHARACTERS = 66  # of Tiny Shakespeare, and [UNK]

MODULES: dict[str, tuple[dict[str, int], ...]] = {
    "adam": ({},),
    "cross_entropy": tuple(cross_entropy_constants(precision, tile) for precision in PRECISIONS
                           for tile in OUTPUT_TILES[precision]),
    "dropout": ({},),
    "generate": (*(generate_constants(R) for R in (1, 2, 4, MAX_ROWS)), generate_constants(MAX_ROWS, "bf16")),
    "generate_persistent": tuple(
        generation_plan(GPUS[gpu], R, CHARACTERS, H, 1, weights, variant).constants
        for gpu, R, H, weights, variant in (
            ("h100", 1, 1024, "fp32", "persistent"), ("h100", 2, 1024, "fp32", "persistent"),
            ("h100", 5, 1024, "fp32", "persistent"), ("h100", 64, 1024, "fp32", "persistent"),
            ("h100", 64, 1024, "bf16", "persistent"), ("h100", 1, 1024, "bf16", "persistent"),
            ("a100", 1, 1024, "fp32", "persistent"), ("4090", 1, 1024, "fp32", "persistent"),
            ("l4", 1, 1024, "fp32", "persistent"))),
    "generate_one_text": tuple(
        generation_plan(GPUS[gpu], 1, CHARACTERS, H, 1, variant="one-text").constants
        for gpu, H in (("h100", 1024), ("h100", 256), ("a100", 1024))),
    "gru": tuple(gru_constants(precision) for precision in PRECISIONS),
    "input_table": ({},),
    "matmul": tuple(tiled_constants(*operands, tile) for operands in OPERANDS for tile in TILES),
    "matmul_multistage": tuple(multistage_constants(*operands, tile) for operands in OPERANDS
                              for tile in MULTISTAGE_TILES[operands[0]]),
    "naive": ({},),
}
"""Stem of a .cu file -> the sets of constants that its launchers compile it with, each name -> value."""

PLANNED = ("gru_forward_persistent", "gru_backward_persistent", "generate_batched")
"""Stems of the .cu files whose constants come from a plan, for each GPU and for each size of the model."""

SIZES = ((64, 1024), (32, 256))  # rows and hidden units of README's two models


def modules_for(architecture: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Stem and constants of every module that an architecture such as "sm_90" can run. A PLANNED file gives the modules
    that the plans of README's two models choose on the known GPUs of this architecture."""
    capability = int(architecture.removeprefix("sm_"))
    yield from _planned(capability)
    has_tf32 = capability >= TENSOR_CORES_FROM
    for stem, variants in MODULES.items():
        for constants in variants:
            multistage = "TILE_K" in constants and constants.get("STAGES", 0) > 0  # by asynchronous copies
            if has_tf32 or (constants.get("PRECISION", 0) == PRECISIONS["fp32"] and not multistage):
                yield stem, constants


def _planned(capability: int) -> list[tuple[str, dict[str, int]]]:
    """Stem and constants of the modules of the PLANNED files, each once."""
    found = []
    for gpu in GPUS.values():
        if gpu.capability != capability:
            continue
        for B, H in SIZES:
            for precision in precisions(gpu):
                plans = (forward_plan(gpu, B, H, precision),
                         backward_plan(gpu, B, H, precision, V_out=CHARACTERS, V_in=CHARACTERS))
                found += [(stem, gru_persistent_constants(plan)) for stem, plan in zip(PLANNED, plans)
                          if plan.variant == "persistent"]
            plans = (generation_plan(gpu, B, CHARACTERS, H, 1, weights) for weights in WEIGHTS)
            found += [("generate_batched", plan.constants) for plan in plans if plan.variant == "batched"]
    return [module for i, module in enumerate(found) if module not in found[:i]]
