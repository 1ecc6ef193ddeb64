"""CAPO: curvature-aware policy optimisation (arXiv 2510.00819; from a secondary source).

Tokens whose second-order prediction under the candidate step of the optimiser looks unstable are left out. The model is
the output layer alone, psi = W: with g = A (e_a - pi) h^T, H = -A (diag pi - pi pi^T) (x) h h^T and
F = (diag pi - pi pi^T) (x) h h^T, and d the step that Adam would take with the gradient of the whole update batch,

    m_H = g.d + d'Hd / 2 = A (dz_a - E dz) - A Var(dz) / 2        predicted change of A log pi(a)
    m_F = d'Fd / 2       = Var(dz) / 2                            predicted KL divergence

because d moves the logits by dz = d h / temperature; E and Var are under pi, and no matrix is formed. A token stays if

    low <= m_H <= high    and    m_F <= kl

The paper's thresholds are tuned by hand and not known to us. Ours reject about 5 % of the tokens in the first steps of
the default scale and below 2 % later, the shares that it reports (at most 8 %, later below 2 %).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.grpo import GRPO
from benchmark.head import Head
from benchmark.method import Change, Need, TokenCredit, Tokens


def curvature(head: Head, advantage: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """(m_H, m_F) of every token under a step (V, d) of the output layer, (T,) each."""
    own, mean, variance = head.shift(step)
    return advantage * (own - mean - variance / 2), variance / 2


@dataclass(frozen=True)
class CAPO(GRPO):
    """GRPO without tokens of extreme predicted change; a threshold of None is off, all three off is GRPO.

    Attributes:
        low, high: bounds of m_H. kl: bound of m_F, nats.
    """

    family: ClassVar[str] = "trust region"
    changes: ClassVar[tuple[Change, ...]] = ("token",)
    reference: ClassVar[str] = "2510.00819"
    faithful_to: ClassVar[str] = "a secondary source; the thresholds are ours"

    low: float | None = -0.005
    high: float | None = 0.01
    kl: float | None = 1e-4

    @property
    def needs(self) -> frozenset[Need]:
        """The output layer, unless every threshold is off."""
        return frozenset[Need]() if self.low is self.high is self.kl is None else frozenset[Need]({"head"})

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """A, 0 where the token is rejected, (T,)."""
        A = tokens.advantage
        if not self.needs:
            return TokenCredit(A)
        assert tokens.head is not None
        objective = torch.where(tokens.clipped, 0.0, A * tokens.ratio) / len(A)
        m_H, m_F = curvature(tokens.head, A, tokens.head.step(-tokens.head.gradient(objective)))
        rejected = torch.zeros_like(A, dtype=torch.bool)
        if self.low is not None:
            rejected |= m_H < self.low
        if self.high is not None:
            rejected |= m_H > self.high
        if self.kl is not None:
            rejected |= m_F > self.kl
        return TokenCredit(torch.where(rejected, 0.0, A))
