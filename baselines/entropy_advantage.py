"""Entropy-shaped advantages (arXiv 2506.14758, equations 7 and 8).

    A'_t = A_t + min(alpha H_t, |A_t| / kappa)

H is detached; kappa > 1 keeps the sign of A. Tokens with A = 0 stay at 0. alpha = 0.4 and kappa = 2 are the values
reported for GRPO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from baselines.grpo import GRPO
from benchmark.method import Change, TokenCredit, Tokens


@dataclass(frozen=True)
class EntropyAdvantage(GRPO):
    """GRPO with a clipped entropy bonus in the advantage."""

    family: ClassVar[str] = "entropy"
    changes: ClassVar[tuple[Change, ...]] = ("token",)
    reference: ClassVar[str] = "2506.14758"
    faithful_to: ClassVar[str] = "the paper's equations; no official code"

    alpha: float = 0.4
    kappa: float = 2.0

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.kappa <= 1:
            raise ValueError(f"alpha = {self.alpha}, kappa = {self.kappa}: alpha >= 0 and kappa > 1 keep the sign of A")

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """A + min(alpha H, |A| / kappa), (T,)."""
        bonus = torch.minimum(self.alpha * tokens.entropy, tokens.advantage.abs() / self.kappa)
        return TokenCredit(tokens.advantage + bonus)
