from __future__ import annotations

import importlib
import json
import logging
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from benchmark.config import RunConfig
from benchmark.jsonl import append_rows, atomic_write_json, atomic_write_text
from benchmark.mirror import STATE, Mirror
from benchmark.mirror_points import evaluation_points
from benchmark.mirror_record import flatten
from benchmark.mirror_store import Store

sys.path.insert(0, str(Path(__file__).parent))
files: Any = importlib.import_module("mirror_files")
config, start, set_state, step, evaluation_rows = (
    files.config,
    files.start,
    files.set_state,
    files.step,
    files.evaluation_rows,
)
finish, whole_cell, plan = files.finish, files.whole_cell, files.plan
client, runs, parent_and_children, content = files.client, files.runs, files.parent_and_children, files.content


TIMED = {"system/cpu_utilization_percentage", "system/process_memory_usage_megabytes", "time/elapsed_seconds"}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One sqlite store for the module; making its tables takes seconds, an experiment nothing."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mirror, "patience", 0.0)


@pytest.fixture
def mirror(uri: str, tmp_path: Path) -> Iterator[Callable[..., Mirror]]:
    """Makes mirrors of a folder into an experiment of this test; a second one is a restart of the first."""
    made: list[Mirror] = []

    def make(study: Path, experiment: str = "table") -> Mirror:
        for old in made:
            old._release()  # what the end of a killed process does
        made.append(Mirror(uri, study, f"{tmp_path.name}/{experiment}"))
        return made[-1]

    yield make
    for old in made:
        old._release()


def test_points_parameters_and_tags_are_those_of_the_files(
    mirror: Callable[..., Mirror], uri: str, tmp_path: Path
) -> None:
    [(folder, resolved)] = plan(tmp_path / "study", ("grpo",))
    whole_cell(folder, resolved)
    assert mirror(tmp_path / "study").close()
    parent, children = parent_and_children(uri, f"{tmp_path.name}/table")
    child = children["grpo-s0"]
    history, params, status = content(uri, f"{tmp_path.name}/table")["grpo-s0"]
    assert history["policy/entropy_nats"] == [(500, 1.0), (1000, 0.5), (1500, 1 / 3)]
    assert history["cost/flops"] == [(500, 1e12), (1000, 2e12), (1500, 3e12)]
    assert [at for at, _ in history["eval/sums_pass_at_1"]] == [0, 1500]
    assert history["eval/sums_pass_at_1"][0] == (0, pytest.approx((1 / 4 + 3 / 4) / 2))
    assert history["eval/average_pass_at_1"][0] == (0, pytest.approx(((1 / 4 + 3 / 4) / 2 + 0) / 2))
    assert [at for at, _ in history["eval/sums_pass_at_8"]] == [1500], "pass@8 needs 16 samples"
    assert history["cost/device_seconds"] == [(1500, 12.5)]
    assert params["budget.amount"] == "5000"
    assert params["evaluation.k"] == "[1, 8]"
    checked = RunConfig.model_validate(resolved)
    tags = child.data.tags
    assert (tags["run_hash"], tags["plan_hash"]) == (checked.run_hash, checked.plan_hash)
    assert (tags["arm"], tags["seed"], tags["scale"], tags["study"]) == ("grpo", "0", "smoke", "table")
    assert (status, parent.info.status) == ("FINISHED", "FINISHED")
    assert (child.info.start_time, child.info.end_time) == (1_000_000, 1_060_500)
    inputs = {entry.tags[0].value: entry.dataset for entry in child.inputs.dataset_inputs}
    assert {context: dataset.name for context, dataset in inputs.items()} == {
        "training": "sums-training",
        "evaluation": "sums-evaluation",
    }
    assert json.loads(inputs["training"].profile) == {"items": 1024}
    assert len({dataset.digest for dataset in inputs.values()}) == 2
    assert all(len(dataset.digest) <= 36 for dataset in inputs.values())


def test_following_a_run_ends_where_one_look_at_the_end_does(
    mirror: Callable[..., Mirror], uri: str, tmp_path: Path
) -> None:
    live, twin = tmp_path / "live", tmp_path / "twin"
    cells = plan(live, ("grpo", "dapo"))
    following = mirror(live, "live")
    assert following.sync()
    for folder, resolved in cells:
        start(folder, resolved)
        assert following.sync()
        rows = evaluation_rows(0, 0)
        append_rows(folder / "evaluation.jsonl", rows[:2])
        assert following.sync()
        append_rows(folder / "evaluation.jsonl", rows[2:])
        for number in range(3):
            step(folder, number)
            assert following.sync()
            assert following.sync()
        finish(folder, 3)
    assert following.close()
    shutil.copytree(live, twin, ignore=shutil.ignore_patterns("*mlflow_state*"))
    assert mirror(twin, "twin").close()
    assert content(uri, f"{tmp_path.name}/live") == content(uri, f"{tmp_path.name}/twin")


def test_a_torn_row_and_half_an_evaluation_wait(mirror: Callable[..., Mirror], uri: str, tmp_path: Path) -> None:
    [(folder, resolved)] = plan(tmp_path / "study", ("grpo",))
    start(folder, resolved)
    append_rows(folder / "evaluation.jsonl", evaluation_rows(0, 0)[:1])
    step(folder, 0)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-5])
    following = mirror(tmp_path / "study")
    assert following.sync()
    assert set(content(uri, f"{tmp_path.name}/table")["grpo-s0"][0]) == TIMED
    (folder / "metrics.jsonl").write_text(text)
    append_rows(folder / "evaluation.jsonl", evaluation_rows(0, 0)[1:])
    assert following.sync()
    history = content(uri, f"{tmp_path.name}/table")["grpo-s0"][0]
    assert history["cost/rollouts"] == [(500, 16)]
    following.sync()
    assert content(uri, f"{tmp_path.name}/table")["grpo-s0"][0]["eval/products_pass_at_1"] == [(0, 0)]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("moment", range(1, 9))
def test_a_process_killed_around_any_write_never_doubles_and_loses_nothing(
    mirror: Callable[..., Mirror], uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    study = tmp_path / "study"
    for folder, resolved in plan(study, ("grpo", "dapo")):
        whole_cell(folder, resolved)
    calls = 0

    def dying(original: Callable[..., Any], before: bool) -> Callable[..., Any]:
        def method(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if before and calls == moment:
                raise Killed
            result = original(*arguments)
            if not before and calls == moment:
                raise Killed
            return result

        return method

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "_save", dying(Mirror._save, before=True))
        patch.setattr(Store, "send", dying(Store.send, before=False))
        with pytest.raises(Killed):
            mirror(study).close()
    assert mirror(study).close()
    twin = tmp_path / "twin"
    shutil.copytree(study, twin, ignore=shutil.ignore_patterns("*mlflow_state*"))
    assert mirror(twin, "twin").close()
    assert content(uri, f"{tmp_path.name}/table") == content(uri, f"{tmp_path.name}/twin")


def test_a_resumed_run_that_writes_its_rows_again_adds_no_points(
    mirror: Callable[..., Mirror], uri: str, tmp_path: Path
) -> None:
    [(folder, resolved)] = plan(tmp_path / "study", ("grpo",))
    start(folder, resolved)
    for number in range(4):
        step(folder, number)
    following = mirror(tmp_path / "study")
    assert following.sync()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    assert following.sync()
    for line in lines[2:]:
        # The same values in other bytes, as another library version may print them.
        (folder / "metrics.jsonl").open("a").write(json.dumps(json.loads(line)) + "\n")
    step(folder, 4)
    assert following.sync()
    history = content(uri, f"{tmp_path.name}/table")["grpo-s0"][0]
    assert [at for at, _ in history["cost/rollouts"]] == [500, 1000, 1500, 2000, 2500]


def test_rebuilding_gives_the_same_and_bins_the_old(mirror: Callable[..., Mirror], uri: str, tmp_path: Path) -> None:
    study, name = tmp_path / "study", f"{tmp_path.name}/table"
    for folder, resolved in plan(study, ("grpo", "dapo")):
        whole_cell(folder, resolved)
    assert mirror(study).close()
    before, old = content(uri, name), {run.info.run_id for run in runs(uri, name)}
    assert mirror(study).rebuild()
    assert content(uri, name) == before
    assert not old & {run.info.run_id for run in runs(uri, name)}


def test_runs_deleted_in_the_store_come_back(mirror: Callable[..., Mirror], uri: str, tmp_path: Path) -> None:
    study, name = tmp_path / "study", f"{tmp_path.name}/table"
    for folder, resolved in plan(study, ("grpo", "dapo")):
        whole_cell(folder, resolved)
    assert mirror(study).close()
    before = content(uri, name)
    client(uri).delete_run(parent_and_children(uri, name)[1]["dapo-s0"].info.run_id)
    assert mirror(study).close()
    assert content(uri, name) == before
    for run in runs(uri, name):
        client(uri).delete_run(run.info.run_id)
    assert mirror(study).close()
    assert content(uri, name) == before


def test_status_follows_the_files_and_a_resumed_study_keeps_its_parent(
    mirror: Callable[..., Mirror], uri: str, tmp_path: Path
) -> None:
    study, name = tmp_path / "study", f"{tmp_path.name}/table"
    cells = plan(study, ("done", "failed", "stopped", "lost", "dead"))
    folders = {folder.name.removesuffix("-s0"): folder for folder, _ in cells}
    for folder, resolved in cells:
        start(folder, resolved)
        step(folder, 0)
    finish(folders["done"], 1)
    set_state(folders["failed"], "failed", "RuntimeError: loss is NaN")
    set_state(folders["stopped"], "interrupted")
    atomic_write_json(folders["dead"] / "failure.json", {"error": "killed by signal 9"})
    following = mirror(study)
    assert following.sync()
    parent, children = parent_and_children(uri, name)
    words = {cell.removesuffix("-s0"): run.info.status for cell, run in children.items()}
    assert words == {
        "done": "FINISHED",
        "failed": "FAILED",
        "stopped": "KILLED",
        "lost": "RUNNING",
        "dead": "FAILED",
    }
    assert parent.info.status == "RUNNING"
    assert children["failed-s0"].data.tags["message"] == "RuntimeError: loss is NaN"
    assert following.close()
    parent, children = parent_and_children(uri, name)
    assert (parent.info.status, children["lost-s0"].info.status) == ("FAILED", "KILLED")

    (folders["dead"] / "failure.json").unlink()
    for arm in ("failed", "stopped", "lost", "dead"):
        set_state(folders[arm], "running")
    resumed = mirror(study)
    assert resumed.sync()
    again, children = parent_and_children(uri, name)
    assert again.info.run_id == parent.info.run_id
    assert again.info.status == children["stopped-s0"].info.status == "RUNNING"
    for arm in ("failed", "stopped", "lost", "dead"):
        finish(folders[arm], 1)
    assert resumed.close()
    parent, children = parent_and_children(uri, name)
    assert {parent.info.status} | {run.info.status for run in children.values()} == {"FINISHED"}


def test_a_study_stopped_before_its_last_cell_is_not_finished(
    mirror: Callable[..., Mirror], uri: str, tmp_path: Path
) -> None:
    cells = plan(tmp_path / "study", ("grpo", "dapo"))
    whole_cell(*cells[0])
    assert mirror(tmp_path / "study").close()
    parent, children = parent_and_children(uri, f"{tmp_path.name}/table")
    assert (parent.info.status, list(children)) == ("KILLED", ["grpo-s0"])


def test_fourteen_cells_in_batches_the_store_accepts(
    mirror: Callable[..., Mirror], uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    sizes: list[tuple[int, int, int]] = []
    original = MlflowClient.log_batch

    def spy(self: Any, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> Any:
        sizes.append((len(metrics), len(params), len(tags)))
        return original(self, run_id, metrics=metrics, params=params, tags=tags)

    monkeypatch.setattr(MlflowClient, "log_batch", spy)
    study = tmp_path / "study"
    cells = plan(study, tuple(f"arm{i}" for i in range(14)))
    for i, (folder, resolved) in enumerate(cells):
        resolved["method"]["params"] = {f"p{j}": j for j in range(150)} if i == 0 else {"text": "x" * 20_000}
        whole_cell(folder, resolved, steps=250 if i == 0 else 2)
    assert mirror(study).close()
    found = content(uri, f"{tmp_path.name}/table")
    assert len(found) == 14
    assert len(found["arm0-s0"][0]["cost/rollouts"]) == 250
    assert len(found["arm0-s0"][1]) > 150
    assert len(found["arm1-s0"][1]["method.params.text"]) == 6000
    assert found["arm1-s0"][1]["method.params.text"].endswith("(cut; whole in config.yaml)")
    largest = [max(column) for column in zip(*sizes, strict=True)]
    assert largest[0] == 1000
    assert largest[1] == 100
    assert largest[2] <= 100


def test_report_tables_figures_plan_and_configurations_are_artifacts(
    mirror: Callable[..., Mirror], uri: str, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    for cell in plan(study, ("grpo",)):
        whole_cell(*cell)
    for file in ("REPORT.md", "tables/main.csv", "figures/curve.svg"):
        atomic_write_text(study / file, file)
    assert mirror(study).close()
    parent, children = parent_and_children(uri, f"{tmp_path.name}/table")

    def listed(run: Any, path: str | None = None) -> set[str]:
        return {entry.path for entry in client(uri).list_artifacts(run.info.run_id, path)}

    assert listed(parent) == {"REPORT.md", "tables", "figures", "plan.json"}
    assert listed(parent, "tables") == {"tables/main.csv"}
    records = {"evaluation.jsonl", "metrics.jsonl", "timings.jsonl", "result.json"}
    assert listed(children["grpo-s0"]) == {"config.yaml"} | records
    assert Path(uri.removeprefix("sqlite:///")).parent.as_uri() in parent.info.artifact_uri


def test_a_single_run_is_a_study_of_one(mirror: Callable[..., Mirror], uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    whole_cell(folder, config(seed=3))
    assert mirror(folder).close()
    parent, children = parent_and_children(uri, f"{tmp_path.name}/table")
    [(cell, child)] = children.items()
    assert cell.startswith("grpo-s3-")
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert child.data.metrics["cost/rollouts"] == 48


def test_only_one_mirror_writes_for_a_folder(uri: str, tmp_path: Path) -> None:
    study, name = tmp_path / "study", f"{tmp_path.name}/table"
    [cell] = plan(study, ("grpo",))
    start(*cell)
    first, second = Mirror(uri, study, name), Mirror(uri, study, name)
    assert first.sync()
    step(cell[0], 0)
    assert not second.sync()
    assert not second.close()
    assert content(uri, name)["grpo-s0"][0] == {}
    assert first.close()
    third = Mirror(uri, study, name)
    assert third.sync()
    assert content(uri, name)["grpo-s0"][0]["cost/rollouts"] == [(500, 16)]
    third.close()


def test_a_damaged_record_is_named_and_does_not_hold_up_the_others(
    mirror: Callable[..., Mirror], uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = tmp_path / "study"
    cells = plan(study, ("grpo", "dapo"))
    for cell in cells:
        whole_cell(*cell)
    with (cells[0][0] / "metrics.jsonl").open("a") as file:
        file.write("{broken\n")
    assert not mirror(study).close()
    assert "metrics.jsonl:4" in caplog.text
    assert content(uri, f"{tmp_path.name}/table")["dapo-s0"][2] == "FINISHED"


def test_a_refused_port_never_raises_and_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    [cell] = plan(tmp_path, ("grpo",))
    whole_cell(*cell)
    following = Mirror(f"http://me:secret@127.0.0.1:{port}", tmp_path, "table")
    assert not following.sync()
    assert not following.sync()
    assert not following.close()
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert "secret" not in caplog.text


def test_what_a_dead_store_missed_is_there_once_it_answers(
    mirror: Callable[..., Mirror], uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, name = tmp_path / "study", f"{tmp_path.name}/table"
    [(folder, resolved)] = plan(study, ("grpo",))
    start(folder, resolved)
    following = mirror(study)
    step(folder, 0)
    assert following.sync()
    with monkeypatch.context() as patch:
        original = Store.send

        def answer_is_lost(self: Store, run_id: str, points: Any) -> None:
            original(self, run_id, points)
            raise ConnectionError("the server died before it answered")

        patch.setattr(Store, "send", answer_is_lost)
        step(folder, 1)
        assert not following.sync()
        patch.setattr(Store, "send", lambda *_: (_ for _ in ()).throw(ConnectionError("refused")))
        step(folder, 2)
        assert not following.sync()
    assert following.sync()
    history = content(uri, name)["grpo-s0"][0]
    assert [at for at, _ in history["cost/rollouts"]] == [500, 1000, 1500]


def test_a_store_that_fails_slowly_is_left_alone_for_longer(
    mirror: Callable[..., Mirror], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(tmp_path, ("grpo",))
    tries = 0

    def slow(*_: Any) -> None:
        nonlocal tries
        tries += 1
        time.sleep(0.05)
        raise ConnectionError("timeout")

    monkeypatch.setattr(Store, "__init__", slow)
    monkeypatch.setattr(Mirror, "patience", 1000.0)
    following = mirror(tmp_path)
    assert [following.sync() for _ in range(3)] == [False, False, False]
    assert tries == 1
    following.close()
    assert tries == 2, "the last chance is always taken"


def test_the_state_on_disk_holds_no_password(tmp_path: Path) -> None:
    Mirror("postgresql://user:secret@127.0.0.1/db", tmp_path, "table")._save()
    text = (tmp_path / STATE).read_text()
    assert json.loads(text)["cells"] == {}
    assert "secret" not in text


def test_pass_at_k_is_the_share_of_k_subsets_with_a_correct_answer() -> None:
    n, k, correct = 8, 4, (0, 1, 3, 8)
    rows = [{"family": "sums", "n": n, "c": c, "tokens": 1, "cost": {"rollouts": 7}} for c in correct]
    expected = Fraction(0)
    for c in correct:
        subsets = list(combinations([True] * c + [False] * (n - c), k))
        expected += Fraction(sum(map(any, subsets)), len(subsets)) / len(correct)
    values = {point.key: point.value for point in evaluation_points(rows, "rollouts", [1, 4, 8])}
    assert values["eval/sums_pass_at_4"] == pytest.approx(float(expected), abs=1e-12)
    assert values["eval/sums_pass_at_1"] == pytest.approx(sum(correct) / n / 4)
    assert "eval/sums_pass_at_8" not in values


def test_flattened_configurations_keep_every_leaf() -> None:
    nested = {"a": {"b": {"c": 1, "d": [1, 2]}, "e": None}, "f": "x", "g": {}, "h@i": True}
    assert flatten(nested) == {
        "a.b.c": "1",
        "a.b.d": "[1, 2]",
        "a.e": "null",
        "f": "x",
        "g": "{}",
        "h_i": "true",
    }


def test_mlflow_is_imported_only_when_a_store_is_opened(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmark.mirror import Mirror;"
        f"Mirror('sqlite:///x.db', Path({str(tmp_path)!r}), 'x');"
        "sys.exit('mlflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_state_names_every_run(mirror: Callable[..., Mirror], uri: str, tmp_path: Path) -> None:
    cells = plan(tmp_path / "study", ("grpo", "dapo"))
    for cell in cells:
        whole_cell(*cell)
    assert mirror(tmp_path / "study").close()
    state = json.loads((tmp_path / "study" / STATE).read_text())
    _, children = parent_and_children(uri, f"{tmp_path.name}/table")
    assert {name: run["run_id"] for name, run in state["cells"].items()} == {
        name: run.info.run_id for name, run in children.items()
    }
