"""`train.py` and `generate.py` with `--device cuda`: the CPU's losses, the texts of the models that were trained,
resumed runs, signals, and a GPU that is too small or fails.

`python -m pytest --cuda-device` runs these tests; what does not depend on the process runs inside theirs.
"""

import json
import random
import re
import signal
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest

from char_gru.rnn import commands, training
from char_gru.rnn.checkpoint import find_checkpoint, load_checkpoint
from tests.helpers.commands import (
    ROOT,
    TINY,
    assert_equal_runs,
    contents,
    finish,
    make_text,
    running,
    stop_here,
    train,
    train_here,
    wait_until,
)
from tests.helpers.texts import assert_samples_drawn, assert_texts_drawn
from tests.test_generate_command import RULE
from tests.test_train_command import SAVE_AT_EVERY_STEP, has_a_step, metrics, metrics_bytes

pytestmark = pytest.mark.slow

TEXT = ("--data", "text.txt", *TINY)
FINISHED = (*TEXT, "--epochs", 3, "--steps", 20, "--save-every", 1)
ON_CUDA = ("--device", "cuda", "--precision", "fp32")
ROUNDING = 1e-4  # of losses, after 20 steps


@pytest.fixture
def folder(executor, device, tmp_path) -> Path:
    """A folder with a text of STEPS_PER_EPOCH batches."""
    make_text(tmp_path / "text.txt")
    return tmp_path


def made_once(tmp_path_factory, name: str, *options) -> Path:
    """A run for several tests to compare with; read it, do not change it."""
    folder = tmp_path_factory.getbasetemp() / name
    if not folder.exists():
        folder.mkdir()
        make_text(folder / "text.txt")
        train_here(*options, cwd=folder)
    return folder / "run"


@pytest.fixture
def finished(executor, device, tmp_path_factory) -> Path:
    """A run of two epochs and four steps."""
    return made_once(tmp_path_factory, "finished-cuda", *FINISHED, *ON_CUDA)


@pytest.fixture
def on_cpu(device, tmp_path_factory) -> Path:
    """The same run on the CPU."""
    return made_once(tmp_path_factory, "finished-cpu", *FINISHED, "--device", "cpu")


def assert_equal_but_for_rounding(actual: Path, expected: Path) -> None:
    lines, wanted = metrics(actual), metrics(expected)
    assert [line.keys() for line in lines] == [line.keys() for line in wanted]
    for line, right in zip(lines, wanted):
        for name, value in right.items():
            assert line[name] == pytest.approx(value, rel=ROUNDING), (name, right)
    for run in (actual, expected):
        assert_samples_drawn(run)


at_exit: list = []  # what the commands would do at the end of the tests' process


def failed_here(capfd, program: str, *arguments, cwd: Path) -> str:
    """Run a command that must end with status 2; the only line on stderr that is its own."""
    capfd.readouterr()
    with chdir(cwd), pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands.atexit, "register", lambda *call: at_exit.append(call))
        assert getattr(commands, program)(list(map(str, arguments))) == 2
    stderr = capfd.readouterr().err
    [line] = [line for line in stderr.splitlines() if line.startswith(f"{program}.py: ")]
    assert "Traceback" not in stderr
    return line


# Equal runs

def test_run_on_cuda_has_the_losses_of_the_cpu_and_draws_from_its_own_models(finished, on_cpu):
    assert_equal_but_for_rounding(finished, on_cpu)
    assert json.loads((finished / "timing.json").read_text())["peak_memory_mib"] > 0


def test_run_does_not_depend_on_when_work_is_done(finished, folder, device):
    device.work_at_once(True)
    assert_equal_runs(train_here(*FINISHED, *ON_CUDA, cwd=folder), finished)


def test_run_does_not_depend_on_the_graph(finished, folder):
    without = train_here(*FINISHED, *ON_CUDA, "--no-graph", cwd=folder)
    for name in ("metrics.jsonl", "samples.txt", "best.safetensors"):  # the others hold the option
        assert contents(without)[name] == contents(finished)[name], name
    after, before = (load_checkpoint(run / "last.safetensors").params for run in (without, finished))
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_resumed_run_equals_uninterrupted_run(finished, folder):
    stop_here(3, *FINISHED, *ON_CUDA, cwd=folder)
    train_here("--resume", cwd=folder)
    assert_equal_runs(folder / "run", finished)


def test_run_goes_on_on_another_device(on_cpu, folder):
    stop_here(3, *FINISHED, "--device", "cpu", cwd=folder)
    stop_here(12, "--resume", *ON_CUDA, cwd=folder)
    train_here("--resume", "--device", "cpu", "--precision", "auto", cwd=folder)
    assert_equal_but_for_rounding(folder / "run", on_cpu)


def test_length_of_sequences_changes_on_cuda_and_across_resuming(folder):
    (folder / "cpu").mkdir()
    make_text(folder / "cpu" / "text.txt")
    options = (*TEXT, "--seq-length", "5:1,20", "--steps", 18, "--save-every", 1, "--stateful")
    expected = train_here(*options, "--device", "cpu", cwd=folder / "cpu")
    whole = train_here(*options, *ON_CUDA, cwd=folder).rename(folder / "whole")
    assert_equal_but_for_rounding(whole, expected)
    stop_here(17, *options, *ON_CUDA, cwd=folder)
    train_here("--resume", cwd=folder)
    assert_equal_runs(folder / "run", whole)


def test_options_of_training_run_on_cuda(folder):
    (folder / "cpu").mkdir()
    make_text(folder / "cpu" / "text.txt")
    options = (*TEXT, "--steps", 10, "--save-every", 1, "--stateful", "--layers", 2, "--dropout", 0.3,
               "--clip-norm", 0.5)
    expected = train_here(*options, "--device", "cpu", cwd=folder / "cpu")
    assert_equal_but_for_rounding(train_here(*options, *ON_CUDA, cwd=folder), expected)


@pytest.mark.parametrize("gpu", ["t4", "3060", "5090"])
def test_every_generation_of_gpus_trains(on_cpu, folder, gpu):
    """Each with the kernels and the precision that its plan chooses."""
    run = train(*TEXT, "--steps", 4, "--device", "cuda", cwd=folder, cuda_device=("--gpu", gpu))
    losses, expected = ([line["loss"] for line in metrics(folder)[:4]] for folder in (run, on_cpu))
    assert losses == pytest.approx(expected, rel=0.02)


# Signals

LONG = ("--epochs", 9, "--steps", 60)


def test_run_stopped_by_ctrl_c_is_saved_and_resumes_to_the_same_end(folder, tmp_path_factory, device_options):
    with running("train.py", *TEXT, *LONG, *ON_CUDA, "--out", "run", cwd=folder,
                 cuda_device=device_options) as process:
        wait_until(has_a_step(folder / "run"), process)
        process.send_signal(signal.SIGINT)
        result = finish(process)
    assert result.returncode == 130, result.stderr
    assert "--resume --out run" in result.stderr and "Traceback" not in result.stderr
    steps = sum("loss" in line for line in metrics(folder / "run"))
    assert 1 <= steps < 60
    assert load_checkpoint(folder / "run" / "last.safetensors").resumable.progress["step"] == steps
    train_here("--resume", cwd=folder)
    assert_equal_runs(folder / "run", made_once(tmp_path_factory, "long-cuda", *TEXT, *LONG, *ON_CUDA))


def test_killed_run_resumes_to_the_same_end(folder, finished, device_options):
    rng, run_folder = random.Random(0), folder / "run"
    with running(SAVE_AT_EVERY_STEP, ROOT, *FINISHED, *ON_CUDA, "--out", "run", cwd=folder,
                 cuda_device=device_options) as process:
        wait_until(has_a_step(run_folder), process)
        lines = len(metrics_bytes(run_folder)) + rng.randrange(4)
        wait_until(lambda: process.poll() is not None or len(metrics_bytes(run_folder)) >= lines, process)
    assert process.returncode == -signal.SIGKILL
    train_here("--resume", cwd=folder)
    assert_equal_runs(run_folder, finished)


# A GPU that is too small, or fails

def test_gpu_without_enough_memory_is_said_in_one_line(folder, device, capfd):
    device.limit_memory(device.used_memory() + 2**22)
    line = failed_here(capfd, "train", *TEXT, *ON_CUDA, "--rnn-units", 800, "--out", "run", cwd=folder)
    assert "not enough memory" in line and "--batch-size" in line


def test_memory_that_ends_during_a_run_leaves_its_last_checkpoint(finished, folder, device, capfd, monkeypatch):
    import cupy

    run_folder = stop_here(3, *FINISHED, *ON_CUDA, cwd=folder)
    before = contents(run_folder)["last.safetensors"]
    write_sample = training.Run._write_sample

    def without_memory(run, *arguments):
        cupy.get_default_memory_pool().free_all_blocks()
        device.limit_memory(device.used_memory())
        write_sample(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "_write_sample", without_memory)
        assert "not enough memory" in failed_here(capfd, "train", "--resume", "--out", "run", cwd=folder)
    assert contents(run_folder)["last.safetensors"] == before
    device.limit_memory(2**32)
    train_here("--resume", cwd=folder)
    assert_equal_runs(run_folder, finished)


@pytest.mark.parametrize("kernel, options", [("any", ("--no-graph",)), ("adam", ())], ids=["first", "in a graph"])
def test_launch_that_fails_is_said_in_one_line_and_leaves_the_last_checkpoint(finished, folder, device, capfd, kernel,
                                                                              options):
    run_folder = stop_here(3, *FINISHED, *ON_CUDA, cwd=folder)
    before = contents(run_folder)["last.safetensors"]
    device.fail_launch(kernel, 5)
    line = failed_here(capfd, "train", "--resume", "--out", "run", *options, cwd=folder)
    assert len(device.reports()) == 1
    assert "unspecified launch failure" in line and "what was saved before still stands" in line
    assert contents(run_folder)["last.safetensors"] == before
    device.reset()
    train_here("--resume", cwd=folder)
    assert_equal_runs(run_folder, finished)


def test_process_whose_gpu_fails_ends_with_one_line(folder):
    """CuPy's objects that are freed at the end of the process add nothing."""
    with running("train.py", *TEXT, *ON_CUDA, "--steps", 20, "--out", "run", cwd=folder,
                 cuda_device=("--fail", "adam:5")) as process:
        result = finish(process)
    assert "cuda_device: adam fails" in result.stderr
    said = [line for line in result.stderr.splitlines() if not line.startswith("cuda_device: ")]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert said[-1].startswith("train.py: the GPU failed: cudaErrorLaunchFailure")


@pytest.mark.parametrize("capability, said", [
    (30, r"NVRTC \d+\.\d+ does not compile for compute capability 3\.0: .* 7\.5 .*"),
    (130, r"the driver cannot load \w+ \(CUDA_ERROR_NO_BINARY_FOR_GPU: .*\): NVRTC is too old for .*13\.0; .*"),
], ids=["older than NVRTC knows", "newer"])
def test_gpu_that_nvrtc_does_not_know_is_said_in_one_line(folder, capability, said):
    """CuPy compiles for the newest GPU that NVRTC knows, where that is older than the one there is."""
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); from tests import cuda_device; "
            f"cuda_device.GPUS['other'] = cuda_device.GPU('other', {capability}, 80, 98304); "
            "cuda_device.install('other'); from char_gru.rnn import commands; sys.exit(commands.train())")
    done = subprocess.run([sys.executable, "-c", code, ROOT, *map(str, (*TEXT, *ON_CUDA, "--out", "run"))], cwd=folder,
                          check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.fullmatch("train.py: " + said, done.stderr.splitlines()[-1])


# Texts

@pytest.mark.parametrize("prompts, arguments, options", [
    (3 * ["the qu"], ("--prompt", "the qu", "--num-samples", 3), {}),
    (["a", "over the"],
     ("--prompt", "a", "--prompt", "over the", "--temperature", 0.5, "--top-k", 4, "--top-p", 0.9),
     {"temperature": 0.5, "top_k": 4, "top_p": 0.9}),
], ids=["one prompt", "two prompts"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_text_is_drawn_from_the_model(finished, capfd, kind, prompts, arguments, options):
    """By both devices as the specification draws it, so that their texts are equal until rounding decides."""
    output = written(capfd, finished, kind, *arguments, "--length", 60, "--seed", 3).removesuffix("\n")
    texts = [text[len(prompt):] for prompt, text in zip(prompts, output.split(RULE), strict=True)]
    assert output == RULE.join(map("".join, zip(prompts, texts))) and {len(text) for text in texts} == {60}
    checkpoint = load_checkpoint(find_checkpoint(finished))
    assert_texts_drawn(checkpoint.params, checkpoint.vocabulary, prompts, texts, seed=3, **options)


def test_score_is_the_cpus(finished, capfd):
    text = finished.parent / "text.txt"
    scores = [json.loads(written(capfd, finished, kind, "--score", text)) for kind in ("cpu", "cuda")]
    assert scores[0] == pytest.approx(scores[1], rel=ROUNDING)


def written(capfd, run_folder: Path, device: str, *options) -> str:
    capfd.readouterr()
    assert commands.generate([str(run_folder), "--device", device, *map(str, options)]) == 0
    return capfd.readouterr().out


def test_text_ends_in_one_line_where_a_launch_fails(finished, device, capfd):
    device.fail_launch("any", 3)
    line = failed_here(capfd, "generate", finished, "--device", "cuda", cwd=finished.parent)
    assert "unspecified launch failure" in line
    assert len(device.reports()) == 1
