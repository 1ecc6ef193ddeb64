"""The arms beyond the main table, against examples worked out by hand and the equations they stand for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import beta
from torch import Tensor

from baselines.coba_rl import CoBARL
from baselines.hora import HORA, at_least_one
from baselines.knapsack import Knapsack
from baselines.rollout_scan import pad, positions, unpad
from benchmark import registry
from benchmark.groups import Groups
from benchmark.history import HistoryView, PromptHistory
from benchmark.losses import surrogate
from benchmark.method import Loss, Method, Tokens
from methods.allocation import Floats
from methods.objectives import both_outcomes

# Five prompts: 1 of 4 right, no rollout, a single right one, all right, none right.
PROMPT = torch.tensor([0, 0, 0, 0, 2, 3, 3, 4, 4])
REWARD = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
LENGTH = torch.tensor([4, 8, 9, 10, 10, 3, 10, 2, 10])
GROUPS = Groups(PROMPT, 5, REWARD, LENGTH, LENGTH == 10, 10)
GRPO = [1.5, -0.5, -0.5, -0.5, *[0.0] * 5]
CREDIT = {
    "cispo": GRPO,
    "gspo": GRPO,
    "dppo_tv": GRPO,
    "dppo_kl": GRPO,
    "minpro": GRPO,
    "capo": GRPO,
    "lco": GRPO,
    "oblr_po": REWARD.tolist(),
    "knapsack": GRPO,
    "hora": GRPO,
    "coba_rl": GRPO,
    # b = 4 / (4 + 8 + 9 + 10)
    "opo": [27 / 31, -4 / 31, -4 / 31, -4 / 31, *[0.0] * 5],
    "otb": REWARD.tolist(),
    # Means 1/4, 1, 1, 0; within (1/12 + 0 + 0) / 3 = 1/36; between var - 1/64 = 1/4; k = 1/10.
    "shrinkage": [
        1 - 0.1 * 2 / 3,
        *[-(0.9 / 3 + 0.1 * 2 / 3)] * 3,
        1 - 1.25 / 3,
        *[1 - (0.9 + 0.1 * 1.25 / 3)] * 2,
        *[-0.1 * 0.75] * 2,
    ],
}
LIKELIHOOD = Loss(surrogate="log_likelihood")
LOSSES = {
    "lco": Loss(surrogate="logits"),
    **dict.fromkeys(("cispo", "dppo_tv", "dppo_kl", "minpro"), LIKELIHOOD),
    "gspo": Loss(surrogate="log_likelihood", clip_low=3e-4, clip_high=4e-4, aggregation="sequence_mean"),
}


@pytest.mark.parametrize("name", CREDIT)
def test_advantages_and_losses(name: str) -> None:
    method: Method = registry.build(name, {})
    assert method.credit(GROUPS).tolist() == pytest.approx(CREDIT[name], abs=2e-5)
    assert method.keep(GROUPS).tolist() == [True, False, True, True, True]
    assert method.loss == LOSSES.get(name, Loss())


def sampled(
    advantage: list[float], ratio: list[float], log_prob: list[float], rollout: list[int], loss: Loss, prompt: list[int]
) -> Tokens:
    log_p = torch.tensor(log_prob)
    return Tokens(
        torch.tensor(advantage),
        log_p,
        log_p - torch.tensor(ratio).log(),
        torch.full_like(log_p, 0.5),
        torch.full_like(log_p, 0.3),
        torch.full_like(log_p, -0.2),
        torch.tensor(rollout),
        torch.full_like(log_p, 0.5),
        loss,
        torch.tensor(prompt),
    )


def modulated(name: str, advantage: list[float], ratio: list[float], rollout: list[int] | None = None) -> list[float]:
    method: Method = registry.build(name, {})
    rollout = rollout or list(range(len(ratio)))
    tokens = sampled(advantage, ratio, [-1.0] * len(ratio), rollout, method.loss, [0] * len(ratio))
    return method.modulate(tokens).advantage.tolist()


def test_cispo_bounds_weights_and_keeps_every_gradient() -> None:
    found = modulated("cispo", [1.0, 1.0, -2.0, -2.0, 1.0], [0.5, 1.1, 1.5, 0.7, 3.0])
    assert found == pytest.approx([0.8, 1.1, -2.4, -1.6, 1.2])


def test_dppo_blocks_only_what_leads_away() -> None:
    pi = math.exp(-1)
    # mu = pi / r: |pi - mu| is .368 |1 - 1/r|; r = 2 and r = .6 leave .15, r = 1.5 does not.
    assert abs(pi - pi / 2) > 0.15 > abs(pi - pi / 1.5)
    found = modulated("dppo_tv", [1.0, 1.0, 1.0, -1.0, -1.0], [2.0, 1.5, 0.6, 0.6, 2.0])
    assert found == pytest.approx([0.0, 1.5, 0.6, 0.0, -2.0])
    mu = pi / 1.5
    kl = mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))
    assert kl < 0.05
    mu = pi / 2
    assert mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi)) > 0.05
    assert modulated("dppo_kl", [1.0, 1.0], [2.0, 1.5]) == pytest.approx([0.0, 1.5])
    assert modulated("dppo_tv", [-1.0], [30.0]) == pytest.approx([-20.0])


def test_minpro_takes_the_smallest_ratio_before_the_token() -> None:
    # Rollout 0: 1.1, .9, 1.1, .95; rollout 1 begins anew.
    found = modulated("minpro", [1.0] * 6, [1.1, 0.9, 1.1, 0.95, 1.05, 1.1], [0, 0, 0, 0, 1, 1])
    assert found == pytest.approx([1.1, 0.9 * 1.1, 1.1 * 0.9, 0.95 * 0.9, 1.05, 1.1 * 1.05])
    assert modulated("minpro", [1.0, -1.0], [1.3, 0.7]) == [0.0, 0.0]


def test_gspos_gradient_is_that_of_its_sequence_ratio() -> None:
    method: Method = registry.build("gspo", {"loss": {"clip_low": 0.05, "clip_high": 0.05}})
    random = torch.Generator().manual_seed(0)
    rollout = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    advantage = torch.tensor([1.0, -0.7, 0.4])
    log_prob = (-1 + 0.3 * torch.randn(8, generator=random)).requires_grad_()
    old = log_prob.detach() + torch.tensor([0.02, -0.03, 0.01, 0.3, 0.2, -0.3, -0.1, -0.2])
    length = torch.bincount(rollout)

    s = torch.exp(torch.zeros(3).index_add(0, rollout, log_prob - old) / length)
    plain = torch.maximum(-advantage * s, -advantage * s.clamp(0.95, 1.05)).mean()
    (expected,) = torch.autograd.grad(plain, log_prob)
    assert (expected == 0).tolist() == [False] * 3 + [True] * 5  # the last two rollouts are clipped

    zero = torch.zeros(8)
    tokens = Tokens(advantage[rollout], log_prob.detach(), old, zero, zero, zero, rollout, zero, method.loss)
    per_token = surrogate(log_prob, old, method.modulate(tokens).advantage, method.loss)
    (found,) = torch.autograd.grad((per_token / length[rollout]).sum() / 3, log_prob)
    torch.testing.assert_close(found, expected)


def test_the_log_likelihood_has_the_gradient_of_the_plain_ratio() -> None:
    """With the ratio as detached weight: d(-A r)/d log pi = -A r."""
    log_prob = torch.tensor([-1.0, -2.0], requires_grad=True)
    old, advantage = torch.tensor([-1.3, -1.9]), torch.tensor([0.5, -1.0])
    (plain,) = torch.autograd.grad(surrogate(log_prob, old, advantage, Loss(clip=False)).sum(), log_prob)
    weighted = advantage * torch.exp(log_prob.detach() - old)
    (found,) = torch.autograd.grad(surrogate(log_prob, old, weighted, LIKELIHOOD).sum(), log_prob)
    torch.testing.assert_close(found, plain)


def test_scans_run_along_rollouts() -> None:
    rollout = torch.tensor([0, 0, 1, 2, 2, 2])
    assert positions(rollout).tolist() == [0, 1, 0, 0, 1, 2]
    values = torch.arange(1.0, 7.0)
    table = pad(values, rollout, fill=-1.0)
    assert table.tolist() == [[1, 2, -1], [3, -1, -1], [4, 5, 6]]
    assert torch.equal(unpad(table, rollout), values)


def test_the_optimal_token_baseline_by_a_loop() -> None:
    method: Method = registry.build("otb", {})
    lengths, prompt_of, reward = [3, 2, 1, 2], [0, 0, 1, 1], [1.0, 0.0, 1.0, 0.0]
    rollout = [r for r, n in enumerate(lengths) for _ in range(n)]
    log_prob = (-0.8 - torch.arange(8.0) / 5).tolist()
    prompt = [prompt_of[r] for r in rollout]
    tokens = sampled([reward[r] for r in rollout], [1.0] * 8, log_prob, rollout, method.loss, prompt)
    W: dict[tuple[int, int], float] = {}
    place = 0
    for r, n in enumerate(lengths):
        total = 0.0
        for t in range(n):
            total += 1 - 2 * math.exp(log_prob[place]) + 0.3
            W[r, t] = total
            place += 1
    expected = []
    for r, n in enumerate(lengths):
        for t in range(n):
            alive = [j for j in range(4) if prompt_of[j] == prompt_of[r] and (j, t) in W]
            b = sum(reward[j] * W[j, t] for j in alive) / sum(W[j, t] for j in alive)
            expected.append(reward[r] - b)
    assert method.modulate(tokens).advantage.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_rollout_that_is_left_alone_has_a_baseline_of_its_own_reward_or_of_zero() -> None:
    """Prompt 0: pi = 1/2 for three tokens, 1/4 for two; squared norms .3 and .8. Prompts 1 and 2: one rollout each."""
    log_prob, rollout = [math.log(0.5)] * 3 + [math.log(0.25)] * 4, [0, 0, 0, 1, 1, 2, 3]
    b = 0.3 / (0.3 + 0.8)  # W = .3, .6, .9 against .8, 1.6
    for zero_tail, alone in ((False, 0.0), (True, 1.0)):
        method: Method = registry.build("otb", {"zero_tail": zero_tail})
        given = [1.0, 1, 1, 0, 0, 1, 0]
        tokens = sampled(given, [1.0] * 7, log_prob, rollout, method.loss, [0, 0, 0, 0, 0, 1, 2])
        found = method.modulate(tokens).advantage.tolist()
        assert found == pytest.approx([1 - b, 1 - b, alone, -b, -b, alone, 0], abs=1e-6)


def seen(successes: list[int], trials: list[int]) -> HistoryView:
    """The view after one step, in which every prompt with a trial had its first visit."""
    k, n = np.array(successes), np.array(trials)
    rate = k[n > 0] / n[n > 0]
    step = np.array([[(rate == 0).mean(), (rate == 1).mean(), rate.mean()]])
    return HistoryView(k.astype(float), n.astype(float), (n > 0).astype(np.int64), k, n, batches=step)


RNG = np.random.default_rng(0)


def test_knapsack_is_optimal_and_leaves_solved_prompts_the_minimum() -> None:
    history = seen([0, 8, 1, 4], [8, 8, 8, 8])
    n = Knapsack(n_high=12).allocate(history, 24, RNG)
    p = np.array([0, 1, 0.125, 0.5])

    def worth(n: np.ndarray) -> float:
        return float((both_outcomes(p, n) * p * (1 - p) ** 2).sum())

    choices = [np.array(c) for c in product(range(2, 13), repeat=4) if sum(c) == 24]
    assert worth(n) == pytest.approx(max(map(worth, choices)))
    assert n[0] == n[1] == 2
    # What the live ones cannot hold goes to the failed prompt before the solved one.
    np.testing.assert_array_equal(Knapsack(n_high=12).allocate(history, 40, RNG), [12, 4, 12, 12])
    np.testing.assert_array_equal(Knapsack().allocate(seen([0, 8, 0], [8, 8, 0]), 24, RNG), [8, 8, 8])


def best_of_all(value: Callable[[tuple[int, ...]], float], prompts: int, budget: int) -> tuple[int, ...]:
    """The allocation of largest value, by trying all with at least 2 rollouts a prompt; no other comes near it."""
    counts = range(2, budget - 2 * (prompts - 1) + 1)
    ranked = sorted((n for n in product(counts, repeat=prompts) if sum(n) == budget), key=value)
    assert value(ranked[-1]) - value(ranked[-2]) > 1e-5
    return ranked[-1]


def test_knapsacks_value_prefers_hard_prompts() -> None:
    p = [0.125, 0.5, 0.875]

    def worth(n: tuple[int, ...]) -> float:
        return sum((1 - q**m - (1 - q) ** m) * q * (1 - q) ** 2 for m, q in zip(n, p, strict=True))

    assert best_of_all(worth, 3, 24) == (15, 7, 2)
    assert Knapsack().allocate(seen([1, 4, 7], [8, 8, 8]), 24, RNG).tolist() == [15, 7, 2]


def test_hora_counts_the_chance_of_a_first_success() -> None:
    a, b = np.array([1.0, 3.0]), np.array([4.0, 2.0])
    found = at_least_one(a, b, 5)
    for row in range(2):
        grid = np.linspace(0, 1, 200_001)
        density = beta.pdf(grid, a[row], b[row])
        for m in range(6):
            integral = np.trapezoid((1 - (1 - grid) ** m) * density, grid)
            assert found[row, m] == pytest.approx(integral, abs=1e-4)
    history = seen([0, 8, 4], [8, 8, 8])
    n = HORA(n_low=1, n_high=30).allocate(history, 18, RNG)
    value = at_least_one(*history.posterior((1.0, 1.0)), 18)
    best = max(
        (np.array(c) for c in product(range(1, 19), repeat=3) if sum(c) == 18),
        key=lambda c: value[np.arange(3), c].sum(),
    )
    np.testing.assert_array_equal(n, best)
    assert n[0] > n[2] > n[1]


def test_coba_moves_from_easy_to_hard() -> None:
    rule = CoBARL()
    assert rule.shape(0.9) == pytest.approx(2 + 7 * 0.9)
    assert rule.shape(0.3) == pytest.approx(2 + 7 / (1 + math.exp(2)))
    early = rule.allocate(seen([0, 0, 1, 6, 0], [8, 8, 8, 8, 8]), 40, RNG)
    late = rule.allocate(seen([8, 8, 1, 6, 8], [8, 8, 8, 8, 8]), 40, RNG)
    assert early[3] > early[2]
    assert late[2] > late[3]
    for n in (early, late):
        assert n.sum() == 40
        assert n.min() == 2


def steps(rates: list[float]) -> Floats:
    """``history.batches`` of steps with these success rates."""
    return np.array([[0.0, 0.0, rate] for rate in rates]).reshape(-1, 3)


def test_cobas_failure_rate_is_a_moving_average_over_steps() -> None:
    assert CoBARL().failure(steps([0.3])) == pytest.approx(0.7)
    assert CoBARL(span=1.0).failure(steps([0.25, 0.75])) == pytest.approx(1 - (0.25 / 2 + 0.75) / 1.5)
    # Half after four steps: weights .5, .5946, .7071, .8409, 1.
    assert CoBARL().failure(steps([1.0, 0.0, 0.0, 0.0, 0.0])) == pytest.approx(1 - 0.5 / 3.6426, abs=1e-5)
    # A prompt that got 64 rollouts counts as one that got 2: failure rates 6/64, 1, 1, 1.
    memory = PromptHistory(4)
    memory.record_step(np.array([58.0, 0.0, 0.0, 0.0]), np.array([64.0, 2.0, 2.0, 2.0]))
    assert CoBARL().failure(memory.view(range(4)).batches) == pytest.approx((6 / 64 + 3) / 4)
    with pytest.raises(ValueError, match="span"):
        CoBARL(span=0.0)


def test_coba_is_optimal_for_the_failure_rate_of_its_steps() -> None:
    # Success rates 1/4, 1/2, 3/4 in 4, 4 and 64 rollouts; steps that failed at .7 and .55: F = (.35 + .55) / 1.5 = .6.
    history = replace(seen([1, 2, 48], [4, 4, 64]), batches=steps([0.3, 0.45]))
    p, a = [0.25, 0.5, 0.75], 2 + 7 * 0.6

    def worth(n: tuple[int, ...]) -> float:
        return sum((1 - math.exp(-m * q * (1 - q))) * beta.pdf(q, a, 11 - a) for m, q in zip(n, p, strict=True))

    assert best_of_all(worth, 3, 24) == (2, 11, 11)
    assert CoBARL(span=1.0).allocate(history, 24, RNG).tolist() == [2, 11, 11]
    # Before a step is over no failure rate is known.
    unknown = replace(history, batches=steps([]))
    assert CoBARL().allocate(unknown, 25, RNG).tolist() == [9, 8, 8]


@pytest.mark.parametrize("name", ["knapsack", "hora", "coba_rl"])
@pytest.mark.parametrize("budget", [1, 4, 7, 33, 64])
def test_any_budget_is_met(name: str, budget: int) -> None:
    for history in (seen([0, 8, 1, 4], [8, 8, 8, 8]), seen([0, 0, 0, 0], [8, 0, 0, 0]), seen([8] * 4, [8] * 4)):
        n = registry.build(name, {}).allocate(history, budget, RNG)
        assert n.dtype == np.int64
        assert n.sum() == budget
        assert n.min() >= 0


def test_shrinkage_needs_no_second_group() -> None:
    one = Groups(torch.zeros(3, dtype=torch.int64), 1, torch.tensor([1.0, 0.0, 0.0]), LENGTH[:3], LENGTH[:3] == 0, 10)
    found: Tensor = registry.build("shrinkage", {}).credit(one)
    assert found.tolist() == pytest.approx([1.0, -0.5, -0.5])


def test_the_table_of_arms_lists_every_arm_with_its_changes() -> None:
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    said = {name: (place, row) for row in rows for place, name in enumerate(re.findall(r"`(\w+)`", row[0]))}
    for name in registry.names():
        cls = registry.load(name)
        if not cls.__module__.startswith(("baselines.", "methods.")):
            continue
        place, row = said[name]
        if cls.kind == "control":
            continue
        told = row[1].split("; ")
        changes = told[min(place, len(told) - 1)]
        if not changes.startswith("("):
            assert [change.strip() for change in changes.split(",")] == list(cls.changes), name
