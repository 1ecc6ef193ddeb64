"""Results of other people are opened safely: nothing runs, nothing outside is read or written, text stays text."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import benchmark
from analysis import plotting
from analysis.audit import audit
from benchmark import dashboard, vllm_server
from benchmark.cli import app
from benchmark.errors import InputError
from benchmark.mirror_record import find_cells
from benchmark.opening import printable, stored_config

ROOT = Path(benchmark.__path__[0]).parent
SECRET = "a-secret-of-the-environment-7f3a"
PAYLOAD = "!!python/object/apply:os.system ['touch {marker}']"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghi")
)
ESCAPE = "\x1b]0;owned\x07\x1b[2J[/red][bold]"
COMMANDS = ("audit", "report", "compare", "status", "mirror")


@pytest.fixture(scope="module")
def made() -> Any:
    sys.path.append(str(Path(__file__).parent))
    return importlib.import_module("synthetic_results")


@pytest.fixture
def study(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plotting, "FORMATS", ("svg",))
    recipe = made.Recipe(arms={"grpo": 0.0, "dynamo": 0.1}, seeds=(0,), families=("sums",), items=4, points=2, steps=2)
    folder: Path = made.make_study(tmp_path / "theirs", recipe)
    return folder


def opened(command: str, folder: Path) -> Result:
    rest = ["--tracking-uri", f"sqlite:///{folder.parent}/mlflow.db"] if command == "mirror" else []
    arguments = ["dynamo", "grpo", "--results", str(folder)] if command == "compare" else [str(folder), *rest]
    return CliRunner().invoke(app, [command, *arguments])


def change_plan(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    change(plan)
    (folder / "plan.json").write_text(json.dumps(plan))


def refused(result: Result) -> str:
    assert result.exit_code in (1, 2), (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.output


# --- out of the folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["../mine", "cells/../../mine", "{mine}", "", ".", "a\0b", 7, None, ["x"]])
def test_a_plan_cannot_name_a_folder_elsewhere(study: Path, command: str, place: Any) -> None:
    mine = study.parent / "mine"
    shutil.copytree(next((study / "cells").iterdir()), mine)
    name = place.format(mine=mine) if isinstance(place, str) else place
    change_plan(study, lambda plan: plan["cells"][0].update(dir=name))
    before = sorted(study.parent.rglob("*"))
    assert "does not lie in the results folder" in refused(opened(command, study))
    assert sorted(study.parent.rglob("*")) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", ["tables", "cell", "record", "broken", "loop"])
def test_links_to_elsewhere_are_refused_and_what_they_lead_to_stays(study: Path, command: str, what: str) -> None:
    mine = study.parent / "mine"
    mine.mkdir()
    (mine / "notes.md").write_text("precious")  # a report removes tables that it no longer has
    cell = next((study / "cells").iterdir())
    if what == "cell":
        shutil.move(cell, mine / "cell")
    elif what == "record":
        shutil.move(cell / "evaluation.jsonl", mine / "rows")
    link, target = {
        "tables": (study / "tables", mine),
        "cell": (cell, mine / "cell"),
        "record": (cell / "evaluation.jsonl", mine / "rows"),
        "broken": (study / "figures", mine / "absent"),
        "loop": (study / "figures", study / "figures"),
    }[what]
    link.symlink_to(target)
    assert "is a link to" in refused(opened(command, study))
    assert (mine / "notes.md").read_text() == "precious"
    assert not (mine / "absent").exists()


def test_a_link_inside_the_folder_and_a_linked_results_folder_are_fine(study: Path) -> None:
    (study / "latest").symlink_to("cells")
    (study.parent / "link").symlink_to(study)
    assert opened("status", study.parent / "link").exit_code == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_keeps_nobody_waiting(study: Path, command: str) -> None:
    record = next((study / "cells").iterdir()) / "traces.jsonl"
    record.unlink(missing_ok=True)
    os.mkfifo(record)
    assert "neither a file nor a folder" in refused(opened(command, study))


# --- nothing runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["audit", "report", "compare"])
@pytest.mark.parametrize("kind", ["tag", "bomb", "list", "binary"])
def test_yaml_of_others_makes_no_objects_and_no_avalanche(study: Path, command: str, kind: str) -> None:
    marker = study.parent / "executed"
    text = {"tag": f"x: {PAYLOAD.format(marker=marker)}\n", "bomb": BOMB, "list": "[1]\n", "binary": "\x00\x01"}[kind]
    for cell in (study / "cells").iterdir():
        (cell / "config.yaml").write_text(text)
    assert "not a stored configuration" in refused(opened(command, study))
    assert not marker.exists()
    with pytest.raises(InputError):
        find_cells(study)


def test_a_stored_configuration_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1.0e-06\nb: 'no'\nc: [1, null]\n")
    assert stored_config(tmp_path / "config.yaml") == {"a": 1e-6, "b": "no", "c": [1, None]}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("plan.json", "[" * 100_000),
        ("plan.json", '{"cells": 3, "study": "x"}'),
        ("result.json", '{"spent": {}, "run_hash": "grpo0"}'),
        ("evaluation.jsonl", '{"point": 0}\n'),
        ("evaluation.jsonl", "\x00\n"),
    ],
)
def test_records_that_lack_everything_are_one_line(study: Path, command: str, file: str, text: str) -> None:
    for path in study.rglob(file):
        path.write_text(text)
    result = opened(command, study)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) <= 3


# --- text stays text ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Glyph")  # no font draws control characters
def test_a_name_commands_no_terminal(study: Path) -> None:
    def rename(plan: dict[str, Any]) -> None:
        plan["study"] = ESCAPE
        plan["cells"][0]["arm"] = ESCAPE
        plan["arms"] = [ESCAPE, "dynamo"]

    change_plan(study, rename)
    for command in COMMANDS:
        result = opened(command, study)
        assert "\x1b]" not in result.output, command
        assert "\x07" not in result.output, command
    shown = opened("status", study)
    assert shown.exit_code == 0
    assert "[/red][bold]" in shown.output  # rich's markup is text as well
    assert printable("a\u202eb\x9bc\n\té") == "a?b?c\n\té"


def test_html_in_the_words_of_a_plan_is_text_in_the_markdown_report(study: Path) -> None:
    script = "<script>alert(1)</script>"
    claim = {"id": "x", "text": script, "arm": "dynamo", "reference": "grpo", "metric": "pass_at_1"}
    change_plan(study, lambda plan: plan.update(question=script, study=script, claims=[claim], decision_rule=script))
    assert opened("report", study).exit_code == 0
    for path in (study / "REPORT.md", *study.glob("tables/*.md")):
        assert "<script>" not in path.read_text().replace(r"\<", ""), path
    assert script in (study / "REPORT.md").read_text().replace(r"\<", "<")


def test_no_words_of_a_plan_make_a_link_or_load_an_image(study: Path) -> None:
    words = ["![x](http://a.example/i.png)", "[x](http://a.example)", "```\n[x][y]\n\n[y]: http://a.example"]
    for bad in words:
        claim = {"id": "x", "text": bad, "arm": "dynamo", "reference": "grpo", "metric": "pass_at_1"}
        change_plan(study, lambda plan, c=claim, w=bad: plan.update(question=w, study=w, claims=[c], decision_rule=w))
        assert opened("report", study).exit_code == 0
        for path in (study / "REPORT.md", *study.glob("tables/*.md")):
            text = re.sub(r"^```\n.*\n```$", "", path.read_text(), flags=re.MULTILINE)
            assert not re.search(r"\]\(http|\]\[y|^\[y\]:", text, re.MULTILINE), path
        assert "a.example" in (study / "REPORT.md").read_text()


# --- servers and secrets ------------------------------------------------------------------------------------------


def test_servers_listen_on_this_machine_only_unless_told_otherwise() -> None:
    assert dashboard.HOST == "127.0.0.1"
    line = vllm_server.command(["model"])
    assert line[line.index("--host") + 1] == "127.0.0.1"
    assert "127.0.0.1" not in vllm_server.command(["model", "--host", "0.0.0.0"])
    assert ("--no-enable-chunked-prefill" in line) == (not torch.accelerator.is_available())
    assert "--no-enable-chunked-prefill" not in vllm_server.command(["model", "--enable-chunked-prefill"])
    assert "127.0.0.1" in CliRunner().invoke(app, ["dashboard", "--help"]).stdout


def test_no_file_of_the_suite_evaluates_text_or_loads_pickles_of_others() -> None:
    told = (ROOT / "pyproject.toml").read_text()
    assert '"S"]' in told  # ruff's S301 (pickle), S307 (eval), S506 (yaml.load), S614 (torch.load) among them
    for package in ("benchmark", "baselines", "methods", "analysis"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            assert "torch.load(" not in text, path
            assert "joblib" not in text, path
            if path.name != "conformance.py":  # a round trip of an object just made
                assert "pickle.load" not in text, path


@pytest.mark.slow
def test_secrets_of_the_environment_reach_neither_files_nor_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole study by the command line, worker processes, report, mirror and a failing run included."""
    import subprocess

    names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "ROLLOUTBENCH_SECRET")
    env = {**os.environ, **dict.fromkeys(names, SECRET), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pair = {"study": "pair", "question": "Which?", "arms": ["grpo", "dynamo"], "seeds": 1, "scale": "smoke"}
    pair["overrides"] = {"task": {"eval_items_per_family": 2}, "policy": {"warmup": {"steps": 30}}}
    pair["gradient_variance_replicates"] = 4  # of a policy that solves nothing yet
    (tmp_path / "pair.yaml").write_text(json.dumps(pair))
    study = ["study", "pair.yaml", "--budget", "tokens_generated=2000", "--seeds", "1"]
    study += ["--workers", "1", "--out", str(tmp_path / "out"), "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    code = "import sys; from benchmark.cli import main; sys.argv[0] = 'rolloutbench'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *study], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "mlflow.db").exists()
    assert SECRET not in done.stdout + done.stderr
    found = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert found == []
    assert sum(path.is_file() for path in (tmp_path / "out").rglob("*")) > 40
    assert audit(tmp_path / "out").wrong == []  # with what workers and the mirror leave behind
