"""DPPO: a trust region by divergence in place of a clipped ratio (arXiv 2602.04879).

    L_t = -A_t sg(min(r_t, truncation)) M_t log pi_t
    M_t = 0 where the step leads further away: A > 0, pi > mu and D > delta, or A < 0, pi < mu and D > delta; else 1

mu is the policy that sampled, by the log-probabilities that the sampler told, in r = pi / mu, in the direction and in D
(it says the anchor is essential); no importance weight of the update comes on top. `recompute` is the released code's
ablation: D and the direction start from the trainer's log-probabilities under the same weights, r from mu as before.
The two differ where the backend is not exact (vLLM, bfloat16 passes). D is the divergence of the sampled token against
all others:

    binary TV:  |pi - mu|                                               delta 0.15
    binary KL:  mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi))     delta 0.05

With `top_k` the other tokens are not one: D is the divergence over the k most probable tokens of mu, the sampled token
and the rest of both policies, 1/2 sum |pi - mu| or KL(mu || pi). k = 0 is binary, k = V the whole vocabulary. A large
system ships k ids and probabilities with every rollout; here the trainer computes mu's output layer once more for the
batch, one forward pass, charged. Where the backend is not exact, D is then that of `recompute`; r and the direction are
not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from baselines.grpo import GRPO
from benchmark.method import Anchor, Change, Loss, Need, TokenCredit, Tokens


@dataclass(frozen=True)
class DPPOTV(GRPO):
    """Total variation of the sampled token against the rest."""

    family: ClassVar[str] = "trust region"
    changes: ClassVar[tuple[Change, ...]] = ("loss", "token")
    reference: ClassVar[str] = "2602.04879"
    faithful_to: ClassVar[str] = "the released code's dppo_tv"
    anchor: ClassVar[Anchor] = "rollout"

    loss: Loss = field(default_factory=lambda: Loss(surrogate="log_likelihood"))
    delta: float = 0.15
    truncation: float = 20.0
    top_k: int | None = None
    recompute: bool = False

    @property
    def needs(self) -> frozenset[Need]:
        """Both output layers for more than the sampled token."""
        return frozenset[Need](() if self.top_k is None else {"head", "rollout_head"})

    def divergence(self, pi: Tensor, mu: Tensor) -> Tensor:
        """|pi - mu|, (T,)."""
        return (pi - mu).abs()

    def over_buckets(self, pi: Tensor, mu: Tensor) -> Tensor:
        """1/2 sum |pi - mu| over the last dimension."""
        return (pi - mu).abs().sum(-1) / 2

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """A min(r, truncation), 0 outside the trust region, (T,)."""
        log_mu = tokens.old_log_prob if self.recompute else tokens.rollout_log_prob
        pi, mu, A = tokens.log_prob.exp(), log_mu.exp(), tokens.advantage
        away = ((A > 0) & (pi > mu)) | ((A < 0) & (pi < mu))
        far = self.divergence(pi, mu) if self.top_k is None else self._top_k(tokens, self.top_k)
        outside = away & (far > self.delta)
        r = torch.exp(tokens.log_prob - tokens.rollout_log_prob)
        return TokenCredit(torch.where(outside, 0.0, A * r.clamp(max=self.truncation)))

    def _top_k(self, tokens: Tokens, k: int) -> Tensor:
        """Divergence over k tokens of mu, the sampled one and the rest, (T,)."""
        assert tokens.head is not None
        assert tokens.rollout_head is not None
        D = torch.empty_like(tokens.log_prob)
        for (rows, log_pi), (_, log_mu) in zip(tokens.head.log_probs(), tokens.rollout_head.log_probs(), strict=True):
            inside = torch.zeros_like(log_mu, dtype=torch.bool)
            inside.scatter_(1, log_mu.topk(min(k, log_mu.shape[1])).indices, True)
            inside.scatter_(1, tokens.head.token[rows, None], True)
            pi, mu = (_with_rest(log_p.exp(), inside) for log_p in (log_pi, log_mu))
            D[rows] = self.over_buckets(pi, mu)
        return D


def _with_rest(p: Tensor, inside: Tensor) -> Tensor:
    """Probabilities inside, 0 elsewhere, and one more column for the rest; (t, V + 1)."""
    return torch.cat([torch.where(inside, p, 0.0), torch.where(inside, 0.0, p).sum(-1, keepdim=True)], dim=-1)


@dataclass(frozen=True)
class DPPOKL(DPPOTV):
    """KL divergence of the sampled token against the rest."""

    faithful_to: ClassVar[str] = "the released code's dppo_kl"

    delta: float = 0.05

    def divergence(self, pi: Tensor, mu: Tensor) -> Tensor:
        """mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)), (T,); 0 log 0 = 0."""
        tiny = torch.finfo(pi.dtype).tiny
        own = torch.xlogy(mu, mu / pi.clamp(min=tiny))
        return own + torch.xlogy(1 - mu, (1 - mu) / (1 - pi).clamp(min=torch.finfo(pi.dtype).eps))

    def over_buckets(self, pi: Tensor, mu: Tensor) -> Tensor:
        """sum mu log(mu / pi) over the last dimension; 0 log 0 = 0."""
        return torch.xlogy(mu, mu / pi.clamp(min=torch.finfo(pi.dtype).tiny)).sum(-1)
