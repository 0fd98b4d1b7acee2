"""What a predicted time is made of: a few terms of a GPU, for the recurrence, generation and the whole training step.

A time is a sum of parts (`Parts`), each named after what the GPU waits for:

    launch      a kernel begins after the one before it
    chain       a value that one block stores is seen by another one: through L2 and back; or a barrier of blocks
    latency     a load that nothing hides: of the first operands, or of each turn of a loop that waits for its loads
    gather      bytes through L2 into a multiprocessor
    memory      bytes from memory or to it
    multiply    multiply-adds of a product
    weights     bytes of weights from shared memory
    issue       instructions beside the multiply-adds that a product issues: loads, waits, unpacking
    cell        what follows a product, with nothing beside it: sums of warps, gates, block barriers, drawing

Units that work at the same part at once (gather, memory, multiply, weights, issue) overlap, but not perfectly: the
first operands of a loop arrive while nothing is multiplied, and the last are multiplied while nothing arrives. Of a
loop of n turns that is 1 / n of the next longest part; the products of the recurrence have 2 to 8 turns. So
`Rates.overlapped` counts the longest part whole, half of the next longest, which is the careful end, and no other; in
the long loops of large products, 1 / n of the next longest.

Where a number comes from is said beside it (`Rates`). None has been measured by these kernels on a GPU: `python -m
bench.fit` gives those that a GPU's benchmarks say. Until then, expect a predicted time to be wrong by EXPECTED_ERROR.
"""

from __future__ import annotations

from typing import NamedTuple

EXPECTED_ERROR = 0.2  # of a predicted time of a training step or of a character, as a share of it


class Parts(dict[str, float]):
    """Cycles by the name of what is waited for; a sum of two has the cycles of both, a multiple those of repetitions.
    """

    def __add__(self, other: Parts) -> Parts:
        return Parts({name: self.get(name, 0.0) + other.get(name, 0.0) for name in (self | other)})

    def __mul__(self, times: float) -> Parts:
        return Parts({name: times * cycles for name, cycles in self.items()})

    @property
    def cycles(self) -> float:
        """All parts together."""
        return sum(self.values())

    @property
    def bound(self) -> str:
        """The longest part."""
        return max(self, key=self.__getitem__)


class Rates(NamedTuple):
    """The terms of a generation of GPUs: its clock, the work of one multiprocessor per cycle while all are busy, and
    latencies, in cycles but for the launch.

    l2, memory: bytes of a large copy as others have measured it, divided among the multiprocessors. multiply: FFMA at
    0.6 of the data sheet's peak, tensor cores at what mma.sync reaches, 0.62 of the peak on sm_90, where only wgmma
    reaches it, elsewhere 0.9; for sm_86, 89 and 120 the peak of GeForce cards, some other cards have twice as much.
    shared: 32 banks of 4 bytes. issue: four schedulers, each at the same 0.6. chain: others have measured 0.56 to 0.65
    us on an idle H100 for a flag from block to block; polling by all threads of all blocks adds some. barrier: 1.07 to
    1.09 us on an H100 for that of cooperative groups, whatever the number of blocks. l2_latency, memory_latency:
    published chains of dependent loads. launch_us: an empty kernel and the gap before it, in a CUDA graph. exposed: the
    half above.
    """

    gigahertz: float
    l2: float  # bytes per cycle that come through L2
    memory: float  # bytes per cycle that come from or go to memory
    multiply: dict[str, float]  # precision -> multiply-adds per cycle
    shared: float = 128  # bytes per cycle of shared memory
    issue: float = 2.4  # instructions of warps per cycle
    chain: float = 1400  # from the store of a word with a tag to the poll that finds it
    barrier: float = 1900  # of blocks, from the arrival of the last one until all go on
    l2_latency: float = 300
    memory_latency: float = 800
    launch_us: float = 2.0  # from the end of a kernel to the end of an empty one after it
    exposed: float = 0.5  # of the next longest of parts that overlap

    @property
    def launch(self) -> float:
        """`launch_us` in cycles."""
        return self.launch_us * self.gigahertz * 1000

    def microseconds(self, cycles: float) -> float:
        """The time of a number of cycles."""
        return cycles / (self.gigahertz * 1000)

    def overlapped(self, turns: int = 1, **cycles: float) -> Parts:
        """Parts, two or more, that run at once: the longest, and the exposed share of the next longest; of a loop of
        many turns, one turn of it."""
        longest, next_longest = sorted(cycles, key=cycles.__getitem__, reverse=True)[:2]
        return Parts({longest: cycles[longest], next_longest: min(self.exposed, 1 / turns) * cycles[next_longest]})
