"""The tables of README.md: rendering, replacing between markers, and that they are what the recorded results give."""

import json

import pytest

from bench import report

MACHINE = {"cpu": "Some CPU", "cores": 2, "system": "Linux 6", "python": "3.11.7", "numpy": "2.4.6",
           "blas": "openblas 0.3", "blas_kernels": "SkylakeX", "blas_threads": 2, "torch": "2.13.0",
           "torch_threads": 2, "jax": None, "commit": "0123456789ab", "date": "2026-01-02"}

TRAIN_STEP = {
    "machine": MACHINE,
    "sizes": {"T": 10, "B": 100, "V": 50, "E": 20, "H": 100},
    "results": {"seconds": {"char-gru": [0.5, 0.25, 1.0], "PyTorch": [1.0, 1.0, 2.5]}, "peak_memory_mib": 432.1},
}

GENERATE = {
    "machine": MACHINE,
    "sizes": {"length": 1000, "V": 50, "E": 20, "H": 100},
    "results": {"seconds_by_rows": {"1": {"char-gru": [0.125], "PyTorch": [0.5]},
                                    "64": {"char-gru": [4.0], "PyTorch": [2.0]}}},
}

CIRCUMSTANCES = ("Some CPU, 2 cores; Python 3.11.7, NumPy 2.4.6 (openblas 0.3, kernels SkylakeX, 2 threads), "
                 "PyTorch 2.13.0 (2 threads), JAX not installed and so left out. "
                 "Median and range of {}; 2026-01-02, 0123456789ab.")

TRAIN_STEP_ROWS = """\
|  | ms per step | range | characters/s | GFLOP/s | time against ours |
| --- | --- | --- | --- | --- | --- |
| char-gru | 500 | 250 to 1,000 | 2,000 | 0.420 | 1.00 |
| PyTorch | 1,000 | 1,000 to 2,500 | 1,000 | 0.210 | 2.50 |
"""

GENERATE_ROWS = """\
| texts |  | s | range | characters/s | time against ours |
| --- | --- | --- | --- | --- | --- |
| 1 | char-gru | 0.125 | 0.125 to 0.125 | 8,000 | 1.00 |
| 1 | PyTorch | 0.500 | 0.500 to 0.500 | 2,000 | 4.00 |
| 64 | char-gru | 4.00 | 4.00 to 4.00 | 16,000 | 1.00 |
| 64 | PyTorch | 2.00 | 2.00 to 2.00 | 32,000 | 0.50 |
"""


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "cpu-some-cpu.json").write_text(json.dumps({"train_step": TRAIN_STEP, "generate": GENERATE}))
    return folder


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- table: train-step-cpu -->\nold\n<!-- end -->\nafter\n")
    return path


def test_flop_of_a_step_counts_both_products_three_times():
    assert report.train_step_flop(T=2, B=3, V=5, E=7, H=11) == 3 * 2 * 2 * 3 * 11 * (3 * 11 + 5)


def test_train_step_table_has_median_range_rates_and_ratio_within_rounds():
    table = report.train_step_table(TRAIN_STEP)
    assert table.startswith(CIRCUMSTANCES.format("3 interleaved rounds") + "\n\n" + TRAIN_STEP_ROWS)
    assert "0.210 GFLOP per step" in table and "takes 432 MiB" in table


def test_generate_table_has_a_row_for_each_number_of_texts_and_candidate():
    assert report.generate_table(GENERATE) == (
        CIRCUMSTANCES.format("1 interleaved round") + "\n\n" + GENERATE_ROWS.rstrip())


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


def test_only_the_text_between_markers_is_replaced(results):
    text = ("a\n<!-- table: generate-cpu -->\nold\n\nold\n<!-- end -->\nb\n"
            "<!-- table: train-step-cpu -->\n<!-- end -->\nc <!-- end -->\n")
    filled = report.filled(text, results)
    assert filled == (f"a\n<!-- table: generate-cpu -->\n{report.generate_table(GENERATE)}\n<!-- end -->\nb\n"
                      f"<!-- table: train-step-cpu -->\n{report.train_step_table(TRAIN_STEP)}\n<!-- end -->\n"
                      "c <!-- end -->\n")
    assert report.filled(filled, results) == filled
    assert report.filled("no table\n", results) == "no table\n"


def test_table_without_results_is_empty(results):
    (results / "cpu-some-cpu.json").unlink()
    for name in report.TABLES:
        text = f"<!-- table: {name} -->\n<!-- end -->\n"
        assert report.filled(text.replace("<!-- end", "old\n<!-- end"), results) == text


@pytest.mark.parametrize("text, complaint", [
    ("<!-- table: nonsense -->\n<!-- end -->\n", "no table nonsense"),
    ("<!-- table: generate-cpu -->\n", "no <!-- end -->"),
    ("<!-- table: generate-cpu -->\n<!-- table: train-step-cpu -->\n<!-- end -->\n", "no <!-- end -->"),
])
def test_marker_that_cannot_be_filled_is_refused(results, text, complaint):
    with pytest.raises(ValueError, match=complaint):
        report.filled(text, results)


def test_check_fails_until_the_tables_are_written(readme, results, capsys):
    before = readme.read_text()
    assert report.main(["--check"], readme, results) == 1
    assert "python -m bench.report" in capsys.readouterr().err
    assert readme.read_text() == before
    assert report.main([], readme, results) == 0
    assert readme.read_text() != before
    assert report.main(["--check"], readme, results) == 0


def test_check_fails_after_new_results(readme, results):
    report.main([], readme, results)
    faster = json.dumps({"train_step": TRAIN_STEP | {"machine": MACHINE | {"cpu": "Faster CPU"}}})
    (results / "cpu-faster-cpu.json").write_text(faster)
    assert report.main(["--check"], readme, results) == 1


def test_tables_of_the_readme_are_what_the_recorded_results_give():
    assert report.README.exists(), "README.md, whose tables are checked here, does not exist"
    assert report.main(["--check"]) == 0, "run python -m bench.report: README.md is not what bench/results gives"
