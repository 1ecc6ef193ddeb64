"""W-REINFORCE: mostly negative reinforcement (arXiv 2506.01347).

    A_ij = +weight if correct, -1 if wrong,    weight = 0.1;    no baseline, no standard deviation

weight = 1 is plain REINFORCE with rewards +-1, weight = 0 reinforces by wrong answers only (NSR).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.groups import Groups
from benchmark.method import Change, Kind, Method


@dataclass(frozen=True)
class WReinforce(Method):
    """Down-weighted positive and full negative samples."""

    family: ClassVar[str] = "sample weighting"
    kind: ClassVar[Kind] = "baseline"
    changes: ClassVar[tuple[Change, ...]] = ("advantage",)
    reference: ClassVar[str] = "2506.01347"
    faithful_to: ClassVar[str] = "the paper's code (weight 0.1)"

    weight: float = 0.1

    def credit(self, groups: Groups) -> Tensor:
        """+weight or -1, (R,)."""
        return torch.where(groups.reward > 0, self.weight, -1.0).to(groups.reward)
