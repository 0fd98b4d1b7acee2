"""`train.py` as its users run it: the files that a run leaves, how it ends, and that a resumed run is the same run."""

import errno
import gzip
import json
import math
import random
import resource
import shutil
import signal
import sys
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from char_gru.kernels.runtime import DeviceError
from char_gru.rnn import commands, training
from char_gru.rnn.batches import ContiguousStreams, ShuffledWindows
from char_gru.rnn.checkpoint import load_checkpoint, save_checkpoint
from char_gru.rnn.model import LanguageModel
from tests.helpers.commands import (
    REPRODUCIBLE,
    ROOT,
    STEPS_PER_EPOCH,
    TINY,
    assert_equal_runs,
    assert_refused,
    contents,
    finish,
    make_text,
    refused_here,
    run,
    running,
    start,
    stop_here,
    train,
    train_here,
    wait_until,
)

TEXT = ("--data", "text.txt", *TINY)
FINISHED = (*TEXT, "--epochs", 3, "--steps", 20)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a text of STEPS_PER_EPOCH batches."""
    make_text(tmp_path / "text.txt")
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two epochs and four steps; read it, do not change it."""
    folder = tmp_path_factory.mktemp("finished")
    make_text(folder / "text.txt")
    return train(*FINISHED, cwd=folder)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def has_a_step(folder: Path):
    """A condition: the run's first step is done."""
    return lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size > 0


def test_texts_given_one_by_one_are_those_given_together(folder):
    for name in ("b", "c", "d"):
        (folder / name).write_text(name * 9, "utf-8")
    options = (*TINY, "--steps", 1, "--stateful")
    for data in (("--data", "text.txt", "--data=b", *options, "--data", "c", "d"),
                 ("--data", "text.txt", "b", "--data", "c", "--data", "d", "--separator=--data", *options)):
        trained = train_here(*data, cwd=folder)
        config = json.loads((trained / "config.json").read_text())
        assert (config["data"], config["stateful"]) == (["text.txt", "b", "c", "d"], True)
        shutil.rmtree(trained)


# What a run leaves behind

def test_run_folder_holds_the_promised_files_and_no_others(finished):
    assert {path.name for path in finished.iterdir()} == {*REPRODUCIBLE, "timing.json", "loss.png"}
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {"epochs", "peak_memory_mib"} == json.loads((finished / "timing.json").read_text()).keys()
    config = json.loads((finished / "config.json").read_text())
    assert config["data"] == ["text.txt"]
    assert (config["rnn_units"], config["steps"], config["seed"]) == (16, 20, 0)


def test_metrics_have_a_line_for_every_step_and_every_epoch_and_for_the_end_inside_one(finished):
    lines = metrics(finished)
    steps = [line for line in lines if "loss" in line]
    epochs = [line for line in lines if "loss" not in line]
    assert all(line.keys() == {"step", "epoch", "loss"} for line in steps)
    keys = {"epoch", "train_loss", "val_loss", "val_bits_per_char"}
    assert [line.keys() for line in epochs] == [keys, keys, {*keys, "step"}]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert [line["epoch"] for line in steps] == [1] * 8 + [2] * 8 + [3] * 4
    assert [lines.index(line) for line in epochs] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 1, 22]
    assert epochs[2]["step"] == 20
    for line in epochs:
        losses = [step["loss"] for step in steps if step["epoch"] == line["epoch"]]
        assert line["train_loss"] == pytest.approx(np.mean(losses), rel=1e-12)
        assert line["val_bits_per_char"] == pytest.approx(line["val_loss"] / np.log(2), rel=1e-12)
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"] < steps[0]["loss"]


def test_best_checkpoint_has_the_parameters_of_the_epoch_with_the_lowest_validation_loss(folder):
    run_folder = train_here(*TEXT, "--epochs", 3, "--save-every", 1, "--learning-rate", 1, cwd=folder)
    losses = [line["val_loss"] for line in metrics(run_folder) if "loss" not in line]
    best = int(np.argmin(losses)) + 1
    assert best < 3, "the last epoch is the best one: the test shows nothing"
    assert ((run_folder / "best.safetensors").read_bytes()
            == (run_folder / f"epoch-{best:04d}.safetensors").read_bytes())
    assert {path.name for path in run_folder.glob("epoch-*")} == {f"epoch-{n:04d}.safetensors" for n in (1, 2, 3)}


def test_save_every_keeps_numbered_copies(folder):
    run_folder = train_here(*TEXT, "--epochs", 3, "--save-every", 2, cwd=folder)
    assert [path.name for path in run_folder.glob("epoch-*")] == ["epoch-0002.safetensors"]
    assert load_checkpoint(run_folder / "epoch-0002.safetensors").resumable is None


def test_patience_stops_after_epochs_without_a_lower_validation_loss(folder):
    run_folder = train_here(*TEXT, "--epochs", 9, "--patience", 2, "--learning-rate", 1e-30, cwd=folder)
    assert metrics(run_folder)[-1]["epoch"] == 3


def test_samples_go_to_stdout_and_samples_txt_and_all_else_to_stderr(folder):
    result = run("train.py", *TEXT, "--epochs", 1, "--out", "run", cwd=folder)
    samples = (folder / "run" / "samples.txt").read_bytes().decode()
    assert samples == f"--- epoch 1\n{result.stdout}"
    assert len(result.stdout) == 201
    assert "parameters" in result.stderr and "validation loss" in result.stderr
    assert "\r" not in result.stderr, "a progress bar where no terminal is"


def test_text_that_stdout_cannot_show_does_not_stop_the_run(folder):
    result = run("train.py", *TEXT, "--epochs", 1, "--out", "run", cwd=folder, environ={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) == 201


def test_reader_that_closes_stdout_does_not_make_a_stopped_run_look_finished(folder):
    process = start("train.py", *TEXT, "--epochs", 2, "--out", "run", cwd=folder)
    process.stdout.close()
    with process:
        process.stdin.close()
        stderr = process.stderr.read().decode()
    assert "Traceback" not in stderr
    last = load_checkpoint(folder / "run" / "last.safetensors")
    assert process.returncode != 0 or last.resumable.progress["step"] == 2 * STEPS_PER_EPOCH


def test_run_without_a_name_takes_the_next_free_one_under_runs(folder):
    with chdir(folder):
        for expected in ("text", "text-2", "text-3"):
            assert commands.train([*TEXT, "--steps", "1"]) == 0
            assert (folder / "runs" / expected / "last.safetensors").exists()
        assert sorted(path.name for path in (folder / "runs").iterdir()) == ["text", "text-2", "text-3"]
        assert commands.train(["--resume", "--steps", "2"]) == 0
    assert [len(metrics(folder / "runs" / name)) for name in ("text", "text-2", "text-3")] == [2, 2, 4]


def test_text_of_a_folder_is_named_file_by_file(folder, capfd):
    (folder / "shelf").mkdir()
    for name in ("b", "a", "c\x1b"):
        make_text(folder / "shelf" / name)
    run_folder = train_here("--data", "shelf", "--separator", "--", *TINY, "--steps", 1, cwd=folder)
    assert r"text: 1,204 characters in 3 files: shelf/a, shelf/b, shelf/c\x1b" in capfd.readouterr().err.splitlines()
    config = json.loads((run_folder / "config.json").read_text())
    assert config["data"] == ["shelf"] and config["files"] == ["shelf/a", "shelf/b", "shelf/c\x1b"]
    assert config["separator"] == "--"
    train_here("--resume", "--steps", 2, cwd=folder)
    capfd.readouterr()
    make_text(folder / "shelf" / "d")
    assert "shelf is not the one" in refused_here(folder, capfd, "--resume", "--out", "run")


@pytest.mark.parametrize("out", [(), ("--out", "."), ("--out", "runs")], ids=str)
def test_folder_that_holds_its_runs_is_the_same_text_again(folder, out):
    with chdir(folder):
        assert commands.train(["--data", ".", *TINY, "--steps", "1", *out]) == 0
        if not out:
            assert commands.train(["--data", ".", *TINY, "--steps", "1"]) == 0
        assert commands.train(["--resume", "--steps", "2", *out]) == 0


def test_text_from_stdin_is_that_of_a_file_and_is_given_again_to_resume(folder):
    text = (folder / "text.txt").read_bytes()
    expected = train_here(*TEXT, "--steps", 3, cwd=folder)
    piped = folder / "piped"
    for steps, resume in ((3, ()), (4, ("--resume",))):
        result = run("train.py", "--data", "-", *TINY, "--steps", steps, "--out", "piped", *resume, cwd=folder,
                     stdin=gzip.compress(text))
        assert result.returncode == 0 and "400 characters: stdin" in result.stderr, result.stderr
        assert (piped / "metrics.jsonl").read_bytes().startswith((expected / "metrics.jsonl").read_bytes())
    assert json.loads((piped / "config.json").read_text())["data"] == ["-"]
    result = run("train.py", "--resume", "--out", "piped", "--steps", 5, cwd=folder)
    assert_refused(result.returncode, result.stdout, result.stderr, "stdin is empty")


def test_run_from_before_marks_and_line_ends_were_changed_resumes_with_its_text(folder):
    text = b"\xef\xbb\xbf" + b"the quick\r\nfox\r\n" * 40
    (folder / "text.txt").write_bytes(text[:3] + text)  # the first mark is dropped
    last = train_here(*TEXT, "--newline", "keep", "--steps", 2, cwd=folder) / "last.safetensors"
    (folder / "text.txt").write_bytes(text)
    checkpoint = load_checkpoint(last)
    for option in ("newline", "separator"):
        del checkpoint.resumable.progress["config"][option]
    save_checkpoint(last, checkpoint)
    train_here("--resume", "--steps", 3, cwd=folder)
    assert {*"\r\ufeff"} < {*load_checkpoint(last).vocabulary.characters}


def test_text_with_other_line_ends_is_the_same_text(finished, folder):
    text = (folder / "text.txt").read_bytes()
    (folder / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert_equal_runs(train_here(*FINISHED, cwd=folder), finished)


def test_folder_in_which_a_process_trains_is_refused_with_its_id(folder):
    with running("train.py", *TEXT, "--epochs", 10**6, "--out", "run", cwd=folder) as process:
        wait_until(has_a_step(folder / "run"), process)
        for arguments in (("--resume", "--out", "run"), (*TEXT, "--out", "run")):
            result = run("train.py", *arguments, cwd=folder)
            assert_refused(result.returncode, result.stdout, result.stderr, "run", f"process {process.pid};")
        assert process.poll() is None
        process.kill()
        process.wait()
    assert (folder / "run" / ".lock").exists()
    train_here("--resume", "--epochs", 1, cwd=folder)
    assert not (folder / "run" / ".lock").exists()


# Sequences whose length changes

LENGTHS = (*TEXT, "--seq-length", "5:1,20", "--steps", 24)
"""A run of an epoch with sequences of 5 characters, and then of 20, cut inside an epoch of four steps."""
SHORT_STEPS, SHORT_STEPS_STATEFUL = 15, 18
"""Steps of the first epoch."""


def test_sequences_have_the_length_of_their_epoch(folder, capfd):
    run_folder = train_here(*LENGTHS, cwd=folder)
    said = capfd.readouterr().err
    assert "15, then 4 steps per epoch" in said and "epoch 2: sequences of 20 characters, 4 steps per epoch" in said
    lines = metrics(run_folder)
    assert [line["epoch"] for line in lines if "loss" in line] == [1] * 15 + [2] * 4 + [3] * 4 + [4]
    evaluations = [(line["epoch"], line.get("step")) for line in lines if "loss" not in line]
    assert evaluations == [(1, None), (2, None), (3, None), (4, 24)]
    assert json.loads((run_folder / "config.json").read_text())["seq_length"] == "5:1,20"


@pytest.mark.parametrize("options", [("--stateful",), ("--layers", 2, "--dropout", 0.3)], ids=["stateful", "dropout"])
def test_epochs_of_another_length_are_those_of_a_model_made_for_it(folder, options):
    """Which begins with parameters, moments and number of steps of the first stage's end, and a state of zeros."""
    lines, steps = metrics(train_here(*LENGTHS, *options, cwd=folder)), SHORT_STEPS
    if "--stateful" in options:
        steps = SHORT_STEPS_STATEFUL
    (folder / "first").mkdir()
    make_text(folder / "first" / "text.txt")
    first = train_here(*TEXT, *options, "--seq-length", 5, "--epochs", 1, cwd=folder / "first")
    assert metrics(first) == lines[:steps + 1]
    model, vocabulary = LanguageModel.load(
        first / "last.safetensors", T=20, B=4, dropout=0.3 if "--dropout" in options else 0,
        carry_state="--stateful" in options)
    model.reset_state()
    ids = vocabulary.encode((folder / "text.txt").read_bytes().decode())[:380]
    batches = ContiguousStreams(ids, 4, 20) if "--stateful" in options else ShuffledWindows(ids, 4, 20, seed=0)
    losses = [float(model.train_step(*batches.batch(1, index))["loss"]) for index in range(4)]
    assert [line["loss"] for line in lines[steps + 1:steps + 5]] == losses


@pytest.mark.parametrize(("options", "steps"), [
    (("--stateful",), SHORT_STEPS_STATEFUL),
    (("--layers", 2, "--dropout", 0.3, "--lr-schedule", "cosine"), SHORT_STEPS)], ids=["stateful", "dropout"])
@pytest.mark.parametrize("stops", [(-12, 2), (0,), (1,), (-1, 0, 1), (4, 5)], ids=str)
def test_run_stopped_at_any_step_resumes_across_a_change_of_length(tmp_path, options, steps, stops):
    """Stops are counted from the last step of the first length."""
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    for path in (whole, parts):
        path.mkdir()
        make_text(path / "text.txt")
    expected = train_here(*LENGTHS, *options, cwd=whole)
    stop_here(steps + stops[0], *LENGTHS, *options, cwd=parts)
    for stop in stops[1:]:
        assert_part_of(parts / "run", expected)
        stop_here(steps + stop, "--resume", "--seq-length", "5:1,20", cwd=parts)
    train_here("--resume", cwd=parts)
    assert_equal_runs(parts / "run", expected)


def test_run_that_ended_where_the_length_changes_goes_on(folder):
    train_here(*TEXT, "--seq-length", "5:1,20", "--epochs", 1, cwd=folder)
    run_folder = train_here("--resume", "--steps", 20, cwd=folder)
    (folder / "whole").mkdir()
    make_text(folder / "whole" / "text.txt")
    expected = train_here(*TEXT, "--seq-length", "5:1,20", "--steps", 20, cwd=folder / "whole")
    for name in ("metrics.jsonl", "samples.txt", "best.safetensors"):  # the others hold the options
        assert contents(run_folder)[name] == contents(expected)[name], name


def test_validation_loss_does_not_depend_on_the_length_of_sequences(folder):
    """With a rate of nothing, all epochs end with one model."""
    options = ("--seq-length", "5:1,20:1,7", "--epochs", 3, "--val-fraction", 0.5, "--learning-rate", 1e-30)
    first, second, third = [line["val_loss"] for line in metrics(train_here(*TEXT, *options, cwd=folder))
                            if "loss" not in line]
    assert second == pytest.approx(first, rel=1e-6) and third == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("value", ["0:3,5", "5:0,9", "5,6", "a:3", "a", "5:,9", ":1,9", "5:1,", ",5", "5:1:2,9",
                                   "5:1, 9", "5:1.5,9", "-5:1,9", "5:1,0"])
def test_lengths_that_are_none_are_refused(folder, capfd, value):
    said = refused_here(folder, capfd, *TEXT, "--out", "run", f"--seq-length={value}")
    assert f"--seq-length is {value}, but must be a whole number of at least 1, or lengths with their epochs" in said


@pytest.mark.parametrize("value", ["5:10", "5:10,9:3"])
def test_last_length_with_epochs_is_refused(folder, capfd, value):
    said = refused_here(folder, capfd, *TEXT, "--out", "run", "--seq-length", value)
    assert f"--seq-length is {value}, but the last length takes all epochs that are left" in said


def test_text_too_short_for_the_longest_sequences_is_refused_with_numbers(folder, capfd):
    said = refused_here(folder, capfd, *TEXT, "--out", "run", "--seq-length", "5:1,200:2,20")
    assert "380 characters, but one batch takes 804 (--batch-size 4, --seq-length 200)" in said


def test_memory_too_small_for_the_longest_sequences_is_told_before_the_first_step(folder, capfd, monkeypatch):
    made = LanguageModel.__init__

    def too_large(self, sizes, T, *arguments, **options):
        if T == 20:
            raise MemoryError("20 steps")
        made(self, sizes, T, *arguments, **options)

    monkeypatch.setattr(LanguageModel, "__init__", too_large)
    said = refused_here(folder, capfd, *TEXT, "--out", "run", "--seq-length", "5:1,20:1,9")
    assert "not enough memory (20 steps)" in said and "--seq-length" in said


def test_lengths_of_a_resumed_run_stay(folder, capfd):
    train_here(*LENGTHS, cwd=folder)
    capfd.readouterr()
    for value in ("5:1,21", "5:2,20", "20"):
        said = refused_here(folder, capfd, "--resume", "--out", "run", "--seq-length", value)
        assert f"--seq-length is {value}, but run was trained with 5:1,20" in said


# Bytes

BINARY = "the quick dög 🦊\r\n".encode() * 20 + bytes(range(256))
"""Bytes of a text, and then of none."""


@pytest.fixture
def binary(tmp_path) -> Path:
    """A folder with a file of bytes."""
    (tmp_path / "data.bin").write_bytes(BINARY)
    return tmp_path


def test_run_of_bytes_tells_bytes_and_decodes_its_samples(binary, capfd):
    run_folder = train_here("--data", "data.bin", "--bytes", *TINY, "--epochs", 2, "--tensorboard", cwd=binary)
    stdout, said = capfd.readouterr()
    assert f"text: {len(BINARY)} bytes: data.bin" in said and "bits per byte" in said and "character" not in said
    [line] = [line for line in metrics(run_folder) if line["epoch"] == 2 and "loss" not in line]
    assert line["val_bits_per_byte"] == pytest.approx(line["val_loss"] / np.log(2), rel=1e-12)
    assert "val_bits_per_char" not in line
    vocabulary = load_checkpoint(run_folder / "best.safetensors").vocabulary
    assert vocabulary.of_bytes and len(vocabulary) == 257
    assert "\ufffd" in stdout and (run_folder / "samples.txt").read_bytes().decode().count("--- epoch ") == 2
    assert json.loads((run_folder / "config.json").read_text())["bytes"] is True


@pytest.mark.parametrize("again", [(), ("--bytes",)])
def test_run_of_bytes_resumes_to_the_same_end(binary, again):
    (binary / "whole").mkdir()
    shutil.copy(binary / "data.bin", binary / "whole")
    options = ("--data", "data.bin", "--bytes", *TINY, "--steps", 20, "--stateful")
    stop_here(11, *options, cwd=binary)
    run_folder = train_here("--resume", *again, cwd=binary)
    assert_equal_runs(run_folder, train_here(*options, cwd=binary / "whole"))


@pytest.mark.parametrize(("options", "part"), [
    (("--encoding", "latin-1"), "leave --encoding out"), (("--newline", "keep"), "--newline"),
    (("--newline=unix", "--encoding=utf-8"), "leave --encoding and --newline out")])
def test_options_of_texts_beside_bytes_are_refused(binary, capfd, options, part):
    said = refused_here(binary, capfd, "--data", "data.bin", "--bytes", *TINY, *options)
    assert "--bytes reads files as they are" in said and part in said
    train_here("--data", "data.bin", "--bytes", *TINY, "--steps", 1, cwd=binary)
    capfd.readouterr()
    assert "--bytes reads files as they are" in refused_here(binary, capfd, "--resume", "--out", "run", *options)


def test_binary_file_is_refused_as_text_with_advice(binary, capfd):
    assert "--bytes" in refused_here(binary, capfd, "--data", "data.bin", *TINY)


# Equal runs

def test_equal_runs_give_equal_bytes(finished, folder):
    again = train(*FINISHED, cwd=folder)
    assert contents(again).keys() == set(REPRODUCIBLE)
    assert_equal_runs(again, finished)


def test_another_seed_gives_another_run(finished, folder):
    other = contents(train_here(*FINISHED, "--seed", 2**63 - 1, cwd=folder))
    assert all(other[name] != content for name, content in contents(finished).items())


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run(finished, folder):
    """Stopped inside an epoch, in the next process one step before its end, then at its end, and before the last."""
    stop_here(3, *FINISHED, cwd=folder)
    for step in (7, 8, 20):
        assert_part_of(folder / "run", finished)
        stop_here(step, "--resume", cwd=folder)
    train("--resume", cwd=folder)
    assert_equal_runs(folder / "run", finished)


@pytest.mark.parametrize("options", [
    ("--stateful",),
    ("--layers", 2, "--dropout", 0.3, "--clip-norm", 0.5, "--init", "keras"),
    ("--val-fraction", 0, "--warmup-steps", 13),
], ids=["stateful", "two layers with dropout", "no validation"])
@pytest.mark.parametrize("stops", [(4,), (9, 11)], ids=str)
def test_resumed_run_with_options_equals_uninterrupted_run(tmp_path, options, stops):
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    for path in (whole, parts):
        path.mkdir()
        make_text(path / "text.txt")
    expected = train_here(*FINISHED, *options, cwd=whole)
    stop_here(stops[0], *FINISHED, *options, cwd=parts)
    for step in stops[1:]:
        assert_part_of(parts / "run", expected)
        stop_here(step, "--resume", cwd=parts)
    train_here("--resume", cwd=parts)
    assert_equal_runs(parts / "run", expected)


def assert_part_of(part: Path, whole: Path) -> None:
    """Assert that the files of an unfinished run are beginnings of those of the whole run."""
    for name in ("metrics.jsonl", "samples.txt"):
        if (part / name).exists():
            begun, full = (folder.joinpath(name).read_bytes() for folder in (part, whole))
            assert full.startswith(begun) and len(begun) <= len(full)


def test_options_of_the_run_may_be_given_again_when_it_resumes(folder):
    options = ("--stateful", *TEXT, "--epochs", 3)
    train_here(*options, "--steps", 3, cwd=folder)
    train_here("--resume", *options, "--steps", 6, cwd=folder)
    assert [line["step"] for line in metrics(folder / "run") if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_resuming_a_finished_run_changes_nothing(finished, folder):
    shutil.copytree(finished, folder / "run")
    train_here("--resume", cwd=folder)
    assert_equal_runs(folder / "run", finished)


# Signals

LONG = ("--epochs", 1, "--steps", 1000)
"""About two seconds of training on LONG_TEXT characters."""
LONG_TEXT = 60_000
COSINE = ("--lr-schedule", "cosine", "--warmup-steps", 3)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Path:
    """A long run that nothing stopped."""
    folder = tmp_path_factory.mktemp("long")
    make_text(folder / "text.txt", LONG_TEXT)
    return train(*TEXT, *LONG, *COSINE, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_run_stopped_by_a_signal_is_saved_and_resumes_to_the_same_end(tmp_path, long_run, number, status):
    make_text(tmp_path / "text.txt", LONG_TEXT)
    with running("train.py", *TEXT, *LONG, *COSINE, "--out", "run", cwd=tmp_path) as process:
        wait_until(has_a_step(tmp_path / "run"), process)
        process.send_signal(number)
        result = finish(process)
    assert result.returncode == status, result.stderr
    assert "--resume --out run" in result.stderr and "Traceback" not in result.stderr
    steps = len(metrics(tmp_path / "run"))
    assert 1 <= steps < 1000
    assert load_checkpoint(tmp_path / "run" / "last.safetensors").resumable.progress["step"] == steps
    train("--resume", cwd=tmp_path)
    assert_equal_runs(tmp_path / "run", long_run)


SAVE_AT_EVERY_STEP = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from char_gru.rnn import commands, training
training.SAVE_SECONDS = 0
sys.exit(commands.train())
"""


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_end(finished, folder):
    rng, run_folder = random.Random(0), folder / "run"
    options = (ROOT, *FINISHED, "--out", "run")
    for _ in range(3):
        resume = ["--resume"] if (run_folder / "last.safetensors").exists() else []
        with running(SAVE_AT_EVERY_STEP, *options, *resume, cwd=folder) as process:
            wait_until(has_a_step(run_folder), process)
            lines = len(metrics_bytes(run_folder)) + rng.randrange(4)
            wait_until(lambda wanted=lines: process.poll() is not None or len(metrics_bytes(run_folder)) >= wanted,
                       process)
        assert process.returncode == -signal.SIGKILL
        load_checkpoint(run_folder / "last.safetensors")
    train("--resume", cwd=folder)
    assert_equal_runs(run_folder, finished)


def metrics_bytes(folder: Path) -> list[bytes]:
    """Lines of the metrics of a run that may be writing one just now."""
    return (folder / "metrics.jsonl").read_bytes().splitlines()


# Failures in the middle of a run

@pytest.mark.parametrize(("name", "share"), [("last.safetensors", 0.5), ("metrics.jsonl", 1.2)])
def test_full_disk_ends_the_run_and_leaves_one_that_resumes(tmp_path, name, share):
    whole, parts = (tmp_path / part for part in ("whole", "parts"))
    for path in (whole, parts):
        path.mkdir()
        make_text(path / "text.txt")
    expected = train_here(*TEXT, "--steps", 7, cwd=whole)
    last = stop_here(3, *TEXT, "--steps", 7, cwd=parts) / "last.safetensors"
    before = last.read_bytes()
    limit = int((parts / "run" / name).stat().st_size * share)

    def fill_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = run("train.py", "--resume", "--out", "run", "--steps", 7, cwd=parts, preexec_fn=fill_disk)
    assert result.returncode == 2
    [said] = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
    assert "cannot write" in said or "cannot read or write" in said
    assert "Traceback" not in result.stderr
    assert last.read_bytes() == before
    assert not list(parts.glob("run/*.tmp"))
    train_here("--resume", "--steps", 7, cwd=parts)
    assert_equal_runs(parts / "run", expected)


@pytest.mark.parametrize(("good", "last"), [(3, 20), (3, 4), (7, 8), (8, 20)], ids=[
    "inside an epoch", "in the last step", "in the last step of an epoch", "after an epoch"])
def test_diverging_run_stops_and_keeps_its_last_finite_checkpoint(folder, good, last):
    run_folder = train_here(*TEXT, "--steps", good, cwd=folder)
    before = contents(run_folder)["last.safetensors"]
    result = run("train.py", "--resume", "--out", "run", "--steps", last, "--learning-rate", 1e39, cwd=folder)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("train.py: training diverged: ")
    assert "--learning-rate" in result.stderr and "Traceback" not in result.stderr
    assert (run_folder / "last.safetensors").read_bytes() == before
    train_here("--resume", "--steps", 9, cwd=folder)
    after = load_checkpoint(run_folder / "last.safetensors")
    assert after.resumable.progress["step"] == 9
    assert all(np.isfinite(array).all() for array in after.params.values())


def test_infinite_first_step_leaves_the_initial_checkpoint(folder):
    run_folder = train_here(*TEXT, "--learning-rate", 1e39, cwd=folder, status=1)
    start_of_run = load_checkpoint(run_folder / "last.safetensors")
    assert start_of_run.resumable.progress["step"] == 0
    assert all(np.isfinite(array).all() for array in start_of_run.params.values())


# Damaged files of a run

def stopped_run(folder: Path) -> Path:
    """A run that stopped inside its second epoch."""
    return stop_here(11, *FINISHED, cwd=folder)


@pytest.mark.parametrize(("name", "damage", "said"), [
    ("metrics.jsonl", lambda raw: raw[:-5], "the loss of step 11"),
    ("metrics.jsonl", lambda raw: raw[:raw.index(b'{"step": 9')], "the losses of 3 steps, from step 9 to step 11"),
    ("metrics.jsonl", lambda raw: b"",
     "lost the losses of 11 steps, from step 1 to step 11 and the evaluation of epoch 1, without which"),
    ("metrics.jsonl", lambda raw: None, "the losses of 11 steps"),
    ("metrics.jsonl", lambda raw: raw.replace(b'{"step": 3', b"\0" * 10), "the loss of step 3"),
    ("metrics.jsonl", lambda raw: raw.replace(b'{"step": 3', b'["step": 3'), "the loss of step 3"),
    ("metrics.jsonl", lambda raw: raw.replace(b'"loss": 3', b'"loss": [], "x": 3', 1), "from step 1 to step 11"),
    ("metrics.jsonl", lambda raw: raw.replace(b'{"epoch"', b'<"epoch"'), "the evaluation of epoch 1"),
    ("metrics.jsonl", lambda raw: raw.replace(b'{"step": 5', b"[" * 100_000 + b'{"step": 5'), "from step 5 to step 11"),
    ("samples.txt", lambda raw: raw[:-3], "samples"), ("samples.txt", lambda raw: None, "samples"),
    ("samples.txt", lambda raw: raw[:-20] + b"\0" * 20, "samples"),
    ("samples.txt", lambda raw: raw[:20] + b"\xff" + raw[21:], "samples"),
])
def test_file_that_lost_lines_is_repaired_and_said_and_the_run_goes_on(finished, folder, capfd, name, damage, said):
    run_folder = stopped_run(folder)
    raw, path = (run_folder / name).read_bytes(), run_folder / name
    damaged = damage(raw)
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    capfd.readouterr()
    stop_here(12, "--resume", cwd=folder)
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert name in line and said in line
    train_here("--resume", cwd=folder)
    assert not [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: ")]
    whole = (finished / name).read_bytes()
    kept = set(whole.splitlines())
    assert all(line in kept for line in path.read_bytes().splitlines())
    assert path.read_bytes().endswith(whole[len(raw):])
    for other in set(REPRODUCIBLE) - {name, "last.safetensors"}:
        assert (run_folder / other).read_bytes() == (finished / other).read_bytes()


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b'{"epochs": 3}', b'{"epochs": {}}',
                                     b'{"epochs": [3]}', b"\xff", b"",
                                     b"[" * 100_000, b'{"epochs": [' + b"[" * 100_000, None])
def test_unusable_timing_is_begun_anew_with_a_word(folder, capfd, content):
    run_folder = stopped_run(folder)
    (run_folder / "timing.json").unlink()
    if content is None:
        (run_folder / "timing.json").symlink_to("timing.json")
    else:
        (run_folder / "timing.json").write_bytes(content)
    capfd.readouterr()
    train_here("--resume", "--steps", 12, cwd=folder)
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert "timing.json" in line
    [timed] = json.loads((run_folder / "timing.json").read_text())["epochs"]
    assert timed["steps"] == 1


def forge(path: Path, **changes: object) -> None:
    """Change the progress of a checkpoint, or with ... leave a part of it out, and make its checksum right again."""
    checkpoint = load_checkpoint(path)
    progress = {**checkpoint.resumable.progress, **changes}
    kept = {name: value for name, value in progress.items() if value is not ...}
    save_checkpoint(path, replace(checkpoint, resumable=replace(checkpoint.resumable, progress=kept)))


@pytest.mark.parametrize(("name", "value"), [
    *[(name, value) for name in ("step", "epoch", "batch", "metrics_bytes", "samples_bytes", "epochs_without_best")
      for value in (..., math.nan, -1, -10**30, 1.5, 2.0, True, None, "3", [])],
    *[(name, value) for name in ("step", "epoch", "batch") for value in (0, 12, 10**6, 10**30)],
    *[(name, value) for name in ("evaluated_step", "best_step", "schedule_start")
      for value in (math.nan, -1, 1.5, None, 12, 10**30)],
    *[(name, value) for name in ("loss_sum", "best_loss") for value in (..., math.nan, math.inf, "3", [], 10**400)],
    ("loss_sum", None), ("text_sha256", ...), ("text_sha256", 3),
    *[("config", value) for value in (..., None, [], {}, "x")],
])
def test_checkpoint_with_impossible_progress_is_refused(stopped, tmp_path, capfd, name, value):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    forge(tmp_path / "run" / "last.safetensors", **{name: value})
    refused_here(tmp_path, capfd, "--resume", "--out", "run")


@pytest.mark.parametrize("progress", [{"evaluated_step": 0}, {"epoch": 10**15, "step": 8 * 10**15}], ids=str)
def test_checkpoint_of_an_epochs_end_without_its_evaluation_is_refused(folder, capfd, progress):
    run_folder = train_here(*TEXT, "--epochs", 1, cwd=folder)
    capfd.readouterr()
    forge(run_folder / "last.safetensors", **progress)
    assert "evaluated_step" in refused_here(folder, capfd, "--resume", "--out", "run", "--epochs", 10**18)


@pytest.mark.parametrize(("option", "value"), [
    ("epochs", 1e300), ("epochs", "3"), ("epochs", None), ("steps", 2.5), ("batch_size", 4.0), ("batch_size", 5),
    ("seq_length", True), ("seq_length", "5:1"), ("seq_length", [5]), ("learning_rate", "1"), ("stateful", 0),
    ("data", "text.txt"), ("data", [3]), ("data", None),
    ("init", "zeros"), ("lr_schedule", 3), ("encoding", None), ("rnn_units", 17), ("layers", 2), ("device", "tpu"),
])
def test_checkpoint_with_impossible_options_is_refused(stopped, tmp_path, capfd, option, value):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "run" / "last.safetensors"
    config = load_checkpoint(last).resumable.progress["config"]
    forge(last, config={**config, option: value})
    refused_here(tmp_path, capfd, "--resume", "--out", "run")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A folder with a text and a run that stopped inside its second epoch; copy it, do not change it."""
    folder = tmp_path_factory.mktemp("stopped")
    make_text(folder / "text.txt")
    stopped_run(folder)
    return folder


# The loss curve

def test_backend_of_a_notebook_does_not_keep_the_loss_curve_from_being_drawn(folder):
    run_folder = train(*TEXT, "--epochs", 1, cwd=folder, environ={"MPLBACKEND": "module://no_such_notebook.backend"})
    assert (run_folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_loss_curve_that_cannot_be_drawn_is_a_warning_and_costs_nothing(finished, folder, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run_folder = train_here(*FINISHED, cwd=folder)
    assert "loss.png" in capfd.readouterr().err
    assert not (run_folder / "loss.png").exists()
    assert_equal_runs(run_folder, finished)


# The end of a run

@pytest.mark.parametrize("steps", [8, 16, 24])
def test_run_killed_between_its_last_step_and_the_end_of_its_epoch_is_evaluated_when_it_resumes(
        tmp_path, monkeypatch, steps):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    for path in (whole, parts):
        path.mkdir()
        make_text(path / "text.txt")
    options = (*TEXT, "--epochs", 3, "--steps", steps)
    expected = train_here(*options, cwd=whole)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LanguageModel, "evaluate", killed_after(steps, LanguageModel.evaluate, Killed))
        train_here(*options, cwd=parts)
    assert load_checkpoint(parts / "run" / "last.safetensors").resumable.progress["step"] == steps
    train_here("--resume", cwd=parts)
    assert_equal_runs(parts / "run", expected)


def killed_after(steps: int, evaluate, error: type[BaseException]):
    """`LanguageModel.evaluate` that raises an error when the model has taken so many steps."""
    def evaluated(model, windows):
        if model.step == steps:
            raise error
        return evaluate(model, windows)

    return evaluated


# Bad input

def refused(folder: Path, *arguments: object) -> str:
    """Run a command that must be refused without leaving anything behind; returns its message."""
    before = sorted(folder.rglob("*"))
    result = run("train.py", *arguments, cwd=folder)
    assert_refused(result.returncode, result.stdout, result.stderr)
    assert sorted(folder.rglob("*")) == before
    return result.stderr


@pytest.mark.parametrize(("raw", "arguments", "parts"), [
    (None, (), ("cannot read bad.txt", "No such file")),
    (b"", (), ("bad.txt is empty",)),
    (bytes(10_000), (), ("bad.txt is binary",)),
    (b"abc" * 10, ("--val-fraction", 0), ("30 characters", "6,464", "--batch-size 64", "--seq-length 100")),
    (b"abc" * 10, ("--val-fraction", 0, "--stateful"), ("30 characters", "6,401")),
    (b"abc" * 3000, ("--val-fraction", 0.001), ("9 characters", "64 rows", "--val-fraction")),
    (b"abcd\xe9" * 3000, (), ("bad.txt is not utf-8", "0xe9", "offset 4", "--encoding")),
])
def test_bad_text_is_refused(tmp_path, capfd, raw, arguments, parts):
    if raw is not None:
        (tmp_path / "bad.txt").write_bytes(raw)
    said = refused_here(tmp_path, capfd, "--data", "bad.txt", "--out", "run", *arguments)
    assert all(part in said for part in parts), said


BAD_OPTIONS = [
    *[(option, value, "at least 1")
      for option in ("epochs", "steps", "batch-size", "seq-length", "embedding-dim", "rnn-units", "layers")
      for value in ("0", "-1")],
    *[(option, "-1", "at least 0") for option in ("warmup-steps", "patience", "save-every", "seed", "clip-norm")],
    *[("val-fraction", value, "in [0, 0.5]") for value in ("-0.01", "0.51", "1", "nan")],
    *[("dropout", value, "in [0, 1)") for value in ("-0.1", "1", "nan")],
    *[("learning-rate", value, "above 0") for value in ("0", "-1e-3", "nan", "inf")],
    ("clip-norm", "nan", "at least 0"), ("seed", str(2**63), "below 2^63"),
    ("steps", "abc", "--steps"), ("batch-size", "1.5", "--batch-size"), ("steps", "", "--steps"),
    ("init", "zeros", "--init"), ("device", "tpu", "--device"), ("precision", "fp8", "--precision"),
    ("precision", "bf16", "needs an NVIDIA GPU"), ("precision", "tf32", "needs an NVIDIA GPU"),
    ("rnn-unit", "16", "--rnn-unit"), ("encoding", "no-such", "no-such"),
]


@pytest.mark.parametrize(("option", "value", "part"), BAD_OPTIONS)
def test_bad_option_is_refused_with_its_name(folder, capfd, option, value, part):
    said = refused_here(folder, capfd, *TEXT, "--out", "run", f"--{option}", value)
    assert f"--{option}" in said and part in said


@pytest.mark.parametrize(("option", "value"), [
    ("--rnn-units", 10**7), ("--rnn-units", 10**10), ("--embedding-dim", 10**14)])
def test_model_that_fits_no_memory_is_refused(folder, capfd, option, value):
    assert "not enough memory" in refused_here(folder, capfd, *TEXT, "--out", "run", option, value)


@pytest.mark.parametrize("arguments", [("--no-such-option",), ("--steps", "abc"), ("stray",), ("--steps",)])
def test_bad_command_line_is_refused(folder, arguments):
    assert arguments[0] in refused(folder, *arguments)


@pytest.mark.parametrize(("arguments", "part"), [
    (("text.txt",), "did you mean --data text.txt?"), (("--steps", 3, "a.txt", "b.txt"), "--data a.txt b.txt?"),
    (("a b.txt", "c.txt"), "did you mean --data 'a b.txt' c.txt?"), (("--rnn", 16), "did you mean --rnn-units?"),
    (("--lr", 1e-3), "did you mean --learning-rate?"), (("-data", "a"), "did you mean --data?"),
    (("--learing-rate", 1e-3), "did you mean --learning-rate?"), (("--rnn_unit", 16), "did you mean --rnn-units?"),
    (("--data",), "--data has no value"), (("--data", "--steps", 3), "--data has no value before --steps"),
    (("--separator", "--out", "run"), "--separator has no value before --out"),
    ((*TEXT, "--out", ""), "--out is empty"), ((*TEXT, "--out="), "--out is empty"),
    (("--data", ""), "--data is empty"),
    (("--data", "/dev/zero"), "is no file, but a device"), ((*TEXT, "--separator", "\udcff"), "--separator is"),
    (("--data", "-", "-"), "only once"),
])
def test_mistaken_command_line_is_told_what_it_lacks(folder, capfd, arguments, part):
    assert part in refused_here(folder, capfd, *arguments)


def test_options_that_contradict_each_other_are_refused(folder, capfd):
    said = refused_here(folder, capfd, *TEXT, "--patience", 2, "--val-fraction", 0)
    assert "--patience" in said and "--val-fraction" in said


def test_cuda_without_cupy_is_refused_with_what_to_install(folder, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    said = refused_here(folder, capfd, *TEXT, "--device", "cuda", "--out", "run")
    assert "char-gru[cuda13]" in said and "--device cpu" in said


@pytest.mark.parametrize("raised", ["OSError(13, 'Permission denied', '/proc/x')", "ValueError('numpy.dtype')",
                                    "ImportError('libcuda.so.1')"])
def test_cupy_that_cannot_be_imported_leaves_the_cpu_with_a_word(folder, capfd, monkeypatch, raised):
    (folder / "broken").mkdir()
    (folder / "broken" / "cupy.py").write_text(f"raise {raised}")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(folder / "broken")
    said = refused_here(folder, capfd, *TEXT, "--device", "cuda", "--out", "run")
    assert "--device cuda: CuPy cannot be imported" in said and "--device cpu" in said
    run_folder = train_here(*TEXT, "--steps", 1, cwd=folder)
    assert capfd.readouterr().err.count("CuPy cannot be imported") == 1
    assert commands.generate([str(run_folder), "--length", "9"]) == 0
    assert capfd.readouterr().err.count("CuPy cannot be imported") == 1


def test_folder_of_another_run_is_refused(finished):
    before = contents(finished)
    assert "run holds another run" in refused(finished.parent, *TEXT, "--out", "run")
    assert contents(finished) == before


def test_out_that_is_a_file_is_refused(folder, capfd):
    assert "text.txt" in refused_here(folder, capfd, *TEXT, "--out", "text.txt")


@pytest.mark.parametrize(("arguments", "parts"), [
    (("--rnn-units", 32), ("--rnn-units is 32", "16")),
    (("--layers", 2), ("--layers is 2", "1")),
    (("--seq-length", 20), ("--seq-length is 20", "10")),
    (("--seed", 1), ("--seed is 1", "0")),
    (("--stateful",), ("--stateful is True", "False")),
    (("--bytes",), ("--bytes is True", "False", "train a new model")),
])
def test_resuming_with_what_fixes_the_run_changed_is_refused(finished, capfd, arguments, parts):
    before = contents(finished)
    said = refused_here(finished.parent, capfd, "--resume", "--out", "run", *arguments)
    assert all(part in said for part in parts), said
    assert contents(finished) == before


def test_resuming_with_a_changed_text_is_refused(folder, capfd):
    run_folder = train_here(*TEXT, "--steps", 2, cwd=folder)
    capfd.readouterr()
    before = contents(run_folder)
    make_text(folder / "text.txt", 401)
    assert "text.txt is not the one" in refused_here(folder, capfd, "--resume", "--out", "run")
    assert contents(run_folder) == before


def test_run_that_has_lost_its_last_checkpoint_is_told_what_to_do(finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "my run")
    (tmp_path / "my run" / "last.safetensors").unlink()
    said = refused_here(tmp_path, capfd, "--resume", "--out", "my run")
    assert "has lost its last.safetensors" in said and "--init-from 'my run/best.safetensors'" in said
    said = refused_here(finished.parent, capfd, *TEXT, "--out", tmp_path / "my run")
    assert "has lost its last.safetensors" in said and "--resume" not in said


def test_resuming_a_file_names_init_from(finished, capfd):
    best = finished / "best.safetensors"
    assert f"--init-from {best}" in refused_here(finished.parent, capfd, "--resume", "--out", best)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_file_that_grows_is_not_written_through_a_link(finished, folder, capfd, name):
    shutil.copytree(finished, folder / "run")
    (folder / "run" / name).rename(folder / "victim")
    (folder / "run" / name).symlink_to("../victim")
    before = (folder / "victim").read_bytes()
    with chdir(folder):
        assert commands.train(["--resume", "--out", "run", "--steps", "24"]) == 2
    assert f"run/{name} is a symbolic link" in capfd.readouterr().err.splitlines()[-1]
    assert (folder / "victim").read_bytes() == before


@pytest.mark.parametrize("saved", [False, True])
def test_failed_write_says_what_stands_only_where_something_was_saved(folder, capfd, monkeypatch, saved):
    write = training.save_checkpoint

    def failing(path, checkpoint):
        if not saved or path.name == "best.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, checkpoint)

    monkeypatch.setattr(training, "save_checkpoint", failing)
    with chdir(folder):
        assert commands.train([*TEXT, "--steps", "1", "--out", "run"]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert "No space left" in said and ("what was saved before still stands" in said) == saved


@pytest.mark.parametrize(("arguments", "part"), [((), "no run under runs"), (("--out", "none"), "none")])
def test_resuming_nothing_is_refused(tmp_path, capfd, arguments, part):
    assert part in refused_here(tmp_path, capfd, "--resume", *arguments)


def test_resuming_a_damaged_run_is_refused(tmp_path, capfd, finished):
    raw = (finished / "last.safetensors").read_bytes()
    altered = bytearray(raw)
    altered[-1] ^= 1
    (tmp_path / "run").mkdir()
    for content, part in ((raw[:-100], "cut short"), (bytes(altered), "altered"),
                          ((finished / "best.safetensors").read_bytes(), "--init-from run/last.safetensors")):
        (tmp_path / "run" / "last.safetensors").write_bytes(content)
        assert part in refused_here(tmp_path, capfd, "--resume", "--out", "run")


def test_gpu_that_fails_when_it_is_used_is_reported_in_one_line(folder, capfd, monkeypatch):
    """As CuPy does without CUDA's headers, at the first kernel that it compiles."""
    def unusable(device, precision):
        raise DeviceError("CuPy cannot compile for this GPU")

    monkeypatch.setattr(training, "op_set", unusable)
    assert "cannot compile for this GPU" in refused_here(folder, capfd, *TEXT, "--out", "run")


# Starting quickly

def test_command_line_starts_without_loading_what_it_may_not_need():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import char_gru.rnn.commands; print(*sys.modules)"
    result = run(code, ROOT, cwd=ROOT)
    loaded = set(result.stdout.split())
    assert "char_gru.rnn.commands" in loaded
    assert not loaded & {"matplotlib", "cupy", "numpy", "platformdirs", "requests", "safetensors",
                         "char_gru.rnn.training", "char_gru.rnn.model"}


def test_training_loads_no_plotting_and_no_gpu_library_before_it_needs_them():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import char_gru.rnn.training; print(*sys.modules)"
    loaded = set(run(code, ROOT, cwd=ROOT).stdout.split())
    assert "char_gru.rnn.training" in loaded
    assert not loaded & {"matplotlib", "cupy", "platformdirs", "requests"}


def test_help_names_every_option(tmp_path):
    result = run("train.py", "--help", cwd=tmp_path)
    assert result.returncode == 0
    options = ("data", "out", "rnn-units", "stateful", "no-graph", "resume")
    assert all(f"--{option}" in result.stdout for option in options)
    assert "None" not in result.stdout and "(default: )" not in result.stdout
