"""Plots as SVG files that are the same for the same results, and that hold what they show as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from bench.floors import Ceilings, Work, floor_seconds
from bench.timing import spread

_DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"

_SETTINGS = {"svg.hashsalt": "char-gru", "svg.fonttype": "none", "figure.constrained_layout.use": True, "font.size": 8}


class Panel(NamedTuple):
    """One diagram, all times in milliseconds. bars: name -> (median, lowest, highest, floor), or lines: name -> points
    (size, median), over the axis."""

    title: str
    axis: str
    bars: dict[str, list[float]]
    lines: dict[str, list[list[float]]]


def against_floor(entry: dict) -> Panel:
    """The candidates of an op beside the floor."""
    work, ceilings = Work(**entry["work"]), Ceilings(**entry["ceilings"])
    sizes = " ".join(f"{axis}={size}" for axis, size in entry["sizes"].items())
    bars = {name: [_milliseconds(seconds) for seconds in
                   (*spread(made["seconds"]), floor_seconds(work, ceilings, made["precision"]))]
            for name, made in entry["candidates"].items()}
    return Panel(f"{entry['benchmark']} {sizes}", "", bars, {})


def against_size(entries: Sequence[dict], axis: str) -> Panel | None:
    """The candidates of a benchmark over one size, of entries that differ in it alone; None for fewer than two.

    The floor is that of the fastest precision.
    """
    alike: dict[str, list[dict]] = {}
    for entry in entries:
        others = " ".join(f"{name}={size}" for name, size in entry["sizes"].items() if name != axis)
        alike.setdefault(others, []).append(entry)
    others, chosen = max(alike.items(), key=lambda item: len(item[1]), default=("", []))
    if len(chosen) < 2:
        return None
    lines: dict[str, list[list[float]]] = {}
    for entry in sorted(chosen, key=lambda entry: entry["sizes"][axis]):
        for name, made in entry["candidates"].items():
            lines.setdefault(name, []).append([entry["sizes"][axis], _milliseconds(spread(made["seconds"]).median)])
        if "ceilings" in entry:
            lines.setdefault("floor", []).append([entry["sizes"][axis], min(
                floor for *_, floor in against_floor(entry).bars.values())])
    return Panel(f"{entries[0]['benchmark']} {others}", axis, {}, lines)


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Write a file with a diagram for each panel."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    height = max(2.4, 0.8 + 0.22 * max(len(panel.bars) for panel in panels))
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, height * rows), squeeze=False)
        for diagram in axes.flat[len(panels):]:
            diagram.set_axis_off()
        for diagram, panel in zip(axes.flat, panels):
            _bars(diagram, panel) if panel.bars else _lines(diagram, panel)
            diagram.set_title(panel.title, fontsize=8)
        figure.savefig(path, metadata={"Description": json.dumps(panels), "Date": None})
        pyplot.close(figure)
    path.write_text(re.sub(r" +$", "", path.read_text(), flags=re.MULTILINE))


def drawn(path: Path) -> list[Panel] | None:
    """What a file shows; None where there is none."""
    if not path.exists():
        return None
    return [Panel(*panel) for panel in json.loads(ElementTree.parse(path).getroot().find(f".//{_DESCRIPTION}").text)]


def _bars(diagram, panel: Panel) -> None:
    names = list(panel.bars)
    medians, lows, highs, floors = zip(*panel.bars.values())
    whiskers = [[median - low for median, low in zip(medians, lows)],
                [high - median for median, high in zip(medians, highs)]]
    diagram.barh(names, medians, xerr=whiskers, height=0.6, color=_colours(names), error_kw={"linewidth": 0.8})
    diagram.vlines(floors, [k - 0.4 for k in range(len(names))], [k + 0.4 for k in range(len(names))], "black",
                   linestyles="dotted")
    diagram.invert_yaxis()
    diagram.set(xlim=(0, None), xlabel="ms; dotted: the floor")


def _lines(diagram, panel: Panel) -> None:
    for name, colour in zip(panel.lines, _colours(list(panel.lines))):
        style = {"color": "black", "linestyle": "dotted"} if name == "floor" else {"color": colour, "marker": "o"}
        diagram.plot(*zip(*panel.lines[name]), markersize=3, label=name, **style)
    diagram.set(xscale="log", yscale="log", xlabel=panel.axis, ylabel="ms")
    diagram.legend(fontsize=6)


def _colours(names: Sequence[str]) -> list[str]:
    """Ours stand out."""
    own, others = iter(("C3", "C1", "C5", "C6") * len(names)), iter(("C0", "C2", "C4", "C7", "C8", "C9") * len(names))
    return [next(own) if name.startswith("char-gru") else next(others) for name in names]


def _milliseconds(seconds: float) -> float:
    """Rounded to what a plot can show, so that a file says the same on every machine."""
    return float(f"{1e3 * seconds:.4g}")
