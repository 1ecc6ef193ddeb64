"""A made-up results folder in the suite's format, with true effects that are known."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ARMS = {
    "grpo": 0.0,
    "dr_grpo": 0.005,
    "rloo": -0.005,
    "dapo": 0.03,
    "clip_higher": 0.02,
    "entropy_loss": -0.02,
    "fork_tokens": 0.01,
    "entropy_advantage": 0.0,
    "clip_cov": 0.015,
    "kl_cov": -0.01,
    "w_reinforce": -0.06,
    "dynamo": 0.08,
    "dynamo_allocation": 0.05,
    "dynamo_modulation": 0.02,
}
"""The true difference of each arm's pass@1 to grpo."""

PHASES = {"decode": 17.0, "verify": 4.0, "forward": 9.0, "backward": 14.0, "optimiser": 5.0, "other": 2.0}


@dataclass
class Recipe:
    """What to make; the same recipe gives the same bytes.

    The chance of solving item i after training with seed s is ``base_i + effect + seed noise + item noise``;
    all arms share base, item noise and the random numbers behind the samples, as paired runs do.
    """

    arms: Mapping[str, float] = field(default_factory=lambda: dict(ARMS))
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    families: Sequence[str] = ("sum_short", "sum_long", "products")
    items: int = 64
    points: int = 8
    samples: int = 4
    final_samples: int = 64
    budget: int = 800_000
    steps: int = 40
    seed_sd: float = 0.01
    item_sd: float = 0.05
    speed: Mapping[str, float] = field(default_factory=dict)
    slowness: Mapping[str, float] = field(default_factory=dict)  # factor on the device seconds of an arm
    dynamic: Sequence[str] = ("dynamo", "dynamo_allocation")
    unfinished: Mapping[tuple[str, int], str] = field(default_factory=dict)
    claims: Sequence[Mapping[str, Any]] = ()
    traced: Sequence[str] = ()  # problem texts to keep traces of
    seed: int = 0


def make_study(folder: Path, recipe: Recipe | None = None) -> Path:
    """Write a study's results into `folder` and return it.

    ``recipe.unfinished`` names cells that did not end well: state by (arm, seed), ``missing`` for no folder.
    """
    recipe = recipe or Recipe()
    rng = np.random.default_rng(recipe.seed)
    base = rng.beta(0.9, 0.7, size=(len(recipe.families), recipe.items)).clip(0.01, 0.97)
    cells = []
    for arm in recipe.arms:
        for seed in recipe.seeds:
            name = re.sub(r"[^\w.-]", "_", f"{arm}-s{seed}-0123abcd")
            cells.append({"arm": arm, "seed": seed, "run_hash": f"{arm}{seed}", "dir": f"cells/{name}"})
            state = recipe.unfinished.get((arm, seed), "done")
            if state == "missing":
                continue
            _write_cell(folder / "cells" / name, recipe, arm, seed, base, state)
    plan = {
        "study": "made_up",
        "question": "Does the report find what was put in?",
        "claims": list(recipe.claims),
        "decision_rule": "",
        "primary_metric": "pass_at_1",
        "primary_currency": "tokens_generated",
        "scale": "small",
        "arms": list(recipe.arms),
        "seeds": list(recipe.seeds),
        "reference": "grpo",
        "families": list(recipe.families),
        "cells": cells,
    }
    _write(folder / "plan.json", [plan])
    return folder


def _write_cell(cell: Path, recipe: Recipe, arm: str, seed: int, base: Floats, state: str) -> None:
    cell.mkdir(parents=True)
    progress = {"state": state, "currency": "tokens_generated", "planned": recipe.budget, "message": "boom"}
    _write(cell / "progress.json", [progress])
    if state != "done":
        return
    (cell / "config.yaml").write_text("evaluation:\n  k: [1, 8, 32]\n")
    # Streams are keyed on what arms share, so that arms differ by their effect and by their own seed noise
    # alone.
    own = np.random.default_rng([recipe.seed, seed, *arm.encode()])
    total = recipe.arms[arm] + recipe.seed_sd * own.standard_normal()
    gain = base * (1 - base)
    gain /= gain.mean(axis=1, keepdims=True)
    shift = gain * (total + recipe.item_sd * own.standard_normal(base.shape))
    speed = recipe.speed.get(arm, 1.0)
    rows: list[dict[str, Any]] = []
    for point in range(recipe.points):
        final = point == recipe.points - 1
        cost = recipe.budget if final else point * recipe.budget // (recipe.points - 1) + (137 if point else 0)
        learned = (1 - math.exp(-3 * speed * cost / recipe.budget)) / (1 - math.exp(-3))
        chance = np.clip(0.5 * base * (1 - learned) + (base + shift) * learned, 0, 1)
        rows += _evaluation(recipe, seed, point, cost, chance, final)
    _write(cell / "evaluation.jsonl", rows)
    _write_training(cell, recipe, arm, own)
    if recipe.traced:
        _write(cell / "traces.jsonl", _traces(recipe, own))
    _write(cell / "result.json", [_result(recipe, arm, seed)])


def _evaluation(recipe: Recipe, seed: int, point: int, cost: int, chance: Floats, final: bool) -> list[dict[str, Any]]:
    n = recipe.final_samples if final else recipe.samples
    shared = np.random.default_rng([recipe.seed, seed, 7]).random((*chance.shape, recipe.final_samples))
    correct = (shared[..., :n] < chance[..., None]).sum(axis=-1)
    head = {"point": point, "step": _step_at(recipe, cost), "final": final, "cost": _cost(cost)}
    return [
        head
        | {"item": f"{family}/{i}", "family": family, "n": n, "c": int(correct[f, i]), "tokens": 30 * n}
        | {"verdicts": {"correct": int(correct[f, i]), "wrong": int(n - correct[f, i])}}
        for f, family in enumerate(recipe.families)
        for i in range(recipe.items)
    ]


def _step_at(recipe: Recipe, cost: int) -> int:
    return math.ceil(recipe.steps * cost / recipe.budget)


def _cost(tokens: int) -> dict[str, int]:
    return {
        "rollouts": tokens // 30,
        "prompt_tokens": tokens // 20,
        "tokens_generated": tokens,
        "tokens_scored": 0,
        "tokens_backpropagated": tokens,
        "flops": 2_540_000 * tokens,
    }


def seconds_of(recipe: Recipe, arm: str) -> dict[str, float]:
    """Device seconds of a run by phase."""
    return {phase: recipe.slowness.get(arm, 1.0) * total for phase, total in PHASES.items()}


def _write_training(cell: Path, recipe: Recipe, arm: str, own: np.random.Generator) -> None:
    metrics, timings, allocation = [], [], []
    slope = np.random.default_rng([*arm.encode()]).uniform(-0.3, 1.5)  # entropy falls in most arms, and grows in some
    for step in range(recipe.steps):
        done = (step + 1) / recipe.steps
        values = {
            "policy/entropy_nats": 0.35 * math.exp(-slope * done) + 0.02 * own.random(),
            "optim/gradient_norm": 0.4 * math.exp(-0.5 * slope * done) * (1 + 0.3 * own.random()),
        }
        metrics.append({"step": step, "cost": _cost(round(recipe.budget * done)), "metrics": values})
        seconds = {phase: total / recipe.steps for phase, total in seconds_of(recipe, arm).items()}
        timings.append({"step": step, "seconds": seconds, "verifier_cpu": seconds["verify"]})
        counts = np.full(64, 8)
        if arm in recipe.dynamic:
            counts = np.clip(own.normal(8, 1 + 4 * done, size=64).round(), 2, 16).astype(np.int64)
        values_of, times = np.unique(counts, return_counts=True)
        histogram = {str(n): int(t) for n, t in zip(values_of, times, strict=True)}
        limits = {"n_min": int(counts.min()), "n_max": int(counts.max())}
        allocation.append({"step": step, **limits, "histogram": histogram})
    _write(cell / "metrics.jsonl", metrics)
    _write(cell / "timings.jsonl", timings)
    _write(cell / "allocation.jsonl", allocation)


def _traces(recipe: Recipe, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Eight made-up answers to every traced problem at three moments; wrong ones spell the problem's text back."""
    rows = []
    for phase, step in (("training", 0), ("training", recipe.steps - 1), ("evaluation", recipe.steps)):
        for number, prompt in enumerate(recipe.traced):
            rollouts = []
            for right in (True, False) * 4:
                tokens = ["4", "2", "\\boxed{", "42", "}", "<end>"] if right else [prompt, "<end>"]
                advantage = 0.935 if right else -0.935
                rollout = {"verdict": "correct" if right else "wrong", "length": len(tokens), "tokens": tokens}
                rollout["log_prob"] = (-rng.random(len(tokens))).round(4).tolist()
                rollout["entropy"] = rng.random(len(tokens)).round(4).tolist()
                if phase == "training":
                    factor = (1 + 0.2 * rng.random(len(tokens))).round(4)
                    rollout |= {"advantage_of_rollout": advantage, "factor": factor.tolist()}
                    rollout["advantage"] = (advantage * factor).round(4).tolist()
                    rollout["ratio"] = np.exp(0.1 * rng.standard_normal(len(tokens))).round(4).tolist()
                rollouts.append(rollout)
            family = recipe.families[number % len(recipe.families)]
            head = {"phase": phase, "step": step, "item": f"{family}/{number}", "family": family}
            rows.append(head | {"prompt": prompt, "answer": "42", "n": 8, "c": 4, "rollouts": rollouts})
    return rows


def _result(recipe: Recipe, arm: str, seed: int) -> dict[str, Any]:
    cost = _cost(recipe.budget)
    filtered = cost["rollouts"] // 4 if arm == "dapo" else 0
    seconds = seconds_of(recipe, arm)
    return {
        "run_hash": f"{arm}{seed}",
        "plan_hash": arm,
        "arm": arm,
        "seed": seed,
        "scale": "small",
        "study": "made_up",
        "planned": {"tokens_generated": recipe.budget},
        "spent": cost | {"device_seconds": sum(seconds.values()), "verifier_seconds": seconds["verify"]},
        "overshoot": 0,
        "steps": recipe.steps,
        "drawn": {
            "trained": cost["rollouts"] - filtered - 3,
            "filtered": filtered,
            "overflow": 0,
            "failed": 3,
        },
        "evaluation_tokens": 1_000_000,
        "seconds": seconds | {"evaluate": 6.0},
        "wall_seconds": 60.0,
        "device": "cpu",
        "versions": {"torch": "2.13.0", "numpy": "2.4.6", "rolloutbench": "0.1.0"},
    }


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    import sys

    make_study(Path(sys.argv[1]))
