"""The notebooks: thin, stripped, and executed on results of files and of MLflow, which agree."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.comparisons import Scores
from analysis.figures_histograms import traced_tokens
from analysis.figures_sweep import arm_of, best_settings, load_trials
from analysis.from_mlflow import bring, bring_tables, load_from_mlflow
from analysis.notebook import open_study, open_sweep, open_variance, tables
from analysis.notebook_choice import NOTEBOOKS, RESULTS, locate, parameters_of
from analysis.notebook_runner import execute
from analysis.results import load_study
from benchmark.cli import app
from benchmark.compose import compose_run
from benchmark.errors import InputError
from benchmark.layers import dump
from benchmark.mirror import Mirror
from benchmark.sweep import run_sweep
from benchmark.sweep_space import read_sweep

sys.path.append(str(Path(__file__).parent))
synthetic: Any = importlib.import_module("synthetic_results")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`results/` with a small study, an ablation, a variance table and a sweep."""
    folder = tmp_path_factory.mktemp("results")
    arms = {"grpo": 0.0, "dynamo": 0.1}
    recipe = synthetic.Recipe(arms=arms, seeds=(0, 1), items=8, points=3, steps=6, families=("sums", "products"))
    for name in ("main_table", "ablation"):
        study = synthetic.make_study(folder / name, recipe)
        plan = json.loads((study / "plan.json").read_text())
        (study / "plan.json").write_text(json.dumps(plan | {"study": name}))
        for cell in plan["cells"]:
            config = compose_run(cell["arm"], scale="smoke", seed=cell["seed"], options=["evaluation.k=[1,8,32]"])
            (study / cell["dir"] / "config.yaml").write_text(dump(config))
    _variance(folder / "variance")
    _sweep(folder / "sweeps" / "modulation")
    return folder


def _variance(folder: Path) -> None:
    from analysis.variance_allocators import NAMES

    rows = [
        {"checkpoint": label, "arm": "grpo", "fraction": fraction, "coordinates": "gradient", "advantage": kind}
        | {"budget": budget, "allocator": name, "ratio": 1 - place / 50, "low": 0.9 - place / 50, "high": 1.05}
        | {"variance": 2.0, "variance_low": 1.9, "variance_high": 2.1, "predicted": 1 - place / 40}
        for label, fraction in (("before RL", 0.0), ("grpo, end", 1.0))
        for kind in ("mean only", "mean and std")
        for budget in (4, 8)
        for place, name in enumerate(NAMES)
    ]
    (folder / "tables").mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder / "tables" / "variance.csv", index=False)


def _sweep(folder: Path) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"study": "modulation", "arms": ["grpo-t000", "dynamo-t000"]}))
    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    for arm in ("grpo", "dynamo"):
        sampler = optuna.samplers.RandomSampler(seed=1)
        study = optuna.create_study(
            storage=storage, study_name=f"first/{arm} 0123abcd", direction="maximize", sampler=sampler
        )
        study.enqueue_trial({"lr": 1e-3})
        study.optimize(lambda trial: 0.6 - abs(trial.suggest_float("lr", 1e-4, 1e-2) - 3e-3), n_trials=4)
        study.ask()  # a trial that is still running does not count


@pytest.fixture(scope="module")
def store(results: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store to which the studies were mirrored."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    for name in ("main_table", "ablation"):
        assert Mirror(uri, results / name, name).close()
    return uri


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stripped_and_thin_with_their_parameters_on_top(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert code[0].metadata["tags"] == ["parameters"]
    assert not any("tags" in cell.metadata for cell in code[1:])
    assert sum(len(cell.source.splitlines()) for cell in code) <= 45
    for cell in code:
        compile(cell.source, path.name, "exec")
        assert "def " not in cell.source, "what needs a function belongs into analysis/"


def test_there_is_a_notebook_for_each_name() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(RESULTS)


FIGURE = {
    "main_results": "pareto_single",
    "ablation": "differences_double",
    "gradient_variance": "variance_ratio_n4_single",
    "sweep": "best_so_far_single",
    "your_method": "pass_at_k_double",
}


@pytest.mark.parametrize("name", RESULTS)
def test_every_notebook_runs_on_a_results_folder(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("HOME")
    out = tmp_path / "figures of a paper"
    command = ["figures", str(results / RESULTS[name]), "--notebook", name, "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    executed = nbformat.read(out / f"{name}.ipynb", as_version=4)
    shown = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert all((out / f"{name}_{FIGURE[name]}.{kind}").exists() for kind in ("svg", "pdf", "png"))


def test_figures_runs_every_notebook_that_has_results(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def execute(name: str, folder: Path, out: Path, parameters: Any) -> Path:
        seen.append((name, folder.name, dict(parameters)))
        return out / f"{name}.ipynb"

    monkeypatch.setattr("analysis.notebook_runner.execute", execute)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://store")
    given = {"source": "files", "tracking_uri": "http://store"}
    (tmp_path / "sweeps" / "modulation").mkdir(parents=True)
    (tmp_path / "ablation").mkdir()
    done = CliRunner().invoke(app, ["figures", str(tmp_path)])
    assert seen == [("ablation", "ablation", given), ("sweep", "modulation", given)]
    assert done.stdout.count("skipped: ") == 3
    nothing = CliRunner().invoke(app, ["figures", str(tmp_path / "empty")])
    assert nothing.exit_code == 2
    assert "no notebook had results" in nothing.stderr


def test_figures_of_one_folder_are_those_of_the_notebooks_that_fit_it(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Path]] = []

    def pretend(name: str, folder: Path, out: Path, parameters: Any) -> Path:
        seen.append((name, folder))
        return out / f"{name}.ipynb"

    monkeypatch.setattr("analysis.notebook_runner.execute", pretend)
    fits = {
        "main_table": ["main_results", "your_method"],
        "ablation": ["main_results", "ablation", "your_method"],
        "variance": ["gradient_variance"],
        "sweeps/modulation": ["sweep"],
    }
    for place, names in fits.items():
        seen.clear()
        done = CliRunner().invoke(app, ["figures", str(results / place), "--out", str(tmp_path)])
        assert done.exit_code == 0, done.output
        assert seen == [(name, results / place) for name in names]
    seen.clear()
    plan = json.loads((results / "main_table" / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"study": "mine", "arms": ["grpo", "mine"]}))
    done = CliRunner().invoke(app, ["figures", str(tmp_path), "--out", str(tmp_path)])
    assert seen == [("main_results", tmp_path)]
    assert "skipped: your_method: " in done.stdout
    assert "--set arm=grpo|mine" in done.stdout


def test_one_notebook_on_the_folder_of_all_reads_its_own_study(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr("analysis.notebook_runner.execute", lambda _, folder, *__: seen.append(folder))
    for source, folder in (("files", results), ("mlflow", Path("results"))):
        for name in RESULTS:
            command = ["figures", str(folder), "--notebook", name, "--source", source, "--out", str(tmp_path)]
            assert CliRunner().invoke(app, command).exit_code == 0
            assert seen.pop() == folder / RESULTS[name]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--source", "foo"], "--source = 'foo': no such source. Known: files, mlflow"),
        (["--notebook", "your_methods"], "Did you mean your_method?"),
        (["--notebook", "your_method", "--set", "arms=grpo"], "no such parameter of the notebook. Did you mean arm?"),
        (["--set", "arms=grpo"], "Did you mean arm?"),
        (["--notebook", "sweep", "--set", "arm=grpo"], "--set arm = 'grpo': no such parameter"),
        (["--notebook", "your_method", "--set", "source=mlflow"], "Give it with --source"),
        (["--notebook", "your_method", "--set", "arm=dynamoo"], "not an arm of this study. Did you mean dynamo?"),
        (["--notebook", "your_method", "--set", "reference=x"], "reference = 'x': not an arm of this study. Known: "),
        (["--notebook", "gradient_variance"], "`nox -s variance` makes results/variance"),
        (["--notebook", "sweep"], "no results for the notebook sweep"),
    ],
)  # fmt: skip
def test_what_a_notebook_cannot_show_is_refused_before_a_kernel_starts(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("a notebook was executed"))
    out = tmp_path / "figures"
    refused = CliRunner().invoke(app, ["figures", str(results / "main_table"), *options, "--out", str(out)])
    assert refused.exit_code == 2
    (line,) = refused.stderr.splitlines()
    assert told in line
    assert not out.exists()


def test_a_parameter_reaches_the_notebooks_that_have_it(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def pretend(name: str, folder: Path, out: Path, parameters: Any) -> Path:
        seen[name] = parameters.get("arm")
        return out / f"{name}.ipynb"

    monkeypatch.setattr("analysis.notebook_runner.execute", pretend)
    command = ["figures", str(results / "main_table"), "--set", "arm=dynamo", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert seen == {"main_results": None, "your_method": "dynamo"}
    assert parameters_of("your_method")["arm"] == "dynamo"


def test_a_kernel_is_not_interrupted_to_end_it(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.notebook_runner.NOTEBOOKS", tmp_path)
    mark = tmp_path / "interrupted"
    # The kernel puts this handler back when the cell is over, and so has it while it is idle.
    source = f"get_ipython().kernel.saved_sigint_handler = lambda *_: open({str(mark)!r}, 'w').close()"
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    made.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(made, tmp_path / "main_results.ipynb")
    execute("main_results", results / "main_table", tmp_path / "out", {})
    assert not mark.exists()


def test_a_notebook_runs_from_mlflow_with_parameters_of_its_own(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = ["--source", "mlflow", "--tracking-uri", store, "--set", "arm=grpo", "--set", "reference=dynamo"]
    command = ["figures", "main_table", "--notebook", "your_method", *options, "--out", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "arm='grpo'" in (tmp_path / "your_method.ipynb").read_text()
    assert (tmp_path / "your_method_differences_single.pdf").exists()


def test_tables_from_files_and_from_mlflow_agree(results: Path, store: str, tmp_path: Path) -> None:
    files = load_study(results / "main_table")
    mirrored = load_from_mlflow(store, "main_table", tmp_path)
    for frame in ("cells", "points", "evaluations", "steps", "allocation"):
        pd.testing.assert_frame_equal(getattr(files, frame), getattr(mirrored, frame))
    one, two = tables(Scores(files)), tables(Scores(mirrored))
    assert {name: table.csv() for name, table in one.items()} == {name: table.csv() for name, table in two.items()}
    assert {name: table.latex() for name, table in one.items()} == {name: table.latex() for name, table in two.items()}


def test_the_figures_from_files_and_from_mlflow_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of single tokens and of the gradient variance included; a mirror that lacks what they show says so."""
    recipe = synthetic.Recipe(
        arms={"grpo": 0.0, "dynamo": 0.1}, seeds=(0,), items=8, steps=6, points=3, traced=("Compute 6*7.",)
    )
    study, uri = synthetic.make_study(tmp_path / "traced", recipe), f"sqlite:///{tmp_path / 'mlflow.db'}"
    for cell in json.loads((study / "plan.json").read_text())["cells"]:
        config = compose_run(cell["arm"], scale="smoke", seed=cell["seed"], options=["evaluation.k=[1,8,32]"])
        (study / cell["dir"] / "config.yaml").write_text(dump(config))
        result = study / cell["dir"] / "result.json"
        result.write_text(json.dumps(json.loads(result.read_text()) | {"files": {"traces.jsonl": "0"}, "sha256": ""}))
    (study / "gradient_variance.json").write_text('{"rows": []}')
    monkeypatch.setattr("benchmark.mirror.TRACES", "none.jsonl")
    assert Mirror(uri, study, "traced").close()
    bring(uri, "traced", tmp_path / "without")
    assert "not in MLflow: traces.jsonl of 2 runs" in capsys.readouterr().err
    monkeypatch.undo()
    assert Mirror(uri, study, "traced").rebuild()
    made = bring(uri, "traced", tmp_path / "with")
    assert "not in MLflow" not in capsys.readouterr().err
    for path in (*sorted(study.glob("cells/*/traces.jsonl")), study / "gradient_variance.json"):
        assert (made / path.relative_to(study)).read_bytes() == path.read_bytes()
    assert traced_tokens(load_study(made), "entropy")["last"].keys() == {"grpo", "dynamo"}


def test_a_failing_cell_is_one_line_that_names_the_copy(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = ["--notebook", "your_method", "--set", "arm=dynamoo", "--out", str(tmp_path)]
    options += ["--source", "mlflow", "--tracking-uri", store]
    failed = CliRunner().invoke(app, ["figures", "main_table", *options])
    assert failed.exit_code == 2
    assert "your_method.ipynb" in failed.stderr.splitlines()[-1]
    assert "arm = 'dynamoo': not an arm of this study. Did you mean dynamo?" in failed.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda store, _: load_from_mlflow(store, "absent", Path("x")), "ablation, main_table"),
        (lambda _, folder: load_from_mlflow(f"sqlite:///{folder}/no.db", "main_table", folder), "no such file"),
        (lambda store, folder: bring_tables(store, "main_table", folder), "no run there has tables"),
        (lambda *_: open_study("x", "wandb", ""), "files and mlflow"),
        (lambda _, folder: open_variance(str(folder), "files", ""), "rolloutbench variance"),
        (lambda _, folder: load_trials(folder), "no Optuna journal"),
    ],
)
def test_what_is_not_there_is_told_with_a_remedy(
    ask: Callable[[str, Path], object], told: str, store: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=told):
        ask(store, tmp_path)


def test_a_mirror_without_records_names_the_command_that_remakes_it(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmark.mirror.RECORDS", ())
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert Mirror(uri, results / "ablation", "ablation").close()
    with pytest.raises(InputError, match="mirror --rebuild"):
        load_from_mlflow(uri, "ablation", tmp_path / "x")


def test_results_are_found_from_a_folder_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results" / "a").mkdir(parents=True)
    (tmp_path / "analysis" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "analysis" / "notebooks")
    assert locate("results/a") == tmp_path / "results" / "a"
    assert locate("results/b") == Path("results/b")


def test_a_sweep_is_read_by_arm(results: Path) -> None:
    trials = load_trials(results / "sweeps" / "modulation")
    assert trials.groupby("arm").size().to_dict() == {"dynamo": 4, "grpo": 4}
    best = best_settings(trials).set_index("arm")
    assert best.loc["grpo", "default"] == pytest.approx(0.598)
    assert best.loc["grpo", "best"] == trials.loc[trials["arm"] == "grpo", "value"].max()
    assert arm_of("grpo") == "grpo"
    assert arm_of("a/b/dr_grpo deadbeef") == "dr_grpo"


def test_trials_from_the_journal_the_table_and_mlflow_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
    fakes: Any = importlib.import_module("fake_sweep")
    folder, uri = tmp_path / "modulation", f"sqlite:///{tmp_path / 'mlflow.db'}"
    asked = read_sweep(ROOT / "configs" / "sweeps" / "modulation.yaml", trials=3)
    outcome = run_sweep(asked, folder, workers=1, run=fakes.train, prepare_policy=lambda _: None)
    assert outcome.final is not None
    assert Mirror(uri, folder, "modulation").close()
    journal = open_sweep(str(folder), "files", uri)
    assert len(journal) == 3 * len(asked.config.arms)
    mirrored = open_sweep("results/sweeps/modulation", "mlflow", uri)
    (folder / "journal.log").unlink()
    table = open_sweep(str(folder), "files", uri)
    for other in (table, mirrored):
        other = other.sort_values(["arm", "trial"], ignore_index=True)
        pd.testing.assert_frame_equal(journal, other, check_like=True, check_exact=False, check_dtype=False)
