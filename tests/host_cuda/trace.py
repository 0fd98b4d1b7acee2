"""A recorded launch in words: which threads load, store, compute and wait, block by block, in order.

A line covers all loads, or all stores, of the threads of one block in one array between two barriers. Blocks that wait
for each other take turns: the lines of each block up to its first wait, then of each up to its second, and so on.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from tests.host_cuda import ARRIVE, ATOMIC, BARRIER, COLLECTIVE, READ, WAIT, WRITE, LaunchCounts, Recording

MOST_BOXES = 4
"""Parts of an array, or ranges of threads, that a line names one by one."""

_VERBS = {READ: "loads   ", WRITE: "stores  ", ATOMIC: "atomics  on", ARRIVE: "arrives  at"}


def header(launch: LaunchCounts) -> Iterator[str]:
    """The kernel, its extents and its arguments."""
    record = launch.recording
    shared = f", {record.shared_bytes:,} bytes of dynamic shared memory" if record.shared_bytes else ""
    grid, block = (" x ".join(map(str, _extent(extent))) for extent in (launch.grid, launch.block))
    yield (f"{launch.kernel}: {grid} block{'s' * (grid != '1')} of {block} threads{shared}"
           f"{', cooperative' * record.cooperative}")
    yield "  " + ", ".join(f"{name} {arg.shape}" if isinstance(arg, np.ndarray) else f"{name}={arg}"
                           for name, arg in record.arguments.items())


def summary(launch: LaunchCounts) -> Iterator[str]:
    """Bytes by argument, counted each time that a thread asks for them, barriers, and instructions of whole warps."""
    for verb, counts in (("loads", launch.bytes_read), ("stores", launch.bytes_written)):
        moved = [f"{name} {count:,}" for name, count in zip(launch.recording.arguments, counts) if count]
        if moved:
            yield f"  {verb:<8} bytes: {', '.join(moved)}"
    events = launch.recording.events
    barriers = {"in blocks": (events["did"] == BARRIER).sum(), "arrivals of blocks at a group's": launch.group_barriers}
    if any(barriers.values()):
        yield "  waits    barriers: " + ", ".join(f"{count:,} {where}" for where, count in barriers.items() if count)
    for address, name in launch.recording.names.items():
        count = ((events["did"] == COLLECTIVE) & (events["offset"] == address)).sum()
        yield f"  calls    {name} x {count:,}, counted by warp"


def trace(launch: LaunchCounts) -> Iterator[str]:
    """Every access and every wait."""
    events, lines = launch.recording.events, []
    for number in np.unique(events["block"]):
        x, y = launch.grid[:2]
        index = (number % x, number // x % y, number // x // y)[:len(_extent(launch.grid))]
        name = f"  block {','.join(map(str, index)):<3} "
        lines += [(turn, name + text)
                  for turn, text in _of_block(events[events["block"] == number], launch.recording)]
    for _, text in sorted(lines, key=lambda line: line[0]):
        yield text


def _of_block(events: np.ndarray, record: Recording) -> Iterator[tuple[int, str]]:
    """Lines, each with the number of waits for other blocks before it."""
    turn, barrier = 0, events["did"] == BARRIER
    edges = np.flatnonzero(np.diff(barrier, prepend=not barrier[0], append=not barrier[-1]))
    for first, last in pairwise(edges):
        part = events[first:last]
        if barrier[first]:
            yield turn, "barrier" if len(part) == 1 else f"{len(part)} barriers"
            continue
        kinds = np.stack([part["did"], part["argument"], np.where(part["did"] == COLLECTIVE, part["offset"], 0)])
        kinds, which = np.unique(kinds, axis=1, return_inverse=True)
        for kind in _program_order(part["thread"], which):
            yield turn, _step(part[which == kind], record)
            turn += kinds[0, kind] == WAIT


def _program_order(threads: np.ndarray, steps: np.ndarray) -> list[int]:
    """The different steps, each once, in the order of the thread that takes the most of them."""
    taken: dict[int, dict[int, None]] = {}
    for thread, step in zip(threads.tolist(), steps.tolist()):
        taken.setdefault(thread, {})[step] = None
    order: list[int] = []
    for sequence in sorted({tuple(sequence): None for sequence in taken.values()}, key=len, reverse=True):
        index = 0
        for step in sequence:
            if step not in order:
                order.insert(index, step)
            index = order.index(step) + 1
    return order


def _step(events: np.ndarray, record: Recording) -> str:
    """One kind of access to one array, one instruction of whole warps, or half a barrier of a group."""
    did, argument, offset, size = events[-1][["did", "argument", "offset", "size"]]
    if did == COLLECTIVE:
        return f"calls    {record.names[offset]} x {len(events):,} by {_ranges('warp', events['thread'] // 32)}"
    what = f"shared memory, {events['size'].sum():,} bytes," if argument < 0 else _elements(events, record)
    if did == WAIT:
        return f"waits    until {what} is {size}"
    return f"{_VERBS[did]} {what} by {_ranges('thread', events['thread'])}"


def _elements(events: np.ndarray, record: Recording) -> str:
    """The elements of an array that accesses touch, as index ranges."""
    name, array = list(record.arguments.items())[events[0]["argument"]]
    change, size = np.zeros(array.size + 1, int), array.itemsize
    ends = events["offset"] + np.where(events["did"] == WAIT, size, events["size"])
    np.add.at(change, (events["offset"] // size).astype(int), 1)
    np.add.at(change, (-(-ends.astype(int) // size)), -1)
    mask = (change[:-1].cumsum() > 0).reshape(array.shape)
    boxes = _boxes(mask)
    if len(boxes) <= MOST_BOXES:
        return name + ", ".join(f"[{', '.join(map(_range, box))}]" for box in boxes)
    around = (_range((where.min(), where.max() + 1)) for where in np.nonzero(mask))
    return f"{name}[{', '.join(around)}] ({mask.sum():,} elements of it)"


def _boxes(mask: np.ndarray) -> list[tuple[tuple[int, int], ...]]:
    """Index ranges, one for each axis, that together are where the mask is true."""
    if mask.ndim == 0:
        return [()] if mask else []
    same = [0, *(i for i in range(1, len(mask)) if not np.array_equal(mask[i], mask[i - 1])), len(mask)]
    return [((first, last), *rest) for first, last in pairwise(same) for rest in _boxes(np.asarray(mask[first]))]


def _range(ends: tuple[int, int]) -> str:
    return f"{ends[0]}" if ends[1] == ends[0] + 1 else f"{ends[0]}:{ends[1]}"


def _ranges(noun: str, numbers: np.ndarray) -> str:
    numbers = np.unique(numbers)
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    if len(parts) > MOST_BOXES:
        return f"{len(numbers)} {noun}s of {numbers[0]}-{numbers[-1]}"
    return f"{noun}{'s' * (len(numbers) > 1)} " + ", ".join(
        f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _extent(extent: tuple[int, int, int]) -> tuple[int, ...]:
    """Without the last dimensions of size 1, except for the first dimension."""
    used = max((axis for axis in range(3) if extent[axis] > 1), default=0)
    return extent[:used + 1]
