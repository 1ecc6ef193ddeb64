"""A method from outside: the documented example and the generated skeleton, installed, checked and in a table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import benchmark
from benchmark.cli import app

ROOT = Path(benchmark.__path__[0]).parent
EXAMPLE = Path(__file__).parent / "fixtures" / "sign_advantage"
PIP = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
TINY = ["--seeds", "1", "--workers", "1", "--budget", "tokens_generated=4000", "--no-mlflow"]
TINY += ["--set", "task.eval_items_per_family=2", "--set", "evaluation.final_samples=2", "--set", "evaluation.k=[1]"]


class Shell:
    """Commands with a site folder of their own, as after ``pip install``."""

    def __init__(self, site: Path, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.environment = os.environ | {"PYTHONPATH": path, "PIP_NO_INDEX": "1"}

    def run(self, *command: str | Path, expect: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout

    def rolloutbench(self, *arguments: str | Path, expect: int = 0) -> str:
        return self.run("-c", "from benchmark.cli import main; main()", *arguments, expect=expect)


def install(package: Path, tmp_path: Path) -> Shell:
    site, here = tmp_path / "site", tmp_path / "a folder with spaces"
    here.mkdir()
    shell = Shell(site, here)
    shell.run("-m", "pip", "install", *PIP, "--target", site, package)
    return shell


def copied(package: Path, tmp_path: Path) -> Path:
    """A copy to build from: a build leaves files behind."""
    target = tmp_path / "source" / package.name
    target.mkdir(parents=True)
    for path in package.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def arms_in_table(shell: Shell, study: str) -> set[str]:
    table = pd.read_csv(shell.folder / "results" / study / "tables" / "main_table.csv")
    return set(table["arm"])


def test_the_page_shows_the_example_that_is_tested() -> None:
    page = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```(toml|python|yaml)\n(.*?)```", page, flags=re.DOTALL))
    assert blocks["toml"] == (EXAMPLE / "pyproject.toml").read_text()
    assert blocks["python"] == (EXAMPLE / "sign_advantage.py").read_text()
    assert blocks["yaml"] == (EXAMPLE / "sign_study.yaml").read_text()


def test_the_example_installs_and_passes_its_check(tmp_path: Path) -> None:
    shell = install(copied(EXAMPLE, tmp_path), tmp_path)
    rows = {row["name"]: row for row in json.loads(shell.rolloutbench("methods", "--json"))}
    assert rows["sign_advantage"]["kind"] == "external"
    assert rows["sign_advantage"]["changes"] == ["advantage"]
    assert "10 of 10 checks hold" in shell.rolloutbench("check", "sign_advantage", "--no-train")


def test_a_new_method_installs_and_passes_its_own_test(tmp_path: Path) -> None:
    package = tmp_path / "my package"
    result = CliRunner().invoke(app, ["new-method", "my_method", "--out", str(package)])
    assert result.exit_code == 0, result.output
    assert f"pip install --no-deps -e '{package}'" in result.stdout
    shell = install(copied(package, tmp_path), tmp_path)
    shell.run("-m", "pytest", "-q", "-p", "no:cacheprovider", package)
    assert "my_method" in {row["name"] for row in json.loads(shell.rolloutbench("methods", "--json"))}


def test_the_folder_of_a_new_method_cannot_be_taken_for_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["new-method", "mine"])
    assert "pip install --no-deps -e rolloutbench-mine\n" in result.stdout
    # An editable install is found after the working directory, where a folder `mine` would be a namespace package.
    (folder,) = tmp_path.iterdir()
    assert not folder.name.isidentifier()


@pytest.mark.slow
def test_the_example_and_a_new_method_train_and_appear_in_a_table(tmp_path: Path) -> None:
    shell = install(copied(EXAMPLE, tmp_path), tmp_path)
    assert "14 of 14 checks hold" in shell.rolloutbench("check", "sign_advantage")
    shell.rolloutbench("study", EXAMPLE / "sign_study.yaml", *TINY)
    assert arms_in_table(shell, "sign_study") == {"grpo", "sign_advantage", "sign_half"}
    package = tmp_path / "my_method"
    assert CliRunner().invoke(app, ["new-method", "my_method", "--out", str(package)]).exit_code == 0
    shell.run("-m", "pip", "install", *PIP, "--target", tmp_path / "site", copied(package, tmp_path))
    shell.rolloutbench("study", package / "study.yaml", *TINY)
    assert arms_in_table(shell, "my_method_study") == {"grpo", "my_method"}


def test_a_new_method_is_formatted_and_typed(tmp_path: Path) -> None:
    package = tmp_path / "a_long_name_for_a_method"
    assert CliRunner().invoke(app, ["new-method", package.name, "--out", str(package)]).exit_code == 0
    python = [sys.executable, "-m"]
    wide = ["--isolated", "--no-cache", "--line-length", "120"]
    subprocess.run([*python, "ruff", "check", *wide, "--select", "E,F,W,B,UP", package], check=True)
    subprocess.run([*python, "ruff", "format", "--check", *wide, package], check=True)
    mypy = ["mypy", "--strict", "--config-file=", "--follow-imports=silent", "--cache-dir", tmp_path]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    subprocess.run([*python, *mypy, package / f"{package.name}.py"], check=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize(
    ("name", "told"),
    [("grpo", "has this name"), ("My-Method", "lower-case"), ("class", "Python keyword"), ("x/y", "lower-case")],
)
def test_a_name_that_cannot_be_is_refused(tmp_path: Path, name: str, told: str) -> None:
    result = CliRunner().invoke(app, ["new-method", name, "--out", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    result = CliRunner().invoke(app, ["new-method", "my_method", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "--out" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
