"""A batch of rollouts, ragged from the start: flat token tensors and lengths, never (prompts, G, time)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


def starts(lengths: Tensor) -> Tensor:
    """Offset of each row in the flat tensor, (N,) int64."""
    return torch.cumsum(lengths, 0) - lengths


def ragged_index(rows: Tensor, lengths: Tensor) -> Tensor:
    """Flat positions of the chosen `rows` of a ragged tensor, in the order given; (sum lengths[rows],)."""
    chosen = lengths[rows]
    begin = torch.repeat_interleave(starts(lengths)[rows] - starts(chosen), chosen)
    return begin + torch.arange(int(chosen.sum()), device=lengths.device)


@dataclass(frozen=True)
class Rollouts:
    """R rollouts of P prompts with T generated tokens in all.

    Attributes:
        prompt_tokens: flat prompt token ids, (sum prompt_length,) int64.
        prompt_length: (P,) int64.
        prompt: (R,) int64, the prompt of each rollout; non-decreasing.
        tokens: (T,) int64 generated ids, end-of-sequence included where it was reached.
        length: (R,) int64, generated tokens per rollout, >= 1.
        log_prob: (T,) float32, log-probability of each generated token under the policy that sampled it.
        finished: (R,) bool, ended by a token that ends rollouts (else cut by the token limit).
    """

    prompt_tokens: Tensor
    prompt_length: Tensor
    prompt: Tensor
    tokens: Tensor
    length: Tensor
    log_prob: Tensor
    finished: Tensor

    @property
    def prompts(self) -> int:
        """Number of prompts P."""
        return len(self.prompt_length)

    def __len__(self) -> int:
        return len(self.length)

    @classmethod
    def none(cls, prompts: list[Tensor]) -> Rollouts:
        """No rollout of the `prompts`."""
        empty, length = torch.zeros(0, dtype=torch.int64), torch.tensor([len(p) for p in prompts], dtype=torch.int64)
        read = torch.cat([empty, *(prompt.cpu() for prompt in prompts)])
        return cls(read, length, empty, empty, empty, torch.zeros(0), torch.zeros(0, dtype=torch.bool))

    def to(self, device: torch.device) -> Rollouts:
        """The same on `device`."""
        return Rollouts(*(getattr(self, field.name).to(device) for field in fields(self)))

    def select_prompts(self, prompts: Tensor) -> Rollouts:
        """The groups of the given prompts (int64, distinct), renumbered 0.. in that order."""
        rows = torch.cat([torch.nonzero(self.prompt == p).flatten() for p in prompts.tolist()] or [self.prompt[:0]])
        number = torch.full((self.prompts,), -1, dtype=torch.int64, device=self.prompt.device)
        number[prompts] = torch.arange(len(prompts), device=prompts.device)
        flat = ragged_index(rows, self.length)
        return replace(
            self,
            prompt_tokens=self.prompt_tokens[ragged_index(prompts, self.prompt_length)],
            prompt_length=self.prompt_length[prompts],
            prompt=number[self.prompt[rows]],
            tokens=self.tokens[flat],
            length=self.length[rows],
            log_prob=self.log_prob[flat],
            finished=self.finished[rows],
        )

    def select_rows(self, rows: Tensor) -> Rollouts:
        """Some rollouts (int64, ascending); every prompt stays, if need be without one."""
        flat = ragged_index(rows, self.length)
        return replace(
            self,
            prompt=self.prompt[rows],
            tokens=self.tokens[flat],
            length=self.length[rows],
            log_prob=self.log_prob[flat],
            finished=self.finished[rows],
        )

    def rows_of(self, prompts: Tensor) -> Tensor:
        """Rollout numbers of the groups of `prompts`, in the order `select_prompts` keeps them."""
        return torch.cat([torch.nonzero(self.prompt == p).flatten() for p in prompts.tolist()] or [self.prompt[:0]])

    def ungrouped(self, rows: Tensor) -> Rollouts:
        """Some rollouts (int64) in that order, each with its own copy of its prompt."""
        prompts, flat = self.prompt[rows], ragged_index(rows, self.length)
        return replace(
            self,
            prompt_tokens=self.prompt_tokens[ragged_index(prompts, self.prompt_length)],
            prompt_length=self.prompt_length[prompts],
            prompt=torch.arange(len(rows), device=rows.device),
            tokens=self.tokens[flat],
            length=self.length[rows],
            log_prob=self.log_prob[flat],
            finished=self.finished[rows],
        )

    def texts(self) -> list[list[int]]:
        """Generated token ids per rollout."""
        return [piece.tolist() for piece in torch.split(self.tokens, self.length.tolist())]


def merge(first: Rollouts, second: Rollouts) -> tuple[Rollouts, Tensor]:
    """Two rounds of the same prompts as one batch, and the order (R,) its rollouts have in first + second."""
    order = torch.argsort(torch.cat([first.prompt, second.prompt]), stable=True)
    length = torch.cat([first.length, second.length])
    flat = ragged_index(order, length)
    joined = replace(
        first,
        prompt=torch.cat([first.prompt, second.prompt])[order],
        tokens=torch.cat([first.tokens, second.tokens])[flat],
        length=length[order],
        log_prob=torch.cat([first.log_prob, second.log_prob])[flat],
        finished=torch.cat([first.finished, second.finished])[order],
    )
    return joined, order


def concatenate(parts: list[Rollouts]) -> Rollouts:
    """Join batches of different prompts; prompts are renumbered in order."""
    offsets = torch.tensor([0, *(part.prompts for part in parts)]).cumsum(0).tolist()
    return Rollouts(
        prompt_tokens=torch.cat([part.prompt_tokens for part in parts]),
        prompt_length=torch.cat([part.prompt_length for part in parts]),
        prompt=torch.cat([part.prompt + offset for part, offset in zip(parts, offsets, strict=False)]),
        tokens=torch.cat([part.tokens for part in parts]),
        length=torch.cat([part.length for part in parts]),
        log_prob=torch.cat([part.log_prob for part in parts]),
        finished=torch.cat([part.finished for part in parts]),
    )
