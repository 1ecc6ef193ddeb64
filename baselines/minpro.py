"""MinPRO: a stable stand-in for the prefix importance ratio (arXiv 2601.22718; from a secondary source).

The exact off-policy weight of token t is the product of ratios up to it, which explodes. The surrogate is

    w_t = rho_t min_{j < t} rho_j,    rho = pi / pi_old,    min over nothing = 1

with the gradient of rho_t; tokens that PPO's clip range stops lose it. How the original clips is not known to us, nor
whether it takes pi_old from the sampler; here it is the trainer's, as in GRPO (`Tokens.old_log_prob`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from baselines.grpo import GRPO
from baselines.rollout_scan import pad, unpad
from benchmark.method import Change, Loss, TokenCredit, Tokens


@dataclass(frozen=True)
class MinPRO(GRPO):
    """GRPO's advantage under the smallest ratio of the prefix."""

    family: ClassVar[str] = "trust region"
    changes: ClassVar[tuple[Change, ...]] = ("loss", "token")
    reference: ClassVar[str] = "2601.22718"
    faithful_to: ClassVar[str] = "a secondary source; the clip range is GRPO's"

    loss: Loss = field(default_factory=lambda: Loss(surrogate="log_likelihood"))

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """A rho_t min_{j < t} rho_j, 0 where clipped, (T,)."""
        ratio = pad(tokens.ratio, tokens.rollout, fill=1.0)
        smallest = torch.cat([torch.ones_like(ratio[:, :1]), ratio.cummin(1).values[:, :-1]], dim=1)
        weight = tokens.ratio * unpad(smallest, tokens.rollout)
        return TokenCredit(torch.where(tokens.clipped, 0.0, tokens.advantage * weight))
