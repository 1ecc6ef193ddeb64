"""The gradient-variance study: train, freeze checkpoints on the way, measure pools, replay every allocator, report.

What is on disk is used again: trained checkpoints by the run's hash, pools by the hash of all that decides them.
Tables, figures and REPORT.md are always made anew from the pools.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from analysis.jobs import Job, Tell, perform
from analysis.variance_replay import most_rollouts
from benchmark.compose import compose_run
from benchmark.config import Count, Counts, Fraction, Model, Name, RunConfig, digest, fault
from benchmark.jsonl import atomic_write_json
from benchmark.progress import Display

SETTINGS = "variance.json"
VERSION = 3  # of what a pool's file holds: raised when its numbers change


class VarianceConfig(Model):
    """What a study measures.

    Attributes:
        scale, task, seed, options: of the runs whose checkpoints are measured, as for `rolloutbench run`.
        arms: trained arms; the first one's reference state of Adam serves the policy before RL, which all share.
        fractions: of the training budget, ascending; 0 is the policy before RL.
        rollouts, blocks: pool of a prompt, and the parts in which it is left out for intervals.
        history: rollouts of the sample that rules read.
        budgets: rollouts per prompt.
    """

    scale: str = "small"
    task: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    options: Annotated[tuple[str, ...], Field(strict=False)] = ()
    arms: Annotated[tuple[Name, ...], Field(strict=False, min_length=1)] = ("grpo", "dynamo")
    fractions: Annotated[tuple[Fraction, ...], Field(strict=False, min_length=1)] = (0.0, 1 / 3, 2 / 3, 1.0)
    rollouts: Count = 256
    blocks: Count = 16
    history: Count = 16
    budgets: Counts = (4, 8, 16, 32)

    @model_validator(mode="after")
    def _scorable(self) -> Self:
        if self.rollouts % (2 * self.blocks) or self.blocks < 4 or self.blocks % 2:
            what = f"{self.blocks} blocks do not cut a pool of {self.rollouts} into two equal halves"
            raise fault(
                "blocks", what, "Choose an even number of at least 4 that divides half the rollouts", "rollouts"
            )
        most, needed = most_rollouts(self.rollouts, self.blocks), -(-3 * max(self.budgets) // 2)
        if most < needed:
            what = f"half a pool of {self.rollouts} scores groups of up to {most}, the budgets allow {needed}"
            raise fault("rollouts", what, "Raise rollouts, or drop the largest budget", "budgets")
        if list(self.fractions) != sorted(set(self.fractions)):
            raise fault("fractions", f"{list(self.fractions)} is not ascending", "List every fraction once, in order")
        return self


@dataclass(frozen=True)
class Point:
    """A checkpoint of the study: an arm at a fraction of its budget, its folder and the file of its pools."""

    config: RunConfig
    fraction: float
    checkpoint: Path
    pools: Path

    @property
    def label(self) -> str:
        """How tables call it."""
        return "before RL" if self.fraction == 0 else f"{self.config.arm}, {100 * self.fraction:.0f} %"


def plan(config: VarianceConfig, out: Path) -> list[Point]:
    """The checkpoints of a study, the policy before RL once and first."""
    from analysis.variance_checkpoints import place

    points = []
    for number, arm in enumerate(config.arms):
        run = compose_run(arm, scale=config.scale, task=config.task, seed=config.seed, options=config.options)
        folder = out / "checkpoints" / f"{arm}-{run.run_hash[:8]}"
        for fraction in config.fractions:
            if fraction == 0 and number:
                continue
            settings = {
                "run": run.run_hash,
                "fraction": fraction,
                **{key: getattr(config, key) for key in ("rollouts", "blocks", "history")},
                "version": VERSION,
            }
            name = f"{arm}-{fraction:.3f}-{digest(settings)[:8]}.npz"
            points.append(Point(run, fraction, place(folder, fraction), out / "pools" / name))
    return sorted(points, key=lambda point: point.fraction > 0)


def run_variance_study(
    config: VarianceConfig, out: Path, *, workers: int = 1, display: Callable[[], Display] = Display
) -> Path:
    """Measure what is missing and write ``REPORT.md``, ``tables/`` and ``figures/`` into `out`; returns the report.

    Raises:
        InputError: a name or value of the configuration is wrong.
    """
    from analysis.variance_checkpoints import is_trained
    from analysis.variance_report import write_variance_report
    from benchmark.warmup import ensure_policy

    points = plan(config, out)
    ensure_policy(points[0].config)
    missing = [point for point in points if not point.pools.exists()]
    arms = {point.config.arm: point for point in missing if not is_trained(point.checkpoint)}
    train = [
        Job(arm, 1.0, _train, (point.config, point.checkpoint.parent, config.fractions)) for arm, point in arms.items()
    ]
    prompts = points[0].config.rollout.prompts_per_batch
    measure = [Job(point.label, float(prompts), _measure, (point, config)) for point in missing]
    with display() as shown:
        perform(train, workers, shown, "training", "runs")
    with display() as shown:  # one that takes its pace anew
        perform(measure, workers, shown, "gradient variance", "prompts")
    atomic_write_json(out / SETTINGS, config.model_dump(mode="json"))
    return write_variance_report(config, points, out)


def _train(config: RunConfig, folder: Path, fractions: Sequence[float], tell: Tell) -> None:
    from analysis.variance_checkpoints import train_checkpoints

    train_checkpoints(config, folder, fractions, tell)


def _measure(point: Point, config: VarianceConfig, tell: Tell) -> None:
    """Measure the pools of one checkpoint and note what it took."""
    from analysis.variance_checkpoints import load_checkpoint
    from analysis.variance_pool import Adam, Bench, measure_pools
    from benchmark.draws import Pool
    from benchmark.policy import prepare_machine
    from benchmark.problems import load_task
    from benchmark.verifier import Verifier

    device, wall, cpu = prepare_machine(), time.perf_counter(), time.process_time()
    policy, moment = load_checkpoint(point.checkpoint, device)
    train, _ = load_task(point.config.task)
    pool = Pool.of(train, policy, config.seed, device)
    prompts = pool.prompts(0, min(point.config.rollout.prompts_per_batch, len(train)))
    optimiser = point.config.optimiser
    adam = Adam(moment, optimiser.betas[1], minibatches=optimiser.minibatches_per_batch)
    with Verifier(answer_form=point.config.task.answer_form) as verifier:
        bench = Bench(policy, point.config.rollout, pool, verifier, prompts, device)
        statistics = measure_pools(
            bench, adam, rollouts=config.rollouts, blocks=config.blocks, history=config.history, progress=tell
        )
    spent = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    atomic_write_json(point.pools.with_suffix(".json"), {"checkpoint": point.label, "device": device.type, **spent})
    statistics.save(point.pools)  # last: it means done
