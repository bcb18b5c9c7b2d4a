"""sample.py, end to end on a tiny model that has learned a few lines by heart."""

import sys
from dataclasses import asdict

import pytest
import torch

import checkpoint
import sample
from configurator import run_script as run_main
from dag_model import GPT, GPTConfig
from dataloader import write_dataset
from tokenizer import ByteTokenizer, CharTokenizer

LINES = ["1+1=2", "2+1=3", "3+1=4", "caf\u00e9: \u20ac5"]


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
    state = checkpoint.Checkpoint(
        step=60,
        model=model.state_dict(),
        optimizer={},
        model_config=asdict(model.config),
        train_config=dict(
            data_dir=str(folder / "data"), dataset="sums", batch_size=1, block_size=longest, seed=1
        ),
        tokenizer=tokenizer.to_json(),
        loader=dict(documents=documents),
        rng={},
    )
    splits = {"train": lines, "val": lines}
    write_dataset(folder / "data" / "sums", "sums", tokenizer, splits, documents=documents)
    checkpoint.save(folder, "best", state)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on documents."""
    return save_run(tmp_path_factory.mktemp("run"), ByteTokenizer())


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
