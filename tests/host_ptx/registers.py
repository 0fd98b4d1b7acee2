"""Which reads of a register may come before every write of it: definite assignment over a function's control flow.

A register is written for certain at a place if each path from the function's start to the place writes it. A write
under a guard is not certain. A read that is not certain is checked where it happens, while the kernel runs.
Source: Aho, Lam, Sethi, Ullman, "Compilers", section 9.2, "Introduction to Data-Flow Analysis".
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.host_ptx.parser import Statement

__all__ = ["ENDS", "Step", "uncertain_reads"]

ENDS = ("bra", "ret", "exit")
"""Instructions that end a basic block."""


class Step(NamedTuple):
    """A statement with the registers that it reads, its guard among them, and the registers that it writes or, as a
    declaration, makes."""

    statement: Statement
    reads: Sequence[str] = ()
    writes: Sequence[str] = ()


class _Block(NamedTuple):
    first: int  # step
    last: int  # behind the last step
    followers: tuple[int, ...]  # blocks


class _Effect(NamedTuple):
    """Of the steps of a block, on registers."""

    exposed: set[str]  # read ahead of every certain write in the block
    made: set[str]  # declared in the block
    written: set[str]  # for certain, behind the block


def uncertain_reads(steps: Sequence[Step]) -> list[set[str]]:
    """For each step the registers that it reads and that are not written for certain ahead of it."""
    blocks = _blocks(steps)
    effects = [_effect(steps[block.first:block.last]) for block in blocks]
    everything = set().union(*(effect.exposed for effect in effects))
    ahead = [everything] * len(blocks)  # what is written for certain; a path not yet seen takes nothing away
    ahead[:1] = [set()]
    changed = [0] if blocks else []
    while changed:
        index = changed.pop()
        behind = ahead[index] - effects[index].made | effects[index].written
        for follower in blocks[index].followers:
            if not ahead[follower] <= behind:
                ahead[follower] = ahead[follower] & behind
                changed.append(follower)
    found: list[set[str]] = [set() for _ in steps]
    for block, effect, written in zip(blocks, effects, ahead):
        if effect.made or not effect.exposed <= written:
            written = set(written)
            for i in range(block.first, block.last):
                found[i] = set(steps[i].reads) - written
                _follow(steps[i], written)
    return found


def _effect(steps: Sequence[Step]) -> _Effect:
    exposed, made, written = set(), set(), set()
    for step in steps:
        exposed.update(name for name in step.reads if name not in written)
        if step.statement.kind == "reg":
            made.update(step.writes)
        _follow(step, written)
    return _Effect(exposed, made, written)


def _follow(step: Step, written: set[str]) -> None:
    """Turns the registers that are written for certain ahead of a step into the registers that are behind it."""
    if step.statement.kind == "reg":
        written.difference_update(step.writes)
    elif not step.statement.guard:
        written.update(step.writes)


def _blocks(steps: Sequence[Step]) -> list[_Block]:
    starts = list(_starts(steps))
    labels = {steps[start].statement.text: i for i, start in enumerate(starts)
              if steps[start].statement.kind == "label"}
    blocks = []
    for i, (first, last) in enumerate(zip(starts, [*starts[1:], len(steps)])):
        end = steps[last - 1].statement
        name = end.operation.split(".")[0]
        followers = [labels[end.operands[0]]] if name == "bra" else []
        if last < len(steps) and (name not in ENDS or end.guard):
            followers.append(i + 1)
        blocks.append(_Block(first, last, tuple(followers)))
    return blocks


def _starts(steps: Sequence[Step]) -> Iterator[int]:
    """A basic block starts at the function's start, at each label, and behind each branch or return."""
    behind = True
    for i, step in enumerate(steps):
        if behind or step.statement.kind == "label":
            yield i
        behind = step.statement.operation.split(".")[0] in ENDS
