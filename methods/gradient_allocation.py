"""DynaMO with an allocation of our own: rollouts where the *gradient's* variance is expected, not the outcome's.

    s_i = E[sqrt(p_i (1 - p_i))] sqrt(L_i^a H_i^b)      p_i ~ Beta(prior + successes, prior + failures)
    n_i   minimises sum_i s_i^2 / n_i at the batch's budget, within bounds

The variance of prompt i's policy gradient under A = r - mean(r) is p q^2 E|G_c|^2 + p^2 q E|G_w|^2 - |E A G|^2 for the
score functions G of its right and wrong rollouts. p (1 - p) leaves their size out, and that varies between prompts at
least as much: G sums one term a token, each larger the less certain the token is. L_i is the mean length of the
prompt's remembered rollouts in tokens, H_i their mean entropy in nats, estimated by -log pi of what was sampled; both
come with every rollout, so nothing is charged for them. Both are shrunk towards the batch: `strength` rollouts of the
batch's mean are added to the prompt's own.

a = 1 and b = 1/2 are fitted to the gradients of the small scale, not derived; docs/variance.md says how much of the
oracle's reduction they reach. a = b = 0 is `dynamo_allocation` bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from benchmark.history import HistoryView
from benchmark.method import Change
from methods.allocation import Floats
from methods.dynamo import DynaMOAllocation
from methods.neyman import NeymanAllocation


def shrunk_mean(total: Floats, trials: Floats, strength: float) -> Floats:
    """(total_i + strength m) / (trials_i + strength) with the batch's mean m per rollout, (P,).

    All 1 before any rollout; m for a prompt without rollouts.
    """
    mean = total.sum() / trials.sum() if trials.any() else 1.0
    weight = trials + strength
    shrunk: Floats = np.where(weight > 0, (total + strength * mean) / np.where(weight > 0, weight, 1.0), mean)
    return shrunk if trials.any() else np.ones_like(total)


@dataclass(frozen=True)
class GradientAllocation(NeymanAllocation):
    """Neyman allocation with the expected standard deviation of a prompt's gradient in the place of its outcome's.

    Attributes:
        length_exponent, entropy_exponent: a and b.
        strength: rollouts of the batch's mean that are added to a prompt's own length and entropy.
    """

    length_exponent: float = 1.0
    entropy_exponent: float = 0.5
    strength: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.length_exponent, self.entropy_exponent, self.strength) < 0:
            raise ValueError(
                f"length_exponent = {self.length_exponent}, entropy_exponent = {self.entropy_exponent}, "
                f"strength = {self.strength}: none may be negative"
            )

    def deviations(self, history: HistoryView) -> Floats:
        """s_i of every prompt, (P,); in units of the batch's mean gradient, which the allocation does not see."""
        length = shrunk_mean(history.tokens, history.trials, self.strength)
        entropy = shrunk_mean(history.surprisal, history.trials, self.strength)
        # Where the policy is certain of all it says, entropy tells prompts apart no longer.
        size = length**self.length_exponent * np.maximum(entropy, 1e-6) ** self.entropy_exponent
        result: Floats = super().deviations(history) * np.sqrt(size)
        return result


@dataclass(frozen=True)
class DynaMOGradient(DynaMOAllocation):
    """DynaMO's allocation by the expected variance of the gradient."""

    reference: ClassVar[str] = ""
    changes: ClassVar[tuple[Change, ...]] = ("allocation", "loss")
    faithful_to: ClassVar[str] = "our own; DynaMO's allocation with length and entropy in the weight"

    allocation: NeymanAllocation = field(default_factory=GradientAllocation)
