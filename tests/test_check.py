"""`python -m kernels --check`: right kernels pass, each planted fault fails the checks of its op, and no failure of a
GPU ends in a traceback."""

import json
import re

import numpy as np
import pytest

from char_gru import kernels
from char_gru.kernels import __main__ as program
from char_gru.kernels import runtime
from char_gru.kernels.plan.gpus import GPUS, precisions
from char_gru.kernels.variants import VARIANTS
from char_gru.rnn import check, training
from tests import host_cuda
from tests.helpers.commands import TINY, make_text, train_here

SMALL = check.Window(T=3, B=5, E=7, H=18, V=11, rows=(1, 10))


def results(chosen: str) -> list[check.Result]:
    """Of the checks whose name a regular expression finds."""
    return list(check.results_of((name, function) for name, function in check.checks_of((SMALL,))
                                 if re.search(chosen, name)))


@pytest.mark.slow
def test_right_kernels_pass(executor, capsys):
    assert check.run(False, (SMALL,)) == 0
    gpu, lines = executor.gpu, capsys.readouterr().out.splitlines()
    names = [found[1] for line in lines if (found := re.match(r"ok +(.*?) +error +\S+, allowed +\S+  ", line))]
    verdict = re.match(rf"All {len(names)} checks passed, with at most (\d+)% of the allowed error \((.*), \w.*\): ",
                       lines[-1])
    assert gpu.name in lines[0] and 0 < int(verdict[1]) <= 100 and verdict[2] in names
    for precision in precisions(gpu):
        for what in ("input_table", "output_layer", "gru stepwise", "training"):
            assert any(name.startswith(f"{what} {precision} ") for name in names), (what, precision)
    assert any("generate stepwise bf16" in name for name in names)


def test_json_says_the_same(executor, capsys, monkeypatch):
    checks = [("right", lambda name: check.Result(name, 1e-7, 1e-6, "h")),
              ("wrong", lambda name: check.Result(name, np.inf, 1e-6, "h"))]
    monkeypatch.setattr(check, "checks_of", lambda windows: checks)
    monkeypatch.setattr(runtime, "current_executor", lambda: executor)
    assert program.command(["--check", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["gpu"] == executor.gpu.name and said["passed"] is False
    assert said["checks"] == [
        {"name": "right", "error": 1e-7, "allowed": 1e-6, "where": "h", "passed": True},
        {"name": "wrong", "error": None, "allowed": 1e-6, "where": "h", "passed": False}]


FAULTS = {  # changed text, its replacement, and the checks that run: each of them has to fail
    "z the other way round": ("n + z * (h_before - n)", "h_before + z * (n - h_before)",
                              r"gru \w+ fp32|training fp32 .*H=18$|generate \S+ fp32 H=18 rows=1$"),
    "da without r": ("di_z, di_n * r}", "di_z, di_n}", r"gru stepwise (fp32|bf16)|training tf32 .*H=18$"),
    "the first moment's sign": ("beta_1 * m + new_1 * g", "beta_1 * m - new_1 * g", r"adam|training fp32 .*H=18$"),
    "words of the mask exchanged": (">> 32 * (w % 2)", ">> 32 * (1 - w % 2)", r"dropout|training fp32 .*layers=2"),
    "top_k forgotten": ("options.top_k == 0 || rank < options.top_k", "true", "sample"),
    "the next character": ("p > 0.0f && reached > uniform", "p > 0.0f && reached - p > uniform",
                           r"sample|generate stepwise fp32 H=18 rows=10$"),
    "a target off by one": ("target = targets[position]", "target = targets[position] - 1", "output_layer fp32"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_fails_the_checks_of_its_op(plant, name):
    old, new, chosen = FAULTS[name]
    assert all(result.passed for result in results(chosen))
    plant(old, new)
    wrong = results(chosen)
    assert len(wrong) >= chosen.count("|") + 1 and not any(result.passed for result in wrong), wrong


@pytest.mark.parametrize("precision, passed", [("fp32", False), ("tf32", True), ("bf16", True)])
def test_a_number_alone_may_err_by_one_rounding_of_an_operand(precision, passed):
    """Where the specification in float32 happens to give the exact loss."""
    loss = {"loss": np.float32(4.25)}
    assert check._compared("loss", {"loss": 4.25 * (1 + 2**-12)}, loss, loss, precision).passed == passed


def test_runs_that_differ_in_a_bit_are_found(executor, monkeypatch):
    """Though each is right within rounding: every second launch of adam adds 1 to the last bit of each moment."""
    launch, launched = executor.launch, []

    def launched_with_noise(source, kernel, grid, block, args, *options):
        launch(source, kernel, grid, block, args, *options)
        if kernel == "adam":
            launched.append(kernel)
            if len(launched) % 2:
                args[1][...] = np.nextafter(args[1], np.float32(1))

    if executor.array_type is not np.ndarray:
        pytest.skip("changes arrays of NumPy")
    monkeypatch.setattr(executor, "launch", launched_with_noise)
    [result] = results(r"training fp32 .*H=18$")
    assert not result.passed and result.where.startswith("values that differ")


def test_graph_that_computes_something_else_is_found(executor, monkeypatch):
    class NoGraph:
        def launch(self):
            pass

    monkeypatch.setattr(executor, "capture", lambda function: NoGraph())
    [result] = results(r"training fp32 .*H=18$")
    assert not result.passed and result.where == "values that differ without a graph"


def test_checks_that_cannot_run_are_findings(executor, monkeypatch, capsys):
    def launch(source, kernel, *arguments):
        if kernel == "dropout_forward":
            raise RuntimeError("unspecified launch failure\nmore")

    monkeypatch.setattr(executor, "launch", launch)
    monkeypatch.setattr(check, "checks_of", lambda windows, checks_of=check.checks_of: (
        named for named in checks_of(windows) if named[0].startswith(("dropout", "global_norm"))))
    assert check.run(False, (SMALL,)) == 1
    output = capsys.readouterr().out
    assert re.search(r"^WRONG dropout .* inf, allowed +0  RuntimeError: unspecified launch failure$", output,
                     re.MULTILINE)
    assert output.splitlines()[-1] == ("2 of 2 checks failed: do not trust this GPU's results; --device cpu computes "
                                       "without it")


@pytest.mark.parametrize("name", [pytest.param("h100", marks=pytest.mark.slow), "t4"])
def test_every_kernel_that_plans_choose_is_checked(monkeypatch, name):
    """At the sizes of a real check; launches are recorded, and not run."""
    class Recorder(host_cuda.HostExecutor):
        gpu = GPUS[name]

        def resident_blocks(self, *arguments):
            return 10_000

        def launch(self, source, kernel, *arguments):
            launched.add(kernel)

    launched: set[str] = set()
    monkeypatch.setattr(check, "_specified", lambda *arguments: {})
    monkeypatch.setattr(check, "_specified_training", lambda *arguments: {})
    with runtime.use(Recorder()):
        assert len(list(check.results_of(check.checks_of(check.WINDOWS)))) > 50
    wanted = {kernel for variant in VARIANTS if variant.variant != "naive" for kernel in variant.kernels}
    if name == "t4":  # no tensor cores and little shared memory
        wanted -= {kernel for kernel in wanted if "multistage" in kernel or "persistent" in kernel}
        wanted -= {"generate_batched", "pack_weights"}
    else:
        wanted.remove("matmul_multistage_nn")  # no product of these models is large and of this layout
    assert wanted <= launched, wanted - launched


@pytest.mark.parametrize("capability, said", [(90, 0), (75, 0), (100, 1), (121, 1)])
def test_training_on_a_gpu_that_is_newer_says_so_once(tmp_path, monkeypatch, capfd, capability, said):
    class Newer(host_cuda.HostExecutor):
        gpu = host_cuda.HostExecutor.gpu._replace(name="a GPU", capability=capability)

        def launch(self, *arguments):
            pass

    make_text(tmp_path / "text.txt")
    with runtime.use(Newer()):
        monkeypatch.setattr(training, "op_set", lambda device, precision: kernels.op_set("fp32"))
        monkeypatch.setattr(training.Run, "train", lambda run: 0)
        train_here("--data", "text.txt", *TINY, cwd=tmp_path)
    line = (f"train.py: a GPU has compute capability {capability / 10}, for which no kernel has been compiled in the "
            "tests: let `python -m char_gru.kernels --check` compare its results with the reference first")
    assert capfd.readouterr().err.splitlines().count(line) == said
