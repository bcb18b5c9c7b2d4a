"""sample.py, end to end on a tiny model that has learned a few lines by heart."""

import io
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from conftest import DENSE, ROOT, SEPARATOR, VOCABULARY

import sample
from configurator import run_script as run_main
from dag_model import GPT, GPTConfig
from data.loader import write_dataset
from data.tokenizer import ByteTokenizer, CharTokenizer
from inference import explain, token_stats
from training import checkpoint

LINES = ["1+1=2", "2+1=3", "3+1=4", "caf\u00e9: \u20ac5"]


ANSI = re.compile(r"\x1b\[[0-9;]*m")
PNG = b"\x89PNG"


def save_run(folder, tokenizer, documents=True, lines=LINES):
    """A run folder with a model that knows the lines by heart, and its data set in data/sums."""
    torch.manual_seed(0)
    rows = [tokenizer.encode(line + "\n") for line in lines]
    longest = max(map(len, rows))
    idx = torch.tensor([row + [tokenizer.separator_id] * (longest - len(row)) for row in rows])
    sizes = dict(block_size=longest, vocab_size=tokenizer.vocab_size, n_layer=1, n_embd=32)
    model = GPT(GPTConfig(dag_depth=1, **sizes), tokenizer.vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    splits = {"train": lines, "val": lines}
    write_dataset(folder / "data" / "sums", "sums", tokenizer, splits, documents=documents)
    return save_model(folder, tokenizer, model, documents)


def save_model(folder, tokenizer, model, documents=True):
    state = checkpoint.Checkpoint(
        step=60,
        model=model.state_dict(),
        optimizer={},
        model_config=asdict(model.config),
        train_config=dict(
            data_dir=str(folder / "data"),
            dataset="sums",
            batch_size=1,
            block_size=model.config.block_size,
            seed=1,
        ),
        tokenizer=tokenizer.to_json(),
        loader=dict(documents=documents),
        rng={},
    )
    checkpoint.save(folder, "best", state)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on documents."""
    return save_run(tmp_path_factory.mktemp("run"), ByteTokenizer())


@pytest.fixture
def planned(tmp_path, tiny_gpt):
    """A run whose model writes nonsense, and plans wherever a number may open."""
    model = tiny_gpt(std=0.6, block_size=64, separator_id=SEPARATOR, dag_depth=2)
    torch.nn.init.constant_(model.dag.wanted.bias, 5.0)
    return save_model(tmp_path / "planned", CharTokenizer(b"".join(VOCABULARY).decode()), model)


@pytest.fixture
def call(monkeypatch, capsys):
    """call(sample, "--start=x") -> exit code, stdout, stderr; in this process, to save the imports."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        code = 0
        try:
            run_main(script.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def test_sample_as_a_person_runs_it(run_script, run):
    done = run_script("sample.py", f"--out_dir={run}", "--start=2+1=", "--temperature=0", "--num_samples=2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "2+1=3\n" + "-" * 20 + "\n2+1=3\n"


def test_without_a_start_a_document_begins(call, run, monkeypatch):
    prompts = []
    monkeypatch.setattr(sample, "generate", lambda model, rows, *_, **__: prompts.extend(rows))
    assert call(sample, f"--out_dir={run}", "--num_samples=2")[0] == 0
    assert prompts == [[ord("\n")]] * 2


def test_samples_are_those_of_the_seed(call, run):
    def texts(count, seed):
        settings = f"--start=1 --temperature=5 --max_new_tokens=6 --stop= --num_samples={count} --seed={seed}"
        return call(sample, f"--out_dir={run}", *settings.split())[1].split("-" * 20 + "\n")

    assert texts(3, 1) == texts(1, 1) + texts(1, 2) + texts(1, 3)
    assert len(set(texts(3, 1))) == 3


def test_the_start_may_be_a_file(call, run, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes("caf\u00e9:\n".encode())  # as an editor leaves it
    code, out, _ = call(sample, f"--out_dir={run}", f"--start=FILE:{prompt}", "--temperature=0")
    assert (code, out) == (0, "caf\u00e9: \u20ac5\n")


def test_streams_of_text_go_on_past_separators(call, tmp_path):
    save_run(tmp_path, CharTokenizer("\n+=12"), documents=False, lines=["1+1=2\n1+1=2"])
    arguments = f"--out_dir={tmp_path}", "--start=1+", "--temperature=0", "--max_new_tokens=9"
    assert call(sample, *arguments)[1] == "1+1=2\n1+1=2\n"
    assert call(sample, *arguments, "--stop=2\n1")[1] == "1+1=\n"


def test_the_stop_text_is_not_shown_not_even_in_part(run, capsys):
    text = sample.Sample(ByteTokenizer(), stop="END")
    shown = []
    for token in b"an E, an ENEND!":
        ended = text.add(token)
        text.show()
        shown.append(capsys.readouterr().out)
        if ended:
            break
    assert shown == ["a", "n", " ", "", "E,", " ", "a", "n", " ", "", "", "EN", "", ""]
    text.show(final=True)
    assert capsys.readouterr().out == "\n"
    assert text.text == "an E, an EN"


def test_nothing_is_left_of_a_token_that_the_stop_has_cut(capsys):
    class Glued(ByteTokenizer):
        def token_bytes(self, id):
            return b"an END\xe2"

    text = sample.Sample(Glued(), stop="END")
    assert text.add(0)
    text.show(final=True)
    assert capsys.readouterr().out == "an \n"


def test_characters_are_shown_when_they_are_complete(capsys):
    text = sample.Sample(ByteTokenizer(), stop="")
    shown = []
    for token in "\u20ac5\u20ac".encode()[:-1]:
        text.add(token)
        text.show()
        shown.append(capsys.readouterr().out)
    assert shown == ["", "", "\u20ac", "5", "", ""]
    text.show(final=True)
    assert capsys.readouterr().out == "\ufffd\n"  # the sample ended within a character


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--out_dir=RUN"),
        (["--out_dir=nowhere"], "no checkpoint in nowhere"),
        (["--start=0123456789abc"], "13 tokens does not fit"),
        (["--start=FILE:nowhere.txt"], "nowhere.txt"),
        (["--top_p=2"], "top_p=2.0"),
        (["--seed=99999999999999999999"], "seed='99999999999999999999'"),
        (["--temperatur=2"], "did you mean 'temperature'?"),
        (["--device=gpu"], "device=gpu"),
    ],
)
def test_mistakes_are_one_line(call, run, arguments, words):
    if arguments and not arguments[0].startswith("--out_dir"):
        arguments = [f"--out_dir={run}", *arguments]
    code, out, err = call(sample, *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_unreadable_starts_are_one_line(call, tmp_path):
    save_run(tmp_path, CharTokenizer("\n+=12"), lines=["1+1=2"])
    code, _, err = call(sample, f"--out_dir={tmp_path}", "--start=1+a=")
    assert code == 2 and "'a' at position 2" in err and err.count("\n") == 1
    (tmp_path / "prompt.txt").write_bytes(b"1+\xff")
    code, _, err = call(sample, f"--out_dir={tmp_path}", f"--start=FILE:{tmp_path / 'prompt.txt'}")
    assert code == 2 and "not UTF-8 text (byte 2)" in err and err.count("\n") == 1


def test_pretrained_weights_need_no_run(call, monkeypatch, tiny_gpt):
    asked = []
    model = tiny_gpt(vocabulary=ByteTokenizer().vocabulary, dag_depth=0)
    monkeypatch.setattr(GPT, "from_huggingface", lambda name, **fields: asked.append((name, fields)) or model)
    monkeypatch.setattr(sample.tokenizers, "build", lambda kind, text: asked.append(kind) or ByteTokenizer())
    code, out, _ = call(sample, "--init_from=gpt2-medium", "--start=ab", "--max_new_tokens=3")
    assert code == 0 and out.startswith("ab")
    assert sorted(map(str, asked)) == ["('gpt2-medium', {'dag_depth': 0})", "gpt2"]


# ------------------------------------------------------------------------------------------------------------
# looking at what was written

THOUGHT = explain.Thought(
    position=6,
    first=7,
    last=8,
    text="33",
    expression="12 + (7 * 3 = 21) = 33",
    written="33",
    followed=True,
    format="exact",
    probability=0.98,
    gate=0.93,
    inputs=(),
    steps=(),
    result=0,
    alternatives=(explain.Candidate("12 + 7 = 19", "19", 1.6e-8), explain.Candidate("7 = 7", "7", 1e-9)),
)


def test_a_thought_in_words():
    assert sample.explanation(THOUGHT) == [
        "33: 12 + (7 * 3 = 21) = 33",
        "    gate 0.93, plan probability 0.98",
        "    next best plan: 12 + 7 = 19, probability 2e-08",
    ]
    departed = replace(THOUGHT, text="34", followed=False, format="places_0", alternatives=())
    assert sample.explanation(departed) == [
        "34: 12 + (7 * 3 = 21) = 33, in the format places_0, which the text does not follow",
        "    gate 0.93, plan probability 0.98",
    ]
    unplanned = explain.Unplanned(1, 1, "8", "the gate was shut")
    assert sample.explanation(unplanned) == ["8: no plan, the gate was shut"]


def test_plans_follow_the_samples_that_they_explain(call, planned):
    arguments = f"--out_dir={planned}", "--start=12+7", "--num_samples=3", "--max_new_tokens=40", "--stop="
    plain, shown = call(sample, *arguments)[1], call(sample, *arguments, "--show_dag=true")[1]
    model, tokenizer, _ = checkpoint.load_model(planned, "best")
    expected = []
    for text in plain.split("-" * 20 + "\n"):
        look = explain.explain(model, tokenizer, tokenizer.encode(text[:-1]), start=4)
        lines = [
            f"    {n.text}: {getattr(n, 'expression', 'no plan')}" for n in [*look.thoughts, *look.unplanned]
        ]
        expected.append((text, lines))
    for part, (text, lines) in zip(shown.split("-" * 20 + "\n"), expected, strict=True):
        assert part.startswith(text)
        told = [line for line in part[len(text) :].splitlines() if line.startswith("    ") and line[4] != " "]
        assert len(told) == len(lines) > 2
        for line in lines:
            assert any(said.startswith(line) for said in told), line


def test_numbers_of_the_prompt_are_not_explained(call, run):
    shown = call(sample, f"--out_dir={run}", "--start=3+1=", "--temperature=0", "--show_dag=true")[
        1
    ].splitlines()
    assert shown[0] == "3+1=4" and shown[1].startswith("    4: ")
    assert not any(line.startswith(("    3:", "    1:")) for line in shown)
    shown = call(sample, f"--out_dir={run}", "--start=caf", "--stop=:", "--temperature=0", "--show_dag=true")[
        1
    ]
    assert shown == "caf\u00e9\n    no number was written\n"


def forced(call, monkeypatch, *arguments, **environment):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"COLORTERM": "truecolor", **environment}.items():
        monkeypatch.setenv(name, value)
    code, out, _ = call(sample, *arguments)
    assert code == 0
    return out


@pytest.mark.parametrize("mode", token_stats.MODES)
def test_every_token_has_the_color_of_its_confidence(call, planned, monkeypatch, mode):
    arguments = (
        f"--out_dir={planned}",
        "--start=12+7",
        "--max_new_tokens=40",
        "--stop=",
        f"--colorize_output={mode}",
    )
    plain = forced(call, monkeypatch, *arguments)
    told, _, text = forced(call, monkeypatch, *arguments, FORCE_COLOR="1").partition("\n")
    assert told.startswith(f"{mode}: ") and all(word in told for word in token_stats.MODES[mode].legend)
    assert "\x1b" not in plain and ANSI.sub("", text) == plain
    colored = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+)m([^\x1b]*)\x1b\[0m", text)
    model, tokenizer, _ = checkpoint.load_model(planned, "best")
    choices = token_stats.choices(model, tokenizer, tokenizer.encode(plain[:-1]), start=4)
    colors = ["#{:02x}{:02x}{:02x}".format(*map(int, rgb)) for *rgb, _ in colored]
    assert [(token, color) for (*_, token), color in zip(colored, colors, strict=True)] == [
        (choice.text, token_stats.MODES[mode].color(choice)) for choice in choices
    ]
    assert len(set(colors)) > 1


def test_where_there_are_no_colors_the_text_is_the_same(call, planned, monkeypatch):
    arguments = (
        f"--out_dir={planned}",
        "--start=12+7",
        "--max_new_tokens=60",
        "--stop=",
        "--colorize_output=true",
    )
    outputs = {
        forced(call, monkeypatch, *arguments, **environment)
        for environment in (
            {},
            {"NO_COLOR": "1", "FORCE_COLOR": "1"},
            {"TERM": "dumb", "FORCE_COLOR": "1"},
            {"COLUMNS": "10"},
        )
    }
    colored = {
        forced(call, monkeypatch, *arguments, FORCE_COLOR="1", COLUMNS=columns)
        for columns in ("10", "80", "300")
    }
    (plain,), (colored,) = outputs, colored  # whatever the width
    assert "\x1b" not in plain and ANSI.sub("", colored).partition("\n")[2] == plain
    assert ANSI.sub("", colored).startswith("probability: ")


def test_colors_end_with_the_text(call, run, monkeypatch):
    """The stop is not shown, and neither are parts of characters."""
    arguments = f"--out_dir={run}", "--start=caf", "--temperature=0", "--colorize_output=rank"
    shown = forced(call, monkeypatch, *arguments, FORCE_COLOR="1")
    assert ANSI.sub("", shown).splitlines()[1] == "caf\u00e9: \u20ac5"
    shown = forced(call, monkeypatch, *arguments, "--stop=: ", FORCE_COLOR="1")
    assert ANSI.sub("", shown).splitlines()[1:] == ["caf\u00e9"]
    assert call(sample, *arguments, "--stop=", "--start=0123456789abc")[:2] == (2, "")  # not even the legend
    shown = forced(call, monkeypatch, *arguments, "--max_new_tokens=1", FORCE_COLOR="1")
    assert ANSI.sub("", shown).splitlines()[1:] == ["caf\ufffd"]


@pytest.mark.parametrize(
    "mode, measured, places",
    [
        ("probability", dict(probability=[1.0, 0.99, 0.9, 0.5, 0.1, 0.0999, 0.0]), [0, 0, 1, 2, 3, 4, 4]),
        ("rank", dict(rank=[1, 2, 3, 5, 6, 20, 21]), [0, 1, 2, 2, 3, 3, 4]),
        ("gate", dict(gate=[1.0, 0.9, 0.5, 0.05, 0.049, 0.0]), [0, 1, 2, 3, 4, 4]),
    ],
)
def test_colors_go_by_steps(mode, measured, places):
    blank = token_stats.Choice(0, "", 0.0, 1, 0.0, ())
    ((name, values),) = measured.items()
    colors = [token_stats.MODES[mode].color(replace(blank, **{name: value})) for value in values]
    assert colors == [token_stats.MODES[mode].colors[place] for place in places]


def test_pictures_are_written_under_numbered_names(call, planned, tmp_path):
    dag, heatmap = tmp_path / "new" / "dag.png", tmp_path / "heat.png"
    arguments = f"--out_dir={planned}", "--start=12+7", "--num_samples=2", "--max_new_tokens=12", "--stop="
    pictures = f"--dag_png={dag}", "--show_heatmaps=true", f"--heatmap_png={heatmap}"
    code, out, err = call(sample, *arguments, *pictures)
    written = [dag, heatmap, dag.with_stem("dag-2"), heatmap.with_stem("heat-2")]
    assert code == 0 and err.splitlines() == [f"wrote {path}" for path in written]
    assert all(path.read_bytes().startswith(PNG) for path in written)
    assert out == call(sample, *arguments)[1]


@pytest.mark.parametrize(
    "fields, arguments, words",
    [
        (dict(dag_depth=0), ["--show_dag=true"], "leave them out"),
        (DENSE["token"], ["--dag_png=dag.png"], "leave them out"),
        (dict(dag_depth=0), ["--colorize_output=gate"], "choose probability or rank"),
        (dict(DENSE["token"], dag_gate=False), ["--colorize_output=gate"], "choose probability or rank"),
        (dict(), ["--dag_png=dag.jpg"], "ends in .png"),
        (dict(), ["--start=1", "--interactive=true"], "leave out --start"),
        (dict(), ["--colorize_output=red"], "expected one of none, true, probability"),
    ],
)
def test_what_cannot_be_shown_is_said_first(call, tmp_path, tiny_gpt, fields, arguments, words):
    save_model(tmp_path, CharTokenizer(b"".join(VOCABULARY).decode()), tiny_gpt(**fields))
    code, out, err = call(sample, f"--out_dir={tmp_path}", *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------
# interactive


def test_prompts_come_from_a_pipe_too(call, tmp_path, monkeypatch):
    """A bad one costs nothing but itself."""
    save_run(tmp_path, CharTokenizer("\n+=1234"), lines=LINES[:3])
    (tmp_path / "prompt.txt").write_text("3+1=\n")
    typed = [
        "1+1=",
        "1+a=",
        "1+1+1+1+1",
        f"FILE:{tmp_path / 'nowhere'}",
        f"FILE:{tmp_path / 'prompt.txt'}",
        "2+1=",
    ]
    typed = "\n".join(typed).encode().replace(b"1+a", b"1+\xff")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    code, out, err = call(sample, f"--out_dir={tmp_path}", "--interactive=true", "--temperature=0")
    assert (code, out) == (0, "1+1=2\n3+1=4\n2+1=3\n\n")
    errors = err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    assert "not in the vocabulary" in errors[0] and "does not fit the context" in errors[1]


def test_an_empty_prompt_ends(call, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1+1=\n\n2+1=\n"), encoding="utf-8"))
    assert call(sample, f"--out_dir={run}", "--interactive=true", "--temperature=0")[1] == "1+1=2\n"


class Terminal:
    """sample.py at the other end of a pseudo-terminal."""

    def __init__(self, *arguments):
        import pty

        self.end, theirs = pty.openpty()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "INPUTRC": os.devnull}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "sample.py"), *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # so that Ctrl-C comes from it
        )
        os.close(theirs)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def wait_for(self, pattern: str, seconds: float = 30) -> str:
        """What came until then."""
        import select

        until = time.monotonic() + seconds
        while (match := re.search(pattern, self.text)) is None:
            assert time.monotonic() < until, f"{pattern!r} did not come after {self.text[-300:]!r}"
            if select.select([self.end], [], [], 0.1)[0]:
                self.text += os.read(self.end, 4096).decode(errors="replace")
        came, self.text = self.text[: match.end()], self.text[match.end() :]
        return came


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_conversation_in_a_terminal(planned):
    settings = (
        "--interactive=true",
        "--temperature=0",
        "--stop=",
        "--max_new_tokens=1000000",
        "--show_dag=true",
    )
    terminal = Terminal(f"--out_dir={planned}", *settings)
    try:
        terminal.wait_for("> $")
        terminal.type("12+X=\n")
        assert "character 'X' at position 3" in terminal.wait_for("error: .*\n")
        terminal.wait_for("> $")
        terminal.type("12+\x02\x023\x05=\n")  # back by two, "3", to the end
        terminal.wait_for(r"\n132\+=(?s:.{9})")
        terminal.type("\x03")  # Ctrl-C, or it would go on for hours
        terminal.wait_for("> $")
        terminal.type("\x1b[A\n")  # the prompt before, from the history
        terminal.wait_for(r"\n132\+=(?s:.{9})")
        terminal.type("\x03")
        terminal.wait_for("> $")
        terminal.type("5")
        terminal.wait_for("5")
        time.sleep(
            0.3
        )  # Python overlooks a signal for as long as nobody types, if it comes before it waits for that
        terminal.type("\x03")  # drops the line alone
        terminal.wait_for("> $")
        terminal.type("\x04")  # Ctrl-D
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)
