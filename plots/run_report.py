"""report.md in the run folder: what was run, on what, for how long, and what became of it.

    write_report("out/train_default-001", "GPT with a DAG of depth 4", attempts_by_kind, samples)

It is made of the files of the run; curves.png is beside it. Attempts are tasks.Attempt, or whatever else has
prompt, output, answer and correct; train.py shows them in the same words while it trains.
"""

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import numpy as np

from plots.curves import Run, figure, group_of, read_run

NO_ATTEMPTS: Mapping[str, Sequence[Any]] = {}


def write_report(
    run_dir: str | Path,
    headline: str = "",
    attempts: Mapping[str, Sequence[Any]] = NO_ATTEMPTS,
    samples: Sequence[str] = (),
    draw_plan: Callable[[Path], bool] | None = None,
) -> None:
    """RUN/report.md and RUN/curves.png; `attempts` by the kind of problem, `samples` of text. `draw_plan` saves
    a picture, plan.png, and says whether there was anything to draw.

    Whatever goes wrong is a line on stderr: a run that has been trained does not fail for want of a report.
    """
    try:
        run = read_run(run_dir)
        has_curves = save_picture(run.path / "curves.png", partial(save_curves, run))
        has_plan = draw_plan is not None and save_picture(run.path / "plan.png", draw_plan)
        text = report_text(run, headline, attempts, samples, has_curves, has_plan)
        (run.path / "report.md").write_text(text, encoding="utf-8")
        print(f"report in {run.path / 'report.md'}")
    except Exception as error:  # a full disk, a file that somebody has moved, a broken package
        print(f"no report of {run_dir}: {type(error).__name__}: {error}", file=sys.stderr)


def save_picture(path: Path, save: Callable[[Path], bool]) -> bool:
    """Whether there is one: what goes wrong costs this picture alone, and a line on stderr."""
    try:
        return save(path)
    except Exception as error:  # it is drawn from whatever was logged, by a package that may be missing
        remedy = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        print(f"no {path.name} in the report: {error}{remedy}", file=sys.stderr)
        return False


def save_curves(run: Run, path: Path) -> bool:
    figure([run]).savefig(path)
    return True


def report_text(
    run: Run,
    headline: str,
    attempts: Mapping[str, Sequence[Any]],
    samples: Sequence[str],
    has_curves: bool,
    has_plan: bool = False,
) -> str:
    """Markdown."""
    sections = [f"# {run.name}", headline, table([("", ""), *facts(run)])]
    sections += [f"- {note}" for note in run.notes]
    if has_curves:
        sections += ["## Curves", "![curves](curves.png)"]
    sections += ["## Scores", table(scores(run))]
    if attempts:
        sections += ["## Problems, at the last evaluation"]
    for kind, tried in attempts.items():
        solved = sum(attempt.correct for attempt in tried)
        lines = "\n".join(map(attempt_line, some_of(tried)))
        sections += [f"{kind}: {solved} of {len(tried)} solved", block(lines)]
    if has_plan:
        sections += ["## A plan", "![plan](plan.png)"]
    if samples:
        sections += ["## Samples", block(f"\n{'-' * 20}\n".join(samples))]
    sections += ["## Settings", block(json.dumps(run.config, indent=2))]
    return "\n\n".join(section for section in sections if section) + "\n"


def facts(run: Run) -> list[tuple[str, str]]:
    """Of the run and of every time that it was resumed."""
    rows = []
    for part in run.parts:
        arguments = [argument.replace("`", "'") for argument in part.get("command", [])[1:]]
        changed = ", and what is in changes*.diff" * any(
            f.stat().st_size for f in run.path.glob("changes*.diff")
        )
        rows += [
            ("command", f"`{shlex.join(['python', *arguments])}`"),
            ("commit", f"{part.get('commit') or 'unknown'}{changed}"),
            ("hardware", part.get("hardware", "unknown")),
            ("started", part.get("started", "unknown")),
        ]
    rows.append(("steps", f"{max(steps[-1] for steps, _ in run.columns.values()):.0f}"))
    if "train/minutes" in run.columns:
        rows.append(("minutes of training", f"{run.columns['train/minutes'][1][-1]:.1f}"))
    if "tokens_per_second" in run.columns:
        rows.append(("tokens a second, median", f"{np.nanmedian(run.columns['tokens_per_second'][1]):.0f}"))
    return rows


def scores(run: Run) -> list[tuple[str, ...]]:
    """Rows of losses and shares of problems solved: where the best checkpoint was saved, and at the end."""
    names = [name for name in run.columns if group_of(name) in ("loss", "val/solved") and "batch" not in name]
    steps, losses = run.columns.get("val/loss", (np.zeros(0), np.zeros(0)))
    if not np.isfinite(losses).any():
        return [("", "last"), *((name, score_text(name, run.columns[name][1][-1])) for name in names)]
    best = steps[np.nanargmin(losses)]
    rows = [("", f"best, step {best:.0f}", f"last, step {steps[-1]:.0f}")]
    for name in names:
        values = dict(zip(*run.columns[name]))
        rows.append((name, *(score_text(name, values.get(step, np.nan)) for step in (best, steps[-1]))))
    return rows


def score_text(name: str, value: float) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:.1%}" if group_of(name) == "val/solved" else f"{value:.4f}"


def some_of(attempts: Sequence[Any], right: int = 1, wrong: int = 2) -> list[Any]:
    """A few to show: failures say more than successes, and are taken from everywhere among the attempts."""
    solved = [attempt for attempt in attempts if attempt.correct]
    failed = [attempt for attempt in attempts if not attempt.correct]
    return solved[:right] + failed[:: max(1, len(failed) // wrong)][:wrong]


def attempt_line(attempt: Any) -> str:
    mark = "solved" if attempt.correct else f"failed, {attempt.answer} is right"
    return f"{attempt.prompt}{attempt.output}  ({mark})"


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def block(text: str) -> str:
    """Markdown that shows text as it is, whatever marks are in it."""
    return "\n".join(f"    {line}" for line in text.splitlines())
