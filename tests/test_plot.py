"""plots/curves.py, plots/run_report.py, plot.py: nothing that was logged is lost on its way to a picture, page or report."""

import json
import math
import random
import re
import resource
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import plot
from plots import curves, run_report

NAMES = ["train/loss", "val/loss", "train/batch_loss", "val/solved", "val/solved/sentences", "learning_rate"]
NAMES += ["dag/gate_mean", "dag/gate_open", "dag/use/add", "dag/use/divide", "dag/new", "probe/0/step_1", "x"]
PNG = b"\x89PNG"


def write_run(path, records, config=None, run=None):
    path.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"step": 10 * n, "time": 1e9 + n} | r) + "\n" for n, r in enumerate(records))
    (path / "metrics.jsonl").write_text(text)
    for name, content in {"config": config, "run": run}.items():
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


def some_run(path, lines=20, names=NAMES, **files):
    records = [{name: random.random() for name in names if random.random() < 0.7} for _ in range(lines)]
    records.append(dict.fromkeys(names, 0.5))
    return write_run(path, records, **files)


def all_curves(panels):
    return [curve for panel in panels for curve in panel.curves]


# ------------------------------------------------------------------------------------------------------------
# reading


values = st.floats(allow_nan=True, allow_infinity=True) | st.integers() | st.none()
RECORDS = st.lists(st.dictionaries(st.sampled_from(NAMES), values), min_size=1, max_size=8)


@settings(max_examples=40)
@given(records=RECORDS)
def test_columns_have_every_value_at_its_step(tmp_path_factory, records):
    records[-1]["always"] = 1
    path = write_run(tmp_path_factory.mktemp("run"), records) / "metrics.jsonl"
    columns, notes = curves.read_metrics(path)
    assert columns.keys() == {name for record in records for name in record}
    for name, (steps, read) in columns.items():
        logged = [(10 * n, record[name]) for n, record in enumerate(records) if name in record]
        finite = [math.nan if v is None or not abs(v) < 1.8e308 else float(v) for _, v in logged]
        np.testing.assert_array_equal(steps, [step for step, _ in logged])
        np.testing.assert_array_equal(read, finite)
        told = [note for note in notes if f" {name} is not a number" in note]
        assert len(told) == np.isnan(finite).any()


def test_a_file_cut_anywhere_keeps_all_whole_lines_and_tells_which_is_not(tmp_path):
    path = some_run(tmp_path, lines=3) / "metrics.jsonl"
    whole, _ = curves.read_metrics(path)
    text = path.read_text()
    start = text.rindex("\n", 0, -1) + 1  # of line 4
    for end in range(start + 1, len(text) - 1):
        path.write_text(text[:end])
        columns, notes = curves.read_metrics(path)
        assert any("left out line 4" in note for note in notes)
        for name, (steps, read) in columns.items():
            np.testing.assert_array_equal(read, whole[name][1][whole[name][0] < 30])
        assert path.read_text() == text[:end]


@pytest.mark.parametrize(
    "line", ['{"loss": 1}', "[1]", '{"step": null}', '{"step": "7"}', "{'", "\x00", "[" * 10**5]
)
def test_a_damaged_line_in_the_middle_costs_only_itself(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0, "x": 1}}\n{line}\n{{"step": 2, "x": 3}}\n')
    columns, notes = curves.read_metrics(path)
    np.testing.assert_array_equal(columns["x"], [[0, 2], [1, 3]])
    assert len(notes) == 1 and "line 2" in notes[0]


def test_the_newest_settings_count_and_a_damaged_file_of_them_is_told(tmp_path):
    path = some_run(tmp_path, config=dict(seed=1), run=dict(command=["python", "first"]))
    (path / "config-00000100.json").write_text('{"seed": 2}')
    (path / "run-00000100.json").write_text('{"command": ["pyth')
    run = curves.read_run(path)
    assert run.config == dict(seed=2) and run.parts == [dict(command=["python", "first"])]
    assert any("run-00000100.json" in note for note in run.notes)


# ------------------------------------------------------------------------------------------------------------
# panels


@settings(max_examples=20)
@given(st.data())
def test_thinning_keeps_peaks_and_means(data):
    length = data.draw(st.sampled_from([1, 2, curves.BINS, curves.BINS + 1, 3 * curves.BINS]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    steps = np.cumsum(rng.integers(0, 20, length)).astype(float)
    raw = rng.normal(size=length)
    raw[rng.random(length) < data.draw(st.sampled_from([0, 0.3]))] = np.nan
    raw[rng.integers(length)] = 1e3
    at, mean, low, high = curves.thin(steps, raw)
    assert len(at) == len(mean) == len(low) == len(high) <= curves.BINS
    if length <= curves.BINS:
        np.testing.assert_array_equal(at, steps)
        np.testing.assert_array_equal(mean, raw)
        return
    there = np.isfinite(raw)
    steps, raw = steps[there].astype(int), raw[there]
    part = (steps - steps[0]) * curves.BINS // (steps[-1] - steps[0] + 1)
    parts = [part == n for n in np.unique(part)]
    np.testing.assert_allclose(at, [steps[some].mean() for some in parts])
    np.testing.assert_allclose(mean, [raw[some].mean() for some in parts], atol=1e-12)
    np.testing.assert_array_equal(low, [raw[some].min() for some in parts])
    np.testing.assert_array_equal(high, [raw[some].max() for some in parts])
    assert len(parts) > curves.BINS / 3 and high.max() == 1e3


def test_a_long_metric_without_any_value_is_all_gaps(tmp_path):
    run = curves.read_run(write_run(tmp_path, [{"x": None, "y": 1.0}] * (3 * curves.BINS)))
    gaps = {panel.title: panel.curves[0].gaps for panel in curves.make_panels([run])}
    assert 0 < len(gaps["x"]) <= curves.BINS and not len(gaps["y"])
    assert curves.figure([run]).axes and "chart1" in plot.page([run])


def test_every_metric_is_in_one_panel_and_related_ones_share_it(tmp_path):
    run = curves.read_run(some_run(tmp_path))
    panels = {panel.title: [curve.label for curve in panel.curves] for panel in curves.make_panels([run])}
    assert sum(map(len, panels.values())) == len(NAMES)
    assert list(panels)[:4] == ["loss", "val/solved", "dag/gate", "dag/use"]
    assert set(panels["loss"]) == {"train/loss", "val/loss", "train/batch_loss"}
    assert set(panels["val/solved"]) == {"val/solved", "sentences"} and set(panels["dag/use"]) == {
        "add",
        "divide",
    }
    assert panels["dag/new"] == ["dag/new"] and panels["x"] == ["x"]


def test_a_run_has_one_style_in_all_panels_and_no_other_run_has_it(tmp_path):
    lacks = [NAMES, NAMES[3:], NAMES[:8], *[NAMES] * 7]
    runs = [curves.read_run(some_run(tmp_path / f"run{n}", names=names)) for n, names in enumerate(lacks)]
    panels = curves.make_panels(runs)
    assert sorted(panel.title for panel in panels) == sorted(NAMES)
    for panel in panels:
        assert [c.label for c in panel.curves] == [r.name for r in runs if panel.title in r.columns]
    styles = {(c.label, curves.colour_of(c.style), curves.dash_of(c.style)) for c in all_curves(panels)}
    assert len(styles) == len({look for _, *look in styles for look in [tuple(look)]}) == len(runs)


@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=5),
    st.sampled_from(["x", "gradient"]),
)
def test_limits_hold_all_values(values, title):
    column = np.arange(len(values), dtype=float), np.array(values)
    panel = curves.Panel(title, [curves.make_curve("x", 0, column)])
    low, high = panel.limits
    finite = [v for v in values if v == v]
    assert low < high and all(low <= v <= high for v in finite)
    assert not panel.is_logarithmic or low > 0


# ------------------------------------------------------------------------------------------------------------
# the figure


def look(line):
    return line.get_color(), line.get_linestyle()


def test_the_legend_of_several_runs_names_their_curves(tmp_path):
    runs = [curves.read_run(some_run(tmp_path / f"run{n}")) for n in range(9)]
    figure = curves.figure(runs)
    (legend,) = figure.legends
    named = {text.get_text(): look(line) for text, line in zip(legend.get_texts(), legend.get_lines())}
    assert named.keys() == {run.name for run in runs} and len(set(named.values())) == len(runs)
    assert len(figure.axes) == len(NAMES)
    for axes in figure.axes:
        assert {line.get_label(): look(line) for line in axes.lines} == named


def test_curves_of_one_panel_differ_and_its_legend_names_them(tmp_path):
    figure = curves.figure([curves.read_run(some_run(tmp_path))])
    for axes in figure.axes:
        drawn = {line.get_label(): look(line) for line in axes.lines}
        assert len(set(drawn.values())) == len(drawn)
        if len(drawn) > 1:
            legend = axes.get_legend()
            labels = [text.get_text() for text in legend.get_texts()]
            assert dict(zip(labels, map(look, legend.get_lines()))) == drawn


def test_a_curve_has_its_values_and_gradients_an_axis_of_magnitudes(tmp_path):
    records = [
        {"gradient/a": 10.0**-n, "x": float(n), "val/solved": None if n == 3 else 0.5} for n in range(7)
    ]
    figure = curves.figure([curves.read_run(write_run(tmp_path, records))])
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert {title: axes.get_yscale() for title, axes in panels.items()} == {
        "val/solved": "linear",
        "gradient/a": "log",
        "x": "linear",
    }
    np.testing.assert_array_equal(panels["x"].lines[0].get_xydata(), [[10 * n, n] for n in range(7)])
    curve, marks = panels["val/solved"].lines
    assert marks.get_marker() == "x" and marks.get_xdata().tolist() == [30]


def test_no_name_is_taken_for_a_formula(tmp_path):
    names = ["probe/0/$a #1$", "probe/0/$b #2$"]
    run = some_run(tmp_path / "$c #3$", names=names, run=dict(probes=["$5 #1 $2 "]))
    runs = [curves.read_run(run), curves.read_run(run, "$d #4$")]
    for some in (runs[:1], runs):
        curves.figure(some).savefig(tmp_path / "figure.png")  # a formula this bad is an error
    assert curves.figure(runs[:1]).axes[0].get_title(loc="left") == "probe/0: $5 #1 $2"


# ------------------------------------------------------------------------------------------------------------
# the script


def data_of(page):
    """The panels of a page as its script has them."""
    return json.loads(re.search(r"panels = (\[.*\])\n", page).group(1))


def test_a_page_has_all_values_and_needs_no_network(tmp_path):
    names = [*NAMES, "</script><blink>&$x"]
    run = curves.read_run(some_run(tmp_path / "a&b", lines=2 * curves.BINS, names=names))
    page = plot.page([run])
    assert "connectSeparatedPoints: true" in page  # metrics are logged at different steps, and rows have gaps
    assert not re.search(r"<(link|img|iframe|script[^>]*src)|@import|url\(", page)
    assert page.count("</script>") == 2 and "<blink" not in page and "a&amp;b" in page
    panels = data_of(page)
    assert sum(len(panel["labels"]) - 1 for panel in panels) == len(names)
    for panel, drawn in zip(panels, curves.make_panels([run]), strict=True):
        for n, curve in enumerate(drawn.curves, start=1):
            triples = [(row[0], row[n]) for row in panel["rows"] if row[n] is not None]
            np.testing.assert_array_equal([step for step, _ in triples], curve.steps)
            np.testing.assert_allclose(
                [t for _, t in triples], np.stack([curve.low, curve.mean, curve.high], axis=1), rtol=1e-5
            )


@pytest.fixture
def draw(monkeypatch, capsys):
    """draw(RUN, ...) -> what `python plot.py RUN ...` prints, in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        plot.main()
        return capsys.readouterr().out

    return run


def test_one_run_goes_into_its_folder_and_several_beside_the_first(tmp_path, run_script, draw):
    a = some_run(tmp_path / "a", config=dict(seed=1, lr=0.1, out_dir="a"))
    b = some_run(tmp_path / "b", config=dict(seed=2, lr=0.1, out_dir="b"))
    two = run_script("plot.py", a, b, cwd=tmp_path)
    assert two.returncode == 0 and not two.stderr
    one = draw(a)
    named = draw(b, f"--out={tmp_path / 'new' / 'figure.1'}")
    for told, stem in (
        (one, a / "plots"),
        (two.stdout, tmp_path / "comparison"),
        (named, tmp_path / "new/figure.1"),
    ):
        assert told.split()[-2:] == [f"{stem}.png", f"{stem}.html"]
        with open(f"{stem}.png", "rb") as file:
            assert file.read(4) == PNG
    assert re.search(r"^seed +1 +2$", two.stdout, re.MULTILINE) and not re.search("lr|out_dir", two.stdout)
    assert "<td>seed</td><td>1</td><td>2</td>" in (tmp_path / "comparison.html").read_text()
    assert "seed" not in one + named


def test_a_run_without_metrics_is_told_and_does_not_hide_the_others(tmp_path, capsys):
    good, empty = some_run(tmp_path / "x" / "run"), tmp_path / "y" / "run"
    empty.mkdir(parents=True)
    assert [run.name for run in plot.read_runs([str(good), str(empty)])] == [str(good)]
    assert f"{empty} has no metrics.jsonl" in capsys.readouterr().err
    (empty / "metrics.jsonl").write_text('{"step": 0, "ti')
    assert len(plot.read_runs([str(good), str(empty)])) == 1
    assert f"{empty / 'metrics.jsonl'} has no metrics" in capsys.readouterr().err


def test_a_run_is_not_compared_with_itself(tmp_path, monkeypatch):
    run = some_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert len(plot.read_runs(["run", "run/", "./run", str(run)])) == 1


@pytest.mark.parametrize(
    "out, one, two",
    [
        ("", "x/a/plots", "x/comparison"),
        ("figs/", "figs/plots", "figs/comparison"),
        ("figs/.png", "figs/plots", "figs/comparison"),
        (".", "plots", "comparison"),
        ("figs/one.html", "figs/one", "figs/one"),
        ("v1.2", "v1.2", "v1.2"),
    ],
)
def test_no_output_is_hidden(out, one, two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = (curves.read_run(some_run(tmp_path / "x" / name)) for name in "ab")
    assert (tmp_path / plot.stem_of(out, [a]), tmp_path / plot.stem_of(out, [a, b])) == (
        tmp_path / one,
        tmp_path / two,
    )


@pytest.mark.parametrize(
    "paths, message", [([], "which runs"), (["nowhere"], "nowhere"), (["."], "no metrics")]
)
def test_nothing_to_draw_is_one_line(paths, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        plot.read_runs(paths)


def without(package, tmp_path, monkeypatch):
    """An environment in which a package is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / f"{package}.py").write_text(
        f"raise ModuleNotFoundError('No module named {package}', name='{package}')"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("package, made", [("dygraphs", "plots.png"), ("matplotlib", "plots.html")])
def test_a_missing_package_costs_its_own_output_alone(package, made, tmp_path, monkeypatch, capsys):
    run = some_run(tmp_path / "run")
    without(package, tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(run)])
    plot.main()
    assert {path.name for path in run.glob("plots.*")} == {made}
    assert re.fullmatch(rf"no .*plots.*pip install {package}\n", capsys.readouterr().err)


def test_none_of_it_imports_torch_and_matplotlib_comes_late():
    code = "import plot, sys; from plots import curves, run_report; print({'torch', 'matplotlib', 'dygraphs'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.slow
def test_fifty_thousand_lines_in_five_seconds(tmp_path, run_script):
    runs = [some_run(tmp_path / name, lines=50_000) for name in "ab"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert run_script("plot.py", *runs).returncode == 0
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5


# ------------------------------------------------------------------------------------------------------------
# the report


def attempt(output, answer="33"):
    return SimpleNamespace(prompt="12+7*3=", output=output, answer=answer, correct=output == answer)


def test_a_report_says_what_was_run_and_what_became_of_it(tmp_path):
    records = [
        {"val/loss": 3.0, "train/loss": 3.1, "val/solved": 0.0, "train/minutes": 0.0},
        {"train/batch_loss": 9.75, "tokens_per_second": 1000.0},
        {
            "val/loss": 1.25,
            "train/loss": 1.5,
            "val/solved": 0.5,
            "val/solved/words": 0.25,
            "train/minutes": 2.0,
        },
        {
            "val/loss": 1.5,
            "train/loss": 1.0,
            "val/solved": 0.75,
            "val/solved/words": 0.5,
            "train/minutes": 4.04,
        },
    ]
    card = dict(command=["/usr/bin/python", "train.py", "--x=a b"], commit="abc123", hardware="cpu, 1 thread")
    path = write_run(tmp_path / "run", records, config=dict(n_layer=4), run=card)
    (path / "changes.diff").write_text("+1")
    attempts = dict(two=[attempt("33")] * 3, words=[attempt("33"), attempt("34"), attempt("")])
    run_report.write_report(path, "GPT with a DAG", attempts, ["one\n```", "two"])
    text = (path / "report.md").read_text()
    for line in (
        "# run",
        "GPT with a DAG",
        "| command | `python train.py '--x=a b'` |",
        "| commit | abc123, and what is in changes*.diff |",
        "| hardware | cpu, 1 thread |",
        "| steps | 30 |",
        "| minutes of training | 4.0 |",
        "![curves](curves.png)",
        "|  | best, step 20 | last, step 30 |",
        "| val/loss | 1.2500 | 1.5000 |",
        "| val/solved | 50.0% | 75.0% |",
        "| val/solved/words | 25.0% | 50.0% |",
        "two: 3 of 3 solved",
        "words: 1 of 3 solved",
        "    12+7*3=34  (failed, 33 is right)",
        "    ```",
        '      "n_layer": 4',
    ):
        assert line in text.splitlines(), line
    assert "batch" not in text and (path / "curves.png").read_bytes()[:4] == PNG


def test_a_report_never_ends_a_run(tmp_path, monkeypatch, capsys):
    run_report.write_report(tmp_path)
    assert re.fullmatch(r"no report of .*no metrics.jsonl.*\n", capsys.readouterr().err)
    path = write_run(tmp_path / "run", [{"x": 1.0}], config=dict(seed=7))
    without("matplotlib", tmp_path, monkeypatch)
    run_report.write_report(path, draw_plan=draw_figure)
    told = capsys.readouterr().err.splitlines()
    for line, name in zip(told, ("curves", "plan"), strict=True):
        assert re.fullmatch(rf"no {name}.png in the report.*pip install matplotlib", line)
    text = (path / "report.md").read_text()
    assert '"seed": 7' in text and "curves" not in text and "plan" not in text


def draw_figure(path):
    from matplotlib.figure import Figure

    Figure().savefig(path)
    return True


@pytest.mark.parametrize("drawn, shown", [(draw_figure, True), (lambda path: False, False), (None, False)])
def test_a_plan_is_shown_where_one_was_drawn(drawn, shown, tmp_path):
    path = some_run(tmp_path / "run")
    run_report.write_report(path, draw_plan=drawn)
    assert ("![plan](plan.png)" in (path / "report.md").read_text()) == shown == (path / "plan.png").exists()


def test_a_picture_that_fails_costs_itself_alone(tmp_path, capsys):
    def fail(path):
        raise ValueError("no such plan")

    path = some_run(tmp_path / "run")
    run_report.write_report(path, draw_plan=fail)
    assert capsys.readouterr().err == "no plan.png in the report: no such plan\n"
    assert "![curves](curves.png)" in (path / "report.md").read_text()


@pytest.mark.parametrize("solved", [0, 1, 5])
@pytest.mark.parametrize("failed", [0, 1, 2, 3, 4, 9])
def test_some_attempts_are_the_first_solved_and_failures_from_all_parts(solved, failed):
    wrong = [attempt(str(n), "-1") for n in range(failed)]
    right = [attempt("33") for _ in range(solved)]
    some = run_report.some_of(wrong + right)
    assert [a for a in some if a.correct] == right[:1]
    shown = [int(a.output) for a in some if not a.correct]
    assert len(shown) == min(2, failed) and shown == sorted(set(shown))
    assert not shown or shown[0] == 0 and shown[-1] >= failed // 2
