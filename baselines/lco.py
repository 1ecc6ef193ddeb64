"""LCO: logits convex optimisation (arXiv 2603.00963; from the abstract and secondary sources).

The KL-regularised objective has the optimum pi* ~ pi_old exp(A / beta). A is known for the sampled token alone, so the
target moves its logit by A / beta and leaves the others. Instead of a policy gradient, the logits are drawn there by a
loss that is convex in them:

    z* = z_old + (A / beta) e_a
    mse:  1/2 sum_b (z_b - z*_b)^2
    lch:  sum_b log cosh(z_b - z*_b)
    kld:  KL(pi* || pi)

pi_old is the policy that sampled, over the whole vocabulary, as the trainer computes it: one more forward pass of the
batch, charged. beta is ours; sums over the vocabulary where a source may average: a factor that Adam takes out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.grpo import GRPO
from benchmark.method import Change, Loss, Need


@dataclass(frozen=True)
class LCO(GRPO):
    """GRPO's advantage as a target in logits; ``loss.surrogate = "clipped_ratio"`` is GRPO."""

    family: ClassVar[str] = "trust region"
    changes: ClassVar[tuple[Change, ...]] = ("loss",)
    reference: ClassVar[str] = "2603.00963"
    faithful_to: ClassVar[str] = "secondary sources: targets and three distances; beta is ours"

    loss: Loss = field(default_factory=lambda: Loss(surrogate="logits"))
    form: Literal["mse", "lch", "kld"] = "kld"
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta = {self.beta} must be above 0")

    @property
    def needs(self) -> frozenset[Need]:
        """Both output layers, unless the surrogate is another."""
        return frozenset[Need]({"head", "rollout_head"} if self.loss.surrogate == "logits" else ())

    def logit_loss(self, logits: Tensor, rollout_logits: Tensor, token: Tensor, advantage: Tensor) -> Tensor:
        """The distance of the logits to their target, (t,)."""
        shift = (advantage / self.beta)[:, None]
        target = rollout_logits.scatter_add(1, token[:, None], shift)
        gap = logits - target
        if self.form == "mse":
            return gap.square().sum(-1) / 2
        if self.form == "lch":  # log cosh x = |x| + log(1 + exp(-2 |x|)) - log 2, without overflow
            return (gap.abs() + F.softplus(-2 * gap.abs()) - math.log(2)).sum(-1)
        wanted = target.log_softmax(-1)
        return (wanted.exp() * (wanted - torch.log_softmax(logits, -1))).sum(-1)
