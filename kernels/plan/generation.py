"""What a plan of generation says, and what the costs of all variants have in common."""

from typing import NamedTuple

from char_gru.kernels.plan.gpus import GPU, rates_of

STATIC_SHARED_BYTES = 96  # of a block, for drawing
DRAW = 1100  # cycles: two maxima and a scan among the threads of a block, all latency; more with top-k or top-p
LITTLE_L2 = (75, 86)  # compute capabilities, times ten, with up to 6 MB of L2: larger weights come from memory


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
    off_chip: int = 0  # persistent: columns of W_hh and W_ih that are read through L2 in every step

    def fits(self, gpu: GPU) -> bool:
        """Whether a block gets the shared memory that it asks for."""
        return self.shared_bytes + STATIC_SHARED_BYTES <= gpu.shared_bytes


def weights_rate(gpu: GPU) -> int:
    """Bytes per cycle and multiprocessor of weights that are not on chip."""
    rates = rates_of(gpu)
    return rates.memory if gpu.capability in LITTLE_L2 else rates.l2


def kib(size: float) -> str:
    return f"{size / 1024:.0f} KiB"
