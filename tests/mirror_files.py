"""Results folders in the suite's format, written by hand, and what an MLflow store says of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from benchmark.config import RunConfig
from benchmark.jsonl import append_rows, atomic_write_json, atomic_write_text

SPEND = {"rollouts": 16, "tokens_generated": 500, "flops": 10**12}


def config(arm: str = "grpo", seed: int = 0, **params: Any) -> dict[str, Any]:
    """A resolved configuration as a run stores it."""
    checked = RunConfig.model_validate(
        {
            "study": "table",
            "arm": arm,
            "seed": seed,
            "scale": "smoke",
            "task": {"name": "sums", "mix": [{"family": "chain_sum"}]},
            "budget": {"amount": 5000},
            "evaluation": {"final_samples": 16, "k": [1, 8]},
            "method": {"name": arm, "params": params},
        }
    )
    return checked.model_dump(mode="json")


def start(folder: Path, resolved: dict[str, Any]) -> None:
    atomic_write_text(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
    set_state(folder, "running")


def set_state(folder: Path, state: str, message: str = "") -> None:
    times = {"started_at": 1000.0, "updated_at": 1060.5}
    atomic_write_json(folder / "progress.json", {"state": state, "message": message, **times})


def step(folder: Path, number: int) -> None:
    cost = {currency: amount * (number + 1) for currency, amount in SPEND.items()}
    metrics = {"train/accuracy_per_prompt_mean": 0.3 + 0.01 * number, "policy/entropy_nats": 1 / (number + 1)}
    metrics["train/tokens_per_rollout_mean"] = 20.0 + number
    append_rows(folder / "metrics.jsonl", [{"step": number, "cost": cost, "metrics": metrics}])
    load = {"cpu_utilization_percentage": 90.0 + number, "process_memory_usage_megabytes": 500.0}
    timing = {"step": number, "seconds": {"decode": 1.5}, "cost": cost, "system": load, "elapsed": 2.0 * (number + 1)}
    append_rows(folder / "timings.jsonl", [timing])


def evaluation_rows(point: int, number: int, final: bool = False) -> list[dict[str, Any]]:
    n = 16 if final else 4
    cost = {currency: amount * number for currency, amount in SPEND.items()}
    head = {"point": point, "step": number, "final": final, "cost": cost}
    items = [("sums", 1), ("sums", 3), ("products", 0)]
    return [
        {**head, "item": f"{family}/{i}", "family": family, "n": n, "c": c, "tokens": 10 * n, "verdicts": {}}
        for i, (family, c) in enumerate(items)
    ]


def finish(folder: Path, steps: int) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_bytes(folder.name.encode())
    append_rows(folder / "evaluation.jsonl", evaluation_rows(1, steps, final=True))
    set_state(folder, "done")
    spent = {currency: amount * steps for currency, amount in SPEND.items()}
    result = {"spent": {**spent, "device_seconds": 12.5}, "seconds": {"decode": 7.5}, "overshoot": 0}
    atomic_write_json(folder / "result.json", result)


def whole_cell(folder: Path, resolved: dict[str, Any], steps: int = 3) -> None:
    start(folder, resolved)
    append_rows(folder / "evaluation.jsonl", evaluation_rows(0, 0))
    for number in range(steps):
        step(folder, number)
    finish(folder, steps)


def plan(study: Path, arms: tuple[str, ...], seeds: tuple[int, ...] = (0,)) -> list[tuple[Path, dict[str, Any]]]:
    cells = [(study / "cells" / f"{arm}-s{seed}", config(arm, seed)) for seed in seeds for arm in arms]
    listed = [{"arm": c["arm"], "seed": c["seed"], "dir": str(folder.relative_to(study))} for folder, c in cells]
    atomic_write_json(
        study / "plan.json",
        {"study": "table", "primary_currency": "tokens_generated", "arms": arms, "cells": listed},
    )
    return cells


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs(uri: str, experiment: str) -> list[Any]:
    found = client(uri).get_experiment_by_name(experiment)
    return [] if found is None else list(client(uri).search_runs([found.experiment_id], max_results=1000))


def parent_and_children(uri: str, experiment: str) -> tuple[Any, dict[str, Any]]:
    found = runs(uri, experiment)
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    children = [run for run in found if run is not parents[0]]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {parents[0].info.run_id}
    named = {run.data.tags["rolloutbench.cell"]: run for run in children}
    assert len(named) == len(children)
    return parents[0], named


def content(uri: str, experiment: str) -> dict[str, Any]:
    """Everything but ids and times: points in order, parameters, status."""
    result: dict[str, Any] = {}
    for name, run in parent_and_children(uri, experiment)[1].items():
        store = client(uri)
        history = {
            key: sorted((metric.step, metric.value) for metric in store.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
        }
        for key, points in history.items():
            doubled = [at for at, count in Counter(at for at, _ in points).items() if count > 1]
            assert not doubled, f"{name} {key}: two points at {doubled}"
        result[name] = (history, run.data.params, run.info.status)
    return result
