"""Entropy loss: GRPO plus an entropy bonus, the textbook regulariser (for instance arXiv 1602.01783).

    L = L_GRPO - coefficient * mean entropy

The DynaMO paper does not state its coefficient; published RLVR runs use 1e-4 to 1e-3 (Reinforce-Ada: 1e-4).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from baselines.grpo import GRPO
from benchmark.method import Change, Loss


@dataclass(frozen=True)
class EntropyLoss(GRPO):
    """GRPO with an entropy bonus of coefficient 1e-3."""

    family: ClassVar[str] = "entropy"
    changes: ClassVar[tuple[Change, ...]] = ("loss",)
    reference: ClassVar[str] = "1602.01783"
    faithful_to: ClassVar[str] = "exact entropy with gradient; the coefficient is ours, within the published range"

    loss: Loss = field(default_factory=lambda: Loss(entropy_coefficient=1e-3))
