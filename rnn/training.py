"""A training run: the loop over epochs and steps, its folder, signals, and exact resuming.

The folder of a run holds `config.json`; `metrics.jsonl`, a line per step and a line per evaluation, without clock
times; `timing.json`; `last.safetensors`, from which the run resumes bit for bit; `best.safetensors`, the parameters
with the lowest validation loss; `loss.png`; `samples.txt`.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, get_type_hints

import numpy as np
from tqdm import tqdm

from char_gru.rnn import schedule
from char_gru.rnn.batches import Batch, ContiguousStreams, ShuffledWindows, sizes_that_fit, validation_windows
from char_gru.rnn.checkpoint import (
    Checkpoint,
    Resumable,
    find_checkpoint,
    load_checkpoint,
    newest_run,
    save_checkpoint,
)
from char_gru.rnn.config import CHANGEABLE_ON_RESUME, Sizes, TrainConfig, UserError, has_type
from char_gru.rnn.corpus import Corpus, load_corpus
from char_gru.rnn.devices import op_set, untested_gpu
from char_gru.rnn.feedback import Events, ProgressReport, check_tensorboard, picture_of_losses
from char_gru.rnn.folder import RunFolder, holds_run, is_metrics_line, read_metrics
from char_gru.rnn.model import LanguageModel
from char_gru.rnn.params import flat_size, initial_parameters, named_views, parameter_count, parameter_shapes
from char_gru.rnn.process import Lossy, handled, stop_numbers
from char_gru.rnn.sampler import Generator
from char_gru.rnn.terminal import displayed, one_line, quoted
from char_gru.rnn.vocabulary import Vocabulary

SAVE_SECONDS = 300
"""Inside an epoch, the longest time between two checkpoints."""

SAMPLE_LENGTH, SAMPLE_TEMPERATURE = 200, 0.8

HOPELESS, LARGEST_PARAMETER = 1000, 1e6
"""A loss of more than so many times that of a uniform guess, or a larger parameter, counts as diverged: every gate is
saturated by then."""

WORSE, WORSE_STEPS = 1.0, 200
"""A loss that lies so far above that of a uniform guess, in nats, for so many steps on end, is worth a word."""


class Diverged(Exception):
    """The loss, a gradient or a parameter is not finite, or so large that nothing can be learnt any more. The last good
    checkpoint is kept."""


@dataclass
class Progress:
    """The point that a run has reached: all that a resumed run must know beside parameters, moments and state.

    step, epoch and batch, counted from 0, name the next step; loss_sum adds up this epoch's losses; best_loss is the
    lowest one of an evaluation, best_step the step after which it was; epochs_without_best counts the epochs that ended
    after the one with that step; evaluated_step is the step after which the model was last evaluated; schedule_start,
    the step at which the learning rate's schedule began; metrics_bytes and samples_bytes are the sizes of the two files
    that grow.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    best_loss: float | None = None
    epochs_without_best: int = 0
    metrics_bytes: int = 0
    samples_bytes: int = 0
    best_step: int = 0
    evaluated_step: int = 0
    schedule_start: int = 0

    @staticmethod
    def from_saved(saved: dict) -> Progress:
        """The progress that a checkpoint holds. One of an earlier version does not name the last three steps: there,
        models were evaluated after each epoch, and schedules began with the run.

        Raises: KeyError, TypeError or ValueError for values that no run reaches.
        """
        hints = get_type_hints(Progress)
        evaluated_step = 0 if saved["batch"] else saved["step"]
        saved = {"best_step": 0, "evaluated_step": evaluated_step, "schedule_start": 0} | saved
        progress = Progress(**{name: saved[name] for name in hints})
        for name, value in vars(progress).items():
            if not has_type(value, hints[name]):
                raise TypeError(name)
            if value is not None and not (0 <= value < 2**63 if hints[name] is int else math.isfinite(value)):
                raise ValueError(name)
        if max(progress.best_step, progress.evaluated_step, progress.schedule_start) > progress.step:
            raise ValueError("step")
        if progress.batch == 0 and progress.evaluated_step != progress.step:  # an epoch ends with its evaluation
            raise ValueError("evaluated_step")
        return progress


def folder_to_resume(out: Path | None) -> RunFolder:
    """The folder of the run to resume, held by this process.

    out: the folder of the run; None for the newest run under runs/.

    Raises: UserError if there is no run to resume, or if another process trains it.
    """
    path = newest_run() if out is None else out
    if (path / "last.safetensors").exists():
        return RunFolder(path)
    if path.is_file():
        raise UserError(f"{path} is no folder of a run; start a new run from its weights with --init-from "
                        f"{quoted(path)} instead of --resume")
    if not holds_run(path):
        raise UserError(f"{path} holds no run to resume; leave --resume out to start one there")
    best = path / "best.safetensors"
    weights = f" from its weights with --init-from {quoted(best)}" if best.exists() else ""
    raise UserError(f"{path} has lost its last.safetensors, from which it would resume; start a new run{weights}, "
                    "in another --out")


def resumable_run(files: RunFolder) -> tuple[TrainConfig, Checkpoint]:
    """The options of the run to resume, its folder among them, and its last checkpoint.

    Raises: UserError if there is nothing to resume from.
    """
    path = files.path / "last.safetensors"
    checkpoint = load_checkpoint(path)
    saved, sizes = checkpoint.resumable, checkpoint.sizes
    if saved is None:
        raise UserError(f"{path} has nothing to resume from; start a new run from its weights with --init-from "
                        f"{quoted(path)} instead of --resume")
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


def starting_point(path: str) -> tuple[TrainConfig, Checkpoint]:
    """The options that --init-from takes from a checkpoint, its sizes, and that checkpoint.

    path: a checkpoint file or the folder of a run.

    Raises: UserError if there is no checkpoint that can be used.
    """
    checkpoint = load_checkpoint(find_checkpoint(Path(path)))
    sizes = checkpoint.sizes
    return TrainConfig(embedding_dim=sizes.E, rnn_units=sizes.H, layers=sizes.layers), checkpoint


def train(config: TrainConfig, files: RunFolder | None = None, checkpoint: Checkpoint | None = None,
          schedule_given: bool = False) -> int:
    """Train as the options say; returns the exit status: 0, or 128 + the number of the signal that stopped the run.

    files: the folder of a resumed run; None for a new run. checkpoint: of a resumed run its last one, from
    `resumable_run`; with --init-from the one that it names; otherwise None. schedule_given: whether the command line
    names --lr-schedule, which begins a resumed run's schedule anew where it differs from what it was, or began as.

    Raises: UserError for options or a text that cannot be used, and if another process trains in the folder; Diverged;
    OSError if the run cannot be saved.
    """
    ops = op_set(config.device, config.precision)
    if warning := untested_gpu(ops):
        _say(f"train.py: {warning}")
    if config.resume:
        _check_same_run(config, TrainConfig.from_saved(checkpoint.resumable.progress["config"]))
    elif config.init_from is not None:
        _check_starting_point(config, checkpoint)
    if config.tensorboard:
        check_tensorboard()
    try:
        corpus = load_corpus(config.data, config.encoding, config.newline, config.separator, config.bytes)
    except UserError as error:
        raise UserError(f"{error}; --resume needs the text that {config.out} was trained on: give --data the place "
                        "where it is now" if config.resume else str(error)) from None
    if config.resume:
        corpus = _with_mark(corpus, checkpoint)
    with contextlib.redirect_stdout(Lossy(sys.stdout)), files or RunFolder.new(config.out, corpus.name) as held:
        try:
            run = Run(replace(config, data=corpus.source), corpus, ops, held, checkpoint, schedule_given)
            _say(_told(corpus, run.vocabulary.unit))
            del corpus  # the run keeps the text's ids only
            return run.train()
        except (OSError, RuntimeError) as error:
            if (held.path / "last.safetensors").exists():
                error.add_note("what was saved before still stands")
            raise


class _StageText(NamedTuple):
    """A text cut for sequences of one length: the batches of an epoch, and the windows of its validation part."""

    batches: ShuffledWindows | ContiguousStreams
    val_windows: list[Batch]

    @staticmethod
    def of(config: TrainConfig, train_ids: np.ndarray, val_ids: np.ndarray, T: int) -> _StageText:
        """Raises: UserError for a text that is too short."""
        B = config.batch_size
        try:
            batches = (ContiguousStreams(train_ids, B, T) if config.stateful
                       else ShuffledWindows(train_ids, B, T, config.seed))
            return _StageText(batches, validation_windows(val_ids, B, T) if config.val_fraction else [])
        except UserError as error:
            fitting = sizes_that_fit(len(train_ids) + len(val_ids), B, T, config.val_fraction)
            raise UserError(f"{error}; {fitting}") from None


class Run:
    """One training run in its folder."""

    def __init__(self, config: TrainConfig, corpus: Corpus, ops, files: RunFolder, checkpoint: Checkpoint | None,
                 schedule_given: bool) -> None:
        self.config, self.files, self.folder = config, files, files.path
        self.text_sha256, self.text_files = corpus.sha256, corpus.files
        if config.resume and checkpoint.resumable.progress["text_sha256"] != self.text_sha256:
            raise UserError(f"the text of {' '.join(config.data)} is not the one that {config.out} was trained on; "
                            "give --data the place of that text, or start a new run from its weights with --init-from "
                            f"{quoted(config.out)} instead of --resume")
        known = checkpoint.vocabulary.characters if checkpoint else ""
        self.vocabulary = Vocabulary.of(corpus.text, known, config.bytes)
        if known and (new := self.vocabulary.characters[len(known):]):
            _say(f"the model gets {len(new)} new {self.vocabulary.unit}s: {self.vocabulary.shown(new)}")
        self.sizes = Sizes(len(self.vocabulary), config.embedding_dim, config.rnn_units, config.layers)
        ids = self.vocabulary.encode(corpus.text)
        val_length = int(len(ids) * config.val_fraction)
        self._texts = [_StageText.of(config, ids[:len(ids) - val_length], ids[len(ids) - val_length:], stage.length)
                       for stage in config.stages]
        self.curriculum = schedule.Curriculum(config.stages, [text.batches.batches_per_epoch for text in self._texts])
        self.total_steps = schedule.total_steps(config, self.curriculum)
        self._schedule = schedule.options(config, self.curriculum)  # with which it began
        flat = initial_parameters(self.sizes, config.init, config.seed)
        if checkpoint and not config.resume:
            for name, view in named_views(flat, self.sizes).items():  # rows of new characters follow the old ones
                view[:len(checkpoint.params[name])] = checkpoint.params[name]
        self.progress = Progress.from_saved(checkpoint.resumable.progress) if config.resume else Progress()
        if len(config.stages) > 1:  # a model that fits no memory is told now, not when its epochs begin
            self._stage = max(range(len(config.stages)), key=lambda stage: config.stages[stage].length)
            self._new_model(flat, ops)
        self._stage = self.curriculum.stage_of(self.progress.epoch)
        self.model = self._new_model(flat, ops)
        self._signal: int | None = None
        self._unread: tuple[int, dict] | None = None
        self._loss, self._worse_steps, self._worse_said = math.nan, 0, False
        self._timing: list[dict] = []
        self._before: TrainConfig | None = None
        if config.resume:
            self._restore(checkpoint, schedule_given)

    @property
    def text(self) -> _StageText:
        """The text as the current stage has it."""
        return self._texts[self._stage]

    @property
    def batches(self) -> ShuffledWindows | ContiguousStreams:
        """The batches of an epoch of the current stage."""
        return self.text.batches

    def train(self) -> int:
        """Train to the end, or to a signal; returns the exit status."""
        self._describe()
        begun = self.progress.step
        with handled(self._on_signal, stop_numbers()):
            self._train()
        if self._signal is not None:
            _say(f"stopped by {signal.Signals(self._signal).name} after step {self.progress.step:,}; "
                 f"continue with --resume --out {quoted(self.folder)}")
            return 128 + self._signal
        end = self._ending()
        _say(f"the run has ended: {end.reason}" if self.progress.step > begun else
             f"nothing left to do: {end.reason}; to go on, give a larger {end.option}")
        _say(f"{self.folder} holds the run after step {self.progress.step:,}, which took "
             f"{self.model.ops.peak_memory_mib():,.0f} MiB at most; write text with: python generate.py "
             f"{quoted(self.folder)}")
        return 0

    def _train(self) -> None:
        progress, begun = self.progress, self.progress.step
        if not self.config.resume:
            self._save()
        else:
            self._recover()
            if progress.evaluated_step == progress.step > 0:  # it may have been killed before it drew
                self._draw_losses()
        saved_at = time.perf_counter()
        self._timed = saved_at, progress.batch
        with (np.errstate(all="ignore"),  # a loss that is not finite is reported once, by this loop
              Events(self.folder, begun) if self.config.tensorboard else contextlib.nullcontext() as self._events,
              ProgressReport(begun, self.total_steps, _say, self.vocabulary.unit) as report):
            while self._signal is None:
                end = self._ending()
                if progress.evaluated_step < progress.step and (end or self._is_evaluated()):
                    self._evaluate()
                    saved_at = time.perf_counter()
                elif end:
                    break
                else:
                    self._train_step()
                    report.after_step(progress.step, progress.epoch + 1, self._loss, self.model.T * self.model.B)
                    if time.perf_counter() - saved_at > SAVE_SECONDS:
                        self._save()
                        saved_at = time.perf_counter()
            if self._signal is not None:
                self._note_time()
                self._save()

    def _recover(self) -> None:
        """Cut the files that grow back to what the checkpoint counts; if they have lost a part of that, say so."""
        progress, metrics, samples = self.progress, self.folder / "metrics.jsonl", self.folder / "samples.txt"
        sizes = (self.files.recover(metrics.name, progress.metrics_bytes, is_metrics_line),
                 self.files.recover(samples.name, progress.samples_bytes, self._is_sample_line))
        if sizes[0] < progress.metrics_bytes:
            lines = read_metrics(metrics)
            lost = (_lost("loss", "losses", "step", {line["step"] for line in lines if "loss" in line}, progress.step)
                    + _lost("evaluation", "evaluations", "epoch", {
                        line["epoch"] for line in lines if "step" not in line}, progress.epoch))
            _say(f"train.py: {metrics} was cut short or damaged, and lost "
                 f"{' and '.join(lost) or 'an evaluation inside an epoch'}, without which the run goes on")
        if sizes[1] < progress.samples_bytes:
            _say(f"train.py: {samples} was cut short or damaged, and lost {progress.samples_bytes - sizes[1]:,} bytes, "
                 "without which the run goes on")
        if sizes != (progress.metrics_bytes, progress.samples_bytes):
            progress.metrics_bytes, progress.samples_bytes = sizes
            self._save()  # so that no other count of bytes remains

    def _is_sample_line(self, line: bytes) -> bool:
        try:
            return "\0" not in line.decode() or "\0" in self.vocabulary.characters
        except UnicodeDecodeError:
            return False

    def _learning_rate(self, step: int) -> float:
        return schedule.learning_rate(self.config, step, self.total_steps, self.progress.schedule_start)

    def _ending(self) -> schedule.Ending | None:
        return schedule.ending(self.config, self.progress.step, self.progress.epochs_without_best, self.curriculum)

    def _is_evaluated(self) -> bool:
        return schedule.is_evaluated(self.config, self.progress.step, self.progress.batch,
                                     self.batches.batches_per_epoch)

    def _note_time(self) -> None:
        """Note for `timing.json` how long the steps since the last evaluation took, all of them in one epoch."""
        (started, batch), progress = self._timed, self.progress
        if progress.batch > batch:
            self._timing.append({"epoch": progress.epoch + 1, "steps": progress.batch - batch,
                                 "seconds": round(time.perf_counter() - started, 3)})

    def _train_step(self) -> None:
        progress = self.progress
        if progress.batch == 0:
            self._enter_stage()
            self.model.reset_state()
        batch = self.batches.batch(progress.epoch, progress.batch)
        result = self.model.train_step(batch.inputs_tb, batch.targets_tb, self._learning_rate(progress.step))
        progress.step += 1
        progress.batch += 1
        # Of the step before: reading this step's loss would wait until the device has computed it.
        self._record_unread_loss()
        self._unread = (progress.step, result)

    def _enter_stage(self) -> None:
        """Before an epoch with sequences of another length, go on with a model of that length, which is made when the
        memory of the one before is free."""
        stage = self.curriculum.stage_of(self.progress.epoch)
        if stage == self._stage:
            return
        before, ops, self._stage, self.model = self._checkpoint(resumable=True), self.model.ops, stage, None
        self.model = self._new_model(np.zeros(flat_size(self.sizes), np.float32), ops)
        self._take_over(before)
        _say(f"epoch {self.progress.epoch + 1:,}: sequences of {self.model.T:,} {self.vocabulary.unit}s, "
             f"{self.batches.batches_per_epoch:,} steps per epoch")

    def _new_model(self, flat: np.ndarray, ops) -> LanguageModel:
        """A model for the sequences of the current stage, with these parameters, before its first step."""
        config = self.config
        return LanguageModel(
            self.sizes, config.stages[self._stage].length, config.batch_size, flat, dropout=config.dropout,
            clip_norm=config.clip_norm, carry_state=config.stateful, seed=config.seed, ops=ops,
            graph=not config.no_graph)

    def _take_over(self, checkpoint: Checkpoint) -> None:
        """Give the model the parameters, moments and state of a checkpoint, and the number of its steps."""
        model, saved = self.model, checkpoint.resumable
        for arrays, source in ((model.params, checkpoint.params), (model.m, saved.m), (model.v, saved.v)):
            for name in parameter_shapes(self.sizes):
                model.ops.copy_in(arrays[name], source[name])
        model.ops.copy_in(model.state, saved.state)
        model.step = self.progress.step

    def _record_unread_loss(self) -> None:
        """Read and record the loss of the last step that was launched, if it is still unread.

        Raises: Diverged if the loss or the gradient's norm is not finite, or the loss hopelessly large.
        """
        if self._unread is None:
            return
        (step, result), self._unread = self._unread, None
        self._loss, norm = float(result["loss"]), float(result["grad_norm"])
        guess = math.log(self.sizes.V)
        if not (self._loss <= HOPELESS * guess and math.isfinite(norm)):
            raise Diverged(f"step {step:,} has loss {self._loss} and gradient norm {norm}; "
                           f"{self.folder} keeps its last good checkpoint; lower --learning-rate or give --clip-norm")
        self.progress.loss_sum += self._loss
        self._write_metrics({"step": step, "epoch": self.progress.epoch + 1, "loss": self._loss})
        self._worse_steps = self._worse_steps + 1 if self._loss > guess + WORSE else 0
        if self._worse_steps == WORSE_STEPS and not self._worse_said:
            self._worse_said = True
            _say(f"step {step:,}: for {WORSE_STEPS} steps the loss has been far above ln {self.sizes.V} = {guess:.4f}, "
                 f"that of a uniform guess (now {self._loss:.4g}); a lower --learning-rate, or --clip-norm, may help")
        if self._events:
            self._events.add(step, **{"loss/training": self._loss, "learning_rate": self._learning_rate(step - 1)})

    def _evaluate(self) -> None:
        """Measure the validation loss, write a sample, and keep the best parameters: at the end of an epoch, where the
        schedule says so inside one, and at the end of the run. A signal ends it at once, with nothing written; the
        resumed run does it then."""
        self._record_unread_loss()
        self._note_time()
        self._timed = time.perf_counter(), self.progress.batch
        progress, ends_epoch = self.progress, self.progress.batch == self.batches.batches_per_epoch
        epoch = progress.epoch + 1
        train_loss = progress.loss_sum / progress.batch
        val_loss = self.model.evaluate(self._windows_before_a_signal()) if self.text.val_windows else None
        if self._signal is not None:
            return
        self._check_finite(val_loss)
        bits, unit = None if val_loss is None else val_loss / math.log(2), self.vocabulary.unit
        name = "bits_per_byte" if self.config.bytes else "bits_per_char"
        self._write_metrics({"epoch": epoch} | ({} if ends_epoch else {"step": progress.step})
                            | {"train_loss": train_loss, "val_loss": val_loss, f"val_{name}": bits})
        place = f"epoch {epoch}" if ends_epoch else f"epoch {epoch}, step {progress.step}"
        validation = "" if val_loss is None else f", validation loss {val_loss:.4f}, {bits:.4f} bits per {unit}"
        _say(f"{place}: training loss {train_loss:.4f}{validation}")
        if self._events and val_loss is not None:
            self._events.add(progress.step, **{"loss/validation": val_loss, f"{name}/validation": bits})
        self._write_sample(place, epoch if ends_epoch else progress.step)
        judged = train_loss if val_loss is None else val_loss
        if progress.best_loss is None or judged < progress.best_loss:
            progress.best_loss, progress.best_step = judged, progress.step
            save_checkpoint(self.folder / "best.safetensors", self._checkpoint(resumable=False))
        if ends_epoch:
            if self.config.save_every and epoch % self.config.save_every == 0:
                save_checkpoint(self.folder / f"epoch-{epoch:04d}.safetensors", self._checkpoint(resumable=False))
            is_best = progress.best_step > progress.step - progress.batch
            progress.epochs_without_best = 0 if is_best else progress.epochs_without_best + 1
            progress.epoch, progress.batch, progress.loss_sum = epoch, 0, 0.0
        progress.evaluated_step = progress.step
        self._save()
        if self._ending():
            self._say_if_hopeless(train_loss, val_loss)
        self._draw_losses()
        self._timed = time.perf_counter(), progress.batch

    def _say_if_hopeless(self, train_loss: float, val_loss: float | None) -> None:
        """Say so if the losses of the run's last evaluation are far above that of a uniform guess, which a run too
        short for WORSE_STEPS has not been told yet."""
        name, loss = max((("training", train_loss), ("validation", val_loss or 0.0)), key=lambda named: named[1])
        guess = math.log(self.sizes.V)
        if loss > guess + WORSE and not self._worse_said:
            _say(f"the run ends with a {name} loss of {loss:.4g}, far above ln {self.sizes.V} = {guess:.4f}, that of a "
                 "uniform guess; a lower --learning-rate, or --clip-norm, may help")

    def _windows_before_a_signal(self) -> Iterator[Batch]:
        for window in self.text.val_windows:
            yield window
            if self._signal is not None:
                return

    def _write_sample(self, place: str, number: int) -> None:
        generator = Generator(self.sizes, self.vocabulary, self.model.params, self.model.ops)
        [text] = generator.generate(length=SAMPLE_LENGTH, temperature=SAMPLE_TEMPERATURE,
                                    seed=self.config.seed + number)
        with tqdm.external_write_mode():
            print(displayed(text), flush=True)
        self.progress.samples_bytes += self.files.append("samples.txt", f"--- {place}\n{text}\n")

    def _write_metrics(self, line: dict) -> None:
        self.progress.metrics_bytes += self.files.append("metrics.jsonl", json.dumps(line) + "\n")

    def _save(self) -> None:
        self._record_unread_loss()
        self._check_finite()
        self.files.flush()
        save_checkpoint(self.folder / "last.safetensors", self._checkpoint(resumable=True))
        text_files = {} if self.text_files in ((), self.config.data) else {"files": self.text_files}
        config = json.dumps(self.config.saved() | text_files, indent=2) + "\n"
        self.files.write("config.json", config.encode())
        timing = {"epochs": self._timing, "peak_memory_mib": round(self.model.ops.peak_memory_mib(), 1)}
        self.files.write("timing.json", (json.dumps(timing, indent=2) + "\n").encode())

    def _check_finite(self, val_loss: float | None = None) -> None:
        usable = all((np.abs(self.model.ops.to_host(array)) <= LARGEST_PARAMETER).all()  # false for NaN, too
                     for array in self.model.params.values())
        if not usable or (val_loss is not None and not val_loss <= HOPELESS * math.log(self.sizes.V)):
            raise Diverged(f"after step {self.progress.step:,} the parameters are no longer usable; {self.folder} "
                           "keeps its last good checkpoint; lower --learning-rate or give --clip-norm")

    def _checkpoint(self, resumable: bool) -> Checkpoint:
        def host(arrays: dict) -> dict[str, np.ndarray]:
            return {name: self.model.ops.to_host(array) for name, array in arrays.items()}

        model, saved = self.model, None
        if resumable:
            progress = vars(self.progress) | {"config": self.config.saved(), "text_sha256": self.text_sha256}
            if self._schedule != schedule.options(self.config, self.curriculum):
                progress["schedule"] = self._schedule
            saved = Resumable(host(model.m), host(model.v), model.ops.to_host(model.state), progress)
        return Checkpoint(self.sizes, self.vocabulary, host(model.params), saved)

    def _restore(self, checkpoint: Checkpoint, schedule_given: bool) -> None:
        self._take_over(checkpoint)
        self._timing = self._saved_timing()
        saved, progress, count = checkpoint.resumable.progress, self.progress, self.batches.batches_per_epoch
        if progress.step != self.curriculum.steps_before(progress.epoch) + progress.batch or progress.batch > count:
            raise UserError(f"{self.folder / 'last.safetensors'} says that step {progress.step:,} is in epoch "
                            f"{progress.epoch + 1:,}, but an epoch has {count:,} steps; start a new run")
        self._before = TrainConfig.from_saved(saved["config"])
        before, now = (schedule.options(config, self.curriculum) for config in (self._before, self.config))
        self._schedule = saved.get("schedule", before)
        if schedule_given and not (now == before == self._schedule):
            self._schedule = now
            self.progress.schedule_start = self.progress.step

    def _saved_timing(self) -> list[dict]:
        """What `timing.json` holds about epochs; nothing, with a word, if it is damaged."""
        path = self.folder / "timing.json"
        try:
            epochs = json.loads(path.read_bytes())["epochs"]
            if type(epochs) is not list or not all(
                    type(value) in (int, float) for epoch in epochs for value in epoch.values()):
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
        counts = ", then ".join(f"{text.batches.batches_per_epoch:,}" for text in self._texts)
        loss = self.model.evaluate([batch])
        trained = (f"after step {self.progress.step:,}" if self.progress.step
                   else "untrained" if self.config.init_from is None else f"of {self.config.init_from}")
        _say(f"{parameter_count(self.sizes):,} parameters, {counts} steps per epoch; "
             f"loss {trained} {loss:.4f}, of a uniform guess ln {self.sizes.V} = {math.log(self.sizes.V):.4f}")
        for remark in schedule.remarks(self.config, self._before, self.progress.step, self.progress.schedule_start,
                                       self.curriculum):
            _say(f"train.py: {remark}")

    def _draw_losses(self) -> None:
        """Draw `loss.png`; if that fails, for whatever reason, a line says so."""
        path = self.folder / "loss.png"
        try:
            lines = read_metrics(self.folder / "metrics.jsonl")
            self.files.write(path.name,
                             picture_of_losses(lines, self.curriculum.steps_before, self.vocabulary.unit))
        except Exception as error:  # noqa: BLE001 whatever fails in drawing, the run goes on
            _say(f"train.py: cannot draw {path} ({error}); the run goes on without it")

    def _on_signal(self, number: int, frame: object) -> None:
        self._signal = number
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the program at once


def _check_same_run(config: TrainConfig, before: TrainConfig) -> None:
    if config.init_from != before.init_from:
        raise UserError("--init-from starts a new run from a checkpoint's weights, --resume continues a run exactly; "
                        "leave one of them out")
    now, then = config.saved(), before.saved()
    for option, value in now.items():
        if option not in CHANGEABLE_ON_RESUME and value != then[option]:
            other = ("train a new model, without --resume"
                     if option in ("embedding_dim", "rnn_units", "layers", "bytes") else
                     f"start a new run from its weights with --init-from {quoted(config.out)}")
            raise UserError(f"--{option.replace('_', '-')} is {value}, but {config.out} was trained with "
                            f"{then[option]}, and --resume continues it exactly; leave the option out, or {other}")


def _check_starting_point(config: TrainConfig, checkpoint: Checkpoint) -> None:
    sizes, vocabulary = checkpoint.sizes, checkpoint.vocabulary
    if vocabulary.of_bytes != config.bytes:
        raise UserError(f"the model of --init-from {config.init_from} has learnt {vocabulary.unit}s; "
                        + ("give --bytes as well" if vocabulary.of_bytes else "leave --bytes out")
                        + ", or start from no checkpoint")
    for option, value, wanted in (("embedding-dim", config.embedding_dim, sizes.E),
                                  ("rnn-units", config.rnn_units, sizes.H), ("layers", config.layers, sizes.layers)):
        if value != wanted:
            raise UserError(f"--{option} is {value}, but the model of --init-from {config.init_from} has {wanted}; "
                            "leave the option out, or start from no checkpoint")


def _with_mark(corpus: Corpus, checkpoint: Checkpoint) -> Corpus:
    """The text with a byte order mark in front if a run has learnt it so: marks were not dropped once."""
    if "\ufeff" not in checkpoint.vocabulary.characters:
        return corpus
    marked = Corpus.of(("\ufeff" + corpus.text).encode(), corpus.name, corpus.source, corpus.files)
    return marked if marked.sha256 == checkpoint.resumable.progress["text_sha256"] else corpus


def _lost(one: str, many: str, unit: str, kept: set[int], total: int) -> list[str]:
    """What the units 1 to `total` have lost, of which `kept` are there: one text, or none."""
    missing = [next((number for number in numbers if number not in kept), 0)
               for numbers in (range(1, total + 1), range(total, 0, -1))]
    count = total - sum(1 <= number <= total for number in kept)
    if count > 1:
        return [f"the {many} of {count:,} {unit}s, from {unit} {missing[0]:,} to {unit} {missing[1]:,}"]
    return [f"the {one} of {unit} {missing[0]:,}"] * count


def _told(corpus: Corpus, unit: str) -> str:
    """A line that names a text and the files that it is made of."""
    files = corpus.files if len(corpus.files) <= 6 else (*corpus.files[:3], "...", *corpus.files[-2:])
    among = f" in {len(corpus.files):,} files" if len(corpus.files) > 1 else ""
    return f"text: {len(corpus.text):,} {unit}s{among}: {', '.join(files) or corpus.name}"


def _say(line: str) -> None:
    tqdm.write(one_line(line), file=sys.stderr)
