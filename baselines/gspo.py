"""GSPO: one importance ratio for a whole rollout (arXiv 2507.18071).

    s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|)
    L_i = max(-A_i s_i, -A_i clip(s_i, 1 - clip_low, 1 + clip_high)),    mean over rollouts

The gradient of s_i is s_i times the mean of grad log pi over the rollout's tokens, so the loss is computed as
-A_i s_i log pi_t averaged over tokens, 0 where clipped: equal gradients. Clip range 3e-4 / 4e-4 as published, made for
long answers of large models; on short answers it stops most rollouts after the first update of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from baselines.grpo import GRPO
from benchmark.groups import segment_sum
from benchmark.method import Change, Loss, TokenCredit, Tokens


def sequence_ratio(tokens: Tokens) -> Tensor:
    """s of each token's rollout, (T,)."""
    rollouts = int(tokens.rollout.max()) + 1
    change = tokens.log_prob - tokens.old_log_prob
    length = segment_sum(torch.ones_like(change), tokens.rollout, rollouts).clamp(min=1)
    return torch.exp(segment_sum(change, tokens.rollout, rollouts) / length)[tokens.rollout]


@dataclass(frozen=True)
class GSPO(GRPO):
    """GRPO's advantage under a clipped sequence ratio."""

    family: ClassVar[str] = "trust region"
    changes: ClassVar[tuple[Change, ...]] = ("loss", "token")
    reference: ClassVar[str] = "2507.18071"
    faithful_to: ClassVar[str] = "verl's gspo: sequence mean of token means, clip range 3e-4 / 4e-4"

    loss: Loss = field(
        default_factory=lambda: Loss(
            surrogate="log_likelihood", clip_low=3e-4, clip_high=4e-4, aggregation="sequence_mean"
        )
    )

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """A s, 0 where the clip range stops the rollout, (T,)."""
        s, A = sequence_ratio(tokens), tokens.advantage
        stopped = ((A > 0) & (s > 1 + tokens.loss.clip_high)) | ((A < 0) & (s < 1 - tokens.loss.clip_low))
        return TokenCredit(torch.where(stopped, 0.0, A * s))
