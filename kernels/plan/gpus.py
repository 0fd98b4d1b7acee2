"""The GPUs that a plan can be made for, and the terms of each generation that predicted times are made of (costs.py).
"""

from typing import NamedTuple

from char_gru.kernels.plan.costs import Rates


class GPU(NamedTuple):
    """The properties of a GPU that a plan depends on."""

    name: str
    capability: int  # compute capability times ten
    multiprocessors: int
    shared_bytes: int  # the most that one block may ask for; one such block fits into a multiprocessor


RATES = {
    75: Rates(1.59, 20, 5, {"fp32": 38}),
    80: Rates(1.41, 24, 11, {"fp32": 38, "tf32": 460, "bf16": 920}),
    86: Rates(1.70, 16, 6, {"fp32": 76, "tf32": 115, "bf16": 230}),
    89: Rates(2.50, 16, 3, {"fp32": 76, "tf32": 115, "bf16": 230}),
    90: Rates(1.755, 24, 13, {"fp32": 76, "tf32": 635, "bf16": 1270}),
    120: Rates(2.40, 16, 4, {"fp32": 76, "tf32": 115, "bf16": 230}),
}
"""Compute capability, times ten -> rates; a capability between two of these has the rates of the lower one."""

GPUS = {
    "h100": GPU("NVIDIA H100 SXM", 90, 132, 232448),
    "h200": GPU("NVIDIA H200", 90, 132, 232448),
    "a100": GPU("NVIDIA A100 40 GB", 80, 108, 166912),
    "a100-80": GPU("NVIDIA A100 80 GB", 80, 108, 166912),
    "4090": GPU("NVIDIA GeForce RTX 4090", 89, 128, 101376),
    "4070": GPU("NVIDIA GeForce RTX 4070", 89, 46, 101376),
    "3090": GPU("NVIDIA GeForce RTX 3090", 86, 82, 101376),
    "3060": GPU("NVIDIA GeForce RTX 3060", 86, 28, 101376),
    "t4": GPU("NVIDIA T4", 75, 40, 65536),
    "l4": GPU("NVIDIA L4", 89, 58, 101376),
    "5090": GPU("NVIDIA GeForce RTX 5090", 120, 170, 101376),
}
"""Known GPUs, to plan for without having one."""


def rates_of(gpu: GPU) -> Rates:
    """The rates of a GPU's capability."""
    return RATES[max((capability for capability in RATES if capability <= gpu.capability), default=min(RATES))]


def precisions(gpu: GPU) -> tuple[str, ...]:
    """The precisions that a GPU multiplies in."""
    return tuple(rates_of(gpu).multiply)
