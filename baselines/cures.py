"""CurES: prompts and rollouts by success rate and gradient norms (arXiv 2510.01037).

    P(prompt i is next) ~ exp(sqrt(p_i q_i) / temperature),    q_i = 1 - p_i
    n_i ~ sigma_i,    sigma_i^2 = p q^2 E|G_c|^2 + p^2 q E|G_w|^2 - p^2 q^2 (E|G_c| - E|G_w|)^2

p_i is the mean of a Beta(1 + successes, 1 + failures) posterior over the remembered rollouts and, in the allocation,
the present probe's; no probe enters the history, so earlier ones do not count. G_c and G_w are grad log pi of the
probe's right and wrong rollouts, with respect to the token embedding. Equal ones leave sigma = |G| sqrt(p q): a class
the probe did not show takes the other's. n_i minimises sum sigma_i^2 / n_i in whole numbers. Prompts are drawn without
replacement from `pool` candidates per place.

The temperature was not in the text read. The released sampler's exponent, sqrt(p q) / (100 (alpha + 1)), is at most
.005, uniform to half a per cent: ``temperature = 100`` or more. 0.25 lets p = .5 come 7 times as often as p = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from baselines.grpo import GRPO
from benchmark.history import HistoryView
from benchmark.method import Change, Probe
from methods.allocation import Floats, Ints, min_variance_allocation


def success_rates(history: HistoryView) -> Floats:
    """p_i, (P,)."""
    a, b = history.posterior((1.0, 1.0))
    rates: Floats = (a + history.probe_successes) / (a + b + history.probe_trials)
    return rates


def deviations(history: HistoryView) -> Floats:
    """sigma_i, (P,); 0 where the probe gave no gradient."""
    p = success_rates(history)
    q = 1 - p
    shown = history.probe_norm > 0
    norm, square = (np.where(shown, v, v[:, ::-1]) for v in (history.probe_norm, history.probe_square))
    variance = p * q**2 * square[:, 1] + p**2 * q * square[:, 0] - (p * q * (norm[:, 1] - norm[:, 0])) ** 2
    sigma: Floats = np.sqrt(np.maximum(variance, 0.0))
    return sigma


@dataclass(frozen=True)
class CurES(GRPO):
    """Curriculum by sqrt(p q), allocation by the expected deviation of the gradient.

    Attributes:
        rollouts: of the probe. pool: candidates per place. temperature: of the draw.
    """

    family: ClassVar[str] = "allocation"
    changes: ClassVar[tuple[Change, ...]] = ("allocation", "selection")
    reference: ClassVar[str] = "2510.01037"
    faithful_to: ClassVar[str] = "the paper's equations, a secondary source; temperature and probe are ours"

    rollouts: int = 4
    pool: int = 2
    temperature: float = 0.25

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.pool < 1:
            raise ValueError(f"temperature = {self.temperature}, pool = {self.pool}: above 0, and at least 1")

    @property
    def candidates(self) -> int:
        """Candidates per place."""
        return self.pool

    @property
    def probe(self) -> Probe:
        """Rollouts of the prompts drawn, with gradient norms of the embedding."""
        return Probe(self.rollouts, gradients="embedding")

    def select(self, history: HistoryView, wanted: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """`wanted` candidates, (C,) bool: largest exponent plus Gumbel noise, a draw without replacement."""
        p = success_rates(history)
        key = np.sqrt(p * (1 - p)) / self.temperature + rng.gumbel(size=len(p))
        mask = np.zeros(len(p), dtype=np.bool_)
        mask[np.argsort(-key)[:wanted]] = True
        return mask

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> Ints:
        """n_i, (P,) int64; uniform without a probe."""
        sigma = deviations(history)
        if not sigma.any():
            return super().allocate(history, budget, rng)
        return min_variance_allocation(sigma, budget, 0, budget)
