"""What the run remembers of every prompt: the only state an allocator reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class HistoryView:
    """Past outcomes of the prompts of one batch, in batch order. All arrays are (P,).

    Attributes:
        successes: correct rollouts so far, discounted by the decay.
        trials: rollouts so far, discounted by the decay.
        visits: how often the prompt was in a batch, undiscounted.
        last_successes: correct rollouts of the latest visit.
        last_trials: rollouts of the latest visit.
    """

    successes: Floats
    trials: Floats
    visits: Ints
    last_successes: Ints
    last_trials: Ints

    def posterior(self, prior: tuple[float, float]) -> tuple[Floats, Floats]:
        """Beta posterior parameters (a + successes, b + failures) under a Beta(a, b) prior."""
        return prior[0] + self.successes, prior[1] + self.trials - self.successes


@dataclass
class PromptHistory:
    """Successes and trials of `size` prompts, with exponential forgetting.

    Args:
        size: number of prompts in the training pool.
        half_life: visits after which an outcome counts half; ``None`` keeps everything.
    """

    size: int
    half_life: float | None = None
    counts: Floats = field(init=False)

    def __post_init__(self) -> None:
        # Columns: discounted successes, discounted trials, visits, last successes, last trials.
        self.counts = np.zeros((self.size, 5))

    def view(self, prompts: Sequence[int]) -> HistoryView:
        """A snapshot of `prompts`; later updates do not reach it."""
        rows = self.counts[np.asarray(prompts, dtype=np.int64)]
        integer = rows[:, 2:].astype(np.int64)
        return HistoryView(rows[:, 0].copy(), rows[:, 1].copy(), integer[:, 0], integer[:, 1], integer[:, 2])

    def record(self, prompts: Sequence[int], successes: Floats, trials: Floats) -> None:
        """Add one visit: `successes` (P,) of `trials` (P,) for each of the distinct `prompts`; no trial, no visit."""
        seen = np.asarray(trials) > 0
        index = np.asarray(prompts, dtype=np.int64)[seen]
        keep = 1.0 if self.half_life is None else 0.5 ** (1.0 / self.half_life)
        self.counts[index, :2] *= keep
        self.counts[index, 0] += successes[seen]
        self.counts[index, 1] += trials[seen]
        self.counts[index, 2] += 1
        self.counts[index, 3] = successes[seen]
        self.counts[index, 4] = trials[seen]
