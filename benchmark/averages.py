"""Metrics of an update, kept on the device until they are read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmark.method import Loss, TokenCredit
from benchmark.scoring import TokenStatistics


@dataclass
class Averages:
    """Token- or update-weighted means of metrics, kept as tensors until read (no sync per update)."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Count the scalar `value` with `weight` towards the mean of `name`."""
        self.sums[name] = self.sums.get(name, torch.zeros(())) + value.detach() * weight
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def maximum(self, name: str, value: Tensor) -> None:
        """Raise the maximum of `name` to the scalar `value`."""
        old = self.maxima.get(name)
        self.maxima[name] = value.detach() if old is None else torch.maximum(old, value.detach())

    def read(self) -> dict[str, float]:
        """Every mean and maximum so far; waits for the device."""
        means = {name: float(total) / self.weights[name] for name, total in self.sums.items()}
        return means | {name: float(value) for name, value in self.maxima.items()}


def observe(
    seen: TokenStatistics, old_log_prob: Tensor, advantage: Tensor, credit: TokenCredit, loss: Loss, metrics: Averages
) -> None:
    """Policy and modulation metrics of one update, token-weighted, as its gradient saw them."""
    count = float(len(advantage))
    change = seen.log_prob - old_log_prob
    ratio = change.exp()
    metrics.add("policy/entropy_nats", seen.entropy.mean(), count)
    metrics.add("policy/kl_old_nats", (ratio - 1 - change).mean(), count)
    metrics.maximum("policy/ratio_max", ratio.max())
    given = credit.advantage
    metrics.add("policy/clip_high_fraction", ((given > 0) & (ratio > 1 + loss.clip_high)).float().mean(), count)
    metrics.add("policy/clip_low_fraction", ((given < 0) & (ratio < 1 - loss.clip_low)).float().mean(), count)
    active = advantage != 0
    if bool(active.any()):
        metrics.add("modulation/factor_mean", (given[active] / advantage[active]).mean(), float(active.sum()))
