"""AR3PO: rollouts in stages, until a prompt has a correct one (arXiv 2509.25808; from the abstract, secondary sources).

    stage s of at most S: k more rollouts for every prompt without a correct one so far

GRPO's advantage over all of them. Easy prompts cost k rollouts, hard ones S k. k and S are ours: the text at hand gives
a final mean of 5.7 rollouts a prompt, which lies between 4 and 8.

A group that is still without a correct rollout gets the prompt's newest one from an earlier visit, if there was any.
Its ratio starts from the policy that trains (pi_old of a recalled rollout is scored anew, charged), so that it is
clipped as the others are; that is ours, the text at hand does not say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from baselines.grpo import GRPO
from benchmark.groups import Groups, segment_sum
from benchmark.method import Change, Rounds


@dataclass(frozen=True)
class AR3PO(GRPO):
    """Adaptive rollouts and response reuse.

    Attributes:
        stage: k. stages: S. reuse: recall a stored correct rollout.
    """

    family: ClassVar[str] = "adaptive rounds"
    changes: ClassVar[tuple[Change, ...]] = ("allocation",)
    reference: ClassVar[str] = "2509.25808"
    faithful_to: ClassVar[str] = "the abstract; stage sizes and the ratio of a recalled response are ours"

    stage: int = 4
    stages: int = 2
    reuse: bool = True

    @property
    def rounds(self) -> Rounds:
        """S stages, the first of k rollouts a prompt."""
        return Rounds(self.stages, first=self.stage)

    @property
    def recalls(self) -> bool:
        """As `reuse` says."""
        return self.reuse

    def extend(self, groups: Groups, done: int) -> NDArray[np.int64]:
        """k for every prompt without a correct rollout, (P,) int64."""
        right = segment_sum(groups.reward, groups.prompt, groups.prompts)
        return np.where(right.cpu().numpy() > 0, 0, self.stage).astype(np.int64)
