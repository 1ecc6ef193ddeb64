"""Methods that break the contract, each in one way, for `rolloutbench check` to find."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baselines.grpo import GRPO
from benchmark.groups import Groups
from benchmark.history import HistoryView
from benchmark.method import Change, Method, TokenCredit, Tokens

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Thawed(GRPO):
    """Fine, but for a field that makes no two instances equal."""

    noise: float = field(default_factory=lambda: float(np.random.default_rng().random()))


class Plain(GRPO):
    """Not a dataclass of its own."""


@dataclass(frozen=True)
class Wasteful(GRPO):
    """Gives everybody the same and forgets the remainder."""

    changes: ClassVar[tuple[Change, ...]] = ("allocation",)

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> Ints:
        return np.full(len(history), max(2, budget // len(history)), dtype=np.int64)


@dataclass(frozen=True)
class Hoarder(GRPO):
    """Keeps groups that have no rollouts."""

    def keep(self, groups: Groups) -> Tensor:
        return torch.ones(groups.prompts, dtype=torch.bool)


@dataclass(frozen=True)
class NaNs(GRPO):
    """Divides by the standard deviation of a group that has none."""

    def credit(self, groups: Groups) -> Tensor:
        return groups.centred(groups.reward) / groups.std(groups.reward)[groups.prompt]


@dataclass(frozen=True)
class Speechless(Method):
    """Does not say how it credits."""

    family: ClassVar[str] = "none"
    faithful_to: ClassVar[str] = "nothing"


@dataclass(frozen=True)
class Adrift(GRPO):
    """Names a policy that nobody knows."""

    anchor: ClassVar[Any] = "reference"


@dataclass(frozen=True)
class LogOfZero(GRPO):
    """Divides by an entropy that can be 0."""

    changes: ClassVar[tuple[Change, ...]] = ("token",)

    def modulate(self, tokens: Tokens) -> TokenCredit:
        return TokenCredit(tokens.advantage / tokens.entropy)


@dataclass(frozen=True)
class Rememberer(GRPO):
    """Keeps a state of its own: every batch is credited a little less."""

    seen: list[int] = field(default_factory=list, compare=False)

    def credit(self, groups: Groups) -> Tensor:
        self.seen.append(1)
        return super().credit(groups) / len(self.seen)


@dataclass(frozen=True)
class Gambler(GRPO):
    """Draws from the global generator."""

    def credit(self, groups: Groups) -> Tensor:
        return super().credit(groups) * torch.rand(len(groups.reward))


@dataclass(frozen=True)
class Scribbler(GRPO):
    """Centres the rewards where they lie."""

    def credit(self, groups: Groups) -> Tensor:
        return groups.reward.sub_(groups.mean(groups.reward)[groups.prompt])


@dataclass(frozen=True)
class Eraser(GRPO):
    """Writes into the history."""

    changes: ClassVar[tuple[Change, ...]] = ("allocation",)

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> Ints:
        history.trials[:] = 0
        return super().allocate(history, budget, rng)


@dataclass(frozen=True)
class FirstComeFirstServed(GRPO):
    """Credits earlier rollouts more."""

    def credit(self, groups: Groups) -> Tensor:
        return super().credit(groups) * torch.linspace(1, 0, len(groups.reward))


@dataclass(frozen=True)
class Silent(GRPO):
    """Allocates by the history and does not say so."""

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> Ints:
        n = np.zeros(len(history), dtype=np.int64)
        n[int(np.argmax(history.trials))] = budget
        return n
