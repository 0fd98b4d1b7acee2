"""What a user sees of a run while it trains: progress, warnings, the picture of its losses, TensorBoard."""

import fcntl
import json
import math
import os
import pty
import re
import struct
import sys
import termios
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest

from char_gru.rnn import commands, feedback, training
from char_gru.rnn.batches import sizes_that_fit
from char_gru.rnn.checkpoint import load_checkpoint
from tests.helpers.commands import TINY, assert_refused, make_text, run, start, stop_here, train_here

TEXT = ("--data", "text.txt", *TINY)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a text of eight batches."""
    make_text(tmp_path / "text.txt")
    return tmp_path


# Progress

def test_without_a_terminal_a_line_tells_step_loss_rate_and_time_left(folder, capfd, monkeypatch):
    monkeypatch.setattr(feedback, "LINE_SECONDS", 0)
    train_here(*TEXT, "--steps", 10, cwd=folder)
    said = capfd.readouterr().err
    lines = re.findall(r"^step (\d+) of 10, epoch (\d): loss \d\.\d{4}, [\d,]+ characters/s, \d+:\d\d:\d\d left$", said,
                       re.MULTILINE)
    assert lines == [(str(step), str(1 + (step > 8))) for step in range(2, 11)]


def test_lines_come_about_once_a_minute(folder, monkeypatch):
    clock, said = iter(range(0, 10_000, 7)), []
    monkeypatch.setattr(feedback.time, "perf_counter", lambda: next(clock))
    report = feedback.ProgressReport(100, 400, said.append)
    for step in range(101, 141):
        report.after_step(step, 1, 2.5, 640)
    assert [line.split(":")[0] for line in said] == [f"step {step} of 400, epoch 1" for step in (109, 118, 127, 136)]
    assert said[0].endswith("loss 2.5000, 91 characters/s, 0:33:57 left")


def test_bar_in_a_terminal_shows_the_time_left_of_the_whole_run(folder):
    leader, follower = pty.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))  # rows and columns
    with start("train.py", *TEXT, "--epochs", 3, "--out", "run", cwd=folder, stderr=follower) as process:
        os.close(follower)
        shown = b""
        while piece := read_terminal(leader):
            shown += piece
    os.close(leader)
    assert process.returncode == 0
    bars = re.findall(rb"epoch (\d): +\d+%\|[^|]*\| (\d+)/24 \[\d\d:\d\d<(\d\d:\d\d|\?)", shown)
    assert bars and bars[-1][:2] == (b"3", b"24"), shown


def test_terminal_of_80_columns_has_room_for_the_bar_and_a_sample_begins_a_line(folder):
    leader, follower = pty.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    with start("train.py", *TEXT, "--epochs", 2, "--out", "run", cwd=folder, stdout=follower, stderr=follower):
        os.close(follower)
        shown = b""
        while piece := read_terminal(leader):
            shown += piece
    os.close(leader)
    bars = [line for line in re.split(r"[\r\n]", shown.decode()) if line.startswith("epoch") and "%|" in line]
    bars = [line for line in bars if "loss" in line]
    assert bars and all(re.fullmatch(r"epoch \d: +\d+%\|[^|]{10,}\| .*, loss [\d.na]+, [\d.]+[kM]? chars/s\]", line)
                        and len(line) < 80 for line in bars), bars
    samples = (folder / "run" / "samples.txt").read_text(encoding="utf-8")
    for sample in re.findall(r"--- epoch \d\n(.*\n)", samples):
        assert re.search(r"[\r\n]" + re.escape(sample.rstrip("\n")), shown.decode()), sample


def read_terminal(leader: int) -> bytes:
    try:
        return os.read(leader, 1 << 16)
    except OSError:  # the program has ended
        return b""


# Losses that are too large

def test_losses_far_above_a_guess_are_said_once(folder, capfd, monkeypatch):
    monkeypatch.setattr(training, "WORSE_STEPS", 4)
    train_here(*TEXT, "--steps", 30, "--learning-rate", 2, cwd=folder)
    lines = [line for line in capfd.readouterr().err.splitlines() if "far above" in line]
    V = load_checkpoint(folder / "run" / "last.safetensors").sizes.V
    assert len(lines) == 1
    assert f"ln {V} = {math.log(V):.4f}, that of a uniform guess" in lines[0] and "--learning-rate" in lines[0]


@pytest.mark.parametrize("options", [(), ("--val-fraction", 0)], ids=str)
def test_short_run_that_ends_far_above_a_guess_is_told_so_at_its_end(folder, capfd, options):
    train_here(*TEXT, "--epochs", 2, "--learning-rate", 3, *options, cwd=folder)
    said = capfd.readouterr().err
    [line] = [line for line in said.splitlines() if "far above" in line]
    assert line.startswith("the run ends with a ") and "that of a uniform guess" in line and "--clip-norm" in line
    assert said.index("epoch 2:") < said.index(line)


def test_losses_of_a_good_run_are_not_remarked_upon(folder, capfd, monkeypatch):
    monkeypatch.setattr(training, "WORSE_STEPS", 1)
    train_here(*TEXT, "--steps", 10, cwd=folder)
    assert "far above" not in capfd.readouterr().err


@pytest.mark.parametrize("options", [("--steps", 20), ("--steps", 1), ("--steps", 1, "--val-fraction", 0)], ids=str)
def test_run_whose_loss_is_finite_but_hopeless_has_diverged(folder, options):
    result = run("train.py", *TEXT, *options, "--learning-rate", 1e30, "--out", "run", cwd=folder)
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1].startswith("train.py: training diverged: ")
    assert "Traceback" not in result.stderr
    last = load_checkpoint(folder / "run" / "last.safetensors")
    assert last.resumable.progress["step"] == 0 and all(np.abs(array).max() < 10 for array in last.params.values())
    assert not (folder / "run" / "best.safetensors").exists()


# Texts that are too short

@pytest.mark.parametrize("stateful", [(), ("--stateful",)], ids=["windows", "streams"])
@pytest.mark.parametrize("length", [3, 30, 60, 400, 6000])
def test_error_of_a_short_text_names_sizes_that_fit(tmp_path, capfd, length, stateful):
    (tmp_path / "short.txt").write_text(("abcdefg" * 1000)[:length])
    arguments = ("--data", "short.txt", "--rnn-units", 8, "--embedding-dim", 8, "--steps", 1, *stateful)
    with chdir(tmp_path):
        assert commands.train([*map(str, arguments), "--out", "run"]) == 2
    stdout, stderr = capfd.readouterr()
    assert_refused(2, stdout, stderr, "characters", "would fit")
    assert not (tmp_path / "run").exists()
    named = stderr.rsplit("; ", 1)[1].removesuffix(" would fit\n").split()
    assert named[:2:2] == ["--batch-size"]
    train_here(*arguments, *named, cwd=tmp_path)


def test_sizes_that_fit_make_several_batches_of_useful_length():
    assert sizes_that_fit(1000, 64, 100, 0.05) == "--batch-size 6 --seq-length 25 would fit"
    assert sizes_that_fit(30, 64, 100, 0.05) == "--batch-size 1 --seq-length 6 --val-fraction 0 would fit"
    assert sizes_that_fit(1, 64, 100, 0.05) == "no sizes fit so short a text"


# The picture

def test_picture_has_training_and_validation_and_both_units(monkeypatch):
    from matplotlib import figure

    lines = [{"step": 1, "epoch": 1, "loss": 4.0}, {"step": 2, "epoch": 1, "loss": 3.0},
             {"epoch": 1, "step": 2, "train_loss": 3.5, "val_loss": 3.25, "val_bits_per_char": 4.69},
             {"step": 3, "epoch": 1, "loss": 2.5},
             {"epoch": 1, "train_loss": 3.2, "val_loss": 2.75, "val_bits_per_char": 3.97}]
    figures = []

    class Kept(figure.Figure):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            figures.append(self)

    monkeypatch.setattr(figure, "Figure", Kept)
    assert feedback.picture_of_losses(lines, lambda epochs: 3 * epochs).startswith(b"\x89PNG")
    [axes], [bits] = figures[0].axes, figures[0].axes[0].child_axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert drawn == {"training": [[1, 4], [2, 3], [3, 2.5]], "validation": [[2, 3.25], [3, 2.75]]}
    assert axes.get_ylabel() == "loss (nats per character)" and bits.get_ylabel() == "bits per character"
    assert bits.get_ylim() == pytest.approx([nats / math.log(2) for nats in axes.get_ylim()])


@pytest.mark.parametrize("lines", [[], [{"step": 1, "epoch": 1, "loss": 4.0}]], ids=["no line", "one step"])
def test_picture_of_hardly_any_losses_shows_them_without_a_warning(monkeypatch, lines):
    from matplotlib import axes

    plot, drawn = axes.Axes.plot, []
    monkeypatch.setattr(axes.Axes, "plot", lambda self, *points, **style: drawn.append(style) or plot(
        self, *points, **style))
    assert feedback.picture_of_losses(lines, lambda epochs: 8 * epochs).startswith(b"\x89PNG")
    assert [style["marker"] for style in drawn] == ["o"] * len(lines)


# TensorBoard

def test_tensorboard_shows_what_the_metrics_hold_also_after_a_resumption(folder):
    from tensorboard.backend.event_processing import event_accumulator

    options = (*TEXT, "--epochs", 2, "--eval-every", 5, "--lr-schedule", "cosine")
    stop_here(6, *options, "--tensorboard", cwd=folder)
    train_here("--resume", "--tensorboard", cwd=folder)
    events = event_accumulator.EventAccumulator(str(folder / "run")).Reload()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluated = [(line.get("step", 8 * line["epoch"]), line["val_loss"]) for line in lines if "val_loss" in line]
    assert set(events.Tags()["scalars"]) == {
        "loss/training", "learning_rate", "loss/validation", "bits_per_char/validation"}
    for name, expected in (("loss/training", steps), ("loss/validation", evaluated)):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in expected]
        assert [value for _, value in shown] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert events.Scalars("learning_rate")[0].value == pytest.approx(1e-3)


def test_run_with_tensorboard_has_the_files_of_one_without(folder):
    (folder / "plain").mkdir()
    make_text(folder / "plain" / "text.txt")
    plain = train_here(*TEXT, "--steps", 4, cwd=folder / "plain")
    events = train_here(*TEXT, "--steps", 4, "--tensorboard", cwd=folder)
    for path in plain.iterdir():
        if path.name not in ("timing.json", "loss.png"):
            assert (events / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list(events.glob("events.out.tfevents.*"))) == 1


def test_tensorboard_that_is_not_installed_is_said_in_one_line(folder, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with chdir(folder):
        status = commands.train([*TEXT, "--tensorboard", "--out", "run"])
    stdout, stderr = capfd.readouterr()
    assert_refused(status, stdout, stderr, "--tensorboard", "pip install 'char-gru[tensorboard]'")
    assert not (folder / "run").exists()


# A start that fails

def test_start_that_fails_leaves_no_folder(folder, capfd, monkeypatch):
    """After the folder is made and before the first checkpoint is saved."""
    def without_memory(self, windows):
        raise MemoryError("too much")

    monkeypatch.setattr(training.LanguageModel, "evaluate", without_memory)
    with chdir(folder):
        assert commands.train([*TEXT]) == 2
    assert "not enough memory" in capfd.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["text.txt"]
