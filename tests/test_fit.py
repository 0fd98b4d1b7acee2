"""The terms of predicted times that results give, from a made-up file of results: nothing in it was measured."""

import json

import pytest

from bench import fit
from char_gru.kernels.plan.gpus import GPU, rates_of
from char_gru.kernels.plan.products import product_plan
from char_gru.kernels.sizes import ceil_div

MADE_UP = GPU("NVIDIA Made-up", 90, 132, 232448)
TRUE = rates_of(MADE_UP)._replace(memory=11.5, launch_us=1.5, chain=1111, barrier=2222, l2_latency=345, l2=31,
                                  exposed=0.3, multiply={"fp32": 80, "tf32": 600, "bf16": 1300})
HERTZ = TRUE.gigahertz * 1e9
BASE = {"T": 100, "B": 64, "V": 66, "H": 1024}
JOBS = {"gru_forward": BASE, "gru_backward": BASE, "train_step": BASE | {"E": 256},
        "generate": {"T": 1000, "R": 1, "V": 66, "E": 256, "H": 1024}, "adam": {"N": 4022912}}


def entry(benchmark: str, sizes: dict, seconds: dict) -> dict:
    machine = dict(zip(("gpu", "capability", "multiprocessors", "shared_bytes"), MADE_UP))
    ceilings = {"bytes_per_second": TRUE.memory * 132 * HERTZ, "flop_per_second": {},
                "launch_seconds": TRUE.launch_us / 1e6, "barrier_seconds": TRUE.barrier / HERTZ,
                "exchange_seconds": TRUE.chain / HERTZ, "load_seconds": TRUE.l2_latency / HERTZ}
    return {"benchmark": benchmark, "sizes": sizes, "tutorial": True, "machine": machine, "ceilings": ceilings,
            "candidates": {name: {"precision": name.split()[-1], "seconds": [value] * 3}
                           for name, value in seconds.items()}}


@pytest.fixture
def groups() -> dict:
    """Times as TRUE predicts them."""
    made = {}
    for name, sizes in JOBS.items():
        seconds = {"char-gru naive fp32": 1.0}
        all_sizes = sizes if name == "generate" else {"E": 256} | BASE
        for precision in ("fp32", "tf32", "bf16"):
            if precision == "fp32" or name not in ("adam", "generate"):
                variant = fit._variant(MADE_UP, name, precision, all_sizes)
                seconds[" ".join(filter(None, ("char-gru", variant, precision)))] = fit.predicted_seconds(
                    MADE_UP, name, precision, all_sizes, TRUE)
        made[name] = entry(name, sizes, seconds)
    M, N, K = 3072, 1024, 6400
    products = {}
    for precision, suffix in (("fp32", ""), ("tf32", ""), ("bf16", " operands")):
        plan = product_plan(MADE_UP, M, N, K, precision, 2 if suffix else 4, True)
        assert plan.variant == "multistage"
        blocks = plan.grid(M, N)[0] * plan.grid(M, N)[1] * plan.splits
        cycles = ceil_div(blocks, 132) * plan.TILE_M * plan.TILE_N * plan.K_split / TRUE.multiply[precision]
        products[f"char-gru multistage {precision}{suffix}"] = cycles / HERTZ + TRUE.launch_us / 1e6
    made["matmul"] = entry("matmul", {"M": M, "N": N, "K": K}, products)
    return made


def test_what_no_result_gives_stays_as_predicted(groups):
    groups = {"adam": groups["adam"]}
    groups["adam"]["ceilings"] |= {"exchange_seconds": 0.0}
    rates, predicted = fit.fitted(groups), rates_of(MADE_UP)
    for name in ("chain", "l2", "exposed", "multiply", "issue"):
        assert getattr(rates, name) == getattr(predicted, name)
    assert rates.barrier == pytest.approx(TRUE.barrier)


def test_command_prints_the_terms_that_made_the_times_and_all_times(groups, tmp_path, capsys):
    path = tmp_path / "cuda-made-up.json"
    path.write_text(json.dumps(groups))
    assert fit.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NVIDIA Made-up, 132 multiprocessors"
    assert "chain                     1400        1111" in lines
    assert "multiply tf32              635         600" in lines
    [line] = [line for line in lines if line.startswith("    90: Rates(")]
    # As Python, it is what made the times.
    assert eval(line.strip().removeprefix("90: ").removesuffix(","), {"Rates": type(TRUE)}) == TRUE
    rows = {tuple(line.split()[:2]): line.split() for line in lines if line.startswith(tuple(JOBS))}
    assert len(rows) == 3 * 3 + 2
    step = rows["train_step", "tf32"]
    seconds = groups["train_step"]["candidates"]["char-gru tf32"]["seconds"][0]
    before = fit.predicted_seconds(MADE_UP, "train_step", "tf32", {"E": 256} | BASE, rates_of(MADE_UP))
    assert step[-4:] == [f"{1e3 * before:.4g}", *[f"{1e3 * seconds:.4g}"] * 2, f"{seconds / before:.2f}"]


def test_results_of_a_cpu_are_refused(groups, tmp_path, capsys):
    del groups["adam"]["machine"]["gpu"]
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"adam": groups["adam"]}))
    with pytest.raises(SystemExit) as stop:
        fit.main([str(path)])
    assert stop.value.code == 2 and capsys.readouterr().err.endswith("cpu.json: these are results of a CPU\n")
