"""What a run logged, as curves: metrics.jsonl read, put into panels, drawn.

    run = read_run("out/train_default-001")
    steps, values = run.columns["val/loss"]     # arrays; null in the file is NaN here
    figure([run]).savefig("curves.png")         # of several runs: a panel a metric, a colour a run

- panels follow from the metrics' names: dag/use/add and dag/use/divide share dag/use, a new one needs nothing
- a long curve is drawn as the mean of BINS parts of it, in a band from their smallest to their largest value
- what cannot be read is told and left out, all else is drawn; the files of a run are never changed
- no torch here, and matplotlib only once a figure is asked for

The colours are told apart by colour-blind readers, too: Okabe and Ito, https://jfly.uni-koeln.de/color/
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np

BINS = 500  # points of the longest curve drawn, at each its mean, smallest and largest value
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dashed", "dotted")  # names in matplotlib and in CSS
GROUPS = {  # panels of metrics that have no prefix for themselves, by a regular expression
    "loss": r"(train|val)/(batch_)?loss",
    "dag/gate": r"dag/gate_.*",
    "dag/norm": r"dag/\w+_norm",
    "dag/entropy": r"dag/\w+_entropy",
    "probe/gate": r"probe/\d+/(gate|plan_probability)",
}
FIRST = ("loss", "val/solved", "dag/gate", "dag/use")  # panels, where there are such; the others follow
PANEL, LEFT, RIGHT, ABOVE, BELOW = (3.4, 1.75), 0.65, 0.15, 0.3, 0.5  # inches, of a panel and around it
NO_SETTINGS = ("out_dir", "init_from", "wandb_run_name")  # they name the run and do not make it

Column = tuple[np.ndarray, np.ndarray]  # steps in ascending order and values, float64 of one length


# ------------------------------------------------------------------------------------------------------------
# reading


@dataclass(frozen=True)
class Run:
    path: Path
    name: str
    columns: dict[str, Column]  # without "time"
    notes: list[str]  # what was wrong with its files, a line each
    config: dict[str, Any]  # the newest settings; {} where there are none
    parts: list[dict[str, Any]]  # run.json, and one for each time it was resumed


def read_metrics(path: str | Path) -> tuple[dict[str, Column], list[str]]:
    """Columns by name, and notes about damaged lines and about values that are not finite numbers.

    A column has the steps at which its metric was logged. ValueError where there are no metrics at all.
    """
    lists: dict[str, tuple[list, list]] = {}
    damaged, good = [], 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            record = read_line(line)
            if record is None:
                damaged.append(number)
                continue
            good += 1
            step = record.pop("step")
            for name, value in record.items():
                steps, values = lists.setdefault(name, ([], []))
                steps.append(step)
                values.append(value if isinstance(value, float) else np.nan)
    lists.pop("time", None)
    if not lists:
        raise ValueError(f"{path} has no metrics: the run has logged nothing yet")
    columns = {name: sort_column(*both) for name, both in lists.items()}
    notes = []
    if damaged:
        which = f"line {damaged[0]}" if len(damaged) == 1 else f"{len(damaged)} lines from {damaged[0]} on"
        notes.append(f"{path}: left out {which}, cut off or damaged; the other {good} are drawn")
    for name, (steps, values) in columns.items():
        gaps = steps[np.isnan(values)]
        if len(gaps):
            times = "once, at" if len(gaps) == 1 else f"{len(gaps)} times, first at"
            notes.append(f"{path}: {name} is not a number {times} step {gaps[0]:.0f}: marked x")
    return columns, notes


def read_line(line: str) -> dict[str, Any] | None:
    """The object of a line with all numbers as floats; None for what is not one or has no step."""
    try:
        record = json.loads(line, parse_int=float)  # one type for all numbers, and none too large
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, float) and np.isfinite(step) else None


def sort_column(steps: list[float], values: list[float]) -> Column:
    steps, values = np.array(steps), np.array(values)
    values[np.isinf(values)] = np.nan
    order = np.argsort(steps, kind="stable")
    return steps[order], values[order]


def read_run(run_dir: str | Path, name: str = "") -> Run:
    """ValueError where the folder has no metrics. Of config.json and run.json whatever is there."""
    path = Path(run_dir)
    if not (path / "metrics.jsonl").is_file():
        raise ValueError(f"{path} has no metrics.jsonl: name a run folder, as train.py makes them")
    columns, notes = read_metrics(path / "metrics.jsonl")
    settings, parts = read_parts(path, "config", notes), read_parts(path, "run", notes)
    return Run(path, name or path.resolve().name, columns, notes, settings[-1] if settings else {}, parts)


def read_parts(path: Path, stem: str, notes: list[str]) -> list[dict[str, Any]]:
    """The objects in stem.json and in stem-STEP.json of every time that the run was resumed."""
    parts = []
    for file in [path / f"{stem}.json", *sorted(path.glob(f"{stem}-????????.json"))]:
        try:
            parts.append(dict(json.loads(file.read_text(encoding="utf-8"))))
        except FileNotFoundError:
            continue
        except (ValueError, TypeError) as error:
            notes.append(f"{file}: left out, damaged ({error})")
    return parts


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{setting: its value in each run} of those that are not the same in all; "-" for none."""
    names = dict.fromkeys(name for run in runs for name in run.config if name not in NO_SETTINGS)
    values = {name: [str(run.config.get(name, "-")) for run in runs] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


# ------------------------------------------------------------------------------------------------------------
# panels: what is drawn where, for any library


@dataclass(frozen=True)
class Curve:
    """Arrays of one length (N,), N at most BINS; low and high are the mean itself where it is not thinned."""

    label: str
    style: int  # place among the colours and dashes
    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    gaps: np.ndarray  # steps without a finite value, some of them where they are many

    @property
    def is_thinned(self) -> bool:
        return self.low is not self.mean

    @property
    def is_short(self) -> bool:
        """Its points can be told apart."""
        return len(self.steps) <= 60

    @property
    def width(self) -> float:
        return 1.4 if self.is_short else 0.9

    @property
    def point_size(self) -> float:
        return 4 if self.is_short else self.width  # no wider than the line: seen where gaps leave one alone


@dataclass(frozen=True)
class Panel:
    title: str
    curves: list[Curve]

    @property
    def extremes(self) -> tuple[float, float]:
        values = np.concatenate([part for curve in self.curves for part in (curve.low, curve.high)])
        values = values[np.isfinite(values)]
        return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)

    @property
    def is_logarithmic(self) -> bool:
        """Gradients of parts differ by orders of magnitude."""
        return "gradient" in self.title and self.extremes[0] > 0

    @property
    def limits(self) -> tuple[float, float]:
        """Of the vertical axis: from 0 where that is not far below the curves, and to 1 for larger shares."""
        low, high = self.extremes
        if self.is_logarithmic:
            return low / 1.3, high * 1.3
        margin = 0.05 * high - 0.05 * low or 0.05 * abs(high) or 1.0
        if 0 <= low < high / 2:
            top = 1.0 if 0.5 < high <= 1 else high
            return -0.03 * top, top + margin
        return low - margin, high + margin


def colour_of(style: int) -> str:
    return PALETTE[style % len(PALETTE)]


def dash_of(style: int) -> str:
    return DASHES[style // len(PALETTE) % len(DASHES)]


def step_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """Of the horizontal axis of all panels."""
    steps = [run_steps for run in runs for run_steps, _ in run.columns.values()]
    first, last = min(some[0] for some in steps), max(some[-1] for some in steps)
    margin = 0.02 * (last - first) or 1.0
    return first - margin, last + margin


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean, low and high, (N,) each: of at most BINS equally wide parts that have a finite value."""
    there = np.isfinite(values)
    if len(steps) <= BINS or not there.any():
        steps, values = steps[:BINS], values[:BINS]
        return steps, values, values, values
    steps, values = steps[there], values[there]
    part = (steps - steps[0]) * BINS // (steps[-1] - steps[0] + 1)
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    count = np.diff(starts, append=len(steps))
    return (
        np.add.reduceat(steps, starts) / count,
        np.add.reduceat(values / count.repeat(count), starts),
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )


def make_curve(label: str, style: int, column: Column) -> Curve:
    steps, values = column
    gaps = steps[np.isnan(values)]
    return Curve(label, style, *thin(steps, values), gaps[:: 1 + len(gaps) // BINS])


def group_of(name: str) -> str:
    """The panel of a metric: one of GROUPS, or the first two parts of its name."""
    for group, pattern in GROUPS.items():
        if re.fullmatch(pattern, name):
            return group
    return "/".join(name.split("/")[:2])


def make_panels(runs: Sequence[Run]) -> list[Panel]:
    """Of one run a panel a group of metrics; of several a panel a metric, in which each run is a curve."""
    names = list(dict.fromkeys(name for run in runs for name in run.columns))
    names.sort(key=lambda name: FIRST.index(group_of(name)) if group_of(name) in FIRST else len(FIRST))
    if len(runs) > 1:
        having = {name: [(i, run) for i, run in enumerate(runs) if name in run.columns] for name in names}
        return [
            Panel(name, [make_curve(run.name, i, run.columns[name]) for i, run in some])
            for name, some in having.items()
        ]
    groups: dict[str, list[Curve]] = {}
    for name in names:
        curves = groups.setdefault(group_of(name), [])
        label = name.removeprefix(group_of(name)).strip("/_") or name
        curves.append(make_curve(label, len(curves), runs[0].columns[name]))
    probes = runs[0].parts[-1].get("probes", []) if runs[0].parts else []
    prompts = {f"probe/{n}": f"probe/{n}: {prompt.strip()}" for n, prompt in enumerate(probes)}
    return [Panel(prompts.get(title, title), curves) for title, curves in groups.items()]


# ------------------------------------------------------------------------------------------------------------
# the figure


def figure(runs: Sequence[Run]) -> Any:
    """A matplotlib Figure of all panels that belongs to no window. ImportError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels, several, names = make_panels(runs), len(runs) > 1, [run.name for run in runs]
    legends = [] if several else [panel.curves for panel in panels if len(panel.curves) > 1]
    longest = max((len(curve.label) for curves in legends for curve in curves), default=0)
    right = RIGHT + (0.5 + 0.055 * longest if longest else 0.0)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width = columns * (LEFT + PANEL[0] + right)
    names_in_line = max(1, int(width / (0.7 + 0.08 * max(map(len, names)))))
    head = 0.15 + 0.22 * -(-len(runs) // names_in_line)
    height = head + rows * (ABOVE + PANEL[1] + BELOW)

    figure = Figure(figsize=(width, height), dpi=100)
    grid = dict(left=LEFT / width, right=1 - right / width, wspace=(LEFT + right) / PANEL[0])
    grid |= dict(bottom=BELOW / height, top=1 - (head + ABOVE) / height, hspace=(ABOVE + BELOW) / PANEL[1])
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid).flat, panels):
        draw_panel(axes, panel, step_limits(runs))
        if not several and len(panel.curves) > 1:
            place = dict(loc="upper left", bbox_to_anchor=(1, 1.04))
            legend = axes.legend(fontsize=7, frameon=False, handlelength=3, **place)
            show_as_it_is(legend)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    styles = [dict(color=colour_of(i), linestyle=dash_of(i) if several else "none") for i in range(len(runs))]
    lines = [Line2D([], [], **style) for style in styles]
    show_as_it_is(
        figure.legend(lines, names, loc="upper center", ncols=names_in_line, frameon=False, fontsize=9)
    )
    return figure


def show_as_it_is(legend: Any) -> None:
    for text in legend.get_texts():
        text.set_parse_math(False)  # a `$` in a name begins no formula


def draw_panel(axes: Any, panel: Panel, steps: tuple[float, float]) -> None:
    from matplotlib.ticker import EngFormatter

    for curve in panel.curves:
        look = dict(color=colour_of(curve.style), linestyle=dash_of(curve.style), linewidth=curve.width)
        points = dict(marker="o", markersize=curve.point_size, markeredgewidth=0)
        axes.plot(curve.steps, curve.mean, label=curve.label, zorder=3 + curve.is_short, **look, **points)
        if curve.is_thinned:
            axes.fill_between(curve.steps, curve.low, curve.high, color=look["color"], alpha=0.2, linewidth=0)
        if len(curve.gaps):
            at_bottom = dict(color=look["color"], transform=axes.get_xaxis_transform())
            axes.plot(curve.gaps, np.full(len(curve.gaps), 0.04), "x", **at_bottom)
    axes.set_title(panel.title, loc="left", fontsize=9, parse_math=False)  # it may be a prompt with a `$`
    axes.set_yscale("log" if panel.is_logarithmic else "linear")
    axes.set_ylim(panel.limits)
    axes.set_xlim(steps)
    axes.set_xlabel("step", fontsize=8)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.locator_params("x", nbins=6)
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
