"""Scans along each rollout of a flat update batch: a padded view and back, no loop over tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(rollout: Tensor) -> Tensor:
    """Place of each token in its rollout, 0 .. L - 1, (T,) int64; `rollout` (T,) ascending."""
    length = torch.bincount(rollout)
    return torch.arange(len(rollout), device=rollout.device) - (length.cumsum(0) - length)[rollout]


def pad(values: Tensor, rollout: Tensor, fill: float = 0.0) -> Tensor:
    """`values` (T,) as (rollouts, longest), `fill` behind the end of a rollout."""
    length = torch.bincount(rollout)
    table = values.new_full((len(length), int(length.max())), fill)
    table[rollout, positions(rollout)] = values
    return table


def unpad(table: Tensor, rollout: Tensor) -> Tensor:
    """Back from (rollouts, longest) to (T,)."""
    return table[rollout, positions(rollout)]
