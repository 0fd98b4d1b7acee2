"""The plan of a run through `train.py`: when it is evaluated, what ends it, and how its learning rate goes."""

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest

from char_gru.rnn import commands, schedule, training
from char_gru.rnn.checkpoint import load_checkpoint
from char_gru.rnn.config import TrainConfig
from tests.helpers.commands import STEPS_PER_EPOCH, TINY, assert_equal_runs, contents, make_text, stop_here, train_here

TEXT = ("--data", "text.txt", *TINY)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a text of STEPS_PER_EPOCH batches."""
    make_text(tmp_path / "text.txt")
    return tmp_path


@pytest.fixture(autouse=True)
def drawings(monkeypatch) -> list[list[dict]]:
    """The lines of each picture that was drawn; drawing them takes longer than training."""
    drawn: list[list[dict]] = []
    monkeypatch.setattr(training, "picture_of_losses", lambda lines, steps_of, unit: drawn.append(lines) or b"picture")
    return drawn


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations(run: Path) -> list[tuple]:
    """Epoch and step of each evaluation, None for the step at an epoch's end."""
    return [(line["epoch"], line.get("step")) for line in metrics(run) if "train_loss" in line]


# Evaluation

def test_eval_every_evaluates_samples_and_draws_inside_epochs(folder, capfd, drawings):
    run = train_here(*TEXT, "--epochs", 2, "--eval-every", 3, cwd=folder)
    places = [(1, 3), (1, 6), (1, None), (2, 9), (2, 12), (2, 15), (2, None)]
    assert evaluations(run) == places and len(drawings) == len(places)
    names = [f"epoch {epoch}" if step is None else f"epoch {epoch}, step {step}" for epoch, step in places]
    samples = (run / "samples.txt").read_text()
    assert [line[4:] for line in samples.splitlines() if line.startswith("--- ")] == names
    said = capfd.readouterr().err
    assert all(f"{name}: training loss " in said for name in names)
    lines = metrics(run)
    for line in lines:
        if "train_loss" in line:
            losses = [step["loss"] for step in lines if "loss" in step and step["epoch"] == line["epoch"]
                      and step["step"] <= line.get("step", math.inf)]
            assert line["train_loss"] == pytest.approx(np.mean(losses), rel=1e-12)


@pytest.mark.parametrize("options", [("--stateful",), ("--layers", 2, "--dropout", 0.3)], ids=["stateful", "dropout"])
def test_evaluation_inside_an_epoch_does_not_change_the_training(tmp_path, options):
    runs = []
    for name, every in (("plain", 0), ("often", 1)):
        (tmp_path / name).mkdir()
        make_text(tmp_path / name / "text.txt")
        runs.append(train_here(*TEXT, *options, "--epochs", 2, "--eval-every", every, cwd=tmp_path / name))
    plain, often = ([line for line in metrics(run) if "loss" in line] for run in runs)
    assert plain == often
    plain, often = (load_checkpoint(run / "last.safetensors") for run in runs)
    for part in ("params", "m", "v"):
        arrays, expected = (getattr(checkpoint if part == "params" else checkpoint.resumable, part)
                            for checkpoint in (often, plain))
        assert all(np.array_equal(arrays[name], expected[name]) for name in expected), part
    assert np.array_equal(plain.resumable.state, often.resumable.state)


def test_long_epoch_is_evaluated_in_equal_parts(folder, monkeypatch):
    monkeypatch.setattr(schedule, "MOST_STEPS_UNEVALUATED", 3)
    assert evaluations(train_here(*TEXT, "--epochs", 2, cwd=folder)) == [
        (1, 3), (1, 6), (1, None), (2, 11), (2, 14), (2, None)]


@pytest.mark.parametrize(("steps", "every"), [(29608, 4935), (5001, 2501), (5000, 5000), (172, 172)])
def test_evaluation_is_never_rarer_than_every_few_thousand_steps(steps, every):
    evaluated = [batch for batch in range(1, steps + 1)
                 if schedule.is_evaluated(TrainConfig(), 7 * steps + batch, batch, steps)]
    assert evaluated == [*range(every, steps, every), steps]


def test_end_inside_an_epoch_is_evaluated(folder, capfd, drawings):
    run = train_here(*TEXT, "--steps", 3, cwd=folder)
    assert evaluations(run) == [(1, 3)]
    assert len(drawings) == 1 and (run / "loss.png").exists()
    assert {"best.safetensors", "samples.txt"} <= {path.name for path in run.iterdir()}
    assert "epoch 1, step 3: training loss" in capfd.readouterr().err


def test_best_of_an_evaluation_inside_an_epoch_is_kept(folder):
    """With a rate that is far too high, later evaluations are worse."""
    run = train_here(*TEXT, "--epochs", 2, "--eval-every", 1, "--learning-rate", 0.5, cwd=folder)
    lines = [line for line in metrics(run) if "train_loss" in line]
    best = min(lines, key=lambda line: line["val_loss"])
    assert "step" in best
    (folder / "again").mkdir()
    make_text(folder / "again" / "text.txt")
    again = train_here(*TEXT, "--steps", best["step"], "--learning-rate", 0.5, cwd=folder / "again")
    expected = load_checkpoint(again / "last.safetensors").params
    params = load_checkpoint(run / "best.safetensors").params
    assert all(np.array_equal(params[name], expected[name]) for name in expected)


def test_patience_counts_epochs_with_evaluations_inside_them(folder):
    """The first evaluation of a rate of nothing is the best one, so that two epochs follow that of the best."""
    run = train_here(*TEXT, "--epochs", 9, "--patience", 2, "--eval-every", 3, "--learning-rate", 1e-30, cwd=folder)
    assert evaluations(run)[-1] == (3, None)


@pytest.mark.parametrize("stops", [(3,), (4, 6), (8, 9), (20,)], ids=str)
def test_stopped_run_with_evaluations_resumes_to_the_same_end(tmp_path, stops):
    """Also where the signal came between a step and its evaluation, which is then made by the next process."""
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    for path in (whole, parts):
        path.mkdir()
        make_text(path / "text.txt")
    options = (*TEXT, "--steps", 20, "--eval-every", 3, "--stateful", "--patience", 3)
    expected = train_here(*options, cwd=whole)
    run = stop_here(stops[0], *options, cwd=parts)
    for stop in stops[1:]:
        stop_here(stop, "--resume", cwd=parts)
    progress = load_checkpoint(run / "last.safetensors").resumable.progress
    assert progress["step"] == stops[-1] and progress["evaluated_step"] < stops[-1]
    train_here("--resume", cwd=parts)
    assert_equal_runs(run, expected)


def test_run_killed_between_its_last_step_and_its_evaluation_is_evaluated(folder, monkeypatch):
    """As if `kill -9` came after a save that the clock asked for."""
    class Killed(BaseException):
        pass

    def killed(self) -> None:
        self._save()
        raise Killed

    options = (*TEXT, "--epochs", 2)
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "_evaluate", killed)
        with pytest.raises(Killed):
            train_here(*options, cwd=folder)
        assert load_checkpoint(folder / "run" / "last.safetensors").resumable.progress["batch"] == STEPS_PER_EPOCH
    run = train_here("--resume", cwd=folder)
    (folder / "whole").mkdir()
    make_text(folder / "whole" / "text.txt")
    assert_equal_runs(run, train_here(*options, cwd=folder / "whole"))


def test_run_saved_before_evaluations_were_noted_is_resumed(folder, monkeypatch):
    """Its progress says nothing of evaluations and of the schedule's beginning."""
    checkpoint_of = training.Run._checkpoint

    def older(self, resumable):
        checkpoint = checkpoint_of(self, resumable)
        if resumable:
            for name in ("best_step", "evaluated_step", "schedule_start"):
                del checkpoint.resumable.progress[name]
            for name in ("eval_every", "init_from"):
                del checkpoint.resumable.progress["config"][name]
        return checkpoint

    options = (*TEXT, "--epochs", 2)
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "_checkpoint", older)
        stop_here(9, *options, cwd=folder)
    run = train_here("--resume", cwd=folder)
    (folder / "whole").mkdir()
    make_text(folder / "whole" / "text.txt")
    assert_equal_runs(run, train_here(*options, cwd=folder / "whole"))


def test_signal_ends_an_evaluation_which_the_resumed_run_makes(folder, monkeypatch):
    evaluate, read = training.LanguageModel.evaluate, []

    def interrupted(self, windows):
        def noted():
            for window in windows:
                read.append(window)
                if len(read) == 2:
                    signal.raise_signal(signal.SIGINT)
                yield window

        return evaluate(self, noted())

    options = (*TEXT, "--epochs", 1, "--val-fraction", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(training.LanguageModel, "evaluate", interrupted)
        run = train_here(*options, cwd=folder, status=130)
    assert len(read) == 2 and evaluations(run) == [] and not (run / "best.safetensors").exists()
    train_here("--resume", cwd=folder)
    (folder / "whole").mkdir()
    make_text(folder / "whole" / "text.txt")
    assert_equal_runs(run, train_here(*options, cwd=folder / "whole"))


# What ends a run

def test_steps_alone_decide(folder, capfd):
    run = train_here(*TEXT, "--epochs", 1, "--steps", 3 * STEPS_PER_EPOCH + 1, cwd=folder)
    assert metrics(run)[-1] == {**metrics(run)[-1], "epoch": 4, "step": 25}
    assert "the run has ended: --steps 25 are done" in capfd.readouterr().err


@pytest.mark.parametrize(("options", "said"), [
    (("--epochs", 2), "the run has ended: --epochs 2 are done"),
    (("--epochs", 9, "--patience", 1, "--learning-rate", 1e-30), "the run has ended: --patience 1"),
])
def test_what_ends_a_run_is_said(folder, capfd, options, said):
    run = train_here(*TEXT, *options, cwd=folder)
    assert said in capfd.readouterr().err
    before = contents(run)
    train_here("--resume", cwd=folder)
    again = capfd.readouterr().err
    reason = said.partition(": ")[2]
    assert f"nothing left to do: {reason}" in again and f"to go on, give a larger {reason.split()[0]}" in again
    assert contents(run) == before


def test_epochs_given_to_a_resumed_run_replace_its_steps(folder, capfd):
    train_here(*TEXT, "--steps", 3, cwd=folder)
    train_here("--resume", cwd=folder)
    assert "nothing left to do: --steps 3 are done; to go on, give a larger --steps" in capfd.readouterr().err
    run = train_here("--resume", "--epochs", 2, cwd=folder)
    assert "the run has ended: --epochs 2 are done" in capfd.readouterr().err
    assert evaluations(run) == [(1, 3), (1, None), (2, None)]


# Sequences whose length changes

@pytest.mark.parametrize(("seq_length", "stages"), [
    (100, [(100, None)]), ("7", [(7, None)]), ("50:10,200:20,400", [(50, 10), (200, 20), (400, None)])])
def test_lengths_and_their_epochs_are_told_by_one_option(seq_length, stages):
    assert [*TrainConfig(seq_length=seq_length).stages] == stages


def test_epochs_of_a_curriculum_have_the_steps_of_their_stage():
    curriculum = schedule.Curriculum([schedule.Stage(9, 2), schedule.Stage(3, 1), schedule.Stage(5)], [7, 20, 11])
    stages = [0, 0, 1, 2, 2, 2]
    assert [curriculum.stage_of(epoch) for epoch in range(6)] == stages
    assert [curriculum.steps_before(epoch) for epoch in range(7)] == [0, 7, 14, 34, 45, 56, 67]
    assert schedule.total_steps(TrainConfig(epochs=4), curriculum) == 45
    assert schedule.total_steps(TrainConfig(epochs=4, steps=3), curriculum) == 3


def test_cosine_runs_over_all_lengths(folder, rates):
    options = ("--seq-length", "5:1,20", "--epochs", 3, "--lr-schedule", "cosine", "--warmup-steps", 2)
    train_here(*TEXT, *options, cwd=folder)
    config = TrainConfig(lr_schedule="cosine", warmup_steps=2)
    assert rates == [schedule.learning_rate(config, step, 15 + 4 + 4) for step in range(23)]


def test_losses_of_validation_are_drawn_at_the_steps_where_epochs_end(folder, monkeypatch):
    ends = []
    monkeypatch.setattr(training, "picture_of_losses", lambda lines, steps_of, unit: ends.append(
        [steps_of(epoch) for epoch in (1, 2, 3)]) or b"picture")
    train_here(*TEXT, "--seq-length", "5:1,20", "--epochs", 1, cwd=folder)
    assert ends == [[15, 19, 23]]


@pytest.mark.parametrize(("options", "reached"), [
    (("--epochs", 1), False), (("--steps", 15), False), (("--epochs", 2), True), (("--steps", 16), True)])
def test_length_that_the_run_does_not_reach_is_told(folder, capfd, options, reached):
    train_here(*TEXT, "--seq-length", "5:1,20", *options, cwd=folder)
    said = "train.py: --seq-length 5:1,20 has sequences of 20 from epoch 2 on, but the run ends before it"
    assert (said in capfd.readouterr().err) != reached


# The learning rate

COSINE = ("--lr-schedule", "cosine", "--epochs", 2, "--learning-rate", "1e-2")


@pytest.fixture
def rates(monkeypatch) -> list[float]:
    """The learning rate of each step that is trained."""
    noted: list[float] = []
    train_step = training.LanguageModel.train_step

    def noting(self, inputs, targets, learning_rate):
        noted.append(learning_rate)
        return train_step(self, inputs, targets, learning_rate)

    monkeypatch.setattr(training.LanguageModel, "train_step", noting)
    return noted


def test_cosine_falls_from_its_peak_to_a_tenth_after_the_warm_up():
    config = TrainConfig(lr_schedule="cosine", learning_rate=2.0, warmup_steps=4)
    rates = [schedule.learning_rate(config, step, 24) for step in range(25)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[14] == pytest.approx(1.1) and rates[24] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert [schedule.learning_rate(config, step, 34, start=10) for step in range(10, 35)] == rates


def test_cosine_that_jumps_when_it_is_resumed_is_said_before_the_first_step(folder, capfd, rates):
    train_here(*TEXT, *COSINE, cwd=folder)
    capfd.readouterr()
    train_here("--resume", "--epochs", 4, cwd=folder)
    said = capfd.readouterr().err
    assert rates[16] == pytest.approx(5.5e-3)
    remark = "the learning rate of step 17 is 0.0055; with the options before it would be 0.001; "
    assert remark in said and "give --lr-schedule cosine" in said
    assert said.index(remark) < said.index("epoch 3:")


def test_lr_schedule_begins_anew_where_a_longer_run_is_resumed_with_it(tmp_path, capfd, rates):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        make_text(tmp_path / name / "text.txt")
        train_here(*TEXT, *COSINE, cwd=tmp_path / name)
    more = ("--resume", "--epochs", 4, "--lr-schedule", "cosine")
    capfd.readouterr()
    del rates[:]
    train_here(*more, cwd=tmp_path / "whole")
    assert "--lr-schedule cosine begins anew at step 17, with learning rate 0.01" in capfd.readouterr().err
    assert rates[0] == 1e-2 and rates[-1] < 1.2e-3
    stop_here(20, *more, cwd=tmp_path / "stopped")
    stop_here(25, *more, cwd=tmp_path / "stopped")  # the same command line goes on, and does not begin anew again
    train_here("--resume", cwd=tmp_path / "stopped")
    assert_equal_runs(tmp_path / "stopped" / "run", tmp_path / "whole" / "run")
    assert "learning rate" not in capfd.readouterr().err.split("begins anew", 1)[1].split("\n", 1)[1]


@pytest.mark.parametrize(("option", "value"), [("learning_rate", 1e-4), ("warmup_steps", 2)])
def test_changed_rate_or_warm_up_begins_anew_where_the_schedule_is_given(folder, capfd, rates, option, value):
    stop_here(9, *TEXT, *COSINE, cwd=folder)
    capfd.readouterr()
    del rates[:]
    again = ("--resume", "--" + option.replace("_", "-"), value, "--lr-schedule", "cosine")
    stop_here(12, *again, cwd=folder)
    said = capfd.readouterr().err
    assert "--lr-schedule cosine begins anew at step 10" in said and "would be" not in said
    train_here(*again, cwd=folder)  # the same command line goes on, and does not begin anew again
    assert "learning rate" not in capfd.readouterr().err
    config = TrainConfig(**{"lr_schedule": "cosine", "learning_rate": 1e-2, option: value})
    assert rates == [schedule.learning_rate(config, step, 16, start=9) for step in range(9, 16)]


def test_advice_to_begin_the_schedule_anew_may_be_followed_after_stopping(folder, capfd, rates):
    stop_here(5, *TEXT, *COSINE, cwd=folder)
    stop_here(6, "--resume", "--learning-rate", "1e-4", cwd=folder)
    assert "give --lr-schedule cosine as well" in capfd.readouterr().err
    again = ("--resume", "--learning-rate", "1e-4", "--lr-schedule", "cosine")
    stop_here(8, *again, cwd=folder)
    assert "begins anew at step 7" in capfd.readouterr().err
    stop_here(9, *again, cwd=folder)
    train_here("--resume", cwd=folder)
    assert "learning rate" not in capfd.readouterr().err
    config = TrainConfig(lr_schedule="cosine", learning_rate=1e-4)
    assert rates[6:] == [schedule.learning_rate(config, step, 16, start=6) for step in range(6, 16)]


def test_new_rate_without_the_schedule_is_said_with_advice_only_where_it_helps(folder, capfd):
    for name, options in (("constant", ()), ("cosine", ("--lr-schedule", "cosine"))):
        (folder / name).mkdir()
        make_text(folder / name / "text.txt")
        stop_here(4, *TEXT, "--epochs", 2, *options, cwd=folder / name)
        capfd.readouterr()
        train_here("--resume", "--learning-rate", "1e-4", cwd=folder / name)
        [line] = [line for line in capfd.readouterr().err.splitlines() if "the learning rate of step 5 is" in line]
        assert ("begin the schedule anew" in line) == (name == "cosine"), line
        assert line.endswith("with 0.0001, give --lr-schedule cosine as well" if options else "would be 0.001")


def test_resuming_with_nothing_changed_says_nothing_about_the_rate(folder, capfd):
    stop_here(9, *TEXT, *COSINE, cwd=folder)
    capfd.readouterr()
    train_here("--resume", *TEXT, *COSINE, cwd=folder)
    assert "learning rate" not in capfd.readouterr().err


def test_warm_up_as_long_as_the_run_is_said(folder, capfd):
    train_here(*TEXT, "--steps", 4, "--warmup-steps", 8, "--learning-rate", 1, cwd=folder)
    assert ("--warmup-steps 8 takes the whole run of 4 steps: the learning rate only rises, from 0.125 to 0.5"
            in capfd.readouterr().err)


def test_bad_eval_every_is_refused(folder, capfd):
    assert commands.train([*TEXT, "--eval-every", "-1"]) == 2
    assert "--eval-every is -1, but must be at least 0" in capfd.readouterr().err
