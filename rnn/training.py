"""A training run: the loop over epochs and steps, its folder, signals, and exact resuming.

The folder of a run holds `config.json`; `metrics.jsonl`, a line per step and a line per epoch, without clock times;
`timing.json`; `last.safetensors`, from which the run resumes bit for bit; `best.safetensors`, the parameters with the
lowest validation loss; `loss.png`; `samples.txt`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
from tqdm import tqdm

from char_gru.rnn.batches import ContiguousStreams, ShuffledWindows, validation_windows
from char_gru.rnn.checkpoint import Checkpoint, Resumable, load_checkpoint, newest_run, save_checkpoint
from char_gru.rnn.config import CHANGEABLE_ON_RESUME, Sizes, TrainConfig, UserError, has_type
from char_gru.rnn.corpus import Corpus, load_corpus
from char_gru.rnn.devices import op_set, untested_gpu
from char_gru.rnn.folder import RunFolder, is_metrics_line, read_metrics
from char_gru.rnn.model import LanguageModel
from char_gru.rnn.params import initial_parameters, parameter_count, parameter_shapes
from char_gru.rnn.process import Lossy, handled, stop_numbers
from char_gru.rnn.sampler import Generator
from char_gru.rnn.vocabulary import Vocabulary

SAVE_SECONDS = 300
"""Inside an epoch, the longest time between two checkpoints."""

LOWEST_RATE = 0.1
"""Learning rate at the end of the cosine schedule, as a share of its peak."""

SAMPLE_LENGTH, SAMPLE_TEMPERATURE = 200, 0.8


class Diverged(Exception):
    """The loss, a gradient or a parameter is no longer finite. The last good checkpoint is kept."""


@dataclass
class Progress:
    """The point that a run has reached: all that a resumed run must know beside parameters, moments and state.

    step, epoch and batch, counted from 0, name the next step; loss_sum adds up this epoch's losses; metrics_bytes and
    samples_bytes are the sizes of the two files that grow.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    best_loss: float | None = None
    epochs_without_best: int = 0
    metrics_bytes: int = 0
    samples_bytes: int = 0

    @staticmethod
    def from_saved(saved: dict) -> Progress:
        """The progress that a checkpoint holds.

        Raises: KeyError, TypeError or ValueError for values that no run reaches.
        """
        hints = get_type_hints(Progress)
        progress = Progress(**{name: saved[name] for name in hints})
        for name, value in vars(progress).items():
            if not has_type(value, hints[name]):
                raise TypeError(name)
            if value is not None and not (0 <= value < 2**63 if hints[name] is int else math.isfinite(value)):
                raise ValueError(name)
        return progress


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The learning rate of step `step`, counted from 0, of total_steps: linear warm-up, then constant or cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.learning_rate * (
        LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def folder_to_resume(out: Path | None) -> RunFolder:
    """The folder of the run to resume, held by this process.

    out: the folder of the run; None for the newest run under runs/.

    Raises: UserError if there is no run to resume, or if another process trains it.
    """
    path = newest_run() if out is None else out
    if not (path / "last.safetensors").exists():
        raise UserError(f"{path} holds no run to resume; leave --resume out to start one there")
    return RunFolder(path)


def resumable_run(files: RunFolder) -> tuple[TrainConfig, Checkpoint]:
    """The options of the run to resume, its folder among them, and its last checkpoint.

    Raises: UserError if there is nothing to resume from.
    """
    path = files.path / "last.safetensors"
    checkpoint = load_checkpoint(path)
    saved, sizes = checkpoint.resumable, checkpoint.sizes
    if saved is None:
        raise UserError(f"{path} has nothing to resume from; start a new run")
    try:
        config = TrainConfig.from_saved(saved.progress["config"], out=files.path, resume=True)
        Progress.from_saved(saved.progress)
        if not isinstance(saved.progress["text_sha256"], str):
            raise TypeError("text_sha256")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds progress or options that no run has ({error}); start a new run") from None
    options = (config.embedding_dim, config.rnn_units, config.layers, config.batch_size)
    if options != (sizes.E, sizes.H, sizes.layers, saved.state.shape[1]):
        raise UserError(f"{path} holds progress or options that do not fit its tensors; start a new run")
    return config, checkpoint


def train(config: TrainConfig, files: RunFolder | None = None, checkpoint: Checkpoint | None = None) -> int:
    """Train as the options say; returns the exit status: 0, or 128 + the number of the signal that stopped the run.

    files: the folder of a resumed run, and checkpoint: its last one, from `resumable_run`; None for a new run.

    Raises: UserError for options or a text that cannot be used, and if another process trains in the folder; Diverged;
    OSError if the run cannot be saved.
    """
    ops = op_set(config.device, config.precision)
    if warning := untested_gpu(ops):
        _say(f"train.py: {warning}")
    if checkpoint:
        _check_same_run(config, TrainConfig.from_saved(checkpoint.resumable.progress["config"]))
    corpus = load_corpus(config.data, config.encoding)
    with contextlib.redirect_stdout(Lossy(sys.stdout)), files or RunFolder.new(config.out, corpus.name) as held:
        return Run(replace(config, data=corpus.source), corpus, ops, held, checkpoint).train()


class Run:
    """One training run in its folder."""

    def __init__(self, config: TrainConfig, corpus: Corpus, ops, files: RunFolder,
                 checkpoint: Checkpoint | None) -> None:
        self.config, self.files, self.folder = config, files, files.path
        self.text_sha256 = corpus.sha256
        if checkpoint and checkpoint.resumable.progress["text_sha256"] != self.text_sha256:
            raise UserError(f"the text of {' '.join(config.data)} is not the one that {config.out} was trained on; "
                            "bring it back, or start a new run with another --out")
        self.vocabulary = Vocabulary.of(corpus.text)
        self.sizes = Sizes(len(self.vocabulary), config.embedding_dim, config.rnn_units, config.layers)
        T, B = config.seq_length, config.batch_size
        ids = self.vocabulary.encode(corpus.text)
        val_length = int(len(ids) * config.val_fraction)
        train_ids, val_ids = ids[:len(ids) - val_length], ids[len(ids) - val_length:]
        self.batches = (ContiguousStreams(train_ids, B, T) if config.stateful
                        else ShuffledWindows(train_ids, B, T, config.seed))
        self.val_windows = validation_windows(val_ids, B, T) if config.val_fraction else []
        self.total_steps = config.epochs * self.batches.batches_per_epoch
        if config.steps is not None:
            self.total_steps = min(self.total_steps, config.steps)
        self.model = LanguageModel(
            self.sizes, T, B, initial_parameters(self.sizes, config.init, config.seed), dropout=config.dropout,
            clip_norm=config.clip_norm, carry_state=config.stateful, seed=config.seed, ops=ops,
            graph=not config.no_graph)
        self.progress = Progress()
        self._signal: int | None = None
        self._unread: tuple[int, dict] | None = None
        self._loss = math.nan
        self._timing: list[dict] = []
        if checkpoint:
            self._restore(checkpoint)

    def train(self) -> int:
        """Train to the end, or to a signal; returns the exit status."""
        self._describe()
        with handled(self._on_signal, stop_numbers()):
            self._train()
        if self._signal is not None:
            _say(f"stopped by {signal.Signals(self._signal).name} after step {self.progress.step:,}; "
                 f"continue with --resume --out {self.folder}")
            return 128 + self._signal
        _say(f"{self.folder} holds the run after step {self.progress.step:,}, which took "
             f"{self.model.ops.peak_memory_mib():,.0f} MiB at most; write text with: python generate.py {self.folder}")
        return 0

    def _train(self) -> None:
        if not self.config.resume:
            self._save()
        else:
            self._recover()
            if self.progress.batch == 0 and self.progress.step:  # it may have been killed before it drew
                self._plot_losses()
        with np.errstate(all="ignore"):  # a loss that is not finite is reported once, by this loop
            # A run that was killed after its last step has that step's epoch still to end.
            while self._signal is None and (not self._finished()
                                            or self.progress.batch == self.batches.batches_per_epoch):
                self._train_epoch()

    def _recover(self) -> None:
        """Cut the files that grow back to what the checkpoint counts; if they have lost a part of that, say so."""
        progress, metrics, samples = self.progress, self.folder / "metrics.jsonl", self.folder / "samples.txt"
        sizes = (self.files.recover(metrics.name, progress.metrics_bytes, is_metrics_line),
                 self.files.recover(samples.name, progress.samples_bytes, self._is_sample_line))
        if sizes[0] < progress.metrics_bytes:
            kept = {line["step"] for line in read_metrics(metrics) if {"step", "loss"} <= line.keys()}
            count = progress.step - len(kept)
            first = next(step for step in itertools.count(1) if step not in kept)
            last = next(step for step in itertools.count(progress.step, -1) if step not in kept)
            what = (f"the losses of {count:,} steps, from step {first:,} to step {last:,}" if count > 1
                    else f"the loss of step {first:,}" if count else "a line about an epoch")
            _say(f"train.py: {metrics} was cut short or damaged; lost is {what}; the run goes on without it")
        if sizes[1] < progress.samples_bytes:
            _say(f"train.py: {samples} was cut short or damaged; lost are {progress.samples_bytes - sizes[1]:,} bytes; "
                 "the run goes on without them")
        if sizes != (progress.metrics_bytes, progress.samples_bytes):
            progress.metrics_bytes, progress.samples_bytes = sizes
            self._save()  # so that no other count of bytes remains

    def _is_sample_line(self, line: bytes) -> bool:
        try:
            return "\0" not in line.decode() or "\0" in self.vocabulary.characters
        except UnicodeDecodeError:
            return False

    def _finished(self) -> bool:
        patience = self.config.patience
        return (self.progress.step >= self.total_steps
                or bool(patience) and self.progress.epochs_without_best >= patience)

    def _train_epoch(self) -> None:
        progress, count = self.progress, self.batches.batches_per_epoch
        first_batch, started = progress.batch, time.perf_counter()
        saved_at = started
        characters = self.config.batch_size * self.config.seq_length
        with tqdm(total=count, initial=first_batch, desc=f"epoch {progress.epoch + 1}/{self.config.epochs}",
                  unit="step", disable=None, dynamic_ncols=True) as bar:
            while progress.batch < count and progress.step < self.total_steps and self._signal is None:
                if progress.batch == 0:
                    self.model.reset_state()
                self._train_step()
                now = time.perf_counter()
                rate = (progress.batch - first_batch) * characters / (now - started)
                bar.set_postfix_str(f"loss {self._loss:.4f}, {rate:,.0f} characters/s", refresh=False)
                bar.update()
                if now - saved_at > SAVE_SECONDS:
                    self._save()
                    saved_at = now
        self._timing.append({"epoch": progress.epoch + 1, "steps": progress.batch - first_batch,
                             "seconds": round(time.perf_counter() - started, 3)})
        if progress.batch == count:
            self._end_epoch()
            self._save()
            self._plot_losses()
        else:
            self._save()

    def _train_step(self) -> None:
        progress = self.progress
        batch = self.batches.batch(progress.epoch, progress.batch)
        result = self.model.train_step(batch.inputs_tb, batch.targets_tb,
                                       learning_rate(self.config, progress.step, self.total_steps))
        progress.step += 1
        progress.batch += 1
        # Of the step before: reading this step's loss would wait until the device has computed it.
        self._record_unread_loss()
        self._unread = (progress.step, result)

    def _record_unread_loss(self) -> None:
        """Read and record the loss of the last step that was launched, if it is still unread.

        Raises: Diverged if the loss or the gradient's norm is not finite.
        """
        if self._unread is None:
            return
        (step, result), self._unread = self._unread, None
        self._loss, norm = float(result["loss"]), float(result["grad_norm"])
        if not (math.isfinite(self._loss) and math.isfinite(norm)):
            raise Diverged(f"step {step:,} has loss {self._loss} and gradient norm {norm}; "
                           f"{self.folder} keeps its last good checkpoint; lower --learning-rate or give --clip-norm")
        self.progress.loss_sum += self._loss
        self._write_metrics({"step": step, "epoch": self.progress.epoch + 1, "loss": self._loss})

    def _end_epoch(self) -> None:
        self._record_unread_loss()
        progress = self.progress
        train_loss = progress.loss_sum / self.batches.batches_per_epoch
        val_loss = self.model.evaluate(self.val_windows) if self.val_windows else None
        self._check_finite(val_loss)
        epoch = progress.epoch + 1
        bits = None if val_loss is None else val_loss / math.log(2)
        self._write_metrics({"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss,
                             "val_bits_per_char": bits})
        validation = "" if val_loss is None else f", validation loss {val_loss:.4f}, {bits:.4f} bits per character"
        _say(f"epoch {epoch}: training loss {train_loss:.4f}{validation}")
        self._write_sample(epoch)
        judged = train_loss if val_loss is None else val_loss
        if progress.best_loss is None or judged < progress.best_loss:
            progress.best_loss, progress.epochs_without_best = judged, 0
            save_checkpoint(self.folder / "best.safetensors", self._checkpoint(resumable=False))
        else:
            progress.epochs_without_best += 1
        if self.config.save_every and epoch % self.config.save_every == 0:
            save_checkpoint(self.folder / f"epoch-{epoch:04d}.safetensors", self._checkpoint(resumable=False))
        progress.epoch, progress.batch, progress.loss_sum = epoch, 0, 0.0

    def _write_sample(self, epoch: int) -> None:
        generator = Generator(self.sizes, self.vocabulary, self.model.params, self.model.ops)
        [text] = generator.generate(length=SAMPLE_LENGTH, temperature=SAMPLE_TEMPERATURE,
                                    seed=self.config.seed + epoch)
        print(text, flush=True)
        self.progress.samples_bytes += self.files.append("samples.txt", f"--- epoch {epoch}\n{text}\n")

    def _write_metrics(self, line: dict) -> None:
        self.progress.metrics_bytes += self.files.append("metrics.jsonl", json.dumps(line) + "\n")

    def _save(self) -> None:
        self._record_unread_loss()
        self._check_finite()
        self.files.flush()
        save_checkpoint(self.folder / "last.safetensors", self._checkpoint(resumable=True))
        config = json.dumps(self.config.saved(), indent=2) + "\n"
        self.files.write("config.json", config.encode())
        timing = {"epochs": self._timing, "peak_memory_mib": round(self.model.ops.peak_memory_mib(), 1)}
        self.files.write("timing.json", (json.dumps(timing, indent=2) + "\n").encode())

    def _check_finite(self, val_loss: float | None = None) -> None:
        finite = all(np.isfinite(self.model.ops.to_host(array)).all() for array in self.model.params.values())
        if not finite or (val_loss is not None and not math.isfinite(val_loss)):
            raise Diverged(f"after step {self.progress.step:,} the parameters are no longer usable; {self.folder} "
                           "keeps its last good checkpoint; lower --learning-rate or give --clip-norm")

    def _checkpoint(self, resumable: bool) -> Checkpoint:
        def host(arrays: dict) -> dict[str, np.ndarray]:
            return {name: self.model.ops.to_host(array) for name, array in arrays.items()}

        model, saved = self.model, None
        if resumable:
            progress = vars(self.progress) | {"config": self.config.saved(), "text_sha256": self.text_sha256}
            saved = Resumable(host(model.m), host(model.v), model.ops.to_host(model.state), progress)
        return Checkpoint(self.sizes, self.vocabulary, host(model.params), saved)

    def _restore(self, checkpoint: Checkpoint) -> None:
        saved, ops = checkpoint.resumable, self.model.ops
        model = self.model
        for arrays, source in ((model.params, checkpoint.params), (model.m, saved.m), (model.v, saved.v)):
            for name in parameter_shapes(self.sizes):
                ops.copy_in(arrays[name], source[name])
        ops.copy_in(self.model.state, saved.state)
        self._timing = self._saved_timing()
        self.progress = progress = Progress.from_saved(saved.progress)
        count = self.batches.batches_per_epoch
        if progress.step != progress.epoch * count + progress.batch or progress.batch > count:
            raise UserError(f"{self.folder / 'last.safetensors'} says that step {progress.step:,} is in epoch "
                            f"{progress.epoch + 1:,}, but an epoch has {count:,} steps; start a new run")
        self.model.step = self.progress.step

    def _saved_timing(self) -> list[dict]:
        """What `timing.json` holds about epochs; nothing, with a word, if it is damaged."""
        path = self.folder / "timing.json"
        try:
            epochs = json.loads(path.read_bytes())["epochs"]
            if not all(type(value) in (int, float) for epoch in epochs for value in epoch.values()):
                raise TypeError
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            _say(f"train.py: {path} is damaged; it begins anew")
            return []
        return epochs

    def _describe(self) -> None:
        shapes = parameter_shapes(self.sizes)
        for name, shape in shapes.items():
            _say(f"{name:10} {shape!s:16} {math.prod(shape):>12,}")
        batch = self.batches.batch(self.progress.epoch, 0)
        loss = self.model.evaluate([batch])
        trained = f"after step {self.progress.step:,}" if self.progress.step else "untrained"
        _say(f"{parameter_count(self.sizes):,} parameters, {self.batches.batches_per_epoch:,} steps per epoch; "
             f"loss {trained} {loss:.4f}, of a uniform guess ln {self.sizes.V} = {math.log(self.sizes.V):.4f}")

    def _plot_losses(self) -> None:
        """Draw `loss.png`; if that fails, for whatever reason, a line says so."""
        try:
            from matplotlib.figure import Figure  # not pyplot: the backend that a notebook has set may not exist here

            lines = read_metrics(self.folder / "metrics.jsonl")
            steps = [(line["step"], line["loss"]) for line in lines if "step" in line]
            ends = [(line["epoch"] * self.batches.batches_per_epoch, line["val_loss"]) for line in lines
                    if "step" not in line and line["val_loss"] is not None]
            axes = Figure(figsize=(8, 5)).subplots()
            axes.plot(*zip(*steps), linewidth=0.8, label="training")
            if ends:
                axes.plot(*zip(*ends), marker="o", label="validation")
            axes.set(xlabel="step", ylabel="loss (nats per character)")
            axes.legend()
            image = io.BytesIO()
            axes.figure.savefig(image)
            self.files.write("loss.png", image.getvalue())
        except Exception as error:  # noqa: BLE001 whatever fails in drawing, the run goes on
            _say(f"train.py: cannot draw {self.folder / 'loss.png'} ({error}); the run goes on without it")

    def _on_signal(self, number: int, frame: object) -> None:
        self._signal = number
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the program at once


def _check_same_run(config: TrainConfig, before: TrainConfig) -> None:
    now, then = config.saved(), before.saved()
    for option, value in now.items():
        if option not in CHANGEABLE_ON_RESUME and value != then[option]:
            raise UserError(f"--{option.replace('_', '-')} is {value}, but {config.out} was trained with "
                            f"{then[option]}; leave the option out, or start a new run with another --out")


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
