"""A study from plan to report: write the plan, warm the policy up, let workers run missing cells, report."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from benchmark import registry
from benchmark.cells import Cell, LeaseLostError, RunCell, claim, owner, read_json
from benchmark.compose import Plan
from benchmark.config import ArmConfig, RunConfig, digest
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_json
from benchmark.progress import Bar, Display
from benchmark.reuse import take_over
from benchmark.source import method_changed
from benchmark.workers import Pool, Workers, default_workers

if TYPE_CHECKING:
    from benchmark.run import RunProgress

POLL_SECONDS = 0.5
MIRROR_SECONDS = 15.0
MIRROR_PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Outcome:
    """How an invocation ended.

    Attributes:
        done, total: cells with a result, made now or before, and all cells.
        failed: reason by cell, for cells that failed in this invocation.
        interrupted: the user cut it short.
    """

    done: int
    total: int
    failed: dict[str, str]
    interrupted: bool


@dataclass
class Interrupts:
    """Counts Ctrl-C and SIGTERM instead of raising, inside the ``with``.

    Attributes:
        patience: how many are only counted; what comes after them raises KeyboardInterrupt. None counts all.
    """

    patience: int | None = None
    count: int = 0
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.patience is not None and self.count > self.patience:
            raise KeyboardInterrupt


def changes_of(arm: ArmConfig) -> list[str]:
    """What an arm changes, the main change first: its method's, and the loss where its parameters reach into that."""
    changes = registry.describe(arm.name).changes
    return changes + ["loss"] * ("loss" in arm.params and "loss" not in changes)


def plan_record(plan: Plan, cells: Sequence[Cell]) -> dict[str, Any]:
    """What ``plan.json`` says: the question, what would answer it, and every cell with its folder."""
    study, first = plan.study, plan.runs[0]
    return {
        "study": study.study,
        "question": study.question,
        "claims": [claim.model_dump(mode="json") for claim in study.claims],
        "decision_rule": study.decision_rule,
        "primary_metric": study.primary_metric,
        "primary_currency": study.primary_currency,
        "scale": first.scale,
        "task": first.task.name,
        "families": list(first.task.families),
        "arms": [arm.label for arm in study.arms],
        "changes": {arm.label: changes_of(arm) for arm in study.arms},
        "seeds": list(study.seeds),
        "reference": study.reference,
        "cells": [
            {
                "arm": cell.config.arm,
                "seed": cell.config.seed,
                "run_hash": cell.run_hash,
                "dir": f"cells/{cell.folder.name}",
            }
            for cell in cells
        ],
    }


def run_study(
    plan: Plan,
    folder: Path,
    *,
    workers: int | None = None,
    tracking_uri: str | None = None,
    run: RunCell | None = None,
    pool: Callable[[Sequence[Cell], int, str, Path, RunCell | None], Workers] = Pool,
    prepare: Callable[[RunConfig], object] | None = None,
    report: Callable[[Path], object] | None = None,
    display: Display | None = None,
    reuse: Sequence[Path] = (),
    command: str = "",
) -> Outcome:
    """Run what is missing of `plan` in `folder` and write the report.

    Args:
        plan: the study and its runs, in the order in which to run them.
        folder: ``results/<study>``.
        workers: processes; one per core by default.
        tracking_uri: MLflow store that follows the files; None for no mirror.
        pool: makes the workers from cells, count, invocation, log and `run`.
        run, prepare, report: replace training, warm-up and report (tests).
        display: where progress is shown.
        reuse: results folders of other studies; their finished runs are copied where this study has the same.
        command: what was typed: the report names it beside a failure, since it runs what failed again.

    Raises:
        InputError: a folder holds another run, or one of `reuse` holds no study.
        WorkersFailedError: worker processes cannot start.
    """
    _refuse_launcher()
    display = display or Display()
    cells = [Cell.of(folder, config) for config in plan.runs]
    for cell in cells:
        cell.check()
    taken = take_over(cells, reuse)
    missing = [cell for cell in cells if cell.result() is None]
    record = plan_record(plan, cells) | {"command": command}
    _announce(display, folder, record, len(missing), len(taken))
    _tell_changed(display, folder, cells)
    atomic_write_json(folder / "plan.json", record)
    invocation = uuid.uuid4().hex
    interrupts = Interrupts()
    with mirrored(tracking_uri, folder, plan.study.study, display):
        if missing:
            _warm_up([cell.config for cell in missing], prepare, display)
            count = min(workers or default_workers(), len(missing))
            team = pool(cells, count, invocation, folder / "workers.log", run)
            finished: dict[str, int] = {}
            with interrupts:
                supervise(team, interrupts, display, lambda: bars(cells, finished))
        failed = {cell.folder.name: why for cell in cells if (why := cell.failure(invocation)) is not None}
        done = sum(cell.result() is not None for cell in cells)
        if failed:
            _tell_failures(folder, record, cells, failed, report=not done)
        if done and not interrupts.count:
            replicates = plan.study.gradient_variance_replicates if done == len(cells) else 0
            (report or partial(_write_report, replicates=replicates))(folder)
    return Outcome(done, len(cells), failed, interrupts.count > 0)


def run_single(config: RunConfig, out: Path, *, display: Display | None = None) -> Outcome:
    """Run or resume one configuration in the folder `out`, in this process.

    Raises:
        InputError: `out` holds another run, or another process is running it.
        LeaseLostError: another process took it over meanwhile.
        StorageError: a file cannot be written.
        KeyboardInterrupt: a second Ctrl-C.
    """
    from benchmark import ranks
    from benchmark.run import Interrupted, run_cell

    ranks.start()
    if ranks.rank() > 0:
        return _take_part(config)
    display = display or Display()
    cell = Cell(config, out)
    cell.check()
    if ranks.agree(cell.result() is not None):
        return Outcome(1, 1, {}, False)
    _warm_up([config], None, display)
    lease = claim(out)
    if lease is None:
        holder = owner(out) or {}
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        raise InputError(f"{who} is running it", file=out, remedy="Wait for it, or choose another folder")
    ranks.agree(None)  # the others wait until the policy is there

    def show(at: RunProgress) -> None:
        display.update(Bar(f"{config.arm} seed {config.seed}", at.spent, at.planned, at.currency, at.message))

    def should_stop() -> bool:
        if not lease.held:
            raise LeaseLostError(f"{out} has a new owner, or was deleted; it is left as it is")
        if interrupts.count and not told:
            told.append(True)
            display.note("Stopping after the step at hand; press Ctrl-C again to stop at once")
        return interrupts.count > 0

    told: list[bool] = []
    with lease, Interrupts(patience=1) as interrupts, display:
        try:
            run_cell(config, out, progress=show, should_stop=should_stop, fence=lease.fence)
        except Interrupted:
            return Outcome(0, 1, {}, True)
    return Outcome(1, 1, {}, False)


def _take_part(config: RunConfig) -> Outcome:
    """Another process than the first of a run (`benchmark.ranks`): it works, and what it writes is thrown away."""
    from benchmark import ranks
    from benchmark.run import Interrupted, run_cell

    if ranks.agree(None):
        return Outcome(1, 1, {}, False)
    ranks.agree(None)
    with Interrupts(), tempfile.TemporaryDirectory(prefix="rank-") as folder:
        try:
            run_cell(config, Path(folder))
        except Interrupted:
            return Outcome(0, 1, {}, True)
    return Outcome(1, 1, {}, False)


def bars(cells: Sequence[Cell], done: dict[str, int]) -> tuple[Bar, list[Bar]]:
    """Total and running bars from what the cells' files say; `done` remembers finished cells between calls.

    Args:
        cells: all cells of the study.
        done: spend of finished cells by folder name, extended in place.
    """
    currency, running, spent = cells[0].config.budget.currency, [], 0
    for cell in cells:
        name = cell.folder.name
        if name not in done and cell.result() is not None:
            done[name] = cell.config.budget.amount
        if name in done:
            continue
        progress = read_json(cell.folder / "progress.json")
        if progress is None:
            continue
        spent += progress["spent"]
        if owner(cell.folder) is not None:
            planned, message = cell.config.budget.amount, str(progress.get("message", ""))
            running.append(Bar(f"{cell.config.arm} s{cell.config.seed}", progress["spent"], planned, currency, message))
    total = f"{len(done)}/{len(cells)} cells"
    planned = sum(cell.config.budget.amount for cell in cells)
    return Bar(total, spent + sum(done.values()), planned, currency), running


def supervise(
    pool: Workers, interrupts: Interrupts, display: Display, look: Callable[[], tuple[Bar, list[Bar]]]
) -> None:
    """Let the workers of `pool` run until nothing is left, or until they are told to stop.

    Args:
        look: total and running bars, as they are now.
    """
    told = False
    try:
        with display:
            pool.start()
            while pool.poll():
                display.update(*look())
                if interrupts.count and not told:
                    told = True
                    display.note("Stopping after the step at hand; press Ctrl-C again to stop at once")
                    pool.stop()
                if interrupts.count > 1:
                    return
                time.sleep(POLL_SECONDS)
    finally:
        pool.kill()


def _refuse_launcher() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        remedy = "Start it without a launcher, on every machine that shares the results folder; or launch `run`"
        raise InputError("several processes of a launcher cannot share a study", key="WORLD_SIZE", remedy=remedy)


def _warm_up(configs: Sequence[RunConfig], prepare: Callable[[RunConfig], object] | None, display: Display) -> None:
    """Make each distinct starting policy once, before workers would all make it at the same time."""
    distinct = {digest({"policy": c.policy.model_dump(), "task": c.task.model_dump()}): c for c in configs}
    for config in distinct.values():
        (prepare or warm_up)(config)


def warm_up(config: RunConfig) -> str | Path:
    """Path of the policy before RL, made here behind a progress bar where it is missing.

    Raises:
        InputError: the task has nothing to warm up on, or a file of it is damaged.
    """
    from benchmark.problems import load_task
    from benchmark.warmup import ensure_policy  # torch

    if config.task.train_file is not None:
        load_task(config.task)  # so that a bad line ends the command, not every run of it
    with Display() as display:
        return ensure_policy(
            config, lambda step, steps, loss: display.update(Bar("warm-up", step, steps, "steps", f"loss {loss:.2f}"))
        )


@contextlib.contextmanager
def mirrored(uri: str | None, folder: Path, experiment: str, display: Display) -> Iterator[None]:
    """Let MLflow follow the files from a thread of its own, and catch up at the end."""
    if uri is None:
        yield
        return
    ended = threading.Event()

    def follow() -> None:
        try:
            from benchmark.mirror import Mirror

            mirror = Mirror(uri, folder, experiment)
            while not ended.wait(MIRROR_SECONDS):
                mirror.sync()
            mirror.close()
        # The files are the record; nothing that the mirror meets may stop the study.
        except Exception as error:
            display.note(f"MLflow mirror stopped ({type(error).__name__}: {error}); `rolloutbench mirror` restores it")

    thread = threading.Thread(target=follow, name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(MIRROR_PATIENCE_SECONDS)
        if thread.is_alive():
            display.note(f"MLflow does not answer; later: rolloutbench mirror --rebuild {folder}")


def _write_report(folder: Path, replicates: int = 0) -> None:
    from analysis.report import write_report

    if replicates:
        from analysis.gradient_variance import measure_for_study

        measure_for_study(folder, replicates)
    write_report(folder)


def _tell_failures(
    folder: Path, record: dict[str, Any], cells: Sequence[Cell], failed: dict[str, str], *, report: bool
) -> None:
    """What failed in this invocation, in ``plan.json``, and in a report where nothing is done."""
    failures = [
        {"arm": cell.config.arm, "seed": cell.config.seed, "error": failed[cell.folder.name]}
        for cell in cells
        if cell.folder.name in failed
    ]
    atomic_write_json(folder / "plan.json", {**record, "failures": failures})
    if report:
        from analysis.report import write_failures

        write_failures(folder)


def _tell_changed(display: Display, folder: Path, cells: Sequence[Cell]) -> None:
    """Say which finished runs are of another state of their method's files; an edit may be a comment, so they stay."""
    results = [(cell.config, result) for cell in cells if (result := cell.result()) is not None]
    changed = {run.arm for run, result in results if method_changed(result, registry.load(run.method.name))}
    for arm in sorted(changed):
        again = f"to run them again, remove {folder / 'cells' / arm}-s*"
        display.note(f"{arm}: the method's files changed since its finished runs, which stay; {again}")


def _announce(display: Display, folder: Path, record: dict[str, Any], missing: int, taken: int) -> None:
    before = read_json(folder / "plan.json")
    if before is not None and before.get("scale") != record["scale"]:
        display.note(f"{folder} last held scale {before.get('scale')}: its cells stay, its report is replaced")
    total = len(record["cells"])
    display.note(f"{record['study']}: {total} cells at scale {record['scale']}, {missing} to run, in {folder}")
    if taken:
        from analysis.formatting import counted

        display.note(f"{counted(taken, 'cell')} taken over from other studies")
