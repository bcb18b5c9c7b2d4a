"""The layout: who may import whom, what runs without torch, and how large things may grow. Read from the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("gpt", "dag", "data", "training", "inference", "evals", "plots", "launch")
MAY_IMPORT = {  # folders, and modules of the root; a folder may always import its own modules
    "configurator": set(),
    "gpt": set(),
    "dag": {"gpt"},
    "dag_model": {"gpt", "dag"},
    "data": {"configurator"},
    "training": {"configurator", "gpt", "data", "dag_model"},
    "inference": {"gpt", "dag", "dag_model", "data"},
    "evals": {"configurator", "gpt", "dag", "dag_model", "data", "training", "inference"},
    "plots": {"inference"},
    "dag_logger": {"dag_model", "data", "inference", "evals"},
    "launch": {"configurator", "training.train_config", "training.run_folder"},
    "config": set(),
}
LIBRARY_AT_ROOT = {"configurator", "dag_model", "dag_logger"}  # the other modules of the root are scripts
LAUNCHERS = ("lambda_service", "slurm")  # they run where neither torch nor numpy is installed
MODEL_SIDE = ("gpt", "dag", "dag_model")
NEVER_ON_THE_MODEL_SIDE = {"os", "environ", "getenv", "configurator", "dag_logger", "data", "wandb"}
FORBIDDEN_AT_ROOT = {"datasets", "tokenizers", "train/"} | set(sys.stdlib_module_names)
MOST = {
    "modules of the root": 16,
    "entries of the root": 32,
    "modules of a folder": 12,
    "lines of a file": 600,
}


def our_files() -> list[Path]:
    named = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / name for name in named.stdout.split()]
    return [path for path in paths if path.exists() and path.relative_to(ROOT).parts[0] != "tests"]


FILES = our_files()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}
SCRIPTS = {name for name in MODULES if "." not in name} - LIBRARY_AT_ROOT - set(FOLDERS)


def imported_modules(tree: ast.AST) -> set[str]:
    """Every module that a file imports, by its full name: ours down to the module, of others as it is written."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = {node.module or ""}
            children = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (children & MODULES.keys()) or parents
    return names


def read(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(module: str) -> str:
    return module.partition(".")[0]


def broken_rules(module: str, imported: set[str]) -> set[str]:
    """Those of our modules among the imported ones that `module` may not import."""
    ours = {name for name in imported if room(name) in FOLDERS or name in MODULES}
    place = room(module)
    is_script = place in SCRIPTS or place == "runs" or module.endswith(".prepare")
    if is_script and place not in LAUNCHERS:
        return ours & SCRIPTS - (
            {"train"} if place == "runs" else set()
        )  # runs/ repeats results: a variant of train.py
    allowed = MAY_IMPORT["launch"] | {"launch"} if place in LAUNCHERS else MAY_IMPORT[place] | {place}
    return {name for name in ours if name not in allowed and room(name) not in allowed}


def closure(module: str, seen: set[str] | None = None) -> set[str]:
    """Every module, ours or foreign, that importing ours brings in through our files."""
    seen = set() if seen is None else seen
    for name in imported_modules(read(MODULES[module])) - seen:
        seen.add(name)
        if name in MODULES:
            closure(name, seen)
    return seen


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_folder_may(module):
    assert not broken_rules(module, imported_modules(read(MODULES[module])))


@pytest.mark.parametrize(
    "module, imported",
    [
        ("configurator", "gpt.block"),
        ("gpt.block", "dag.planner"),
        ("dag.planner", "dag_model"),
        ("dag_model", "data.tokenizer"),
        ("data.loader", "training.optim"),
        ("training.optim", "inference.engine"),
        ("inference.engine", "evals.answers"),
        ("evals.answers", "plots.curves"),
        ("plots.curves", "evals.answers"),
        ("dag_logger", "plots.curves"),
        ("launch.remote", "training.checkpoint"),
        ("lambda_service", "gpt.block"),
        ("slurm", "data.loader"),
        ("train", "bench"),
        ("data.arithmetic.prepare", "train"),
        ("runs.train_labelled", "eval"),
        ("config.train_default", "gpt.block"),
    ],
)
def test_each_rule_can_be_broken(module, imported):
    assert broken_rules(module, {imported}) == {imported}


def test_imports_have_no_cycle():
    below = {name: imported_modules(read(path)) & MODULES.keys() - {name} for name, path in MODULES.items()}
    while free := {name for name, needs in below.items() if not needs}:
        below = {name: needs - free for name, needs in below.items() if name not in free}
    assert not below


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_run_without_torch_and_numpy(name):
    assert not {module.partition(".")[0] for module in closure(name)} & {"torch", "numpy"}
    assert "torch" in closure("train")


@pytest.mark.parametrize("module", MODULES)
def test_wandb_is_imported_by_the_logger_alone_and_inside_a_function(module):
    tree = read(MODULES[module])
    if module == "dag_logger":
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            function.body = []
    assert "wandb" not in imported_modules(tree)


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in MODEL_SIDE])
def test_the_model_side_knows_no_environment_configuration_or_data(module):
    tree = read(MODULES[module])
    mentioned = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(tree)}
    mentioned |= {room(name) for name in imported_modules(tree)}
    assert not mentioned & NEVER_ON_THE_MODEL_SIDE


def tracked() -> set[str]:
    named = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(named.stdout.split())


def test_the_root_and_the_folders_stay_small():
    entries = {name.partition("/")[0] for name in tracked() if (ROOT / name).exists()}
    assert len(entries) <= MOST["entries of the root"]
    at_root = [name for name in MODULES if "." not in name and name not in FOLDERS]
    assert len(at_root) <= MOST["modules of the root"], at_root
    assert not FORBIDDEN_AT_ROOT & set(at_root)
    for folder in FOLDERS:
        assert (ROOT / folder / "__init__.py").read_text() == "", folder
        inside = [name for name in MODULES if name.count(".") == 1 and room(name) == folder]
        assert len(inside) <= MOST["modules of a folder"], inside


LONGER_FOR_NOW = {"lambda_service": 740, "launch.lambda_run": 670}  # lines; they may shrink, not grow


@pytest.mark.parametrize("module", MODULES)
def test_a_file_can_be_read_in_one_go(module):
    lines = MODULES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= LONGER_FOR_NOW.get(module, MOST["lines of a file"])


def test_the_old_name_of_eval_says_the_new_one_and_does_not_hide_the_package(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "--x=1"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "python eval.py" in done.stderr
    (tmp_path / "evaluate.py").write_text("name = 'the package'\n")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; import evaluate; print(evaluate.name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path.parent)
    assert done.stdout == "the package\n", done.stderr
