"""HORA: rollouts by the expected chance of at least one correct answer (arXiv 2605.07114, from its definition).

    maximise sum_i U_i(n_i),   U(m) = 1 - E[(1 - p)^m] = 1 - prod_{j < m} (b + j) / (a + b + j),   p ~ Beta(a, b)

a = 1 + successes, b = 1 + failures. U is concave in m, so taking rollouts by their gain is optimal. Feeds the hardest
prompts. The text at hand names no bounds: half and one and a half times the mean, as for DynaMO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from baselines.grpo import GRPO
from benchmark.history import HistoryView
from benchmark.method import Change
from methods.allocation import Floats, bounds
from methods.separable import best_gains


def at_least_one(a: Floats, b: Floats, most: int) -> Floats:
    """U(0) .. U(most), (P, most + 1)."""
    j = np.arange(most)
    missed = np.cumprod((b[:, None] + j) / (a[:, None] + b[:, None] + j), axis=1)
    return np.concatenate([np.zeros((len(a), 1)), 1 - missed], axis=1)


@dataclass(frozen=True)
class HORA(GRPO):
    """Allocation by posterior hit utility."""

    family: ClassVar[str] = "allocation"
    changes: ClassVar[tuple[Change, ...]] = ("allocation",)
    reference: ClassVar[str] = "2605.07114"
    faithful_to: ClassVar[str] = "the abstract's definition; bounds are DynaMO's, prompts weigh by n_i"

    n_low: int | None = None
    n_high: int | None = None

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """n_i of largest total utility, (P,) int64."""
        low, high = bounds(len(history), budget, self.n_low, self.n_high)
        gain = np.diff(at_least_one(*history.posterior((1.0, 1.0)), high), axis=1)[:, low:]
        return low + best_gains(gain, budget - low * len(history))
