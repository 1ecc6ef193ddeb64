"""Forgetting when the prompts change, and an EMA of the weights against it.

A policy is trained on one family of problems, then on another; both are evaluated before, between and after. Beside the
policy, an exponential mean of its weights is kept through the second phase, a step of it after every training step:

    ema <- decay ema + (1 - decay) weights,    ema = the weights at the beginning of the phase

The EMA is not trained on: it is a second candidate at no cost in rollouts. It must be judged on both families, since
standing still forgets nothing. `rolloutbench experiment forgetting` does this with several seeds.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from analysis.experiment import Experiment, Measured
from analysis.formatting import counted, exact, points
from analysis.jobs import Tell
from analysis.tables import Column, Table, Text
from benchmark.compose import compose_run
from benchmark.config import Count, Fraction, Name, RunConfig
from benchmark.errors import InputError
from benchmark.layers import did_you_mean
from benchmark.run import Run
from benchmark.warmup import ensure_policy

Row = tuple[str, str, float]
"""When, family, pass@1."""


@dataclass
class Mean:
    """The exponential mean of some weights, bias included: it starts at `weights`."""

    weights: dict[str, Tensor]
    decay: float

    def update(self, now: dict[str, Tensor]) -> None:
        """One step of the mean."""
        for name, value in self.weights.items():
            value.lerp_(now[name].detach(), 1 - self.decay)


@contextmanager
def in_place(run: Run, weights: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the run's policy has other weights."""
    own = {name: value.detach().clone() for name, value in run.policy.parameters().items()}
    _put(run, weights)
    try:
        yield
    finally:
        _put(run, own)


@torch.no_grad()
def _put(run: Run, weights: dict[str, Tensor]) -> None:
    for name, parameter in run.policy.parameters().items():
        parameter.copy_(weights[name])


@dataclass
class Probe:
    """Two phases of training and what is seen between them.

    Attributes:
        config: a run whose task mixes both families; only its share of training items changes.
        decays: of the EMAs, a step. samples: of an evaluation, a problem.
        tell: takes generated tokens, evaluations left out.
        rows: moment, family, pass@1. spent: by currency, both phases and the evaluations.
        trained: generated tokens of the phases so far.
    """

    config: RunConfig
    decays: Sequence[float]
    samples: int = 16
    tell: Tell = lambda _: None
    rows: list[Row] = field(default_factory=list)
    spent: dict[str, int] = field(default_factory=lambda: {"rollouts": 0, "tokens_generated": 0})
    trained: int = 0

    def run(self, first: str, second: str) -> list[Row]:
        """Train on `first`, then on `second`, each for the whole budget; every family is evaluated at each moment.

        Raises:
            InputError: the task has no such family.
        """
        for key, family in (("first", first), ("second", second)):
            if family not in (known := self.config.task.families):
                raise InputError("no family of the task", key=key, value=family, remedy=did_you_mean(family, known))
        start = ensure_policy(self.config)  # of the mix: one family alone would be warmed up for itself
        with tempfile.TemporaryDirectory() as folder:
            one, two = Path(folder) / "first", Path(folder) / "second"
            with _opened(only(self.config, first, start), one) as run:
                self._look(run, "before")
                self._train(run, [])
                self._look(run, f"after {first}")
                run.policy.save(one / "policy")
            with _opened(only(self.config, second, one / "policy"), two) as run:
                weights = run.policy.parameters().items()
                means = [Mean({name: value.detach().clone() for name, value in weights}, d) for d in self.decays]
                self._train(run, means)
                self._look(run, f"then {second}")
                for mean in means:
                    with in_place(run, mean.weights):
                        self._look(run, f"then {second}, EMA {mean.decay:g}")
        return self.rows

    def _look(self, run: Run, moment: str) -> None:
        rows, spent = run.evaluator.evaluate(self.samples)
        self._charge(spent)
        for family in sorted({str(row["family"]) for row in rows}):
            right = [row["c"] / row["n"] for row in rows if row["family"] == family]
            self.rows.append((moment, family, float(np.mean(right))))

    def _train(self, run: Run, means: Sequence[Mean]) -> None:
        while run.collector.remaining > 0:
            run.step_once()
            for mean in means:
                mean.update(run.policy.parameters())
            self.tell(self.trained + run.ledger.spent["tokens_generated"])
        self.trained += run.ledger.spent["tokens_generated"]
        self._charge(run.ledger.spent)

    def _charge(self, spent: Mapping[str, int]) -> None:
        for currency in self.spent:
            self.spent[currency] += spent[currency]


def only(config: RunConfig, family: str, path: str | Path) -> RunConfig:
    """The same run from the policy at `path`, all training items of one family; evaluation stays on all of them."""
    mix = tuple(part.model_copy(update={"weight": 1.0 if part.name == family else 1e-9}) for part in config.task.mix)
    task = config.task.model_copy(update={"mix": mix})
    policy = config.policy.model_copy(update={"path": str(path)})
    return config.model_copy(update={"task": task, "policy": policy})


@contextmanager
def _opened(config: RunConfig, out: Path) -> Iterator[Run]:
    out.mkdir(parents=True)
    run = Run(config, out, lambda _: None)
    with run.verifier, contextlib.closing(run.backend), contextlib.closing(run):
        yield run


class Forgetting(Experiment):
    """Forgetting by family, over seeds.

    Attributes:
        scale, options, arm: of the run that each phase is, as for `rolloutbench run`.
        first, second: families of the task. tokens: generated tokens of a phase.
        decays: of the EMAs. samples: of an evaluation, a problem.
    """

    scale: str = "small"
    options: Annotated[tuple[str, ...], Field(strict=False)] = ()
    arm: Name = "grpo"
    first: Name
    second: Name
    tokens: Count
    decays: Annotated[tuple[Fraction, ...], Field(strict=False)]
    samples: Count = 16
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]

    unit: ClassVar[str] = "tokens"
    says_only: ClassVar[frozenset[str]] = Experiment.says_only | {"seeds"}

    def parts(self) -> dict[str, float]:
        """The seeds."""
        return {f"seed_{seed}": 2.0 * self.tokens for seed in self.seeds}

    def measure(self, part: str, tell: Tell) -> Measured:
        """A row a moment and family."""
        seed, budget = int(part.removeprefix("seed_")), f"budget.amount={self.tokens}"
        config = compose_run(self.arm, scale=self.scale, seed=seed, options=[budget, *self.options])
        probe = Probe(config, self.decays, self.samples, tell)
        names = ("moment", "family", "pass_at_1")
        rows = [dict(zip(names, row, strict=True)) for row in probe.run(self.first, self.second)]
        return Measured(rows, probe.spent)

    def tables(self, rows: pd.DataFrame) -> list[Table]:
        """pass@1 of every family at each moment: mean, smallest and largest over the seeds."""
        found = self._found(rows)
        families = [self.first, self.second, *sorted(set(rows["family"]) - {self.first, self.second})]
        own = {(row.moment, row.family): row for row in found.itertuples()}
        roles = {self.first: " (first)", self.second: " (second)"}
        return [
            Table(
                "forgetting",
                f"pass@1 in percent by family, mean over {counted(len(self.seeds), 'seed')} (smallest to largest)",
                [Column("moment", left=True), *(Column(family + roles.get(family, "")) for family in families)],
                [
                    [Text(moment), *(Text(_spread(own[moment, family])) for family in families)]
                    for moment in dict.fromkeys(found["moment"])
                ],
                found,
                [f"{exact(self.tokens)} generated tokens a phase, {self.samples} samples a problem."],
            )
        ]

    def findings(self, rows: pd.DataFrame) -> list[str]:
        """What the second phase cost the first family and gave the second, for the policy and every EMA."""
        moments = list(dict.fromkeys(rows["moment"]))
        by_seed = rows.pivot(index="part", columns=["moment", "family"], values="pass_at_1")
        lines = []
        for moment in moments[2:]:
            changes = [
                f"{points(change.mean(), sign=True)} ({points(change.min(), sign=True)} to "
                f"{points(change.max(), sign=True)}) on {family}"
                for family in (self.first, self.second)
                for change in [by_seed[moment, family] - by_seed[moments[1], family]]
            ]
            lines.append(f"{moment}, against {moments[1]}: {', '.join(changes)}, in points of pass@1.")
        return [*lines, f"{counted(len(self.seeds), 'seed')}, no test: a probe."]

    def _found(self, rows: pd.DataFrame) -> pd.DataFrame:
        grouped = rows.groupby(["moment", "family"], sort=False)["pass_at_1"]
        return grouped.agg(["mean", "min", "max"]).reset_index()


def _spread(row: Any) -> str:
    return f"{points(row.mean)} ({points(row.min)} to {points(row.max)})"
