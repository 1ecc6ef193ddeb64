"""The processes of one run that share its work, each with a device of its own (data parallelism).

`accelerate launch` starts them. Every process makes the whole run: same prompts, streams, decisions and weights. What
costs is divided: each samples and verifies for some of the prompts, and passes some pieces of an update batch, whose
gradients are added up before the optimiser's step. Losses are normalised over the whole update batch, so the number of
processes changes results by rounding only. The first process writes the record. Each holds all weights, or a part of
them (`benchmark.sharding`), and all moments, or a part (`benchmark.zero`).

A process alone needs none of this: every function here then does nothing, or all of the work itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from benchmark import zero
from benchmark.errors import InputError

PATIENCE = timedelta(hours=3)
"""How long a process waits for the others: one may sample long answers while the rest are done."""
MEGATRON = "ACCELERATE_USE_MEGATRON_LM"

T = TypeVar("T")


def start() -> None:
    """Join the processes that were launched together, if there are several; does nothing the second time.

    Raises:
        InputError: the launcher was told to divide the model in a way that the suite does not know.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if os.environ.get(MEGATRON, "false").lower() == "true":
        remedy = "Launch with --use_fsdp, which divides weights, gradients and moments"
        raise InputError("a run does not train through Megatron", key=MEGATRON, value="true", remedy=remedy)
    zero.check()
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def rank() -> int:
    """Number of this process; the first, 0, writes the record."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def agree(value: T) -> T:
    """The first process's `value`, in every process; it must pickle."""
    if size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    agreed: T = box[0]
    return agreed


def gather(value: T) -> list[T]:
    """The `value` of every process in order, in every process; it must pickle, tensors on the CPU."""
    if size() == 1:
        return [value]
    parts: list[Any] = [None] * size()
    dist.all_gather_object(parts, value)
    return parts


def divided(work: Callable[..., list[T]], *columns: Sequence[Any]) -> list[T]:
    """``work(*columns)`` row by row: each process does its part of the rows, and all get every result in order."""
    rows, parts = len(columns[0]), size()
    begin, end = rank() * rows // parts, (rank() + 1) * rows // parts
    return [found for part in gather(work(*(column[begin:end] for column in columns))) for found in part]


def owners(costs: Sequence[int]) -> list[int]:
    """The process that does each piece of work: the largest piece first, to the process that has least to do."""
    load, owner = [0] * size(), [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owner[piece] = load.index(min(load))
        load[owner[piece]] += costs[piece]
    return owner


def share(tensor: Tensor, owner: int) -> Tensor:
    """`tensor` of the process `owner`; elsewhere it only tells shape, type and device, and is overwritten."""
    if size() > 1:
        dist.broadcast(tensor, src=owner)
    return tensor


def add(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, bit for bit the same in all of them."""
    if size() > 1:
        for waiting in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            waiting.wait()


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if size() > 1 else torch.device("cuda")
