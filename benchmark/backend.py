"""Where rollouts come from and how tokens are scored: one small interface, the same methods and updates behind it.

- `load_weights`: from now on sample from the policy as it is.
- `generate`: ragged groups with the log-probability of every sampled token and the reason each rollout ended.
- `score`: the training forward; `split` cuts an update batch into passes that fit in memory.
- `usage`: tokens and seconds so far.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark import ranks, streams
from benchmark.config_model import BackendConfig
from benchmark.decode import generate
from benchmark.numerics import check_sampled
from benchmark.policy import Policy
from benchmark.rollouts import Rollouts, concatenate, ragged_index
from benchmark.scoring import TokenStatistics, states, vocabulary_statistics
from benchmark.transformer import Weights


@dataclass(frozen=True)
class Piece:
    """Part of an update batch that is passed at a time.

    Attributes:
        rollouts: its rollouts. place: where their tokens are in the batch, flat.
    """

    rollouts: Rollouts
    place: slice | Tensor

    @property
    def cost(self) -> int:
        """Tokens to pass, prompts included."""
        return len(self.rollouts.tokens) + len(self.rollouts.prompt_tokens)


@dataclass(frozen=True)
class Request:
    """What to sample.

    Attributes:
        prompts: token ids of each prompt, on the policy's device. counts: (P,) rollouts of each, R in all.
        keys, lanes: (R,) name the random stream of each rollout (`benchmark.streams.uniforms`).
        max_tokens: token limit of a rollout. temperature: of the softmax; its log-probabilities are those returned.
    """

    prompts: list[Tensor]
    counts: NDArray[np.int64]
    keys: NDArray[np.uint64]
    lanes: NDArray[np.int64]
    max_tokens: int
    temperature: float

    def part(self, first: int, last: int) -> Request:
        """What it asks for the prompts `first` to `last`."""
        ends = np.concatenate([[0], np.cumsum(self.counts)])
        rows, prompts = slice(ends[first], ends[last]), slice(first, last)
        return replace(
            self,
            prompts=self.prompts[prompts],
            counts=self.counts[prompts],
            keys=self.keys[rows],
            lanes=self.lanes[rows],
        )

    def uniforms(self, device: torch.device) -> Tensor:
        """(R, max_tokens) float32 in [0, 1), one draw per token of each rollout."""
        return torch.from_numpy(streams.uniforms(self.keys, self.lanes, self.max_tokens)).float().to(device)


@dataclass
class Usage:
    """What `generate` has done so far; a shared prompt counts once a request."""

    requests: int = 0
    prompt_tokens: int = 0
    tokens_generated: int = 0
    seconds: float = 0.0


@dataclass
class Backend(ABC):
    """A policy behind a sampler and a scorer.

    Attributes:
        policy: the model in training. config: how it is run.
        exact: sampled log-probabilities are those of `score` to rounding, so ratios start at 1.
        divided: each process holds a part of the weights (`benchmark.sharding`), and all make every pass together.
    """

    policy: Policy
    config: BackendConfig
    usage: Usage = field(default_factory=Usage)
    exact: bool = True
    divided: bool = False

    def generate(self, request: Request) -> Rollouts:
        """Rollouts ordered by prompt, then by number.

        Raises:
            NumericalError: a log-probability is not finite or above 0.
        """
        start = time.perf_counter()
        with self.whole():
            rollouts = self._generate(request) if ranks.size() == 1 else self._divide(request)
        check_sampled(rollouts)
        self.usage.requests += 1
        self.usage.prompt_tokens += len(rollouts.prompt_tokens)
        self.usage.tokens_generated += len(rollouts.tokens)
        self.usage.seconds += time.perf_counter() - start
        return rollouts

    def _divide(self, request: Request) -> Rollouts:
        """Each process samples for some of the prompts, with about equally many rollouts; all get all."""
        ends, parts = np.cumsum(request.counts), ranks.size()
        edges = np.searchsorted(ends, ends[-1] * np.arange(1, parts) // parts, side="right")
        first, last = [0, *edges.tolist(), len(ends)][ranks.rank() : ranks.rank() + 2]
        mine, device = request.part(first, last), request.prompts[0].device
        own = self._generate(mine) if mine.counts.sum() else Rollouts.none(mine.prompts)
        found = ranks.gather(own.to(torch.device("cpu")))
        return concatenate(found).to(device)

    @abstractmethod
    def load_weights(self) -> None:
        """Sample from the policy's present weights from now on."""

    @abstractmethod
    def _generate(self, request: Request) -> Rollouts: ...

    @abstractmethod
    def states(self, batch: Rollouts) -> tuple[Tensor, Tensor]:
        """Hidden states (T, d) that predict every generated token of `batch`, and the head (V, d) that reads them."""

    def score(self, batch: Rollouts, temperature: float) -> TokenStatistics:
        """Statistics of every generated token of `batch` in its order, (T,); gradients flow to the policy."""
        hidden, head = self.states(batch)
        return vocabulary_statistics(hidden, head, batch.tokens, temperature=temperature)

    @abstractmethod
    def split(self, batch: Rollouts, parts: int = 1) -> list[Piece]:
        """Pieces of at most ``config.tokens_per_pass`` tokens each, or of one unit that cannot be cut.

        Pieces are consecutive unless the weights are divided, and no larger than a part if `parts` shared the batch
        equally.
        """

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """What `generate` runs in: brings divided weights together."""
        return contextlib.nullcontext()

    def rest(self) -> None:  # noqa: B027 (most share the policy's memory)
        """No more samples until the next `load_weights`: give memory to the update."""

    def close(self) -> None:  # noqa: B027 (most have nothing to release)
        """Release what the sampler holds."""


class NativeBackend(Backend):
    """The suite's own forward and decode loop; a prompt is computed once for its whole group."""

    _weights: Weights | None = None

    @torch.no_grad()
    def load_weights(self) -> None:
        """See `Backend.load_weights`."""
        self._weights = self.policy.fused()

    def _generate(self, request: Request) -> Rollouts:
        if self._weights is None:
            self.load_weights()
        assert self._weights is not None
        device = request.prompts[0].device
        return generate(
            self._weights,
            torch.cat(request.prompts),
            torch.tensor([len(prompt) for prompt in request.prompts], device=device),
            torch.from_numpy(request.counts).to(device),
            request.uniforms(device),
            max_tokens=request.max_tokens,
            ends=self.policy.ends,
            temperature=request.temperature,
        )

    def states(self, batch: Rollouts) -> tuple[Tensor, Tensor]:
        """See `Backend.states`."""
        weights = self.policy.fused()
        return states(weights, batch), weights.head

    def split(self, batch: Rollouts, parts: int = 1) -> list[Piece]:
        """See `Backend.split`."""
        return by_prompts(batch, self.config.tokens_per_pass, parts)


def by_prompts(batch: Rollouts, limit: int, parts: int = 1) -> list[Piece]:
    """Cut `batch` between prompts so that each piece holds at most `limit` tokens, or one prompt.

    Nor does a piece hold more than one of `parts` equal shares.
    """
    limit = min(limit, -(-(len(batch.tokens) + len(batch.prompt_tokens)) // parts))
    if len(batch.tokens) + len(batch.prompt_tokens) <= limit:
        return [Piece(batch, slice(0, len(batch.tokens)))]
    per_prompt = torch.zeros(batch.prompts, dtype=torch.int64).index_add_(0, batch.prompt.cpu(), batch.length.cpu())
    pieces: list[Piece] = []
    chosen: list[int] = []
    load = begin = 0
    for prompt, tokens in enumerate(per_prompt.tolist()):
        cost = tokens + int(batch.prompt_length[prompt])
        if chosen and load + cost > limit:
            rows = batch.select_prompts(torch.tensor(chosen, device=batch.tokens.device))
            pieces.append(Piece(rows, slice(begin, begin + len(rows.tokens))))
            begin, chosen, load = begin + len(rows.tokens), [], 0
        chosen.append(prompt)
        load += cost
    rows = batch.select_prompts(torch.tensor(chosen, device=batch.tokens.device))
    return [*pieces, Piece(rows, slice(begin, begin + len(rows.tokens)))]


def by_rollouts(batch: Rollouts, limit: int, parts: int = 1) -> list[Piece]:
    """Cut `batch` between rollouts so that each piece holds at most `limit` tokens, prompts included, or one rollout.

    Every rollout of a piece has its own copy of its prompt. No piece holds more than one of `parts` equal shares.
    """
    cost = (batch.prompt_length[batch.prompt] + batch.length).tolist()
    limit = min(limit, -(-sum(cost) // parts))
    lengths = batch.length.tolist()
    pieces: list[Piece] = []
    number = torch.arange(len(batch), device=batch.tokens.device)
    first = begin = load = end = 0
    for row, tokens in enumerate(cost):
        if row > first and load + tokens > limit:
            pieces.append(Piece(batch.ungrouped(number[first:row]), slice(begin, end)))
            first, begin, load = row, end, 0
        load += tokens
        end += lengths[row]
    return [*pieces, Piece(batch.ungrouped(number[first:]), slice(begin, end))]


def by_length(batch: Rollouts, limit: int, parts: int = 1) -> list[Piece]:
    """Cut `batch`, sorted by length, so that each piece is one padded array of at most `limit` tokens, or one rollout.

    Longest first; prompts and padding count. No piece holds more than one of `parts` equal shares.
    """
    cost = batch.prompt_length[batch.prompt] + batch.length
    order = torch.argsort(cost, descending=True, stable=True)
    sizes = cost[order].tolist()
    limit = min(limit, -(-sum(sizes) // parts))
    edges = [0]
    for place in range(1, len(sizes)):
        if (place - edges[-1] + 1) * sizes[edges[-1]] > limit:
            edges.append(place)
    chosen = [order[first:last] for first, last in pairwise([*edges, len(sizes)])]
    return [Piece(batch.ungrouped(rows), ragged_index(rows, batch.length)) for rows in chosen]


def make(
    policy: Policy, config: BackendConfig, model: str | Path = "", should_stop: Callable[[], bool] = lambda: False
) -> Backend:
    """The backend of `config`; `model` is where the policy was read, for an engine that makes its own copy.

    Raises:
        InputError: what it needs is not installed, or it cannot run this model, or no server answers.
        Interrupted: `should_stop` became true while it waited for a server.
    """
    if config.name == "transformers":
        from benchmark.backend_transformers import TransformersBackend

        return TransformersBackend(policy, config)
    if config.name == "vllm":
        from benchmark.backend_vllm import VLLMBackend

        return VLLMBackend(policy, config, str(model), should_stop)
    return NativeBackend(policy, config)
