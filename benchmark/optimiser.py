"""The weights' way from losses to a step: gradients of however many passes and processes, their norm, AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from benchmark import ranks, sharding, zero
from benchmark.config import OptimiserConfig
from benchmark.policy import Policy


class Optimiser:
    """AdamW over all trainable weights of a policy, one fused kernel.

    Attributes:
        adam: its moments and groups.
        lockstep: gradients are added up over the processes while they come, so all make the same number of passes.
    """

    def __init__(self, policy: Policy, config: OptimiserConfig) -> None:
        self.config = config
        self.parameters = list(policy.parameters().values())
        self.adam = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.lockstep = sharding.divided(policy.model)

    def clear(self) -> None:
        """Forget the gradient."""
        self.adam.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a pass's `loss`; `last` says that no other of this process follows before `add_up`."""
        loss.backward()  # type: ignore[no-untyped-call]

    def rehearse(self, loss: Tensor) -> None:
        """A backward pass that takes its memory and leaves nothing."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.clear()

    def add_up(self, also: Iterable[Tensor] = ()) -> None:
        """The gradient of all processes in place of this one's, and the sums of the tensors in `also` in theirs."""
        if ranks.size() == 1:
            return
        ranks.add([*also, *([] if self.lockstep else self._gradients())])

    def clip(self) -> Tensor:
        """Norm of the gradient, (), no matter whether finite; it is no longer than the configured one afterwards."""
        return sharding.whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip))

    def step(self, learning_rate: float) -> None:
        """Change the weights."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """What AdamW keeps of a weight, by its names; whole for the first process, all ask together."""
        return {name: sharding.kept(value) for name, value in self.adam.state.get(parameter, {}).items()}

    def restore(self, moments: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Go on from whole `moments` of weights, which are in place already."""
        for parameter, kept in moments.items():
            step = {"step": kept["step"].clone()} if "step" in kept else {}
            state = {name: sharding.like(value, parameter) for name, value in kept.items() if name != "step"}
            self.adam.state[parameter] = state | step

    def _gradients(self) -> list[Tensor]:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


class ZeroOptimiser(Optimiser):
    """`Optimiser` whose moments, and at stage 2 gradients, are divided by DeepSpeed."""

    def __init__(self, policy: Policy, config: OptimiserConfig) -> None:
        super().__init__(policy, config)
        self.lockstep, self.divided = True, zero.Divided(policy.model, self.adam, config.gradient_clip)

    def clear(self) -> None:
        """See `Optimiser.clear`: DeepSpeed forgets it with every step."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Optimiser.backward`."""
        self.divided.backward(loss, last=last)

    def rehearse(self, loss: Tensor) -> None:
        """See `Optimiser.rehearse`; without the hooks that take gradients away."""
        torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def clip(self) -> Tensor:
        """See `Optimiser.clip`; clipped by the step."""
        return self.divided.norm()

    def step(self, learning_rate: float) -> None:
        """See `Optimiser.step`."""
        self.divided.step(learning_rate)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """See `Optimiser.moments`."""
        return self.divided.moments(parameter)

    def restore(self, moments: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """See `Optimiser.restore`."""
        self.divided.restore(moments)


def make(policy: Policy, config: OptimiserConfig) -> Optimiser:
    """AdamW, divided as the launcher asked."""
    return (ZeroOptimiser if zero.wanted() else Optimiser)(policy, config)
