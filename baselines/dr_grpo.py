"""Dr. GRPO: GRPO done right (arXiv 2503.20783).

    A_ij = r_ij - mean_i,    loss = sum over tokens / (rollouts x token limit)

No division by the group's standard deviation (which re-weights prompts by difficulty) and none by the length of the
answer (which favours long wrong answers). A group of one rollout has advantage 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from benchmark.groups import Groups
from benchmark.method import Change, Kind, Loss, Method


@dataclass(frozen=True)
class DrGRPO(Method):
    """Group mean as the only baseline; constant-length loss."""

    family: ClassVar[str] = "group advantage"
    kind: ClassVar[Kind] = "baseline"
    changes: ClassVar[tuple[Change, ...]] = ("advantage", "loss")
    reference: ClassVar[str] = "2503.20783"
    faithful_to: ClassVar[str] = "the paper and its code"

    loss: Loss = field(default_factory=lambda: Loss(aggregation="constant_length"))

    def credit(self, groups: Groups) -> Tensor:
        """A = r - mean, (R,)."""
        return groups.centred(groups.reward)
