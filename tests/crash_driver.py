"""Runs a small study in forked children that are killed at chosen moments, and compares what restarts make of it.

A process of its own (``python tests/crash_driver.py POLICY OUT KILLS SEED FIGURES``), so that what it forks has
all modules and no threads. Clocks are replaced by counters and the load of the machine is not read,
so that every file has to come out equal, timings included.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import random
import select
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import analysis.report
from benchmark import checkpoint, clock, result, run
from benchmark.cells import Cell
from benchmark.collect import Collector
from benchmark.compose import Plan, compose_study
from benchmark.evaluation import Evaluator
from benchmark.jsonl import Record, atomic_write_json
from benchmark.progress import Display
from benchmark.source import code_state
from benchmark.study import plan_record, run_single
from benchmark.update import Updater

STUDY = """\
study: crash
question: Does it matter when a run dies?
scale: smoke
task: {task}
arms: [grpo, dapo]
seeds: 1
decision_rule: Look.
overrides:
  policy: {{path: {policy}}}
  task: {{train_items: 24, eval_items_per_family: 6}}
  rollout: {{prompts_per_batch: 8, rollouts_per_prompt: 8, max_tokens: 12}}
  optimiser: {{learning_rate: 0.003, minibatches_per_batch: 2}}
  budget: {{currency: tokens_generated, amount: 2201}}
  evaluation: {{points: 3, samples: 2, final_samples: 4, k: [1]}}
"""
TASK = "task: {name: sums, mix: [{family: chain_sum, num_terms: [2, 2], num_digits: [1, 1]}]}"
PHASES: dict[str, tuple[Any, str]] = {
    "generation": (Collector, "collect"),
    "update": (Updater, "update"),
    "checkpoint write": (checkpoint, "save"),
    "ledger append": (Record, "append"),
    "evaluation": (Evaluator, "evaluate"),
    "table writing": (analysis.report, "write_report"),
}
# These last microseconds to milliseconds, so the child kills itself inside them, between or within system calls.
INSIDE = ("checkpoint write", "ledger append")
CODES = {name: bytes([65 + number]) for number, name in enumerate(PHASES)}
OPERATIONS = ((os, "write"), (os, "fsync"), (Path, "replace"), (Path, "unlink"), (checkpoint, "save_file"))


@dataclass
class Death:
    """Where a child dies: in the `entry`-th visit of a phase, after `delay` seconds or at operation `operation`."""

    phase: str
    entry: int
    delay: float
    operation: int
    half: bool


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def watch(pipe: int, death: Death | None) -> None:
    """Announce every phase on `pipe`, and arm the operations inside the one in which the child is to die."""
    write, entered, inside = os.write, Counter[str](), [False]
    left = itertools.count()

    def announced(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            entered[name] += 1
            write(pipe, CODES[name])
            inside[0] = death is not None and (name, entered[name]) == (death.phase, death.entry)
            try:
                return original(*args, **options)
            finally:
                write(pipe, CODES[name].lower())
                inside[0] = False

        return call

    def fatal(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not inside[0] or death is None or next(left) != death.operation:
                return original(*args, **options)
            if death.half and name == "write":
                original(args[0], bytes(args[1])[: len(args[1]) // 2])
            elif death.half and name == "save_file":
                original(*args, **options)
                os.truncate(args[1], args[1].stat().st_size // 2)
            elif death.half:
                original(*args, **options)
            die()

        return call

    for name, (place, attribute) in PHASES.items():
        setattr(place, attribute, announced(name, getattr(place, attribute)))
    if death is not None and death.phase in INSIDE:
        for place, attribute in OPERATIONS:
            setattr(place, attribute, fatal(attribute, getattr(place, attribute)))


def stop_clocks() -> None:
    """Time becomes a count of questions about it; a checkpoint is due after every step."""
    ticks = itertools.count()
    clock.time = SimpleNamespace(process_time=lambda: float(next(ticks)))  # type: ignore[assignment]
    run.time = result.time = SimpleNamespace(time=lambda: 0.0, monotonic=lambda: 0.0)  # type: ignore[assignment]
    run.machine = SimpleNamespace(usage=lambda _: {})  # type: ignore[assignment]
    run.machine.usage = lambda *_: {}
    run.CHECKPOINT_SECONDS = 0.0


def study(plan: Plan, folder: Path) -> None:
    """What one worker and the parent of a study do."""
    cells = [Cell.of(folder, config) for config in plan.runs]
    atomic_write_json(folder / "plan.json", plan_record(plan, cells))
    for cell in cells:
        run_single(cell.config, cell.folder, display=Display())
    analysis.report.write_report(folder)


def child(plan: Plan, folder: Path, death: Death | None) -> tuple[int, list[tuple[float, str, bool]]]:
    """Run the study in a forked child; its wait status, and when it entered (True) or left each phase."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            with (folder.parent / "log").open("ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            stop_clocks()
            watch(writer, death)
            study(plan, folder)
            if death is None:
                (folder.parent / "modules").write_text("\n".join(sys.modules))
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    os.close(writer)
    moments: list[tuple[float, str, bool]] = []
    names = {code: name for name, code in CODES.items()}
    visits, due = 0, None
    while True:
        ready = select.select([reader], [], [], None if due is None else max(0.0, due - time.monotonic()))[0]
        if not ready:
            os.kill(pid, signal.SIGKILL)
            due = None
            continue
        code = os.read(reader, 1)
        if not code:
            break
        name = names[code.upper()]
        moments.append((time.monotonic(), name, code.isupper()))
        visits += death is not None and name == death.phase and code.isupper()
        if death is not None and death.phase not in INSIDE and visits == death.entry and due is None:
            due = time.monotonic() + death.delay
            visits += 1  # once
    os.close(reader)
    return os.waitpid(pid, 0)[1], moments


def content(folder: Path) -> dict[str, bytes]:
    """Every file of the study but leases, which name processes, and what was logged."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "lease" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "run.log"}


def last_phase(moments: list[tuple[float, str, bool]]) -> str:
    """The innermost phase that was open when the child died."""
    stack: list[str] = []
    for _, name, entered in moments:
        if entered:
            stack.append(name)
        elif name in stack:
            stack.remove(name)
    return stack[-1] if stack else "between phases"


def main(policy: str, out: Path, kills: int, seed: int, figures: bool) -> dict[str, Any]:
    """Kill `kills` children, in studies of up to five deaths; where they died, and which files came out unequal."""
    out.mkdir(parents=True)
    if not figures:  # most of the time
        analysis.report.write_figures = lambda *_: []
    (out / "sums.yaml").write_text(TASK)
    (out / "crash.yaml").write_text(STUDY.format(policy=policy, task=out / "sums.yaml"))
    plan, rng = compose_study(str(out / "crash.yaml"), seeds=1), random.Random(seed)
    code_state()  # once, for all children: the checkout may change while they run
    status, moments = child(plan, out / "whole", None)
    if status:
        raise SystemExit((out / "log").read_text())
    expected = content(out / "whole")
    for module in (out / "modules").read_text().split():
        with contextlib.suppress(ImportError, AttributeError):  # so that no child has to; some are made, not imported
            importlib.import_module(module)
    visits: dict[str, list[float]] = defaultdict(list)
    for name in PHASES:
        times = [moment for moment, phase, _ in moments if phase == name]
        visits[name] = [end - begin for begin, end in zip(times[::2], times[1::2], strict=True)]

    def draw() -> Death:
        phase = rng.choice(list(PHASES))
        number = rng.randrange(len(visits[phase]))
        # A child that has resumed visits a phase less often; early visits are more likely to come at all.
        entry = 1 + rng.randrange(number + 1)
        return Death(phase, entry, rng.uniform(0.0, visits[phase][number]), rng.randrange(6), rng.random() < 0.5)

    where, unequal, failed, studies = Counter[str](), [], [], 0
    while sum(where.values()) < kills:
        studies += 1
        folder, deaths = out / "crashed", 0
        shutil.rmtree(folder, ignore_errors=True)
        while True:
            wanted = draw() if deaths < 5 and sum(where.values()) < kills else None
            status, moments = child(plan, folder, wanted)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                where[last_phase(moments)] += 1
                deaths += 1
            elif status == 0:
                break
            else:
                failed.append((out / "log").read_text()[-2000:])
                break
        found = content(folder)
        names = expected.keys() | found.keys()
        unequal += [f"study {studies}: {name}" for name in sorted(names) if expected.get(name) != found.get(name)]
    files = len(expected)
    return {"kills": dict(where), "studies": studies, "files": files, "unequal": unequal, "failed": failed}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "1")))
