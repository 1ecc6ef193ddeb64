"""The allocation's implicit re-weighting of the objective, without the allocation (control of arXiv 2602.19208)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from baselines.grpo import GRPO
from benchmark.groups import Groups
from benchmark.method import Change, Kind
from methods.neyman import NeymanAllocation


@dataclass(frozen=True)
class ObjectiveWeights(GRPO):
    """Uniform rollouts, weighted as an allocation would weigh prompts in a rollout-weighted loss.

    A_ij = A_ij(GRPO) n_i / m_i,    n: Neyman's allocation of the batch, m: the rollouts there are (mean n)

    The surrogate is positively homogeneous in A, so this is n_i / m_i times the loss of a rollout. To be compared with
    `dynamo_allocation` under ``loss.prompt_weight = "rollouts"``, which has the same expected weights.
    """

    family: ClassVar[str] = "dynamo"
    kind: ClassVar[Kind] = "control"
    changes: ClassVar[tuple[Change, ...]] = ("advantage",)
    reference: ClassVar[str] = "2602.19208"
    faithful_to: ClassVar[str] = "control: the allocation's implicit weights without the allocation"
    exchangeable: ClassVar[bool] = False  # whole numbers of rollouts: equal prompts share a remainder by their order

    allocation: NeymanAllocation = field(default_factory=NeymanAllocation)

    @property
    def half_life(self) -> float | None:
        """The allocation's: visits after which an outcome counts half."""
        return self.allocation.half_life

    def credit(self, groups: Groups) -> Tensor:
        """GRPO's advantage times n / m, (R,)."""
        if not self.allocation.enabled or not groups.prompts:
            return super().credit(groups)
        n = torch.from_numpy(self.allocation(groups.history, len(groups.reward))).to(groups.reward)
        return super().credit(groups) * (n / groups.size.clamp(min=1))[groups.prompt]
