"""Updates of one batch under several arms, by however many processes were launched; each writes what it ended with.

``python ranks_driver.py BACKEND FOLDER ARM...``. Where the launcher asked for divided weights, the first also leaves a
checkpoint of its last update.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmark import ranks, sharding
from benchmark.backend import make
from benchmark.checkpoint import latest, load, save, tensors_of
from benchmark.clock import Clock
from benchmark.config import ArchitectureConfig, OptimiserConfig
from benchmark.config_model import BackendConfig
from benchmark.draws import Batch
from benchmark.groups import Groups
from benchmark.ledger import Ledger, Prices
from benchmark.policy import Policy, prepare_machine
from benchmark.registry import build
from benchmark.rollouts import Rollouts
from benchmark.sharding import whole
from benchmark.update import Updater, make_optimiser
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


def update(backend: str, arm: str, tokens_per_pass: int, folder: Path) -> None:
    policy, config = new_policy(POLICY, seed=0), OptimiserConfig(minibatches_per_batch=2, learning_rate=1e-3)
    settings: dict[str, Any] = {"name": backend, "tokens_per_pass": tokens_per_pass}
    if backend == "transformers":
        settings["gradient_checkpointing"] = True
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.model.train()
    if sharding.wanted():
        sharding.divide(policy.model)
    name = f"{arm}-{tokens_per_pass}-{ranks.rank()}"
    optimiser = make_optimiser(policy, config)
    updater = Updater(
        method=build(arm, {}),
        backend=make(policy, BackendConfig.model_validate(settings)),
        optimiser=optimiser,
        config=config,
        temperature=1.0,
        seed=0,
        ledger=Ledger(folder / f"{name}.ledger"),
        prices=Prices(1),
        clock=Clock(torch.device("cpu")),
    )
    batch = make_batch()
    groups = Groups(batch.prompt, batch.prompts, REWARD, batch.length, ~batch.finished, 12)
    metrics = updater.update(0, Batch(batch, groups))
    grads = {f"gradient/{key}": whole(p.grad) for key, p in policy.parameters().items() if p.grad is not None}
    save_file(
        {key: whole(value.detach()) for key, value in policy.parameters().items()} | grads, folder / f"{name}.weights"
    )
    (folder / f"{name}.json").write_text(json.dumps(metrics))
    if sharding.divided(policy.model):
        weights: list[Any] = list(policy.parameters().values())
        held = sum(value.to_local().numel() for value in weights)
        assert held == sum(optimiser.state[value]["exp_avg"].to_local().numel() for value in weights)
        assert held <= 0.51 * sum(value.numel() for value in weights)
        round_trip(policy, optimiser, folder / f"{arm}-{tokens_per_pass}-checkpoint")


def round_trip(policy: Policy, optimiser: torch.optim.AdamW, folder: Path) -> None:
    """A checkpoint of divided weights and moments; they are lost and come back."""
    kept = {key: whole(value.detach()) for key, value in policy.parameters().items()}
    moments = {key: whole(optimiser.state[value]["exp_avg_sq"]) for key, value in policy.parameters().items()}
    tensors = tensors_of(policy, optimiser)
    if ranks.rank() == 0:
        save(folder, tensors, {}, {"step": 0, "points": 0})
    ranks.agree(None)
    optimiser.state.clear()
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.zero_()
    found = latest(folder)
    assert found is not None
    load(found[0], policy, optimiser)
    for key, parameter in policy.parameters().items():
        assert torch.equal(whole(parameter.detach()), kept[key]), key
        assert torch.equal(whole(optimiser.state[parameter]["exp_avg_sq"]), moments[key]), key
    optimiser.step()  # moments are divided as the weights are
    ranks.agree(None)


def main() -> None:
    prepare_machine()
    backend, folder, *arms = sys.argv[1:]
    for arm in arms:
        for tokens_per_pass in (65_536, 16):
            update(backend, arm, tokens_per_pass, Path(folder))


if __name__ == "__main__":
    main()
