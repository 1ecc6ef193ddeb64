"""The weights' way from losses to a step: gradients of however many passes and processes, their norm, AdamW."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmark import ranks, sharding, zero
from benchmark.config import OptimiserConfig
from benchmark.policy import Policy

DIVIDED = ("exp_avg", "exp_avg_sq")


class Optimiser:
    """AdamW over all trainable weights of a policy, one fused kernel.

    Attributes:
        adam: its moments and groups.
        move: takes the step, at the rate of the groups.
        lockstep: gradients are added up over the processes while they come, so all make the same number of passes.
    """

    def __init__(self, policy: Policy, config: OptimiserConfig) -> None:
        self.config = config
        self.parameters = list(policy.parameters().values())
        self.adam = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.lockstep = sharding.divided(policy.model)
        self.move: Callable[[], Any] = self.adam.step

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
        self.move()

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
    """AdamW over the parts of all trainable weights that this process keeps, in DeepSpeed's engine (`benchmark.zero`).

    Attributes:
        adam: its groups are the run's; its state holds flat parts of the moments, by flat parts of the weights.
    """

    def __init__(self, policy: Policy, config: OptimiserConfig) -> None:
        import deepspeed
        from deepspeed.utils import logger

        super().__init__(policy, config)
        logger.setLevel(logging.WARNING)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.gradient_clip,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(zero.stage()), "overlap_comm": False},
            "steps_per_print": 2**31,
        }
        self.engine, self.zero, _, _ = deepspeed.initialize(model=policy.model, optimizer=self.adam, config=settings)
        self.lockstep, self.move = True, self.engine.step
        # Moments are made by a step, which a gradient and a rate of 0 keep from changing anything.
        self.backward(torch.stack([weight.sum() for weight in self.parameters]).sum() * 0.0, last=True)
        self.step(0.0)
        self._count(torch.zeros(()))

    def clear(self) -> None:
        """See `Optimiser.clear`: DeepSpeed forgets it with every step."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Optimiser.backward`: added up over the processes at once, of which DeepSpeed takes the mean."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * ranks.size())

    def rehearse(self, loss: Tensor) -> None:
        """See `Optimiser.rehearse`; without the hooks that take gradients away."""
        torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def clip(self) -> Tensor:
        """See `Optimiser.clip`: not a number where the gradient is not finite; clipped by the step."""
        norm: Tensor = torch.as_tensor(self.zero.scaled_global_norm())
        return torch.where(norm < 0, torch.nan, norm)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """See `Optimiser.moments`: on the CPU, empty for other processes than the first; {} before the first step."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = next(state["step"] for state in self.adam.state.values())
        if not step:
            return {}
        found = {"step": step.detach().clone()}
        for name in DIVIDED:
            full = safe_get_full_optimizer_state(parameter, name)
            found[name] = full.cpu() if ranks.rank() == 0 else full.new_empty(0, device="cpu")
        return found

    def restore(self, moments: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """See `Optimiser.restore`: the copy of the weights that moments move is taken from them."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.zero.refresh_fp32_params()
        for parameter, kept in moments.items():
            for name in DIVIDED:
                safe_set_full_optimizer_state(parameter, kept[name].to(parameter.device), name)
            self._count(kept["step"])

    def _count(self, steps: Tensor) -> None:
        for state in self.adam.state.values():
            state["step"].copy_(steps)


def make(policy: Policy, config: OptimiserConfig) -> Optimiser:
    """AdamW, divided as the launcher asked."""
    return (ZeroOptimiser if zero.wanted() else Optimiser)(policy, config)
