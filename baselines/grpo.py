"""GRPO: group relative policy optimisation (arXiv 2402.03300), the reference arm.

Advantage of rollout j of prompt i, with the mean and the standard deviation (n-1) of its group:

    A_ij = (r_ij - mean_i) / (std_i + epsilon)

Uniform allocation, clip range 0.2 / 0.2, token-mean loss, no KL term (verl's defaults, which DynaMO builds on; the
original paper averages per sequence first and adds a KL penalty). A group whose answers are all right or all wrong,
and a group of one rollout, have advantage 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from benchmark.groups import Groups
from benchmark.method import Change, Kind, Method


@dataclass(frozen=True)
class GRPO(Method):
    """Mean and standard deviation of the group as baseline and scale."""

    family: ClassVar[str] = "group advantage"
    kind: ClassVar[Kind] = "baseline"
    changes: ClassVar[tuple[Change, ...]] = ()
    reference: ClassVar[str] = "2402.03300"
    faithful_to: ClassVar[str] = "verl: token-mean loss, no KL term"

    epsilon: float = 1e-6

    def credit(self, groups: Groups) -> Tensor:
        """A = (r - mean) / (std + epsilon), (R,)."""
        return normalised(groups, groups.reward, self.epsilon)


def normalised(groups: Groups, reward: Tensor, epsilon: float) -> Tensor:
    """(reward - group mean) / (group std + epsilon), (R,); 0 for groups of size 1."""
    return groups.centred(reward) / (groups.std(reward)[groups.prompt] + epsilon)
