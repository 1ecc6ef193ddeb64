"""Checkpoints along training: an arm is trained as in a study, its policy and Adam's second moments kept on the way."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmark.config import RunConfig
from benchmark.policy import Policy
from benchmark.rollout_gradients import flatten
from benchmark.run import Run
from benchmark.transformer import fuse

MOMENTS = "adam.safetensors"


def place(folder: Path, fraction: float) -> Path:
    """Where the checkpoint at a fraction of the budget is kept."""
    return folder / f"{fraction:.3f}"


def is_trained(folder: Path) -> bool:
    """Whether a checkpoint is whole; its second moments are written last."""
    return (folder / MOMENTS).exists()


def train_checkpoints(
    config: RunConfig, folder: Path, fractions: Sequence[float], progress: Callable[[float], None] = lambda _: None
) -> None:
    """Train the arm of `config` and keep ``<folder>/<fraction>/`` for each of the ascending `fractions` of its budget.

    A checkpoint is the policy at the first step boundary at or after the fraction, and the bias-corrected second
    moments of Adam at that moment. Before training there are none: fraction 0 has those after the first step.

    Args:
        progress: called with the share of the budget that is spent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as records:
        run = Run(config, Path(records), lambda _: None)
        left, lacking = list(fractions), []
        with run.verifier:
            while True:
                share = run.ledger.spent[run.budget.currency] / run.budget.amount
                progress(share)
                while left and share >= left[0]:
                    run.policy.save(place(folder, left[0]) / "policy")
                    lacking.append(left.pop(0))
                while lacking and share > 0:
                    _save_moments(run, place(folder, lacking.pop()) / MOMENTS)
                if run.collector.remaining == 0:
                    break
                run.step_once()


def _save_moments(run: Run, path: Path) -> None:
    partial = path.with_name(f".{path.name}")
    save_file({"second_moment": second_moment(run)}, partial)
    partial.replace(path)


def load_checkpoint(folder: Path, device: torch.device) -> tuple[Policy, Tensor]:
    """The policy and its second moments (D,)."""
    return Policy.load(folder / "policy", device), load_file(folder / MOMENTS)["second_moment"]


def second_moment(run: Run) -> Tensor:
    """Adam's v / (1 - beta_2^t) in the coordinates of `rollout_gradients`, (D,)."""
    shadow = copy.deepcopy(run.policy.model)
    state = run.optimiser.adam.state
    with torch.no_grad():
        for mine, own in zip(shadow.parameters(), run.policy.model.parameters(), strict=True):
            beta = run.optimiser.adam.param_groups[0]["betas"][1]
            mine.copy_(state[own]["exp_avg_sq"] / (1 - beta ** float(state[own]["step"])))
        return flatten(fuse(shadow)).cpu()
