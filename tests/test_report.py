"""The tables of all pages: rendering, replacing between markers, and that all pages are up to date."""

import json

import pytest

from bench import report
from char_gru.kernels.plan.costs import EXPECTED_ERROR
from char_gru.kernels.plan.generation import generation_plan
from char_gru.kernels.plan.gpus import GPUS
from char_gru.kernels.plan.training_step import training_step
from char_gru.kernels.variants import VARIANTS

MACHINE = {"cpu": "Some(R) CPU Processor @ 1.00GHz", "cores": 2, "system": "Linux 6", "python": "3.11.7",
           "numpy": "2.4.6", "blas": "openblas 0.3", "blas_kernels": "SkylakeX", "blas_threads": 2, "torch": "2.13.0",
           "torch_threads": 2, "jax": None, "keras": None, "onnxruntime": "1.32.0", "commit": "0123456789ab",
           "date": "2026-01-02"}

GPU = {"gpu": "NVIDIA X", "driver": "for CUDA 13.0", "cuda_runtime": "13.0", "cupy": "14.2", "flashrnn": "1.0"}


def entry(benchmark, sizes, seconds, tutorial=True, gpu=False, work=(10**9, 10**6, 1, 2), **notes) -> dict:
    """Results in fp32, or of a GPU in the precision that each name ends with."""
    ceilings = {"bytes_per_second": 1e9, "flop_per_second": dict.fromkeys(("fp32", "tf32", "bf16"), 1e12),
                "launch_seconds": gpu * 1e-5, "barrier_seconds": gpu * 2e-6, "exchange_seconds": gpu * 1e-6}
    candidates = {name: {"precision": name.split()[-1] if gpu else "fp32", "seconds": values, "host_bound": False}
                  | notes for name, values in seconds.items()}
    return {"benchmark": benchmark, "sizes": sizes, "tutorial": tutorial, "machine": MACHINE | (GPU if gpu else {}),
            "work": dict(zip(("flop", "bytes", "launches", "barriers"), work)), "ceilings": ceilings,
            "candidates": candidates}


TRAIN_STEP = entry("train_step", {"T": 10, "B": 100, "V": 50, "E": 20, "H": 100},
                   {"char-gru": [0.5, 0.25, 1.0], "PyTorch": [1.0, 1.0, 2.5]})

GENERATE = [entry("generate", {"T": 1000, "R": R, "V": 50, "E": 20, "H": 100}, seconds, R == 1) for R, seconds in (
    (64, {"char-gru": [4.0], "PyTorch": [2.0]}), (1, {"char-gru": [0.125], "PyTorch": [0.5]}))]

MEMORY = {"benchmark": "train_memory", "sizes": {}, "tutorial": True, "machine": MACHINE, "peak_memory_mib": 432.1}
"""A figure that older results hold and that no table shows."""

ADAM = entry("adam", {"N": 10}, {"char-gru": [0.002, 0.003, 0.004], "NumPy": [0.02]})

GROUPS = {"train_step": TRAIN_STEP, "train_memory": MEMORY, "generate 64": GENERATE[0], "generate 1": GENERATE[1],
          "adam": ADAM, "train_step 20": entry("train_step", TRAIN_STEP["sizes"] | {"B": 20},
                                               {"char-gru": [0.1], "JAX": [0.2]}, tutorial=False)}

CIRCUMSTANCES = (
    "Some CPU, 2 cores; Python 3.11.7, NumPy 2.4.6 (openblas 0.3, kernels SkylakeX, 2 threads), PyTorch 2.13.0 "
    "(2 threads), JAX not installed and so left out, Keras not installed and so left out, onnxruntime 1.32.0. "
    "3 interleaved rounds; 2026-01-02, commit 0123456789ab. Ceilings: memory 1.00 GB/s, the library's large product "
    "1,000 GFLOP/s in fp32, 1,000 GFLOP/s in tf32, 1,000 GFLOP/s in bf16.")

TRAIN_STEP_ROWS = """\
| sizes |  | ms | range | time against ours | characters/s | GFLOP/s | times the floor |
| --- | --- | --- | --- | --- | --- | --- | --- |
| T 10, B 20, V 50, E 20, H 100 | char-gru | 100 | 100 to 100 | 1.00 | 2,000 | 10.0 | 100 |
|  | JAX | 200 | 200 to 200 | 2.00 | 1,000 | 5.00 | 200 |
| T 10, B 100, V 50, E 20, H 100 | char-gru | 500 | 250 to 1,000 | 1.00 | 2,000 | 2.00 | 500 |
|  | PyTorch | 1,000 | 1,000 to 2,500 | 2.50 | 1,000 | 1.00 | 1,000 |"""

GENERATE_ROWS = """\
| sizes |  | ms | range | time against ours | characters/s |
| --- | --- | --- | --- | --- | --- |
| T 1,000, R 1, V 50, E 20, H 100 | char-gru | 125 | 125 to 125 | 1.00 | 8,000 |
|  | PyTorch | 500 | 500 to 500 | 4.00 | 2,000 |
| T 1,000, R 64, V 50, E 20, H 100 | char-gru | 4,000 | 4,000 to 4,000 | 1.00 | 16,000 |
|  | PyTorch | 2,000 | 2,000 to 2,000 | 0.50 | 32,000 |"""


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "cpu-some-cpu.json").write_text(json.dumps(GROUPS))
    return folder


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- table: devices -->\nold\n<!-- end -->\nafter\n")
    return path


def test_train_step_has_median_range_rates_and_ratio_within_rounds_at_every_size():
    table = report.train_step_table([TRAIN_STEP, GROUPS["train_step 20"]])
    assert table.split("\n\n")[1] == TRAIN_STEP_ROWS


def test_writing_has_a_row_for_each_number_of_texts_and_candidate():
    assert report.generate_table(GENERATE).split("\n\n")[1] == GENERATE_ROWS


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("|")]


def test_step_on_a_gpu_is_compared_within_its_precision_and_shows_memory():
    seconds = {"char-gru tf32": [1.0], "char-gru bf16": [0.5], "PyTorch tf32": [3.0], "PyTorch bf16": [2.0]}
    table = report.train_step_table([entry("train_step", TRAIN_STEP["sizes"], seconds, gpu=True, memory_mib=10.0)])
    assert {row[2]: (row[5], row[9]) for row in rows_of(table)[2:]} == {
        "char-gru tf32": ("1.00", "10.0"), "char-gru bf16": ("1.00", "10.0"), "PyTorch tf32": ("3.00", "10.0"),
        "PyTorch bf16": ("4.00", "10.0")}


def test_op_is_held_against_the_nearer_ceiling_and_the_floor():
    assert report.ops_table([ADAM]).splitlines()[-2:] == [
        "| adam (N 10) | char-gru | 3.00 | 2.00 to 4.00 | 0.333 | 333 | 33% of memory | 3.0 |",
        "|  | NumPy | 20.0 | 20.0 to 20.0 | 0.0500 | 50.0 | 5% of memory | 20.0 |"]


def test_floor_of_a_gpu_has_launches_and_barriers_and_slow_launching_is_marked():
    on_gpu = entry("adam", {"N": 10}, {"char-gru fp32": [0.001012]}, gpu=True)
    on_gpu["candidates"]["char-gru fp32"]["host_bound"] = True
    table = report.ops_table([on_gpu])
    assert "| 1.01 † |" in table and "| 1.0 |" in table and "† the host queued the calls more slowly" in table


def test_time_to_loss_has_steps_and_seconds():
    learnt = entry("time_to_loss", {"T": 5}, {"char-gru": [2.0], "JAX": [3.0]}, steps=120)
    assert report.time_to_loss_table([learnt]).splitlines()[-1] == "|  | JAX | 3,000 | 3,000 to 3,000 | 1.50 | 120 |"


def test_device_has_a_heading_its_circumstances_and_a_table_of_each_kind(results):
    (results / "cpu-some-cpu.json").write_text(json.dumps({"train_step": TRAIN_STEP, "adam": ADAM}))
    assert report.device_sections(results) == "\n\n".join([
        "## Some CPU, 2 cores", CIRCUMSTANCES, "### A training step", report.train_step_table([TRAIN_STEP]),
        "### Each op by itself", report.ops_table([ADAM])])


def test_predictions_are_those_of_the_plans(results):
    lines = report.predictions_table(results).splitlines()
    assert lines[0] == ("| precision | ms a step | floor | us a character, 1 text | us a character, 5 texts | "
                        "us a character, 64 texts |")
    rows = {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:] for line in lines[2:5]}
    step = training_step(GPUS["h100"], 100, 64, 66, 256, 1024, 1, "bf16")
    assert [float(cell) for cell in rows["bf16"][:2]] == [
        pytest.approx(sum(column) / 1e3, rel=5e-3) for column in zip(*((row.us, row.floor_us) for row in step))]
    assert rows["bf16"][2:] == [
        f"{generation_plan(GPUS['h100'], R, 66, 1024, 1, 'bf16').predicted_us:.1f}" for R in (1, 5, 64)]
    assert rows["tf32"][2:] == rows["fp32"][2:] != rows["bf16"][2:]  # text is written in fp32 then
    assert lines[-1] == f"Expect a predicted time to be wrong by some {EXPECTED_ERROR:.0%}."


def test_gpu_comes_first_with_its_driver_and_what_launches_and_barriers_cost(results):
    on_gpu = entry("adam", {"N": 10}, {"char-gru fp32": [0.001]}, gpu=True)
    (results / "cuda-nvidia-x.json").write_text(json.dumps({"adam": on_gpu}))
    sections = report.device_sections(results)
    assert sections.startswith("## NVIDIA X\n\nNVIDIA X, driver for CUDA 13.0, CUDA 13.0, CuPy 14.2, Some CPU, 2 core")
    assert "Keras not installed and so left out, FlashRNN 1.0. 1 interleaved round;" in sections
    assert ("10.0 us from launch to launch, 2.00 us for a barrier among all blocks, 1.00 us for an exchange of words "
            "among them.") in sections
    assert sections.index("## NVIDIA X") < sections.index("## Some CPU")


def test_runs_of_different_circumstances_are_told_apart(results):
    later = ADAM | {"machine": MACHINE | {"commit": "ba9876543210"}}
    (results / "cpu-some-cpu.json").write_text(json.dumps({"train_step": TRAIN_STEP, "adam": later}))
    parts = report.device_sections(results).split("\n\n")
    assert parts[1:3] == [f"train_step: {CIRCUMSTANCES}",
                          f"adam: {CIRCUMSTANCES.replace('0123456789ab', 'ba9876543210')}"]


def test_kernel_has_run_on_a_gpu_only_if_results_say_so(results):
    def ran() -> list[str]:
        return [line.split(" | ")[-1].removesuffix(" |") for line in report.kernels_table(results).splitlines()[2:]]

    assert ran() == ["no"] * len(VARIANTS)
    forward = entry("gru_forward", {"T": 1}, {"char-gru persistent tf32": [1.0], "PyTorch tf32": [1.0]}, gpu=True)
    adam = entry("adam", {"N": 10}, {"char-gru naive": [1.0]}, gpu=True)
    (results / "cuda-nvidia-x.json").write_text(json.dumps({"gru_forward": forward, "adam": adam}))
    assert [variant[-2:] for variant, cell in zip(VARIANTS, ran(), strict=True) if cell == "yes: NVIDIA X"] == [
        ("gru_forward", "persistent"), ("adam", "naive")]


def test_headline_compares_the_step_with_each_peer(results):
    assert report.headline(results) == (
        "On 2 cores of Some CPU, a training step of the tutorial's model takes 0.500 s (2,000 characters/s, 2.5 times "
        "as fast as PyTorch), and writing 1,000 characters 0.125 s.")


def test_init_table_has_the_losses_of_each_epoch(results):
    lines = [{"step": 1, "epoch": 1, "loss": 4.0},
             {"epoch": 1, "train_loss": 2.5, "val_loss": 2.25, "val_bits_per_char": 3.2},
             {"epoch": 2, "train_loss": 2.0, "val_loss": 1.75, "val_bits_per_char": 2.5}]
    (results / "keras.metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.init_table(results).splitlines() == [
        "| training / validation | epoch 1 | epoch 2 |", "| --- | --- | --- |",
        "| keras | 2.5000 / 2.2500 | 2.0000 / 1.7500 |"]


def test_drift_has_a_row_for_each_run_and_a_column_for_each_precision(results):
    def drift(precision: str, run: str, start: str, loss: float) -> dict:
        return {"precision": precision, "run": run, "from": start, "loss": loss, "last loss": loss / 2, "weights": 0.5}

    (results / "drift.json").write_text(json.dumps({
        "machine": MACHINE, "cpu_seconds": 130, "sizes": {"T": 5, "steps": 7},
        "runs": [drift("fp32", "CPU", "float64", 1e-7), drift("fp32", "kernels", "float64", 2e-7),
                 drift("fp32", "kernels", "specification", 3e-7), drift("bf16", "kernels", "float64", 1e-3)]}))
    assert report.drift_table(results).splitlines() == [
        "| run | fp32 | bf16 |", "| --- | --- | --- |", "| CPU | 1.0e-07, 5.0e-01 |  |",
        "| kernels | 2.0e-07, 5.0e-01 | 1.0e-03, 5.0e-01 |", "",
        "Model and run: T 5, steps 7. 2 minutes of CPU time on Some CPU, 2 cores; 2026-01-02, commit 0123456789ab."]


def test_only_the_text_between_markers_is_replaced(results):
    text = ("a\n<!-- table: devices -->\nold\n\nold\n<!-- end -->\nb\n"
            "<!-- table: headline -->\n<!-- end -->\nc <!-- end -->\n")
    filled = report.filled(text, results)
    assert filled == (f"a\n<!-- table: devices -->\n{report.device_sections(results)}\n<!-- end -->\nb\n"
                      f"<!-- table: headline -->\n{report.headline(results)}\n<!-- end -->\nc <!-- end -->\n")
    assert report.filled(filled, results) == filled
    assert report.filled("no table\n", results) == "no table\n"


def test_table_without_results_is_empty(results):
    (results / "cpu-some-cpu.json").unlink()
    for name in report.TABLES.keys() - {"kernels", "files", "predictions"}:
        text = f"<!-- table: {name} -->\n<!-- end -->\n"
        assert report.filled(text.replace("<!-- end", "old\n<!-- end"), results) == text


@pytest.mark.parametrize("text, complaint", [
    ("<!-- table: nonsense -->\n<!-- end -->\n", "no table nonsense"),
    ("<!-- table: headline -->\n", "no <!-- end -->"),
    ("<!-- table: headline -->\n<!-- table: devices -->\n<!-- end -->\n", "no <!-- end -->"),
])
def test_marker_that_cannot_be_filled_is_refused(results, text, complaint):
    with pytest.raises(ValueError, match=complaint):
        report.filled(text, results)


def test_check_fails_until_the_tables_are_written(readme, results, capsys):
    before = readme.read_text()
    assert report.main(["--check"], [readme], results) == 1
    assert "python -m bench.report" in capsys.readouterr().err
    assert readme.read_text() == before
    assert report.main([], [readme], results) == 0
    assert readme.read_text() != before
    assert report.main(["--check"], [readme], results) == 0


def test_check_fails_after_new_results(readme, results):
    report.main([], [readme], results)
    faster = json.dumps({"train_step": TRAIN_STEP | {"machine": MACHINE | {"cpu": "Faster CPU"}}})
    (results / "cpu-faster-cpu.json").write_text(faster)
    assert report.main(["--check"], [readme], results) == 1


# Plots

def test_plot_shows_each_op_against_its_floor(results):
    assert report.plots_of(results) == {results / "cpu-some-cpu-ops.svg": [
        ("adam N=10", {"char-gru": [3.0, 2.0, 4.0, 1.0], "NumPy": [20.0, 20.0, 20.0, 1.0]})]}


def test_results_page_shows_every_plot(results):
    assert report.plots_table(results) == "![cpu-some-cpu-ops](results/cpu-some-cpu-ops.svg)"


def test_equal_results_give_equal_files(results, readme):
    report.main([], [readme], results)
    first = {path.name: path.read_bytes() for path in results.glob("*.svg")}
    for path in results.glob("*.svg"):
        path.unlink()
    report.main([], [readme], results)
    assert first == {path.name: path.read_bytes() for path in results.glob("*.svg")} and len(first) == 1


def test_check_fails_for_plots_that_are_missing_old_or_surplus(results, readme, capsys):
    report.main([], [readme], results)
    plot = results / "cpu-some-cpu-ops.svg"
    text = plot.read_text()
    for damage in (plot.unlink, lambda: plot.write_text(text.replace("[3.0, ", "[3.5, "))):
        damage()
        assert report.main(["--check"], [readme], results) == 1
        assert plot.name in capsys.readouterr().err
    plot.write_text(text)
    assert report.main(["--check"], [readme], results) == 0
    (results / "cpu-other-ops.svg").write_text(text)
    assert report.main(["--check"], [readme], results) == 1
    report.main([], [readme], results)
    assert not (results / "cpu-other-ops.svg").exists()


def test_tables_of_all_pages_and_plots_are_what_the_recorded_results_give():
    assert all(page.exists() for page in report.PAGES)
    assert report.main(["--check"]) == 0, "run python -m bench.report"
