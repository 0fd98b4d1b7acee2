"""`generate.py` as its users run it: its output, when two texts are equal, and the input that it refuses."""

import contextlib
import gzip
import json
import math
import os
import shutil
import signal
import time
from contextlib import chdir
from pathlib import Path

import pytest

from char_gru.rnn import commands, texts
from char_gru.rnn.sampler import Generator
from tests.helpers.commands import DEADLINE, TINY, assert_refused, make_text, run, running, train, train_here

RULE = "\n----------\n"
"""What stands between two texts."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a trained run called `run`; read it, do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    make_text(folder / "text.txt")
    train("--data", "text.txt", *TINY, "--steps", 16, cwd=folder)
    return folder


@pytest.fixture
def write(folder, capfd):
    """Calls the command in this process on that run and gives its text on stdout."""
    def written(*arguments: object) -> str:
        with chdir(folder):
            assert commands.generate(["run", *map(str, arguments)]) == 0
        return capfd.readouterr().out

    return written


@pytest.fixture
def refused(folder, capfd):
    """Calls the command in this process, which must refuse, and gives its message."""
    def said(*arguments: object) -> str:
        with chdir(folder):
            status = commands.generate(list(map(str, arguments)))
        stdout, stderr = capfd.readouterr()
        assert_refused(status, stdout, stderr)
        return stderr

    return said


# What is written

def test_prompt_and_as_many_characters_as_asked_for_go_to_stdout(folder):
    result = run("generate.py", "run", "--prompt", "the fox", "--length", 77, "--seed", 3, cwd=folder)
    assert result.returncode == 0
    assert result.stdout.startswith("the fox") and result.stdout.endswith("\n")
    assert len(result.stdout) == len("the fox") + 77 + 1
    assert result.stderr == ""


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_shorter_text_is_the_beginning_of_a_longer_one(write, length):
    longest = write("--prompt", "a ", "--length", 120, "--seed", 5)
    assert write("--prompt", "a ", "--length", length, "--seed", 5) == longest[:2 + length] + "\n"


def test_same_seed_writes_the_same_text_and_another_seed_another(write):
    assert write("--length", 100, "--seed", 3) == write("--length", 100, "--seed", 3)
    assert write("--length", 100, "--seed", 3) != write("--length", 100, "--seed", 4)


def test_seed_that_was_not_given_is_told_on_stderr_and_writes_the_text_again(folder, capfd):
    with chdir(folder):
        assert commands.generate(["run", "--length", "50"]) == 0
        first, said = capfd.readouterr()
        assert commands.generate(["run", "--length", "50"]) == 0
        assert capfd.readouterr().out != first
        assert commands.generate(["run", "--length", "50", *said.split()]) == 0
    assert said.startswith("--seed ") and len(said.splitlines()) == 1
    assert capfd.readouterr() == (first, "")


@pytest.mark.parametrize("prompt", ["the ", "the dög 🦊\n", "- ", "--lengths", "\ta"], ids=ascii)
def test_prompt_from_stdin_and_from_a_file_are_as_one_on_the_command_line(folder, write, tmp_path, prompt):
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    options = ("--length", 20, "--seed", 1, "--on-unknown", "unk")
    expected = write("--prompt", prompt, *options)
    assert expected.startswith(prompt) and len(expected) == len(prompt) + 21
    assert write("--prompt-file", tmp_path / "prompt.txt", *options) == expected
    piped = run("generate.py", "run", "--prompt", "-", *options, cwd=folder, stdin=prompt.encode())
    assert piped.stdout == expected


def test_empty_prompt_starts_at_the_beginning_of_a_line(write):
    lone, line = (write("--prompt", prompt, "--length", 40, "--seed", 2) for prompt in ("", "\n"))
    assert "\n" + lone == line
    assert write("--length", 40, "--seed", 2) == lone


def test_empty_prompt_starts_after_the_separator_of_a_text_without_lines(tmp_path, capfd):
    (tmp_path / "names.txt").write_text("anna;bo;cleo;dora;emil;" * 20, "utf-8")
    with chdir(tmp_path):
        assert commands.train(["--data", "names.txt", "--out", "names", *TINY, "--steps", "8"]) == 0
        texts = []
        for prompt in ("", ";"):
            capfd.readouterr()
            assert commands.generate(["names", "--prompt", prompt, "--length", "40", "--seed", "2"]) == 0
            texts.append(capfd.readouterr().out)
        assert ";" + texts[0] == texts[1]


def test_texts_of_several_prompts_and_samples_follow_in_order(folder, write, tmp_path):
    (tmp_path / "prompt.txt").write_text("lazy", "utf-8")
    written = write("--prompt", "the fox", "--prompt-file", tmp_path / "prompt.txt", "--prompt", "a",
                    "--num-samples", 2, "--length", 40, "--seed", 1)
    texts = written.removesuffix("\n").split(RULE)
    prompts = ["the fox", "the fox", "a", "a", "lazy", "lazy"]
    assert [text[:len(prompt)] for text, prompt in zip(texts, prompts, strict=True)] == prompts
    assert [len(text) for text in texts] == [len(prompt) + 40 for prompt in prompts]
    assert len(set(texts)) == 6


def test_text_ends_with_the_first_stop_string(write):
    longest = write("--length", 200, "--seed", 1).removesuffix("\n")
    for start in (0, 30, 31, 32, 90):
        stop = longest[start:start + 3]
        assert write("--length", 200, "--seed", 1, "--stop", stop) == longest[:longest.index(stop) + 3] + "\n"
    first, second = longest[40:43], longest[60:63]
    end = min(longest.index(first), longest.index(second)) + 3
    assert write("--length", 200, "--seed", 1, "--stop", second, "--stop", first) == longest[:end] + "\n"
    assert write("--length", 200, "--seed", 1, "--stop", "\x00") == longest + "\n"


def test_samples_that_stop_at_a_line_end_are_lines(write):
    written = write("--prompt", "the ", "--num-samples", 9, "--length", 30, "--seed", 1, "--stop", "\n")
    lines = written.splitlines()
    assert len(lines) == 9 and written.endswith("\n") and all(line.startswith("the ") for line in lines)
    assert {len(line) < 4 + 30 for line in lines} == {False, True}  # some end by their length


def test_no_blank_line_follows_texts_that_stop_at_one(write):
    written = write("--prompt", "\nthe ", "--num-samples", 9, "--length", 60, "--seed", 1, "--stop", "\n")
    first, *others = written.split("----------\n")
    assert len(others) == 8 and all(text.startswith("\nthe ") for text in [first, *others])
    assert all(text.endswith("\n") and not text.endswith("\n\n") for text in [first, *others])


@pytest.mark.parametrize("separator", ["\0", "\n", "", "---\n"])
def test_separator_follows_each_text(write, separator):
    options = ("--prompt", "the ", "--num-samples", 3, "--length", 30, "--seed", 1)
    texts = write(*options).removesuffix("\n").split(RULE)
    assert write(*options, "--separator", separator) == "".join(text + separator for text in texts)


def test_texts_as_json_are_a_line_each_that_tells_how_it_was_made(write):
    options = ("--prompt", "the ", "--prompt", "dög\n", "--num-samples", 2, "--length", 30, "--seed", 7, "--top-k", 9)
    texts = write(*options).removesuffix("\n").split(RULE)
    lines = [json.loads(line) for line in write(*options, "--format", "jsonl").splitlines()]
    assert [line["prompt"] + line["text"] for line in lines] == texts
    assert [line["prompt"] for line in lines] == ["the ", "the ", "dög\n", "dög\n"]
    assert [line["sample"] for line in lines] == [1, 2, 1, 2]
    assert all(line.items() >= {"end": "length", "seed": 7, "temperature": 1, "top_k": 9, "top_p": 1,
                                "min_p": 0}.items() for line in lines)


def test_texts_as_json_tell_whether_they_stopped(write):
    options = ("--num-samples", 20, "--length", 20, "--seed", 7, "--stop", "e", "--stop", "o")
    lines = [json.loads(line) for line in write(*options, "--format", "jsonl").splitlines()]
    assert {line["end"] for line in lines} == {"stop", "length"} and len(lines) == 20
    for line in lines:
        assert (line["end"] == "stop") == (line["text"][-1] in "eo") and len(line["text"]) <= 20


def test_ctrl_c_ends_texts_as_json_where_they_are(folder):
    arguments = ("generate.py", "run", "--prompt", "the ", "--num-samples", 2, "--format", "jsonl", "--length", 0)
    with running(*arguments, cwd=folder) as process:
        assert process.stderr.readline().startswith(b"--seed ")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        lines = [json.loads(line) for line in process.stdout.read().splitlines()]
        assert process.wait(DEADLINE) == 130 and process.stderr.read() == b""
    assert [line["end"] for line in lines] == ["interrupt"] * 2


def test_separator_beside_json_is_refused(refused):
    assert "--separator" in refused("run", "--format", "jsonl", "--separator", "x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
def test_full_disk_while_writing_says_nothing_of_a_run(folder):
    with open("/dev/full", "wb") as full, running("generate.py", "run", "--seed", 1, cwd=folder,
                                                  stdout=full) as process:
        said = process.stderr.read().decode()
        assert process.wait() == 2
    assert "cannot read or write stdout: No space left" in said and "saved" not in said


def test_stop_string_in_the_prompt_does_not_end_the_text(write):
    assert len(write("--prompt", "the", "--length", 3, "--seed", 1, "--stop", "the")) == 7


def test_temperature_zero_takes_the_most_likely_character_whatever_the_seed(write):
    options = ("--prompt", "the ", "--length", 60)
    greedy = write(*options, "--temperature", 0)
    assert greedy == write(*options, "--temperature", 0, "--seed", 9)
    assert greedy == write(*options, "--top-k", 1, "--seed", 1) == write(*options, "--top-p", 1e-9, "--seed", 2)
    assert greedy == write(*options, "--min-p", 1, "--seed", 3)
    assert greedy != write(*options, "--seed", 1)


def test_options_that_keep_every_character_change_nothing(write):
    options = ("--length", 60, "--seed", 1)
    assert write(*options) == write(*options, "--top-k", 10**6, "--top-p", 1, "--min-p", 0, "--temperature", 1)


def test_line_ends_and_byte_order_mark_of_a_prompt_are_those_of_the_text_learnt(folder, write, tmp_path):
    options = ("--length", 20, "--seed", 1)
    expected = write("--prompt", "the\nfox\n", *options)
    for name, raw in (("unix", b"the\nfox\n"), ("dos", b"\xef\xbb\xbfthe\r\nfox\r\n"), ("mac", b"the\rfox\r"),
                      ("notepad", "the\r\nfox\r\n".encode("utf-16")), ("gzip", gzip.compress(b"the\nfox\n"))):
        (tmp_path / name).write_bytes(raw)
        assert write("--prompt-file", tmp_path / name, *options) == expected, name
    piped = run("generate.py", "run", "--prompt", "-", *options, cwd=folder, stdin="the\r\nfox\r\n".encode("utf-16"))
    assert piped.stdout == expected
    assert write("--prompt", "the\r\nfox\r", *options) == expected


def test_model_that_has_learnt_returns_reads_them(tmp_path, capfdbinary):
    (tmp_path / "text.txt").write_bytes(b"the quick\r\nfox\r\n" * 40)
    with chdir(tmp_path):
        train_here("--data", "text.txt", "--newline", "keep", *TINY, "--steps", 2, cwd=tmp_path)
        capfdbinary.readouterr()
        assert commands.generate(["run", "--prompt", "the\r\n", "--length", "3", "--seed", "1"]) == 0
    assert capfdbinary.readouterr().out.startswith(b"the\r\n")


# Which model is read

def test_run_folder_checkpoint_file_and_newest_run_are_found(folder, write, capfd, tmp_path):
    expected = write("--length", 50, "--seed", 1)
    assert write("--length", 50, "--seed", 1, "--device", "cpu") == expected
    for number, name in enumerate(["newer", "older"]):
        shutil.copytree(folder / "run", tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "last.safetensors", ns=(0, 10**18 - number))
    (tmp_path / "runs" / "older" / "best.safetensors").write_bytes(b"damaged")
    with chdir(tmp_path):
        for where in ((), ("runs/newer",), ("runs/newer/last.safetensors",), ("runs/newer/best.safetensors",)):
            assert commands.generate([*where, "--length", "50", "--seed", "1"]) == 0
            assert capfd.readouterr().out == expected
        assert commands.generate(["runs/older"]) == 2


# Characters that the model has not learnt

def test_unknown_characters_of_a_prompt_are_refused_and_shown(refused):
    said = refused("run", "--prompt", "the Fox\t£", "--seed", 1)
    assert all(shown in said for shown in ("'F'", "'£'", r"'\t'", "--on-unknown")) and "'x'" not in said
    assert "'F'" in refused("run", "--prompt", "the Fox")


def test_unknown_characters_are_skipped_or_read_as_unk(write):
    options = ("--length", 40, "--seed", 1, "--on-unknown")
    skipped = write("--prompt", "the Fox", *options, "skip")
    assert skipped.removeprefix("the Fox") == write("--prompt", "the ox", *options, "error").removeprefix("the ox")
    assert len(write("--prompt", "the Fox", *options, "unk")) == 7 + 40 + 1
    assert write("--prompt", "XYZ", *options, "skip") == "XYZ" + write(*options, "skip")


def test_prompt_of_bytes_that_are_no_text_is_treated_as_unknown(folder):
    arguments = ("generate.py", "run", "--length", 5, "--seed", 1, "--prompt", "a\udcff")
    result = run(*arguments, cwd=folder)
    assert_refused(result.returncode, result.stdout, result.stderr, r"\udcff")
    result = run(*arguments, "--on-unknown", "skip", cwd=folder)
    assert result.returncode == 0
    assert result.stdout.startswith("a?") and len(result.stdout) == 2 + 5 + 1


# Streams

def test_characters_arrive_while_the_text_is_made(folder):
    with running("generate.py", "run", "--prompt", "the ", "--length", 300_000, "--seed", 1, cwd=folder) as process:
        arrived = process.stdout.read(40)
        assert process.poll() is None
    assert arrived.startswith(b"the ") and len(arrived) == 40


def test_reader_that_has_seen_enough_ends_the_program_quietly(folder):
    with running("generate.py", "run", "--length", 300_000, "--seed", 1, cwd=folder) as process:
        assert len(process.stdout.read(5)) == 5
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_text_that_stdout_cannot_show_is_written_with_question_marks(folder):
    result = run("generate.py", "run", "--prompt", "dög 🦊", "--length", 5, "--seed", 1, cwd=folder,
                 environ={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("d?g ?") and len(result.stdout) == 5 + 5 + 1


@pytest.mark.parametrize("length", [0, 300_000])
def test_ctrl_c_ends_the_texts_where_they_are(folder, length):
    arguments = ("generate.py", "run", "--prompt", "the ", "--prompt", "fox ", "--seed", 1, "--length")
    with running(*arguments, length, cwd=folder) as process:
        written = process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        written = (written + process.stdout.read()).decode()
        assert process.stderr.read() == b""
        assert process.wait(DEADLINE) == 130
    first, second = written.removesuffix("\n").split(RULE)
    assert len(first) == len(second)
    assert written == run(*arguments, len(first) - 4, cwd=folder).stdout


def test_text_without_a_length_ends_with_its_stop_string(write):
    longest = write("--length", 200, "--seed", 1)
    stop = longest[30:33]
    assert write("--length", 0, "--seed", 1, "--stop", stop) == longest[:longest.index(stop) + 3] + "\n"


def on_a_terminal(*arguments: object, cwd: Path, stream: str) -> tuple[int, str]:
    """Run `generate.py` with stdout or stderr on a terminal; returns its exit status and what the terminal gets."""
    terminal, end = os.openpty()
    with running("generate.py", *arguments, cwd=cwd, **{stream: end}) as process:
        os.close(end)
        said = b""
        with contextlib.suppress(OSError):  # raised when the last writer has closed the terminal
            while piece := os.read(terminal, 1 << 16):
                said += piece
        os.close(terminal)
        return process.wait(DEADLINE), said.decode()


def test_control_characters_of_a_text_reach_a_pipe_but_no_terminal(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\x1b]0;title\x07\r\x7f\xc2\x9b31m\t" * 60)
    folder = train("--data", "text.txt", "--newline", "keep", *TINY, "--steps", 2, cwd=tmp_path).parent
    arguments = ("run", "--prompt", "\x1b]0;\t", "--length", 200, "--seed", 1)
    piped = run("generate.py", *arguments, cwd=folder).stdout
    assert set("\x1b\x07\r\x7f\x9b\t") < set(piped)
    status, shown = on_a_terminal(*arguments, cwd=folder, stream="stdout")
    assert status == 0
    assert not set(shown) & set("\x1b\x07\x7f\x9b") and shown.count("\r") == shown.count("\r\n")
    assert shown.startswith(r"\x1b]0;") and "\t" in shown


def test_prompt_typed_at_a_terminal_ends_with_one_ctrl_d(folder):
    terminal, end = os.openpty()
    with running("generate.py", "run", "--prompt", "-", "--length", 5, "--seed", 1, cwd=folder, stdin=end) as process:
        os.close(end)
        assert process.stderr.readline().startswith(b"reading stdin; Ctrl-D")
        os.write(terminal, b"the\n\x04")
        assert process.stdout.read().startswith(b"the\n") and process.wait(DEADLINE) == 0
    os.close(terminal)


def test_error_line_has_a_bounded_length_and_no_control_characters(folder, refused):
    for name in ("x" * 80_000, "\x1b[2J\n" * 100, "\u202e\u2028\x9b" * 2000):
        said = refused("run", "--prompt-file", name) + refused("run", name)
        assert all(len(line) < 1100 and line.isprintable() for line in said.splitlines())
    said = refused("run", "--prompt", "".join(map(chr, range(0x4e00, 0x9000))))
    assert "'一' '丁'" in said and "and 16,876 more" in said and "--on-unknown" in said


# Scoring

def test_score_is_one_line_of_json_of_the_texts_own_loss(folder, write, tmp_path):
    text = (folder / "text.txt").read_bytes().decode()
    written = write("--score", "text.txt")
    score = json.loads(written)
    assert written.count("\n") == 1 and score.keys() == {"loss", "bits_per_char", "characters"}
    assert score["characters"] == len(text) - 1
    assert score["bits_per_char"] == pytest.approx(score["loss"] / math.log(2))
    with chdir(folder):
        assert score["loss"] == Generator.load("run", "cpu").score(text).loss
    (tmp_path / "mixed.txt").write_text(text[::-1], "utf-8")
    assert json.loads(write("--score", tmp_path / "mixed.txt"))["loss"] > score["loss"]


def test_score_of_unknown_characters_is_refused_unless_asked_for(folder, write, refused, tmp_path):
    (tmp_path / "plain.txt").write_text("the fox", "utf-8")
    (tmp_path / "other.txt").write_text("theX fox", "utf-8")
    assert "'X'" in refused("run", "--score", tmp_path / "other.txt")
    assert write("--score", tmp_path / "other.txt", "--on-unknown", "skip") == write("--score", tmp_path / "plain.txt")
    assert json.loads(write("--score", tmp_path / "other.txt", "--on-unknown", "unk"))["characters"] == 7


@pytest.mark.parametrize(("raw", "part"), [(None, "No such file"), (b"abc\xff", "offset 3"), (b"", "too short"),
                                           (b"a", "too short")])
def test_file_that_has_no_score_is_refused(refused, tmp_path, raw, part):
    if raw is not None:
        (tmp_path / "text.txt").write_bytes(raw)
    assert part in refused("run", "--score", tmp_path / "text.txt")


def test_score_reads_the_line_ends_of_the_text_learnt(write, tmp_path):
    for name, raw in (("unix", b"the\nfox\n"), ("dos", b"\xef\xbb\xbfthe\r\nfox\r\n")):
        (tmp_path / name).write_bytes(raw)
    assert write("--score", tmp_path / "dos") == write("--score", tmp_path / "unix")


@pytest.mark.parametrize("option", ["--score", "--prompt-file"])
def test_input_without_an_end_is_refused(refused, tmp_path, option):
    assert "is no file, but a device" in refused("run", option, "/dev/zero")
    (tmp_path / "zeros").write_bytes(bytes(100))
    assert "binary" in refused("run", option, tmp_path / "zeros")


def test_prompt_beyond_its_limit_is_refused(folder, refused, tmp_path, monkeypatch):
    (tmp_path / "long").write_bytes(b"a" * (texts.PROMPT_LIMIT + 1))
    assert "more than 16 MiB" in refused("run", "--prompt-file", tmp_path / "long")
    result = run("generate.py", "run", "--prompt", "-", cwd=folder, stdin=b"y\n" * texts.PROMPT_LIMIT)
    assert_refused(result.returncode, result.stdout, result.stderr, "stdin has more than 16 MiB")


def test_texts_of_several_files_and_of_stdin_are_scored_in_one_process(folder, tmp_path):
    texts = {"one.txt": "the fox", "two.txt": "a lazy fox\n", "-": "over the fox"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, "utf-8")
    result = run("generate.py", folder / "run", "--score", *texts, cwd=tmp_path, stdin=texts["-"].encode())
    assert (result.returncode, result.stderr) == (0, "")
    scores = [json.loads(line) for line in result.stdout.splitlines()]
    assert [score.pop("file") for score in scores] == list(texts)
    for score, text in zip(scores, texts.values()):
        alone = Generator.load(folder / "run", "cpu").score(text)
        assert score["loss"] == pytest.approx(alone.loss, rel=1e-6) and score["characters"] == len(text) - 1


def test_scores_of_files_given_one_by_one_and_together_are_all_told(write, tmp_path):
    for name in "abc":
        (tmp_path / name).write_text("the fox " + name, "utf-8")
    a, b, c = (tmp_path / name for name in "abc")
    lines = [json.loads(line) for line in write("--score", a, b, "--score", c).splitlines()]
    assert [line["file"] for line in lines] == [str(a), str(b), str(c)]


def test_score_of_a_long_text_tells_its_rows_and_is_that_of_one_row(write, tmp_path):
    (tmp_path / "long.txt").write_text("the quick brown fox jumps over a lazy " * 80, "utf-8")
    score, exact = (json.loads(write("--score", tmp_path / "long.txt", *exact)) for exact in ((), ("--exact",)))
    assert exact.keys() == {"loss", "bits_per_char", "characters"}
    assert score["rows"] > 1 and score["run_in"] >= 256 and 0 <= score["run_in_effect"] < 1e-4
    assert score["loss"] == pytest.approx(exact["loss"], abs=1e-4) and score["characters"] == exact["characters"]


def test_every_character_is_scored_if_asked_for(write, tmp_path):
    (tmp_path / "a.txt").write_text("the dög 🦊", "utf-8")
    *characters, score = [json.loads(line) for line in
                          write("--score", tmp_path / "a.txt", "--per-character").splitlines()]
    assert "".join(line["character"] for line in characters) == "he dög 🦊"
    total = sum(line["log_probability"] for line in characters)
    assert score["loss"] == pytest.approx(-total / 8, rel=1e-4)
    for line in characters:
        assert list(line) == ["character", "log_probability", "rank", "likeliest"]
        assert len(line["likeliest"]) == 5 and line["rank"] >= 1


def test_score_beside_options_for_writing_is_refused(refused):
    assert "--prompt" in refused("run", "--score", "text.txt", "--prompt", "a")
    assert "--separator" in refused("run", "--score", "text.txt", "--separator", "x")
    for option, value in (("--length", 1000), ("--temperature", 1), ("--stop", "x"), ("--num-samples", 1),
                          ("--seed", 3), ("--top-k", 0), ("--top-p", 1), ("--min-p", 0)):
        assert f"leave {option} out" in refused("run", "--score", "text.txt", option, value)
    assert "give --score" in refused("run", "--exact")
    assert "give --score" in refused("run", "--per-character")
    assert "names no file" in refused("run", "--score")


def test_file_among_others_that_has_no_score_is_named_and_the_others_are_scored(folder, refused, tmp_path, capfd):
    for name, text in (("good.txt", "the fox"), ("bad.txt", "the Fox"), ("short.txt", "a"), ("also.txt", "a fox")):
        (tmp_path / name).write_text(text, "utf-8")
    names = [str(tmp_path / name) for name in ("bad.txt", "good.txt", "missing.txt", "short.txt", "also.txt")]
    with chdir(folder):
        assert commands.generate(["run", "--score", *names]) == 2
        stdout, stderr = capfd.readouterr()
        assert [json.loads(line)["file"] for line in stdout.splitlines()] == [names[1], names[4]]
        bad, missing, short = stderr.splitlines()
        assert f"{names[0]}: the text has characters" in bad and f"{names[2]}: No such file" in missing
        assert f"{names[3]}: the text to score is too short" in short
        assert commands.generate(["run", "--score", names[0], names[3]]) == 2
        assert capfd.readouterr().out == ""
    assert "before --score" in refused("--score", tmp_path / "good.txt", "run")


# Models of bytes

@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory) -> Path:
    """A folder with a trained run of bytes called `run`; read it, do not change it."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "data.bin").write_bytes("dög 🦊\n".encode() * 60 + bytes(range(0x80, 0x100)))
    train_here("--data", "data.bin", "--bytes", *TINY, "--epochs", 9, "--learning-rate", "1e-2", cwd=folder)
    return folder


def write_bytes(folder: Path, capfdbinary, *arguments: object) -> bytes:
    """What the command writes to stdout in this process."""
    capfdbinary.readouterr()
    with chdir(folder):
        assert commands.generate(["run", *map(str, arguments)]) == 0
    return capfdbinary.readouterr().out


def test_bytes_are_written_as_text_or_with_raw_as_they_are(of_bytes, capfdbinary):
    options = ("--prompt", "dö", "--prompt", "a", "--on-unknown", "skip", "--length", 300, "--seed", 1)
    unruled = write_bytes(of_bytes, capfdbinary, *options, "--raw")
    assert len(unruled) == len("dö".encode()) + len("a") + 2 * 300
    end = len("dö".encode()) + 300
    raw = unruled[:end] + RULE.encode() + unruled[end:] + b"\n"
    assert write_bytes(of_bytes, capfdbinary, *options, "--raw", "--separator", "|ö") == (
        unruled[:end] + "|ö".encode() + unruled[end:] + "|ö".encode())
    with pytest.raises(UnicodeDecodeError):
        raw.decode()
    written = write_bytes(of_bytes, capfdbinary, *options).decode()
    assert written == raw.decode("utf-8", "replace") and {"ö", "\ufffd"} < {*written}
    lines = [json.loads(line) for line in write_bytes(of_bytes, capfdbinary, *options, "--format=jsonl").splitlines()]
    assert [line["prompt"] for line in lines] == ["dö", "a"] and [line["end"] for line in lines] == ["length"] * 2
    for line, text in zip(lines, raw.removesuffix(b"\n").split(RULE.encode())):
        assert line["text"] == text[-300:].decode("utf-8", "replace")


def test_raw_bytes_go_to_stdout_of_a_process_with_prompts_of_any_bytes(of_bytes, tmp_path):
    options = ("generate.py", "run", "--length", 20, "--seed", 1, "--raw", "--separator", "→")
    (tmp_path / "prompt").write_bytes(b"d\xc3")
    expected = None
    for prompt, stdin in (("d\udcc3", b""), ("-", b"d\xc3"), (None, b"")):
        source = ("--prompt-file", tmp_path / "prompt") if prompt is None else ("--prompt", prompt)
        with running(*options, *source, cwd=of_bytes) as process:
            raw, said = process.communicate(stdin)
        assert said == b"" and raw.startswith(b"d\xc3") and raw.endswith("→".encode())
        assert len(raw) == 2 + 20 + 3 and raw == (expected or raw)
        expected = raw


def test_character_begun_by_a_prompt_is_ended_by_its_text(of_bytes):
    options = ("--length", 1, "--temperature", 0)
    with running("generate.py", "run", *options, "--prompt", "dög 🦊\nd\udcc3", cwd=of_bytes) as process:
        written, _ = process.communicate()
    assert written.startswith("dög 🦊\nd".encode() + b"\xc3") and len(written.decode()) == len("dög 🦊\ndö\n")


def test_stop_string_of_bytes_is_its_utf_8(of_bytes, capfdbinary):
    options = ("--prompt", "dög", "--length", 400, "--seed", 2, "--stop", "ö")
    raw = write_bytes(of_bytes, capfdbinary, *options, "--raw")
    assert raw.endswith("ö".encode()) and raw.count("ö".encode()) == 2
    [line] = write_bytes(of_bytes, capfdbinary, *options, "--format", "jsonl").splitlines()
    assert json.loads(line)["end"] == "stop" and json.loads(line)["text"] == raw[4:].decode("utf-8", "replace")


def test_unknown_bytes_are_refused_skipped_or_read_as_unk(of_bytes, capfdbinary):
    with chdir(of_bytes):
        assert commands.generate(["run", "--prompt", "da\x07"]) == 2
    assert rb"bytes that the model has not learnt: b'\x07' b'a'" in capfdbinary.readouterr().err
    options = ("--length", 30, "--seed", 1, "--on-unknown")
    skipped = write_bytes(of_bytes, capfdbinary, "--prompt", "da", *options, "skip")
    assert skipped.removeprefix(b"da") == write_bytes(of_bytes, capfdbinary, "--prompt", "d", *options, "error")[1:]


def test_score_of_bytes_counts_bytes_as_they_are(of_bytes, tmp_path, capfdbinary):
    raw = "dög\n".encode() + b"\xff\xfe"
    (tmp_path / "raw").write_bytes(raw)
    *values, score = [json.loads(line) for line in write_bytes(
        of_bytes, capfdbinary, "--score", tmp_path / "raw", "--per-character").splitlines()]
    assert [line["byte"] for line in values] == [*raw[1:]]
    assert score.keys() == {"loss", "bits_per_byte", "bytes"} and score["bytes"] == len(raw) - 1
    assert score["bits_per_byte"] == pytest.approx(score["loss"] / math.log(2))
    assert score["loss"] == Generator.load(of_bytes / "run", "cpu").score(raw).loss


def test_raw_is_refused_where_it_has_no_bytes_or_would_reach_a_terminal(refused, of_bytes):
    assert "--raw is for models of bytes" in refused("run", "--raw")
    assert "--raw is for texts" in refused("run", "--raw", "--format", "jsonl")
    assert "--raw is for texts" in refused("run", "--raw", "--score", "text.txt")
    status, said = on_a_terminal("run", "--raw", cwd=of_bytes, stream="stdout")
    assert (status, said) == (2, "")


def test_bytes_beyond_ascii_are_escaped_on_a_terminal_where_they_are_controls(of_bytes):
    arguments = ("run", "--prompt", "\x9b", "--length", 400, "--seed", 1)
    status, shown = on_a_terminal(*arguments, cwd=of_bytes, stream="stdout")
    assert status == 0 and shown.startswith(r"\x9b") and "\x9b" not in shown


# Bad input

def test_option_where_a_text_is_due_is_not_taken_for_it(refused, write):
    for option in ("--prompt", "--prompt-file", "--stop", "--temperature"):
        for other in ("--length", "--length=5", "--top-k"):
            said = refused("run", option, other, 5)
            assert f"{option} has no value before {other}; if that is its value, write {option}={other}" in said
    assert write("--prompt=--length", "--length", 5, "--on-unknown", "skip").startswith("--length")


@pytest.mark.parametrize(("arguments", "meant"), [
    (("--temprature", "1"), "did you mean --temperature?"), (("--tempraturee=1",), "did you mean --temperature?"),
    (("--nothing-like-it",), "--nothing-like-it; see"), (("the fox",), "did you mean --prompt 'the fox'?"),
    (("the fox", "--lenght", "5"), "did you mean --length?"), (("the", "fox"), "did you mean --prompt 'the fox'?"),
    (("the  fox, it's",), """did you mean --prompt 'the  fox, it'"'"'s'?"""),
    (("a", "--length", "5", "b"), "a, b; see"),
    (("-prompt", "x"), "did you mean --prompt?"), (("--temp", "1"), "did you mean --temperature?"),
    (("--ns", "2"), "did you mean --num-samples?")])
def test_mistyped_command_line_is_told_what_it_may_mean(refused, arguments, meant):
    assert meant in refused("run", *arguments)


def test_empty_argument_is_refused(refused):
    assert "an argument is empty" in refused("")
    assert "--prompt-file is empty" in refused("run", "--prompt-file", "")
    assert "--prompt-file is empty" in refused("run", "--prompt-file=")


@pytest.mark.parametrize(("option", "value", "part"), [
    ("--temperature", "-1", "at least 0"), ("--temperature", "nan", "at least 0"),
    ("--temperature", "inf", "inf, but must be a finite number"), ("--temperature", "warm", "must be a number"),
    ("--top-p", "0", "in (0, 1]"), ("--top-p", "1.5", "in (0, 1]"), ("--top-p", "nan", "in (0, 1]"),
    ("--top-k", "-1", "at least 0"),
    ("--min-p", "-0.1", "in [0, 1]"), ("--min-p", "1.1", "in [0, 1]"), ("--min-p", "nan", "in [0, 1]"),
    ("--length", "-5", "from 0"), ("--length", "many", "--length is 'many', but must be a whole number;"),
    ("--seed", "x", "--seed is 'x', but must be a whole number;"),
    ("--num-samples", "0", "from 1"), ("--num-samples", "65536", "to 65,535"),
    ("--seed", "-1", "in [0, 2^63)"), ("--seed", str(2**63), "in [0, 2^63)"),
    ("--stop", "", "is empty"), ("--on-unknown", "guess", "--on-unknown"), ("--device", "tpu", "--device"),
    ("--no-such-option", "1", "--no-such-option"),
])
def test_bad_option_is_refused_with_its_name(refused, option, value, part):
    said = refused("run", option, value)
    assert option in said and part in said


@pytest.mark.parametrize("length", [10**14, 10**19, 10**30])
def test_length_beyond_any_memory_is_refused(refused, length):
    assert "--length" in refused("run", "--length", length, "--seed", 1)


def test_bad_command_lines_are_refused_in_a_process_of_their_own(folder):
    for arguments, part in ((("run", "--prompt"), "--prompt"), (("run", "stray"), "stray"), (("none",), "none")):
        result = run("generate.py", *arguments, cwd=folder)
        assert_refused(result.returncode, result.stdout, result.stderr, part)


@pytest.mark.parametrize(("raw", "part"), [
    (None, "No such file"), (b"abc\xff", "not utf-8: byte 0xff at offset 3")])
def test_bad_prompt_file_is_refused(refused, tmp_path, raw, part):
    if raw is not None:
        (tmp_path / "prompt.txt").write_bytes(raw)
    assert part in refused("run", "--prompt-file", tmp_path / "prompt.txt")


def test_prompt_from_stdin_that_is_not_utf8_is_refused(folder):
    result = run("generate.py", "run", "--prompt", "-", cwd=folder, stdin=b"the \xe4")
    assert_refused(result.returncode, result.stdout, result.stderr, "stdin", "0xe4", "offset 4")


def test_missing_run_and_missing_checkpoint_are_refused(refused, tmp_path):
    assert "No such file" in refused(tmp_path / "missing")
    assert "holds no checkpoint" in refused(tmp_path)
    assert "no run under runs" in refused()


def test_file_that_is_no_whole_checkpoint_is_refused(refused, folder, tmp_path):
    raw = (folder / "run" / "best.safetensors").read_bytes()
    for content in (b"", (folder / "text.txt").read_bytes(), raw[:-1], raw[:100]):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert "no checkpoint of char-gru, or is damaged" in refused(tmp_path / "model.safetensors")


def test_help_names_every_option(tmp_path):
    result = run("generate.py", "--help", cwd=tmp_path)
    assert result.returncode == 0
    options = ("prompt-file", "top-p", "num-samples", "stop", "on-unknown", "score")
    assert all(f"--{option}" in result.stdout for option in options)
    assert "None" not in result.stdout and "(default: )" not in result.stdout
