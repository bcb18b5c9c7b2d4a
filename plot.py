"""Draw what runs logged: one picture, and one page that opens without a network.

    python plot.py out/train_default-001                       # RUN/plots.png, RUN/plots.html
    python plot.py out/train_default-001 out/train_default-002 # out/comparison.png, out/comparison.html
    python plot.py RUN RUN --out=paper/figure-1

Of one run a panel shows metrics that belong together. Of several a panel is a metric, a run has one colour
everywhere, and the settings that differ are printed. In the page one can zoom, read values, switch names off.
Curves of more than BINS points are thinned: their mean, in a band from the smallest to the largest value.
"""

import html
import json
import os
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from configurator import load, run_script, setting
from plots.curves import (
    BINS,
    Curve,
    Panel,
    Run,
    colour_of,
    dash_of,
    differing_settings,
    figure,
    make_panels,
    read_run,
    step_limits,
)

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 1rem; color: #222; background: #fff; }
h1 { font-size: 1.2rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: .9rem; margin: 0; }
p { margin: .3rem 0; overflow-wrap: anywhere; }
td { padding: .1rem .8rem .1rem 0; white-space: nowrap; } tr:first-child td { font-weight: bold; }
.names { display: flex; flex-wrap: wrap; gap: 0 .9rem; }
.names label { overflow-wrap: anywhere; }
.names i { display: inline-block; width: 1.4rem; vertical-align: middle; margin: 0 .3rem 0 0; }
header > .names { position: sticky; top: 0; z-index: 20; background: #fff; padding: .3rem 0; }
.panels { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
section { min-width: 0; display: flex; flex-direction: column; justify-content: space-between; }
section .names { font-size: .8rem; }
.chart { width: 100%; height: 210px; }
.wide { overflow-x: auto; }
</style>
</head><body>
<header><h1>$title</h1>$names</header>
$notes
<div class="wide">$settings</div>
<p>Drag sideways to see a part of all panels larger, up or down for one; a double click shows everything
again. Names can be switched off. A curve of more than $bins points is the mean of $bins parts, in a band from
their smallest to their largest value.</p>
<div class="panels">$sections</div>
<script>$library</script>
<script>
const limits = $limits, panels = $panels
const short = (value, digits) => String(Number(value.toPrecision(digits)))

function draw(panel, n) {
  return new Dygraph(document.getElementById("chart" + n), panel.rows, {
    labels: panel.labels, colors: panel.colours, series: panel.series, logscale: panel.logarithmic,
    includeZero: panel.zero, dateWindow: limits,
    customBars: true, fillAlpha: 0.2, connectSeparatedPoints: true,
    yRangePad: 8, axisLabelFontSize: 12, gridLineColor: "#ccc", highlightCircleSize: 4,
    labelsSeparateLines: true, labelsDivStyles: {fontSize: "12px", background: "rgba(255, 255, 255, .85)"},
    axes: {
      x: {axisLabelFormatter: step => short(step, 6), valueFormatter: step => "step " + short(step, 12)},
      y: {axisLabelFormatter: value => short(value, 4), valueFormatter: value => short(value, 5)},
    },
    zoomCallback: () => zoomed(charts[n]),
    underlayCallback: (context, area, chart) => {
      context.font = "14px sans-serif"
      for (const [step, colour] of panel.gaps) {
        context.fillStyle = colour
        context.fillText("\u00d7", chart.toDomXCoord(step) - 4, area.y + area.h - 3)
      }
    },
  })
}

function zoomed(chart) {
  const zoom = chart.isZoomed("x")
  const dateWindow = zoom ? chart.xAxisRange() : limits
  for (const other of charts) other.updateOptions({dateWindow, isZoomedIgnoreProgrammaticZoom: !zoom})
}

const charts = panels.map(draw)
for (const box of document.querySelectorAll("input"))
  box.onchange = () => charts.forEach((chart, n) => {
    const section = box.closest("section"), series = chart.getLabels().indexOf(box.value)
    if (series > 0 && (!section || section.contains(chart.graphDiv)))
      chart.setVisibility(series - 1, box.checked)
  })
</script>
</body></html>
"""


@dataclass(frozen=True)
class PlotConfig:
    out: str = setting(
        "",
        "where to, without the ending, or a folder with / at its end; empty is RUN/plots, or comparison "
        "beside the first run",
    )


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Runs named as their folders, or as their paths where two folders have one name.

    One without metrics is told and left out; ValueError where no run is left, and for what is no folder.
    """
    if not paths:
        raise ValueError("which runs? name their folders: python plot.py RUN [RUN ...]")
    folders = list({Path(path).resolve(): Path(path) for path in paths}.values())
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder: name run folders, as in out/train_default-001")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    runs = []
    for folder, name in zip(folders, names):
        try:
            runs.append(read_run(folder, name))
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise ValueError("nothing to draw: no metrics in " + ", ".join(map(str, folders)))
    return runs


def settings_table(runs: Sequence[Run]) -> list[list[str]]:
    """The settings that differ; [] where none do."""
    rows = [[name, *values] for name, values in differing_settings(runs).items()]
    return [["setting", *(run.name for run in runs)], *rows] if rows else []


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)


# ------------------------------------------------------------------------------------------------------------
# the page


def page(runs: Sequence[Run]) -> str:
    """HTML with everything in it. ImportError without dygraphs."""
    panels, several = make_panels(runs), len(runs) > 1
    sections = [
        f"<section><h2>{html.escape(panel.title)}</h2>{'' if several else switches(panel.curves)}"
        f'<div class="chart" id="chart{n}"></div></section>'
        for n, panel in enumerate(panels)
    ]
    run_names = [Curve(run.name, n, *[np.zeros(0)] * 5) for n, run in enumerate(runs)]
    return string.Template(PAGE).substitute(
        title=f"{len(runs)} runs" if several else html.escape(runs[0].name),
        names=switches(run_names) if several else "",
        notes="".join(f"<p>{html.escape(note)}</p>" for run in runs for note in run.notes),
        settings=html_table(settings_table(runs)),
        bins=BINS,
        sections="\n".join(sections),
        library=library(),
        limits=json.dumps(step_limits(runs)),
        panels=json.dumps([chart(panel) for panel in panels]).replace("<", "\\u003c"),
    )


def library() -> str:
    """dygraphs (https://dygraphs.com, MIT): 125 kB of JavaScript in the Python package of this name."""
    import dygraphs

    path = Path(dygraphs.__file__).parent / "assets" / "dygraph-combined.js"
    return path.read_text(encoding="utf-8").replace("</script", "<\\/script")


def chart(panel: Panel) -> dict[str, Any]:
    """What draw() in the page needs. A row is a step and of each curve low, mean and high, or null."""
    cells: dict[float, list] = {}
    for n, curve in enumerate(panel.curves):
        for step, *values in zip(curve.steps, curve.low, curve.mean, curve.high):
            row = cells.setdefault(float(f"{step:.12g}"), [None] * len(panel.curves))
            row[n] = [float(f"{value:.6g}") for value in values]
    return dict(
        rows=[[step, *cells[step]] for step in sorted(cells)],
        labels=["step", *(curve.label for curve in panel.curves)],
        colours=[colour_of(curve.style) for curve in panel.curves],
        series={curve.label: series(curve) for curve in panel.curves},
        logarithmic=panel.is_logarithmic,
        zero=panel.limits[0] <= 0,
        gaps=[(step, colour_of(curve.style)) for curve in panel.curves for step in curve.gaps.tolist()],
    )


def series(curve: Curve) -> dict[str, Any]:
    pattern = {"solid": None, "dashed": [7, 3], "dotted": [2, 2]}[dash_of(curve.style)]
    return dict(
        strokeWidth=1.4 * curve.width, drawPoints=curve.is_short, pointSize=2.5, strokePattern=pattern
    )


def switches(curves: Sequence[Curve]) -> str:
    """The names of curves, each with a box that hides it; "" where there is but one."""
    if len(curves) < 2:
        return ""
    labels = []
    for curve in curves:
        name = html.escape(curve.label)
        line = f"border-top: 3px {dash_of(curve.style)} {colour_of(curve.style)}"
        labels.append(
            f'<label><input type="checkbox" checked value="{name}"><i style="{line}"></i>{name}</label>'
        )
    return f'<div class="names">{" ".join(labels)}</div>'


def html_table(rows: list[list[str]]) -> str:
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


# ------------------------------------------------------------------------------------------------------------
# the script


def stem_of(out: str, runs: Sequence[Run]) -> str:
    """Where to, without the ending: a folder gets the file name that it would have beside the runs."""
    first, alone = runs[0].path, len(runs) == 1
    stem = out.removesuffix(".png").removesuffix(".html")
    if os.path.basename(stem).strip("."):
        return stem
    folder = Path(stem) if stem else first if alone else first.resolve().parent
    return str(folder / ("plots" if alone else "comparison"))


def write_picture(path: Path, runs: Sequence[Run]) -> None:
    figure(runs).savefig(path)


def write_page(path: Path, runs: Sequence[Run]) -> None:
    path.write_text(page(runs), encoding="utf-8")


def main() -> None:
    arguments = sys.argv[1:]
    config = load(PlotConfig, [a for a in arguments if a.startswith("-")])
    runs = read_runs([a for a in arguments if not a.startswith("-")])
    for note in [note for run in runs for note in run.notes]:
        print(note, file=sys.stderr)
    if rows := settings_table(runs):
        print(aligned(rows), end="\n\n")

    written = 0
    for ending, write in {".png": write_picture, ".html": write_page}.items():
        path = Path(stem_of(config.out, runs) + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(path, runs)
        except ImportError as error:
            print(f"no {path}: {error}; pip install {error.name}", file=sys.stderr)
            continue
        print(path)
        written += 1
    if not written:
        raise SystemExit(2)


if __name__ == "__main__":
    run_script(main)
