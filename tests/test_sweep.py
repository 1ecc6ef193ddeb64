"""Sweeps with training faked: equal tuning, resume, fresh seeds, pruning, reports; what the schema refuses."""

from __future__ import annotations

import importlib
import json
import shlex
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from typer.testing import CliRunner

from analysis.sweep_data import load_sweep
from analysis.sweep_report import write_sweep_report
from analysis.sweep_tables import trial_noise
from benchmark import cli
from benchmark import study as study_module
from benchmark import sweep as sweep_module
from benchmark.compose import compose_run, find
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_text, read_rows
from benchmark.layers import read_yaml
from benchmark.sweep import SweepOutcome, all_trials, final_plan, ranked, run_sweep, write_plan
from benchmark.sweep_space import Sweep, read_sweep, value_at
from benchmark.sweep_storage import JOURNAL, open_storage, prepare, sampler, study_name
from benchmark.sweep_trial import Trial

FILE = """\
sweep: tiny
scale: smoke
budget_fraction: 0.5
trials: 5
seeds: [0, 1]
finalists: {count: 1, seeds: [7, 8, 9]}
reference: grpo
evaluation: {samples: 1, final_samples: 16, k: [1, 8]}
space:
  optimiser.learning_rate: {type: float, low: 1.0e-4, high: 2.0e-3, log: true}
arms:
  - name: dynamo
    space:
      method.compensation.alpha: {type: float, low: 0.0, high: 1.0}
      method.allocation.n_low: {type: int, low: 0, high: 7, default: 4}
      method.allocation.prior: {type: categorical, choices: {flat: [1.0, 1.0], jeffreys: [0.5, 0.5]}}
  - name: grpo
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "POLL_SECONDS", 0.05)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("fake_sweep")


def written(folder: Path, *changes: tuple[str, str], text: str = FILE) -> Path:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    atomic_write_text(folder / "file.yaml", text)
    return folder / "file.yaml"


def swept(file: Path, folder: Path, fake: Any, workers: int = 1, **options: Any) -> SweepOutcome:
    return run_sweep(read_sweep(file), folder, workers=workers, run=fake, prepare_policy=lambda _: None, **options)


def in_process(file: Path, folder: Path, fake: Any) -> list[Trial]:
    """Every trial, one after another in this process."""
    sweep = read_sweep(file)
    trials = all_trials(sweep, folder)
    prepare(sweep, folder, None, trials[0].identity)
    for trial in trials:
        trial.execute(fake, lambda: False, nullcontext)
    atomic_write_text(folder / "sweep.yaml", file.read_text())
    return trials


def runs(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "runs.jsonl")[0] if row["event"] == "run"]


# -- the schema ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key", "told"),
    [
        (("seeds: [7, 8, 9]", "seeds: [1, 8, 9]"), "finalists.seeds", "seed 1 also tunes"),
        (("seeds: [0, 1]", "seeds: [0, 0]"), "seeds", "listed twice"),
        (("trials: 5", "trails: 5"), "trails", "Did you mean 'trials'?"),
        (("reference: grpo", "reference: dapo"), "reference", "not an arm"),
        (("low: 1.0e-4, high: 2.0e-3", "low: 2.0e-3, high: 1.0e-4"), "optimiser.learning_rate", "not below high"),
        (("low: 1.0e-4, high", "low: 0.0, high"), "optimiser.learning_rate", "cannot reach 0"),
        (("low: 1.0e-4, high: 2.0e-3", "low: 1.0e-3, high: 2.0e-3"), "optimiser.learning_rate", "default lies outside"),
        (("optimiser.learning_rate:", "optimiser.learning_rat:"), "learning_rat", "unknown key"),
        (("optimiser.learning_rate:", "task.train_items:"), "task.train_items", "searches only method"),
        (("method.compensation.alpha:", "rollout.temperature:"), "rollout.temperature", "may only touch method"),
        (("method.compensation.alpha:", "method.compensation.alfa:"), "alfa", "no such parameter"),
        (("low: 0, high: 7, default: 4", "low: 0, high: 7"), "n_low", "default lies outside"),
        (("low: 0, high: 7, default: 4", "low: 0.0, high: 7.0, default: 4.0"), "n_low", "valid integer"),
        (("jeffreys: [0.5, 0.5]", "none: [0.0, 0.0]"), "prior", "must be positive"),
        (("jeffreys: [0.5, 0.5]", "other: 3"), "prior", "valid tuple"),
        (("k: [1, 8]}", "k: [1, 8]}\npruner: wilcoxon"), "pruner", "at least three seeds"),
        (("k: [1, 8]}", "k: [1, 8]}\npruner: median"), "pruner", "Write evaluation: {points: 3, samples: 1}"),
        (("k: [1, 8]}", "k: [1, 8]}\npruner: median\nobjective: [pass_at_8]"), "pruner", "has the 8 samples"),
        (("k: [1, 8]}", "k: [1, 8]}\npruner: median\nobjective: [pass_at_1, gradient_variance]"), "pruner", "by one"),
        (("k: [1, 8]}", "k: [1, 8]}\nobjective: [pass_at_2]"), "objective", "not evaluated"),
        (("k: [1, 8]}", "k: [1, 8]}\nobjective: [gradient_variance]"), "objective", "not an objective"),
        (("type: categorical", "type: choice"), "prior", "does not match any of the expected tags"),
    ],
)
def test_a_sweep_file_with_a_fault_is_refused_where_it_is(
    tmp_path: Path, change: tuple[str, str], key: str, told: str
) -> None:
    path = written(tmp_path, change)
    with pytest.raises(InputError) as refused:
        read_sweep(path)
    assert key in str(refused.value)
    assert told in str(refused.value)
    assert refused.value.file == path
    assert refused.value.line is not None


def test_settings_that_only_clash_together_are_refused_before_any_run(tmp_path: Path) -> None:
    clash = "n_high: {type: int, low: 2, high: 24, default: 12}\n      method.allocation.n_low:"
    path = written(tmp_path, ("n_low:", clash))
    with pytest.raises(InputError, match="is above n_high"):
        read_sweep(path)


def test_the_shipped_sweep_tunes_what_it_says(tmp_path: Path) -> None:
    sweep = read_sweep(find("sweeps", "modulation"))
    searched = sweep.config.spaces("dynamo")
    for name in ("compensation.alpha", "stabilisation.centre", "stabilisation.slope", "stabilisation.floor"):
        assert f"method.{name}" in searched
    for name in ("n_low", "n_high", "half_life", "prior"):
        assert f"method.allocation.{name}" in searched
    shared = set(sweep.config.spaces("grpo"))
    assert all(shared <= set(sweep.config.spaces(arm.label)) for arm in sweep.config.arms)


# -- points and runs -------------------------------------------------------------------------------------------


def test_a_point_reaches_the_configuration_and_nothing_else_changes(tmp_path: Path) -> None:
    sweep = read_sweep(written(tmp_path))
    default = sweep.run("dynamo", "dynamo", None, 3)
    point = {"optimiser.learning_rate": 1e-3, "method.allocation.n_low": 2, "method.allocation.prior": "jeffreys"}
    changed = sweep.run("dynamo", "dynamo", point, 3)
    assert value_at(changed, "method.allocation.n_low") == 2
    assert value_at(changed, "method.allocation.prior") == (0.5, 0.5)
    same = {"optimiser": default.optimiser, "method": default.method}
    assert changed.optimiser.learning_rate == 1e-3
    assert changed.model_copy(update=same) == default
    assert default.method.params == {}
    assert default.budget.amount == 10_000


def test_the_default_is_a_point_of_the_space(tmp_path: Path) -> None:
    found = read_sweep(written(tmp_path)).default("dynamo")
    assert found == {
        "optimiser.learning_rate": 3e-4,
        "method.compensation.alpha": 0.2,
        "method.allocation.n_low": 4,
        "method.allocation.prior": "flat",
    }


# -- whole sweeps ----------------------------------------------------------------------------------------------


def test_every_arm_gets_the_same_trials_on_the_same_seeds_and_fresh_seeds_stay_fresh(
    tmp_path: Path, fakes: ModuleType
) -> None:
    folder = tmp_path / "out"
    outcome = swept(written(tmp_path), folder, fakes.train, workers=2)
    assert outcome.trials.done == outcome.trials.total == 10
    assert not outcome.trials.failed
    tuning = runs(folder)
    assert Counter(row["seed"] for row in tuning) == {0: 10, 1: 10}
    assert Counter(row["arm"].partition("-")[0] for row in tuning) == {"dynamo": 10, "grpo": 10}
    assert len({row["hash"] for row in tuning}) == 20
    final = runs(folder / "final")
    assert {row["seed"] for row in final} == {7, 8, 9}
    record = load_sweep(folder)
    for label in ("dynamo", "grpo"):
        number = record.tuned(label)
        assert number is not None
        names = {row["arm"] for row in final if row["arm"].partition("-")[0] == label}
        assert names == {label, record.name(label, number)}
    assert record.spend["tokens_generated"].sum() == 20 * 10_000
    sweep = read_sweep(written(tmp_path))
    first = all_trials(sweep, folder)[0]
    (cell, _) = first.cells(sweep.default("dynamo"))
    assert cell.config.method.params == {}
    assert cell.result() is not None


def test_the_same_command_runs_only_what_is_missing(tmp_path: Path, fakes: ModuleType) -> None:
    folder, file = tmp_path / "out", written(tmp_path)
    swept(file, folder, fakes.train)
    before = (runs(folder), runs(folder / "final"), (folder / "REPORT.md").read_bytes())
    swept(file, folder, fakes.train)
    assert (runs(folder), runs(folder / "final"), (folder / "REPORT.md").read_bytes()) == before
    run_sweep(read_sweep(file, trials=7), folder, workers=1, run=fakes.train, prepare_policy=lambda _: None)
    grown = Counter((row["arm"], row["seed"]) for row in runs(folder))
    assert len(grown) == 28
    assert set(grown.values()) == {1}


def test_a_folder_takes_no_other_sweep_and_no_other_storage(tmp_path: Path, fakes: ModuleType) -> None:
    folder = tmp_path / "out"
    swept(written(tmp_path), folder, fakes.train)
    with pytest.raises(InputError, match="another sweep"):
        swept(written(tmp_path, ("low: 1.0e-4", "low: 2.0e-4")), folder, fakes.train)
    with pytest.raises(InputError, match="another storage"):
        swept(written(tmp_path), folder, fakes.train, url=f"sqlite:///{tmp_path}/trials.db")


def test_a_database_holds_the_trials_instead_of_the_journal(tmp_path: Path, fakes: ModuleType) -> None:
    folder, url = tmp_path / "out", f"sqlite:///{tmp_path}/trials.db"
    with pytest.raises(InputError, match="not for parallel writers"):
        swept(written(tmp_path), folder, fakes.train, workers=2, url=url)
    outcome = swept(written(tmp_path), folder, fakes.train, url=url)
    assert outcome.trials.done == 10
    assert not (folder / JOURNAL).exists()
    names = optuna.get_all_study_names(url)
    assert len(names) == 2
    assert all(len(optuna.load_study(study_name=name, storage=url).trials) == 5 for name in names)


def test_one_worker_draws_the_same_settings_however_often_it_is_interrupted(tmp_path: Path, fakes: ModuleType) -> None:
    file = written(tmp_path, ("trials: 5", "trials: 14"), ("sweep: tiny", "sweep: tiny\nsampler: tpe"))
    whole = [trial.result() for trial in in_process(file, tmp_path / "a", fakes.train)]
    sweep = read_sweep(file)
    trials = all_trials(sweep, tmp_path / "b")
    prepare(sweep, tmp_path / "b", None, trials[0].identity)
    for trial in trials:
        with pytest.raises(RuntimeError):  # dies in the first cell, with its setting drawn
            trial.execute(_stop, lambda: True, nullcontext)
        trial.execute(fakes.train, lambda: False, nullcontext)
    assert [trial.result() for trial in trials] == whole


def _stop(*_: Any, **__: Any) -> None:
    raise RuntimeError("stopped")


@pytest.mark.parametrize("kind", ["tpe", "gp", "random"])
def test_samplers_learn_or_do_not(tmp_path: Path, fakes: ModuleType, kind: str) -> None:
    file = written(tmp_path, ("trials: 5", "trials: 18"), ("sweep: tiny", f"sweep: tiny\nsampler: {kind}"))
    trials = in_process(file, tmp_path / "out", fakes.train)
    sweep = trials[0].sweep
    assert isinstance(sampler(sweep.config, "grpo", 3, 0), optuna.samplers.BaseSampler)
    best = ranked(sweep, trials, "dynamo")[0]
    assert best["number"] > 0
    rates = [(trial.result() or {})["point"]["optimiser.learning_rate"] for trial in trials if trial.label == "grpo"]
    off = np.abs(np.log10(np.array(rates) / 5e-4))
    learned = off[11:].mean() < off[1:11].mean()
    assert learned or kind == "random"


def test_a_worse_setting_is_pruned_and_never_a_finalist(tmp_path: Path, fakes: ModuleType) -> None:
    seeds = list(range(10, 20))
    file = written(
        tmp_path,
        ("seeds: [0, 1]", f"seeds: {seeds}\npruner: wilcoxon\nprune_below: 0.2"),
        ("trials: 5", "trials: 12"),
    )
    trials = in_process(file, tmp_path / "out", fakes.train)
    results = [trial.result() or {} for trial in trials]
    pruned = [result for result in results if result["state"] == "pruned"]
    assert pruned
    assert all(2 <= len(result["scores"]) < len(seeds) for result in pruned)
    assert len(runs(tmp_path / "out")) == sum(len(result["scores"]) for result in results)
    for label in ("dynamo", "grpo"):
        assert all(result["state"] == "done" for result in ranked(trials[0].sweep, trials, label))
    storage = open_storage(tmp_path / "out", None)
    for result in pruned:
        name = study_name("tiny", result["arm"], trials[0].identity)
        told = optuna.load_study(study_name=name, storage=storage).trials[result["number"]]
        assert told.value == pytest.approx(np.mean([score["pass_at_1"] for score in result["scores"]]))


def test_a_run_below_the_median_at_a_share_of_its_budget_is_pruned(tmp_path: Path, fakes: ModuleType) -> None:
    changes = ("k: [1, 8]}", "k: [1, 8], points: 3}\npruner: median\nsampler: random"), ("trials: 5", "trials: 16")
    folder = tmp_path / "out"
    outcome = swept(written(tmp_path, *changes), folder, fakes.look_back)
    assert (outcome.trials.done, outcome.trials.failed) == (32, {})
    record = load_sweep(folder)
    storage = open_storage(folder, None)
    for label in ("dynamo", "grpo"):
        reached, whole = [], list[int]()
        for row in record.of(label).to_dict("records"):
            point = row["point"] if row["number"] else None
            reached.append(round(1000 * 0.75 * fakes.accuracy(record.sweep.run(label, "x", point, 0))))
            before = [reached[number] for number in whole]
            worse = len(before) >= 5 and reached[-1] < np.median(before)
            assert row["state"] == ("pruned" if worse else "done"), row["number"]
            assert len(row["scores"]) == (0 if worse else 2)
            whole += [] if worse else [row["number"]]
            assert not worse or not (folder / row["cells"][0]["dir"] / "checkpoint").exists()
        assert 5 < len(whole) < 16
        name = study_name("tiny", label, read_sweep(written(tmp_path, *changes)).identity)
        told = optuna.load_study(study_name=name, storage=storage).trials
        assert [trial.number for trial in told if trial.state.name == "COMPLETE"] == whole
        assert {trial.state.name for trial in told} == {"COMPLETE", "PRUNED"}
    pruned = int((record.trials["state"] == "pruned").sum())
    found = json.loads(CliRunner().invoke(cli.app, ["status", str(folder), "--json"]).output)["counts"]
    assert (found["done"], found["ended"]) == (64 - 2 * pruned, 2 * pruned)
    assert "pruned" in (folder / "REPORT.md").read_text()


def test_a_setting_that_diverges_is_an_outcome(tmp_path: Path, fakes: ModuleType) -> None:
    file = written(tmp_path, ("trials: 5", "trials: 12"), ("sweep: tiny", "sweep: tiny\nsampler: random"))
    folder = tmp_path / "out"
    outcome = swept(file, folder, fakes.diverge)
    assert not outcome.trials.failed
    assert outcome.trials.done == 24
    record = load_sweep(folder)
    diverged = record.trials[record.trials["state"] == "diverged"]
    assert len(diverged) > 0
    assert all(point["optimiser.learning_rate"] > 1e-3 for point in diverged["point"])


def test_two_objectives(tmp_path: Path, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import analysis.sweep_variance

    def fake(config: Any, folder: Path, replicates: int) -> float:
        return float(config.optimiser.learning_rate)

    monkeypatch.setattr(analysis.sweep_variance, "relative_variance", fake)
    file = written(tmp_path, ("k: [1, 8]}", "k: [1, 8]}\nobjective: [pass_at_1, gradient_variance]"))
    trials = in_process(file, tmp_path / "out", fakes.train)
    storage = open_storage(tmp_path / "out", None)
    told = optuna.load_study(study_name=study_name("tiny", "grpo", trials[0].identity), storage=storage)
    assert [direction.name for direction in told.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert all(trial.values[1] == pytest.approx(trial.params["optimiser.learning_rate"]) for trial in told.trials)
    write_sweep_report(tmp_path / "out")
    assert (tmp_path / "out" / "figures" / "pareto.png").exists()


# -- failures and kills ----------------------------------------------------------------------------------------


def test_a_killed_worker_loses_no_trial_and_runs_none_twice(tmp_path: Path, fakes: ModuleType) -> None:
    folder = tmp_path / "out"
    outcome = swept(written(tmp_path), folder, fakes.die_once, workers=2)
    assert outcome.trials.failed == {}
    assert outcome.trials.done == 10
    assert set(Counter((row["arm"], row["seed"]) for row in runs(folder)).values()) == {1}
    assert len(list(folder.glob("cells/*/died"))) == 2


def test_a_failure_shows_in_report_exit_code_log_and_command(
    tmp_path: Path, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faked(sweep: Sweep, folder: Path, **options: Any) -> SweepOutcome:
        return run_sweep(sweep, folder, **options, run=fakes.fail_one, prepare_policy=lambda _: None)

    monkeypatch.setattr(sweep_module, "run_sweep", faked)
    folder, file = tmp_path / "out", written(tmp_path)
    command = ["sweep", str(file), "--out", str(folder), "--workers", "1", "--no-mlflow"]
    monkeypatch.setattr("sys.argv", ["rolloutbench", *command])
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 1
    assert "failed: grpo-t002: ValueError: broken today" in result.output
    assert f"rolloutbench sweep {file}" in result.output
    log = folder / "trials" / "grpo-t002" / "run.log"
    assert str(log) in result.output
    assert "broken today" in log.read_text()
    report = (folder / "REPORT.md").read_text()
    assert "Trial grpo-t002 failed (ValueError: broken today; log: `trials/grpo-t002/run.log`)" in report
    assert "not tuned alike" in report
    assert f"run again by: `rolloutbench {shlex.join(command)}`" in report
    shown = CliRunner().invoke(cli.app, ["status", str(folder)]).output
    assert "failed: grpo-t002: ValueError: broken today (see trials/grpo-t002/run.log)" in shown
    drawn = json.loads((folder / "trials" / "grpo-t002" / "trial.json").read_text())["point"]
    (folder / "mended").touch()
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    assert json.loads((folder / "trials" / "grpo-t002" / "result.json").read_text())["point"] == drawn
    assert "failed" not in (folder / "REPORT.md").read_text()
    assert len(runs(folder)) == 20


def test_half_a_line_of_a_killed_writer_does_not_spoil_the_journal(tmp_path: Path) -> None:
    sweep = read_sweep(written(tmp_path))
    identity = sweep.identity
    prepare(sweep, tmp_path, None, identity)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":5,"trial')
    prepare(read_sweep(written(tmp_path), trials=6), tmp_path, None, identity)
    storage = open_storage(tmp_path, None)
    found = optuna.load_study(study_name=study_name("tiny", "grpo", identity), storage=storage)
    assert [trial.number for trial in found.trials] == list(range(6))


def test_a_trial_that_the_storage_knows_but_the_folder_lacks_is_refused(tmp_path: Path, fakes: ModuleType) -> None:
    trials = in_process(written(tmp_path), tmp_path / "out", fakes.train)
    trial = trials[4]
    (trial.folder / "result.json").unlink()
    trial.execute(_stop, lambda: False, nullcontext)  # told already: only the result is written again
    assert trial.result() is not None
    (trial.folder / "result.json").unlink()
    next(iter((tmp_path / "out").glob(f"cells/{trial.name}-s0-*/result.json"))).unlink()
    with pytest.raises(InputError, match="its runs are not here"):
        trial.execute(_stop, lambda: False, nullcontext)


# -- what comes out --------------------------------------------------------------------------------------------


def test_best_yaml_is_what_the_finalist_ran(tmp_path: Path, fakes: ModuleType) -> None:
    folder = tmp_path / "out"
    swept(written(tmp_path), folder, fakes.train)
    sweep = read_sweep(written(tmp_path))
    plan = final_plan(sweep, all_trials(sweep, folder))
    assert plan is not None
    for label in ("dynamo", "grpo"):
        names = [arm.label for arm in plan.study.arms if arm.label.startswith(label)]
        tuned = next(run for run in plan.runs if run.arm == names[-1] and run.seed == 8)
        file = folder / "best" / f"{label}.yaml"
        found = compose_run(None, seed=8, file=file, options=["budget.amount=10000"])
        same = {"study": "single", "arm": label}
        assert found == tuned.model_copy(update=same)
        assert compose_run(None, file=file).budget.amount == 20_000
    assert (folder / "best.yaml").read_text() == (folder / "best" / "dynamo.yaml").read_text()
    with pytest.raises(InputError, match="the command asks for grpo"):
        compose_run("grpo", file=folder / "best.yaml")
    with pytest.raises(InputError, match="no method is named"):
        compose_run(None)


def test_the_report_can_be_made_again_from_the_files(tmp_path: Path, fakes: ModuleType) -> None:
    folder = tmp_path / "out"
    swept(written(tmp_path, ("trials: 5", "trials: 8")), folder, fakes.train)
    first = {path.relative_to(folder): path.read_bytes() for path in folder.glob("tables/*")}
    report = (folder / "REPORT.md").read_text()
    (folder / JOURNAL).unlink()
    assert CliRunner().invoke(cli.app, ["report", str(folder)]).exit_code == 0
    assert {path.relative_to(folder): path.read_bytes() for path in folder.glob("tables/*")} == first
    assert (folder / "REPORT.md").read_text() == report
    for name in ("importance", "history", "slice_dynamo", "contour_dynamo", "parallel_coordinates_dynamo"):
        for suffix in ("svg", "pdf", "png"):
            assert (folder / "figures" / f"{name}.{suffix}").stat().st_size > 0
        assert f"figures/{name}.png" in report


def test_the_table_shows_differences_of_fresh_seeds_only(tmp_path: Path, fakes: ModuleType) -> None:
    folder = tmp_path / "out"
    swept(written(tmp_path, ("trials: 5", "trials: 8")), folder, fakes.train)
    record, table = load_sweep(folder), _csv(folder / "tables" / "tuned.csv")
    assert record.scores is not None
    for row in table:
        run = [read_yaml(path).values for path in folder.glob(f"final/cells/{row['arm']}-s*/config.yaml")]
        assert sorted(values["seed"] for values in run) == [7, 8, 9]
        number = int(row["tuned_trial"])
        point = record.of(row["arm"]).set_index("number")["point"][number]
        sweep = record.sweep
        tuned = [sweep.run(row["arm"], "x", point if number else None, s, final=True) for s in (7, 8, 9)]
        default = [sweep.run(row["arm"], "x", None, s, final=True) for s in (7, 8, 9)]
        for kind, settings in (("default", default), ("tuned", tuned)):
            expected = np.mean([round(1000 * fakes.accuracy(config)) for config in settings]) / 1000 + 2.5 / 1000
            assert float(row[kind]) == pytest.approx(expected, abs=1e-6)


def _csv(path: Path) -> list[dict[str, str]]:
    import csv

    with path.open() as file:
        return list(csv.DictReader(file))


def test_importance_finds_the_parameter_that_matters(tmp_path: Path, fakes: ModuleType) -> None:
    file = written(tmp_path, ("trials: 5", "trials: 24"), ("sweep: tiny", "sweep: tiny\nsampler: random"))
    in_process(file, tmp_path / "out", fakes.train)
    shares = load_sweep(tmp_path / "out").importances("dynamo")
    assert shares is not None
    assert shares["fANOVA"].sum() == pytest.approx(1)
    useless = ["method.allocation.n_low", "method.allocation.prior"]
    assert shares["fANOVA"].drop(useless).min() > shares["fANOVA"][useless].max()


def test_pedanova_asks_what_sets_the_best_trials_apart(tmp_path: Path, fakes: ModuleType) -> None:
    file = written(tmp_path, ("trials: 5", "trials: 40"), ("sweep: tiny", "sweep: tiny\nsampler: random"))
    in_process(file, tmp_path / "out", fakes.train)
    record = load_sweep(tmp_path / "out")
    shares, evaluator = record.importances("dynamo"), optuna.importance.PedAnovaImportanceEvaluator()
    # Without a target it goes by the direction of the study, which is to maximise.
    best = optuna.importance.get_param_importances(record.studies["dynamo"], evaluator=evaluator)
    assert shares is not None
    assert shares["PED-ANOVA"].to_dict() == pytest.approx(best)


def test_noise_of_a_trial_leaves_out_what_seeds_and_settings_explain() -> None:
    additive = np.add.outer(np.linspace(0, 1, 9), [0.0, 0.3, -0.2])
    assert trial_noise(additive) == pytest.approx(0, abs=1e-12)
    draws = np.random.default_rng(0).normal(0, 0.5, size=(4000, 4))
    assert trial_noise(additive[:1, :1] + draws) == pytest.approx(0.5 / 2, rel=0.02)
    assert np.isnan(trial_noise(additive[:1]))


def test_the_plan_serves_status(tmp_path: Path, fakes: ModuleType) -> None:
    folder = tmp_path / "out"
    swept(written(tmp_path), folder, fakes.train)
    result = CliRunner().invoke(cli.app, ["status", str(folder), "--json"])
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert found["counts"]["done"] == 20
    shown = CliRunner().invoke(cli.app, ["status", str(folder)]).output
    best = load_sweep(folder).tuned("dynamo")
    assert f"dynamo-t{best:03d}" in shown
    (line,) = [line for line in shown.splitlines() if line.split()[:1] == ["grpo"]]
    assert line.split()[1] == "10"


def test_what_has_no_setting_yet_waits_in_the_plan(tmp_path: Path, fakes: ModuleType) -> None:
    folder = tmp_path / "out"
    sweep = read_sweep(written(tmp_path))
    trials = all_trials(sweep, folder)
    prepare(sweep, folder, None, trials[0].identity)
    for trial in trials[:3]:
        trial.execute(fakes.train, lambda: False, nullcontext)
    write_plan(sweep, trials, folder, "rolloutbench sweep tiny")
    found = json.loads(CliRunner().invoke(cli.app, ["status", str(folder), "--json"]).output)
    assert (found["counts"]["done"], found["counts"]["waiting"]) == (6, 14)
    assert (found["spent"], found["planned"]) == (6 * 10_000, 20 * 10_000)


def test_sweep_file_is_kept(tmp_path: Path, fakes: ModuleType) -> None:
    folder = tmp_path / "out"
    swept(written(tmp_path), folder, fakes.train)
    assert yaml.safe_load((folder / "sweep.yaml").read_text())["trials"] == 5
