"""The plan of a training run: the length of its sequences, how many steps it has, the learning rate of each, after
which of them the model is evaluated, and what ends the run."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from char_gru.rnn.config import Stage, TrainConfig

LOWEST_RATE = 0.1
"""Learning rate at the end of the cosine schedule, as a share of its peak."""

MOST_STEPS_UNEVALUATED = 5000
"""Without --eval-every, an epoch of more steps than this is divided into equal parts, and evaluated after each."""


class Ending(NamedTuple):
    """What ends a run, in words, and the option that lets it go on."""

    reason: str
    option: str


class Curriculum:
    """Which stage of --seq-length each epoch belongs to, and how many steps epochs have; epochs count from 0.

    Arguments: stages; batches_per_epoch, in each of them. first_epochs: the first epoch of each.
    """

    def __init__(self, stages: Sequence[Stage], batches_per_epoch: Sequence[int]) -> None:
        self._batches = batches_per_epoch
        self.first_epochs = [*itertools.accumulate((stage.epochs for stage in stages[:-1]), initial=0)]

    def stage_of(self, epoch: int) -> int:
        """The index of the stage that an epoch belongs to."""
        return bisect.bisect_right(self.first_epochs, epoch) - 1

    def steps_before(self, epoch: int) -> int:
        """Steps of all epochs before this one."""
        ends = (*self.first_epochs[1:], epoch)
        return sum(batches * max(0, min(end, epoch) - first)
                   for first, end, batches in zip(self.first_epochs, ends, self._batches))


def total_steps(config: TrainConfig, curriculum: Curriculum) -> int:
    """Steps of the whole run: those of --steps; without it, those of --epochs."""
    return curriculum.steps_before(config.epochs) if config.steps is None else config.steps


def learning_rate(config: TrainConfig, step: int, total_steps: int, start: int = 0) -> float:
    """The learning rate of step `step`, counted from 0, of total_steps: linear warm-up, then constant or cosine.

    start: the step at which the schedule begins.
    """
    step, total_steps = step - start, total_steps - start
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.learning_rate * (
        LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def is_evaluated(config: TrainConfig, step: int, batch: int, batches_per_epoch: int) -> bool:
    """Whether the model is evaluated after `step` steps in all, `batch` of them in this epoch, if the run goes on."""
    if batch == batches_per_epoch:
        return True
    if config.eval_every:
        return step % config.eval_every == 0
    parts = math.ceil(batches_per_epoch / MOST_STEPS_UNEVALUATED)
    return batch % math.ceil(batches_per_epoch / parts) == 0


def ending(config: TrainConfig, step: int, epochs_without_best: int, curriculum: Curriculum) -> Ending | None:
    """What ends the run after `step` steps; None if it goes on."""
    if config.patience and epochs_without_best >= config.patience:
        return Ending(f"--patience {config.patience}, for {epochs_without_best} epochs had no lower validation loss",
                      "--patience")
    if step < total_steps(config, curriculum):
        return None
    if config.steps is not None:
        return Ending(f"--steps {config.steps} are done", "--steps")
    return Ending(f"--epochs {config.epochs} are done", "--epochs")


def options(config: TrainConfig, curriculum: Curriculum) -> dict:
    """What the rates of a schedule follow from, beside the step at which it begins: JSON values by name."""
    return {"lr_schedule": config.lr_schedule, "learning_rate": config.learning_rate,
            "warmup_steps": config.warmup_steps, "total_steps": total_steps(config, curriculum)}


def remarks(config: TrainConfig, before: TrainConfig | None, step: int, start: int,
            curriculum: Curriculum) -> list[str]:
    """What to say about the learning rate, and lengths of sequences, before step `step`, counted from 0.

    before: the options with which a resumed run came to this step, None for a new run; start: the step at which the
    schedule begins.
    """
    said, total, last = [], total_steps(config, curriculum), curriculum.first_epochs[-1]
    if step >= total:
        return said
    if curriculum.steps_before(last) >= total:
        said.append(f"--seq-length {config.seq_length} has sequences of {config.stages[-1].length} from epoch "
                    f"{last + 1:,} on, but the run ends before it; give more --epochs or --steps to get there")
    rate = learning_rate(config, step, total, start)
    if before and 0 < start == step:
        said.append(f"--lr-schedule {config.lr_schedule} begins anew at step {step + 1:,}, with learning rate "
                    f"{rate:.3g}; leave the option out to go on with the schedule of the whole run")
    elif before:
        expected = learning_rate(before, step, total_steps(before, curriculum), start)
        if not math.isclose(rate, expected, rel_tol=1e-9):
            anew = learning_rate(config, step, total, step)
            advice = "" if math.isclose(rate, anew, rel_tol=1e-9) else (
                f"; to begin the schedule anew at this step, with {anew:.3g}, give --lr-schedule {config.lr_schedule} "
                "as well")
            said.append(f"the learning rate of step {step + 1:,} is {rate:.3g}; with the options before it would be "
                        f"{expected:.3g}{advice}")
    if step == start and config.warmup_steps >= total - start:
        last = learning_rate(config, total - 1, total, start)
        said.append(f"--warmup-steps {config.warmup_steps} takes the whole run of {total - start:,} steps: the "
                    f"learning rate only rises, from {rate:.3g} to {last:.3g}")
    return said
