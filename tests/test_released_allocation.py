"""DynaMO's allocation as published and as released, against examples worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.history import HistoryView
from methods.released_allocation import ReadmeAllocation, ReleasedAllocation, bernoulli_variance


def view(successes: list[int], trials: list[int]) -> HistoryView:
    none = np.zeros(len(trials), dtype=np.int64)
    return HistoryView(np.array(successes, dtype=float), np.array(trials, dtype=float), none, none, none)


def test_the_priority_is_the_unbiased_variance() -> None:
    found = bernoulli_variance(view([0, 4, 8, 12, 16, 1, 0], [16, 16, 16, 16, 16, 2, 1]))
    np.testing.assert_allclose(found, [0, 0.2, 64 / 240, 0.2, 0, 0.5, np.nan])
    rng = np.random.default_rng(0)
    k = rng.binomial(5, 0.3, 200_000)
    estimate = bernoulli_variance(view(k.tolist(), [5] * len(k))).mean()
    assert estimate == pytest.approx(0.21, abs=1e-3)


def test_the_readme_allocates_in_proportion_to_the_variance() -> None:
    # P = 0.2, 0.1333..., unseen 0.25.
    n = ReadmeAllocation(n_low=0, n_high=100)(view([4, 2, 0], [16, 16, 0]), 70)
    p = np.array([4 * 12 / 240, 2 * 14 / 240, 0.25])
    np.testing.assert_array_equal(n, np.round(70 * p / p.sum()))
    # Dead prompts keep the lower bound; the default bounds are half and one and a half times the mean.
    np.testing.assert_array_equal(ReadmeAllocation()(view([0, 16, 8], [16, 16, 16]), 24), [6, 6, 12])


def test_released_priorities_jump_at_the_mastery_cut() -> None:
    rule = ReleasedAllocation()
    found = rule.priority(view([0, 12, 13, 14, 16, 2, 0], [16, 16, 16, 16, 16, 3, 0]))
    expected = [0.01, 12 * 4 / 240 + 1e-6 / 4, 13 * 3 / 240 + 1e-6 * 3 / 16, 0.01, 0.01, 0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_released_shares_come_on_top_of_the_floor() -> None:
    # Two live prompts of equal priority share what the floors leave; the cap of 12 sends the rest to the dead ones.
    seen = view([8, 8, 0, 16], [16, 16, 16, 16])
    np.testing.assert_array_equal(ReleasedAllocation(n_low=4, n_high=24)(seen, 32), [12, 12, 4, 4])
    np.testing.assert_array_equal(ReleasedAllocation(n_low=4, n_high=12)(seen, 40), [12, 12, 8, 8])


def test_unexplored_prompts_get_their_first_four_rollouts_and_no_share() -> None:
    seen = view([8, 0, 1], [16, 0, 3])
    np.testing.assert_array_equal(ReleasedAllocation(n_low=2, n_high=24)(seen, 20), [14, 4, 2])


def test_without_any_priority_the_rest_goes_round_within_the_bounds() -> None:
    unseen = view([0] * 4, [0] * 4)
    np.testing.assert_array_equal(ReleasedAllocation()(unseen, 32), [8, 8, 8, 8])
    np.testing.assert_array_equal(ReleasedAllocation(n_low=4, n_high=24)(unseen, 34), [9, 9, 8, 8])


@pytest.mark.parametrize("rule", [ReadmeAllocation, ReleasedAllocation])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_sums_and_bounds_always_hold(rule: Callable[..., ReleasedAllocation], data: st.DataObject) -> None:
    trials = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))
    successes = [data.draw(st.integers(0, t)) for t in trials]
    budget = data.draw(st.integers(1, 24 * len(trials)))
    n_low = data.draw(st.one_of(st.none(), st.integers(0, 8)))
    n_high = data.draw(st.one_of(st.none(), st.integers(8, 24)))
    n = rule(n_low=n_low, n_high=n_high)(view(successes, trials), budget)
    mean = budget / len(trials)
    low = min(int(mean / 2) if n_low is None else n_low, int(mean))
    high = max(int(np.ceil(1.5 * mean)) if n_high is None else n_high, int(np.ceil(mean)))
    assert n.dtype == np.int64
    assert n.sum() == budget
    assert n.min() >= low
    assert n.max() <= high
