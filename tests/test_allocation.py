"""Allocation against brute force, its bounds, and the closed form of the expected deviation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta

from benchmark.history import HistoryView
from methods.allocation import min_variance_allocation
from methods.neyman import NeymanAllocation, expected_deviation


def objective(s: np.ndarray, n: np.ndarray) -> tuple[int, float]:
    """Prompts with s > 0 but no rollout first (their variance is infinite), then sum s^2 / n over the others."""
    live = (s > 0) & (n > 0)
    return int(((s > 0) & (n == 0)).sum()), float((s[live] ** 2 / n[live]).sum())


def brute_force(s: np.ndarray, budget: int, low: np.ndarray, high: np.ndarray) -> tuple[int, float]:
    choices = product(*(range(a, b + 1) for a, b in zip(low, high, strict=True)))
    return min(objective(s, np.array(n)) for n in choices if sum(n) == budget)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    size = draw(st.integers(1, 4))
    s = np.array(draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1.0)), min_size=size, max_size=size)))
    low = np.array(draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    high = low + np.array(draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)))
    return s, draw(st.integers(int(low.sum()), int(high.sum()))), low, high


@given(problems())
@settings(max_examples=3000, deadline=None)
def test_allocation_is_optimal_within_bounds_and_spends_exactly_the_budget(
    problem: tuple[np.ndarray, int, np.ndarray, np.ndarray],
) -> None:
    s, budget, low, high = problem
    n = min_variance_allocation(s, budget, low, high)
    assert n.dtype == np.int64
    assert n.sum() == budget
    assert ((low <= n) & (n <= high)).all()
    missing, value = objective(s, n)
    best_missing, best_value = brute_force(s, budget, low, high)
    if missing == 0:
        assert best_missing == 0
        assert value <= best_value * (1 + 1e-12) + 1e-15
    else:
        # Some variance is infinite whatever is done: as few prompts as possible are left without a rollout.
        assert missing == best_missing


def relaxed(s: np.ndarray, budget: int, low: int, high: int) -> np.ndarray:
    """The optimum in real numbers by its KKT condition, n = clip(lambda s, low, high), lambda by bisection."""
    few, many = 0.0, high / s.min()
    for _ in range(200):
        middle = (few + many) / 2
        few, many = (middle, many) if np.clip(middle * s, low, high).sum() < budget else (few, middle)
    return np.clip(many * s, low, high)


@given(st.integers(2, 60), st.integers(0, 2**32 - 1), st.floats(0.01, 0.99))
@settings(max_examples=300, deadline=None)
def test_the_integer_optimum_is_next_to_the_relaxed_one(size: int, seed: int, filling: float) -> None:
    s = np.random.default_rng(seed).uniform(0.02, 0.5, size)
    budget = 2 * size + round(filling * 22 * size)
    n, x = min_variance_allocation(s, budget, 2, 24), relaxed(s, budget, 2, 24)
    assert x.sum() == pytest.approx(budget)
    # Rounded down, then up where most is lost, until the budget is met: feasible, so no better than the optimum.
    rounded = np.floor(x + 1e-9)
    rounded[np.argsort(rounded - x, kind="stable")[: budget - int(rounded.sum())]] += 1
    bound, found, feasible = ((s**2 / m).sum() for m in (x, n, rounded))
    assert bound * (1 - 1e-9) <= found <= feasible * (1 + 1e-9)
    # An integer optimum lies on the same water level: n - 1 < lambda' s < n + 1 with one lambda' for all.
    free = (n > 2) & (n < 24)
    if free.any():
        assert (np.sqrt(n * (n - 1.0)) / s)[n > 2].max() <= (np.sqrt(n * (n + 1.0)) / s)[n < 24].min() * (1 + 1e-9)
        assert np.abs(n - x)[free].max() < 2


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_allocation_is_monotone_and_follows_a_permutation(size: int, seed: int, filling: float) -> None:
    rng = np.random.default_rng(seed)
    s = rng.permutation(np.linspace(0.05, 0.5, size))
    budget = round(4 * size + filling * 20 * size)
    n = min_variance_allocation(s, budget, 4, 24)
    by_s = np.argsort(s)
    assert (np.diff(n[by_s]) >= 0).all()
    order = rng.permutation(size)
    moved = min_variance_allocation(s[order], budget, 4, 24)
    np.testing.assert_array_equal(moved, n[order])


def test_permuting_distinct_prompts_permutes_their_rollouts() -> None:
    rng = np.random.default_rng(1)
    s = rng.uniform(0.05, 0.5, 200)
    order = rng.permutation(200)
    n = min_variance_allocation(s, 1600, 4, 24)
    np.testing.assert_array_equal(min_variance_allocation(s[order], 1600, 4, 24), n[order])
    assert len(set(n.tolist())) > 3


def test_rollouts_are_proportional_to_the_deviation_not_the_variance() -> None:
    np.testing.assert_array_equal(min_variance_allocation([0.1, 0.2, 0.4], 700, 0, 700), [100, 200, 400])


def test_equal_bounds_leave_no_choice() -> None:
    np.testing.assert_array_equal(min_variance_allocation([0.5, 0.1, 0.0], 24, 8, 8), [8, 8, 8])


def test_without_any_deviation_the_budget_is_spread_evenly() -> None:
    np.testing.assert_array_equal(min_variance_allocation([0.0, 0.0, 0.0], 8, 1, 9), [3, 3, 2])


def test_a_live_prompt_is_filled_before_a_dead_one() -> None:
    np.testing.assert_array_equal(min_variance_allocation([0.0, 0.3], 10, 1, 8), [2, 8])
    np.testing.assert_array_equal(min_variance_allocation([0.0, 0.3], 7, 1, 8), [1, 6])


def test_fewer_rollouts_than_live_prompts() -> None:
    n = min_variance_allocation([0.4, 0.3, 0.2, 0.1], 2, 0, 8)
    np.testing.assert_array_equal(n, [1, 1, 0, 0])
    np.testing.assert_array_equal(min_variance_allocation([0.1, 0.2, 0.4], 2, 0, 8), [0, 1, 1])


@pytest.mark.parametrize(
    ("s", "budget", "low", "high", "message"),
    [
        ([0.1, -0.1], 4, 1, 3, "deviations"),
        ([0.1, float("nan")], 4, 1, 3, "deviations"),
        ([0.1, 0.1], 4, 3, 1, "bounds"),
        ([0.1, 0.1], 4, -1, 3, "bounds"),
        ([0.1, 0.1], 1, 1, 3, "budget 1"),
        ([0.1, 0.1], 7, 1, 3, "budget 7"),
    ],
)
def test_impossible_requests_are_refused(s: list[float], budget: int, low: int, high: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        min_variance_allocation(s, budget, low, high)


@given(st.floats(0.3, 60), st.floats(0.3, 60))
@settings(max_examples=40, deadline=None)
def test_expected_deviation_is_the_integral(a: float, b: float) -> None:
    numeric, _ = quad(lambda p: np.sqrt(p * (1 - p)) * beta.pdf(p, a, b), 0, 1, limit=200, points=[a / (a + b)])
    assert expected_deviation(np.array([a]), np.array([b]))[0] == pytest.approx(numeric, rel=1e-5)


def view(successes: list[float], trials: list[float]) -> HistoryView:
    none = np.zeros(len(trials), dtype=np.int64)
    return HistoryView(np.array(successes), np.array(trials), none, none, none)


def test_unseen_prompts_get_equal_shares_and_even_odds_get_most() -> None:
    allocate = NeymanAllocation()
    np.testing.assert_array_equal(allocate(view([0, 0, 0], [0, 0, 0]), 24), [8, 8, 8])
    n = allocate(view([0, 8, 16, 0], [16, 16, 16, 0]), 32)
    assert n.sum() == 32
    assert n[0] == n[2]
    assert n[0] < n[3] < n[1]
    assert n.min() >= 4
    assert n.max() <= 12


def test_bounds_widen_to_what_the_budget_needs() -> None:
    allocate = NeymanAllocation(n_low=8, n_high=24)
    assert allocate.bounds(4, 8) == (2, 24)
    assert allocate.bounds(4, 122) == (8, 31)
    assert NeymanAllocation().bounds(64, 1024) == (8, 24)


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="above n_high"):
        NeymanAllocation(n_low=9, n_high=8)
    with pytest.raises(ValueError, match="prior"):
        NeymanAllocation(prior=(0.0, 1.0))
