"""Updates of one batch under several arms, by however many processes were launched; each writes what it ended with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmark import ranks
from benchmark.backend import NativeBackend
from benchmark.clock import Clock
from benchmark.config import ArchitectureConfig, OptimiserConfig
from benchmark.config_model import BackendConfig
from benchmark.draws import Batch
from benchmark.groups import Groups
from benchmark.ledger import Ledger, Prices
from benchmark.policy import prepare_machine
from benchmark.registry import build
from benchmark.rollouts import Rollouts
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


def update(arm: str, tokens_per_pass: int, folder: Path) -> None:
    policy, config = new_policy(POLICY, seed=0), OptimiserConfig(minibatches_per_batch=2, learning_rate=1e-3)
    name = f"{arm}-{tokens_per_pass}-{ranks.rank()}"
    updater = Updater(
        method=build(arm, {}),
        backend=NativeBackend(policy, BackendConfig(tokens_per_pass=tokens_per_pass)),
        optimiser=make_optimiser(policy, config),
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
    grads = {f"gradient/{key}": p.grad for key, p in policy.parameters().items() if p.grad is not None}
    save_file({key: value.detach() for key, value in policy.parameters().items()} | grads, folder / f"{name}.weights")
    (folder / f"{name}.json").write_text(json.dumps(metrics))


def main() -> None:
    prepare_machine()
    folder, *arms = sys.argv[1:]
    for arm in arms:
        for tokens_per_pass in (65_536, 16):
            update(arm, tokens_per_pass, Path(folder))


if __name__ == "__main__":
    main()
