"""The update: what it reports, and that cutting a minibatch into passes changes neither gradients nor metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from baselines.grpo import GRPO
from benchmark import optimiser
from benchmark.averages import Averages
from benchmark.backend import NativeBackend
from benchmark.clock import Clock
from benchmark.config import ArchitectureConfig, OptimiserConfig
from benchmark.config_model import BackendConfig
from benchmark.draws import Batch
from benchmark.groups import Groups
from benchmark.jsonl import read_rows
from benchmark.ledger import Ledger, Prices
from benchmark.method import Method, TokenCredit, Tokens
from benchmark.registry import build
from benchmark.rollouts import Rollouts
from benchmark.scoring import score
from benchmark.update import Updater
from benchmark.warmup import new_policy

POLICY = ArchitectureConfig(hidden_size=16, layers=2, heads=2, kv_heads=1, mlp=24)
PROMPTS = [3, 6, 2, 8]
LENGTHS = [[5, 3, 7, 4], [6, 2], [4, 8, 3], [1, 9, 5]]
REWARD = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1])


def make_batch(seed: int = 1) -> Rollouts:
    """Random tokens that another policy is said to have sampled, so that ratios are far from 1."""
    random = torch.Generator().manual_seed(seed)
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


@dataclass
class Update:
    """What one update of a fresh policy left behind."""

    metrics: dict[str, float]
    gradient: dict[str, Tensor]
    ledger: Path


def update(folder: Path, method: Method, tokens_per_pass: int, reward: Tensor = REWARD, parts: int = 1) -> Update:
    policy = new_policy(POLICY, seed=0)
    config = OptimiserConfig(minibatches_per_batch=parts, gradient_clip=1e9)
    file = folder / f"{tokens_per_pass}.jsonl"
    batch = make_batch()
    updater = Updater(
        method=method,
        backend=NativeBackend(policy, BackendConfig(tokens_per_pass=tokens_per_pass)),
        optimiser=optimiser.make(policy, config),
        config=config,
        temperature=1.0,
        seed=0,
        ledger=Ledger(file),
        prices=Prices(1),
        clock=Clock(torch.device("cpu")),
    )
    groups = Groups(batch.prompt, batch.prompts, reward, batch.length, ~batch.finished, 12)
    metrics = updater.update(0, Batch(batch, groups))
    return Update(metrics, {name: p.grad for name, p in policy.parameters().items() if p.grad is not None}, file)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("arm", ["grpo", "entropy_loss", "dynamo", "kl_cov"])
def test_passes_change_neither_gradients_nor_metrics(tmp_path: Path, arm: str, parts: int) -> None:
    whole = update(tmp_path, build(arm, {}), 65_536, parts=parts)
    pieces = update(tmp_path, build(arm, {}), 16, parts=parts)
    assert pieces.metrics == pytest.approx(whole.metrics, rel=1e-5, abs=1e-5)
    total = torch.stack([g.norm() for g in whole.gradient.values()]).norm()
    assert float(total) > 1e-3
    for name, gradient in whole.gradient.items():
        assert float((pieces.gradient[name] - gradient).norm() / total) < 1e-5, name


@pytest.mark.parametrize("tokens_per_pass", [65_536, 16])
def test_metrics_are_those_of_the_policy_that_is_updated(tmp_path: Path, tokens_per_pass: int) -> None:
    found = update(tmp_path, GRPO(), tokens_per_pass).metrics
    batch = make_batch()
    with torch.no_grad():
        seen = score(new_policy(POLICY, seed=0).fused(), batch)
    change = (seen.log_prob - batch.log_prob).double()
    kl = float((change.exp() - 1 - change).mean())
    assert kl > 0.01
    assert 1.0 < float(seen.entropy.mean()) < math.log(len(new_policy(POLICY, seed=0).tokenizer))
    assert found["policy/entropy_nats"] == pytest.approx(float(seen.entropy.mean()), rel=1e-5)
    assert found["policy/kl_old_nats"] == pytest.approx(kl, rel=1e-5)
    assert found["policy/ratio_max"] == pytest.approx(float(change.exp().max()), rel=1e-5)


def test_only_a_method_that_modulates_pays_for_a_pass_ahead(tmp_path: Path) -> None:
    tokens = len(make_batch().tokens)
    for arm, per_pass, expected in [("grpo", 16, 0), ("dynamo", 65_536, 0), ("dynamo", 16, tokens)]:
        folder = tmp_path / f"{arm}-{per_pass}"
        folder.mkdir()
        rows, _ = read_rows(update(folder, build(arm, {}), per_pass).ledger)
        assert sum(row["tokens_scored"] for row in rows) == expected, arm


@dataclass(frozen=True)
class Halved(GRPO):
    """Every token gets half of its rollout's advantage."""

    seen: list[Tokens] = field(default_factory=list)

    def modulate(self, tokens: Tokens) -> TokenCredit:
        self.seen.append(tokens)
        return TokenCredit(tokens.advantage / 2)


@pytest.mark.parametrize("tokens_per_pass", [65_536, 16])
def test_a_method_sees_the_whole_minibatch_at_once_and_without_gradients(tmp_path: Path, tokens_per_pass: int) -> None:
    method = Halved()
    update(tmp_path, method, tokens_per_pass)
    (seen,) = method.seen
    assert len(seen.advantage) == len(seen.entropy) == len(make_batch().tokens)
    assert not seen.log_prob.requires_grad
    assert not seen.entropy.requires_grad


def test_the_factor_is_a_mean_over_tokens_that_have_an_advantage(tmp_path: Path) -> None:
    dead = REWARD.clone()
    dead[:4] = 1.0  # the first group's advantages are 0
    for reward in (REWARD, dead):
        assert update(tmp_path, GRPO(), 65_536, reward).metrics["modulation/factor_mean"] == 1.0
        assert update(tmp_path, Halved(), 65_536, reward).metrics["modulation/factor_mean"] == 0.5
    assert "modulation/factor_mean" not in update(tmp_path, GRPO(), 65_536, torch.ones(12)).metrics


def test_averages_weigh_by_tokens() -> None:
    averages = Averages()
    averages.add("a/b", torch.tensor(1.0), 3)
    averages.add("a/b", torch.tensor(5.0), 1)
    averages.maximum("a/c", torch.tensor(2.0))
    averages.maximum("a/c", torch.tensor(-3.0))
    assert averages.read() == {"a/b": 2.0, "a/c": 2.0}
