"""VIP: rollouts by the variance that a Gaussian process predicts from prompt embeddings (arXiv 2602.01601).

    minimise sum_i v(n_i) p_i (1 - p_i),   v(n) = 1 / (n - 1) (RLOO) or (n - 1) / n^2 (Dr. GRPO),   n_i in [L, U]

    z_i = logit of prompt i's success rate ~ GP(mean, RBF kernel on embeddings),    p_i = sigmoid(E z_i)

The process is conditioned on every prompt with rollouts, by (k + 1/2) / (n + 1) on the logit scale, where its variance
is 1 / (k + 1/2) + 1 / (n - k + 1/2). No official code; from a secondary source: the embedding is the mean last hidden
state of the policy before RL instead of MiniLM's, the length scale the median distance, `amplitude` and `memory` ours.
Optima are exact in integers. Both variances are of a prompt's mean, so prompts weigh the same in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from scipy.spatial.distance import pdist
from scipy.special import expit
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from torch import Tensor

from baselines.rloo import RLOO
from benchmark.groups import Groups
from benchmark.history import HistoryView
from benchmark.method import Change, Loss
from methods.allocation import Floats, Ints, bounds, min_variance_allocation
from methods.separable import best_values


def predicted(view: HistoryView, amplitude: float) -> Floats:
    """p_i of the prompts of `view` from the rollouts of all prompts, (P,); 1/2 before any rollout."""
    whole = view.everyone
    seen = whole.trials > 0
    if not seen.any():
        return np.full(len(view), 0.5)
    right, wrong = whole.successes[seen] + 0.5, (whole.trials - whole.successes)[seen] + 0.5
    z = np.log(right / wrong)
    known = whole.features[seen]
    length = np.median(pdist(known)) if len(known) > 1 else 0.0
    kernel = ConstantKernel(amplitude**2) * RBF(length or 1.0)
    process = GaussianProcessRegressor(kernel, alpha=1 / right + 1 / wrong, optimizer=None)
    mean = z.mean()
    rates: Floats = expit(mean + process.fit(known, z - mean).predict(view.features))
    return rates


@dataclass(frozen=True)
class VIP(RLOO):
    """Allocation by predicted outcome variance.

    Attributes:
        form: the estimator whose variance is minimised, and the advantage. n_low, n_high: L and U.
        amplitude: prior standard deviation of z. memory: visits after which an outcome counts half.
    """

    family: ClassVar[str] = "allocation"
    changes: ClassVar[tuple[Change, ...]] = ("allocation", "advantage", "loss")
    reference: ClassVar[str] = "2602.01601"
    faithful_to: ClassVar[str] = "a secondary source's equations; embedding and hyperparameters of the GP are ours"

    loss: Loss = field(default_factory=lambda: Loss(prompt_weight="equal"))
    form: Literal["rloo", "dr_grpo"] = "rloo"
    n_low: int | None = None
    n_high: int | None = None
    amplitude: float = 1.5
    memory: float | None = 4.0

    @property
    def features(self) -> bool:
        """Embeddings of the prompts."""
        return True

    @property
    def half_life(self) -> float | None:
        """Visits after which an outcome counts half: the policy moves."""
        return self.memory

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> Ints:
        """n_i, (P,) int64; where there are fewer than two rollouts a prompt, those of least sum p (1 - p) / n."""
        p = predicted(history, self.amplitude)
        low, high = bounds(len(p), budget, self.n_low, self.n_high)
        s = np.sqrt(p * (1 - p))
        if max(low, 2) * len(p) > budget:
            return min_variance_allocation(s, budget, low, high)
        low = max(low, 2)
        if self.form == "rloo":
            return 1 + min_variance_allocation(s, budget - len(p), low - 1, high - 1)
        n = np.arange(low, high + 1)
        return low + best_values(-(n - 1) / n**2 * (s**2)[:, None], budget - low * len(p))

    def credit(self, groups: Groups) -> Tensor:
        """RLOO's or Dr. GRPO's advantage, (R,)."""
        return super().credit(groups) if self.form == "rloo" else groups.centred(groups.reward)
