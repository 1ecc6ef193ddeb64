"""Each control takes away what it says and leaves the rest; the ablation study composes and every arm of it runs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baselines.grpo import GRPO
from benchmark import registry
from benchmark.compose import compose_study, find
from benchmark.config import StudyConfig, canonical
from benchmark.groups import Groups
from benchmark.history import HistoryView, PromptHistory
from benchmark.layers import read_yaml, validate
from benchmark.losses import surrogate
from benchmark.method import Loss, Method, Probe, Tokens
from methods.control_objective import ObjectiveWeights
from methods.control_skip_dead import SkipDead
from methods.controls import Advantage, ConstantBoost, OracleAllocation, ShuffledAllocation
from methods.dynamo import DynaMO, DynaMOAllocation
from methods.modulation import Stabilisation

sys.path.append(str(Path(__file__).parent))
training: Any = importlib.import_module("test_training")
policy, train = training.policy, training.train

Train = Callable[..., Path]
STUDY = validate(StudyConfig, read_yaml(find("studies", "ablation")))
ARMS = {arm.label: arm for arm in STUDY.arms}


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """A run flushes denormals in its process, with which hypothesis makes no floats."""
    yield
    torch.set_flush_denormal(False)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def seen(successes: list[int], trials: list[int]) -> HistoryView:
    """Prompts visited once with these outcomes; 0 trials: never visited."""
    history = PromptHistory(len(trials), half_life=4.0)
    history.record(range(len(trials)), np.array(successes, dtype=np.float64), np.array(trials, dtype=np.float64))
    return history.view(range(len(trials)))


def random_history(seed: int, prompts: int = 12) -> HistoryView:
    trials = rng(seed).integers(0, 9, prompts)
    return seen(rng(seed + 1).binomial(trials, rng(seed + 2).beta(0.5, 0.5, prompts)).tolist(), trials.tolist())


def tokens_of(advantage: Tensor, seed: int = 0) -> Tokens:
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(advantage), 7, generator=draw)
    log_p = logits.log_softmax(-1)
    p, first = log_p.exp(), log_p[:, 0]
    old = first + 0.05 * torch.randn(len(advantage), generator=draw)
    entropy, p2, p2_log = -(p * log_p).sum(-1), (p * p).sum(-1), (p * p * log_p).sum(-1)
    number = torch.arange(len(advantage))
    return Tokens(advantage, first, old, entropy, p2, p2_log, number, torch.zeros(len(advantage)), Loss())


def groups_of(sizes: list[int], history: HistoryView | None = None, seed: int = 0) -> Groups:
    index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    reward = torch.from_numpy(rng(seed).integers(0, 2, len(index))).float()
    length = torch.full((len(index),), 5)
    plain = Groups(index, len(sizes), reward, length, length > 9, 9)
    return plain if history is None else replace(plain, history=history)


# -- constant boost


@given(st.integers(0, 1000), st.floats(0.05, 1.0))
@settings(max_examples=50, deadline=None)
def test_a_constant_boost_is_one_factor_with_the_compensations_mean(seed: int, alpha: float) -> None:
    advantage = torch.randn(40, generator=torch.Generator().manual_seed(seed))
    advantage[:6] = 0.0
    tokens, off = tokens_of(advantage, seed), Stabilisation(floor=1.0)
    real = replace(DynaMO(), stabilisation=off, compensation=replace(DynaMO().compensation, alpha=alpha))
    control = ConstantBoost(stabilisation=off, compensation=real.compensation)
    positive = advantage > 0
    given_, wanted = control.modulate(tokens).advantage, real.modulate(tokens).advantage
    factor = given_[positive] / advantage[positive]
    torch.testing.assert_close(factor, factor[:1].expand_as(factor))
    torch.testing.assert_close(factor.mean(), (wanted[positive] / advantage[positive]).mean())
    assert 1 < float(factor[0]) < 1 + alpha
    assert torch.equal(given_[~positive], advantage[~positive])


def test_a_constant_boost_keeps_the_stabilisation_and_needs_a_positive_token() -> None:
    advantage = torch.tensor([1.0, -2.0, 0.5, -0.5, 1.5])
    tokens = tokens_of(advantage)
    alone = replace(ConstantBoost(), stabilisation=Stabilisation(floor=1.0)).modulate(tokens).advantage
    both = ConstantBoost().modulate(tokens).advantage
    torch.testing.assert_close(both, alone * ConstantBoost().stabilisation(tokens))
    assert not torch.equal(both, alone)
    negative = tokens_of(-advantage.abs())
    assert torch.equal(ConstantBoost().modulate(negative).advantage, negative.advantage * Stabilisation()(negative))


# -- allocations


@given(st.integers(0, 1000), st.integers(12, 200))
@settings(max_examples=50, deadline=None)
def test_a_shuffled_allocation_has_neymans_histogram(seed: int, budget: int) -> None:
    history = random_history(seed)
    n = DynaMOAllocation().allocate(history, budget, rng())
    shuffled = ShuffledAllocation().allocate(history, budget, rng(seed))
    assert shuffled.dtype == np.int64
    assert shuffled.sum() == budget
    assert sorted(shuffled) == sorted(n)
    assert np.array_equal(shuffled, ShuffledAllocation().allocate(history, budget, rng(seed)))


def test_a_shuffled_allocation_forgets_which_prompt_was_which() -> None:
    history = seen([0, 8, 4, 4] * 3, [8, 8, 8, 8] * 3)
    n = DynaMOAllocation().allocate(history, 96, rng())
    draws = np.stack([ShuffledAllocation().allocate(history, 96, rng(seed)) for seed in range(400)])
    assert sorted(set(n)) == [6, 10]
    # Every prompt gets the mean on average: 8, with a standard error of .1.
    np.testing.assert_allclose(draws.mean(0), 8.0, atol=0.5)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20), st.integers(0, 300))
@settings(max_examples=100, deadline=None)
def test_dead_prompts_are_skipped_and_the_rest_is_uniform(outcomes: list[tuple[int, int]], budget: int) -> None:
    history = seen([r for r, _ in outcomes], [r + w for r, w in outcomes])
    dead = np.array([(r == 0) != (w == 0) for r, w in outcomes])
    n = SkipDead(revisit=0.0).allocate(history, budget, rng())
    assert n.dtype == np.int64
    assert n.sum() == budget
    alive = n[~dead] if not dead.all() else n
    assert np.ptp(alive) <= 1
    ceiling = int(np.ceil(2 * budget / len(n)))
    assert n.max() <= ceiling
    if dead.any() and not dead.all():
        # Only what the others cannot take reaches the dead, evenly.
        assert n[dead].sum() == max(0, budget - ceiling * int((~dead).sum()))
        assert np.ptp(n[dead]) <= 1


def test_dead_prompts_come_back_by_chance_or_where_all_are_dead() -> None:
    history = seen([0, 8, 8, 3, 0, 5], [8, 8, 8, 8, 0, 8])
    assert SkipDead(revisit=0.0).allocate(history, 48, rng()).tolist() == [0, 0, 0, 16, 16, 16]
    assert SkipDead(revisit=0.0, n_high=12).allocate(history, 48, rng()).tolist() == [4, 4, 4, 12, 12, 12]
    assert SkipDead(revisit=1.0).allocate(history, 48, rng()).tolist() == [8] * 6
    again = [SkipDead(revisit=0.25).allocate(history, 30, rng(seed))[0] > 0 for seed in range(800)]
    assert np.mean(again) == pytest.approx(0.25, abs=0.05)
    assert SkipDead(revisit=0.0).allocate(seen([0, 8], [8, 8]), 9, rng()).tolist() == [5, 4]
    for bad in ({"revisit": -0.1}, {"revisit": 1.1}, {"n_high": 0}):
        with pytest.raises(ValueError, match="revisit"):
            registry.build("control_skip_dead", bad)


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_oracle_minimises_the_variance_of_its_probe_whatever_the_history(seed: int) -> None:
    probe = rng(seed).binomial(64, rng(seed + 1).beta(0.5, 0.5, 4))
    view = replace(random_history(seed, 4), probe_successes=probe, probe_trials=np.full(4, 64))
    n = OracleAllocation().allocate(view, 24, rng())
    assert n.sum() == 24
    p = probe / 64
    low, high = OracleAllocation().allocation.bounds(4, 24)
    grid = np.stack(np.meshgrid(*[np.arange(low, high + 1)] * 4), -1).reshape(-1, 4)
    grid = grid[grid.sum(1) == 24]
    best = (p * (1 - p) / grid).sum(1).min()
    assert (p * (1 - p) / n).sum() == pytest.approx(best, abs=1e-12)
    other = replace(random_history(seed + 7, 4), probe_successes=probe, probe_trials=np.full(4, 64))
    assert np.array_equal(n, OracleAllocation().allocate(other, 24, rng()))


def test_the_oracle_asks_for_free_rollouts_and_is_uniform_without_them() -> None:
    assert OracleAllocation().probe == Probe(64, charged=False)
    assert OracleAllocation().allocate(seen([4, 0, 8], [8, 8, 8]), 9, rng()).tolist() == [3, 3, 3]
    told = replace(seen([4], [8]), probe_successes=np.array([32]), probe_trials=np.array([64]))
    assert OracleAllocation().allocate(told, 5, rng()).tolist() == [5]
    with pytest.raises(ValueError, match="at least 1"):
        registry.build("control_oracle_allocation", {"rollouts": 0})
    charged = [name for name in registry.names() if (probe := registry.build(name, {}).probe) and probe.charged]
    assert charged == ["cures", "gradalign", "gvm", "gvm_raft"]


# -- objective


@given(st.integers(0, 1000), st.integers(2, 12))
@settings(max_examples=50, deadline=None)
def test_objective_weights_are_the_allocation_that_is_not_made(seed: int, size: int) -> None:
    history = random_history(seed)
    method, budget = ObjectiveWeights(), 12 * size
    assert method.allocate(history, budget, rng()).tolist() == [size] * 12
    groups = groups_of([size] * 12, history, seed)
    n = DynaMOAllocation().allocate(history, budget, rng())
    weight = torch.from_numpy(n / size).float()[groups.prompt]
    torch.testing.assert_close(method.credit(groups), GRPO().credit(groups) * weight)
    assert float(weight.sum()) == pytest.approx(budget, rel=1e-5)


def test_objective_weights_count_what_each_prompt_got() -> None:
    history = seen([4, 0, 4], [8, 8, 8])
    groups = groups_of([4, 4, 1], history)
    n = DynaMOAllocation().allocate(history, 9, rng())
    expected = GRPO().credit(groups) * torch.tensor([n[0] / 4, n[1] / 4, n[2] / 1]).float()[groups.prompt]
    torch.testing.assert_close(ObjectiveWeights().credit(groups), expected)
    assert n[0] > n[1]


def test_scaling_an_advantage_scales_the_loss_of_its_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    new, old, advantage = (torch.randn(200, generator=draw) for _ in range(3))
    weight = torch.rand(200, generator=draw) + 0.1
    torch.testing.assert_close(
        surrogate(new, old, weight * advantage, Loss()), weight * surrogate(new, old, advantage, Loss())
    )


def test_objective_weights_of_a_uniform_allocation_are_grpo_bit_for_bit(train: Train, policy: str) -> None:
    budget = {"currency": "rollouts", "amount": 424}
    reference = train("grpo", budget=budget)
    bounds = {"allocation": {"n_low": 8, "n_high": 8}}
    other = train("control_objective_weights", bounds, name="other", budget=budget)
    weighted = train("control_objective_weights", name="weighted", budget=budget)
    training.assert_trained(reference, policy)
    training.assert_same_weights(reference, other)
    assert (reference / "allocation.jsonl").read_bytes() == (weighted / "allocation.jsonl").read_bytes()
    with pytest.raises(AssertionError):
        training.assert_same_weights(reference, weighted)


@pytest.mark.parametrize(("advantage", "same_as"), [("std", "grpo"), ("mean", "dr_grpo"), ("rloo", "rloo")])
def test_the_advantage_of_the_allocation_is_that_of_the_baseline_named(advantage: str, same_as: str) -> None:
    method = registry.build("control_advantage", {"advantage": advantage})
    groups, history = groups_of([5, 1, 0, 2, 9]), random_history(3)
    assert torch.equal(method.credit(groups), registry.build(same_as, {}).credit(groups))
    assert np.array_equal(method.allocate(history, 96, rng()), DynaMOAllocation().allocate(history, 96, rng()))
    assert method.loss == DynaMOAllocation().loss
    assert isinstance(method, Advantage)


# -- the study


def test_the_ablation_is_payable_and_its_arms_differ() -> None:
    assert len(ARMS) <= 24
    plan = compose_study("ablation")
    assert (len(STUDY.seeds), STUDY.scale, STUDY.reference) == (5, "small", "grpo")
    assert [run.arm for run in plan.runs] == list(ARMS) * 5
    assert len({canonical(run.method) for run in plan.runs}) == len(ARMS)
    built = [registry.build(arm.name, arm.params) for arm in ARMS.values()]
    assert len({f"{type(method)} {method}" for method in built}) == len(built)


def test_every_control_of_the_registry_is_an_arm_that_a_claim_is_about() -> None:
    named = {label for claim in STUDY.claims for label in (claim.arm, claim.reference)}
    assert named == set(ARMS)
    controls = {name for name in registry.names() if registry.load(name).kind == "control"}
    assert controls == {arm.name for arm in ARMS.values() if arm.name.startswith("control_")}
    assert len({claim.id for claim in STUDY.claims}) == len(STUDY.claims)
    for name in controls:
        assert registry.describe(name).reference == "2602.19208"


def test_compared_arms_differ_in_one_decision() -> None:
    """Where a claim isolates a part, everything else about the two arms is the same."""

    def method(label: str) -> Method:
        return registry.build(ARMS[label].name, ARMS[label].params)

    same_loss = [
        ("dynamo_allocation", "control_shuffled_allocation"),
        ("dynamo_allocation", "control_skip_dead"),
        ("dynamo_allocation", "control_oracle_allocation"),
        ("dynamo", "control_constant_boost"),
        ("allocation_std_by_n", "control_objective_weights"),
    ]
    groups, tokens = groups_of([5, 1, 0, 2, 9]), tokens_of(torch.randn(30))
    history = random_history(5)
    for first, second in same_loss:
        a, b = method(first), method(second)
        assert a.loss == b.loss, (first, second)
        if second != "control_objective_weights":
            assert torch.equal(a.credit(groups), b.credit(groups))
        if second == "control_constant_boost":
            assert np.array_equal(a.allocate(history, 96, rng()), b.allocate(history, 96, rng()))
        else:
            assert torch.equal(a.modulate(tokens).advantage, b.modulate(tokens).advantage)


@pytest.mark.parametrize("label", ARMS)
def test_every_arm_of_the_ablation_runs_to_the_end_of_its_budget(train: Train, label: str) -> None:
    out = train(ARMS[label].name, ARMS[label].params, name="run", budget={"currency": "rollouts", "amount": 281})
    result = json.loads((out / "result.json").read_text())
    assert result["spent"]["rollouts"] == sum(result["drawn"].values()) == 281
    assert result["steps"] >= 4  # prompts come back after three steps, so that histories act
    steps = training.rows(out, "metrics.jsonl")
    assert any(row["metrics"].get("optim/gradient_norm", 0.0) > 0 for row in steps)
    assert (result["oracle"]["rollouts"] > 0) == (label == "control_oracle_allocation")
    if label == "control_oracle_allocation":
        assert result["oracle"]["rollouts"] == 64 * sum(row["metrics"]["rollout/prompts"] for row in steps)
