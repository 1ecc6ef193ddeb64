"""Checkpoints at step boundaries: one file each, atomic, without pickle, exact, and checked before they are used.

A checkpoint is a safetensors file whose name holds its SHA-256. It is written aside, synced and renamed, so a file of
that name is whole or damaged, never half written; a damaged one is found by its hash and the one before is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmark import sharding
from benchmark.errors import StorageError, storing
from benchmark.jsonl import PARTIAL, sync_folder
from benchmark.optimiser import Optimiser
from benchmark.policy import Policy

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
KEPT = 2
_NAME = re.compile(r"step-(\d+)-point-(\d+)-([0-9a-f]{64})\.safetensors")
_log = logging.getLogger("rolloutbench.checkpoint")


def save(folder: Path, tensors: dict[str, Tensor], history: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write the checkpoint of ``state["step"]`` and ``state["points"]``; the one before it is kept, older ones go.

    Args:
        tensors: weights and moments (`tensors_of`).

    Raises:
        StorageError: it cannot be written; the ones before are still there.
    """
    partial = folder / f".checkpoint{PARTIAL}"
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            memory = {f"history/{key}": value for key, value in history.items()}
            save_file(tensors | memory, partial, {"state": json.dumps(state)})
        except SafetensorError as error:
            raise StorageError(folder, str(error), "Free some space; the same command then goes on") from error
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(folder / f"step-{state['step']:06d}-point-{state['points']:03d}-{_hash(partial)}.safetensors")
        sync_folder(folder)
        for old in _newest_first(folder)[KEPT:]:
            old.unlink()


def tensors_of(policy: Policy, optimiser: Optimiser) -> dict[str, Tensor]:
    """Weights and optimiser moments by name. Where processes hold parts of them, all ask, and the first has them."""
    tensors = {f"policy/{key}": sharding.kept(value).contiguous() for key, value in policy.parameters().items()}
    for key, parameter in policy.parameters().items():
        for moment, value in optimiser.moments(parameter).items():
            tensors[f"optimiser/{moment}/{key}"] = value.contiguous()
    return tensors


def latest(folder: Path, fits: Callable[[dict[str, Any]], bool] = lambda _: True) -> tuple[Path, dict[str, Any]] | None:
    """File and state of the newest checkpoint that is whole and whose state `fits`, or None.

    Newer ones that are not are removed, with a warning, lest they count among those kept.
    """
    for file in _newest_first(folder):
        match = _NAME.fullmatch(file.name)
        if match is None or _hash(file) != match[3]:
            _log.warning("%s is damaged (its bytes do not have the hash in its name): removed", file)
            file.unlink()
            continue
        with safe_open(file, framework="pt") as opened:
            state: dict[str, Any] = json.loads(opened.metadata()["state"])
        if fits(state):
            return file, state
        _log.warning("%s does not fit the run's records, which were cut or changed since: removed", file)
        file.unlink()
    return None


def load(file: Path, policy: Policy, optimiser: Optimiser) -> dict[str, Tensor]:
    """Put weights and optimiser moments of `file` in place; returns the history's tensors."""
    with safe_open(file, framework="pt") as opened:  # tensor by tensor: every process of a run reads all of them
        names = set(opened.keys())
        put(opened.get_tensor, names, policy, optimiser)
        return {n.removeprefix("history/"): opened.get_tensor(n) for n in names if n.startswith("history/")}


def put(read: Callable[[str], Tensor], names: Collection[str], policy: Policy, optimiser: Optimiser) -> None:
    """The inverse of `tensors_of`: `read` gives the tensor of a name."""
    found: dict[Tensor, dict[str, Tensor]] = {}
    with torch.no_grad():
        for key, parameter in policy.parameters().items():
            parameter.copy_(sharding.like(read(f"policy/{key}"), parameter))
            if moments := {m: read(f"optimiser/{m}/{key}") for m in MOMENTS if f"optimiser/{m}/{key}" in names}:
                found[parameter] = moments
        optimiser.restore(found)


def clear(folder: Path) -> None:
    """Remove every checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    def age(path: Path) -> tuple[int, int]:
        match = _NAME.fullmatch(path.name)
        return (int(match[1]), int(match[2])) if match else (-1, -1)

    return sorted(folder.glob("step-*.safetensors"), key=age, reverse=True)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
