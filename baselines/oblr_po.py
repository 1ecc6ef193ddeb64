"""OBLR-PO: variance-optimal baseline and signal-to-noise learning rate (arXiv 2511.23310; from the abstract).

    A_ij = r_ij - b_i,    b_i = sum_j ||G_ij||^2 r_ij / sum_j ||G_ij||^2,    G_ij = grad log pi(y_ij)
    eta = scale |grad J|^2 / (|grad J|^2 + tr Cov(g)), within [low, high]

The abstract says: a gradient-weighted baseline, a learning rate governed by the gradient's signal-to-noise ratio. The
formulas are the standard ones behind those words: the baseline that minimises the variance of an unbiased estimator,
and the step that minimises the bound of an L-smooth objective, SNR / (1 + SNR) / L. ||G||^2 is that of the output
layer, exactly; |grad J|^2 and the sum come from the gradients of two half-batches, <g1, g2> and |(g1 + g2) / 2|^2,
as running means over updates. 1 / L is unknown: eta multiplies the configured learning rate (under Adam, which already
rescales; the suite has no SGD). Scale and bounds are ours: on the shipped policy the factor averages 0.3 to 1 over a
run, so a constant lower rate is the control that a comparison needs (configs/studies/off_policy.yaml has it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.grpo import GRPO
from benchmark.groups import Groups, segment_sum
from benchmark.method import Change, Need, Signal, TokenCredit, Tokens


@dataclass(frozen=True)
class OBLRPO(GRPO):
    """Gradient-weighted baseline, learning rate by signal-to-noise ratio; both off is GRPO.

    Attributes:
        baseline, schedule: switches of the two parts.
        scale: 1 / L over the configured learning rate. low, high: bounds of the factor.
    """

    family: ClassVar[str] = "baseline"
    changes: ClassVar[tuple[Change, ...]] = ("baseline", "optimiser", "advantage", "token")
    reference: ClassVar[str] = "2511.23310"
    faithful_to: ClassVar[str] = "the abstract; standard forms, last-layer norms, as a factor on Adam's learning rate"

    baseline: bool = True
    schedule: bool = True
    scale: float = 16.0
    low: float = 0.1
    high: float = 2.0

    @property
    def needs(self) -> frozenset[Need]:
        """The output layer for the baseline, half-batch gradients for the schedule."""
        both: dict[Need, bool] = {"head": self.baseline, "signal": self.schedule}
        return frozenset(need for need, used in both.items() if used)

    def credit(self, groups: Groups) -> Tensor:
        """The reward; its baseline follows with the gradients, (R,)."""
        return groups.reward if self.baseline else super().credit(groups)

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """r - b, (T,)."""
        if not self.baseline:
            return TokenCredit(tokens.advantage)
        assert tokens.head is not None
        norm = tokens.head.score_norms(tokens.rollout)
        last = torch.bincount(tokens.rollout).cumsum(0) - 1
        reward, prompt, prompts = tokens.advantage[last], tokens.prompt[last], int(tokens.prompt.max()) + 1
        weight = segment_sum(norm, prompt, prompts).clamp(min=torch.finfo(norm.dtype).tiny)
        b = segment_sum(norm * reward, prompt, prompts) / weight
        return TokenCredit(tokens.advantage - b[tokens.prompt])

    def learning_rate(self, signal: Signal) -> float:
        """scale SNR / (1 + SNR) within bounds; SNR / (1 + SNR) = <g1, g2> / |g|^2."""
        ratio = signal.product / signal.square if signal.square > 0 else 0.0
        return min(max(self.scale * ratio, self.low), self.high)
