"""SAGE as a prompt curriculum: a port of an idea, not the method (arXiv 2602.01207 selects preference pairs for DPO).

    score_i = signal_i / (noise_i curvature_i) = E[sqrt(p_i (1 - p_i))] / H_i

The abstract ranks pairs inside refreshable pools by a score after the Newton decrement, which keeps confident errors
and drops unstable pairs; its formula was not in the text read. The port reads "signal / (noise x curvature)" off what a
run knows of a prompt for nothing: the signal of a group is its outcome's variance p (1 - p), the noise the standard
deviation sqrt(p (1 - p)), and the curvature of log pi, its Fisher information, grows with the entropy H_i of a rollout,
estimated by -log pi of what was sampled. So prompts with both outcomes come first, of those the ones on which the
policy is certain. p has a Beta(1, 1) posterior; H is shrunk towards the candidates by `strength` rollouts.

Of `pool` candidates per place the best are drawn, but for the share `refresh`, drawn at random from the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from baselines.grpo import GRPO
from benchmark.history import HistoryView
from benchmark.method import Change
from methods.allocation import Floats
from methods.gradient_allocation import shrunk_mean
from methods.neyman import expected_deviation


@dataclass(frozen=True)
class SAGE(GRPO):
    """Prompts by signal over noise times curvature.

    Attributes:
        pool: candidates per place. refresh: share of a batch drawn at random. strength: see above.
        memory: visits after which an outcome counts half.
    """

    family: ClassVar[str] = "selection"
    changes: ClassVar[tuple[Change, ...]] = ("selection",)
    reference: ClassVar[str] = "2602.01207"
    faithful_to: ClassVar[str] = "a port of the abstract's idea to prompts; the formula is ours"

    pool: int = 2
    refresh: float = 0.25
    strength: float = 4.0
    memory: float | None = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.refresh <= 1 or self.pool < 1 or self.strength < 0:
            raise ValueError(
                f"refresh = {self.refresh}, pool = {self.pool}, strength = {self.strength}: a share, at least 1, not "
                "negative"
            )

    @property
    def candidates(self) -> int:
        """Candidates per place."""
        return self.pool

    @property
    def half_life(self) -> float | None:
        """Visits after which an outcome counts half: the policy moves."""
        return self.memory

    def scores(self, history: HistoryView) -> Floats:
        """score_i, (C,)."""
        entropy = shrunk_mean(history.surprisal, history.trials, self.strength)
        score: Floats = expected_deviation(*history.posterior((1.0, 1.0))) / np.maximum(entropy, 1e-6)
        return score

    def select(self, history: HistoryView, wanted: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """`wanted` candidates, (C,) bool."""
        best = wanted - round(self.refresh * wanted)
        order = np.argsort(-self.scores(history), kind="stable")
        mask = np.zeros(len(order), dtype=np.bool_)
        mask[order[:best]] = True
        mask[rng.permutation(order[best:])[: wanted - best]] = True
        return mask
