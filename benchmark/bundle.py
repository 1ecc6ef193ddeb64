"""The batch at which a run's numbers broke, kept with the weights that it met, to run it again."""

from __future__ import annotations

import json
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmark import checkpoint
from benchmark.config import RunConfig
from benchmark.errors import InputError, storing
from benchmark.head import Head
from benchmark.jsonl import atomic_write_json, sync_folder
from benchmark.numerics import Minibatch, NumericalError, check_sampled
from benchmark.rollouts import Rollouts

if TYPE_CHECKING:
    from benchmark.run import Run

FOLDER = "numerical_error"


def save(run: Run, error: NumericalError) -> Path:
    """Write ``numerical_error/``: ``batch.safetensors``, and ``error.json`` with step, arm and reason.

    Raises:
        StorageError: it cannot be written.
    """
    folder, batch = run.out / FOLDER, error.batch
    about = {"error": str(error), "arm": run.config.arm, "seed": run.config.seed, "step": run.step}
    about |= {"update": run.updater.updates, "budget_spent": run.ledger.spent[run.budget.currency]}
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if batch is not None:
            tensors = checkpoint.tensors_of(run.policy, run.optimiser) | _tensors(batch)
            more: dict[str, Any] = {"config": run.config.model_dump(mode="json"), "signal": run.updater.signal}
            more |= {"max_tokens": batch.max_tokens} if isinstance(batch, Minibatch) else {}
            partial = folder / ".batch.partial"
            save_file(tensors, partial, {"about": json.dumps(about | more)})
            partial.replace(folder / "batch.safetensors")
            sync_folder(folder)
    atomic_write_json(folder / "error.json", about)
    return folder


def replay(folder: Path) -> dict[str, Any]:
    """Run the saved batch again, from the saved weights, on this machine.

    Returns:
        ``about`` the failure; ``again``, the message of the same failure or None if it does not happen here;
        ``metrics`` of the update where it does not.

    Raises:
        InputError: there is no such batch, or its starting policy is gone.
    """
    from benchmark.run import Run

    file = folder / "batch.safetensors"
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads(opened.metadata()["about"])
        tensors = load_file(file)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        remedy = f"Name the {FOLDER} folder of a run"
        raise InputError(f"no saved batch ({error})", file=file, remedy=remedy) from None
    config, signal = RunConfig.model_validate(about.pop("config")), about.pop("signal")
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(config, Path(scratch), lambda _: None)
        checkpoint.put(tensors.__getitem__, tensors.keys(), run.policy, run.optimiser)
        run.updater.updates, run.updater.signal, run.updater.trace = about["update"], signal, None
        try:
            metrics = _again(run, tensors, about)
        except NumericalError as error:
            return {"about": about, "again": str(error), "metrics": {}}
        finally:
            run.close()
            run.verifier.close()
            run.backend.close()
    return {"about": about, "again": None, "metrics": metrics}


def _tensors(batch: Minibatch | Rollouts) -> dict[str, Tensor]:
    """The tensors of `batch` by name."""
    rollouts = batch if isinstance(batch, Rollouts) else batch.rollouts
    found: dict[str, Tensor | None] = {f"rollouts/{name}": value for name, value in vars(rollouts).items()}
    if isinstance(batch, Minibatch):
        found |= {"advantage": batch.advantage, "rollout_log_prob": batch.rollout_log_prob}
        if batch.sampler is not None:
            found |= {"sampler/hidden": batch.sampler.hidden, "sampler/weight": batch.sampler.weight}
    return {name: value.detach().clone().contiguous() for name, value in found.items() if value is not None}


def _again(run: Run, tensors: dict[str, Tensor], about: dict[str, Any]) -> dict[str, float]:
    there = {name: value.to(run.clock.device) for name, value in tensors.items()}
    rollouts = Rollouts(**{field.name: there[f"rollouts/{field.name}"] for field in fields(Rollouts)})
    temperature = run.config.rollout.temperature
    if "advantage" not in there:
        with torch.no_grad():
            seen = run.backend.score(rollouts, temperature)
        check_sampled(replace(rollouts, log_prob=seen.log_prob))
        return {"policy/entropy_nats": float(seen.entropy.mean())}
    head = None
    if "sampler/hidden" in there:
        head = Head(there["sampler/hidden"], there["sampler/weight"], rollouts.tokens, temperature)
    given = (there["advantage"], there.get("rollout_log_prob"), head, about["step"], about["max_tokens"])
    return run.updater.again(Minibatch(rollouts, *given))
