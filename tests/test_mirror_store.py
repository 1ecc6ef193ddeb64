"""What the mirror writes besides rows: curves at equal cost, models, the view; and that nothing is there twice."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark.jsonl import atomic_write_json
from benchmark.mirror import Mirror
from benchmark.mirror_points import CURVE_POINTS, Point, at_equal_cost
from benchmark.mirror_store import Store

sys.path.insert(0, str(Path(__file__).parent))
files: Any = importlib.import_module("mirror_files")
KEY = "eval/average_pass_at_1"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@given(
    steps=st.lists(st.integers(1, 400), min_size=1, max_size=30),
    amount=st.integers(24, 3000),
    cuts=st.lists(st.integers(0, 30), max_size=4),
)
def test_curves_at_equal_cost_interpolate_and_do_not_depend_on_when_one_looks(
    steps: list[int], amount: int, cuts: list[int]
) -> None:
    costs = np.concatenate([[0], np.cumsum(steps)])
    values = np.sin(costs)
    points = [Point(KEY, float(value), int(cost)) for cost, value in zip(costs, values, strict=True)]
    once, _ = at_equal_cost(points, {}, amount)
    grid = [amount * share // CURVE_POINTS for share in range(CURVE_POINTS + 1)]
    reached = [cost for cost in grid if cost <= costs[-1]]
    assert [(point.key, point.step) for point in once] == [("curve/average_pass_at_1", cost) for cost in reached]
    np.testing.assert_allclose([point.value for point in once], np.interp(reached, costs, values), atol=1e-12)

    several: list[Point] = []
    tips: dict[str, tuple[int, float]] = {}
    borders = [0, *sorted(cuts), len(points)]
    for begin, end in itertools.pairwise(borders):
        # A record that is read again from its beginning adds nothing.
        read = points[:end] if begin % 2 else points[begin:end]
        found, tips = at_equal_cost(read, tips, amount)
        several += found
    assert several == once


def test_runs_of_one_arm_have_curve_points_at_the_same_costs(uri: str, tmp_path: Path) -> None:
    cells = files.plan(tmp_path, ("grpo",), (0, 1))
    for (folder, resolved), steps in zip(cells, (3, 7), strict=True):
        files.whole_cell(folder, resolved, steps)
    assert Mirror(uri, tmp_path, "curves").close()
    found = files.content(uri, "curves")
    both = [found[name][0] for name in ("grpo-s0", "grpo-s1")]
    costs = [{cost for cost, _ in history["curve/average_pass_at_1"]} for history in both]
    assert costs[0] == {5000 * share // CURVE_POINTS for share in range(8)}
    assert costs[0] < costs[1]


def test_load_and_elapsed_time_are_points(uri: str, tmp_path: Path) -> None:
    [(folder, resolved)] = files.plan(tmp_path, ("grpo",))
    files.whole_cell(folder, resolved)
    assert Mirror(uri, tmp_path, "system").close()
    history, _, _ = files.content(uri, "system")["grpo-s0"]
    assert history["system/cpu_utilization_percentage"] == [(500, 90.0), (1000, 91.0), (1500, 92.0)]
    assert history["time/elapsed_seconds"] == [(500, 2.0), (1000, 4.0), (1500, 6.0)]


def test_the_policy_is_a_model_of_its_run_and_stays_where_it_is(uri: str, tmp_path: Path) -> None:
    [(folder, resolved)] = files.plan(tmp_path, ("grpo",))
    files.whole_cell(folder, resolved)
    for _ in range(2):
        assert Mirror(uri, tmp_path, "models").close()
    assert Mirror(uri, tmp_path, "models").rebuild()
    client = files.client(uri)
    experiment = client.get_experiment_by_name("models").experiment_id
    [model] = client.search_logged_models([experiment])
    child = files.parent_and_children(uri, "models")[1]["grpo-s0"]
    assert (model.name, model.source_run_id, str(model.status)) == ("grpo-s0", child.info.run_id, "READY")
    assert model.tags["path"] == str(folder / "policy")
    assert model.tags["sha256.model.safetensors"] == hashlib.sha256(b"grpo-s0").hexdigest()
    [output] = child.outputs.model_outputs
    assert (output.model_id, output.step) == (model.model_id, 1500)
    artifacts = {entry.path for entry in client.list_artifacts(child.info.run_id)}
    assert not {path for path in artifacts if "policy" in path or "safetensors" in path}


def test_points_that_arrive_twice_are_one(uri: str, tmp_path: Path) -> None:
    points = [Point("cost/rollouts", 8.0 * step, step) for step in range(1, 2500)]
    first = Store(uri, "twice")
    run = first.create("run", {}, None)
    first.send(run, points)
    Store(uri, "twice").send(run, points[1000:])  # as a request that was given up and arrives later
    history = files.client(uri).get_metric_history(run, "cost/rollouts")
    assert sorted((metric.step, metric.value) for metric in history) == [(p.step, p.value) for p in points]


@pytest.mark.parametrize("cell", ["", "grpo-s0"])
def test_a_run_that_arrives_after_it_was_given_up_is_removed(uri: str, tmp_path: Path, cell: str) -> None:
    name = f"late{cell}"
    [(folder, resolved)] = files.plan(tmp_path, ("grpo",))
    files.start(folder, resolved)
    files.step(folder, 0)
    mirror = Mirror(uri, tmp_path, name)
    assert mirror.sync()
    [mine] = [run for run in files.runs(uri, name) if run.data.tags["rolloutbench.cell"] == cell]
    tags = {key: mine.data.tags[key] for key in mine.data.tags if key.startswith(("rolloutbench.", "mlflow.parent"))}
    Store(uri, name).create("late", tags, 1)
    files.step(folder, 1)
    files.finish(folder, 2)
    assert mirror.close()
    left = [run.info.run_id for run in files.runs(uri, name) if run.data.tags["rolloutbench.cell"] == cell]
    assert left == [mine.info.run_id]
    assert [at for at, _ in files.content(uri, name)["grpo-s0"][0]["cost/rollouts"]] == [500, 1000]


def test_the_experiment_holds_the_view_and_a_link_to_it(uri: str, tmp_path: Path) -> None:
    [(folder, resolved)] = files.plan(tmp_path, ("grpo",))
    files.whole_cell(folder, resolved)
    assert Mirror(uri, tmp_path, "view").close()
    experiment = files.client(uri).get_experiment_by_name("view")
    view = json.loads(experiment.tags["mlflow.sharedViewState.rolloutbench"])
    state = json.loads(view["state"])
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "arm"}]
    charts = state["compareRunCharts"]
    assert {chart.get("xAxisKey") for chart in charts} == {"step", None}
    assert state["compareRunSections"][0]["name"] == "Step = tokens_generated"
    link = f"#/experiments/{experiment.experiment_id}/runs?viewStateShareKey=rolloutbench"
    assert link in experiment.tags["mlflow.note.content"]
    history, _, _ = files.content(uri, "view")["grpo-s0"]
    assert {chart["metricKey"] for chart in charts} <= set(history)
    # The filter of the view leaves the cells and nothing else.
    [run] = files.client(uri).search_runs([experiment.experiment_id], state["searchFilter"])
    assert run.data.tags["arm"] == "grpo"


def test_settings_of_a_sweep_are_grouped_by_the_arm_they_tune_and_a_pruned_one_is_no_fault(
    uri: str, tmp_path: Path
) -> None:
    cells = files.plan(tmp_path, ("dynamo-t000", "dynamo-t001"))
    files.whole_cell(*cells[0])
    files.start(*cells[1])
    files.set_state(cells[1][0], "failed", "loss is not finite")
    plan = json.loads((tmp_path / "plan.json").read_text())
    listed = [cell | {"group": "dynamo"} for cell in plan["cells"]]
    listed[1]["ended"] = "diverged"
    atomic_write_json(tmp_path / "plan.json", plan | {"groups": ["dynamo"], "cells": listed})
    assert Mirror(uri, tmp_path, "sweep").close()
    parent, children = files.parent_and_children(uri, "sweep")
    assert parent.info.status == "FINISHED"
    assert children["dynamo-t001-s0"].info.status == "FAILED"
    assert {run.data.tags["group"] for run in children.values()} == {"dynamo"}
    view = json.loads(files.client(uri).get_experiment_by_name("sweep").tags["mlflow.sharedViewState.rolloutbench"])
    state = json.loads(view["state"])
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "group"}]
    assert state["groupsExpanded"] == {"tag.group.dynamo": False}


OPEN = """
import sys, time
from benchmark.mirror_store import Store
import mlflow.store.tracking.sqlalchemy_store
print("ready", flush=True)
sys.stdin.readline()
store = Store(sys.argv[1], "shared")
print(store.create("run", {}, None))
"""


@pytest.mark.slow
def test_many_processes_open_a_fresh_sqlite_store_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-c", OPEN, uri]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(8)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), ends
    assert {run.info.run_id for run in files.runs(uri, "shared")} == {out.strip() for out, _ in ends}
