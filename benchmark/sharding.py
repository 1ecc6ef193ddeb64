"""Weights, gradients and moments divided among the processes of a run, for models that no GPU holds alone.

``accelerate launch --use_fsdp`` asks for it. Each of N processes keeps 1 / N of every tensor in float32 (PyTorch's
FSDP2). A layer is whole only while it is passed, and gradients are summed over the processes as they come, so that loss
and weights are those of one process, up to rounding. Bringing a layer together takes all processes: they pass pieces at
the same time, each one of its own (`benchmark.update`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from benchmark import zero
from benchmark.config import RunConfig
from benchmark.errors import InputError
from benchmark.method import Method

ASKED = "ACCELERATE_USE_FSDP"
OFFLOAD = "FSDP_OFFLOAD_PARAMS"


def wanted() -> bool:
    """Whether the launcher asked for divided weights and there is more than one process to divide them among."""
    return dist.is_initialized() and dist.get_world_size() > 1 and os.environ.get(ASKED, "false").lower() == "true"


def check(config: RunConfig, method: Method) -> None:
    """Refuse what needs whole weights, gradients or moments in one process, before anything is loaded.

    Raises:
        InputError: the run cannot divide what the launcher asked for.
    """
    if zero.wanted() and method.needs & {"head", "signal"}:
        what = f"it reads {', '.join(sorted(method.needs))}, which takes whole gradients and moments in one process"
        remedy = "Launch with --multi_gpu instead of --use_deepspeed"
        raise InputError(what, key="method.name", value=config.method.name, remedy=remedy)
    if not wanted():
        return
    plain = "Launch with --multi_gpu instead of --use_fsdp"
    if config.backend.name == "native":
        what = "the native backend fuses whole weights; it does not divide them"
        raise InputError(what, key="backend.name", value="native", remedy="Set backend.name: vllm or transformers")
    if config.policy.lora is not None:
        raise InputError("adapters are not divided", key="policy.lora", remedy=plain)
    if os.environ.get(OFFLOAD, "false").lower() == "true":
        raise InputError("weights stay on the GPUs", key=OFFLOAD, value="true", remedy="Launch without offloading")
    if method.needs or method.features:
        asked = ", ".join(sorted(method.needs)) or "features"
        what = f"it reads {asked}, which takes whole weights or gradients in one process"
        raise InputError(what, key="method.name", value=config.method.name, remedy=plain)


def divide(model: Any) -> None:
    """Keep this process's part of every tensor of a causal LM (transformers): layer by layer, and the rest together.

    ``model.read`` becomes its forward without the head. The head's weight is whole from then on until the backward
    pass, or until ``model.reshard()`` where there is none.
    """
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    layers = set(model._no_split_modules or ())
    model.read = MethodType(_read, model)
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "read")
    for module in _parts(model):
        # The loss is normalised over all processes' pieces: gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def divided(model: Any) -> bool:
    """Whether `divide` took the model apart."""
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Inside, every process holds all weights and passes the model by itself, without gradients; all enter together."""
    if not divided(model):
        yield
        return
    parts = _parts(model)
    for part in parts:
        part.set_reshard_after_forward(False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this process may hold a part; all processes ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def kept(tensor: Tensor) -> Tensor:
    """`whole`, detached, for the first process to write: off the device if it was divided; elsewhere empty."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    full = whole(tensor.detach())
    return full.cpu() if dist.get_rank() == 0 else full.new_empty(0, device="cpu")


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole `value` divided as `tensor` is, or a copy of it."""
    if not isinstance(tensor, DTensor):
        return value.clone()
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def _read(self: Any, **inputs: Any) -> Tensor:
    states: Tensor = self.base_model(**inputs).last_hidden_state
    return states


def _parts(model: Any) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
