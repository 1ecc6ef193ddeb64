"""DynaMO: dynamic rollout allocation and advantage modulation (arXiv 2602.19208), the theory done right.

    allocation:    n_i minimises sum_i s_i^2 / n_i at the batch's budget, s_i the posterior sd of the prompt's outcome
    compensation:  beta_comp boosts confident tokens of correct answers
    stabilisation: beta_stab shrinks tokens of extreme predicted entropy change
    objective:     every prompt weighs the same, whatever its n_i

Where the published text and code differ from this (variance instead of standard deviation as the weight, a mean over
positions instead of the expectation over the vocabulary, prompts weighted by n_i), this file follows the theory.
Every switch off is GRPO: allocation.enabled = False, compensation.alpha = 0, stabilisation.floor = 1. Equal prompt
weights still differ from GRPO where groups are uneven, which the last batch of a token budget can be even then;
loss.prompt_weight = "rollouts" switches them off too.
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
from methods.neyman import NeymanAllocation


@dataclass(frozen=True)
class DynaMO(GRPO):
    """Neyman allocation, compensation and stabilisation."""

    family: ClassVar[str] = "dynamo"
    kind: ClassVar[Kind] = "method"
    changes: ClassVar[tuple[Change, ...]] = ("allocation", "token", "loss")
    reference: ClassVar[str] = "2602.19208"
    faithful_to: ClassVar[str] = "the theory; standard-deviation weights, exact equation 29, equal prompt weights"

    loss: Loss = field(default_factory=lambda: Loss(prompt_weight="equal"))
    allocation: NeymanAllocation = field(default_factory=NeymanAllocation)
    compensation: Compensation = field(default_factory=Compensation)
    stabilisation: Stabilisation = field(default_factory=Stabilisation)

    @property
    def half_life(self) -> float | None:
        """The allocation's: visits after which an outcome counts half."""
        return self.allocation.half_life

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Neyman allocation within bounds, (P,) int64."""
        if not self.allocation.enabled:
            return super().allocate(history, budget, rng)
        return self.allocation(history, budget)

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """A * beta_comp * beta_stab, (T,)."""
        return TokenCredit(tokens.advantage * self.compensation(tokens) * self.stabilisation(tokens))


@dataclass(frozen=True)
class DynaMOAllocation(DynaMO):
    """DynaMO without modulation."""

    changes: ClassVar[tuple[Change, ...]] = ("allocation", "loss")

    compensation: Compensation = field(default_factory=lambda: Compensation(alpha=0.0))
    stabilisation: Stabilisation = field(default_factory=lambda: Stabilisation(floor=1.0))


@dataclass(frozen=True)
class DynaMOModulation(DynaMO):
    """DynaMO with uniform allocation."""

    changes: ClassVar[tuple[Change, ...]] = ("token",)

    allocation: NeymanAllocation = field(default_factory=lambda: NeymanAllocation(enabled=False))


@dataclass(frozen=True)
class DynaMOCompensation(DynaMOModulation):
    """Compensation only."""

    stabilisation: Stabilisation = field(default_factory=lambda: Stabilisation(floor=1.0))


@dataclass(frozen=True)
class DynaMOStabilisation(DynaMOModulation):
    """Stabilisation only."""

    compensation: Compensation = field(default_factory=lambda: Compensation(alpha=0.0))
