"""The study runner with training faked: what is planned, run, resumed, reported, and survives failures."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console
from scipy import stats

from benchmark import study as study_module
from benchmark.cells import Cell, claim
from benchmark.compose import Plan, compose_study
from benchmark.config import ArmConfig
from benchmark.errors import InputError, StorageError
from benchmark.estimate import detectable_difference, estimate, paired_sd
from benchmark.jsonl import atomic_write_json, atomic_write_text
from benchmark.layers import dump
from benchmark.progress import Bar, Display, TimeLeft, duration, short
from benchmark.seal import file_hash, sealed
from benchmark.study import Outcome, bars, changes_of, run_study
from benchmark.workers import WorkersFailedError, default_workers

STUDY = """\
study: pair
question: Which?
scale: smoke
arms: [grpo, rloo]
seeds: 3
claims:
  - {id: rloo_wins, text: RLOO is better., arm: rloo, reference: grpo}
decision_rule: Look.
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "POLL_SECONDS", 0.05)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`tests/fake_cells.py`, importable in worker processes too (they get this process's path)."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("fake_cells")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    path = tmp_path / "pair.yaml"
    atomic_write_text(path, STUDY)
    return compose_study(str(path), seeds=3)


class Recorder:
    """Runs studies, remembering what was prepared, reported and said."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.prepared: list[str] = []
        self.reported: list[dict[str, Any]] = []
        self.console = Console(record=True, file=(folder.parent / "console").open("w"), width=200)

    def __call__(self, run: Callable[..., None], **options: Any) -> Outcome:
        def report(folder: Path) -> None:
            self.reported.append(json.loads((folder / "plan.json").read_text(encoding="utf-8")))

        return run_study(
            self.plan,
            self.folder,
            workers=2,
            run=run,
            prepare=lambda config: self.prepared.append(config.run_hash),
            report=report,
            display=Display(self.console),
            **options,
        )

    @property
    def said(self) -> str:
        return self.console.export_text(clear=False)

    def cells(self, arm: str = "") -> list[Cell]:
        return [Cell.of(self.folder, run) for run in self.plan.runs if arm in ("", run.arm)]


@pytest.fixture
def go(plan: Plan, tmp_path: Path) -> Recorder:
    return Recorder(plan, tmp_path / "results")


def order(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "order.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_launcher_of_several_processes_cannot_start_a_study(go: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE"):
        go(lambda: None)


# -- a study that goes well ----------------------------------------------------------------------------------


def test_every_cell_runs_once_and_a_second_invocation_runs_nothing(go: Recorder, fakes: ModuleType) -> None:
    outcome = go(fakes.finish)
    assert outcome == Outcome(6, 6, {}, False)
    rows = order(go.folder)
    assert sorted((row["seed"], row["arm"]) for row in rows) == [(s, a) for s in range(3) for a in ("grpo", "rloo")]
    assert {row["threads"] for row in rows} == {"1"}
    assert len(go.prepared) == 1  # one policy for all arms
    assert len(go.reported) == 1
    assert go(fakes.exit_early) == Outcome(6, 6, {}, False)
    assert len(go.prepared) == 1
    assert len(go.reported) == 2


def test_only_missing_cells_run(go: Recorder, fakes: ModuleType) -> None:
    done = go.cells("grpo")[1]
    done.folder.mkdir(parents=True)
    fakes.finish(done.config, done.folder, should_stop=lambda: False)
    (go.folder / "order.jsonl").unlink()
    assert go(fakes.finish).done == 6
    assert ("grpo", 1) not in {(row["arm"], row["seed"]) for row in order(go.folder)}
    assert len(order(go.folder)) == 5


def test_runs_of_another_study_are_taken_over_where_equal(go: Recorder, fakes: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    atomic_write_text(path, STUDY.replace("pair", "other").replace("[grpo, rloo]", "[grpo, rloo, dapo]"))
    other = Recorder(compose_study(str(path), seeds=2), tmp_path / "others")
    assert other(fakes.finish).done == 6
    unfinished = other.cells("rloo")[1].folder
    (unfinished / "result.json").unlink()
    assert go(fakes.finish, reuse=[other.folder]) == Outcome(6, 6, {}, False)
    ran = {(row["arm"], row["seed"]) for row in order(go.folder)}
    assert ran == {("rloo", 1), ("grpo", 2), ("rloo", 2)}
    taken, source = go.cells("rloo")[0].folder, other.cells("rloo")[0].folder
    for name in ("result.json", "evaluation.jsonl", "config.yaml"):
        assert (taken / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((taken / "origin.json").read_text()) == {"folder": str(source)}
    assert not (go.cells("rloo")[1].folder / "origin.json").exists()
    assert "3 cells taken over from other studies" in go.console.export_text()


def test_a_copy_cut_short_is_run_and_a_copy_of_nothing_refused(
    go: Recorder, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert go(fakes.finish).done == 6
    other = Recorder(go.plan, tmp_path / "others")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(StorageError, match="No space"):
            other(fakes.finish, reuse=[go.folder])
    assert all(cell.result() is None for cell in other.cells("grpo"))
    assert other(fakes.finish, reuse=[go.folder]).done == 6
    assert not (other.folder / "order.jsonl").exists()
    with pytest.raises(InputError, match="no runs of a study there"):
        other(fakes.finish, reuse=[tmp_path])


def test_a_run_that_was_changed_is_not_taken_over(go: Recorder, fakes: ModuleType, tmp_path: Path) -> None:
    assert go(fakes.finish).done == 6
    folder = go.cells("grpo")[0].folder
    files = {"evaluation.jsonl": file_hash(folder / "evaluation.jsonl")}
    result = json.loads((folder / "result.json").read_text()) | {"files": files}
    atomic_write_json(folder / "result.json", sealed(result))
    assert Recorder(go.plan, tmp_path / "good")(fakes.exit_early, reuse=[go.folder]).done == 6
    with (folder / "evaluation.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match=r"evaluation.jsonl: is not as the run left it.*rolloutbench audit"):
        Recorder(go.plan, tmp_path / "bad")(fakes.exit_early, reuse=[go.folder])
    atomic_write_json(folder / "result.json", sealed(result) | {"wall_seconds": 1.0})
    with pytest.raises(InputError, match=r"result.json: is not as the run left it"):
        Recorder(go.plan, tmp_path / "worse")(fakes.exit_early, reuse=[go.folder])
    (folder / "policy").symlink_to(tmp_path)
    with pytest.raises(InputError, match="is a link to"):
        Recorder(go.plan, tmp_path / "linked")(fakes.exit_early, reuse=[go.folder])


def test_more_seeds_keep_the_cells_of_fewer(go: Recorder, fakes: ModuleType, tmp_path: Path) -> None:
    go(fakes.finish)
    more = Recorder(compose_study(str(tmp_path / "pair.yaml"), seeds=4), go.folder)
    assert more(fakes.finish) == Outcome(8, 8, {}, False)
    assert len(order(go.folder)) == 8


def test_the_plan_says_what_was_asked_before_anything_ran(go: Recorder, fakes: ModuleType) -> None:
    go(fakes.finish)
    plan = go.reported[0]
    assert {key: plan[key] for key in ("study", "scale", "arms", "seeds", "reference", "primary_metric")} == {
        "study": "pair",
        "scale": "smoke",
        "arms": ["grpo", "rloo"],
        "seeds": [0, 1, 2],
        "reference": "grpo",
        "primary_metric": "pass_at_1",
    }
    assert plan["primary_currency"] == "tokens_generated"
    assert plan["claims"][0]["id"] == "rloo_wins"
    assert plan["families"] == list(go.plan.runs[0].task.families)
    assert plan["changes"] == {"grpo": [], "rloo": ["advantage"]}
    unclipped = ArmConfig.model_validate({"name": "grpo", "label": "no_clip", "params": {"loss": {"clip": False}}})
    assert changes_of(unclipped) == ["loss"]
    assert [(cell["arm"], cell["seed"]) for cell in plan["cells"]] == [
        (arm, seed) for seed in range(3) for arm in ("grpo", "rloo")
    ]
    for cell in plan["cells"]:
        result = json.loads((go.folder / cell["dir"] / "result.json").read_text(encoding="utf-8"))
        assert result["run_hash"] == cell["run_hash"]


def test_a_folder_that_holds_another_run_stops_the_study_before_it_starts(go: Recorder, fakes: ModuleType) -> None:
    mine, other = go.cells()[0], go.cells()[1]
    mine.folder.mkdir(parents=True)
    atomic_write_text(mine.folder / "config.yaml", dump(other.config))
    with pytest.raises(InputError, match="another configuration"):
        go(fakes.finish)
    assert not go.prepared


def test_another_scale_in_the_same_folder_is_announced(go: Recorder, fakes: ModuleType, tmp_path: Path) -> None:
    go(fakes.finish)
    small = Recorder(compose_study(str(tmp_path / "pair.yaml"), scale="small", seeds=1), go.folder)
    small(fakes.finish)
    assert "last held scale smoke" in small.said


def other_method(cell: Cell) -> None:
    """A finished cell as other files of its method would have left it."""
    path = cell.folder / "result.json"
    atomic_write_json(path, sealed({**json.loads(path.read_text()), "code": [{"method_sha256": "other"}]}))


def test_finished_runs_of_a_method_that_was_edited_stay_and_are_named(go: Recorder, fakes: ModuleType) -> None:
    go(fakes.finish)
    assert "files changed" not in go.said
    other_method(go.cells("rloo")[1])
    (go.folder / "order.jsonl").unlink()
    assert go(fakes.finish).done == 6
    assert not (go.folder / "order.jsonl").exists()
    assert "rloo: the method's files changed since its finished runs, which stay" in go.said
    assert "rloo-s*" in go.said
    assert "grpo: the method's files" not in go.said


def test_runs_of_other_files_of_the_method_are_not_taken_over(go: Recorder, fakes: ModuleType, tmp_path: Path) -> None:
    other = Recorder(go.plan, tmp_path / "others")
    other(fakes.finish)
    other_method(other.cells("rloo")[1])
    assert go(fakes.finish, reuse=[other.folder]).done == 6
    assert [(row["arm"], row["seed"]) for row in order(go.folder)] == [("rloo", 1)]


# -- failures ------------------------------------------------------------------------------------------------


def test_a_failing_cell_is_named_stops_nothing_and_is_tried_again_next_time(go: Recorder, fakes: ModuleType) -> None:
    outcome = go(fakes.fail_rloo)
    assert (outcome.done, outcome.interrupted) == (3, False)
    assert outcome.failed == {cell.folder.name: "ValueError: rloo is broken today" for cell in go.cells("rloo")}
    assert go.reported[0]["failures"] == [
        {"arm": "rloo", "seed": seed, "error": "ValueError: rloo is broken today"} for seed in range(3)
    ]
    log = (go.cells("rloo")[0].folder / "run.log").read_text(encoding="utf-8")
    assert log.index("about to fail") < log.index("Traceback") < log.index("rloo is broken today")
    assert go(fakes.finish) == Outcome(6, 6, {}, False)
    assert "failures" not in go.reported[1]


def test_a_study_of_which_nothing_is_done_says_what_failed(go: Recorder, fakes: ModuleType) -> None:
    outcome = go(fakes.fail_all)
    assert (outcome.done, len(outcome.failed), go.reported) == (0, 6, [])
    report = (go.folder / "REPORT.md").read_text(encoding="utf-8")
    assert "No run of 6 is done; 6 failed." in report
    for cell in go.cells():
        assert f"(output: cells/{cell.folder.name}/run.log)" in report
    assert r"ValueError: \<b>nothing\</b> works today" in report
    assert "They are run again by:\n\n```\nthe command that made this study\n```" in report


def test_a_worker_that_dies_is_replaced_and_its_cell_named(go: Recorder, fakes: ModuleType) -> None:
    outcome = go(fakes.kill_rloo)
    assert outcome.done == 3
    assert set(outcome.failed) == {cell.folder.name for cell in go.cells("rloo")}
    assert all("SIGKILL" in why for why in outcome.failed.values())
    assert go(fakes.finish) == Outcome(6, 6, {}, False)


def test_workers_that_cannot_start_end_the_study(
    go: Recorder, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = ModuleType("absent_in_workers")
    broken.run = lambda *_, **__: None  # type: ignore[attr-defined]
    broken.run.__module__, broken.run.__qualname__ = "absent_in_workers", "run"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "absent_in_workers", broken)
    with pytest.raises(WorkersFailedError, match=r"workers\.log"):
        go(broken.run)  # type: ignore[attr-defined]


def test_a_worker_that_lost_its_cell_leaves_it_alone(go: Recorder, fakes: ModuleType) -> None:
    outcome = go(fakes.robbed)
    assert outcome == Outcome(6, 6, {}, False)
    assert "LeaseLostError" in (go.cells()[0].folder / "run.log").read_text(encoding="utf-8")


def test_helpers_of_a_worker_can_be_terminated(go: Recorder, fakes: ModuleType) -> None:
    assert go(fakes.with_helper) == Outcome(6, 6, {}, False)


def test_a_mirror_that_breaks_does_not_stop_the_study(
    go: Recorder, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = ModuleType("benchmark.mirror")

    class Mirror:
        def __init__(self, *_: object) -> None:
            raise OSError("no store")

    broken.Mirror = Mirror  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmark.mirror", broken)
    assert go(fakes.finish, tracking_uri="sqlite:///x.db").done == 6
    assert "no store" in go.said


def test_the_mirror_follows_and_is_closed_after_the_report(
    go: Recorder, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    stub = ModuleType("benchmark.mirror")

    class Mirror:
        def __init__(self, uri: str, folder: Path, experiment: str) -> None:
            assert (uri, folder, experiment) == ("http://store", go.folder, "pair")

        def sync(self) -> None:
            calls.append(("sync", len(go.reported)))

        def close(self) -> None:
            calls.append(("close", len(go.reported)))

    stub.Mirror = Mirror  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmark.mirror", stub)
    monkeypatch.setattr(study_module, "MIRROR_SECONDS", 0.05)
    go(fakes.finish, tracking_uri="http://store")
    assert ("sync", 0) in calls
    assert calls[-1] == ("close", 1)


# -- interruption --------------------------------------------------------------------------------------------


def interrupt_when(ready: Callable[[], bool], times: int = 1) -> threading.Thread:
    """Send this process SIGINT `times` times, a second apart, once `ready` holds."""

    def wait() -> None:
        deadline = time.monotonic() + 30
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ctrl_c_saves_the_running_cells_and_the_same_command_continues(go: Recorder, fakes: ModuleType) -> None:
    before = signal.getsignal(signal.SIGINT)
    thread = interrupt_when(lambda: len(list(go.folder.glob("cells/*/progress.json"))) == 2)
    outcome = go(fakes.patient)
    thread.join()
    assert outcome == Outcome(0, 6, {}, True)
    assert len(list(go.folder.glob("cells/*/checkpoint"))) == 2
    assert not go.reported
    assert signal.getsignal(signal.SIGINT) is before
    first = {cell.folder for cell in go.cells()[:2]}  # seed 0 of both arms
    assert {path.parent for path in go.folder.glob("cells/*/checkpoint")} == first
    assert go(fakes.finish) == Outcome(6, 6, {}, False)


def test_a_second_ctrl_c_ends_workers_that_do_not_listen(go: Recorder, fakes: ModuleType) -> None:
    thread = interrupt_when(lambda: any(go.folder.glob("cells/*/progress.json")), times=2)
    outcome = go(fakes.deaf)
    thread.join()
    assert outcome.interrupted
    assert not list(go.folder.glob("cells/*/woken"))
    helpers = [int(path.read_text()) for path in go.folder.glob("cells/*/helper")]
    assert helpers
    assert not any(alive(pid) for pid in helpers)
    assert go(fakes.finish).done == 6  # the dead workers' leases are taken over


# -- progress ------------------------------------------------------------------------------------------------


def test_the_total_counts_done_running_and_interrupted_cells(go: Recorder, fakes: ModuleType) -> None:
    amount, (first, second, third, *_) = go.plan.runs[0].budget.amount, go.cells()
    for cell, share in ((second, 0.5), (third, 0.25)):
        cell.folder.mkdir(parents=True)
        fakes.progress(cell.config, cell.folder, share)
    first.folder.mkdir(parents=True)
    fakes.finish(first.config, first.folder, should_stop=lambda: False)
    lease = claim(second.folder)
    assert lease is not None
    total, running = bars(go.cells(), {})
    assert (total.name, total.spent, total.planned) == ("1/6 cells", 1.75 * amount, 6 * amount)
    assert [(bar.name, bar.percent) for bar in running] == [("rloo s0", 50.0)]
    lease.release()


def test_time_left_is_by_the_pace_of_this_invocation() -> None:
    now = [0.0]
    left = TimeLeft(lambda: now[0])
    assert left.seconds(900, 1000) is None  # resumed at 90 %: no pace known yet
    now[0] = 10.0
    assert left.seconds(950, 1000) == pytest.approx(10.0)
    assert left.seconds(1000, 1000) == 0.0


def test_without_a_terminal_a_line_appears_at_most_every_30_seconds(tmp_path: Path) -> None:
    now = [0.0]
    with (tmp_path / "out").open("w+") as file:
        display = Display(Console(file=file, width=200), lambda: now[0])
        with display:
            for second in range(0, 100):
                now[0] = float(second)
                display.update(
                    Bar("1/2 cells", 1000.0 * second, 100_000, "tokens_generated"),
                    [Bar("grpo s0", second, 100, "rollouts")],
                )
        file.seek(0)
        lines = file.read().splitlines()
    assert len(lines) == 4
    assert lines[1] == "1/2 cells: 30k/100k tokens (30 %); 1 min 10 s left; grpo s0 30 %"


def test_a_terminal_shows_bars(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+") as file:
        display = Display(Console(file=file, width=120, force_terminal=True))
        with display:
            display.update(Bar("0/2 cells", 10, 100, "rollouts"), [Bar("grpo s0", 5, 50, "rollouts", "step 3")])
            display.update(Bar("1/2 cells", 50, 100, "rollouts"), [])
            display.note("a note [that] stays")
        file.seek(0)
        text = file.read()
    assert text.index("10/100 rollouts") < text.index(" 5/50 rollouts") < text.index("50/100 rollouts")
    assert "step 3" in text
    assert "a note [that] stays" in text


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999.4, "999"),
        (1000, "1k"),
        (1250, "1.25k"),
        (999_600, "1M"),
        (56e6, "56M"),
        (1091472e15, "1.09Z"),
        (3.14e9, "3.14G"),
    ],
)
def test_amounts_are_short(amount: float, text: str) -> None:
    assert short(amount) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (273_600, "3 d 4 h")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_default_workers_are_no_more_than_the_cores_there_are() -> None:
    assert 1 <= default_workers() <= (os.cpu_count() or 1)


# -- what it would cost --------------------------------------------------------------------------------------


def test_prices_of_finished_cells_carry_over_to_the_missing_ones(go: Recorder, fakes: ModuleType) -> None:
    cells, amount = go.cells(), go.plan.runs[0].budget.amount
    unknown = estimate(cells)
    assert unknown.missing["tokens_generated"] == 6 * amount
    assert "wall_seconds" not in unknown.missing
    cells[0].folder.mkdir(parents=True)
    fakes.finish(cells[0].config, cells[0].folder, should_stop=lambda: False)
    cost = estimate(cells)
    assert (cost.cells, cost.missing_cells) == (6, 5)
    assert cost.missing["wall_seconds"] == pytest.approx(300.0)
    assert cost.missing["rollouts"] == pytest.approx(500.0)
    assert cost.total["flops"] == pytest.approx(60 * amount)
    assert cost.missing["tokens_generated"] == 5 * amount


def test_a_probe_prices_a_study_that_has_never_run(go: Recorder) -> None:
    cost = estimate(go.cells(), lambda config: {"wall_seconds": 2e-3, "rollouts": 0.04})
    assert cost.total["wall_seconds"] == pytest.approx(2e-3 * 6 * go.plan.runs[0].budget.amount)


def test_the_paired_sd_is_that_of_the_differences(go: Recorder, fakes: ModuleType) -> None:
    assert paired_sd(go.cells(), "grpo") is None
    accuracies = {"grpo": [3, 4, 6], "rloo": [5, 4, 9]}
    for cell in go.cells():
        cell.folder.mkdir(parents=True)
        fakes.finish(cell.config, cell.folder, should_stop=lambda: False)
        row = {"final": True, "n": 10, "c": accuracies[cell.config.arm][cell.config.seed]}
        (cell.folder / "evaluation.jsonl").write_text(json.dumps({**row, "final": False, "c": 0}) + "\n")
        with (cell.folder / "evaluation.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    assert paired_sd(go.cells(), "grpo") == pytest.approx(np.std([0.2, 0.0, 0.3], ddof=1))


def test_the_detectable_difference_has_the_power_it_promises() -> None:
    sd, seeds = 0.02, 5
    effect = detectable_difference(seeds, sd)
    power = stats.nct.sf(stats.t.ppf(0.975, seeds - 1), seeds - 1, effect / (sd / math.sqrt(seeds)))
    assert power == pytest.approx(0.8, abs=0.03)
    assert detectable_difference(16, sd) < effect / 2
    assert detectable_difference(1, sd) == math.inf
