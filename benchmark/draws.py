"""What a step draws from, and what it has drawn: the prompt pool, a draw of some of its prompts, a step's batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark import streams
from benchmark.groups import Groups, segment_sum
from benchmark.history import HistoryView
from benchmark.policy import Policy
from benchmark.problems import Item
from benchmark.rollouts import Rollouts
from benchmark.verdict import Verdict, reward


@dataclass(frozen=True)
class Pool:
    """The training prompts, tokenised once, in an order every arm of a seed shares.

    Attributes:
        items: the problems. tokens: their prompt ids. keys: (N,) uint64 identity of each prompt's random stream.
    """

    items: list[Item]
    tokens: list[Tensor]
    seed: int

    @classmethod
    def of(cls, items: list[Item], policy: Policy, seed: int, device: torch.device) -> Pool:
        """Tokenise the prompts of `items` once, onto `device`."""
        return cls(items, [torch.tensor(ids, device=device) for ids in policy.encode([i.prompt for i in items])], seed)

    def prompts(self, start: int, count: int) -> list[int]:
        """`count` pool positions from place `start` of an endless sequence of shuffled epochs; distinct in an epoch."""
        chosen: list[int] = []
        size = len(self.items)
        while len(chosen) < count:
            epoch, offset = divmod(start + len(chosen), size)
            order = streams.generator(self.seed, "order", epoch).permutation(size)
            taken = order[offset : offset + count - len(chosen)].tolist()
            chosen += taken
        return chosen

    def stream_keys(self, purpose: str, step: int, epoch: int, prompts: list[int]) -> NDArray[np.uint64]:
        """One 64-bit key per prompt; rollout j of the prompt is lane j of it in every arm.

        The epoch keeps a prompt that comes back within one step (dynamic sampling) from repeating its rollouts.
        """
        ids = (streams.key(self.seed, purpose, step, epoch, self.items[p].id) for p in prompts)
        return np.fromiter(ids, dtype=np.uint64, count=len(prompts))


@dataclass(frozen=True)
class Draw:
    """Verified rollouts of some prompts.

    Attributes:
        prompts: pool positions, (P,). counts: rollouts of each, (P,). verdicts: one per rollout.
        history: what `allocate` saw of the prompts.
        cut: the budget, not the protocol, set the token limit: never trains.
        reads: rounds in which each prompt was read, (P,); one unless given.
    """

    prompts: list[int]
    counts: NDArray[np.int64]
    rollouts: Rollouts
    verdicts: list[Verdict]
    history: HistoryView
    cut: bool
    reads: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        if not len(self.reads):
            object.__setattr__(self, "reads", (self.counts > 0).astype(np.int64))

    @property
    def successes(self) -> NDArray[np.float64]:
        """Correct rollouts of each prompt, (P,)."""
        return successes_of(self.rollouts, self.verdicts)


@dataclass(frozen=True)
class Batch:
    """What trains in this step, and the whole of what was drawn for it.

    Attributes:
        rollouts: what trains, R rollouts. groups: the groups they are of, whole, as `credit` sees them.
        prompts: pool positions of the groups, (P,). verdicts: one per rollout that trains.
        chosen: (R,) numbers in `groups` of what trains; ``None`` where all does.
    """

    rollouts: Rollouts
    groups: Groups
    drawn: list[Draw] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    chosen: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """Numbers in `groups` of the rollouts that train, (R,)."""
        return (
            torch.arange(len(self.rollouts), device=self.groups.prompt.device) if self.chosen is None else self.chosen
        )


def successes_of(rollouts: Rollouts, verdicts: list[Verdict]) -> NDArray[np.float64]:
    """Correct rollouts per prompt, (P,)."""
    correct = torch.tensor([reward(v) for v in verdicts], dtype=torch.float64)
    return segment_sum(correct, rollouts.prompt.cpu(), rollouts.prompts).numpy()
