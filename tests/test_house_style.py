"""Limits that keep the suite readable; each check reads the source, none imports it."""

from __future__ import annotations

import ast
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("benchmark", "baselines", "methods", "analysis")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
BOOKS = sorted((ROOT / "analysis").rglob("*.ipynb"))
TEXTS = sorted(
    path
    for folder in (*PACKAGES, "benchmarks", "configs", "constraints", "docs", "tests", ".ci", ".")
    for path in ((ROOT / folder).glob("*") if folder == "." else (ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cff", ".ipynb", ".sh"} or path.name == "run"
    if path.is_file()
)
AREAS = "train|policy|optim|rollout|modulation|eval|cost|time|drawn|curve|system"

# Folders of some machine, which no project file should name; joined here, since this file is read as well.
FOLDERS = "|".join(["work", "tmp", "home", "root", "opt", "mnt", "Users"])
MACHINE_PATH = re.compile(rf"(?<![\w.~}}*])/(?:{FOLDERS})/\w")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public functions, classes and methods of a module; what a function defines inside is its own affair."""
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        names = {ast.unparse(decorator) for decorator in node.decorator_list}
        if not names & {"overload", "override"} and not any(name.endswith(".setter") for name in names):
            yield f"{prefix}{node.name}", node
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, f"{prefix}{node.name}.")


def metric_keys(tree: ast.AST) -> Iterator[str]:
    """Text literals that begin like a metric key; a placeholder of an f-string counts as a letter."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            text = node.value
        else:
            continue
        if re.match(rf"(?:{AREAS})/", text):
            yield text


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PACKAGES)
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name_of)
def test_module_and_functions_are_short(path: Path) -> None:
    limit = 120 if path.parent.name in ("baselines", "methods") else 400
    assert lines_of(path) <= limit, f"{name_of(path)} is longer than {limit} lines"
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(ast.parse(path.read_text())) if f.end_lineno}
    assert {name: lines for name, lines in long.items() if lines > 60} == {}


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name_of)
def test_everything_public_says_what_it_does(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert tree.body == [] or ast.get_docstring(tree), "the module has no docstring"
    assert [name for name, node in public(tree.body) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_metric_keys_are_area_and_quantity(path: Path) -> None:
    keys = set(metric_keys(ast.parse(path.read_text())))
    assert {key for key in keys if not re.fullmatch(rf"(?:{AREAS})/[a-z0-9_]*", key)} == set()


def test_metric_keys_are_recognised() -> None:
    tree = ast.parse("a = {'train/loss': 1, f'eval/{family}_pass@{k}': 2, 'no key': 3}; b = f'eval/{x}_y'")
    assert set(metric_keys(tree)) == {"train/loss", "eval/x_pass@x", "eval/x_y"}


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_no_file_names_a_machine(path: Path) -> None:
    found = [line for line in path.read_text().splitlines() if MACHINE_PATH.search(line)]
    assert found == []


def test_machine_paths_are_recognised() -> None:
    parts = ["see /{}/main/x", "'/{}/data'", "file:///{}/me/x", "DIR=/{}/y"]
    named = [text.format(folder) for text in parts for folder in ("work", "tmp", "home")]
    assert [text for text in named if not MACHINE_PATH.search(text)] == []
    fine = ["https://example.org/home/page", "results/work/x", "a / b / c", "#!/usr/bin/env bash"]
    assert [text for text in fine if MACHINE_PATH.search(text)] == []


def test_tests_have_no_network() -> None:
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname(), timeout=1).close()
