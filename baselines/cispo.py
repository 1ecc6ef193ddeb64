"""CISPO: clipped importance weights in place of a clipped surrogate (arXiv 2506.13585).

    L_t = -sg(clip(r_t, 1 - clip_low, 1 + clip_high)) A_t log pi_t

No token loses its gradient; only its weight is bounded. Both sides are clipped as in verl; TRL clips the upper side
only, which is clip_low = 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from baselines.grpo import GRPO
from benchmark.method import Change, Loss, TokenCredit, Tokens


@dataclass(frozen=True)
class CISPO(GRPO):
    """GRPO's advantage, weighted by a clipped ratio."""

    family: ClassVar[str] = "trust region"
    changes: ClassVar[tuple[Change, ...]] = ("loss", "token")
    reference: ClassVar[str] = "2506.13585"
    faithful_to: ClassVar[str] = "verl's cispo, with its default range"

    loss: Loss = field(default_factory=lambda: Loss(surrogate="log_likelihood"))

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """A sg(clip(r)), (T,)."""
        return TokenCredit(tokens.advantage * tokens.ratio.clamp(1 - tokens.loss.clip_low, 1 + tokens.loss.clip_high))
