"""Stale rollouts: sampling from the policy of some steps ago, as a sampler that runs ahead of the trainer does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmark.policy import Policy


@dataclass
class Past:
    """Weights at the beginning of this step and of the `steps` before it.

    Step t samples from the weights that step t - `steps` began with; the first steps from the policy before RL. With
    0 steps nothing is kept.

    Attributes:
        queue: weights by parameter, oldest first; the newest are the present ones until the step's first update.
    """

    steps: int = 0
    queue: list[dict[str, Tensor]] = field(default_factory=list)

    def advance(self, policy: Policy) -> None:
        """A step begins."""
        if self.steps:
            present = {name: value.detach().clone() for name, value in policy.parameters().items()}
            self.queue = [*self.queue, present][-(self.steps + 1) :]

    @contextmanager
    def sampling(self, policy: Policy) -> Iterator[None]:
        """Inside, `policy` is the one that samples. For use before the step's first update."""
        if len(self.queue) < 2:
            yield
            return
        _put(policy, self.queue[0])
        try:
            yield
        finally:
            _put(policy, self.queue[-1])

    def state(self) -> dict[str, Tensor]:
        """The weights, for a checkpoint."""
        return {f"past/{age}/{name}": value for age, kept in enumerate(self.queue) for name, value in kept.items()}

    def restore(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Go on from `state`, in which there may be other tensors."""
        ages = sorted({int(name.split("/")[1]) for name in state if name.startswith("past/")})
        self.queue = [
            {name: state[f"past/{age}/{name}"].to(value.device) for name, value in policy.parameters().items()}
            for age in ages
        ]


@torch.no_grad()
def _put(policy: Policy, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in policy.parameters().items():
        parameter.copy_(weights[name])
