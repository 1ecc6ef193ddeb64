"""AR3PO: rollouts in stages, until a prompt has a correct one (arXiv 2509.25808; from the abstract, secondary sources).

    stage s of at most S: k more rollouts for every prompt without a correct one so far

GRPO's advantage over all of them. Easy prompts cost k rollouts, hard ones S k. k and S are ours: the text at hand gives
a final mean of 5.7 rollouts a prompt, which lies between 4 and 8. The paper's other half, a stored correct response
that is put into a group without one, is left out: a rollout of an older policy has no place in this harness's batch.
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
    """Adaptive rollouts, without response reuse.

    Attributes:
        stage: k. stages: S.
    """

    family: ClassVar[str] = "adaptive rounds"
    changes: ClassVar[tuple[Change, ...]] = ("allocation",)
    reference: ClassVar[str] = "2509.25808"
    faithful_to: ClassVar[str] = "the abstract's adaptive rollouts; stage sizes are ours, no reuse of stored responses"

    stage: int = 4
    stages: int = 2

    @property
    def rounds(self) -> Rounds:
        """S stages, the first of k rollouts a prompt."""
        return Rounds(self.stages, first=self.stage)

    def extend(self, groups: Groups, done: int) -> NDArray[np.int64]:
        """k for every prompt without a correct rollout, (P,) int64."""
        right = segment_sum(groups.reward, groups.prompt, groups.prompts)
        return np.where(right.cpu().numpy() > 0, 0, self.stage).astype(np.int64)
