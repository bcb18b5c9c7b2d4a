"""The table and the picture of runs/evidence.sh, from what its runs have left behind.

    python runs/evidence_table.py out/evidence            # prints Markdown, writes out/evidence/accuracy.png

A score is the mean over the seeds that have been evaluated, in per cent of problems answered exactly, +- half
the range where it is not 0. What a step costs is measured beside the plain GPT, in turns, with the trained
weights of the first seed: runs share a machine with others, so their own clocks do not say. Of a wider plain
GPT the FLOPs are counted, and "-" is what nobody measured. Needs matplotlib for the picture.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import run_script  # noqa: E402
from plots.curves import colour_of, dash_of, read_metrics  # noqa: E402

ARMS = {
    "default": "**DAG, default**",
    "labelled": "the same, plans labelled by the generator",
    "silent": "the same, silenced after training",
    "sampled": "plans sampled from the planner",
    "straight_through": "straight-through plans",
    "soft": "soft plans",
    "learned": "learned values",
    "seed001": "dense, token inputs (`train_seed001`)",
    "seed000": "dense, sequence inputs (`train_seed000`)",
    "plain_wide": "plain GPT, wider",
    "plain": "plain GPT",
}
COLUMNS = {
    "test_two_numbers": "2 numbers",
    "test_three_numbers": "3 numbers",
    "test_four_numbers": "4 numbers",
    "test_decimals": "decimals",
    "test_sentences": "sentences",
    "test_digits_8": "*8 digits*",
    "test_digits_18": "*18 digits*",
    "test_sentence_digits_7": "*sentences, 7 digits*",
    "test_unseen_templates": "*unseen words*",
}
KINDS = ("two_numbers", "three_numbers", "four_numbers", "decimals", "sentences")  # as in the training text


def evaluated(out: Path, arm: str) -> list[Path]:
    """The scores of all seeds of an arm."""
    name = "default-*/scores_silent.json" if arm == "silent" else f"{arm}-*/scores.json"
    return sorted(out.glob(name))


def cost(out: Path, arm: str) -> float | None:
    """Of a training step, in steps of the plain GPT; None where that is not known."""
    if arm == "plain":
        return 1.0
    measured, plain = out / f"{'default' if arm == 'silent' else arm}.cost", out / "plain.cost"
    if not measured.is_file():
        return None
    bench = json.loads(measured.read_text())
    if bench["dag_overhead"] is not None:
        return bench["dag_overhead"]
    return flops(bench) / flops(json.loads(plain.read_text())) if plain.is_file() else None


def flops(bench: dict) -> float:
    return bench["models"]["plain"]["flops_per_token"]


def cell(values: list[float]) -> str:
    mean, spread = 100 * sum(values) / len(values), 50 * (max(values) - min(values))
    return f"{mean:.1f}" + (f" ± {spread:.1f}" if spread else "")


def table(out: Path) -> str:
    """Markdown; a row an arm."""
    rows = ["| | " + " | ".join(COLUMNS.values()) + " | fires on decoys | a step costs |"]
    rows.append("| --- |" + " --- |" * (len(COLUMNS) + 2))
    for arm, title in ARMS.items():
        seeds = [json.loads(path.read_text()) for path in evaluated(out, arm)]
        if not seeds:
            continue
        cells = [cell([scores["splits"][name]["exact"] for scores in seeds]) for name in COLUMNS]
        fires = [scores["false_fires"] for scores in seeds if scores["false_fires"] is not None]
        times = cost(out, arm)
        cells += [cell(fires) if fires else "-", f"{times:.2f}" if times else "-"]
        rows.append(f"| {title} ({len(seeds)}) | {' | '.join(cells)} |")
    return "\n".join(rows)


def progress(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps of training and problems of the KINDS solved, in per cent; empty where it logged no kinds."""
    columns, _ = read_metrics(run / "metrics.jsonl")
    solved = [columns.get(f"val/solved/{kind}", np.zeros((2, 0))) for kind in KINDS]
    return solved[0][0], 100 * np.mean([share for _, share in solved], axis=0)


def figure(out: Path):
    """A curve a run: validation problems solved over time, or over its own steps where that is not known."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot(
        xlabel="training time, in steps of the plain GPT",
        ylabel="validation problems solved, %",
        ylim=(-2, 102),
    )
    trained = {arm: title for arm, title in ARMS.items() if arm != "silent" and evaluated(out, arm)}
    for n, (arm, title) in enumerate(trained.items()):
        times, label = cost(out, arm), title.replace("*", "").replace("`", "")
        look = dict(color=colour_of(n), linestyle=dash_of(n))
        for seed, scores in enumerate(evaluated(out, arm)):
            steps, solved = progress(scores.parent)
            name = None if seed else label if times else f"{label}: in its own steps"
            axes.plot((times or 1.0) * steps, solved, label=name, **look)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), handlelength=3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "out/evidence")
    if not any(evaluated(out, arm) for arm in ARMS):
        raise ValueError(f"{out} has no evaluated runs: bash runs/evidence.sh makes them")
    print(table(out))
    figure(out).savefig(out / "accuracy.png")


if __name__ == "__main__":
    run_script(main)
