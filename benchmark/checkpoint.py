"""Checkpoints at step boundaries: atomic, without pickle, exact."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmark.jsonl import atomic_write_json
from benchmark.policy import Policy

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save(
    folder: Path, policy: Policy, optimiser: torch.optim.Optimizer, history: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Write the checkpoint of ``state["step"]`` and point ``latest.json`` at it; the one before stays until then."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{state['step']:06d}.safetensors"
    tensors = {f"policy/{key}": value.detach().contiguous() for key, value in policy.parameters().items()}
    for key, parameter in policy.parameters().items():
        for moment, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser/{moment}/{key}"] = value.contiguous()
    tensors |= {f"history/{key}": value for key, value in history.items()}
    partial = folder / f".{name}"
    save_file(tensors, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(folder / name)
    atomic_write_json(folder / "latest.json", {"file": name, **state})
    for old in folder.glob("step-*.safetensors"):
        if old.name != name:
            old.unlink()


def latest(folder: Path) -> dict[str, Any] | None:
    """State of the newest whole checkpoint, or ``None``."""
    pointer = folder / "latest.json"
    if not pointer.exists():
        return None
    state: dict[str, Any] = json.loads(pointer.read_text(encoding="utf-8"))
    return state


def load(folder: Path, state: dict[str, Any], policy: Policy, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Put weights and optimiser moments of `state` in place; returns the history's tensors."""
    tensors = load_file(folder / state["file"])
    with torch.no_grad():
        for key, parameter in policy.parameters().items():
            parameter.copy_(tensors[f"policy/{key}"])
            moments = {m: tensors[f"optimiser/{m}/{key}"] for m in MOMENTS if f"optimiser/{m}/{key}" in tensors}
            if moments:
                optimiser.state[parameter] = {m: value.clone() for m, value in moments.items()}
    return {key.removeprefix("history/"): value for key, value in tensors.items() if key.startswith("history/")}


def clear(folder: Path) -> None:
    """Remove every checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
