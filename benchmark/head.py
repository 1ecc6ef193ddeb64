"""The output layer at every token of an update batch, for methods that ask for it: exact last-layer quantities.

With hidden states h_t (d,) and the head W (V, d), logits are z_t = W h_t / temperature. Everything here runs over
chunks of rows, so that no (T, V) tensor of a large vocabulary exists, and counts its own FLOPs, which the ledger is
charged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.errors import InputError
from benchmark.rollouts import starts
from benchmark.scoring import LOGITS, chunk_rows, tempered


@dataclass
class Meter:
    """FLOPs spent on the head beyond the forward and backward pass of the loss."""

    flops: int = 0

    def __getstate__(self) -> None:
        """A pickled copy starts anew: reading a head does not change it."""


def no_optimiser(gradient: Tensor) -> Tensor:
    """The step of a head that no optimiser holds."""
    raise RuntimeError("this head has no optimiser: `step` is only known during an update")


@dataclass(frozen=True)
class Head:
    """Hidden states, head and sampled tokens; T tokens, V words, d hidden size. Detached where a method sees it.

    Attributes:
        hidden: (T, d). weight: (V, d). token: (T,) int64, the sampled ids.
        temperature: of the softmax.
        step: what the optimiser would add to `weight`, (V, d), if the gradient of the loss with respect to it were the
            argument, (V, d). Gradient clipping and weight decay are left out.
    """

    hidden: Tensor
    weight: Tensor
    token: Tensor
    temperature: float = 1.0
    step: Callable[[Tensor], Tensor] = no_optimiser
    meter: Meter = field(default_factory=Meter, compare=False)

    def __len__(self) -> int:
        return len(self.token)

    def __getitem__(self, rows: slice | Tensor) -> Head:
        """The same head at some of the tokens."""
        return replace(self, hidden=self.hidden[rows], token=self.token[rows])

    def detach(self) -> Head:
        """Without the graph."""
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach())

    @property
    def rows(self) -> list[slice]:
        """Consecutive chunks of tokens whose logits may exist at a time."""
        size = chunk_rows(len(self.weight))
        return [slice(begin, begin + size) for begin in range(0, len(self), size)]

    def logits(self, rows: slice) -> Tensor:
        """(t, V) float32 logits of a chunk, divided by the temperature."""
        logits = F.linear(self.hidden[rows], self.weight)
        self._count(len(logits))
        return tempered(logits, self.temperature)

    def log_probs(self) -> Iterator[tuple[slice, Tensor]]:
        """Chunks and their (t, V) log-probabilities."""
        for rows in self.rows:
            yield rows, F.log_softmax(self.logits(rows), dim=-1)

    def _scores(self) -> Iterator[tuple[slice, Tensor]]:
        """Chunks and d log pi(a) / d z = e_a - pi, (t, V)."""
        for rows, log_p in self.log_probs():
            score = -log_p.exp()
            yield rows, score.scatter_add_(1, self.token[rows, None], torch.ones_like(score[:, :1]))

    def gradient(self, outer: Tensor) -> Tensor:
        """sum_t outer_t d log pi(a_t) / d weight, (V, d); `outer` is (T,)."""
        total = torch.zeros_like(self.weight, dtype=torch.float32)
        for rows, score in self._scores():
            total += (score * outer[rows, None]).t() @ self.hidden[rows].float()
            self._count(len(score))
        return total / self.temperature

    def shift(self, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How a `step` (V, d) of the head moves the logits of every token: dz = step h / temperature.

        Returns:
            dz of the sampled token, and mean and variance of dz under pi, (T,) each.
        """
        result = torch.empty(3, len(self), device=self.token.device)
        for rows, log_p in self.log_probs():
            moved = F.linear(self.hidden[rows].float(), step) / self.temperature
            self._count(len(moved))
            p = log_p.exp()
            mean = torch.linalg.vecdot(p, moved)
            result[0, rows] = moved.gather(1, self.token[rows, None]).squeeze(1)
            result[1, rows] = mean
            result[2, rows] = torch.linalg.vecdot(p, (moved - mean[:, None]).square())
        return result[0], result[1], result[2]

    def score_norms(self, rollout: Tensor) -> Tensor:
        """Squared norm of the head's gradient of every rollout's log-likelihood, (R,), exactly.

        ||sum_t (e_a - pi)_t h_t^T||^2 = sum_{t, s} <(e_a - pi)_t, (e_a - pi)_s> <h_t, h_s>, with no gradient formed.

        Args:
            rollout: (T,) int64, non-decreasing from 0: the rollout of every token.
        """
        length = torch.bincount(rollout)
        begin = starts(length)
        norms = torch.zeros(len(length), device=rollout.device)
        size = max(1, LOGITS // (len(self.weight) * max(1, int(length.max()))))
        for first in range(0, len(length), size):
            some = length[first : first + size]
            column = torch.arange(int(some.max()), device=rollout.device)
            inside = column < some[:, None]
            part = self[torch.where(inside, begin[first : first + size, None] + column, 0).flatten()]
            score = torch.cat([score for _, score in part._scores()]).view(*inside.shape, -1) * inside[..., None]
            hidden = part.hidden.float().view(*inside.shape, -1)
            products = torch.bmm(score, score.transpose(1, 2)) * torch.bmm(hidden, hidden.transpose(1, 2))
            norms[first : first + size] = products.sum((1, 2))
            self.meter.flops += 2 * inside.numel() * len(column) * (score.shape[-1] + hidden.shape[-1])
        return norms / self.temperature**2

    def _count(self, tokens: int) -> None:
        self.meter.flops += 2 * tokens * self.weight.numel()


def adam_step(optimiser: torch.optim.AdamW, parameter: Tensor, learning_rate: float, gradient: Tensor) -> Tensor:
    """`Head.step` of AdamW: the candidate step -lr m' / (sqrt(v') + eps), with the moments m', v' after the gradient.

    Raises:
        InputError: the optimiser does not train `parameter`.
    """
    found = [group for group in optimiser.param_groups if any(p is parameter for p in group["params"])]
    if not found:
        raise InputError(
            "the method predicts steps of the output layer, which is frozen here",
            key="policy.lora",
            remedy="Train all weights, or leave the method out",
        )
    (first, second), eps = found[0]["betas"], float(found[0]["eps"])
    state = optimiser.state.get(parameter, {})
    count = float(state["step"]) + 1 if state else 1.0
    m, v = (1 - first) * gradient, (1 - second) * gradient.square()
    if state:
        m, v = m + first * state["exp_avg"], v + second * state["exp_avg_sq"]
    step: Tensor = -learning_rate * (m / (1 - first**count)) / ((v / (1 - second**count)).sqrt() + eps)
    return step
