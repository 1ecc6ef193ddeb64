"""OTB: the variance-optimal baseline of every token (optimal token baseline, as in verl).

    B_it = sum_j r_ij W_ijt / sum_j W_ijt        over the rollouts j of prompt i that reach position t
    W_ijt = sum_{t' <= t} (1 - 2 pi_t' + sum_b pi_b^2)        squared norms of the logits' score, up to t
    A_ijt = r_ij - B_it

W is that of the current policy; verl takes pi_old's, which is the same in the first update of a batch, and scales it by
squared importance weights where it corrects for the sampler.

Where one rollout alone reaches a position, B is its own reward and A = 0: past the end of the second longest of a
group, and in a group of one. verl has B = 0 there, so A = r (`zero_tail`): in a group of one always, past the second
longest by ``handle_zero_tail``, which its signatures switch on (a docstring of one says off).
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
    """A baseline for each position, weighted by cumulative score norms.

    Attributes:
        zero_tail: the baseline is 0 where one rollout of the prompt alone reaches the position.
    """

    family: ClassVar[str] = "baseline"
    changes: ClassVar[tuple[Change, ...]] = ("baseline", "advantage", "token")
    reference: ClassVar[str] = "verl"
    faithful_to: ClassVar[str] = "verl's optimal token baseline, zero_tail off, inside GRPO's clipped, token-mean loss"

    zero_tail: bool = False

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
        baseline = total / weight
        if self.zero_tail:
            baseline = torch.where(segment_sum(torch.ones_like(W), cell, cells) > 1, baseline, 0.0)
        return TokenCredit(tokens.advantage - baseline[cell])
