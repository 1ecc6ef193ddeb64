"""DAPO: decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476), all four parts.

1. Clip-Higher: clip range 0.2 / 0.28.
2. Dynamic sampling: groups whose answers are all right or all wrong are dropped, and further batches are drawn until
   a full batch of mixed groups is there (at most `max_generation_batches`). Everything drawn is charged.
3. Token-mean loss.
4. Overlong shaping: with L the answer's length, a buffer b = buffer_fraction * max_tokens and a factor f,

       penalty = clip(-(L - (max_tokens - b)) / b * f, -f, 0)

The paper's buffer is 4,096 of 20,480 tokens. With `filter_groups` off, equal clips and f = 0 this is GRPO.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from baselines.grpo import GRPO, normalised
from benchmark.groups import Groups
from benchmark.method import Change, Loss


@dataclass(frozen=True)
class DAPO(GRPO):
    """Clip-Higher, dynamic sampling, token-mean loss and overlong shaping."""

    family: ClassVar[str] = "dynamic sampling"
    changes: ClassVar[tuple[Change, ...]] = ("selection", "advantage", "loss")
    reference: ClassVar[str] = "2503.14476"
    faithful_to: ClassVar[str] = "the paper and verl's recipe; the buffer scales with the token limit"

    loss: Loss = field(default_factory=lambda: Loss(clip_high=0.28))
    filter_groups: bool = True
    max_generation_batches: int = 10
    buffer_fraction: float = 0.2
    overlong_factor: float = 1.0

    @property
    def max_draws(self) -> int:
        """Generation batches of a step: one where nothing is filtered."""
        return self.max_generation_batches if self.filter_groups else 1

    def keep(self, groups: Groups) -> Tensor:
        """Groups with at least one right and one wrong answer, (P,) bool."""
        return groups.mixed() if self.filter_groups else super().keep(groups)

    def credit(self, groups: Groups) -> Tensor:
        """GRPO's advantage of the shaped reward, (R,)."""
        if not self.overlong_factor:
            return super().credit(groups)
        buffer = self.buffer_fraction * groups.max_tokens
        excess = (groups.length - (groups.max_tokens - buffer)) / buffer
        penalty = (-excess * self.overlong_factor).clamp(min=-self.overlong_factor, max=0.0)
        return normalised(groups, groups.reward + penalty, self.epsilon)
