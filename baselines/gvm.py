"""GVM: rollouts by success rate and gradient norm, both estimated by pre-sampling (arXiv 2505.02391, released code).

    n_i = B w_i / sum_k w_k,    w_i = G_i / sqrt(p_i + alpha / p_i^(beta - 1)),    w_i = 0 where p_i = 0 or G_i = 0

p_i is the share of a probe's rollouts that is right, G_i the mean norm of grad log pi over those, with respect to the
token embedding. Whole numbers by largest remainders; uniform where every w_i is 0. Without G, w peaks at
p = sqrt(alpha) for beta = 2: hard prompts are fed, since the estimator behind it rejects wrong rollouts.

`GVM` trains as GRPO does. `GVMRAFT` is RAFT++ (arXiv 2504.11343): right rollouts with advantage 1 and clipped ratios;
wrong ones do not train. The released code probes once for about ten updates; here every batch is probed, and charged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from baselines.grpo import GRPO
from benchmark.groups import Groups
from benchmark.history import HistoryView
from benchmark.method import Change, Probe
from methods.allocation import Ints
from methods.objectives import gvm_weight
from methods.proportional import proportional


@dataclass(frozen=True)
class GVM(GRPO):
    """GVM's allocation under GRPO's advantage and loss.

    Attributes:
        rollouts: of the probe, for every prompt. alpha, beta: of w.
    """

    family: ClassVar[str] = "allocation"
    changes: ClassVar[tuple[Change, ...]] = ("allocation",)
    reference: ClassVar[str] = "2505.02391"
    faithful_to: ClassVar[str] = "the released code; a probe for every batch, no KL term, prompts weigh by n_i"

    rollouts: int = 8
    alpha: float = 1e-3
    beta: float = 2.0

    @property
    def probe(self) -> Probe:
        """Pre-sampling with gradient norms of the embedding."""
        return Probe(self.rollouts, gradients="embedding")

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> Ints:
        """n_i in proportion to w_i, (P,) int64; uniform without a probe."""
        p = history.probe_successes / np.maximum(history.probe_trials, 1)
        w = gvm_weight(p, history.probe_norm[:, 1], self.alpha, self.beta)
        return proportional(w, budget) if w.any() else super().allocate(history, budget, rng)


@dataclass(frozen=True)
class GVMRAFT(GVM):
    """GVM's allocation under RAFT++: only right rollouts train, all with advantage 1."""

    changes: ClassVar[tuple[Change, ...]] = ("allocation", "selection", "advantage")
    faithful_to: ClassVar[str] = "the released code's plusplus form; a probe for every batch, prompts weigh by n_i"

    def credit(self, groups: Groups) -> Tensor:
        """The reward, (R,)."""
        return groups.reward

    def keep_rollouts(self, groups: Groups) -> Tensor:
        """The right ones, (R,) bool."""
        return groups.reward > 0
