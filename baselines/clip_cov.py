"""Clip-Cov: stop the gradient of a few tokens with high covariance (arXiv 2505.22617).

    cov_t = (A_t - mean A) (log pi_t - mean log pi)          means over the update batch

Among tokens with low < cov_t < high that PPO does not clip anyway, max(1, fraction * T) chosen at random lose their
gradient; they stay in the loss's denominator. Defaults are verl's (low 1, high 5, fraction 2e-4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.grpo import GRPO
from benchmark.method import Change, TokenCredit, Tokens


def covariance(tokens: Tokens) -> Tensor:
    """(A - mean A)(log pi - mean log pi) per token, (T,)."""
    advantage, log_prob = tokens.advantage, tokens.log_prob
    return (advantage - advantage.mean()) * (log_prob - log_prob.mean())


@dataclass(frozen=True)
class ClipCov(GRPO):
    """GRPO without the gradient of some high-covariance tokens."""

    family: ClassVar[str] = "entropy"
    changes: ClassVar[tuple[Change, ...]] = ("token",)
    reference: ClassVar[str] = "2505.22617"
    faithful_to: ClassVar[str] = "verl's clip_cov, over the update batch"

    low: float = 1.0
    high: float = 5.0
    fraction: float = 2e-4

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """Advantage 0 for the chosen tokens, (T,)."""
        value = covariance(tokens)
        candidate = (value > self.low) & (value < self.high) & ~tokens.clipped
        number = max(1, int(self.fraction * len(value)))
        # Candidates in random order, everything else behind them.
        rank = torch.where(candidate, tokens.uniform, torch.inf)
        chosen = torch.argsort(rank, stable=True)[:number]
        advantage = tokens.advantage.clone()
        advantage[chosen[candidate[chosen]]] = 0.0
        return TokenCredit(advantage)
