"""Tables and plots, rendered from the recorded results: `python -m bench.report [--check]`.

In each of PAGES, the text between `<!-- table: NAME -->` and `<!-- end -->` is replaced by the table, or removed where
no results are recorded. The plots are bench/results/*.svg, one for each device; each file also holds the plotted
numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench import plots, tutorial
from bench.floors import Ceilings, Work, floor_seconds
from bench.implementations import OURS
from bench.timing import RESULTS, spread
from char_gru.kernels.plan.costs import EXPECTED_ERROR
from char_gru.kernels.plan.generation import WEIGHTS, generation_plan
from char_gru.kernels.plan.gpus import GPUS, precisions
from char_gru.kernels.plan.training_step import training_step
from char_gru.kernels.variants import VARIANTS, Variant

ROOT = Path(__file__).parents[1]

PAGES = (ROOT / "README.md", ROOT / "bench" / "RESULTS.md", ROOT / "kernels" / "README.md")

PREDICTED_TEXTS = (1, 5, 64)
"""Texts that are written at once, in the table of predictions."""

WHOLE_JOBS = ("train_step", "generate", "time_to_loss")

_MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(?:(?!<!-- table: ).)*?(<!-- end -->)", re.DOTALL)

Figure = Callable[[dict, dict, float], float | None]
"""The number in a column: a function of an entry, one of its candidates, and the median of the candidate's seconds."""


# RESULTS.md

def device_sections(results: Path) -> str:
    """For each device a heading, the circumstances of its runs, and its tables."""
    return "\n\n".join(map(_device_section, _devices(results).values()))


def _device_section(groups: dict) -> str:
    entries = [entry for entry in groups.values() if "candidates" in entry]
    runs: dict[str, list[str]] = {}  # circumstances -> the benchmarks that ran in them
    for entry in entries:
        runs.setdefault(_circumstances(entry), []).append(entry["benchmark"])
    facts = entries[0]["machine"]
    parts = [f"## {facts['gpu'] if 'gpu' in facts else _cpu(facts)}"]
    parts += [f"{', '.join(dict.fromkeys(names))}: {run}" if len(runs) > 1 else run for run, names in runs.items()]
    for title, table, shown in (
            ("A training step", train_step_table, _of(groups, "train_step")),
            ("Training until a loss is reached", time_to_loss_table, _of(groups, "time_to_loss")),
            ("Writing text", generate_table, _of(groups, "generate")),
            ("Each op by itself", ops_table, [entry for entry in entries if entry["benchmark"] not in WHOLE_JOBS])):
        if shown:
            parts += [f"### {title}", table(shown)]
    return "\n\n".join(parts)


def train_step_table(entries: Sequence[dict]) -> str:
    """One training step at each of its sizes."""
    return ("GFLOP/s counts the least operations of a step, the same for every candidate. On a CPU the floor is the "
            "time that its products take at the rate of the library's large product.\n\n") + _jobs_table(entries, {
        "characters/s": lambda entry, made, seconds: _characters(entry, "TB") / seconds,
        "GFLOP/s": lambda entry, made, seconds: entry["work"]["flop"] / seconds / 1e9,
        "times the floor": _times_the_floor,
        "MiB": lambda entry, made, seconds: made.get("memory_mib")})


def time_to_loss_table(entries: Sequence[dict]) -> str:
    """Training until the validation loss is low enough."""
    return "The loss to reach is `TARGET` in `bench/bench_time_to_loss.py`.\n\n" + _jobs_table(
        entries, {"steps": lambda entry, made, seconds: made["steps"]})


def generate_table(entries: Sequence[dict]) -> str:
    """R texts of T characters, for each R."""
    return "R texts of T characters each.\n\n" + _jobs_table(
        entries, {"characters/s": lambda entry, made, seconds: _characters(entry, "TR") / seconds})


def _times_the_floor(entry: dict, made: dict, seconds: float) -> float:
    return seconds / floor_seconds(Work(**entry["work"]), Ceilings(**entry["ceilings"]), made["precision"])


def _characters(entry: dict, axes: str) -> int:
    return math.prod(entry["sizes"][axis] for axis in axes)


def _jobs_table(entries: Sequence[dict], figures: Mapping[str, Figure]) -> str:
    """The candidates of a whole job at each of its sizes, smallest first, with one more column for each figure that
    some candidate has."""
    rows, cells = [], {name: [] for name in figures}
    for entry in sorted(entries, key=lambda entry: [entry["sizes"][axis] for axis in sorted(entry["sizes"])]):
        for index, (name, made) in enumerate(entry["candidates"].items()):
            rows.append([_sizes(entry) if index == 0 else "", name, *_median_and_range(made), _ratio(entry, name)])
            for column, figure in figures.items():
                value = figure(entry, made, spread(made["seconds"]).median)
                cells[column].append("" if value is None else _figures(value))
    shown = {column: values for column, values in cells.items() if any(values)}
    return _table(["sizes", "", "ms", "range", "time against ours", *shown],
                  [[*row, *values] for row, *values in zip(rows, *shown.values(), strict=True)])


def ops_table(entries: Sequence[dict]) -> str:
    """Every op at each of its sizes: time, rates, the share of the nearer ceiling, and the time against the floor."""
    rows = []
    for entry in entries:
        work, ceilings = Work(**entry["work"]), Ceilings(**entry["ceilings"])
        for index, (name, made) in enumerate(entry["candidates"].items()):
            seconds = spread(made["seconds"]).median
            of_memory = work.bytes / seconds / ceilings.bytes_per_second
            of_arithmetic = work.flop / seconds / ceilings.flop_per_second[made["precision"]]
            ceiling = (f"{of_memory:.0%} of memory" if of_memory >= of_arithmetic else
                       f"{of_arithmetic:.0%} of product")
            median, low_to_high = _median_and_range(made)
            rows.append([f"{entry['benchmark']} ({_sizes(entry)})" if index == 0 else "", name,
                         median + " †" * made["host_bound"], low_to_high, _figures(work.bytes / seconds / 1e9),
                         _figures(work.flop / seconds / 1e9) if work.flop else "", ceiling,
                         f"{_times_the_floor(entry, made, seconds):.1f}"])
    table = _table(["op", "", "ms", "range", "GB/s", "GFLOP/s", "of the ceiling", "times the floor"], rows)
    slow = any(made["host_bound"] for entry in entries for made in entry["candidates"].values())
    return table + "\n\n† the host queued the calls more slowly than the GPU ran them." * slow


def plots_table(results: Path) -> str:
    """All plots, as RESULTS.md shows them."""
    return "\n\n".join(f"![{path.stem}](results/{path.name})" for path in plots_of(results))


def init_table(results: Path) -> str:
    """Losses by epoch of the training runs whose metrics are kept as NAME.metrics.jsonl."""
    rows = []
    for path in sorted(results.glob("*.metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rows.append([path.name.removesuffix(".metrics.jsonl"),
                     *(f"{line['train_loss']:.4f} / {line['val_loss']:.4f}" for line in lines if "step" not in line)])
    if not rows:
        return ""
    epochs = max(map(len, rows)) - 1
    return _table(["training / validation", *(f"epoch {epoch + 1}" for epoch in range(epochs))], rows)


# README.md and kernels/README.md

def kernels_table(results: Path) -> str:
    """Every variant of every op, and the GPUs from which results of the variant are recorded."""
    gpus = _devices(results, "cuda").values()
    rows = []
    for op, variant in _ops_shown_once():
        ran = {entry["machine"]["gpu"] for groups in gpus for entry in _of(groups, variant.benchmark)
               if any(_is_of(variant, name) for name in entry["candidates"])}
        rows.append([op, f"{variant.variant}: {variant.text}", variant.precisions,
                     f"yes: {', '.join(sorted(ran))}" if ran else "no"])
    return _table(["op", "variant", "products in", "has run on a GPU"], rows)


def _is_of(variant: Variant, candidate: str) -> bool:
    """Whether a candidate, by its name, runs the variant."""
    words = candidate.split()
    return words[0] == OURS and (variant.word in words if variant.word else "naive" not in words)


def files_table(results: Path) -> str:
    """Where every variant of every op is: links relative to kernels/."""
    rows = [[op, variant.variant, ", ".join(f"[`{file}`]({file})" for file in variant.files),
             ", ".join(f"`{kernel}`" for kernel in variant.kernels),
             f"[`{variant.test}`](../tests/{variant.test})"] for op, variant in _ops_shown_once()]
    return _table(["op", "variant", "file", "kernels", "test"], rows)


def _ops_shown_once() -> Iterator[tuple[str, Variant]]:
    """Op and variant of each row; the op is empty where it is the op of the row before."""
    before = ""
    for variant in VARIANTS:
        yield "" if variant.op == before else variant.op, variant
        before = variant.op


def headline(results: Path) -> str:
    """A sentence for each device: one training step and one text, and the step against the other libraries."""
    jobs = ([_tutorial(groups, name) for name in ("train_step", "generate")] for groups in _devices(results).values())
    return "\n\n".join(_headline(step, texts) for step, texts in jobs if step and texts)


def _headline(step: dict, texts: dict) -> str:
    facts, sizes = step["machine"], step["sizes"]
    ours, written = (spread(_ours(entry)["seconds"]).median for entry in (step, texts))
    peers = [f"{_ratio(step, name, 1)} times as fast as {name}"
             for name in step["candidates"] if not name.startswith(OURS)]
    rates = ", ".join([f"{sizes['T'] * sizes['B'] / ours:,.0f} characters/s", *peers])
    where = f"an {facts['gpu']}" if "gpu" in facts else f"{_count(facts['cores'], 'core')} of {_cpu_name(facts)}"
    return (f"On {where}, a training step of the tutorial's model takes {_figures(ours)} s ({rates}), and writing "
            f"{texts['sizes']['T']:,} characters {_figures(written)} s.")


def drift_table(results: Path) -> str:
    """How far training runs drift from float64: a result of `python -m tests.host_ptx.drift`, which has more."""
    path = results / "drift.json"
    if not path.exists():
        return ""
    recorded = json.loads(path.read_text())
    precisions = list(dict.fromkeys(entry["precision"] for entry in recorded["runs"]))
    rows: dict[str, dict[str, str]] = {}  # run -> precision -> cell
    for entry in recorded["runs"]:
        if entry["from"] == "float64":
            cell = ", ".join(f"{entry[name]:.1e}" for name in ("loss", "weights"))
            rows.setdefault(entry["run"], {})[entry["precision"]] = cell
    table = _table(["run", *precisions], [[run, *(cells.get(precision, "") for precision in precisions)]
                                          for run, cells in rows.items()])
    facts, sizes = recorded["machine"], ", ".join(f"{axis} {size}" for axis, size in recorded["sizes"].items())
    time = f"{recorded['cpu_seconds'] / 60:.0f} minutes of CPU time on {_cpu(facts)}; {facts['date']}"
    return f"{table}\n\nModel and run: {sizes}. {time}, commit {facts['commit']}."


def predictions_table(results: Path) -> str:
    """What the plans predict for the tutorial's model on an H100, from kernels/plan and not from results: a training
    step, its floor, and a character of several texts at once."""
    gpu, sizes, rows = GPUS["h100"], tutorial.SIZES, []
    for precision in precisions(gpu):
        step = training_step(gpu, tutorial.T, tutorial.B, sizes.V, sizes.E, sizes.H, sizes.layers, precision)
        times = [sum(column) / 1e3 for column in zip(*((row.us, row.floor_us) for row in step))]
        weights = precision if precision in WEIGHTS else "fp32"
        plans = (generation_plan(gpu, R, sizes.V, sizes.H, sizes.layers, weights) for R in PREDICTED_TEXTS)
        rows.append([precision, *map(_figures, times), *(f"{plan.predicted_us:.1f}" for plan in plans)])
    texts = [f"us a character, {_count(R, 'text')}" for R in PREDICTED_TEXTS]
    return (_table(["precision", "ms a step", "floor", *texts], rows)
            + f"\n\nExpect a predicted time to be wrong by some {EXPECTED_ERROR:.0%}.")


TABLES: Mapping[str, Callable[[Path], str]] = {
    "headline": headline, "kernels": kernels_table, "files": files_table, "devices": device_sections,
    "plots": plots_table, "init": init_table, "drift": drift_table, "predictions": predictions_table}
"""The tables that a page can show, each a function of the folder of results."""


def filled(text: str, results: Path = RESULTS) -> str:
    """A text with every marked table made anew from the results.

    Raises: ValueError for a table that does not exist or that has no end.
    """
    unknown = set(re.findall(r"<!-- table: (\S+)", text)) - TABLES.keys()
    if unknown:
        raise ValueError(f"there is no table {', '.join(sorted(unknown))}; the tables are {', '.join(TABLES)}")
    if len(_MARKED.findall(text)) != text.count("<!-- table: "):
        raise ValueError("a line <!-- table: NAME --> has no <!-- end --> before the next one")

    def replaced(match: re.Match) -> str:
        table = TABLES[match[2]](results)
        return match[1] + (table + "\n" if table else "") + match[3]

    return _MARKED.sub(replaced, text)


def plots_of(results: Path) -> dict[Path, list[plots.Panel]]:
    """The plot of each device: its ops, each at the first of its sizes."""
    ops = {path.with_name(f"{path.stem}-ops.svg"): [
        plots.against_floor(entry) for entry in groups.values()
        if entry["tutorial"] and "candidates" in entry and entry["benchmark"] not in WHOLE_JOBS]
        for path, groups in _devices(results).items()}
    return {path: panels for path, panels in ops.items() if panels}


def main(arguments: Sequence[str] | None = None, pages: Sequence[Path] = PAGES, results: Path = RESULTS) -> int:
    """Fill the tables and draw the plots. Exit status 0; with --check nothing is written, and 1 says what differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Write the pages' tables, draw plots.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if tables or plots differ")
    check, wanted = parser.parse_args(arguments).check, plots_of(results)
    texts = {page: filled(page.read_text(), results) for page in pages}
    old_pages = [page for page, text in texts.items() if page.read_text() != text]
    old_plots = [path for path, panels in wanted.items() if plots.drawn(path) != json.dumps(panels)]
    surplus = sorted(set(results.glob("*.svg")) - wanted.keys())
    if check:
        differing = [path.name for path in (*old_pages, *old_plots, *surplus)]
        if differing:
            print(f"{', '.join(differing)}: differs from bench/results; run python -m bench.report", file=sys.stderr)
        return 1 if differing else 0
    for page in old_pages:
        page.write_text(texts[page])
    for path in old_plots:
        plots.draw(path, wanted[path])
    for path in surplus:
        path.unlink()
    return 0


def _devices(results: Path, kind: str = "*") -> dict[Path, dict]:
    """Path of each device's file -> its groups, of all devices or of one kind; GPUs first."""
    paths = sorted(results.glob(f"{kind}-*.json"), key=lambda path: (path.name.startswith("cpu"), path.name))
    return {path: json.loads(path.read_text()) for path in paths}


def _of(groups: dict, benchmark: str) -> list[dict]:
    """A benchmark's entries."""
    return [entry for entry in groups.values() if entry["benchmark"] == benchmark]


def _tutorial(groups: dict, benchmark: str) -> dict | None:
    """A benchmark's entry for the tutorial's sizes."""
    return next((entry for entry in _of(groups, benchmark) if entry["tutorial"]), None)


def _ours(entry: dict, precision: str | None = None) -> dict:
    """The fastest candidate of char-gru; if there is a precision, the fastest in it, where char-gru has any in it."""
    ours = [made for name, made in entry["candidates"].items() if name.startswith(OURS)]
    equal = [made for made in ours if made["precision"] == precision]
    return min(equal or ours, key=lambda made: statistics.median(made["seconds"]))


def _ratio(entry: dict, name: str, decimals: int = 2) -> str:
    """Time of a candidate against char-gru's fastest in its precision: the median of the ratios within each round."""
    made = entry["candidates"][name]
    ratios = (other / ours for other, ours in zip(made["seconds"], _ours(entry, made["precision"])["seconds"]))
    return f"{statistics.median(ratios):.{decimals}f}"


def _sizes(entry: dict) -> str:
    return ", ".join(f"{axis} {size:,}" for axis, size in entry["sizes"].items())


def _median_and_range(made: dict) -> tuple[str, str]:
    """Median, and lowest to highest, of a candidate's rounds, in milliseconds."""
    median, low, high = (_figures(1e3 * seconds) for seconds in spread(made["seconds"]))
    return median, f"{low} to {high}"


def _circumstances(entry: dict) -> str:
    """Where and when an entry was measured, and the ceilings of that run."""
    facts, ceilings = entry["machine"], Ceilings(**entry["ceilings"])
    rounds = len(next(iter(entry["candidates"].values()))["seconds"])
    rates = ", ".join(f"{_figures(rate / 1e9)} GFLOP/s in {precision}"
                      for precision, rate in ceilings.flop_per_second.items())
    costs = (f"; {_figures(1e6 * ceilings.launch_seconds)} us from launch to launch, "
             f"{_figures(1e6 * ceilings.barrier_seconds)} us for a barrier among all blocks, "
             f"{_figures(1e6 * ceilings.exchange_seconds)} us for an exchange of words among them") * ("gpu" in facts)
    return (f"{_libraries(facts)}. {_count(rounds, 'interleaved round')}; {facts['date']}, commit {facts['commit']}. "
            f"Ceilings: memory {_figures(ceilings.bytes_per_second / 1e9)} GB/s, the library's large product "
            f"{rates}{costs}.")


def _libraries(facts: dict) -> str:
    """The machine, and the versions of the libraries that are compared."""
    numpy = [facts["blas"]]
    if facts["blas_kernels"]:
        numpy += [f"kernels {facts['blas_kernels']}", _count(facts["blas_threads"], "thread")]
    torch = [_count(facts["torch_threads"], "thread")] if facts["torch"] else []
    gpu = []
    if "gpu" in facts:
        gpu = [facts["gpu"], f"driver {facts['driver']}, CUDA {facts['cuda_runtime']}, CuPy {facts['cupy']}"]
    return ", ".join([
        *gpu, f"{_cpu(facts)}; Python {facts['python']}",
        _library("NumPy", facts["numpy"], numpy), _library("PyTorch", facts["torch"], torch),
        _library("JAX", facts["jax"], []), _library("Keras", facts["keras"], []),
        *([_library("onnxruntime", facts["onnxruntime"], [])] if "onnxruntime" in facts and not gpu else []),
        *([_library("FlashRNN", facts["flashrnn"], [])] if gpu else [])])


def _cpu(facts: dict) -> str:
    return f"{_cpu_name(facts)}, {_count(facts['cores'], 'core')}"


def _cpu_name(facts: dict) -> str:
    """The processor without what its maker adds: `Intel(R) Xeon(R) Processor @ 2.50GHz` is Intel Xeon."""
    return re.sub(r"\(R\)| Processor| @ .*", "", facts["cpu"])


def _library(name: str, version: str | None, details: list[str]) -> str:
    if version is None:
        return f"{name} not installed and so left out"
    return f"{name} {version} ({', '.join(details)})" if details else f"{name} {version}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _figures(value: float) -> str:
    """A number with three significant digits, or with all digits of its whole part."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{decimals}f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
