"""The schema of a sweep file: the arms, what is searched in each, and how the outcome is judged.

Every arm gets the same number of trials, on the same training seeds and at the same budget. What the arms share (a
learning rate, say) is searched in all of them alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import Field, model_validator

from benchmark.config import ArmConfig, Count, Fraction, Metric, Model, Name, digest, fault

Number = Annotated[float, Field(allow_inf_nan=False)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]
Goal = Metric | Literal["gradient_variance"]
TUNABLE = ("method", "optimiser", "rollout")
"""Sections of a run that a sweep may search; an arm of its own accord only ``method``."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


class _RangeSpace(Model):
    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.low >= self.high:
            raise fault("low", f"is not below high = {self.high}", "Let low < high", "high")
        if self.log and self.low <= 0:
            raise fault("low", "a logarithmic range cannot reach 0", "Raise low above 0, or drop log", "log")
        return self

    @property
    def probes(self) -> tuple[Any, ...]:
        """Points to try the schema with."""
        return self.low, self.high

    def value(self, point: Any) -> Any:
        """What the configuration gets for a point."""
        return point

    def point(self, value: Any) -> Any:
        """The point of a value of the configuration, None if there is none."""
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None


class FloatSpace(_RangeSpace):
    """Real numbers in [low, high], evenly or evenly in the logarithm.

    `default` is the point that stands for the default setting where that is no number of the range (``null`` for
    "derived from the batch", say); the first trial runs the default setting itself.
    """

    type: Literal["float"]
    low: Number
    high: Number
    default: Number | None = None

    @property
    def distribution(self) -> BaseDistribution:
        """For Optuna."""
        return FloatDistribution(self.low, self.high, log=self.log)


class IntSpace(_RangeSpace):
    """Whole numbers in [low, high]; otherwise as `FloatSpace`."""

    type: Literal["int"]
    low: int
    high: int
    default: int | None = None

    @property
    def distribution(self) -> BaseDistribution:
        """For Optuna."""
        return IntDistribution(self.low, self.high, log=self.log)


class CategoricalSpace(Model):
    """One of some values: a list of scalars, or label: value where values are lists or mappings."""

    type: Literal["categorical"]
    choices: Annotated[tuple[bool | int | float | str | None, ...], Field(strict=False, min_length=2)] | dict[str, Any]
    default: bool | int | float | str | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        points = [repr(point) for point in self.points]
        if len(points) < 2 or len(set(points)) < len(points):
            raise fault("choices", "fewer than two different choices", "List each once, or drop the parameter")
        return self

    @property
    def points(self) -> tuple[bool | int | float | str | None, ...]:
        """What Optuna chooses from."""
        return tuple(self.choices)

    @property
    def distribution(self) -> BaseDistribution:
        """For Optuna."""
        return CategoricalDistribution(self.points)

    @property
    def probes(self) -> tuple[Any, ...]:
        """Points to try the schema with."""
        return self.points

    def value(self, point: Any) -> Any:
        """What the configuration gets for a point."""
        return self.choices[point] if isinstance(self.choices, dict) else point

    def point(self, value: Any) -> Any:
        """The point of a value of the configuration, None if there is none."""
        plain = list(value) if isinstance(value, tuple) else value
        return next((point for point in self.points if self.value(point) == plain), None)


Space = dict[str, Annotated[FloatSpace | IntSpace | CategoricalSpace, Field(discriminator="type")]]


class SweepArm(ArmConfig):
    """An arm of the table and what is searched in it alone, by dotted path below ``method``."""

    space: Space = Field(default_factory=dict)


class Finalists(Model):
    """The best settings of each arm, run again on seeds that no trial has seen.

    Attributes:
        count: how many settings an arm sends, besides its default.
        seeds: fresh seeds. budget_fraction: share of the scale's budget; the trials' by default.
    """

    count: Count = 1
    seeds: Seeds
    budget_fraction: Annotated[float, Field(gt=0, le=1)] | None = None


class SweepConfig(Model):
    """A sweep: which settings of each arm are tried, on what, and what is reported of the best.

    Attributes:
        trials: of every arm; the first is its default setting.
        seeds: training seeds of every trial; the objective is the mean over them.
        objective: one metric to raise, or that and ``gradient_variance`` to lower.
        variance_replicates: replicates of the estimator behind ``gradient_variance``.
        budget_fraction: share of the scale's budget that a trial may spend.
        sampler: tree-structured Parzen estimator, Gaussian process, or random search.
        pruner: ends trials that look bad; they are never finalists. ``wilcoxon``: after each seed, worse than the best
            trial on the same seeds. ``median``: at the evaluations of the first seed's run, each a share of its budget,
            below the median of the trials before. A sweep whose figures are published should have none.
        prune_below: p-value of ``wilcoxon``.
        reference: the arm that all others are compared with.
        overrides: what the sweep changes of the scale in every run, as in a study.
        evaluation: what it changes of ``evaluation`` in trials only; finalists are evaluated as the scale says.
        space: searched in every arm alike, by dotted path.
        arms: with the space that is theirs alone; ``best.yaml`` is the first one's.
    """

    sweep: Name
    question: str = ""
    scale: str = "small"
    task: str | None = None
    trials: Annotated[int, Field(ge=2)] = 32
    seeds: Seeds
    finalists: Finalists
    objective: Annotated[tuple[Goal, ...], Field(strict=False, min_length=1, max_length=2)] = ("pass_at_1",)
    variance_replicates: Annotated[int, Field(ge=4)] = 16
    budget_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    sampler: Literal["tpe", "gp", "random"] = "tpe"
    sampler_seed: Annotated[int, Field(ge=0)] = 0
    pruner: Literal["none", "wilcoxon", "median"] = "none"
    prune_below: Fraction = 0.1
    reference: Name
    overrides: dict[str, Any] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)
    space: Space = Field(default_factory=dict)
    arms: Annotated[tuple[SweepArm, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _known(self) -> Self:
        labels = [arm.label for arm in self.arms]
        if len(set(labels)) < len(labels):
            raise fault("arms", "two arms have the same label", "Give each its own label")
        if self.reference not in labels:
            raise fault("reference", f"{self.reference} is not an arm of this sweep", "Add it to arms")
        for key, seeds in (("seeds", self.seeds), ("finalists.seeds", self.finalists.seeds)):
            if len(set(seeds)) < len(seeds):
                raise fault(key, "a seed is listed twice", "List each seed once")
        if seen := sorted(set(self.seeds) & set(self.finalists.seeds)):
            what = f"seed {seen[0]} also tunes: the finalists' figures would be those they were picked for"
            raise fault("finalists.seeds", what, "Use seeds that are not in seeds", "seeds")
        if self.objective[0] == "gradient_variance" or self.objective[1:] not in ((), ("gradient_variance",)):
            raise fault("objective", "not an objective", "Write [pass_at_1] or [pass_at_1, gradient_variance]")
        if self.pruner != "none" and len(self.objective) > 1:
            raise fault("pruner", "trials are pruned by one objective", "Name one, or write pruner: none", "objective")
        if self.pruner == "wilcoxon" and len(self.seeds) < 3:
            raise fault("pruner", "the Wilcoxon test needs at least three seeds", "Add seeds, or write pruner: median")
        self._check_space()
        return self

    def _check_space(self) -> None:
        for key in self.space:
            if key.partition(".")[0] not in TUNABLE:
                what = f"a sweep searches only {', '.join(TUNABLE)}: anything else would change the question"
                raise fault(f"space.{key}", what, "Drop it, or set it in overrides")
        for place, arm in enumerate(self.arms):
            for key in arm.space:
                if not key.startswith("method."):
                    what = "an arm's own space may only touch method: it would not be comparable"
                    raise fault(f"arms.{place}.space.{key}", what, "Move it to the space of all arms")
                if key in self.space:
                    raise fault(f"arms.{place}.space.{key}", "is searched in all arms", "Keep one of the two", key)
            if not self.space and not arm.space:
                what = f"nothing is searched in {arm.label}, so it would not be tuned"
                raise fault(f"arms.{place}", what, "Give it a space, or one to all arms")

    def arm(self, label: str) -> SweepArm:
        """The arm of that label."""
        return next(arm for arm in self.arms if arm.label == label)

    def spaces(self, label: str) -> Mapping[str, FloatSpace | IntSpace | CategoricalSpace]:
        """What is searched in an arm, by dotted path: what all share, then its own."""
        return {**self.space, **self.arm(label).space}

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Optuna's, one for each objective."""
        return ["minimize" if goal == "gradient_variance" else "maximize" for goal in self.objective]

    @property
    def search_hash(self) -> str:
        """Identity of the search: of all but the number of trials, the finalists and the question."""
        return digest(self.model_dump(mode="json", exclude={"trials", "finalists", "question"}))


def sweep_folder(config: SweepConfig) -> Path:
    """Where a sweep's results go unless the command says otherwise."""
    return Path("results") / "sweeps" / config.sweep
