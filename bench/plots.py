"""Plots as SVG files: the same bytes for the same results, with the plotted numbers as JSON in their description."""

from __future__ import annotations

import json
import math
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
    """The diagram of one op, all times in milliseconds. bars: name -> (median, lowest, highest, floor)."""

    title: str
    bars: dict[str, list[float]]


def against_floor(entry: dict) -> Panel:
    """The candidates of an op beside the floor."""
    work, ceilings = Work(**entry["work"]), Ceilings(**entry["ceilings"])
    sizes = " ".join(f"{axis}={size}" for axis, size in entry["sizes"].items())
    bars = {name: [_milliseconds(seconds) for seconds in
                   (*spread(made["seconds"]), floor_seconds(work, ceilings, made["precision"]))]
            for name, made in entry["candidates"].items()}
    return Panel(f"{entry['benchmark']} {sizes}", bars)


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Write a file with a diagram for each panel."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    height = max(2.4, 0.8 + 0.22 * max(len(panel.bars) for panel in panels))
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, height * rows), squeeze=False)
        for diagram in axes.flat[len(panels):]:
            diagram.set_axis_off()
        for diagram, panel in zip(axes.flat, panels, strict=False):
            _bars(diagram, panel)
        figure.savefig(path, metadata={"Description": json.dumps(panels), "Date": None})
        pyplot.close(figure)
    path.write_text(re.sub(r" +$", "", path.read_text(), flags=re.MULTILINE))


def drawn(path: Path) -> str | None:
    """The JSON of the panels that a file shows; None where there is no file."""
    return ElementTree.parse(path).getroot().find(f".//{_DESCRIPTION}").text if path.exists() else None


def _bars(diagram, panel: Panel) -> None:
    names = list(panel.bars)
    medians, lows, highs, floors = zip(*panel.bars.values(), strict=True)
    whiskers = [[median - low for median, low in zip(medians, lows, strict=True)],
                [high - median for median, high in zip(medians, highs, strict=True)]]
    diagram.barh(names, medians, xerr=whiskers, height=0.6, color=_colours(names), error_kw={"linewidth": 0.8})
    diagram.vlines(floors, [k - 0.4 for k in range(len(names))], [k + 0.4 for k in range(len(names))], "black",
                   linestyles="dotted")
    diagram.invert_yaxis()
    diagram.set_title(panel.title, fontsize=8)
    diagram.set(xlim=(0, None), xlabel="ms; dotted: the floor")


def _colours(names: Sequence[str]) -> list[str]:
    """A colour for each candidate: the colours of char-gru stand out."""
    own, others = iter(("C3", "C1", "C5", "C6") * len(names)), iter(("C0", "C2", "C4", "C7", "C8", "C9") * len(names))
    return [next(own) if name.startswith("char-gru") else next(others) for name in names]


def _milliseconds(seconds: float) -> float:
    """Rounded to the digits that a plot can show, so that the file is the same on every machine."""
    return float(f"{1e3 * seconds:.4g}")
