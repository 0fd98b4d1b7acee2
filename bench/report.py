"""Tables of README.md and plots, rendered from the recorded results: `python -m bench.report [--check]`.

The text between `<!-- table: NAME -->` and `<!-- end -->` is replaced, by nothing where nothing was recorded; README.md
decides which tables it shows. Plots are bench/results/*.svg, of each device; what they show is kept in them as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import plots
from bench.floors import Ceilings, Work, floor_seconds
from bench.implementations import OURS
from bench.timing import RESULTS, spread

README = Path(__file__).parent.parent / "README.md"

WHOLE_JOBS = ("train_step", "generate", "time_to_loss")

_ALL = "fp32, tf32, bf16"
_WEIGHTS = "fp32, or bf16 weights"

KERNELS = (
    ("matrix product", "pipelined: three stages of asynchronous copies, tiles of 192 or 256 x 128, one wave of blocks "
     "where it can be; sm_80 on", _ALL, "matmul", "pipelined"),
    ("", "tiled: two stages in shared memory, split along K where tiles are few; any size, any GPU", _ALL, "matmul",
     "tiled"),
    ("input table and its gradients", "matrix products and column sums", _ALL, "input_table_backward", ""),
    ("GRU forward", "persistent: the window in one launch, W_hh on chip, batch groups, one barrier per step", _ALL,
     "gru_forward", "persistent"),
    ("", "stepwise: one launch per time step, product, gates and state update fused", _ALL, "gru_forward", "stepwise"),
    ("GRU backward", "persistent: as forward; dlogits W_out folded in, sums of da and of di by character on chip, K "
     "split among blocks where that pays", _ALL, "gru_backward", "persistent"),
    ("", "stepwise: one launch per time step, split by gate; sums of di by character after a stable radix sort of "
     "positions", _ALL, "gru_backward", "stepwise"),
    ("output layer, softmax, loss, dlogits", "one launch; logits of up to 80 characters never leave the chip", _ALL,
     "cross_entropy_forward", ""),
    ("dropout", "one pass over the data", "", "dropout_forward", ""),
    ("global norm", "one pass over the data", "", "global_norm", ""),
    ("clipping and Adam", "one pass over the data", "", "adam", ""),
    ("sampling", "one block per text; top-k and top-p by ranks up to 257 characters, above by digits of the cut", "",
     "sample", ""),
    ("generation", "persistent: all characters of a call in one launch, weights on chip, through L2 what does not fit; "
     "layers + 1 barriers per character", _WEIGHTS, "generate", "persistent"),
    ("", "persistent-all-draw: every block sums all logits and draws the same character, so a barrier less; for one "
     "text", _WEIGHTS, "generate", "persistent-all-draw"),
    ("", "batched: as persistent, for one layer and nine or more texts; on tensor cores (sm_80 on), fp32 numbers as "
     "two tf32 parts, three products for one", _WEIGHTS, "generate", "batched"),
    ("", "stepwise: layers + 2 kernels per character, eight characters to a CUDA graph", _WEIGHTS, "generate",
     "stepwise"),
)
"""Op, variant, what its products are in; and which results say that it has run: benchmark, and a word of the name."""

_MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(?:(?!<!-- table: ).)*?(<!-- end -->)", re.DOTALL)


def train_step_flop(T: int, B: int, V: int, E: int, H: int) -> int:
    """Floating-point operations of one step in the products with W_hh and W_out: forward, and twice that backward.

    Every candidate is credited with these. The input products are left out, since a table needs V rows
    of them and a plain product T*B.
    """
    return 3 * 2 * T * B * (3 * H * H + H * V)


def train_step_table(entry: dict, memory: dict | None = None) -> str:
    """The recorded `train_step` at the tutorial's sizes as markdown, with the memory of a whole run if recorded."""
    sizes = entry["sizes"]
    characters, flop = sizes["T"] * sizes["B"], train_step_flop(**sizes)
    more = [note for note in ("memory_mib", "joules") if any(note in made for made in entry["candidates"].values())]
    rows = []
    for name, made in entry["candidates"].items():
        median, low, high = spread(made["seconds"])
        rows.append([name, _figures(1e3 * median), f"{_figures(1e3 * low)} to {_figures(1e3 * high)}",
                     f"{characters / median:,.0f}", _figures(flop / median / 1e9), _ratio(entry, name),
                     *(_figures(made[note]) if note in made else "" for note in more)])
    table = _table(["", "ms per step", "range", "characters/s", "GFLOP/s", "time against ours",
                    *({"memory_mib": "MiB", "joules": "J"}[note] for note in more)], rows)
    text = (f"{_circumstances(entry)}\n\n{table}\n\n"
            f"{_figures(flop / 1e9)} GFLOP per step in recurrence and output layer.")
    return text if memory is None else (
        f"{text} A whole run of `train.py` takes {memory['peak_memory_mib']:,.0f} MiB at most.")


def generate_table(entries: Sequence[dict]) -> str:
    """The recorded `generate` for each number of texts as markdown."""
    rows = []
    for entry in sorted(entries, key=lambda entry: entry["sizes"]["R"]):
        number = entry["sizes"]["R"]
        for name, made in entry["candidates"].items():
            median, low, high = spread(made["seconds"])
            rows.append([f"{number}", name, _figures(median), f"{_figures(low)} to {_figures(high)}",
                         f"{number * entry['sizes']['T'] / median:,.0f}", _ratio(entry, name)])
    table = _table(["texts", "", "s", "range", "characters/s", "time against ours"], rows)
    return f"{_circumstances(entries[0])}\n\n{table}"


def scaling_table(entries: Sequence[dict]) -> str:
    """Milliseconds of a training step at every recorded size, a column for each candidate."""
    names = list(dict.fromkeys(name for entry in entries for name in entry["candidates"]))
    ordered = sorted(entries, key=lambda entry: tuple(entry["sizes"][axis] for axis in "HBT"))
    rows = [[*(f"{entry['sizes'][axis]:,}" for axis in "HBT"),
             *(_milliseconds(entry["candidates"].get(name)) for name in names)] for entry in ordered]
    return "Milliseconds of a training step at other sizes:\n\n" + _table(["H", "B", "T", *names], rows)


def ops_table(entries: Sequence[dict]) -> str:
    """Every op at one of its sizes: time, rates, what share of the nearer ceiling that is, and of the floor."""
    rows = []
    for entry in entries:
        work, ceilings = Work(**entry["work"]), Ceilings(**entry["ceilings"])
        for index, (name, made) in enumerate(entry["candidates"].items()):
            median, low, high = spread(made["seconds"])
            of_memory = work.bytes / median / ceilings.bytes_per_second
            of_arithmetic = work.flop / median / ceilings.flop_per_second[made["precision"]]
            ceiling = (f"{of_memory:.0%} of memory" if of_memory >= of_arithmetic else
                       f"{of_arithmetic:.0%} of product")
            floor = floor_seconds(work, ceilings, made["precision"])
            rows.append([f"{entry['benchmark']} ({_sizes(entry)})" if index == 0 else "", name,
                         _figures(1e3 * median) + " †" * made["host_bound"],
                         f"{_figures(1e3 * low)} to {_figures(1e3 * high)}", _figures(work.bytes / median / 1e9),
                         _figures(work.flop / median / 1e9) if work.flop else "", ceiling, f"{median / floor:.1f}"])
    table = _table(["op", "", "ms", "range", "GB/s", "GFLOP/s", "of the ceiling", "times the floor"], rows)
    ceilings = Ceilings(**entries[0]["ceilings"])
    rates = ", ".join(f"{_figures(rate / 1e9)} GFLOP/s in {precision}"
                      for precision, rate in ceilings.flop_per_second.items())
    text = (f"{_circumstances(entries[0])} Ceilings measured in the same run: memory "
            f"{_figures(ceilings.bytes_per_second / 1e9)} GB/s, the library's large product {rates}")
    if ceilings.launch_seconds:
        text += (f"; {_figures(1e6 * ceilings.launch_seconds)} us from launch to launch, "
                 f"{_figures(1e6 * ceilings.barrier_seconds)} us for a barrier among all blocks")
    slow = any(made["host_bound"] for entry in entries for made in entry["candidates"].values())
    return f"Each op by itself. {text}.\n\n{table}" + "\n\n† launched more slowly than it runs." * slow


def time_to_loss_table(entry: dict) -> str:
    """Steps until the validation loss is reached, and their time."""
    rows = []
    for name, made in entry["candidates"].items():
        median, low, high = spread(made["seconds"])
        rows.append([name, f"{made['steps']:,}", _figures(median), f"{_figures(low)} to {_figures(high)}",
                     _ratio(entry, name)])
    table = _table(["", "steps", "s", "range", "time against ours"], rows)
    return (f"Training until the validation loss is below that of `bench/bench_time_to_loss.py`, {_sizes(entry)}. "
            f"{_circumstances(entry)}\n\n{table}")


def kernels_table(results: Path) -> str:
    """Every variant of every op, and the GPUs that results of it are recorded from."""
    gpus = list(_machines(results, "cuda"))
    rows = []
    for op, variant, precisions, benchmark, word in KERNELS:
        ran = {entry["machine"]["gpu"] for groups in gpus for entry in _of(groups, benchmark)
               if any(name.startswith(OURS) and word in ("", *name.split()) for name in entry["candidates"])}
        rows.append([op, variant, precisions, f"yes: {', '.join(sorted(ran))}" if ran else "no"])
    return _table(["op", "variant", "products in", "has run on a GPU"], rows)


def headline(results: Path) -> str:
    """A sentence for each machine: one training step and one text, and the step against the other libraries."""
    sentences = []
    for kind in ("cuda", "cpu"):
        for groups in _machines(results, kind):
            step, texts = _tutorial(groups, "train_step"), _tutorial(groups, "generate")
            if step and texts:
                sentences.append(_headline(step, texts))
    return "\n\n".join(sentences)


def _headline(step: dict, texts: dict) -> str:
    facts, sizes = step["machine"], step["sizes"]
    ours, written = (spread(_ours(entry)["seconds"]).median for entry in (step, texts))
    peers = [f"{_ratio(step, name, 1)} times as fast as {name}"
             for name in step["candidates"] if not name.startswith(OURS)]
    rates = ", ".join([f"{sizes['T'] * sizes['B'] / ours:,.0f} characters/s", *peers])
    where = f"an {facts['gpu']}" if "gpu" in facts else f"{_count(facts['cores'], 'core')} of {facts['cpu']}"
    return (f"On {where}, a training step of the tutorial's model takes {_figures(ours)} s ({rates}), and writing "
            f"{texts['sizes']['T']:,} characters {_figures(written)} s.")


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


def _axes(entries: Sequence[dict]) -> dict[str, list[str]]:
    """The axes of each benchmark."""
    return {entry["benchmark"]: list(entry["sizes"]) for entry in entries}


def plots_table(results: Path) -> str:
    """All plots, as README.md shows them."""
    return "\n\n".join(f"![{path.stem}](bench/results/{path.name})" for path in plots_of(results))


def _train_step(groups: dict) -> str:
    entry = _tutorial(groups, "train_step")
    return train_step_table(entry, groups.get("train_memory")) if entry else ""


def _generate(groups: dict) -> str:
    one = _tutorial(groups, "generate")
    entries = [entry for entry in _of(groups, "generate") if one and entry["sizes"]["H"] == one["sizes"]["H"]]
    return generate_table(entries) if entries else ""


def _scaling(groups: dict) -> str:
    entries = _of(groups, "train_step")
    return scaling_table(entries) if len(entries) > 1 else ""


def _ops(groups: dict) -> str:
    entries = [entry for entry in groups.values()
               if entry["tutorial"] and "candidates" in entry and entry["benchmark"] not in WHOLE_JOBS]
    return ops_table(entries) if entries else ""


def _time_to_loss(groups: dict) -> str:
    return "\n\n".join(map(time_to_loss_table, _of(groups, "time_to_loss")))


_OF_A_MACHINE = {"train-step": _train_step, "generate": _generate, "scaling": _scaling, "ops": _ops,
                 "time-to-loss": _time_to_loss}

TABLES: dict[str, Callable[[Path], str]] = {"headline": headline, "init": init_table, "kernels": kernels_table,
                                            "plots": plots_table} | {
    f"{name}-{kind}": lambda results, render=render, kind=kind: "\n\n".join(
        filter(None, map(render, _machines(results, kind))))
    for name, render in _OF_A_MACHINE.items() for kind in ("cpu", "cuda")}
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


def plots_of(results: Path) -> dict[Path, list[plots.Panel]]:
    """What there is to plot of each device: its ops at the tutorial's sizes, and what was measured at several sizes."""
    drawn = {}
    for kind in ("cpu", "cuda"):
        for path in sorted(results.glob(f"{kind}-*.json")):
            groups = json.loads(path.read_text())
            timed = [entry for entry in groups.values() if "candidates" in entry]
            ops = [plots.against_floor(entry) for entry in timed
                   if entry["tutorial"] and entry["benchmark"] not in WHOLE_JOBS]
            over_sizes = [plots.against_size(_of(groups, benchmark), axis)
                          for benchmark, axes in _axes(timed).items() for axis in axes]
            drawn |= {path.with_name(f"{path.stem}-{name}.svg"): panels
                      for name, panels in (("ops", ops), ("sizes", list(filter(None, over_sizes)))) if panels}
    return drawn


def main(arguments: Sequence[str] | None = None, readme: Path = README, results: Path = RESULTS) -> int:
    """Fill the tables and draw the plots. Exit status 0; with --check nothing is written, and 1 says what differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Write README.md's tables, draw plots.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if tables or plots differ")
    check = parser.parse_args(arguments).check
    before, wanted = readme.read_text(), plots_of(results)
    after = filled(before, results)
    stale = [path for path, panels in wanted.items() if plots.drawn(path) != panels]
    surplus = sorted(set(results.glob("*.svg")) - wanted.keys())
    if not check:
        readme.write_text(after)
        for path in stale:
            plots.draw(path, wanted[path])
        for path in surplus:
            path.unlink()
        return 0
    differing = [readme.name] * (after != before) + [path.name for path in (*stale, *surplus)]
    if differing:
        print(f"{', '.join(differing)}: not what bench/results gives; run python -m bench.report", file=sys.stderr)
    return 1 if differing else 0


def _machines(results: Path, kind: str) -> Iterator[dict]:
    """The groups of each device of a kind."""
    return (json.loads(path.read_text()) for path in sorted(results.glob(f"{kind}-*.json")))


def _of(groups: dict, benchmark: str) -> list[dict]:
    """A benchmark's entries."""
    return [entry for entry in groups.values() if entry["benchmark"] == benchmark]


def _tutorial(groups: dict, benchmark: str) -> dict | None:
    """A benchmark's entry for the tutorial's sizes."""
    return next((entry for entry in _of(groups, benchmark) if entry["tutorial"]), None)


def _ours(entry: dict, precision: str | None = None) -> dict:
    """Our fastest candidate; where one has that precision, the fastest in it."""
    ours = [made for name, made in entry["candidates"].items() if name.startswith(OURS)]
    equal = [made for made in ours if made["precision"] == precision]
    return min(equal or ours, key=lambda made: statistics.median(made["seconds"]))


def _ratio(entry: dict, name: str, decimals: int = 2) -> str:
    """Time of a candidate against ours in its precision: the median of the ratios within each round."""
    made = entry["candidates"][name]
    ratios = (other / ours for other, ours in zip(made["seconds"], _ours(entry, made["precision"])["seconds"]))
    return f"{statistics.median(ratios):.{decimals}f}"


def _sizes(entry: dict) -> str:
    return ", ".join(f"{axis} {size:,}" for axis, size in entry["sizes"].items())


def _milliseconds(made: dict | None) -> str:
    return _figures(1e3 * spread(made["seconds"]).median) if made else ""


def _circumstances(entry: dict) -> str:
    facts, rounds = entry["machine"], len(next(iter(entry["candidates"].values()))["seconds"])
    numpy = [facts["blas"]]
    if facts["blas_kernels"]:
        numpy += [f"kernels {facts['blas_kernels']}", _count(facts["blas_threads"], "thread")]
    torch = [_count(facts["torch_threads"], "thread")] if facts["torch"] else []
    gpu = []
    if "gpu" in facts:
        gpu = [facts["gpu"], f"driver {facts['driver']}, CUDA {facts['cuda_runtime']}, CuPy {facts['cupy']}"]
    return ", ".join([
        *gpu, facts["cpu"], f"{_count(facts['cores'], 'core')}; Python {facts['python']}",
        _library("NumPy", facts["numpy"], numpy), _library("PyTorch", facts["torch"], torch),
        _library("JAX", facts["jax"], []), _library("Keras", facts["keras"], []),
        *([_library("FlashRNN", facts["flashrnn"], [])] if gpu else []),
    ]) + f". Median and range of {_count(rounds, 'interleaved round')}; {facts['date']}, {facts['commit']}."


def _library(name: str, version: str | None, details: list[str]) -> str:
    if version is None:
        return f"{name} not installed and so left out"
    return f"{name} {version} ({', '.join(details)})" if details else f"{name} {version}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _figures(value: float) -> str:
    """Three significant digits, all digits of the whole part."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{decimals}f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
