"""Reinforce-Ada: prompts are sampled in rounds until they show both outcomes (arXiv 2510.04996, released code).

    rounds of M rollouts, at most N; a prompt stops at n / 2 right and n / 2 wrong ones ("balanced")
    or at one right one ("positive")
    n of a prompt's rollouts train, half of them right where there are as many
    A_ij = r_ij - mean over *all* rollouts of prompt i

M = 8, N = 4, n = 4, clip range 0.2 / 0.28, entropy coefficient 1e-4. Every round is charged: up to N M rollouts for n
that train. Where one outcome is short, the other fills up. Keeping both outcomes in equal number moves the objective:
the expected update is that of plain REINFORCE times (1 - 2 p q) / (2 p q).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baselines.grpo import GRPO
from benchmark.groups import Groups, segment_sum
from benchmark.method import Change, Loss, Rounds


@dataclass(frozen=True)
class ReinforceAda(GRPO):
    """Successive rounds, a balanced sample of what they gave, the mean of all as baseline.

    Attributes:
        stop: what ends a prompt's rounds. kept: n, even. round_size: M. most_rounds: N.
    """

    family: ClassVar[str] = "adaptive rounds"
    changes: ClassVar[tuple[Change, ...]] = ("allocation", "selection", "advantage", "loss")
    reference: ClassVar[str] = "2510.04996"
    faithful_to: ClassVar[str] = "the released code and the paper"

    loss: Loss = field(default_factory=lambda: Loss(clip_high=0.28, entropy_coefficient=1e-4))
    stop: Literal["balanced", "positive"] = "balanced"
    kept: int = 4
    round_size: int = 8
    most_rounds: int = 4

    def __post_init__(self) -> None:
        if self.kept < 2 or self.kept % 2 or self.stop not in ("balanced", "positive"):
            raise ValueError(f"kept = {self.kept}, stop = {self.stop!r}: even and at least 2, balanced or positive")

    @property
    def rounds(self) -> Rounds:
        """N rounds, the first of M rollouts a prompt."""
        return Rounds(self.most_rounds, first=self.round_size)

    def extend(self, groups: Groups, done: int) -> NDArray[np.int64]:
        """M for every prompt that has not stopped, (P,) int64."""
        right = segment_sum(groups.reward, groups.prompt, groups.prompts)
        half = self.kept / 2
        enough = (right >= half) & (groups.size - right >= half) if self.stop == "balanced" else right >= 1
        return np.where(enough.cpu().numpy(), 0, self.round_size).astype(np.int64)

    def keep_rollouts(self, groups: Groups) -> Tensor:
        """The first of each outcome, (R,) bool."""
        right = segment_sum(groups.reward, groups.prompt, groups.prompts)
        wrong = groups.size - right
        half = self.kept // 2
        taken_right = torch.minimum(right, (self.kept - wrong).clamp(min=half))
        taken = torch.stack([torch.minimum(wrong, self.kept - taken_right), taken_right], dim=1).flatten()
        outcome = 2 * groups.prompt + (groups.reward > 0)
        order = torch.argsort(outcome, stable=True)
        count = torch.bincount(outcome, minlength=2 * groups.prompts)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[outcome[order]]
        return place < taken[outcome]

    def credit(self, groups: Groups) -> Tensor:
        """A = r - mean, (R,)."""
        return groups.centred(groups.reward)
