"""OPO: the optimal reward baseline under its simplification, weighted by length (arXiv 2505.23585).

    A_ij = r_ij - b_i,    b_i = sum_j L_ij r_ij / sum_j L_ij

The variance-optimal baseline weighs rewards by squared gradient norms; OPO takes a rollout's norm to grow with its
length L. No standard deviation. A group whose answers are all right or all wrong has advantage 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from baselines.grpo import GRPO
from benchmark.groups import Groups, segment_sum
from benchmark.method import Change


@dataclass(frozen=True)
class OPO(GRPO):
    """Length-weighted mean reward as the baseline."""

    family: ClassVar[str] = "baseline"
    changes: ClassVar[tuple[Change, ...]] = ("baseline", "advantage")
    reference: ClassVar[str] = "2505.23585"
    faithful_to: ClassVar[str] = "verl's opo, inside GRPO's clipped, token-mean loss"

    def credit(self, groups: Groups) -> Tensor:
        """r - b, (R,)."""
        length = groups.length.to(groups.reward)
        total = segment_sum(length * groups.reward, groups.prompt, groups.prompts)
        weight = segment_sum(length, groups.prompt, groups.prompts).clamp(min=1)
        return groups.reward - (total / weight)[groups.prompt]
