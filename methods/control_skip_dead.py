"""No rollouts for prompts that look dead, uniform for the rest (control of arXiv 2602.19208)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from baselines.grpo import GRPO
from benchmark.history import HistoryView
from benchmark.method import Change, Kind, Loss
from methods.allocation import Ints, min_variance_allocation


@dataclass(frozen=True)
class SkipDead(GRPO):
    """No rollouts for prompts that look dead, the same number for all others: is there more to Neyman's rule?

    dead_i: visited, and every remembered outcome right or every one wrong
    n_i = 0 if dead_i, except with probability `revisit`; the others share the budget evenly, at most n_high each

    What is left when all others have n_high goes to the dead ones evenly, and so does everything where all are dead.

    Attributes:
        revisit: probability that a dead prompt is treated as alive in a draw.
        n_high: most rollouts of a prompt; ``None`` is twice the mean. It widens to the mean where it is below.
    """

    family: ClassVar[str] = "dynamo"
    kind: ClassVar[Kind] = "control"
    changes: ClassVar[tuple[Change, ...]] = ("allocation", "loss")
    reference: ClassVar[str] = "2602.19208"
    faithful_to: ClassVar[str] = "control: dead prompts skipped, the rest uniform; equal prompt weights as in dynamo"

    loss: Loss = field(default_factory=lambda: Loss(prompt_weight="equal"))
    revisit: float = 0.1
    n_high: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.revisit <= 1 or (self.n_high is not None and self.n_high < 1):
            raise ValueError(f"revisit = {self.revisit}, n_high = {self.n_high}: a probability and at least 1")

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> Ints:
        """0 for the dead, an even share for the others, (P,) int64."""
        dead = (history.visits > 0) & ((history.successes == 0) | (history.successes == history.trials))
        alive = ~dead | (rng.random(len(history)) < self.revisit)
        mean = budget / len(history)
        n_high = max(2 * mean if self.n_high is None else self.n_high, mean)
        return min_variance_allocation(alive.astype(np.float64), budget, 0, int(np.ceil(n_high)))
