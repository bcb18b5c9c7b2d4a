"""runs/: the table and the picture of the evidence, and the labels of the upper bound."""

import json
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "runs"))
import evidence_table
import train_labelled

from dag_model import GPTConfig
from gpt.model_config import operation_names

# ------------------------------------------------------------------------------------------------------------
# the table


def make_run(path, exact, solved, false_fires=None):
    """A run with these scores, and as many evaluations during training."""
    path.mkdir(parents=True)
    splits = {name: dict(exact=exact) for name in evidence_table.COLUMNS}
    (path / "scores.json").write_text(json.dumps(dict(splits=splits, false_fires=false_fires)))
    lines = [
        {"step": 100 * n} | {f"val/solved/{kind}": share for kind in evidence_table.KINDS}
        for n, share in enumerate(solved)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def measured(path, overhead, flops):
    plain = dict(flops_per_token=flops)
    path.write_text(json.dumps(dict(dag_overhead=overhead, models=dict(plain=plain))))


@pytest.fixture
def evidence(tmp_path):
    make_run(tmp_path / "default-1", 1.0, [0, 0.5, 1], false_fires=0.02)
    make_run(tmp_path / "default-2", 0.9, [0, 0.25, 0.75], false_fires=0.0)
    make_run(tmp_path / "labelled-1", 1.0, [0, 1])
    make_run(tmp_path / "plain_wide-2", 0.04, [0, 0.1])
    make_run(tmp_path / "plain-1", 0.052, [0, 0.05])
    (tmp_path / "default-2/scores_silent.json").write_text((tmp_path / "plain-1/scores.json").read_text())
    (tmp_path / "soft-1").mkdir()  # has just begun
    measured(tmp_path / "default.cost", 1.25, 100)
    measured(tmp_path / "plain_wide.cost", None, 112)
    measured(tmp_path / "plain.cost", None, 100)
    return tmp_path


def rows(markdown):
    """First cell -> the others."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    assert len({len(line) for line in lines}) == 1 and set(lines[1]) == {"---"}
    return {head: cells for head, *cells in lines[2:]}


def test_the_table_has_a_row_an_arm_that_was_evaluated(evidence):
    columns = len(evidence_table.COLUMNS)
    assert rows(evidence_table.table(evidence)) == {
        "**DAG, default** (2)": [*["95.0 ± 5.0"] * columns, "1.0 ± 1.0", "1.25"],
        "the same, plans labelled by the generator (1)": [*["100.0"] * columns, "-", "-"],
        "the same, silenced after training (1)": [*["5.2"] * columns, "-", "1.25"],
        "plain GPT, wider (1)": [*["4.0"] * columns, "-", "1.12"],
        "plain GPT (1)": [*["5.2"] * columns, "-", "1.00"],
    }


def test_what_was_not_measured_has_no_cost(evidence):
    (evidence / "default.cost").unlink()
    (evidence / "plain.cost").unlink()
    costs = [cells[-1] for cells in rows(evidence_table.table(evidence)).values()]
    assert costs == ["-", "-", "-", "-", "1.00"]


def test_the_picture_has_every_run_over_its_time(evidence):
    axes = evidence_table.figure(evidence).axes[0]
    drawn = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
    assert drawn == [
        ([0, 125, 250], [0, 50, 100]),
        ([0, 125, 250], [0, 25, 75]),
        ([0, 100], [0, 100]),
        ([0, pytest.approx(112)], [0, pytest.approx(10)]),
        ([0, 100], [0, 5]),
    ]
    looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
    assert looks[0] == looks[1] and len(set(looks)) == 4
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "DAG, default",
        "the same, plans labelled by the generator: in its own steps",
        "plain GPT, wider",
        "plain GPT",
    ]
    assert [line.get_color() for line in legend.get_lines()] == [look[0] for look in looks[1:]]


def test_the_script_prints_and_draws(evidence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evidence_table.py", str(evidence)])
    evidence_table.main()
    assert capsys.readouterr().out == evidence_table.table(evidence) + "\n"
    assert (evidence / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("begun", [False, True])
def test_no_evidence_is_one_line(begun, tmp_path, run_script):
    if begun:
        (tmp_path / "out" / "default-1").mkdir(parents=True)
    done = run_script("runs/evidence_table.py", tmp_path / "out")
    assert done.returncode == 2 and not done.stdout
    assert (
        done.stderr == f"error: {tmp_path / 'out'} has no evaluated runs: bash runs/evidence.sh makes them\n"
    )


# ------------------------------------------------------------------------------------------------------------
# labels

APPLY = dict(add=lambda a, b: a + b, subtract=lambda a, b: a - b, multiply=lambda a, b: a * b)


@pytest.fixture(scope="module")
def prepare():
    return train_labelled.generator()


def labels_of(prepare, inputs=8, lines=2000):
    return train_labelled.draw_labels(prepare, replace(prepare.Settings(), lines=lines), inputs)


def test_every_label_computes_the_answer_of_its_line(prepare):
    labels = labels_of(prepare)
    assert len(labels) > 1000 and {len(steps) for steps in labels.values()} == {1, 2, 3}
    for (*numbers, answer), steps in labels.items():
        slots = [Fraction(number) for number in numbers] + [Fraction(0)] * (8 - len(numbers))
        for operation, a, b in steps:
            slots.append(APPLY[operation](slots[a], slots[b]))
        assert f"{float(slots[-1]):.10g}" == answer, (numbers, steps)  # as keys are written


def test_a_line_that_was_made_in_two_ways_has_no_label(prepare, monkeypatch):
    lines = ["3+4=7", "2+2=4", "3 + 4 = 7", "2*2=4", "subtract 12 from 30. 18", "room 12 is on floor 7"]
    monkeypatch.setattr(train_labelled.ar, "draw_corpus", lambda *arguments: dict(train=lines))
    assert labels_of(prepare) == {("4", "3", "7"): [("add", 1, 0)], ("30", "12", "18"): [("subtract", 0, 1)]}


def test_labels_name_only_slots_that_there_are(prepare):
    labels = labels_of(prepare, inputs=2)
    assert labels and all(len(numbers) == 2 for *numbers, _ in labels)


@pytest.mark.parametrize("depth, operations", [(1, "all"), (2, "all"), (4, "identity,add,multiply")])
def test_the_loss_has_labels_of_its_plans_alone(depth, operations, prepare, monkeypatch):
    labels = labels_of(prepare)
    monkeypatch.setattr(train_labelled, "draw_labels", lambda *arguments: labels)
    names = operation_names(operations)
    config = GPTConfig(dag_depth=depth, dag_ops=operations, dag_leaves=2, dag_num_inputs=8)
    loss = train_labelled.LabelledLoss(config, names)
    assert 0 < len(loss.labels) < len(labels)
    for key, plan in loss.labels.items():
        steps = labels[key]
        assert len(plan) == depth and [names[step[0]] for step in plan[: len(steps)]] == [s[0] for s in steps]
        passed = [(names.index("identity"), 8 + n - 1, 0) for n in range(depth)]
        assert plan[len(steps) :] == passed[len(steps) :]
