"""DynaMO by the published formulas to the letter (README of the released code, arXiv 2602.19208).

    allocation:    n_i = B P_i / sum_k P_k within [n_low, n_high]: the variance, where the optimum has its root
    compensation:  beta_comp = 1 + alpha (H_max - H) / (H_max - H_min) where A > 0, else 1
    stabilisation: beta_stab = f(Xi / max Xi), Xi = |dH| of equation 29, f a decaying sigmoid
    objective:     token mean over all rollouts, so that a prompt counts by its n_i

The text names one alpha and no constants of f; both are the released mode's (0.2; 0.6, 50, 0.99).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from baselines.grpo import GRPO
from benchmark.history import HistoryView
from benchmark.method import Change, Kind, TokenCredit, Tokens
from methods.modulation import Compensation, Stabilisation
from methods.released_allocation import ReadmeAllocation


@dataclass(frozen=True)
class DynaMOReadme(GRPO):
    """Allocation by variance, compensation and stabilisation; prompts weigh by n_i."""

    family: ClassVar[str] = "dynamo"
    kind: ClassVar[Kind] = "method"
    changes: ClassVar[tuple[Change, ...]] = ("allocation", "token")
    reference: ClassVar[str] = "2602.19208"
    faithful_to: ClassVar[str] = "the README's formulas; constants it leaves open are the released ones"

    allocation: ReadmeAllocation = field(default_factory=ReadmeAllocation)
    compensation: Compensation = field(default_factory=Compensation)
    stabilisation: Stabilisation = field(default_factory=Stabilisation)

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Allocation by variance within bounds, (P,) int64."""
        return self.allocation(history, budget)

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """A * beta_comp * beta_stab, (T,)."""
        return TokenCredit(tokens.advantage * self.compensation(tokens) * self.stabilisation(tokens))
