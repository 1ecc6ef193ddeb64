"""Fork tokens: train on the high-entropy minority only (arXiv 2506.01939).

    keep token t  iff  H_t is among the top `fraction` of the update batch;    L = mean over kept tokens

Entropies are those of the current policy. The ranking spans the whole update batch (the published code ranks within a
micro-batch, so that its result depends on packing); the denominator counts kept tokens only, as published.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from baselines.grpo import GRPO
from benchmark.method import Change, TokenCredit, Tokens


@dataclass(frozen=True)
class ForkTokens(GRPO):
    """GRPO on the top 20 % of tokens by entropy."""

    family: ClassVar[str] = "token selection"
    changes: ClassVar[tuple[Change, ...]] = ("token",)
    reference: ClassVar[str] = "2506.01939"
    faithful_to: ClassVar[str] = "the paper; ranked over the update batch"

    fraction: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction = {self.fraction} is outside (0, 1]")

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """Mask of the ceil(fraction * T) tokens of largest entropy; ties go to the earlier token."""
        kept = math.ceil(self.fraction * len(tokens.entropy))
        order = torch.argsort(tokens.entropy, descending=True, stable=True)
        mask = torch.zeros_like(tokens.entropy, dtype=torch.bool)
        mask[order[:kept]] = True
        return TokenCredit(tokens.advantage, mask)
