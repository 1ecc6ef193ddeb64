"""Commands where the surroundings are poor: no home, a home that cannot be written, no terminal, spaces in paths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UNWRITABLE = "/dev/null/home"  # a folder that nobody can make, not even the superuser
SMALL = ["--scale", "smoke", "--budget", "tokens_generated=2000", "--set", "task.eval_items_per_family=1"]
SMALL += ["--set", "evaluation.final_samples=2", "--set", "evaluation.k=[1]"]


def rolloutbench(*arguments: str | Path, cwd: Path, home: str | None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with nothing on standard input and no terminal."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HOME", "XDG_", "MPLCONFIG"))}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "dumb"} | ({} if home is None else {"HOME": home})
    return subprocess.run(
        [sys.executable, "-c", "from benchmark.cli import main; main()", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "a folder with späces"
    path.mkdir()
    return path


@pytest.mark.parametrize("home", [None, UNWRITABLE])
def test_first_commands_work_without_a_home(folder: Path, home: str | None) -> None:
    doctor = rolloutbench("doctor", "--json", cwd=folder, home=home)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert not [row for row in json.loads(doctor.stdout) if row["state"] == "missing"]
    assert list(folder.iterdir()) == []
    help_text = rolloutbench("--help", cwd=folder, home=home)
    assert "\x1b[" not in help_text.stdout, "no colours without a terminal"
    assert help_text.returncode == 0


def test_a_run_and_its_report_need_no_home_and_no_terminal(folder: Path) -> None:
    file = folder / "a study.yaml"
    file.write_text("study: pair\nquestion: Which?\nscale: smoke\narms: [grpo]\nseeds: 1\n")
    options = [*SMALL, "--workers", "1", "--out", folder / "my results"]
    done = rolloutbench("study", file, *options, cwd=folder, home=UNWRITABLE)
    assert done.returncode == 0, done.stderr
    assert "\x1b[" not in done.stderr
    assert "falls behind" not in done.stderr, "the mirror works too"
    assert (folder / "my results" / "REPORT.md").exists()
    assert (folder / "my results" / "figures" / "final_accuracy.pdf").exists()
    assert {path.name for path in folder.iterdir()} == {"a study.yaml", "my results", "mlflow.db", "mlartifacts"}


@pytest.mark.parametrize(
    ("typed", "offered"), [("rolloutbench do", "doctor"), ("rolloutbench run dynamo_re", "dynamo_readme")]
)
def test_the_shell_completes_commands_and_arms(typed: str, offered: str, folder: Path) -> None:
    environment = os.environ | {"_ROLLOUTBENCH_COMPLETE": "complete_bash", "COMP_WORDS": typed, "PYTHONPATH": str(ROOT)}
    environment["COMP_CWORD"] = str(len(typed.split()) - 1)
    code = "from benchmark.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert offered in done.stdout.split()
