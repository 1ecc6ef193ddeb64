"""DynaMO as its released code computes it (arXiv 2602.19208), without its two data-corruption bugs.

    allocation:    n_low + share of the variance, cumulative counts, a floor for solved and unsolved prompts alike
    compensation:  H_min and H_max of the micro-batch
    stabilisation: equation 29 with the mean over the rollout's positions in place of the expectation, max of the
                   micro-batch
    loss:          clip range 0.2 / 0.28 (its code replaces an upper 0.2), token mean, prompts count by their n_i

Left out: rollouts credited to other prompts and statistics in another order than their prompts (both destroy what the
allocation learns from), and the weighting of micro-batch means by their number of sequences. Its statistics refresh
once an epoch; here they are those of the latest visit, which is the same where a prompt comes once an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from baselines.grpo import GRPO
from benchmark.history import HistoryView
from benchmark.method import Change, Kind, Loss, TokenCredit, Tokens
from methods.modulation import Compensation, Stabilisation
from methods.released_allocation import ReleasedAllocation


@dataclass(frozen=True)
class DynaMOReleased(GRPO):
    """The released allocation, modulation per micro-batch, and Clip-Higher's range."""

    family: ClassVar[str] = "dynamo"
    kind: ClassVar[Kind] = "method"
    changes: ClassVar[tuple[Change, ...]] = ("allocation", "token", "loss")
    reference: ClassVar[str] = "2602.19208"
    faithful_to: ClassVar[str] = "the released code, statistics credited to the right prompts"

    loss: Loss = field(default_factory=lambda: Loss(clip_high=0.28))
    allocation: ReleasedAllocation = field(default_factory=ReleasedAllocation)
    compensation: Compensation = field(default_factory=lambda: Compensation(scope="micro_batch"))
    stabilisation: Stabilisation = field(
        default_factory=lambda: Stabilisation(expectation="sequence_mean", scope="micro_batch")
    )

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The released allocation, (P,) int64."""
        return self.allocation(history, budget)

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """A * beta_comp * beta_stab, (T,)."""
        return TokenCredit(tokens.advantage * self.compensation(tokens) * self.stabilisation(tokens))
