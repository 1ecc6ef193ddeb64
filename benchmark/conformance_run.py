"""The checks of `rolloutbench check` that train: a tiny run, its books, and the same run interrupted and resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmark.compose import compose_run
from benchmark.config import RunConfig
from benchmark.conformance import BreachError, Check
from benchmark.jsonl import Row, read_rows
from benchmark.run import Interrupted, run_cell

BUDGET = 6000
TINY = (
    "task.train_items=24",
    "task.eval_items_per_family=2",
    "rollout.prompts_per_batch=8",
    "rollout.rollouts_per_prompt=8",
    "optimiser.minibatches_per_batch=2",
    f"budget.amount={BUDGET}",
    "evaluation.points=2",
    "evaluation.samples=1",
    "evaluation.final_samples=2",
    "evaluation.k=[1]",
)
COMPARED = ("ledger.jsonl", "metrics.jsonl", "evaluation.jsonl", "allocation.jsonl")
STOP_AFTER = 2  # steps


def run_checks(name: str, folder: Path) -> list[Check]:
    """Checks of the arm `name`, whose runs go below `folder`; the later ones read the first one's run."""
    config = compose_run(name, scale="smoke", options=TINY)
    whole, again, cut = (folder / part for part in ("whole", "again", "cut"))
    return [
        ("train", "a tiny run ends at its budget with finite numbers", lambda _: _train(config, whole)),
        ("books", "drawn = trained + filtered + overflow + failed + probed", lambda _: _balance(whole)),
        ("repeat", "the same run again is the same, bit for bit", lambda _: _repeat(config, whole, again)),
        ("resume", "stopped and resumed, it is the same, bit for bit", lambda _: _resume(config, whole, cut)),
    ]


def _train(config: RunConfig, out: Path) -> None:
    run_cell(config, out)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    if result["overshoot"] != 0:
        raise BreachError(f"it ended {result['overshoot']} tokens from its budget of {BUDGET}")
    for row in _rows(out, "metrics.jsonl"):
        odd = [key for key, value in row["metrics"].items() if not math.isfinite(value)]
        if odd:
            raise BreachError(f"step {row['step']}: {odd[0]} is not finite")
    if result["drawn"]["trained"] == 0:
        raise BreachError("no rollout trained: `keep` dropped every group")


def _balance(out: Path) -> None:
    drawn: dict[str, int] = {}
    for row in _rows(out, "ledger.jsonl"):
        if row["fate"] is not None:
            drawn[row["fate"]] = drawn.get(row["fate"], 0) + row["rollouts"]
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    told = {fate: count for fate, count in result["drawn"].items() if count}
    if told != {fate: count for fate, count in drawn.items() if count} or sum(drawn.values()) != _spent(result):
        raise BreachError(f"the ledger has {drawn}, the result {result['drawn']} of {_spent(result)} rollouts")


def _spent(result: dict[str, Any]) -> int:
    return int(result["spent"]["rollouts"])


def _repeat(config: RunConfig, whole: Path, out: Path) -> None:
    torch.manual_seed(20_001)  # whoever draws from the global generator is found out
    run_cell(config, out)
    _compare(whole, out)


def _resume(config: RunConfig, whole: Path, out: Path) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > STOP_AFTER

    try:
        run_cell(config, out, should_stop=stop)
    except Interrupted:
        run_cell(config, out)
    else:
        raise BreachError(f"it was over before step {STOP_AFTER}, too soon to be interrupted")
    _compare(whole, out)


def _compare(one: Path, two: Path) -> None:
    for name in (*COMPARED, Path("policy", "model.safetensors")):
        if (one / name).read_bytes() != (two / name).read_bytes():
            raise BreachError(f"{name} differs: a method may keep no state of its own")


def _rows(out: Path, name: str) -> list[Row]:
    return read_rows(out / name)[0]
