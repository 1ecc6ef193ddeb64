"""OTB: the variance-optimal baseline of every token (optimal token baseline, as in verl).

    B_it = sum_j r_ij W_ijt / sum_j W_ijt        over the rollouts j of prompt i that reach position t
    W_ijt = sum_{t' <= t} (1 - 2 pi_t' + sum_b pi_b^2)        squared norms of the logits' score, up to t
    A_ijt = r_ij - B_it

W is that of the current policy; verl takes the rollout policy's, which is the same in the first update of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.grpo import GRPO
from baselines.rollout_scan import pad, positions, unpad
from benchmark.groups import Groups, segment_sum
from benchmark.method import Change, TokenCredit, Tokens


@dataclass(frozen=True)
class OTB(GRPO):
    """A baseline for each position, weighted by cumulative score norms."""

    family: ClassVar[str] = "baseline"
    changes: ClassVar[tuple[Change, ...]] = ("baseline", "advantage", "token")
    reference: ClassVar[str] = "verl"
    faithful_to: ClassVar[str] = "verl's optimal token baseline, inside GRPO's clipped, token-mean loss"

    def credit(self, groups: Groups) -> Tensor:
        """The reward; the baseline follows per token, (R,)."""
        return groups.reward

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """r - B, (T,)."""
        norm = 1 - 2 * tokens.log_prob.exp() + tokens.sum_p2
        W = unpad(pad(norm, tokens.rollout).cumsum(1), tokens.rollout)
        place = positions(tokens.rollout)
        width = int(place.max()) + 1
        cell, cells = tokens.prompt * width + place, (int(tokens.prompt.max()) + 1) * width
        total = segment_sum(W * tokens.advantage, cell, cells)
        weight = segment_sum(W, cell, cells).clamp(min=torch.finfo(W.dtype).tiny)
        return TokenCredit(tokens.advantage - (total / weight)[cell])
