"""The table and the picture of runs/evidence.sh, from what its runs have left behind.

    python runs/evidence_table.py out/evidence            # prints Markdown, writes out/evidence/accuracy.png

A score is the mean over the seeds, in per cent of problems answered exactly, +- half the range where it is not 0. What
a step costs is measured beside the plain GPT, in turns, with the trained weights of the first seed: runs share a
machine with others, so their own clocks do not say. Needs matplotlib for the picture.
"""

import json
import sys
from pathlib import Path

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
    "plain_wide": "plain GPT, as many parameters",
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


def scores_of(out: Path, arm: str) -> list[dict]:
    """The scores of all seeds of an arm."""
    name = "default-*/scores_silent.json" if arm == "silent" else f"{arm}-?/scores.json"
    return [json.loads(path.read_text()) for path in sorted(out.glob(name))]


def cell(values: list[float]) -> str:
    mean, spread = 100 * sum(values) / len(values), 50 * (max(values) - min(values))
    return f"{mean:.1f}" + (f" ± {spread:.1f}" if spread else "")


def cost(out: Path, arm: str) -> float:
    """Of a training step, in steps of the plain GPT."""
    measured = out / f"{'default' if arm == 'silent' else arm}.cost"
    return (json.loads(measured.read_text())["dag_overhead"] if measured.exists() else None) or 1.0


def curve(run: Path) -> tuple[list[float], list[float]]:
    """Steps of training, and validation problems of the KINDS solved, in per cent."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if f"val/solved/{KINDS[0]}" in line]
    solved = [100 * sum(line[f"val/solved/{kind}"] for kind in KINDS) / len(KINDS) for line in scored]
    return [line["step"] for line in scored], solved


def main(out: Path) -> None:
    print("| | " + " | ".join(COLUMNS.values()) + " | fires on decoys | a step costs |")
    print("| --- |" + " --- |" * (len(COLUMNS) + 2))
    for arm, title in ARMS.items():
        seeds = scores_of(out, arm)
        if not seeds:
            continue
        cells = [cell([scores["splits"][name]["exact"] for scores in seeds]) for name in COLUMNS]
        fires = [scores["false_fires"] for scores in seeds if scores["false_fires"] is not None]
        last = [cell(fires) if fires else "-", f"{cost(out, arm):.2f}"]
        print(f"| {title} ({len(seeds)}) | {' | '.join(cells + last)} |")
    draw(out)


def draw(out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for n, (arm, title) in enumerate(ARMS.items()):
        for run in sorted(out.glob(f"{arm}-?")):
            steps, solved = curve(run)
            label = title.strip("*").replace("`", "") if run.name.endswith("1") else None
            axes.plot([cost(out, arm) * step for step in steps], solved, color=f"C{n}", label=label)
    axes.set(
        xlabel="training time, in steps of the plain GPT",
        ylabel="validation problems solved, %",
        ylim=(0, 100),
    )
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out / "accuracy.png", dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/evidence"))
