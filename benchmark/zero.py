"""Gradients and moments divided among the processes of a run by DeepSpeed (ZeRO, stages 1 and 2).

``accelerate launch --use_deepspeed --zero_stage 2`` asks for it. Each of N processes holds all weights, 1 / N of
AdamW's moments beside a copy of the weights that they move, and at stage 2 1 / N of the gradients (Rajbhandari et al.,
arXiv 1910.02054). Of DeepSpeed's options only the stage counts: precision, clipping and learning rate are the run's.
`benchmark.sharding` divides the weights as well.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmark.errors import InputError
from benchmark.installing import install_line

ASKED = "ACCELERATE_USE_DEEPSPEED"
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
OFFLOADS = ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE")
OTHER_STAGES = {
    "0": "Launch with --multi_gpu, which divides nothing",
    "3": "Launch with --use_fsdp instead of --use_deepspeed: it divides weights, gradients and moments",
}


def wanted() -> bool:
    """Whether the launcher asked for DeepSpeed and there is more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get(ASKED, "false").lower() == "true"


def check() -> None:
    """Refuse what the launcher cannot have, before processes meet.

    Raises:
        InputError: DeepSpeed is missing, or was asked for something else than dividing gradients and moments.
    """
    if not wanted():
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError("it needs the package deepspeed", key=ASKED, value="true", remedy=install_line("deepspeed"))
    if path := os.environ.get(FILE, ""):
        remedy = "Launch with --zero_stage instead"
        raise InputError("a run writes DeepSpeed's configuration itself", key=FILE, value=path, remedy=remedy)
    stage = os.environ.get(STAGE, "2")
    if stage not in ("1", "2"):
        remedy = OTHER_STAGES.get(stage, "Launch with --zero_stage 1 or 2")
        raise InputError("a run divides by ZeRO's stages 1 and 2", key=STAGE, value=stage, remedy=remedy)
    for name in OFFLOADS:
        if (device := os.environ.get(name, "none").lower()) != "none":
            remedy = "Launch without offloading"
            raise InputError("gradients and moments stay on the GPUs", key=name, value=device, remedy=remedy)
    tools = () if torch.cuda.is_available() else ("ninja", os.environ.get("CXX", "c++"))
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        what = f"on CPUs DeepSpeed compiles an operation, and there is no {' or '.join(missing)} on the PATH"
        raise InputError(
            what, key=ASKED, value="true", remedy="Install ninja and a C++ compiler, or leave DeepSpeed out"
        )


class Divided:
    """AdamW over the parts of all trainable weights that this process keeps, in DeepSpeed's engine."""

    def __init__(self, model: Any, adam: torch.optim.AdamW, gradient_clip: float) -> None:
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.WARNING)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": gradient_clip,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(os.environ.get(STAGE, "2")), "overlap_comm": False},
            "steps_per_print": 2**31,
        }
        self.adam = adam
        weights = [weight for group in adam.param_groups for weight in group["params"]]
        self.engine, self.zero, _, _ = deepspeed.initialize(model=model, optimizer=adam, config=settings)
        # Moments are made by a step, which a gradient and a rate of 0 keep from changing anything.
        self.backward(torch.stack([weight.sum() for weight in weights]).sum() * 0.0, last=True)
        self.step(0.0)
        self._count(torch.zeros(()))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, summed over the processes: DeepSpeed takes their mean."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * dist.get_world_size())

    def norm(self) -> Tensor:
        """Norm of the gradient before it is clipped, (); not a number where a gradient is none."""
        norm: Tensor = torch.as_tensor(self.zero.scaled_global_norm())
        return torch.where(norm < 0, torch.nan, norm)

    def step(self, learning_rate: float) -> None:
        """Clip, and change the weights."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.engine.step()

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Whole moments of a weight on the CPU for the first process, empty ones elsewhere; {} before any step."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = next(state["step"] for state in self.adam.state.values())
        if not step:
            return {}
        found = {"step": step.detach().clone()}
        for name in ("exp_avg", "exp_avg_sq"):
            full = safe_get_full_optimizer_state(parameter, name)
            found[name] = full.cpu() if dist.get_rank() == 0 else full.new_empty(0, device="cpu")
        return found

    def restore(self, moments: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Take the weights as they are now, and their `moments`."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.zero.refresh_fp32_params()
        for parameter, kept in moments.items():
            for name in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(parameter, kept[name].to(parameter.device), name)
            self._count(kept["step"])

    def _count(self, steps: Tensor) -> None:
        for state in self.adam.state.values():
            state["step"].copy_(steps)
