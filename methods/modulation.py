"""DynaMO's token-level advantage modulation (arXiv 2602.19208).

    A' = A * beta_comp * beta_stab

Both factors are normalised over the whole update batch, so packing into micro-batches changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmark.method import Tokens


def entropy_change(tokens: Tokens) -> Tensor:
    """First-order entropy change of a token's own softmax per unit step, (T,) (equation 29, exact expectation).

    dH = -xi (pi_a Lambda_a - E_{b ~ pi}[pi_b Lambda_b]),   Lambda = log pi + H,   xi = I_clip r A
    E_{b ~ pi}[pi_b Lambda_b] = sum_b pi_b^2 log pi_b + H sum_b pi_b^2
    """
    xi = torch.where(tokens.clipped, 0.0, tokens.ratio * tokens.advantage)
    own = tokens.log_prob.exp() * (tokens.log_prob + tokens.entropy)
    return -xi * (own - (tokens.sum_p2_log_p + tokens.entropy * tokens.sum_p2))


@dataclass(frozen=True)
class Compensation:
    """Boost confident correct tokens, whose softmax gradient vanishes.

        beta_comp = 1 + alpha (H_max - H) / (H_max - H_min)  where A > 0, else 1

    A batch whose tokens all have the same entropy is left alone. alpha = 0 is off; 0.2 is the released setting.
    """

    alpha: float = 0.2

    def __call__(self, tokens: Tokens) -> Tensor:
        """Factors, (T,)."""
        low, high = tokens.entropy.min(), tokens.entropy.max()
        share = (high - tokens.entropy) / torch.where(high > low, high - low, torch.inf)
        return torch.where(tokens.advantage > 0, 1 + self.alpha * share, 1.0)


@dataclass(frozen=True)
class Stabilisation:
    """Shrink tokens with a very large predicted entropy change.

        beta_stab = floor + (1 - floor) sigmoid(-slope (x - centre)),   x = |dH| / max |dH|

    floor = 1 is off; 0.6, 50 and 0.99 are the released setting ("decay6").
    """

    floor: float = 0.6
    slope: float = 50.0
    centre: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor = {self.floor} is outside [0, 1]")

    def __call__(self, tokens: Tokens) -> Tensor:
        """Factors in [floor, 1], (T,)."""
        change = entropy_change(tokens).abs()
        x = change / change.max().clamp(min=torch.finfo(change.dtype).tiny)
        return self.floor + (1 - self.floor) * torch.sigmoid(-self.slope * (x - self.centre))
