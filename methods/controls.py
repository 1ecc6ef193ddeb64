"""Controls of DynaMO (arXiv 2602.19208): each changes one part of it and leaves what could explain its effect.

s_i, its bounds and its Beta posterior are those of `methods.neyman`; beta_comp and beta_stab those of
`methods.modulation`. What a control does not name is as in the class it derives from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from baselines.dr_grpo import DrGRPO
from baselines.rloo import RLOO
from benchmark.groups import Groups
from benchmark.history import HistoryView
from benchmark.method import Change, Kind, Probe, TokenCredit, Tokens
from methods.allocation import Ints, min_variance_allocation
from methods.dynamo import DynaMO, DynaMOAllocation


@dataclass(frozen=True)
class ConstantBoost(DynaMO):
    """DynaMO with the same boost for every token of a correct answer: is it the entropy, or the larger step?

    beta_comp = mean of DynaMO's beta_comp over the tokens of the update batch with A > 0   where A > 0, else 1
    """

    kind: ClassVar[Kind] = "control"
    faithful_to: ClassVar[str] = "control: a constant boost of the compensation's mean"

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """A * constant * beta_stab, (T,)."""
        positive = tokens.advantage > 0
        mean = torch.where(positive, self.compensation(tokens), 0.0).sum() / positive.sum().clamp(min=1)
        return TokenCredit(tokens.advantage * torch.where(positive, mean, 1.0) * self.stabilisation(tokens))


@dataclass(frozen=True)
class ShuffledAllocation(DynaMOAllocation):
    """DynaMO's rollouts per prompt given to the wrong prompts: is it who gets them, or that groups differ in size?

    n = random permutation of Neyman's n over the prompts of the draw
    """

    kind: ClassVar[Kind] = "control"
    faithful_to: ClassVar[str] = "control: the allocation's histogram, permuted"

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> Ints:
        """A permutation of the parent's allocation, (P,) int64."""
        return rng.permutation(super().allocate(history, budget, rng))


@dataclass(frozen=True)
class OracleAllocation(DynaMOAllocation):
    """An oracle, not a method: Neyman's allocation with success rates that nobody can know for free.

    s_i = sqrt(p_i (1 - p_i)),    p_i: success rate of `rollouts` fresh rollouts of the current policy, uncharged
    """

    kind: ClassVar[Kind] = "control"
    faithful_to: ClassVar[str] = "oracle: free knowledge of p bounds what allocation can gain"

    rollouts: int = 64

    def __post_init__(self) -> None:
        Probe(self.rollouts)  # refuses fewer than one

    @property
    def probe(self) -> Probe:
        """The rollouts behind p, free of charge."""
        return Probe(self.rollouts, charged=False)

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> Ints:
        """Neyman's allocation of the probe's s within the parent's bounds, (P,) int64."""
        if not self.allocation.enabled:
            return super().allocate(history, budget, rng)
        p = history.probe_successes / np.maximum(history.probe_trials, 1)
        low, high = self.allocation.bounds(len(p), budget)
        return min_variance_allocation(np.sqrt(p * (1 - p)), budget, low, high)


@dataclass(frozen=True)
class Advantage(DynaMOAllocation):
    """DynaMO's allocation under another advantage: the law n_i ~ sqrt(p (1 - p)) holds for advantages without std.

    std:  (r - mean) / (std + epsilon), as in the parent        mean: r - mean        rloo: (r - mean) n / (n - 1)
    """

    kind: ClassVar[Kind] = "control"
    changes: ClassVar[tuple[Change, ...]] = ("allocation", "advantage", "loss")
    faithful_to: ClassVar[str] = "control: the allocation under the advantages of grpo, dr_grpo and rloo"

    advantage: Literal["std", "mean", "rloo"] = "mean"

    def credit(self, groups: Groups) -> Tensor:
        """The advantage named, (R,)."""
        if self.advantage == "std":
            return super().credit(groups)
        return (RLOO() if self.advantage == "rloo" else DrGRPO()).credit(groups)
