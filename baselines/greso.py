"""GRESO: prompts are skipped in proportion to how long they told nothing (arXiv 2506.02177, released code).

    P(prompt i is drawn) = max(explore^c_i, floor),    c_i: latest visits in a row all right, or all wrong

`explore` is one for easy prompts (all right at the latest visit) and one for hard ones. Both start at 0.5 and follow
the groups that were drawn: after a step in which more than `target` / 3 of them were all right, easy exploration falls
by `change`, otherwise it rises; the same for all wrong with 2 `target` / 3. Bounds 0.05 and 0.95. What is drawn and
still tells nothing is dropped, and more is drawn, as in DAPO. The released code also fits the size of further draws;
here they are what a batch still lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from baselines.grpo import GRPO
from benchmark.groups import Groups
from benchmark.history import HistoryView
from benchmark.method import Change
from methods.allocation import Floats


@dataclass(frozen=True)
class GRESO(GRPO):
    """Pre-rollout skipping of prompts without variance, dynamic sampling after it.

    Attributes:
        start, change, low, high: exploration of a run's first step, how much a step moves it, its bounds.
        floor: least probability of a prompt. target: share of groups without variance that is aimed at.
        filter_groups: drop groups without variance and draw more, at most `max_generation_batches`.
    """

    family: ClassVar[str] = "dynamic sampling"
    changes: ClassVar[tuple[Change, ...]] = ("selection",)
    reference: ClassVar[str] = "2506.02177"
    faithful_to: ClassVar[str] = "the released code's skipping; draws of fixed size, GRPO's loss"

    start: float = 0.5
    change: float = 0.01
    low: float = 0.05
    high: float = 0.95
    floor: float = 0.01
    target: float = 0.25
    filter_groups: bool = True
    max_generation_batches: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1 or not 0 < self.low <= self.start <= self.high <= 1:
            raise ValueError(
                f"floor = {self.floor}, low = {self.low}, start = {self.start}, high = {self.high}: 0 < floor <= 1 and "
                "0 < low <= start <= high <= 1"
            )

    @property
    def max_draws(self) -> int:
        """Generation batches of a step: one where nothing is filtered."""
        return self.max_generation_batches if self.filter_groups else 1

    def explore(self, batches: Floats) -> tuple[float, float]:
        """Exploration of hard and of easy prompts after the steps `batches` (S, 3)."""
        hard = easy = self.start
        for wrong, right, _ in batches:
            hard += self.change if wrong <= 2 * self.target / 3 else -self.change
            easy += self.change if right <= self.target / 3 else -self.change
            hard, easy = (min(max(value, self.low), self.high) for value in (hard, easy))
        return hard, easy

    def chances(self, history: HistoryView) -> Floats:
        """Probability that a prompt is drawn, (C,)."""
        hard, easy = self.explore(history.batches)
        chance: Floats = np.where(history.last_successes > 0, easy, hard) ** history.streak
        return np.maximum(chance, self.floor)

    def select(self, history: HistoryView, wanted: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Independent draws, (C,) bool; the likeliest candidate where none comes out."""
        chance = self.chances(history)
        mask = rng.random(len(chance)) < chance
        if not mask.any():
            mask[chance.argmax()] = True
        return mask

    def keep(self, groups: Groups) -> Tensor:
        """Groups with at least one right and one wrong answer, (P,) bool."""
        return groups.mixed() if self.filter_groups else super().keep(groups)
