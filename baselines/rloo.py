"""RLOO: REINFORCE with the leave-one-out baseline (arXiv 2402.14740).

    A_ij = r_ij - mean of the other rollouts of i = (r_ij - mean_i) n_i / (n_i - 1)

Unbiased, because a rollout is not part of its own baseline. A group of one rollout has no others: its advantage is 0.
The clipped surrogate and token-mean loss are those of GRPO, so that only the advantage differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from benchmark.groups import Groups
from benchmark.method import Change, Kind, Method


@dataclass(frozen=True)
class RLOO(Method):
    """Leave-one-out mean as the baseline."""

    family: ClassVar[str] = "group advantage"
    kind: ClassVar[Kind] = "baseline"
    changes: ClassVar[tuple[Change, ...]] = ("advantage",)
    reference: ClassVar[str] = "2402.14740"
    faithful_to: ClassVar[str] = "verl: leave-one-out advantage inside the clipped surrogate"

    def credit(self, groups: Groups) -> Tensor:
        """A = (r - mean) n / (n - 1), (R,)."""
        size = groups.size
        return groups.centred(groups.reward) * (size / (size - 1).clamp(min=1))[groups.prompt]
