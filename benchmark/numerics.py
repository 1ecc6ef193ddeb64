"""Numbers that must be finite and in range; a run stops at the first that is not, and keeps the batch that it came from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmark.errors import RunError
from benchmark.rollouts import Rollouts
from benchmark.scoring import TokenStatistics

SLACK = 1e-2
"""Nats by which rounding (bfloat16 samplers included) may carry a log-probability above 0 or an entropy out of range."""


@dataclass(frozen=True)
class FailedBatch:
    """What an update or a sampler was working on.

    Attributes:
        rollouts: the minibatch, or what was sampled.
        advantage: (R,) one per rollout, and correction: (T,) token weights of an inexact sampler; None where none were.
        step, updates: training step and number of the update. max_tokens: token limit of a rollout.
    """

    rollouts: Rollouts
    advantage: Tensor | None = None
    correction: Tensor | None = None
    step: int = 0
    updates: int = 0
    max_tokens: int = 0


class NumericalError(RunError, FloatingPointError):
    """A loss, gradient, log-probability, entropy or ratio is not finite or out of its range: the run stops."""

    def __init__(self, message: str, batch: FailedBatch | None = None) -> None:
        super().__init__(message)
        self.batch = batch


def check_sampled(rollouts: Rollouts) -> None:
    """Sampled log-probabilities are finite and at most 0.

    Raises:
        NumericalError: one is not.
    """
    _require({"sampled log-probability": _probability(rollouts.log_prob)}, FailedBatch(rollouts))


def check_tokens(seen: TokenStatistics, sampled: Tensor, advantage: Tensor, vocabulary: int) -> None:
    """What an update is about to use, all (T,): 0 <= H <= log V, log pi <= 0, finite ratios and advantages.

    Raises:
        NumericalError: something is not finite, or out of its range.
    """
    highest = math.log(vocabulary) + SLACK
    good = {
        "log-probability": _probability(seen.log_prob),
        "entropy": torch.isfinite(seen.entropy) & (seen.entropy >= -SLACK) & (seen.entropy <= highest),
        "sampled log-probability": _probability(sampled),
        "ratio": torch.isfinite(torch.exp(seen.log_prob - sampled)),
        "advantage": torch.isfinite(advantage),
    }
    _require({name: mask.detach() for name, mask in good.items()})


def _probability(log_prob: Tensor) -> Tensor:
    return torch.isfinite(log_prob) & (log_prob <= SLACK)


def _require(good: dict[str, Tensor], batch: FailedBatch | None = None) -> None:
    # One question to the device for all of them.
    if bool(torch.stack([mask.all() for mask in good.values()]).all()):
        return
    bad = {name: int((~mask).sum()) for name, mask in good.items() if not bool(mask.all())}
    told = ", ".join(f"{name} of {count} of {len(good[name])} tokens" for name, count in bad.items())
    raise NumericalError(f"not finite or out of range: {told}", batch)
