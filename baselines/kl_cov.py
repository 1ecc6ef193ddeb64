"""KL-Cov: a KL penalty on the tokens of highest covariance (arXiv 2505.22617).

    L_t = -A_t r_t + beta |log pi_t - log pi_old_t|   for the top `fraction` of tokens by cov_t
    L_t = -A_t r_t                                    for the others; no PPO clipping

cov_t as in Clip-Cov. fraction = 2e-4 and beta = 1 (paper; verl's configuration says 0.1, its docstring 1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from baselines.clip_cov import covariance
from baselines.grpo import GRPO
from benchmark.method import Change, Loss, TokenCredit, Tokens


@dataclass(frozen=True)
class KLCov(GRPO):
    """GRPO without clipping, with a penalty where covariance is highest."""

    family: ClassVar[str] = "entropy"
    changes: ClassVar[tuple[Change, ...]] = ("token", "loss")
    reference: ClassVar[str] = "2505.22617"
    faithful_to: ClassVar[str] = "verl's kl_cov with the paper's beta, over the update batch"

    loss: Loss = field(default_factory=lambda: Loss(clip=False))
    fraction: float = 2e-4
    beta: float = 1.0

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """Penalty weight beta on the max(1, fraction * T) tokens of largest covariance, (T,)."""
        number = max(1, int(self.fraction * len(tokens.advantage)))
        coefficient = torch.zeros_like(tokens.advantage)
        coefficient[torch.argsort(covariance(tokens), descending=True, stable=True)[:number]] = self.beta
        return TokenCredit(tokens.advantage, kl_coefficient=coefficient)
