"""Numbers that must be finite and in range: a run stops at the first that is not, and keeps the batch it came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmark.errors import RunError
from benchmark.head import Head
from benchmark.rollouts import Rollouts
from benchmark.scoring import TokenStatistics

SLACK = 1e-2
"""Nats by which rounding, bfloat16 included, may carry a log-probability above 0 or an entropy out of range."""


Checks = dict[str, Tensor]
"""Boolean tensors, True where a number is good, by what it is."""


@dataclass(frozen=True)
class Minibatch:
    """What one update works on.

    Attributes:
        rollouts: R of them, T tokens. advantage: (R,).
        rollout_log_prob: (T,), as an inexact sampler told it: `rollouts` then has the trainer's; else None.
        sampler: the output layer that sampled, where the method needs it.
        step: of training. max_tokens: limit of a rollout.
    """

    rollouts: Rollouts
    advantage: Tensor
    rollout_log_prob: Tensor | None
    sampler: Head | None
    step: int
    max_tokens: int

    @contextmanager
    def blamed(self, checks: Callable[[], Checks]) -> Iterator[None]:
        """An exception inside is the fault of numbers that are not good, if there are any: `NumericalError`."""
        try:
            yield
        except Exception:
            require(checks(), self)
            raise


class NumericalError(RunError, FloatingPointError):
    """A loss, gradient, log-probability, entropy or ratio is not finite or out of its range: the run stops.

    Attributes:
        batch: what was being updated on, or what was sampled.
    """

    def __init__(self, message: str, batch: Minibatch | Rollouts | None = None) -> None:
        super().__init__(message)
        self.batch = batch


def check_sampled(rollouts: Rollouts) -> None:
    """Sampled log-probabilities are finite and at most 0.

    Raises:
        NumericalError: one is not.
    """
    require({"sampled log-probability": _probability(rollouts.log_prob)}, rollouts)


def sound(seen: TokenStatistics, sampled: Tensor, advantage: Tensor, vocabulary: int) -> Checks:
    """Checks of what an update uses, each (T,): 0 <= H <= log V, log pi <= 0, finite ratios and advantages."""
    highest = math.log(vocabulary) + SLACK
    return {
        "log-probability": _probability(seen.log_prob),
        "entropy": torch.isfinite(seen.entropy) & (seen.entropy >= -SLACK) & (seen.entropy <= highest),
        "sampled log-probability": _probability(sampled),
        "ratio": torch.isfinite(torch.exp(seen.log_prob - sampled)),
        "advantage": torch.isfinite(advantage),
    }


def require(checks: Checks, batch: Minibatch | Rollouts | None = None) -> None:
    """All of `checks` at the price of one synchronisation with the device.

    Raises:
        NumericalError: something is not finite, or out of its range.
    """
    if bool(torch.stack([mask.all() for mask in checks.values()]).all()):
        return
    bad = {name: (~mask).sum().item() for name, mask in checks.items() if not bool(mask.all())}
    told = (f"{name} ({count} of {checks[name].numel()})" for name, count in bad.items())
    raise NumericalError(f"not finite or out of range: {', '.join(told)}", batch)


def _probability(log_prob: Tensor) -> Tensor:
    return torch.isfinite(log_prob) & (log_prob <= SLACK)
