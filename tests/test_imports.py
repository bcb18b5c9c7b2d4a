"""Who may import whom, read from the syntax trees. A new module gets its line in MAY_IMPORT."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

MAY_IMPORT = {
    # the base: nothing of ours
    "configurator": set(),
    "tokenizer": set(),
    "exact": set(),
    "numerals": {"exact"},
    # above it
    "attention": set(),
    "layers": {"attention"},
    "optim": set(),
    "runtime": set(),
    "dataloader": {"tokenizer"},
    "arithmetic": {"dataloader", "tokenizer"},
    # the model
    "documents": {"numerals"},
    "readout": set(),
    "plan_search": {"exact"},
    "dense_dag": {"attention", "layers"},
    "planner": {"dense_dag", "exact", "plan_search"},
    "explanations": {"exact", "numerals", "plan_search", "planner"},
    "dag_model": {
        *("attention", "layers", "exact", "numerals"),
        *("dense_dag", "documents", "explanations", "plan_search", "planner", "readout"),
    },
    # what a run has left
    "curves": set(),
    "report": {"curves"},
    # renting a machine: without torch
    "lambda_api": set(),
    "ledger": set(),
    "machine": {"lambda_api"},
    "endings": set(),
    "terminal": {"endings"},
    "rental": {"endings", "lambda_api", "ledger", "machine", "terminal"},
    "uploads": {"configurator", "lambda_api"},
    # what uses a model
    "checkpoint": {"dag_model", "tokenizer"},
    "dag_statistics": {
        *("confidence", "dag_model", "diagnosis", "documents", "exact", "explain", "numerals"),
        *("plan_search", "readout", "tasks", "tokenizer"),
    },
    "dag_logger": {"dag_model", "dag_statistics", "diagnosis", "explain", "tasks", "tokenizer"},
    "engine": {"attention", "dag_model"},
    "tasks": {"dag_model", "dataloader", "engine", "runtime", "tokenizer"},
    "confidence": {"dag_model", "engine", "tokenizer"},
    "explain": {
        *("confidence", "dag_model", "documents", "engine", "exact"),
        *("numerals", "plan_search", "planner", "tokenizer"),
    },
    "pictures": {"confidence", "explain"},
    "diagnosis": {
        *("confidence", "dag_model", "documents", "exact", "explain"),
        *("numerals", "tasks", "tokenizer"),
    },
}
MODEL_SIDE = [
    *("attention", "layers", "exact", "numerals", "documents", "readout"),
    *("plan_search", "dense_dag", "planner", "explanations", "dag_model"),
]
SCRIPTS = [
    "train",
    "sample",
    "bench",
    "evaluate",
    "plot",
    "serve",
]  # and data/*/prepare.py: any module, no script
LAUNCHERS = {  # they run where no torch is installed
    "lambda_service": {
        *("configurator", "endings", "lambda_api", "ledger", "machine", "rental", "terminal", "uploads"),
    },
    "slurm": {"configurator"},
}

ALLOWED = {
    **{ROOT / f"{name}.py": allowed for name, allowed in MAY_IMPORT.items()},
    **{ROOT / f"{name}.py": set(MAY_IMPORT) for name in SCRIPTS},
    **{ROOT / f"{name}.py": allowed for name, allowed in LAUNCHERS.items()},
    **{path: set(MAY_IMPORT) for path in ROOT.glob("data/*/prepare.py")},
    **{path: set() for path in ROOT.glob("config/*.py")},
}
FILES = [path for path in ALLOWED if path.exists()]
OURS = {path.stem for path in ALLOWED if path.parent == ROOT}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def existing(names: list[str]) -> list[str]:
    return [name for name in names if ROOT / f"{name}.py" in FILES]


def imported_modules(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def read(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def closure(name: str) -> set[str]:
    """Every module, ours or foreign, that importing our `name` brings in through our files."""
    names = imported_modules(read(ROOT / f"{name}.py"))
    return names.union(*map(closure, names & OURS))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_imports_only_what_stands_below_it(path):
    assert imported_modules(read(path)) & OURS <= ALLOWED[path]


def test_every_module_has_its_place():
    assert set(ROOT.glob("*.py")) <= set(ALLOWED), "give the new module its line in MAY_IMPORT"


@pytest.mark.parametrize("name", existing(list(LAUNCHERS)))
def test_launchers_run_without_torch(name):
    assert not closure(name) & {"torch", "numpy"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_wandb_is_imported_by_the_logger_alone_and_inside_a_function(path):
    tree = read(path)
    if path.stem == "dag_logger":
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            function.body = []
    assert "wandb" not in imported_modules(tree)


@pytest.mark.parametrize("name", existing(MODEL_SIDE))
def test_the_model_side_never_reads_the_environment(name):
    tree = read(ROOT / f"{name}.py")
    mentioned = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(tree)}
    assert not (mentioned | imported_modules(tree)) & {"os", "environ", "getenv"}
