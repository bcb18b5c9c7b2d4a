"""eval.py on a tiny model that knows a few lines by heart: the table, the failures, the last line."""

import json
import math
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import SEPARATOR, VOCABULARY

import eval as evaluate
from configurator import run_script as run_main
from dag_model import GPT, GPTConfig
from data.loader import Loader, write_dataset
from data.tokenizer import CharTokenizer
from evals.answers import Attempt, mean_loss
from training import checkpoint

TOKENIZER = CharTokenizer(b"".join(VOCABULARY).decode())
LINES = ["1+1=2", "2+1=3", "3+1=4", "ab 1 cd 8"]
PROBLEMS = {
    "val_sums": "1+1=\t2\n2+1=\t3\n3+1=\t5\n",
    "val_decoys": "ab 1 cd \t8\n",
    "test_sums": "1+1=\t2\n",
    "test_digits_2": "1+1=\t2.0001\n2+1=\t03\n",
    "test_decoys": "ab 1 cd \t8\n1+1=\t2\n",
}


def save_run(folder, lines=LINES, documents=True, **fields):
    """A run folder with a model that knows the lines by heart, and its data set in data/sums."""
    torch.manual_seed(0)
    rows = [TOKENIZER.encode(line + "\n") for line in lines]
    longest = max(map(len, rows))
    idx = torch.tensor([row + [SEPARATOR] * (longest - len(row)) for row in rows])
    sizes = dict(block_size=longest, vocab_size=len(VOCABULARY), n_layer=1, n_embd=32, separator_id=SEPARATOR)
    model = GPT(GPTConfig(**(sizes | dict(dag_depth=1) | fields)), VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    train_config = dict(
        data_dir=str(folder / "data"), dataset="sums", batch_size=1, block_size=longest, seed=1
    )
    state = checkpoint.Checkpoint(
        step=60,
        model=model.state_dict(),
        optimizer={},
        model_config=asdict(model.config),
        train_config=train_config,
        tokenizer=TOKENIZER.to_json(),
        loader=dict(documents=documents),
        rng={},
    )
    splits = {"train": lines, "val": lines}
    write_dataset(folder / "data" / "sums", "sums", TOKENIZER, splits, documents=documents)
    checkpoint.save(folder, "best", state)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = save_run(tmp_path_factory.mktemp("run"))
    problems = folder / "data" / "sums" / "problems"
    problems.mkdir()
    for name, text in PROBLEMS.items():
        (problems / f"{name}.tsv").write_text(text)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """call("--suite=all") -> exit code, stdout, stderr; in this process, to save the imports."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        code = 0
        try:
            run_main(evaluate.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def last_line(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_as_a_person_runs_it(run_script, run, tmp_path):
    done = run_script("eval.py", f"--out_dir={run}", f"--json={tmp_path / 'scores.json'}")
    assert (done.returncode, done.stderr) == (0, "")
    scores = last_line(done.stdout)
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    assert scores.pop("seconds") > 0 and scores.pop("step") == 60
    sums, decoys = scores["splits"].pop("val_sums"), scores["splits"].pop("val_decoys")
    assert scores.pop("splits") == {}
    assert (sums["n"], sums["exact"], sums["within_tol"]) == (3, 2 / 3, None)
    assert sum(sums["parts"].values()) == 1 and 0 <= sums["gate_open"] <= 1 and sums["false_fires"] is None
    assert decoys == dict(
        n=1, exact=None, within_tol=None, gate_open=None, parts={}, false_fires=decoys["false_fires"]
    )
    assert decoys["false_fires"] in (0.0, 1.0)
    # decoys have no part in what is said of all problems, but for the false fires
    assert {name: scores.pop(name) for name in sums} == sums | dict(false_fires=decoys["false_fires"])
    assert set(scores) == {"val_loss", "val_bpb", "val_loss_silent", "val_bpb_silent"}

    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["n", "exact", "gate", "open", "false", "fires", "failures"] in rows  # no rel_tol was given
    (row,) = [row for row in rows if row[:1] == ["val_sums"]]
    assert row[1:3] == ["3", "66.7%"] and row[-2:] == [*sums["parts"], "1"]
    (failure,) = [line for line in done.stdout.splitlines() if "3+1=4  (right is 5" in line]
    assert failure.split(":")[0].strip() in sums["parts"]


def test_losses(call, run):
    scores = last_line(call(f"--out_dir={run}", "--eval_iters=3")[1])
    model, _, _ = checkpoint.load_model(run, "best")
    loader = Loader(run / "data" / "sums", "val", batch_size=1, block_size=model.config.block_size, seed=2)
    for suffix, model.silent in (("", False), ("_silent", True)):
        loss = mean_loss(model, loader, 3, torch.device("cpu"), torch.float32)
        assert scores[f"val_loss{suffix}"] == pytest.approx(loss)
        assert scores[f"val_bpb{suffix}"] == pytest.approx(loss / math.log(2))  # a character is a byte here
    assert scores["val_loss"] != scores["val_loss_silent"]


def test_on_text_without_numbers_the_dag_changes_nothing(call, tmp_path):
    save_run(tmp_path, lines=["abcabdabe " * 3] * 2, documents=False, separator_id=-1)
    code, out, err = call(f"--out_dir={tmp_path}", "--eval_iters=2")
    scores = last_line(out)
    assert (code, err, scores["n"], scores["splits"]) == (0, "", 0, {})
    assert scores["val_loss"] == scores["val_loss_silent"] and scores["val_bpb"] == scores["val_bpb_silent"]


def test_the_model_is_not_silent_when_it_solves_problems(call, run, monkeypatch):
    heard = []
    solve = evaluate.answers.solve
    monkeypatch.setattr(
        evaluate.answers, "solve", lambda model, *rest: heard.append(model.silent) or solve(model, *rest)
    )
    assert call(f"--out_dir={run}")[0] == 0 and heard == [False]


def test_a_plain_model_has_no_gate_and_no_silence(call, tmp_path):
    save_run(tmp_path, dag_depth=0)
    (tmp_path / "mine_decoys.tsv").write_text("ab 1 cd \t8\n")
    code, out, err = call(f"--out_dir={tmp_path}")
    scores = last_line(out)
    assert (code, err) == (0, "") and scores["val_loss_silent"] is None and scores["val_bpb_silent"] is None
    assert scores["val_loss"] < 1 and (scores["n"], scores["exact"], scores["splits"]) == (0, None, {})
    scores = last_line(call(f"--out_dir={tmp_path}", f"--problems={tmp_path / 'mine_decoys.tsv'}")[1])
    assert scores["splits"]["mine_decoys"]["false_fires"] is None and scores["val_loss"] is None


def test_tolerance(call, run):
    code, out, _ = call(f"--out_dir={run}", "--suite=digits", "--rel_tol=1e-4")
    scores = last_line(out)
    assert code == 0 and (scores["n"], scores["exact"], scores["within_tol"]) == (2, 0.0, 1.0)
    assert " within " in out
    assert last_line(call(f"--out_dir={run}", "--suite=digits", "--rel_tol=1e-5")[1])["within_tol"] == 0.5
    assert call(f"--out_dir={run}", "--rel_tol=-1")[0] == 2


def test_all_has_the_decoys_and_test_has_not(call, run):
    scores = last_line(call(f"--out_dir={run}", "--suite=all")[1])
    assert {name: split["n"] for name, split in scores["splits"].items()} == dict(
        test_decoys=2, test_digits_2=2, test_sums=1
    )
    assert scores["n"] == 3 and scores["exact"] == 1 / 3
    assert list(last_line(call(f"--out_dir={run}", "--suite=test")[1])["splits"]) == [
        "test_digits_2",
        "test_sums",
    ]


def test_gates_are_pooled_by_answers_and_by_numbers(call, run, monkeypatch):
    monkeypatch.setattr(
        evaluate.failures,
        "gates_at_answers",
        lambda model, tokenizer, some, size: [len(some) == 1] * len(some),
    )
    monkeypatch.setattr(evaluate.failures, "gates_at_numbers", lambda *_: [True, False, False, False])
    scores = last_line(call(f"--out_dir={run}", "--suite=all")[1])
    assert (scores["gate_open"], scores["false_fires"]) == (1 / 3, 0.25)
    assert (
        scores["splits"]["test_sums"]["gate_open"] == 1
        and scores["splits"]["test_decoys"]["false_fires"] == 0.25
    )


def test_suites(tmp_path):
    kinds = ["two_numbers", "decimals", "carries", "sentences", "sentence_digits_7", "unseen_templates"]
    kinds += ["digits_8", "digits_13_20", "operands_5", "decoys"]
    (tmp_path / "problems").mkdir()
    for kind in kinds:
        for split in ("val", "test"):
            (tmp_path / "problems" / f"{split}_{kind}.tsv").touch()

    def kinds_of(suite, prefix="test_"):
        files = evaluate.problem_files(evaluate.EvaluateConfig(out_dir="x", suite=suite), tmp_path)
        assert all(path == tmp_path / "problems" / f"{name}.tsv" for name, path in files.items())
        assert all(name.startswith(prefix) for name in files)
        return {name.removeprefix(prefix) for name in files}

    assert kinds_of("val", "val_") == kinds_of("all") == set(kinds)
    assert kinds_of("test") == set(kinds) - {"decoys"}
    assert kinds_of("arithmetic") == {"two_numbers", "decimals", "carries"}
    assert kinds_of("digits") == {"digits_8", "digits_13_20"}
    assert kinds_of("operands") == {"operands_5"}
    assert kinds_of("sentences") == {"sentences", "sentence_digits_7", "unseen_templates"}
    assert kinds_of("decoys") == {"decoys"}


def test_a_suite_that_the_data_set_lacks(call, run):
    code, out, err = call(f"--out_dir={run}", "--suite=operands")
    assert code == 2 and out == "" and "no problems for suite=operands" in err and "test_digits_2" in err


@pytest.mark.parametrize(
    "content, words",
    [
        ("1+1=\t2\n1+1 2\n", "mine.tsv:2: expected prompt<TAB>answer"),
        ("1+1=\t2\n\n1+?=\t2\n", "mine.tsv:3: prompt '1+?=': character '?' at position 2"),
        ("", "no problems"),
    ],
)
def test_a_malformed_file_is_refused_before_anything_is_attempted(call, run, tmp_path, content, words):
    (tmp_path / "mine.tsv").write_text(content)
    code, out, err = call(f"--out_dir={run}", f"--problems={tmp_path / 'mine.tsv'}")
    assert code == 2 and out == "" and words in err and err.count("\n") == 1


def test_a_prompt_beyond_the_context_is_a_failure_shown_as_such(call, run, tmp_path):
    (tmp_path / "mine.tsv").write_text("1+1=\t2\n1+1+1+1+1+1=\t6\n")
    code, out, _ = call(f"--out_dir={run}", f"--problems={tmp_path / 'mine.tsv'}")
    assert code == 0 and last_line(out)["parts"] == {"context": 1} and last_line(out)["exact"] == 0.5
    assert "  context: 1+1+1+1+1+1=[nothing]  (right is 6)" in out.splitlines()


def test_failures_are_ten_and_from_everywhere(capsys):
    attempts = [Attempt(f"{n}=", "1", "0", n % 2 == 0, part="plan", plan=f"{n} = {n}") for n in range(51)]
    evaluate.show_failures(attempts)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "9 of 25 failures:" and len(lines) == 11
    assert lines[2] == "  plan: 1=0  (right is 1; planned 1 = 1)" and lines[-1].startswith("  plan: 49=0")
    evaluate.show_failures(attempts[::2])
    assert capsys.readouterr().out == ""
