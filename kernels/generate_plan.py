"""What a plan of generation says, and what a character costs under it where the model stays on chip.

In cycles of a multiprocessor, with one block on each, at the rates of kernels/plan.py:

    for each layer
        barrier      BARRIER; the one behind the drawing is over before the product that follows
        gates        GATES
    for each matrix, W_hh and W_ih
        product      what its variant takes
    logits           rows x units x V multiply-adds, in fp32: what a block's units add to them
    drawing          for each row that a block draws: DRAWING, and what all blocks added, through L2

What a call costs once, such as bringing the weights on chip, is not in it.
"""

from typing import NamedTuple

from .plan import BARRIER, GATES, rates_of
from .runtime import GPU

DRAWING = 900  # cycles: the latency of the loads, and of the barriers of a block
STATIC_SHARED_BYTES = 96  # of a block, for drawing


class GenerationPlan(NamedTuple):
    """How `generate` runs: the variant, why, and what its kernel has to know."""

    variant: str
    reason: str
    constants: dict[str, int]
    groups: int = 0  # of rows, that do not wait for each other
    group_rows: int = 0
    blocks: int = 0  # of a group
    units: int = 0  # of a block, in every layer
    stage_rows: int = 0  # persistent
    shared_bytes: int = 0


def character_cycles(gpu: GPU, plan: GenerationPlan, V: int, layers: int, product: float) -> float:
    """Of a character of every row, where a product takes so many."""
    rates, drawn = rates_of(gpu), -(-plan.group_rows // plan.blocks)
    logits = plan.group_rows * plan.units * V / rates.multiply["fp32"]
    drawing = drawn * (DRAWING + plan.blocks * V * 4 / rates.l2)
    return layers * (BARRIER + GATES) + (2 * layers - 1) * product + logits + drawing
