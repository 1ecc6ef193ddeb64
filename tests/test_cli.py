"""The command line: exit codes, one-line errors, and what each command hands to the library."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import benchmark
from benchmark import cells
from benchmark.cli import app
from benchmark.compose import compose_run, compose_study
from benchmark.config import RunConfig
from benchmark.errors import storage_error
from benchmark.jsonl import atomic_write_json
from benchmark.workers import Pool

ROOT = Path(benchmark.__path__[0]).parent
COMMANDS = [
    "run",
    "study",
    "methods",
    "warmup",
    "report",
    "status",
    "mirror",
    "variance",
    "compare",
    "replay",
    "check",
    "new-method",
    "doctor",
]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class Stub(ModuleType):
    """A module with the given functions, in the place of a heavy one."""

    def __init__(self, name: str, **members: Any) -> None:
        super().__init__(name)
        self.__dict__.update(members)


class Interrupted(Exception):  # noqa: N818 (its model is called so)
    """Stands for `benchmark.run.Interrupted`."""


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Replaces training and warm-up; returns the configurations that were run."""
    seen: list[RunConfig] = []

    def run_cell(
        config: RunConfig,
        out: Path,
        *,
        progress: Callable[[Any], None],
        should_stop: Callable[[], bool],
        fence: cells.Fence,
    ) -> None:
        seen.append(config)
        if config.seed == 13:
            raise Interrupted
        atomic_write_json(out / "result.json", {"run_hash": config.run_hash})

    stub = Stub("benchmark.run", run_cell=run_cell, Interrupted=Interrupted)
    monkeypatch.setitem(sys.modules, "benchmark.run", stub)
    warmup = Stub("benchmark.warmup", ensure_policy=lambda config, progress: Path("policies") / config.scale)
    monkeypatch.setitem(sys.modules, "benchmark.warmup", warmup)
    return seen


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"  rolloutbench {command}" in result.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from benchmark.cli import app; app(['--help'], standalone_mode=False); "
        "print([m for m in ('torch', 'mlflow', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "grppo", "--out", "x"],
        ["run", "grpo", "--scale", "smoek", "--out", "x"],
        ["run", "grpo", "--set", "rollout.temperature=0", "--out", "x"],
        ["run", "grpo", "--set", "rollout.temperature", "--out", "x"],
        ["run", "grpo", "--budget", "4096", "--out", "x"],
        ["run", "grpo", "--budget", "hours=3", "--out", "x"],
        ["study", "main_tabel"],
        ["study", "absent.yaml"],
        ["report", "absent"],
        ["mirror", "absent"],
        ["compare", "dynamo", "grpo", "--results", "absent"],
        ["warmup", "--task", "absent"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["run", "grpo"], ["run", "grpo", "--seed", "-1", "--out", "x"], ["study"], ["nonsense"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


def test_bad_input_shows_no_traceback_from_the_console_script(tmp_path: Path) -> None:
    code = "from benchmark.cli import main; main()"
    command = [sys.executable, "-c", code, "run", "grpo", "--set", "budget.amount=1", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "budget.amount" in result.stderr
    assert "at least 384" in result.stderr


def test_usage_errors_and_the_help_show_examples() -> None:
    missing = call("run", "grpo")
    assert "Missing option '--out'" in missing.stderr
    assert "For example: rolloutbench run grpo --scale smoke --out runs/first" in missing.stderr
    assert "For example: rolloutbench" in call("studdy").stderr
    shown = CliRunner().invoke(app, ["--help"], terminal_width=80).stdout
    assert "  rolloutbench study main_table --scale smoke\n" in shown
    assert "..." not in shown.partition("Commands:")[2]


def test_a_completion_that_cannot_be_installed_is_one_line_that_says_how_else() -> None:
    code = "from benchmark.cli import main; main()"
    command = [sys.executable, "-c", code, "--install-completion", "bash"]
    environment = {**os.environ, "HOME": "/dev/null/nohome"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: /dev/null/nohome")
    assert "--show-completion" in line


@pytest.mark.parametrize(
    ("typed", "known"),
    [
        ("study main_t", "main_table"),
        ("study configs/studies/main_t", "configs/studies/main_table.yaml"),
        ("sweep modu", "modulation"),
        ("experiment forg", "forgetting"),
        ("run grpo --scale smo", "smoke"),
        ("study main_table --scale paper-1", "paper-1.5b"),
        ("warmup --task arithmetic_h", "arithmetic_hard"),
        ("variance --scale smo", "smoke"),
        ("figures --notebook your", "your_method"),
        ("compare fir", "first_arm"),
        ("compare first_arm oth", "other_arm"),
        ("compare first_arm other_arm --metric pass_at_1", "pass_at_16"),
        ("run dyna", "dynamo"),
    ],
)
def test_the_shell_completes_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: str, known: str) -> None:
    plan = {"arms": ["first_arm", "other_arm"], "primary_metric": "pass_at_16"}
    atomic_write_json(tmp_path / "results" / "main_table" / "plan.json", plan)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    words = f"rolloutbench {typed}".split(" ")
    asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    asked["_ROLLOUTBENCH_COMPLETE"] = "complete_bash"
    result = CliRunner().invoke(app, [], env=asked, prog_name="rolloutbench")
    assert known in result.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["new-method", "class"], "is a Python keyword"),
        (["new-method", "my-method"], "Did you mean my_method?"),
        (["run", "grpo", "--budget", "tokens=100", "--out", "x"], "this currency. Did you mean 'tokens_generated'?"),
        (["study", "main_table", "--dry-run", "--out", "FILE"], "a file stands where the folder of results should be"),
        (["study", "main_table", "--out", "FILE/below"], "FILE: --out: a file stands"),
        (["run", "grpo", "--out", "FILE"], "a file stands where the folder of results should be"),
        (["study", "main_table", "--dry-run", "--reuse", "nope"], "--reuse = 'nope': no runs of a study there"),
        (["study", "made"], "'made': a folder of results, not a study file. Name a study file"),
        (["study", "made/x"], "Known: ablation, cpu_llm"),
        (["study", "bare.yaml"], "bare.yaml: question: is missing. Add it"),
        (["run", "dynamo", "--set", "method.allocation=5", "--out", "x"], "should be a mapping. The default is Neyman"),
    ],
)  # fmt: skip
def test_an_error_says_what_is_wrong_in_words_of_what_was_typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], told: str
) -> None:
    (tmp_path / "FILE").touch()
    atomic_write_json(tmp_path / "made" / "plan.json", {"study": "made"})
    (tmp_path / "bare.yaml").write_text("study: bare\nscale: smoke\narms: [grpo]\n")
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert told in line


def test_a_folder_that_cannot_be_made_is_not_called_deleted() -> None:
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/x")
    assert "/proc/x: No such file or directory. It cannot be made there; choose another" in str(storage_error(error))
    gone = FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere/at/all")
    assert "deleted or moved" in str(storage_error(gone))


def test_run_hands_over_what_was_asked(training: list[RunConfig], tmp_path: Path) -> None:
    asked = [
        "--scale",
        "smoke",
        "--seed",
        "3",
        "--budget",
        "rollouts=4096",
        "--set",
        "method.allocation.n_low=2",
    ]
    result = call("run", "dynamo", *asked, "--out", tmp_path / "dynamo")
    assert result.exit_code == 0, result.stderr
    options = ["budget.currency=rollouts", "budget.amount=4096", "method.allocation.n_low=2"]
    assert training == [compose_run("dynamo", scale="smoke", seed=3, options=options)]
    assert training[0].budget.currency == "rollouts"
    assert training[0].method.params == {"allocation": {"n_low": 2}}


def test_a_run_on_a_file_with_an_unusable_answer_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    from benchmark.config import ArchitectureConfig
    from benchmark.warmup import new_policy

    # Its settings are the process's, and would reach the tests that come after.
    monkeypatch.setattr("benchmark.run.prepare_machine", lambda: torch.device("cpu"))
    new_policy(ArchitectureConfig(hidden_size=16, layers=1, heads=2, kv_heads=1, mlp=24), seed=0).save(
        tmp_path / "policy"
    )
    for name, answers in (("train", ["2", r"\frac{1}{2", "7"]), ("eval", ["3"])):
        rows = [{"id": f"{name}/{i}", "problem": f"{name} {i}?", "answer": a} for i, a in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train_file": str(tmp_path / "train.jsonl"), "eval_files": {"mine": str(tmp_path / "eval.jsonl")}}
    task = tmp_path / "mine.yaml"
    task.write_text(json.dumps({"task": {"name": "mine", "answer_form": "any", **files}}))
    policy = f"policy.path={tmp_path / 'policy'}"
    result = call("run", "grpo", "--scale", "smoke", "--task", task, "--set", policy, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'train.jsonl'}:2: answer = ")
    assert "Mend the answer or delete the line" in line
    # A study says it once, before any of its runs begins.
    study = {"study": "pair", "question": "Which?", "scale": "smoke", "task": str(task), "seeds": 2}
    study |= {"arms": ["grpo", "rloo"], "overrides": {"policy": {"path": str(tmp_path / "policy")}}}
    (tmp_path / "pair.yaml").write_text(json.dumps(study))
    result = call("study", tmp_path / "pair.yaml", "--no-mlflow", "--out", tmp_path / "pair")
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1] == line
    assert not list(tmp_path.glob("pair/cells/*/ledger.jsonl"))


def test_a_finished_run_is_not_run_again(training: list[RunConfig], tmp_path: Path) -> None:
    assert call("run", "grpo", "--out", tmp_path / "a").exit_code == 0
    assert call("run", "grpo", "--out", tmp_path / "a").exit_code == 0
    assert len(training) == 1
    other = call("run", "grpo", "--seed", "1", "--out", tmp_path / "a")
    assert other.exit_code == 2
    assert "another configuration" in other.stderr


def test_a_run_is_refused_in_the_folder_of_a_study(training: list[RunConfig], tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "plan.json", {"study": "main_table"})
    result = call("run", "grpo", "--out", tmp_path)
    assert result.exit_code == 2
    assert "holds a study" in result.stderr
    assert training == []
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert call("run", "grpo", "--out", tmp_path / "cells" / "mine").exit_code == 0


def test_a_run_that_another_process_holds_is_refused(training: list[RunConfig], tmp_path: Path) -> None:
    lease = cells.claim(tmp_path)
    assert lease is not None
    result = call("run", "grpo", "--out", tmp_path)
    assert result.exit_code == 2
    assert f"process {os.getpid()}" in result.stderr
    lease.release()
    assert call("run", "grpo", "--out", tmp_path).exit_code == 0


def test_an_interrupted_run_exits_with_130(training: list[RunConfig], tmp_path: Path) -> None:
    result = call("run", "grpo", "--seed", "13", "--out", tmp_path)
    assert result.exit_code == 130
    assert "goes on with: rolloutbench" in result.stderr


def test_ctrl_c_outside_training_exits_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(_: RunConfig, progress: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "benchmark.warmup", Stub("benchmark.warmup", ensure_policy=interrupted))
    assert call("warmup").exit_code == 130


def test_methods_lists_every_arm_with_the_documented_fields() -> None:
    rows = json.loads(call("methods", "--json").stdout)
    names = [row["name"] for row in rows]
    assert {"grpo", "dapo", "dynamo"} <= set(names)
    assert names == sorted(set(names))
    for row in rows:
        assert set(row) == {"name", "family", "kind", "changes", "reference", "faithful_to"}
        assert row["kind"] in {"baseline", "method", "control", "external"}
        known = {"allocation", "selection", "advantage", "token", "loss", "baseline", "optimiser"}
        assert set(row["changes"]) <= known
    assert all(name in call("methods").stdout for name in names)


def test_warmup_prints_where_the_policy_is(training: list[RunConfig]) -> None:
    assert call("warmup", "--scale", "smoke").stdout.strip() == str(Path("policies/smoke"))


def test_a_dry_run_prints_cells_prices_and_power_and_runs_nothing(training: list[RunConfig], tmp_path: Path) -> None:
    cell = cells.Cell.of(tmp_path, compose_study("main_table", scale="smoke").runs[0])
    amount = cell.config.budget.amount
    spent = {"rollouts": 1000, "tokens_generated": amount, "flops": 2e12}
    result = {"run_hash": cell.run_hash, "spent": spent, "wall_seconds": 30.0}
    atomic_write_json(cell.folder / "result.json", result)
    shown = call("study", "main_table", "--scale", "smoke", "--dry-run", "--workers", "3", "--out", tmp_path)
    assert shown.exit_code == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert sum(line.startswith("to run ") for line in lines) == 27
    assert sum(line.startswith("done ") for line in lines) == 1
    assert "28 cells, 27 to run; unit prices measured in 1 finished cells" in shown.stdout
    assert "rollouts 27k" in shown.stdout
    assert "flops 54T" in shown.stdout
    assert "about 4 min 30 s with 3 workers" in shown.stdout
    assert "points with 2 seeds" in shown.stdout
    assert training == []
    assert not (tmp_path / "plan.json").exists()


def test_a_dry_run_of_a_study_that_never_ran_measures_its_prices(
    training: list[RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[RunConfig] = []

    def measure_unit_prices(config: RunConfig) -> dict[str, float]:
        measured.append(config)
        return {"rollouts": 0.05, "tokens_generated": 1.0, "wall_seconds": 1e-4}

    monkeypatch.setattr(sys.modules["benchmark.run"], "measure_unit_prices", measure_unit_prices, raising=False)
    result = call("study", "main_table", "--scale", "smoke", "--dry-run", "--workers", "2", "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    plan = compose_study("main_table", scale="smoke")
    assert measured == [plan.runs[0]]
    assert "unit prices measured now with grpo" in result.stdout
    assert f"rollouts {len(plan.runs)}k" in result.stdout  # 0.05 of 20,000 tokens a run
    assert "flops unknown" in result.stdout
    assert f"about {len(plan.runs)} s with 2 workers" in result.stdout
    assert not (tmp_path / "plan.json").exists()


def test_study_exit_codes_follow_the_outcome(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmark import study

    given: dict[str, Any] = {}

    def pretend(outcome: study.Outcome) -> None:
        def run_study(plan: Any, folder: Path, **options: Any) -> study.Outcome:
            given.update(options, folder=folder, cells=len(plan.runs))
            return outcome

        monkeypatch.setattr(study, "run_study", run_study)

    command = ["study", "main_table", "--seeds", "2", "--workers", "3", "--tracking-uri", "http://me:secret@x"]
    monkeypatch.setattr(sys, "argv", ["rolloutbench", *command])
    typed = "rolloutbench study main_table --seeds 2 --workers 3 --tracking-uri 'http://***@x'"
    pretend(study.Outcome(28, 28, {}, False))
    assert call(*command, "--out", tmp_path).exit_code == 0
    assert given == {
        "workers": 3,
        "tracking_uri": "http://me:secret@x",
        "folder": tmp_path,
        "cells": 28,
        "reuse": (),
        "pool": Pool,
        "command": typed,
    }
    assert call(*command, "--no-mlflow").exit_code == 0
    assert (given["tracking_uri"], given["folder"]) == (None, Path("results/main_table"))
    pretend(study.Outcome(27, 28, {"grpo-s0-x": "ValueError: no"}, False))
    failed = call(*command)
    assert failed.exit_code == 1
    assert "grpo-s0-x: ValueError: no (see results/main_table/cells/grpo-s0-x/run.log)" in failed.stderr
    assert f"run again by: {typed}" in failed.stderr
    pretend(study.Outcome(3, 28, {}, True))
    interrupted = call(*command)
    assert interrupted.exit_code == 130
    assert f"goes on with: {typed}" in interrupted.stderr


def test_report_and_mirror_act_on_a_study_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "plan.json", {"study": "main_table"})
    calls: list[tuple[str, ...]] = []

    class Mirror:
        def __init__(self, uri: str, folder: Path, experiment: str) -> None:
            calls.append((uri, str(folder), experiment))

        def close(self) -> bool:
            calls.append(("close",))
            return True

        def rebuild(self) -> bool:
            calls.append(("rebuild",))
            return False

    monkeypatch.setitem(sys.modules, "benchmark.mirror", Stub("benchmark.mirror", Mirror=Mirror))
    written = Stub(
        "analysis.rebuild", WITHOUT_PLAN=(), rebuild=lambda *given: calls.append(("report", *map(str, given)))
    )
    monkeypatch.setitem(sys.modules, "analysis.rebuild", written)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert call("report", tmp_path).exit_code == 0
    assert call("report", tmp_path, "--readme", "README.md").exit_code == 0
    assert call("mirror", tmp_path).exit_code == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://store")
    assert call("mirror", "--rebuild", tmp_path).exit_code == 1
    assert calls == [
        ("report", str(tmp_path), "None"),
        ("report", str(tmp_path), "README.md"),
        ("sqlite:///mlflow.db", str(tmp_path), "main_table"),
        ("close",),
        ("http://store", str(tmp_path), "main_table"),
        ("rebuild",),
    ]
