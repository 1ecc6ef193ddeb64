"""What the run remembers of every prompt: the only state an allocator reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class HistoryView:
    """What an allocator sees of the prompts of one batch, in batch order. All arrays are (P,).

    Attributes:
        successes: correct rollouts so far, discounted by the decay.
        trials: rollouts so far, discounted by the decay.
        visits: how often the prompt was in a batch, undiscounted.
        last_successes: correct rollouts of the latest visit.
        last_trials: rollouts of the latest visit.
        tokens: generated tokens of those rollouts, discounted by the decay.
        surprisal: their -log pi under the policy that drew them, in nats, summed over tokens and discounted by the
            decay; its expectation is the entropy of the rollouts.
        probe_successes, probe_trials: correct rollouts and rollouts of the probe drawn just now (`Method.probe`),
            0 without one; never part of the counts above.
    """

    successes: Floats
    trials: Floats
    visits: Ints
    last_successes: Ints
    last_trials: Ints
    tokens: Floats = field(default_factory=lambda: np.zeros(0))
    surprisal: Floats = field(default_factory=lambda: np.zeros(0))
    probe_successes: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    probe_trials: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        for column in fields(self):
            if not len(getattr(self, column.name)):
                kind = np.int64 if column.name.startswith("probe") else np.float64
                object.__setattr__(self, column.name, np.zeros(len(self), dtype=kind))

    @classmethod
    def unseen(cls, prompts: int) -> HistoryView:
        """The view of `prompts` prompts that were never in a batch."""
        return PromptHistory(prompts).view(range(prompts))

    def __len__(self) -> int:
        """Number of prompts P."""
        return len(self.trials)

    def select(self, prompts: Ints) -> HistoryView:
        """The rows of the given prompts (numbers within the batch), in that order."""
        return HistoryView(*(getattr(self, column.name)[prompts] for column in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence[HistoryView]) -> HistoryView:
        """The views of several batches as one, in order; at least one part."""
        columns = ([getattr(part, column.name) for part in parts] for column in fields(cls))
        return cls(*map(np.concatenate, columns))

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
        # Columns: successes, trials, tokens, surprisal (all discounted), visits, last successes, last trials.
        self.counts = np.zeros((self.size, 7))

    def view(self, prompts: Sequence[int]) -> HistoryView:
        """A snapshot of `prompts`; later updates do not reach it."""
        rows = self.counts[np.asarray(prompts, dtype=np.int64)]
        visits, last_successes, last_trials = rows[:, 4:].astype(np.int64).T
        successes, trials, tokens, surprisal = rows[:, :4].T.copy()
        return HistoryView(successes, trials, visits, last_successes, last_trials, tokens, surprisal)

    def record(
        self,
        prompts: Sequence[int],
        successes: Floats,
        trials: Floats,
        tokens: Floats | None = None,
        surprisal: Floats | None = None,
    ) -> None:
        """Add one visit: `successes` (P,) of `trials` (P,) for each of the distinct `prompts`; no trial, no visit.

        `tokens` and `surprisal` (P,) are summed over the visit's rollouts; 0 where not given.

        Outcomes of a probe are not recorded: they are known for the draw they were taken for, and an oracle's must
        not become free knowledge about later ones.
        """
        seen = np.asarray(trials) > 0
        index = np.asarray(prompts, dtype=np.int64)[seen]
        keep = 1.0 if self.half_life is None else 0.5 ** (1.0 / self.half_life)
        visit = np.zeros((len(index), 4))
        for column, values in enumerate((successes, trials, tokens, surprisal)):
            if values is not None:
                visit[:, column] = np.asarray(values)[seen]
        self.counts[index, :4] = self.counts[index, :4] * keep + visit
        self.counts[index, 4] += 1
        self.counts[index, 5:] = visit[:, :2]
