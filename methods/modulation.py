"""DynaMO's token-level advantage modulation (arXiv 2602.19208).

    A' = A * beta_comp * beta_stab

Both factors are normalised over the whole update batch, so packing into micro-batches changes nothing. The released
code normalises within each micro-batch instead (`Scope`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmark.method import Tokens

Expectation = Literal["exact", "sequence_mean"]
Scope = Literal["update_batch", "micro_batch"]


def entropy_change(tokens: Tokens, expectation: Expectation = "exact") -> Tensor:
    """First-order entropy change of a token's own softmax per unit step, (T,) (equation 29).

    dH = -xi (pi_a Lambda_a - E_{b ~ pi}[pi_b Lambda_b]),   Lambda = log pi + H,   xi = I_clip r A

    exact:          E_{b ~ pi}[pi_b Lambda_b] = sum_b pi_b^2 log pi_b + H sum_b pi_b^2
    sequence_mean:  in its place the mean of pi_a Lambda_a over the positions of the rollout, as released
    """
    xi = torch.where(tokens.clipped, 0.0, tokens.ratio * tokens.advantage)
    own = tokens.log_prob.exp() * (tokens.log_prob + tokens.entropy)
    if expectation == "exact":
        return -xi * (own - (tokens.sum_p2_log_p + tokens.entropy * tokens.sum_p2))
    length = torch.bincount(tokens.rollout)
    mean = torch.zeros_like(length, dtype=own.dtype).index_add_(0, tokens.rollout, own) / length.clamp(min=1)
    return -xi * (own - mean[tokens.rollout])


def micro_batches(rollout: Tensor) -> Tensor:
    """Which micro-batch each token is in, (T,) int64: rollouts in order, packed to at most the longest one's tokens.

    The released script's limit of tokens per micro-batch is that of one longest sequence; at this scale the longest
    rollout of the update batch stands for it.

    Args:
        rollout: (T,) int64, the token's rollout, ascending.
    """
    lengths = torch.bincount(rollout).tolist()
    limit, number, load, owner = max(lengths, default=0), 0, 0, []
    for length in lengths:
        if load and load + length > limit:
            number, load = number + 1, 0
        load += length
        owner.append(number)
    return torch.tensor(owner, dtype=torch.int64, device=rollout.device)[rollout]


def extremes(values: Tensor, rollout: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of `values` (T,) over the update batch (scalars) or each token's micro-batch (T,)."""
    if scope == "update_batch":
        return values.min(), values.max()
    index = micro_batches(rollout)
    empty = values.new_zeros(int(index.max()) + 1)
    low, high = (empty.scatter_reduce(0, index, values, how, include_self=False) for how in ("amin", "amax"))
    return low[index], high[index]


@dataclass(frozen=True)
class Compensation:
    """Boost confident correct tokens, whose softmax gradient vanishes.

        beta_comp = 1 + alpha (H_max - H) / (H_max - H_min)  where A > 0, else 1

    A batch whose tokens all have the same entropy is left alone. alpha = 0 is off; 0.2 is the setting of the released
    mode "decay6", 0.4 that of "decay5". `scope`: over which tokens H_min and H_max are taken.
    """

    alpha: float = 0.2
    scope: Scope = "update_batch"

    def __call__(self, tokens: Tokens) -> Tensor:
        """Factors, (T,)."""
        low, high = extremes(tokens.entropy, tokens.rollout, self.scope)
        share = (high - tokens.entropy) / torch.where(high > low, high - low, torch.inf)
        return torch.where(tokens.advantage > 0, 1 + self.alpha * share, 1.0)


@dataclass(frozen=True)
class Stabilisation:
    """Shrink tokens with a very large predicted entropy change.

        beta_stab = floor + (1 - floor) sigmoid(-slope (x - centre)),   x = |dH| / max |dH|

    floor = 1 is off; 0.6, 50 and 0.99 are the setting of the released mode "decay6", 0.6, 50 and 0.9 that of "decay5".
    `expectation` is that of equation 29; `scope`: over which tokens max |dH| is taken.
    """

    floor: float = 0.6
    slope: float = 50.0
    centre: float = 0.99
    expectation: Expectation = "exact"
    scope: Scope = "update_batch"

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor = {self.floor} is outside [0, 1]")

    def __call__(self, tokens: Tokens) -> Tensor:
        """Factors in [floor, 1], (T,)."""
        change = entropy_change(tokens, self.expectation).abs()
        _, largest = extremes(change, tokens.rollout, self.scope)
        x = change / largest.clamp(min=torch.finfo(change.dtype).tiny)
        return self.floor + (1 - self.floor) * torch.sigmoid(-self.slope * (x - self.centre))
