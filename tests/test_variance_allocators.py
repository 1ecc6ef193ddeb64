"""The rules of the variance study: equal spend, equal bounds, the formulas they claim."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.variance_allocators import (
    RULES,
    Known,
    assumed_deviation,
    cures,
    gvm,
    oracle_p,
    oracle_variance,
    predicted_ratio,
)
from benchmark.history import PromptHistory
from methods.allocation import bounds, min_variance_allocation


def known(successes: list[int], trials: int = 16, seed: int = 0) -> Known:
    prompts = len(successes)
    history = PromptHistory(prompts)
    k = np.array(successes, dtype=float)
    history.record(range(prompts), k, *np.full((3, prompts), float(trials)))
    norm = np.random.default_rng(seed).uniform(1, 3, size=(prompts, 2))
    norm[k == 0, 1], norm[k == trials, 0] = 0.0, 0.0
    return Known(history.view(range(prompts)), norm, 1.2 * norm**2)


@pytest.mark.parametrize("budget", [32, 64, 128, 250])
def test_every_rule_spends_the_budget_within_the_same_bounds(budget: int) -> None:
    some = known([0, 1, 4, 8, 12, 15, 16, 0])
    low, high = bounds(8, budget, None, None)
    for name, rule in RULES.items():
        n = rule(some, budget)
        assert n.sum() == budget, name
        assert low <= n.min(), name
        assert n.max() <= high, name
    assert len({tuple(rule(some, budget)) for rule in RULES.values()}) >= 5


def test_alike_prompts_get_alike_rollouts_from_every_rule() -> None:
    same = known([6] * 4)
    same = Known(same.history, np.full((4, 2), 2.0), np.full((4, 2), 5.0))
    for name, rule in RULES.items():
        assert (rule(same, 32) == 8).all(), name


def test_gvm_feeds_hard_prompts_and_none_that_never_succeeded() -> None:
    some = known([0, 1, 8, 15])
    equal = Known(some.history, np.ones((4, 2)), np.ones((4, 2)))
    w = gvm(equal)
    assert w[0] == 0
    assert w[1] > w[2] > w[3]
    assert w[2] == pytest.approx(1 / np.sqrt(0.5 + 1e-3 / 0.5))


def test_cures_is_the_outcomes_deviation_for_norms_that_do_not_depend_on_it() -> None:
    some = known([0, 3, 8, 16])
    equal = Known(some.history, np.full((4, 2), 2.0), np.full((4, 2), 4.0))
    assert cures(equal) == pytest.approx(2 * np.sqrt(some.p * (1 - some.p)))
    assert assumed_deviation("cures", equal) == pytest.approx(cures(equal))


def test_oracles_solve_their_problem() -> None:
    p = np.array([0.05, 0.5, 0.9, 0.0])
    s = np.sqrt(p * (1 - p))
    low, high = bounds(4, 32, None, None)
    assert (oracle_p(p, 32) == min_variance_allocation(s, 32, low, high)).all()
    n = np.arange(high + 1)
    curve = (s[:, None] ** 2) / np.maximum(n, 1)
    best = oracle_variance(curve, 32)
    assert best.sum() == 32
    assert curve[np.arange(4), best].sum() == pytest.approx(curve[np.arange(4), oracle_p(p, 32)].sum())


def test_prediction_is_one_for_uniform_and_below_for_neyman() -> None:
    some = known([0, 2, 8, 16])
    s = assumed_deviation("neyman", some)
    uniform = RULES["uniform"](some, 64)
    assert predicted_ratio(s, uniform, uniform) == 1.0
    assert predicted_ratio(s, RULES["neyman"](some, 64), uniform) < 1.0
