"""Tables of README.md, rendered from the recorded results: `python -m bench.report [--check]`.

The text between `<!-- table: NAME -->` and `<!-- end -->` is replaced, by nothing where nothing was recorded; README.md
decides which tables it shows.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.timing import RESULTS, spread

README = Path(__file__).parent.parent / "README.md"

OURS = "char-gru"

_MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(?:(?!<!-- table: ).)*?(<!-- end -->)", re.DOTALL)


def train_step_flop(T: int, B: int, V: int, E: int, H: int) -> int:
    """Floating-point operations of one step in the products with W_hh and W_out: forward, and twice that backward.

    Every candidate is credited with these. The input products are left out, since a table needs V rows
    of them and a plain product T*B.
    """
    return 3 * 2 * T * B * (3 * H * H + H * V)


def train_step_table(entry: dict) -> str:
    """One recorded `train_step` as markdown."""
    sizes, seconds = entry["sizes"], entry["results"]["seconds"]
    characters, flop = sizes["T"] * sizes["B"], train_step_flop(**sizes)
    rows = []
    for name, values in seconds.items():
        median, low, high = spread(values)
        rows.append([name, _figures(1e3 * median), f"{_figures(1e3 * low)} to {_figures(1e3 * high)}",
                     f"{characters / median:,.0f}", _figures(flop / median / 1e9), f"{_ratio(seconds, name):.2f}"])
    table = _table(["", "ms per step", "range", "characters/s", "GFLOP/s", "time against ours"], rows)
    memory = entry["results"]["peak_memory_mib"]
    return (f"{_circumstances(entry, len(seconds[OURS]))}\n\n{table}\n\n"
            f"{_figures(flop / 1e9)} GFLOP per step in recurrence and output layer. "
            f"A whole run of `train.py` takes {memory:,.0f} MiB at most.")


def generate_table(entry: dict) -> str:
    """One recorded `generate` as markdown."""
    length, by_rows = entry["sizes"]["length"], entry["results"]["seconds_by_rows"]
    rows = []
    for number, seconds in sorted(by_rows.items(), key=lambda item: int(item[0])):
        for name, values in seconds.items():
            median, low, high = spread(values)
            rows.append([number, name, _figures(median), f"{_figures(low)} to {_figures(high)}",
                         f"{int(number) * length / median:,.0f}", f"{_ratio(seconds, name):.2f}"])
    table = _table(["texts", "", "s", "range", "characters/s", "time against ours"], rows)
    return f"{_circumstances(entry, len(by_rows['1'][OURS]))}\n\n{table}"


BENCHMARKS: dict[str, Callable[[dict], str]] = {"train_step": train_step_table, "generate": generate_table}
"""How the entry of each benchmark is rendered."""


def headline(results: Path) -> str:
    """A sentence for each machine: one training step and one text, and the step against the other libraries."""
    sentences = []
    for entries in _machines(results):
        if not BENCHMARKS.keys() <= entries.keys():
            continue
        step, texts = entries["train_step"], entries["generate"]
        facts, sizes, seconds = step["machine"], step["sizes"], step["results"]["seconds"]
        median = spread(seconds[OURS]).median
        peers = [f"{_ratio(seconds, name):.1f} times as fast as {name}" for name in seconds if name != OURS]
        rates = ", ".join([f"{sizes['T'] * sizes['B'] / median:,.0f} characters/s", *peers])
        written = spread(texts["results"]["seconds_by_rows"]["1"][OURS]).median
        sentences.append(
            f"On {_count(facts['cores'], 'core')} of {facts['cpu']}, a training step of the tutorial's model takes "
            f"{_figures(median)} s ({rates}), and writing {texts['sizes']['length']:,} characters "
            f"{_figures(written)} s.")
    return "\n\n".join(sentences)


def init_table(results: Path) -> str:
    """Losses by epoch of the training runs whose metrics are kept as NAME.metrics.jsonl."""
    rows = []
    for path in sorted(results.glob("*.metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rows.append([path.name.removesuffix(".metrics.jsonl"),
                     *(f"{line['train_loss']:.4f} / {line['val_loss']:.4f}" for line in lines if "train_loss" in line)])
    if not rows:
        return ""
    epochs = max(map(len, rows)) - 1
    return _table(["training / validation", *(f"epoch {epoch + 1}" for epoch in range(epochs))], rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "headline": headline,
    "train-step-cpu": lambda results: _of_each_machine("train_step", results),
    "generate-cpu": lambda results: _of_each_machine("generate", results),
    "init": init_table,
}
"""The tables that README.md can show, each a function of the folder of results."""


def filled(text: str, results: Path = RESULTS) -> str:
    """A text with every marked table replaced by what the results give.

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


def main(arguments: Sequence[str] | None = None, readme: Path = README, results: Path = RESULTS) -> int:
    """Fill the tables. Exit status 0; with --check nothing is written, and 1 says that the tables differ."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Write the tables of README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the tables differ")
    check = parser.parse_args(arguments).check
    before = readme.read_text()
    after = filled(before, results)
    if check and after != before:
        print(f"{readme.name}: the tables differ from bench/results; run python -m bench.report", file=sys.stderr)
        return 1
    if not check:
        readme.write_text(after)
    return 0


def _machines(results: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(results.glob("cpu-*.json"))]


def _of_each_machine(benchmark: str, results: Path) -> str:
    return "\n\n".join(BENCHMARKS[benchmark](entries[benchmark]) for entries in _machines(results)
                       if benchmark in entries)


def _ratio(seconds: dict[str, list[float]], name: str) -> float:
    """Time of a candidate against ours: the median of the ratios within each round."""
    return statistics.median(other / ours for other, ours in zip(seconds[name], seconds[OURS]))


def _circumstances(entry: dict, rounds: int) -> str:
    facts = entry["machine"]
    numpy = [facts["blas"]]
    if facts["blas_kernels"]:
        numpy += [f"kernels {facts['blas_kernels']}", _count(facts["blas_threads"], "thread")]
    torch = [_count(facts["torch_threads"], "thread")] if facts["torch"] else []
    return ", ".join([
        facts["cpu"], f"{_count(facts['cores'], 'core')}; Python {facts['python']}",
        _library("NumPy", facts["numpy"], numpy), _library("PyTorch", facts["torch"], torch),
        _library("JAX", facts["jax"], []),
    ]) + f". Median and range of {_count(rounds, 'interleaved round')}; {facts['date']}, {facts['commit']}."


def _library(name: str, version: str | None, details: list[str]) -> str:
    if version is None:
        return f"{name} not installed and so left out"
    return f"{name} {version} ({', '.join(details)})" if details else f"{name} {version}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _figures(value: float) -> str:
    """Three significant digits, all digits of the whole part."""
    decimals = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{decimals}f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
