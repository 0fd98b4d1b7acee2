"""`train.py` with the weights of an earlier run, --init-from, and --resume where its text lies elsewhere."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from char_gru.rnn.checkpoint import load_checkpoint
from char_gru.rnn.sampler import Generator
from char_gru.rnn.vocabulary import Vocabulary
from tests.helpers.commands import (
    TINY,
    assert_equal_runs,
    contents,
    make_text,
    refused_here,
    stop_here,
    train_here,
)

FREE = ("--batch-size", 3, "--seq-length", 7)
"""Sizes that another text is learnt with."""
NEW = "ÄÖ€"
"""Characters that the first text lacks; some of them sort before ones that it has."""


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A folder with a text and a run of it; read it, do not change it."""
    folder = tmp_path_factory.mktemp("first")
    make_text(folder / "text.txt")
    train_here("--data", "text.txt", *TINY, "--layers", 2, "--epochs", 2, "--learning-rate", "1e-2", cwd=folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a text of mostly other words, and of new characters."""
    (tmp_path / "new.txt").write_text((f"the {NEW} box, " * 40), encoding="utf-8")
    return tmp_path


def tune(source: Path, folder: Path, *options, **expected) -> Path:
    return train_here("--init-from", source, "--data", "new.txt", *FREE, *options, cwd=folder, **expected)


def initial(run: Path):
    """The checkpoint before the first step of a run that was stopped in it."""
    return load_checkpoint(run / "last.safetensors")


# --init-from

def test_weights_come_from_the_checkpoint_and_new_characters_get_rows_of_their_own(first, folder, capfd):
    tune(first / "run", folder, "--learning-rate", "1e39", status=1)  # diverges, and so keeps what it began with
    said = capfd.readouterr().err
    old, new = load_checkpoint(first / "run" / "best.safetensors"), initial(folder / "run")
    known, V = old.vocabulary.characters, old.sizes.V
    added = "".join(sorted(set((folder / "new.txt").read_text(encoding="utf-8")) - set(known)))
    assert set(NEW) < set(added)
    assert new.vocabulary.characters == known + added
    assert f"the model gets {len(added)} new characters: {' '.join(map(repr, added))}" in said
    assert (new.sizes.E, new.sizes.H, new.sizes.layers) == (old.sizes.E, old.sizes.H, old.sizes.layers)
    for name, array in old.params.items():
        assert np.array_equal(new.params[name][:len(array)], array), name
    for name in ("W_emb", "W_out"):
        rows = new.params[name][V:]
        assert len(rows) == len(added) and np.abs(rows).min(axis=1).all(), name
        assert len(np.unique(rows, axis=0)) == len(rows)
    saved = new.resumable
    assert saved.progress["step"] == 0 and not any(array.any() for array in (*saved.m.values(), *saved.v.values()))


def test_loss_before_the_first_step_is_that_of_the_checkpoint(first, folder, capfd):
    shutil.copy(first / "text.txt", folder / "new.txt")
    tune(first / "run", folder, "--steps", 1, "--val-fraction", 0)
    said = capfd.readouterr().err
    loss = float(said.split(f"loss of {first / 'run'} ")[1].split(",")[0])
    assert loss < 0.8 * math.log(load_checkpoint(first / "run" / "best.safetensors").sizes.V)
    assert "new characters" not in said


def test_grown_model_is_fine_tuned_again_on_a_larger_text(first, folder):
    once = shutil.move(tune(first / "run", folder, "--epochs", 1), folder / "once")
    larger = (first / "text.txt").read_text() * 3 + (folder / "new.txt").read_text() + "ñ→" * 50
    (folder / "new.txt").write_text(larger, encoding="utf-8")
    run = tune(Path("once", "last.safetensors"), folder, "--epochs", 1, "--lr-schedule", "cosine", "--stateful")
    characters = [load_checkpoint(path / "best.safetensors").vocabulary.characters
                  for path in (first / "run", once, run)]
    assert characters[1].startswith(characters[0]) and characters[2] == characters[1] + "ñ→"
    generator = Generator.load(run)
    [text] = generator.generate(["ñ→Ä the"], length=30, seed=1)
    assert len(text) == 30 and generator.score("the Ä").characters == 4


def test_equal_fine_tunings_give_equal_bytes_and_resume_without_their_source(first, folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    shutil.copy(folder / "new.txt", other)
    source = shutil.copytree(first / "run", folder / "source")
    shutil.copytree(source, other / "source")
    expected = tune(Path("source"), folder, "--epochs", 2)
    run = stop_here(5, "--init-from", "source", "--data", "new.txt", *FREE, "--epochs", 2, cwd=other)
    shutil.rmtree(other / "source")
    train_here("--resume", cwd=other)
    assert_equal_runs(run, expected)


def test_options_of_a_fine_tuning_may_be_given_again_when_it_resumes(first, folder):
    stop_here(5, "--init-from", first / "run", "--data", "new.txt", *FREE, "--epochs", 1, cwd=folder)
    tune(first / "run", folder, "--epochs", 1, "--resume")


@pytest.mark.parametrize(("option", "value", "wanted"), [
    ("--rnn-units", 32, 16), ("--embedding-dim", 16, 8), ("--layers", 1, 2)])
def test_another_size_than_the_checkpoints_is_refused(first, folder, capfd, option, value, wanted):
    said = refused_here(folder, capfd, "--init-from", first / "run", "--data", "new.txt", *FREE, option, value)
    assert f"{option} is {value}, but the model of --init-from {first / 'run'} has {wanted}" in said


def test_size_of_the_checkpoint_may_be_given(first, folder):
    tune(first / "run", folder, "--steps", 1, "--rnn-units", 16, "--layers", 2)


def test_model_of_bytes_learns_other_bytes_and_no_text_and_the_reverse(first, folder, capfd):
    source = train_here("--data", "new.txt", "--bytes", *TINY, "--steps", 1, cwd=folder).rename(folder / "source")
    capfd.readouterr()
    said = refused_here(folder, capfd, "--init-from", "source", "--data", "new.txt", *FREE)
    assert "the model of --init-from source has learnt bytes; give --bytes as well" in said
    said = refused_here(folder, capfd, "--init-from", first / "run", "--data", "new.txt", *FREE, "--bytes")
    assert "has learnt characters; leave --bytes out" in said
    known = load_checkpoint(source / "best.safetensors").vocabulary.characters
    (folder / "new.txt").write_bytes(b"\xff\0" * 60)
    run = tune(source, folder, "--bytes", "--steps", 1)
    assert r"the model gets 2 new bytes: b'\x00' b'\xff'" in capfd.readouterr().err
    assert load_checkpoint(run / "last.safetensors").vocabulary == Vocabulary(known + "\0\xff", of_bytes=True)


@pytest.mark.parametrize("source", ["none", "new.txt", "."])
def test_init_from_what_is_no_checkpoint_is_refused(folder, capfd, source):
    assert source in refused_here(folder, capfd, "--init-from", source, "--data", "new.txt", *FREE)


def test_run_folder_of_the_weights_is_not_overwritten(first, folder, capfd):
    before = contents(first / "run")
    said = refused_here(first, capfd, "--init-from", "run", "--data", "text.txt", *FREE, "--out", "run")
    assert "run holds another run" in said and contents(first / "run") == before


# --resume

def test_resuming_with_another_checkpoint_to_begin_from_is_refused(first, capfd):
    said = refused_here(first, capfd, "--resume", "--out", "run", "--init-from", "run")
    assert "--init-from starts a new run" in said and "--resume continues" in said


@pytest.mark.parametrize(("option", "value"), [("--batch-size", 3), ("--seq-length", 7)])
def test_refusal_of_a_changed_size_names_init_from(first, capfd, option, value):
    said = refused_here(first, capfd, "--resume", "--out", "run", option, value)
    assert f"{option} is {value}" in said and "--init-from run" in said


@pytest.mark.parametrize("option", ["--rnn-units", "--embedding-dim", "--layers"])
def test_refusal_of_a_changed_model_does_not_name_init_from_which_refuses_it_too(first, capfd, option):
    said = refused_here(first, capfd, "--resume", "--out", "run", option, 32)
    assert f"{option} is 32" in said and "train a new model" in said and "--init-from" not in said


def test_commands_in_messages_quote_a_path_with_spaces(first, tmp_path, capfd):
    shutil.copy(first / "text.txt", tmp_path)
    shutil.copytree(first / "run", tmp_path / "my run")
    assert "with --init-from 'my run'" in refused_here(tmp_path, capfd, "--resume", "--out", "my run", "--seed", 3)
    last = load_checkpoint(tmp_path / "my run" / "last.safetensors").resumable.progress["step"]
    stop_here(last + 1, "--resume", "--epochs", 3, "--out", "my run", cwd=tmp_path)
    assert "continue with --resume --out 'my run'" in capfd.readouterr().err
    train_here("--resume", "--out", "my run", cwd=tmp_path)
    assert "python generate.py 'my run'" in capfd.readouterr().err


def test_run_resumes_elsewhere_with_the_same_text_under_another_name(first, tmp_path, capfd):
    shutil.copytree(first / "run", tmp_path / "run")
    said = refused_here(tmp_path, capfd, "--resume", "--out", "run", "--epochs", 3)
    assert "cannot read text.txt" in said and "give --data the place where it is now" in said
    (tmp_path / "other").mkdir()
    shutil.copy(first / "text.txt", tmp_path / "other" / "name.txt")
    run = train_here("--resume", "--epochs", 3, "--data", "other/name.txt", cwd=tmp_path)
    assert json.loads((run / "config.json").read_text())["data"] == ["other/name.txt"]
    train_here("--resume", "--epochs", 4, cwd=tmp_path)


def test_another_text_is_refused_with_what_to_do(first, folder, capfd):
    shutil.copytree(first / "run", folder / "run")
    said = refused_here(folder, capfd, "--resume", "--out", "run", "--data", "new.txt")
    assert "the text of new.txt is not the one that run was trained on" in said
    assert "--data" in said and "--init-from run" in said


def test_vocabulary_of_a_fine_tuned_checkpoint_is_read_as_it_was_written(first, folder):
    run = tune(first / "run", folder, "--steps", 2)
    checkpoint = load_checkpoint(run / "last.safetensors")
    characters = checkpoint.vocabulary.characters
    assert list(characters) != sorted(characters)
    assert checkpoint.vocabulary == Vocabulary(characters)
