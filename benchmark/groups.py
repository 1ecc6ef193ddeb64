"""Ragged groups: every statistic of a group is a segment operation, so groups of size 0 and 1 are legal.

A batch of R rollouts over P prompts is flat: rollout i belongs to prompt ``prompt[i]``; nothing is ever reshaped to
(P, G), because allocation gives every prompt its own number of rollouts n_i.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmark.history import HistoryView


def segment_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum of `values` (R,) per segment; (size,). Empty segments are 0."""
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add_(0, index, values)


@dataclass(frozen=True)
class Groups:
    """The verified rollouts of one batch, as `keep` and `credit` see them.

    Attributes:
        prompt: (R,) int64, position of the rollout's prompt in the batch, 0 <= prompt < prompts.
        prompts: number of prompts P in the batch (some may have no rollouts).
        reward: (R,) float32, 1 for a correct answer and 0 otherwise.
        length: (R,) int64, generated tokens, end-of-sequence included.
        truncated: (R,) bool, stopped by the token limit.
        max_tokens: the token limit of a rollout.
        history: what `allocate` saw of the P prompts before these rollouts were drawn; by default prompts never seen.

    Raises:
        ValueError: `history` is of another number of prompts.
    """

    prompt: Tensor
    prompts: int
    reward: Tensor
    length: Tensor
    truncated: Tensor
    max_tokens: int
    history: HistoryView = field(default_factory=lambda: HistoryView.unseen(0))

    def __post_init__(self) -> None:
        if not len(self.history):
            object.__setattr__(self, "history", HistoryView.unseen(self.prompts))
        elif len(self.history) != self.prompts:
            raise ValueError(f"history of {len(self.history)} prompts for groups of {self.prompts}")

    @property
    def size(self) -> Tensor:
        """Rollouts per prompt n_i, (P,) float32."""
        return segment_sum(torch.ones_like(self.reward), self.prompt, self.prompts)

    def mean(self, values: Tensor) -> Tensor:
        """Group mean of per-rollout `values` (R,), shape (P,); 0 for an empty group."""
        return segment_sum(values, self.prompt, self.prompts) / self.size.clamp(min=1)

    def std(self, values: Tensor) -> Tensor:
        """Group standard deviation with n-1 (Bessel), shape (P,); 0 for groups of size 0 and 1."""
        centred = values - self.mean(values)[self.prompt]
        squares = segment_sum(centred * centred, self.prompt, self.prompts)
        return (squares / (self.size - 1).clamp(min=1)).sqrt()

    def centred(self, values: Tensor) -> Tensor:
        """`values` minus the mean of their group, (R,)."""
        return values - self.mean(values)[self.prompt]

    def mixed(self) -> Tensor:
        """(P,) bool: the group holds both right and wrong answers, so its advantages are not all zero."""
        correct = segment_sum(self.reward, self.prompt, self.prompts)
        return (correct > 0) & (correct < self.size)
