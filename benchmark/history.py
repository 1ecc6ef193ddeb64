"""What the run remembers of every prompt: the only state an allocator reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SHARED = ("batches", "whole")


def _column(kind: type, *width: int) -> Callable[[], NDArray[Any]]:
    """A column without prompts; it becomes one of zeros when their number is known."""
    return lambda: np.zeros((0, *width), dtype=kind)


@dataclass(frozen=True)
class HistoryView:
    """What an allocator sees of the prompts of one batch, in batch order. All arrays are (P,) unless noted.

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
        streak: latest visits in a row whose group was all right or all wrong.
        probe_norm, probe_square: (P, 2) mean gradient norm of the probe's wrong and right rollouts, and mean square of
            it; 0 without such a rollout (``Probe.gradients``).
        probe_alignment: (P, 3) agreement of the prompt's gradient with the trusted set's: inner product, cosine,
            cosine without the noise of the estimate (``Probe.trusted``, `benchmark.probing.alignment`).
        features: (P, E) embedding of the prompt (`Method.features`), E = 0 without it.
        batches: (S, 3) per past step, whatever the prompts of this view: shares of groups all wrong and all right,
            mean over prompts of the success rate.
        whole: the view of every prompt of the pool, or ``None`` in a view made by hand (see `everyone`).
    """

    successes: Floats
    trials: Floats
    visits: Ints
    last_successes: Ints
    last_trials: Ints
    tokens: Floats = field(default_factory=_column(np.float64))
    surprisal: Floats = field(default_factory=_column(np.float64))
    probe_successes: Ints = field(default_factory=_column(np.int64))
    probe_trials: Ints = field(default_factory=_column(np.int64))
    streak: Ints = field(default_factory=_column(np.int64))
    probe_norm: Floats = field(default_factory=_column(np.float64, 2))
    probe_square: Floats = field(default_factory=_column(np.float64, 2))
    probe_alignment: Floats = field(default_factory=_column(np.float64, 3))
    features: Floats = field(default_factory=_column(np.float64, 0))
    batches: Floats = field(default_factory=_column(np.float64, 3))
    whole: HistoryView | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, values in self.columns().items():
            if not len(values):
                object.__setattr__(self, name, np.zeros((len(self), *values.shape[1:]), dtype=values.dtype))

    @classmethod
    def unseen(cls, prompts: int) -> HistoryView:
        """The view of `prompts` prompts that were never in a batch."""
        return PromptHistory(prompts).view(range(prompts))

    def __len__(self) -> int:
        """Number of prompts P."""
        return len(self.trials)

    def columns(self) -> dict[str, NDArray[Any]]:
        """What there is of every prompt, by name; rows are prompts."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in SHARED}

    @property
    def everyone(self) -> HistoryView:
        """The view of every prompt of the pool; this view where there is no other."""
        return self.whole or self

    def select(self, prompts: Ints) -> HistoryView:
        """The rows of the given prompts (numbers within the batch), in that order."""
        rows: dict[str, Any] = {name: values[prompts] for name, values in self.columns().items()}
        return replace(self, **rows)

    @classmethod
    def concatenate(cls, parts: Sequence[HistoryView]) -> HistoryView:
        """The views of several batches as one, in order; at least one part. What prompts share is the last one's."""
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in parts[0].columns()
        }
        return replace(parts[-1], **joined)

    def posterior(self, prior: tuple[float, float]) -> tuple[Floats, Floats]:
        """Beta posterior parameters (a + successes, b + failures) under a Beta(a, b) prior."""
        return prior[0] + self.successes, prior[1] + self.trials - self.successes


@dataclass
class PromptHistory:
    """Successes and trials of `size` prompts, with exponential forgetting.

    Args:
        size: number of prompts in the training pool.
        half_life: visits after which an outcome counts half; ``None`` keeps everything.
        features: (size, E) embedding of every prompt.
    """

    size: int
    half_life: float | None = None
    features: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    counts: Floats = field(init=False)
    batches: Floats = field(init=False)

    def __post_init__(self) -> None:
        # Columns: successes, trials, tokens, surprisal (all discounted), visits, last successes, last trials, streak.
        self.counts = np.zeros((self.size, 8))
        self.batches = np.zeros((0, 3))
        if not len(self.features):
            self.features = np.zeros((self.size, 0))

    def state(self) -> dict[str, Floats]:
        """Everything that changes in a run, for a checkpoint."""
        return {"counts": self.counts, "batches": self.batches}

    def restore(self, state: dict[str, Floats]) -> None:
        """Go on from `state`."""
        self.counts, self.batches = state["counts"], state["batches"]

    def view(self, prompts: Sequence[int]) -> HistoryView:
        """A snapshot of `prompts`; later updates do not reach it."""
        everyone = self._rows(np.arange(self.size))
        chosen = everyone.select(np.asarray(prompts, dtype=np.int64))
        return replace(chosen, whole=everyone)

    def _rows(self, index: Ints) -> HistoryView:
        rows = self.counts[index]
        visits, last_successes, last_trials, streak = rows[:, 4:].astype(np.int64).T
        successes, trials, tokens, surprisal = rows[:, :4].T.copy()
        return HistoryView(
            successes,
            trials,
            visits,
            last_successes,
            last_trials,
            tokens,
            surprisal,
            streak=streak,
            features=self.features[index],
            batches=self.batches,
        )

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
        same = (visit[:, 0] == 0) | (visit[:, 0] == visit[:, 1])
        self.counts[index, :4] = self.counts[index, :4] * keep + visit
        self.counts[index, 4] += 1
        self.counts[index, 5:7] = visit[:, :2]
        self.counts[index, 7] = np.where(same, self.counts[index, 7] + 1, 0)

    def record_step(self, successes: Floats, trials: Floats) -> None:
        """Add one step to `batches`: `successes` (P,) of `trials` (P,) > 0 over the prompts drawn in it, if any."""
        if len(trials):
            rate = successes / trials
            row = [[(rate == 0).mean(), (rate == 1).mean(), rate.mean()]]
            self.batches = np.concatenate([self.batches, row])
