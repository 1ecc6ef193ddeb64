"""The whole study, small: files, resumption, and what its configuration refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from analysis.audit import audit
from analysis.provenance import made_by
from analysis.variance_allocators import NAMES
from analysis.variance_replay import proxy
from analysis.variance_report import rebuild_variance_report
from analysis.variance_study import VarianceConfig, plan
from benchmark.cli_variance import log_to_mlflow, variance
from benchmark.errors import InputError
from benchmark.seal import write_manifest

ARGUMENTS = [
    *("--scale", "smoke", "--arm", "grpo", "--rollouts", "64", "--blocks", "8", "--budget", "4", "--budget", "8"),
    *("--fraction", "0", "--fraction", "1"),
    *("--set", "rollout.prompts_per_batch=5", "--set", "budget.amount=2500", "--no-mlflow"),
]


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    found = typer.Typer()
    found.command()(variance)
    return found


@pytest.fixture(scope="module")
def folder(app: typer.Typer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("variance")
    result = CliRunner().invoke(app, [*ARGUMENTS, "--workers", "1", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "REPORT.md" in result.output
    return out


def test_report_tables_and_figures_are_there(folder: Path) -> None:
    report = (folder / "REPORT.md").read_text()
    for heading in ("What is found", "Allocators at equal draws", "Along training", "How to reproduce"):
        assert f"## {heading}\n" in report
    assert "--budget 4 --budget 8" in report
    for link in ("tables/variance.csv", "tables/variance_proxy.tex", "figures/along_training.pdf"):
        assert f"]({link})" in report
    names = {path.stem for path in (folder / "figures").iterdir()}
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{n}.{s}" for n in names for s in ("svg", "pdf", "png")
    }
    assert names >= {
        "variance_ratio",
        "predicted_and_realised",
        "variance_and_p",
        "rollouts_and_p_hat",
        "along_training",
    }


def test_table_holds_every_allocator_at_every_checkpoint(folder: Path) -> None:
    frame = pd.read_csv(folder / "tables" / "variance.csv")
    assert list(dict.fromkeys(frame["checkpoint"])) == ["before RL", "grpo, 100 %"]
    assert len(frame) == 2 * 3 * 3 * 2 * len(NAMES)
    assert np.isfinite(frame["ratio"]).all()
    assert (frame.loc[frame["allocator"] == "uniform", "ratio"] == 1).all()


def test_an_audit_makes_the_report_again_from_the_pools(folder: Path, tmp_path: Path) -> None:
    found = audit(folder)
    assert (found.wrong, found.lacks) == ([], [])
    assert "4 tables and 6 figures made again from the records" in " ".join(found.checked)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    table, pool = copy / "tables" / "variance.csv", min((copy / "pools").glob("*.npz"))
    table.write_text(table.read_text().replace("uniform", "unifurm", 1))
    write_manifest(copy, made_by())  # whoever changes a table may make its hashes anew
    assert audit(copy).wrong == [
        "tables/variance.csv: is not what the records give; `rolloutbench report` makes it anew"
    ]
    report = (copy / "REPORT.md").read_bytes()
    assert rebuild_variance_report(copy).read_bytes() == report
    assert audit(copy).wrong == []
    pool.unlink()
    assert "not measured" in " ".join(audit(copy).wrong)


@pytest.mark.slow
def test_two_processes_measure_the_same_and_the_same_again_measures_nothing(
    app: typer.Typer, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    shutil.copytree(folder, out)
    shutil.rmtree(out / "pools")
    arguments = [*ARGUMENTS, "--workers", "2", "--out", str(out)]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    tables = {path.name: path.read_bytes() for path in (folder / "tables").iterdir()}
    assert {path.name: path.read_bytes() for path in (out / "tables").iterdir()} == tables
    before = {path: path.stat().st_mtime_ns for path in (out / "pools").iterdir()}
    report = (out / "REPORT.md").read_bytes()
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert {path: path.stat().st_mtime_ns for path in (out / "pools").iterdir()} == before
    assert (out / "REPORT.md").read_bytes() == report


def test_results_reach_mlflow(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert log_to_mlflow(folder, {"scale": "smoke"}, uri), capsys.readouterr().err
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("variance")
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["variance/ratio_uniform_mean_only_n8_grpo"] == 1.0
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"REPORT.md", "tables", "figures"}


def test_a_tracking_fault_is_told_and_stops_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not log_to_mlflow(folder, {}, "nonsense://user:secret@nowhere")
    told = capsys.readouterr().err
    assert "MLflow did not take everything" in told
    assert "secret" not in told


def test_configuration_refuses_pools_that_cannot_score_the_budgets(app: typer.Typer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="budgets allow 48"):
        CliRunner().invoke(app, ["--rollouts", "64", "--blocks", "8", "--out", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(ValueError, match="equal halves"):
        VarianceConfig(rollouts=250)
    with pytest.raises(ValueError, match="ascending"):
        VarianceConfig(fractions=(1.0, 0.5))


def test_policy_before_training_is_measured_once(tmp_path: Path) -> None:
    points = plan(VarianceConfig(arms=("grpo", "dapo"), fractions=(0.0, 1.0)), tmp_path)
    assert [point.label for point in points] == ["before RL", "grpo, 100 %", "dapo, 100 %"]
    assert len({point.pools for point in points}) == 3
    other = plan(VarianceConfig(arms=("grpo", "dapo"), fractions=(0.0, 1.0), history=8), tmp_path)
    assert not {point.pools for point in points} & {point.pools for point in other}


def test_proxy_recovers_a_law() -> None:
    rng = np.random.default_rng(0)
    p = np.concatenate([[0.0, 1.0], rng.uniform(0.02, 0.98, 300)])
    exact = proxy(p, p * (1 - p))
    assert exact["prompts"] == 300
    assert exact["r_squared"] == pytest.approx(1.0)
    assert exact["slope"] == pytest.approx(1.0)
    none = proxy(p, np.exp(rng.normal(size=302)))
    assert none["r_squared_low"] < 0.02
    assert none["r_squared"] < 0.1
