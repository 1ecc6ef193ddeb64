"""A shrunk baseline: group means pulled towards the batch's (James-Stein; arXiv 2511.03710, from its abstract).

    A_ij = r_ij - b_i(j),    b_i(j) = (1 - k) m_i(-j) + k M_i        m_i(-j): mean of the other rollouts of i
    k = within / (within + between),    M_i: mean over the other groups of the batch

within is the mean of s_i^2 / (n_i - 1), the noise of a leave-one-out mean, and between what the variance of the group
means has beyond noise (at least 0). Rollout j is in neither mean, only in k. This is the standard shrinkage estimator;
the paper's own constants were not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from baselines.grpo import GRPO
from benchmark.groups import Groups
from benchmark.method import Change


@dataclass(frozen=True)
class Shrinkage(GRPO):
    """Leave-one-out means shrunk towards the mean of the other groups."""

    family: ClassVar[str] = "baseline"
    changes: ClassVar[tuple[Change, ...]] = ("baseline", "advantage")
    reference: ClassVar[str] = "2511.03710"
    faithful_to: ClassVar[str] = "the abstract; the standard James-Stein form"

    def credit(self, groups: Groups) -> Tensor:
        """r - b, (R,); 0 for a batch of a single rollout."""
        size, mean = groups.size, groups.mean(groups.reward)
        filled = size > 0
        count = filled.sum()
        if count < 2:
            return groups.centred(groups.reward) * (size / (size - 1).clamp(min=1))[groups.prompt]
        others = (mean.sum() - mean) / (count - 1)
        variance = groups.std(groups.reward) ** 2
        within = (variance / (size - 1).clamp(min=1))[size > 1].sum() / (size > 1).sum().clamp(min=1)
        noise = (variance / size.clamp(min=1))[filled].mean()
        between = (mean[filled].var() - noise).clamp(min=0)
        k = within / (within + between) if bool(within > 0) else within
        n = size[groups.prompt]
        left = (mean[groups.prompt] * n - groups.reward) / (n - 1).clamp(min=1)
        # A single rollout has no others in its group: the batch is all there is.
        own = left.where(n > 1, others[groups.prompt])
        return groups.reward - ((1 - k) * own + k * others[groups.prompt])
