"""What is seen of a run: a bar or a line a minute, the picture of its losses, events for TensorBoard."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Self

from tqdm import tqdm

from char_gru.rnn.config import UserError

LINE_SECONDS = 60
"""Without a terminal, the time from one line about the progress to the next."""

BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""Of tqdm, without its rate of steps, so that 80 columns have room for a bar."""


class ProgressReport:
    """How far a run is: a bar over all its steps in a terminal; elsewhere `say` is given a line about once a minute.

    step, of total_steps: where this process begins; unit: what an id stands for.
    """

    def __init__(self, step: int, total_steps: int, say: Callable[[str], None], unit: str = "character") -> None:
        self._first, self._total, self._say, self._unit = step, total_steps, say, unit
        self._characters = 0
        self._started = self._said = time.perf_counter()
        # Without smoothing, the time left follows from all steps so far, with the evaluations among them.
        self._bar = tqdm(total=total_steps, initial=step, disable=None, dynamic_ncols=True, smoothing=0,
                         bar_format=BAR_FORMAT)

    def after_step(self, step: int, epoch: int, loss: float, characters: int) -> None:
        """Tell that `step` steps are done, the last of them in epoch `epoch`, counted from 1, with a loss known by now
        (NaN for none); characters: how many that step has read."""
        now = time.perf_counter()
        self._characters += characters
        rate, speed = (count / (now - self._started) for count in (step - self._first, self._characters))
        self._bar.set_description_str(f"epoch {epoch}", refresh=False)
        short = self._unit[:4]  # char or byte
        self._bar.set_postfix_str(f"loss {loss:.3f}, {tqdm.format_sizeof(speed)} {short}s/s", refresh=False)
        self._bar.update()
        if self._bar.disable and now - self._said >= LINE_SECONDS and not math.isnan(loss):
            left = timedelta(seconds=round((self._total - step) / rate))
            self._say(f"step {step:,} of {self._total:,}, epoch {epoch}: loss {loss:.4f}, "
                      f"{speed:,.0f} {self._unit}s/s, {left} left")
            self._said = now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


class Events:
    """Losses and learning rates as events that TensorBoard shows, in a file of their own in a run's folder.

    step: the steps that are done; TensorBoard then forgets later ones that an earlier, killed process wrote.
    """

    def __init__(self, folder: Path, step: int) -> None:
        check_tensorboard()
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._writer = event_pb2.Event, EventFileWriter(str(folder))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=step + 1, session_log=start))

    def add(self, step: int, **values: float) -> None:
        """Note values of step `step`, counted from 1, by their names."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """Check that event files can be written.

    Raises: UserError if TensorBoard is not installed.
    """
    try:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401
    except ImportError:
        raise UserError("--tensorboard needs a package that is not installed; pip install 'char-gru[tensorboard]', "
                        "or leave the option out") from None


def picture_of_losses(lines: list[dict], steps_of: Callable[[int], int], unit: str = "character") -> bytes:
    """A PNG of the losses of training and of validation by step, in nats and in bits per character, or per byte.

    lines: those of `metrics.jsonl`; steps_of: gives the steps of so many epochs; unit: what an id stands for.
    """
    from matplotlib.figure import Figure  # not pyplot: the backend that a notebook has set may not exist here

    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluations = [(line.get("step", steps_of(line["epoch"])), line["val_loss"]) for line in lines
                   if line.get("val_loss") is not None]
    axes = Figure(figsize=(8, 5)).subplots()
    if steps:
        axes.plot(*zip(*steps), linewidth=0.8, label="training", marker="o" if len(steps) == 1 else "", markersize=4)
    if evaluations:
        axes.plot(*zip(*evaluations), marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel=f"loss (nats per {unit})")
    bits = axes.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2)))
    bits.set_ylabel(f"bits per {unit}")
    if steps or evaluations:
        axes.legend()
    image = io.BytesIO()
    axes.figure.savefig(image)
    return image.getvalue()
