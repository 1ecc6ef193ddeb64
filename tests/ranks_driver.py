"""Updates of one batch under several arms, by however many processes were launched; each writes what it ended with.

``python ranks_driver.py BACKEND FOLDER ARM...``; the backend ``adapters`` is transformers with adapters of LoRA.
Where the launcher asked for divided weights or moments, they are lost between the two updates and come back from a
checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmark import optimiser, ranks, sharding, zero
from benchmark.backend import make
from benchmark.checkpoint import latest, load, save, tensors_of
from benchmark.clock import Clock
from benchmark.config import ArchitectureConfig, OptimiserConfig
from benchmark.config_model import BackendConfig, LoRAConfig
from benchmark.draws import Batch
from benchmark.groups import Groups
from benchmark.ledger import Ledger, Prices
from benchmark.optimiser import Optimiser
from benchmark.policy import Policy, prepare_machine
from benchmark.registry import build
from benchmark.rollouts import Rollouts
from benchmark.sharding import whole
from benchmark.update import Updater
from benchmark.warmup import new_policy

POLICY = ArchitectureConfig(hidden_size=16, layers=2, heads=2, kv_heads=1, mlp=24)
PROMPTS = [3, 6, 2, 8]
LENGTHS = [[5, 3, 7, 4], [6, 2], [4, 8, 3], [1, 9, 5]]
REWARD = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1])


def make_batch() -> Rollouts:
    random = torch.Generator().manual_seed(1)
    lengths = [length for group in LENGTHS for length in group]
    return Rollouts(
        torch.randint(23, (sum(PROMPTS),), generator=random),
        torch.tensor(PROMPTS),
        torch.tensor([i for i, group in enumerate(LENGTHS) for _ in group]),
        torch.randint(23, (sum(lengths),), generator=random),
        torch.tensor(lengths),
        -3.4 + 0.4 * torch.randn(sum(lengths), generator=random),
        torch.ones(len(lengths), dtype=torch.bool),
    )


def adapted(policy: Policy, folder: Path) -> Policy:
    """The policy with fresh adapters, whose second matrices are moved off 0 so that all have a gradient."""
    if ranks.rank() == 0:
        policy.save(folder)
    ranks.agree(None)
    made = Policy.load(folder, torch.device("cpu"), backend=BackendConfig(name="transformers"), lora=LoRAConfig(rank=4))
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in made.parameters().values():
            if not value.any():
                value.copy_(0.1 * torch.randn(value.shape, generator=random))
    return made


def update(backend: str, arm: str, tokens_per_pass: int, folder: Path) -> None:
    policy, config = new_policy(POLICY, seed=0), OptimiserConfig(minibatches_per_batch=2, learning_rate=1e-3)
    settings: dict[str, Any] = {"name": backend, "tokens_per_pass": tokens_per_pass}
    if backend == "adapters":
        policy = adapted(policy, folder / "policy")
        settings["name"] = "transformers"
    if backend == "transformers":
        settings["gradient_checkpointing"] = True
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.model.train()
    if sharding.wanted():
        sharding.divide(policy.model)
    name = f"{arm}-{tokens_per_pass}-{ranks.rank()}"
    adam = optimiser.make(policy, config)
    updater = Updater(
        method=build(arm, {}),
        backend=make(policy, BackendConfig.model_validate(settings)),
        optimiser=adam,
        config=config,
        temperature=1.0,
        seed=0,
        ledger=Ledger(folder / f"{name}.ledger"),
        prices=Prices(1),
        clock=Clock(torch.device("cpu")),
    )
    batch = make_batch()
    groups = Groups(batch.prompt, batch.prompts, REWARD, batch.length, ~batch.finished, 12)
    given = Batch(batch, groups)
    metrics = updater.update(0, given)
    found = {f"gradient/{key}": whole(p.grad) for key, p in policy.parameters().items() if p.grad is not None}
    save_file(found | moments_of(policy, adam) | weights_of(policy), folder / f"{name}.weights")
    (folder / f"{name}.json").write_text(json.dumps(metrics))
    if sharding.divided(policy.model) or zero.wanted():
        held_in_part(policy, adam)
        round_trip(policy, adam, folder / f"{arm}-{tokens_per_pass}-checkpoint")
    updater.update(1, given)
    save_file(weights_of(policy), folder / f"{name}.later")
    if zero.wanted():  # whose norm is of its own making
        adam.backward(adam.parameters[0].sum() * torch.nan, last=True)
        assert not adam.clip().isfinite()


def held_in_part(policy: Policy, adam: Optimiser) -> None:
    """This process keeps about half of the moments, and of weights if they are divided."""
    weights: list[Any] = list(policy.parameters().values())
    everything = sum(value.numel() for value in weights)
    kept: list[Any] = [state["exp_avg"] for state in adam.adam.state.values()]
    moments = sum((value.to_local() if sharding.divided(policy.model) else value).numel() for value in kept)
    assert 0.4 * everything < moments <= 0.51 * everything
    if sharding.divided(policy.model):
        assert sum(value.to_local().numel() for value in weights) == moments


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """Every weight, whole, in memory of its own."""
    return {key: whole(value.detach()).clone() for key, value in policy.parameters().items()}


def moments_of(policy: Policy, adam: Optimiser) -> dict[str, Tensor]:
    """Every moment of every weight, whole, as the first process has them."""
    return {
        f"{moment}/{key}": value.clone()
        for key, parameter in policy.parameters().items()
        for moment, value in adam.moments(parameter).items()
    }


def round_trip(policy: Policy, adam: Optimiser, folder: Path) -> None:
    """A checkpoint of divided weights and moments; they are lost and come back."""
    kept, moments, tensors = weights_of(policy), moments_of(policy, adam), tensors_of(policy, adam)
    if ranks.rank() == 0:
        save(folder, tensors, {}, {"step": 0, "points": 0})
    ranks.agree(None)
    with torch.no_grad():
        for value in [*policy.parameters().values(), *(v for s in adam.adam.state.values() for v in s.values())]:
            value.zero_()
    assert all(not value.any() for value in moments_of(policy, adam).values())
    found = latest(folder)
    assert found is not None
    load(found[0], policy, adam)
    again = weights_of(policy) | moments_of(policy, adam)
    assert again.keys() == (kept | moments).keys()
    assert all(torch.equal(again[name], value) for name, value in (kept | moments).items())
    ranks.agree(None)


def main() -> None:
    prepare_machine()
    backend, folder, *arms = sys.argv[1:]
    for arm in arms:
        for tokens_per_pass in (65_536, 16):
            update(backend, arm, tokens_per_pass, Path(folder))


if __name__ == "__main__":
    main()
