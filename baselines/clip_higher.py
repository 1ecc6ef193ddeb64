"""Clip-Higher: a wider upper clip range (the first part of DAPO, arXiv 2503.14476).

    r in [1 - clip_low, 1 + clip_high] with clip_low = 0.2, clip_high = 0.28

Low-probability tokens with positive advantage may grow further in one batch, which slows the loss of entropy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from baselines.grpo import GRPO
from benchmark.method import Change, Loss


@dataclass(frozen=True)
class ClipHigher(GRPO):
    """GRPO with clip range 0.2 / 0.28."""

    family: ClassVar[str] = "trust region"
    changes: ClassVar[tuple[Change, ...]] = ("loss",)
    reference: ClassVar[str] = "2503.14476"
    faithful_to: ClassVar[str] = "the paper's clip range"

    loss: Loss = field(default_factory=lambda: Loss(clip_high=0.28))
