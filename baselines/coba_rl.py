"""CoBA-RL: rollouts by a capability-dependent value of difficulty (arXiv 2602.03048).

    maximise sum_i V_i(n_i),   V(n) = (1 - exp(-n p (1 - p) / tau)) Beta(p; a, kappa - a),   n_i in [2, 128]
    a = clip(a_min + slope F'),   F' = F if F > .5 else sigmoid(10 (F - .5)),   F: failure rate

While most answers fail, easy prompts count most; later, hard ones. Gains of V fall geometrically, so taking rollouts by
their gain is optimal. p is the success rate of the prompt's remembered rollouts. F is the moving average, over the
steps so far, of the mean failure rate of a step's prompts: they count the same, whatever number of rollouts they got.

kappa = 11 is published; a_min, slope, tau and the span of the average were not in the text read. Here they are 2, 7 and
1, which moves the mode from .9 to .1, and 4: an exponential average in which a step counts half after four more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from baselines.grpo import GRPO
from benchmark.history import HistoryView
from benchmark.method import Change
from methods.allocation import Floats, bounds
from methods.separable import best_gains


@dataclass(frozen=True)
class CoBARL(GRPO):
    """Allocation by a moving Beta weight over success rates.

    Attributes:
        memory: half-life of the outcomes in p, in visits. span: half-life of the failure rates in F, in steps, > 0.

    Raises:
        ValueError: `span` is not positive.
    """

    family: ClassVar[str] = "allocation"
    changes: ClassVar[tuple[Change, ...]] = ("allocation",)
    reference: ClassVar[str] = "2602.03048"
    faithful_to: ClassVar[str] = (
        "the paper's equations; a_min, slope, tau and the span of F's average are ours, prompts weigh by n_i"
    )

    n_low: int = 2
    n_high: int = 128
    kappa: float = 11.0
    a_min: float = 2.0
    slope: float = 7.0
    tau: float = 1.0
    memory: float = 1.0
    span: float = 4.0

    def __post_init__(self) -> None:
        if not self.span > 0:
            raise ValueError(f"span = {self.span}: above 0")

    @property
    def half_life(self) -> float | None:
        """Visits after which an outcome counts half in p."""
        return self.memory

    def failure(self, batches: Floats) -> float:
        """F in [0, 1] after the steps ``history.batches`` (S, 3), S >= 1."""
        weight = 0.5 ** (np.arange(len(batches))[::-1] / self.span)
        return float(1 - np.average(batches[:, 2], weights=weight))

    def shape(self, failure: float) -> float:
        """a, inside (1, kappa - 1)."""
        moved = failure if failure > 0.5 else 1 / (1 + np.exp(-10 * (failure - 0.5)))
        return float(np.clip(self.a_min + self.slope * moved, 1.0, self.kappa - 1.0))

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """n_i of largest total value, (P,) int64; uniform while a prompt of the batch is new, and in the first step."""
        if (history.visits == 0).any() or not len(history.batches):
            return super().allocate(history, budget, rng)
        low, high = bounds(len(history), budget, self.n_low, self.n_high)
        p = history.successes / history.trials
        a = self.shape(self.failure(history.batches))
        high = min(high, budget)
        reached = 1 - np.exp(-np.arange(low, high + 1) * (p * (1 - p) / self.tau)[:, None])
        gain = np.diff(reached, axis=1) * beta.pdf(p, a, self.kappa - a)[:, None]
        return low + best_gains(gain, budget - low * len(history))
