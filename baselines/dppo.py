"""DPPO: a trust region by divergence in place of a clipped ratio (arXiv 2602.04879).

    L_t = -A_t sg(min(r_t, truncation)) M_t log pi_t
    M_t = 0 where the step leads further away: A > 0, pi > mu and D > delta, or A < 0, pi < mu and D > delta; else 1

mu is the policy that sampled (not one recomputed later: it says the anchor is essential). D is the divergence of the
sampled token against all others:

    binary TV:  |pi - mu|                                               delta 0.15
    binary KL:  mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi))     delta 0.05
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from baselines.grpo import GRPO
from benchmark.method import Change, Loss, TokenCredit, Tokens


@dataclass(frozen=True)
class DPPOTV(GRPO):
    """Total variation of the sampled token against the rest."""

    family: ClassVar[str] = "trust region"
    changes: ClassVar[tuple[Change, ...]] = ("loss", "token")
    reference: ClassVar[str] = "2602.04879"
    faithful_to: ClassVar[str] = "the released code's dppo_tv"

    loss: Loss = field(default_factory=lambda: Loss(surrogate="log_likelihood"))
    delta: float = 0.15
    truncation: float = 20.0

    def divergence(self, pi: Tensor, mu: Tensor) -> Tensor:
        """|pi - mu|, (T,)."""
        return (pi - mu).abs()

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """A min(r, truncation), 0 outside the trust region, (T,)."""
        pi, mu, A = tokens.log_prob.exp(), tokens.old_log_prob.exp(), tokens.advantage
        away = ((A > 0) & (pi > mu)) | ((A < 0) & (pi < mu))
        outside = away & (self.divergence(pi, mu) > self.delta)
        return TokenCredit(torch.where(outside, 0.0, A * tokens.ratio.clamp(max=self.truncation)))


@dataclass(frozen=True)
class DPPOKL(DPPOTV):
    """KL divergence of the sampled token against the rest."""

    faithful_to: ClassVar[str] = "the released code's dppo_kl"

    delta: float = 0.05

    def divergence(self, pi: Tensor, mu: Tensor) -> Tensor:
        """mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)), (T,); 0 log 0 = 0."""
        tiny = torch.finfo(pi.dtype).tiny
        own = torch.xlogy(mu, mu / pi.clamp(min=tiny))
        return own + torch.xlogy(1 - mu, (1 - mu) / (1 - pi).clamp(min=torch.finfo(pi.dtype).eps))
