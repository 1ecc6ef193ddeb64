"""The arms that choose what is sampled, against examples worked out by hand and closed forms."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from baselines.ar3po import AR3PO
from baselines.cures import CurES, deviations, success_rates
from baselines.gradalign import GradAlign
from baselines.greso import GRESO
from baselines.gvm import GVM, GVMRAFT
from baselines.reinforce_ada import ReinforceAda
from baselines.sage import SAGE
from baselines.vip import VIP, predicted
from benchmark import collect, registry
from benchmark.collect import Collector
from benchmark.draws import Batch
from benchmark.groups import Groups
from benchmark.history import HistoryView, PromptHistory
from benchmark.method import Loss, Method, Probe
from benchmark.rollouts import Rollouts
from benchmark.verdict import Verdict
from methods.proportional import proportional

sys.path.append(str(Path(__file__).parent))
training: Any = importlib.import_module("test_training")
probing: Any = importlib.import_module("test_probing")
policy, train = training.policy, training.train

# Five prompts: 1 of 4 right, no rollout, a single right one, all right, none right.
PROMPT = torch.tensor([0, 0, 0, 0, 2, 3, 3, 4, 4])
REWARD = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
LENGTH = torch.tensor([4, 8, 9, 10, 10, 3, 10, 2, 10])
GROUPS = Groups(PROMPT, 5, REWARD, LENGTH, LENGTH == 10, 10)
GRPO = [1.5, -0.5, -0.5, -0.5, *[0.0] * 5]
CREDIT = {
    "gvm": GRPO,
    "gvm_raft": REWARD.tolist(),
    "gradalign": GRPO,
    "cures": GRPO,
    "greso": GRPO,
    "reinforce_ada": [0.75, -0.25, -0.25, -0.25, *[0.0] * 5],
    "ar3po": GRPO,
    "vip": [1.0, *[-1 / 3] * 3, *[0.0] * 5],
    "sage": GRPO,
}
LOSSES = {"reinforce_ada": Loss(clip_high=0.28, entropy_coefficient=1e-4), "vip": Loss(prompt_weight="equal")}


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def seen(successes: list[int], trials: list[int]) -> HistoryView:
    memory = PromptHistory(len(trials))
    memory.record(range(len(trials)), np.array(successes, dtype=float), np.array(trials, dtype=float))
    return memory.view(range(len(trials)))


def probed(successes: list[int], trials: int, norm: list[list[float]], square: list[list[float]]) -> HistoryView:
    view = HistoryView.unseen(len(successes))
    return replace(
        view,
        probe_successes=np.array(successes),
        probe_trials=np.full(len(successes), trials),
        probe_norm=np.array(norm),
        probe_square=np.array(square),
    )


def groups_of(outcomes: list[list[int]]) -> Groups:
    prompt = torch.tensor([i for i, row in enumerate(outcomes) for _ in row], dtype=torch.int64)
    reward = torch.tensor([float(r) for row in outcomes for r in row])
    length = torch.ones(len(reward), dtype=torch.int64)
    return Groups(prompt, len(outcomes), reward, length, length > 1, 10)


@pytest.mark.parametrize("name", CREDIT)
def test_advantages_and_losses(name: str) -> None:
    method: Method = registry.build(name, {})
    assert method.credit(GROUPS).tolist() == pytest.approx(CREDIT[name], abs=2e-5)
    assert method.keep(GROUPS).tolist() == [True, False, *[name != "greso"] * 3]
    assert method.loss == LOSSES.get(name, Loss())


def test_shares_are_rounded_by_largest_remainders() -> None:
    # 2.33, 1.17, 3.5: floors 2, 1, 3, the unit left goes to .5.
    assert proportional([2.0, 1.0, 3.0], 7).tolist() == [2, 1, 4]
    assert proportional([1.0, 1.0, 0.0], 3).tolist() == [2, 1, 0]
    assert proportional([1e-300, 1e300], 5).tolist() == [0, 5]
    for bad in ([0.0, 0.0], [-1.0, 2.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="not all 0"):
            proportional(bad, 3)


def test_gvm_follows_its_weight() -> None:
    assert GVM().probe == Probe(8, gradients="embedding")
    view = probed([0, 2, 8, 4], 8, [[1, 0], [1, 4], [0, 2], [1, 0]], [[1, 1]] * 4)
    # w = 0; 4 / sqrt(.25 + .001 / .25); 2 / sqrt(1 + .001); 0 without a gradient
    w = np.array([0, 4 / math.sqrt(0.254), 2 / math.sqrt(1.001), 0])
    assert (w / w.sum() * 30).tolist() == pytest.approx([0, 23.96, 6.04, 0], abs=0.01)
    assert GVM().allocate(view, 30, rng()).tolist() == [0, 24, 6, 0]
    assert GVM().allocate(HistoryView.unseen(4), 10, rng()).tolist() == [3, 3, 2, 2]
    # Equal gradients: hard prompts are fed, most of all p = sqrt(alpha).
    rates = np.linspace(0.01, 1, 100)
    view = probed([int(100 * p) for p in rates.round(2)], 100, [[1, 1]] * 100, [[1, 1]] * 100)
    n = GVM().allocate(view, 100_000, rng())
    assert rates[n.argmax()] == pytest.approx(math.sqrt(1e-3), abs=0.01)


def test_raft_trains_on_right_rollouts() -> None:
    assert GVMRAFT().keep_rollouts(GROUPS).tolist() == (REWARD > 0).tolist()


def test_gradalign_takes_the_best_of_its_pool() -> None:
    view = replace(
        HistoryView.unseen(4), probe_alignment=np.array([[4, 0.1, 0.3], [3, 0.2, 0.1], [0, 0, 0], [-1, -0.5, -0.9]])
    )
    assert GradAlign().select(view, 2, rng()).tolist() == [True, True, False, False]
    assert GradAlign().select(view, 1, rng()).tolist() == [False, True, False, False]
    assert GradAlign(score="dot").select(view, 1, rng()).tolist() == [True, False, False, False]
    assert GradAlign(score="debiased").select(view, 3, rng()).tolist() == [True, True, True, False]
    assert GradAlign().select(HistoryView.unseen(4), 2, rng()).tolist() == [True, True, False, False]
    assert GradAlign().probe == Probe(4, candidates=True, trusted=8, trusted_rollouts=8)


def test_cures_weighs_the_gradients_of_both_outcomes() -> None:
    # p = (1 + 5) / (2 + 8) = .6 and q = .4; wrong ones of norm 1 and mean square 2, right ones 3 and 10.
    view = probed([5], 8, [[1.0, 3.0]], [[2.0, 10.0]])
    assert success_rates(view).tolist() == [pytest.approx(0.6)]
    expected = 0.6 * 0.16 * 10 + 0.36 * 0.4 * 2 - (0.24 * 2) ** 2
    assert deviations(view).tolist() == [pytest.approx(math.sqrt(expected))]
    # The law it stands for: the variance of A G with A = q, G = 3.. where right and -p, G = .. where wrong, in one
    # dimension: p q^2 E G_c^2 + p^2 q E G_w^2 - (p q (E G_c - E G_w))^2.
    right, wrong = np.array([3.0 + 1, 3.0 - 1]), np.array([1.0 + 1, 1.0 - 1])
    values = np.concatenate([0.4 * right, -0.6 * wrong])
    chance = np.array([0.3, 0.3, 0.2, 0.2])
    assert (chance * values**2).sum() - (chance * values).sum() ** 2 == pytest.approx(expected)
    # Equal norms, and a class that was not seen: |G| sqrt(p q).
    same = probed([3, 8], 8, [[2.0, 2.0], [0.0, 2.0]], [[4.0, 4.0], [0.0, 4.0]])
    p = success_rates(same)
    np.testing.assert_allclose(deviations(same), 2 * np.sqrt(p * (1 - p)))


def test_cures_allocates_in_proportion_and_draws_by_its_exponent() -> None:
    view = probed([3, 3], 6, [[1.0, 1.0], [3.0, 3.0]], [[1.0, 1.0], [9.0, 9.0]])
    assert CurES().allocate(view, 40, rng()).tolist() == [10, 30]
    assert CurES().allocate(HistoryView.unseen(3), 7, rng()).tolist() == [3, 2, 2]
    history = seen([4, 0], [8, 8])
    p = success_rates(history)
    odds = np.exp(np.sqrt(p * (1 - p)) / 0.25)
    draw = rng()
    first = np.mean([CurES().select(history, 1, draw)[0] for _ in range(20_000)])
    assert first == pytest.approx(odds[0] / odds.sum(), abs=0.015)  # four standard errors
    assert CurES().select(history, 2, draw).all()
    with pytest.raises(ValueError, match="temperature"):
        CurES(temperature=0.0)


def test_greso_skips_by_streak() -> None:
    memory = PromptHistory(5)
    for right in ([8, 0, 4, 8], [8, 0, 8, 4], [8, 0, 8, 4]):
        memory.record(range(4), np.array(right, dtype=float), np.full(4, 8.0))
    view = memory.view(range(5))
    assert view.streak.tolist() == [3, 3, 2, 0, 0]
    assert GRESO().chances(view).tolist() == pytest.approx([0.125, 0.125, 0.25, 1.0, 1.0])
    assert GRESO(floor=0.2).chances(view).tolist() == pytest.approx([0.2, 0.2, 0.25, 1.0, 1.0])
    draw = rng()
    share = np.mean([GRESO().select(view, 5, draw) for _ in range(10_000)], axis=0)
    assert share.tolist() == pytest.approx([0.125, 0.125, 0.25, 1.0, 1.0], abs=0.02)
    assert not any(GRESO().select(view.select(np.array([0, 1])), 1, rng()).sum() == 0 for _ in range(20))


def test_greso_follows_the_share_of_silent_groups() -> None:
    # Targets: 1/6 all wrong, 1/12 all right. Hard: +, -, -; easy: +, +, -.
    batches = np.array([[0.1, 0.0, 0.5], [0.2, 0.08, 0.5], [0.3, 0.1, 0.5]])
    assert GRESO().explore(batches) == pytest.approx((0.49, 0.51))
    assert GRESO().explore(np.tile([1.0, 0.0, 0.0], (100, 1))) == pytest.approx((0.05, 0.95))
    assert GRESO().explore(np.zeros((0, 3))) == (0.5, 0.5)
    view = replace(seen([8, 0], [8, 8]), batches=batches)
    assert GRESO().chances(view).tolist() == pytest.approx([0.51, 0.49])


def test_greso_with_its_parts_off_draws_once_and_keeps_everything() -> None:
    off = GRESO(filter_groups=False, floor=1.0)
    assert off.max_draws == 1
    assert off.keep(GROUPS).tolist() == [True, False, True, True, True]
    assert off.select(seen([8, 0, 0], [8, 8, 8]), 3, rng()).all()


def test_reinforce_ada_goes_on_until_both_outcomes_are_there() -> None:
    groups = groups_of([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [], [1, 1, 1, 1, 0, 0]])
    assert ReinforceAda().extend(groups, 1).tolist() == [0, 8, 8, 8, 0]
    assert ReinforceAda(stop="positive").extend(groups, 1).tolist() == [0, 0, 8, 8, 0]
    rounds = ReinforceAda().rounds
    assert (rounds.most, rounds.first) == (4, 8)
    with pytest.raises(ValueError, match="even"):
        ReinforceAda(kept=3)


def test_reinforce_ada_keeps_half_of_each_outcome_where_it_can() -> None:
    outcomes = [[0, 1, 1, 0, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1], []]
    kept = ReinforceAda().keep_rollouts(groups_of(outcomes)).int().tolist()
    assert kept == [1, 1, 1, 1, 0, 0, *[1, 1, 1, 1, 0], *[1, 1, 1, 1, 0], *[1, 1, 1]]


def test_balancing_moves_the_objective_as_the_docstring_says() -> None:
    outcomes = [[1, 1] + [0] * 6]
    groups, method = groups_of(outcomes), ReinforceAda()
    p = 0.25
    # One parameter; E G = 0, so right rollouts of score 1 leave wrong ones -p / q. The gradient of p is p.
    G = torch.where(groups.reward > 0, 1.0, -p / (1 - p))
    kept = method.keep_rollouts(groups)
    update = float((method.credit(groups) * G)[kept].mean())
    assert update == pytest.approx(p * (1 - 2 * p * (1 - p)) / (2 * p * (1 - p)))


def test_ar3po_stops_at_the_first_correct_rollout() -> None:
    groups = groups_of([[0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], []])
    assert AR3PO().extend(groups, 1).tolist() == [0, 4, 0, 4]
    assert (AR3PO().rounds.most, AR3PO().rounds.first) == (2, 4)


def featured(successes: list[int], trials: list[int], x: list[float]) -> HistoryView:
    memory = PromptHistory(len(trials), features=np.array(x)[:, None])
    memory.record(range(len(trials)), np.array(successes, dtype=float), np.array(trials, dtype=float))
    return memory.view(range(len(trials)))


def test_vip_predicts_a_prompt_from_its_neighbours() -> None:
    view = featured([6, 1, 0], [8, 8, 0], [0.0, 2.0, 0.5])
    right, wrong = np.array([6.5, 1.5]), np.array([2.5, 7.5])
    z, noise = np.log(right / wrong), 1 / right + 1 / wrong

    def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1.5**2 * np.exp(-((a[:, None] - b) ** 2) / (2 * 2.0**2))  # the only distance is 2

    x = np.array([0.0, 2.0])
    weight = np.linalg.solve(kernel(x, x) + np.diag(noise), z - z.mean())
    mean = z.mean() + kernel(np.array([0.0, 2.0, 0.5]), x) @ weight
    np.testing.assert_allclose(predicted(view, 1.5), 1 / (1 + np.exp(-mean)), rtol=1e-8)
    # A view of some prompts knows what the others told.
    np.testing.assert_allclose(predicted(view.select(np.array([2])), 1.5), predicted(view, 1.5)[2:])
    assert predicted(featured([0], [0], [1.0]), 1.5).tolist() == [0.5]
    assert predicted(featured([1], [2], [1.0]), 1.5).tolist() == [0.5]


@pytest.mark.parametrize("form", ["rloo", "dr_grpo"])
def test_vip_minimises_the_variance_of_its_estimator(form: Any) -> None:
    view = featured([4, 0, 8, 1], [8, 8, 8, 8], [0.0, 3.0, -3.0, 1.0])
    method = VIP(form=form, n_low=2, n_high=12)
    p = predicted(view, method.amplitude)

    def variance(n: NDArray[np.int64]) -> float:
        return float((p * (1 - p) * (1 / (n - 1) if form == "rloo" else (n - 1) / n**2)).sum())

    n = method.allocate(view, 26, rng())
    choices = [np.array(c) for c in product(range(2, 13), repeat=4) if sum(c) == 26]
    assert variance(n) == pytest.approx(min(map(variance, choices)))
    assert n[0] == max(n) > min(n)
    assert method.allocate(featured([0] * 4, [0] * 4, [0.0, 1.0, 2.0, 3.0]), 24, rng()).tolist() == [6] * 4
    mean = registry.build("dr_grpo" if form == "dr_grpo" else "rloo", {})
    assert torch.equal(method.credit(GROUPS), mean.credit(GROUPS))


def test_sage_ranks_confident_mixed_prompts_first() -> None:
    memory = PromptHistory(4)
    memory.record(range(4), np.array([4.0, 4.0, 0.0, 8.0]), np.full(4, 8.0), None, np.array([8.0, 80.0, 8.0, 8.0]))
    view = memory.view(range(4))
    rule = SAGE(refresh=0.0, strength=0.0)

    def half(a: float, b: float) -> float:
        return math.gamma(a + 0.5) * math.gamma(b + 0.5) / math.gamma(a + b + 1) * math.gamma(a + b)

    mixed = half(5, 5) / (math.gamma(5) * math.gamma(5))
    dead = half(1, 9) / (math.gamma(1) * math.gamma(9))
    assert rule.scores(view).tolist() == pytest.approx([mixed / 1, mixed / 10, dead / 1, dead / 1])
    assert rule.select(view, 1, rng()).tolist() == [True, False, False, False]
    assert rule.select(view, 3, rng()).tolist() == [True, False, True, True]


def test_sage_refreshes_a_share_of_its_pool() -> None:
    memory = PromptHistory(16)
    memory.record(range(16), np.array([4.0] * 8 + [0.0] * 8), np.full(16, 8.0), None, np.full(16, 8.0))
    view, draw = memory.view(range(16)), rng()
    masks = np.array([SAGE().select(view, 8, draw) for _ in range(400)])
    assert (masks.sum(1) == 8).all()
    assert masks[:, :6].all()
    assert masks[:, 6:].mean() == pytest.approx(0.2)
    assert masks[:, 6:].any(0).all()


@pytest.mark.parametrize("name", ["gvm", "cures", "vip"])
@pytest.mark.parametrize("budget", [1, 4, 7, 33, 64])
def test_any_budget_is_met(name: str, budget: int) -> None:
    random = rng()
    norm = random.gamma(2.0, size=(4, 2))
    for view in (seen([0, 8, 1, 4], [8] * 4), seen([0] * 4, [8, 0, 0, 0]), seen([8] * 4, [8] * 4)):
        told = replace(
            view,
            probe_successes=np.array([0, 4, 1, 2]),
            probe_trials=np.full(4, 4),
            probe_norm=norm,
            probe_square=norm**2,
            features=(x := random.normal(size=(4, 3))),
            whole=replace(view.everyone, features=x),
        )
        n = registry.build(name, {}).allocate(told, budget, random)
        assert n.dtype == np.int64
        assert n.sum() == budget
        assert n.min() >= 0


# -- whole runs


def batches_of(
    monkeypatch: pytest.MonkeyPatch, train: Callable[..., Path], arm: str, amount: int, **changes: Any
) -> list[Batch]:
    found: list[Batch] = []
    collect = Collector.collect

    def spy(self: Collector, step: int) -> Batch:
        found.append(collect(self, step))
        return found[-1]

    monkeypatch.setattr(Collector, "collect", spy)
    train(arm, budget={"currency": "rollouts", "amount": amount}, **changes)
    return found


def test_stages_end_with_a_correct_rollout(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    draws = [d for b in batches_of(monkeypatch, train, "ar3po", 400) for d in b.drawn if len(d.prompts) == 8]
    counts = np.concatenate([d.counts for d in draws])
    assert set(counts.tolist()) == {4, 8}
    for draw in draws[:-1]:  # the last may end with the budget
        successes = iter(np.split(np.array([v.value == "correct" for v in draw.verdicts]), draw.counts.cumsum()[:-1]))
        assert all(n == (4 if rows[:4].any() else 8) for n, rows in zip(draw.counts, successes, strict=True))


def test_rounds_are_charged_and_four_of_a_group_train(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = batches_of(monkeypatch, train, "reinforce_ada", 500)
    counts = np.concatenate([d.counts for b in found for d in b.drawn])
    assert set(counts.tolist()) & {16, 24, 32}
    assert sum(counts) == 500
    whole = [b for b in found if b.groups.prompts == 8]
    assert len(whole) >= 2
    for batch in whole:
        assert torch.bincount(batch.rollouts.prompt).tolist() == [4] * 8
        assert len(batch.groups.reward) >= 64


def test_candidates_that_are_passed_over_cost_only_their_probe(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[HistoryView, NDArray[np.bool_]]] = []
    credits: list[tuple[list[list[int]], torch.Tensor]] = []
    used: list[tuple[torch.Tensor, torch.Tensor]] = []
    select, credit, alignment = GradAlign.select, Collector._credit, collect.alignment

    def spy_credit(self: Collector, rollouts: Rollouts, verdicts: list[Verdict]) -> torch.Tensor:
        right = np.array([verdict is Verdict.CORRECT for verdict in verdicts], dtype=int)
        outcomes = [right[rollouts.prompt.numpy() == p].tolist() for p in range(rollouts.prompts)]
        credits.append((outcomes, credit(self, rollouts, verdicts)))
        return credits[-1][1]

    def spy_alignment(weights: Any, rollouts: Any, own: Any, trusted: Any, other: Any, *rest: Any) -> Any:
        used.append((own, other))
        return alignment(weights, rollouts, own, trusted, other, *rest)

    def spy(self: GradAlign, history: HistoryView, *rest: Any) -> NDArray[np.bool_]:
        asked.append((history, select(self, history, *rest)))
        return asked[-1][1]

    monkeypatch.setattr(GradAlign, "select", spy)
    monkeypatch.setattr(Collector, "_credit", spy_credit)
    monkeypatch.setattr(collect, "alignment", spy_alignment)
    out = train("gradalign", budget={"currency": "rollouts", "amount": 600})
    view, mask = asked[0]
    score = view.probe_alignment[:, 1]
    assert (len(view), mask.sum()) == (16, 8)
    assert score[mask].min() >= score[~mask].max()
    assert score.max() > 0
    assert np.abs(score).max() <= 1 + 1e-6
    # Candidates and trusted prompts are credited in the group and in its halves; a mixed group scores by the former.
    (outcomes, own), (_, other) = credits[:2]
    assert used[0][0] is own
    assert used[0][1] is other
    for known, found in credits[:2]:
        torch.testing.assert_close(found, probing.credited(known))
    assert ((score != 0) == [0 < sum(group) < len(group) for group in outcomes]).all()
    assert not torch.equal(own[:, 0], own[:, 1])
    first = [row for row in training.rows(out, "ledger.jsonl") if row["step"] == 0 and row["event"] != "evaluation"]
    # 4 rollouts of 16 candidates, 8 of 8 trusted prompts, 8 of 8 prompts that train.
    assert [row["rollouts"] for row in first if row["event"] == "probe"] == [64, 64]
    assert [row["rollouts"] for row in first if row["event"] == "rollouts"] == [64]
    assert sum(row["tokens_backpropagated"] > 0 for row in first if row["event"] == "gradients") == 2
