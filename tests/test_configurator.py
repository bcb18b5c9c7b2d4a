"""The configurator: typed values, precedence, and one line for every mistake."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configurator import (
    ConfigError,
    help_text,
    load,
    load_with_files,
    parse,
    pick,
    run_script,
    setting,
    settings_of,
    to_dict,
)
from training.train_config import TrainConfig

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Example:
    count: int = setting(1, "how many", section="first")
    rate: float = setting(0.5, "how fast")
    name: str = setting("x", "what it is called", section="second")
    flag: bool = setting(False, "whether")
    mode: str = setting("auto", "how", choices=("auto", "true", "false"))
    limit: int | None = setting(None, "at most", minimum=1)
    share: float = setting(0.0, "part of it", minimum=0, below=1)

    def check(self):
        if self.name == "forbidden":
            raise ValueError("name='forbidden' is not allowed with anything")


KEYS = [field.name for field in dataclasses.fields(Example)]
finite = st.floats(allow_nan=False, allow_infinity=False)
in_int64 = st.integers(-(2**63), 2**63)
argument = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))  # what argv can hold


def flags(**values):
    return [f"--{name}={value}" for name, value in values.items()]


def write(path, text):
    path.write_text(text)
    return str(path)


def message(*argv, cls=Example):
    with pytest.raises(ConfigError) as error:
        parse(cls, list(argv))
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------
# values


@given(in_int64, finite, argument, st.booleans(), st.none() | st.integers(1, 10**9))
def test_any_value_given_as_a_flag_arrives_equal_and_typed(count, rate, name, flag, limit):
    name = "n" + name  # not the forbidden one
    config = load(Example, flags(count=count, rate=repr(rate), flag=flag, limit=limit, name=name))
    assert config == Example(count=count, rate=rate, name=name, flag=flag, limit=limit)
    assert [type(v) for v in (config.count, config.rate, config.flag)] == [int, float, bool]


@given(in_int64, finite, argument, st.booleans(), st.none() | st.integers(1, 10**9))
def test_any_value_assigned_in_a_file_arrives_equal(tmp_path_factory, count, rate, name, flag, limit):
    path = tmp_path_factory.getbasetemp() / "values.py"
    text = f"count = {count}\nrate = {rate!r}\nname = {'n' + name!r}\nflag = {flag}\nlimit = {limit}\n"
    path.write_text(text, encoding="utf-8")
    assert load(Example, [str(path)]) == Example(count, rate, "n" + name, flag, limit=limit)


@given(st.integers(-(10**6), 10**6), st.integers(0, 9))
def test_an_int_may_be_written_as_an_integral_float(mantissa, exponent):
    assert load(Example, [f"--count={mantissa}e{exponent}"]).count == mantissa * 10**exponent


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "tRuE"])
def test_booleans_and_choices_in_any_case(text):
    config = load(Example, flags(flag=text, mode=text))
    assert config.flag is True and config.mode == "true"


def test_a_choice_named_like_a_boolean_may_be_assigned_as_one(tmp_path):
    assert load(Example, [write(tmp_path / "c.py", "mode = False")]).mode == "false"


@pytest.mark.parametrize("value", ["a=b", "--name=x", " spaced ", "", "a\nb", "none", "é"])
def test_strings_are_verbatim_and_split_at_the_first_equals_sign(value):
    assert load(Example, ["--name=" + value]).name == value


@pytest.mark.parametrize(
    "key, text, expected",
    [
        ("count", "1.5", "int"),
        ("count", "abc", "int"),
        ("count", "", "int"),
        ("count", "inf", "int"),
        ("count", "true", "int"),
        ("count", "none", "int"),
        ("rate", "fast", "a finite float"),
        ("rate", "nan", "finite float"),
        ("rate", "-inf", "finite float"),
        ("rate", "1e999", "finite float"),
        ("flag", "1", "true or false"),
        ("flag", "", "true or false"),
        ("limit", "0", "int >= 1 or none"),
        ("mode", "on", "one of auto, true, false"),
        ("share", "1", "in [0, 1)"),
        ("share", "-1", "in [0, 1)"),
    ],
)
def test_an_ill_typed_flag_is_refused_with_what_was_expected(key, text, expected):
    line = message(f"--{key}={text}")
    assert line.startswith(f"config error (command line): {key}={text!r}: expected ") and expected in line


@pytest.mark.parametrize(
    "assignment",
    [
        "count = '1'",
        "count = True",
        "count = 1.5",
        "count = None",
        "count = float('inf')",
        "rate = '0.5'",
        "rate = False",
        "rate = 10**400",
        "rate = float('nan')",
        "name = 3",
        "flag = 1",
        "flag = 'true'",
        "mode = 1",
        "limit = 'none'",
        "limit = 0",
        "share = 1.0",
        "name = ['a']",
    ],
)
def test_a_file_is_held_to_the_same_types(tmp_path, assignment):
    path = write(tmp_path / "c.py", assignment)
    line = message(path)
    assert line.startswith(f"config error ({path}): {assignment.split()[0]}=") and "expected" in line


def test_ints_for_floats_and_integral_floats_for_ints_are_converted(tmp_path):
    config = load(Example, [write(tmp_path / "c.py", "rate = 2\ncount = 6e5")])
    assert (config.rate, config.count) == (2.0, 600000)
    assert type(config.rate) is float and type(config.count) is int


# ------------------------------------------------------------------------------------------------------------
# keys, files and precedence


@given(st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_-]*", fullmatch=True).filter(lambda key: key not in KEYS))
def test_an_unknown_key_is_refused(key):
    assert f"unknown key {key!r}" in message("--count=2", f"--{key}=1")


def test_an_unknown_key_names_the_nearest_one(tmp_path):
    path = write(tmp_path / "typo.py", "dag_detph = 4")
    assert (
        message(path, cls=TrainConfig)
        == f"config error ({path}): unknown key 'dag_detph', did you mean 'dag_depth'?"
    )
    assert "did you mean 'batch_size'?" in message("--batch-size=4", cls=TrainConfig)


@given(st.permutations(["first", "second", "--count=7", "--name=flag"]))
def test_flags_win_wherever_they_stand_and_later_files_over_earlier(tmp_path_factory, order):
    folder = tmp_path_factory.getbasetemp()
    files = {
        "first": write(folder / "1.py", "count = 1; name = 'file'; rate = 1"),
        "second": write(folder / "2.py", "count = 2; rate = 2"),
    }
    config, used = load_with_files(Example, [files.get(item, item) for item in order])
    assert (config.count, config.name) == (7, "flag")
    assert used == [files[item] for item in order if item in files]
    assert config.rate == (2 if order.index("second") > order.index("first") else 1)


def test_the_last_of_duplicate_flags_wins():
    assert load(Example, ["--count=1", "--count=2"]).count == 2


def test_a_file_may_compute_and_import_in_a_namespace_of_its_own(tmp_path):
    first = write(
        tmp_path / "1.py",
        "import math\nfrom pathlib import Path\n_half = 0.25\n"
        "def double(x): return 2 * x\ncount = 5 * 8\nrate = double(_half)\n",
    )
    assert load(Example, [first]) == Example(count=40, rate=0.5)
    second = write(tmp_path / "2.py", "count = count + 1")
    assert "NameError" in message(first, second)


@pytest.mark.parametrize(
    "content, line",
    [
        ("count = 1\nname = (\n", "line 2: '(' was never closed"),
        ("\n\ncount = 1 / 0", "line 3: ZeroDivision"),
        ("raise SystemExit(0)", "line 1: SystemExit"),
        ("\nraise ValueError('a\\nb')", "line 2: ValueError: a b"),
        (b"name = '\xff'", "line 1: "),
        ("name = 'a\0b'", "null byte"),
    ],
)
def test_a_broken_file_is_one_line_with_its_line_number(tmp_path, content, line):
    path = tmp_path / "broken.py"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message(str(path)).startswith(f"config error ({path}): ") and line in message(str(path))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    write(tmp_path / "train_default.py", "")
    assert "did you mean" in message(str(tmp_path / "train_defualt.py"))
    assert "no such config file" in message("count=3")
    assert "cannot be read" in message(str(tmp_path))


@pytest.mark.parametrize("argv", [["--count", "3"], ["--flag"], ["-count=3"], ["--"]])
def test_a_flag_without_equals_sign_says_how_to_write_it(argv):
    key = argv[0].lstrip("-").partition("=")[0] or "key"
    assert f"--{key}=value" in message(*argv)


def test_a_saved_run_stands_in_for_the_defaults(tmp_path):
    saved = dict(count=5, rate=2, gone=1)
    assert parse(Example, ["--rate=3"], base=saved)[0] == Example(count=5, rate=3.0)
    with pytest.raises(ConfigError, match="saved run"):
        parse(Example, [], base=dict(mode="no longer a choice"))


def test_checks_across_settings_name_where_they_came_from(tmp_path):
    path = write(tmp_path / "c.py", "name = 'forbidden'")
    assert (
        message(path, "--count=2")
        == f"config error ({path}, command line): name='forbidden' is not allowed with anything"
    )


# ------------------------------------------------------------------------------------------------------------
# classes, help and scripts


def test_a_subclass_adds_settings_and_inherits_what_it_does_not_restate():
    @dataclass(frozen=True)
    class Child(Example):
        share: float = 0.25
        extra: int = setting(3, "one more", section="third")

    assert load(Child, ["--extra=4", "--count=2"]) == Child(count=2, extra=4)
    assert load(Child, []).share == 0.25
    assert settings_of(Child)["share"].meaning == "part of it"
    assert "in [0, 1)" in message("--share=2", cls=Child)


def test_help_shows_every_key_and_the_value_in_force(capsys, tmp_path):
    path = write(tmp_path / "c.py", "count = 42\nname = 'forbidden'")
    with pytest.raises(SystemExit) as end:
        load(Example, ["--help", path, "--rate=0.75"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    row = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ") and line[2] != " "}
    assert list(row) == KEYS
    assert "42" in row["count"] and "[default 1]" in row["count"] and "how many" in row["count"]
    assert "0.75" in row["rate"] and "one of auto, true, false" in row["mode"]
    assert "int >= 1 or none" in row["limit"]
    assert shown.index("\nfirst") < shown.index("count") < shown.index("\nsecond") < shown.index("  name")


def test_help_of_training_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    text = help_text(TrainConfig())
    assert max(map(len, text.splitlines())) <= 110
    assert all(f"  {field.name} " in text for field in dataclasses.fields(TrainConfig))


def test_defaults_of_training_are_legal_values_of_their_own_settings():
    values = {name: "none" if value is None else value for name, value in to_dict(TrainConfig()).items()}
    assert load(TrainConfig, flags(**values)) == TrainConfig()
    assert all(item.meaning for item in settings_of(TrainConfig).values())


@pytest.mark.parametrize("argv", [["--n_embd=130"], ["--min_lr=1"], ["--device=gpu"], ["--device=cuda:x"]])
def test_training_settings_that_cannot_be_together_are_refused(argv):
    assert "config error (command line): " + argv[0][2:5] in message(*argv, cls=TrainConfig)


def test_pick_takes_equally_named_fields_and_overrides():
    @dataclass(frozen=True)
    class Part:
        rate: float = 0.0
        count: int = 0
        own: str = "kept"

    assert pick(Example(count=5), Part, rate=0.1) == Part(rate=0.1, count=5, own="kept")


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from configurator import load, run_script
from training.train_config import TrainConfig
def main():
    load(TrainConfig)
    raise {error}
run_script(main)
"""


@pytest.mark.parametrize(
    "error, argv, line",
    [
        ("ValueError('two\\nlines')", ["--seed=3"], "error: two lines"),
        ("FileNotFoundError('no data: prepare it')", [], "error: no data: prepare it"),
        ("ImportError('pip install transformers')", [], "error: pip install transformers"),
        (
            "SystemExit(0)",
            ["--sede=3"],
            "config error (command line): unknown key 'sede', did you mean 'seed'?",
        ),
    ],
)
def test_a_script_ends_with_one_line_and_exit_code_2(error, argv, line):
    environment = {k: v for k, v in os.environ.items() if k != "TRACEBACK"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(root=str(ROOT), error=error), *argv],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")


def test_mistakes_of_the_program_are_not_hidden(monkeypatch, capsys):
    def fail():
        raise ValueError("mend this")

    with pytest.raises(KeyError):
        run_script(lambda: {}["missing"])
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(SystemExit) as end:
        run_script(fail)
    shown = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" in shown and shown.endswith("error: mend this\n")


def test_every_choice_of_the_settings_has_its_code():
    import dag_model
    from dag import dense
    from dag.exact_arithmetic import OPERATIONS
    from gpt import model_config

    ours = settings_of(TrainConfig)
    assert set(ours["dag_inputs"].choices) == dag_model.DAGS.keys() == model_config.CHOICES_BY_INPUTS.keys()
    assert set(ours["dag_context"].choices) == dense.CONTEXTS.keys()
    assert set(model_config.RELAXATIONS) == dense.PLANS.keys()
    assert set(model_config.DENSE_CHOICES["dag_values"]) == dense.VALUES.keys()
    assert set(model_config.DENSE_CHOICES["dag_fold"]) == dense.FOLDS.keys()
    assert list(model_config.OPERATIONS) == list(OPERATIONS) == list(dense.OPERATIONS)
