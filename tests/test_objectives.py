"""Every objective of allocation against brute force over all integer allocations."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.history import HistoryView
from methods.allocation import min_variance_allocation
from methods.neyman import NeymanAllocation
from methods.objectives import LEAST, OBJECTIVES, Objective, allocate, both_outcomes, gvm_weight
from methods.separable import best_values

rates = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4).map(np.array)


def worth(objective: Objective, p: np.ndarray, n: np.ndarray) -> tuple[float, float]:
    """What is maximised: first minus the prompts of infinite variance, then the objective over the others."""
    s2, d = p * (1 - p), 1 - p**n - (1 - p) ** n
    if objective in ("mean_only", "rloo"):
        used = n - (objective == "rloo")
        infinite = (s2 > 0) & (used == 0)
        return -float(infinite.sum()), -float((s2[used > 0] / used[used > 0]).sum())
    if objective == "std":
        return 0.0, -float(((n - 1)[n > 0] / n[n > 0] ** 2 * d[n > 0]).sum())
    return 0.0, float((np.where(n > 0, d, 0) * (1 if objective == "non_degenerate" else p * (1 - p) ** 2)).sum())


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(p=rates, data=st.data())
@settings(max_examples=400, deadline=None)
def test_allocations_are_exactly_optimal(objective: Objective, p: np.ndarray, data: st.DataObject) -> None:
    low = data.draw(st.integers(LEAST.get(objective, 0), 3))
    high = low + data.draw(st.integers(0, 4))
    budget = data.draw(st.integers(low * len(p), high * len(p)))
    n = allocate(objective, p, np.sqrt(p * (1 - p)), budget, low, high)
    assert n.dtype == np.int64
    assert n.sum() == budget
    assert n.min() >= low
    assert n.max() <= high
    choices = (np.array(c) for c in product(range(low, high + 1), repeat=len(p)) if sum(c) == budget)
    best = max(worth(objective, p, choice) for choice in choices)
    found = worth(objective, p, n)
    assert found[0] == best[0]
    if found[0] == 0:
        assert found[1] == pytest.approx(best[1], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(st.integers(2, 30), st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_allocations_follow_a_permutation_of_distinct_prompts(
    objective: Objective, size: int, seed: int, filling: float
) -> None:
    rng = np.random.default_rng(seed)
    # One half of [0, 1]: p and 1 - p are tied in most objectives.
    p = rng.permutation(np.linspace(0.02, 0.48, size))
    s, order, budget = np.sqrt(p * (1 - p)), rng.permutation(size), 2 * size + round(filling * 10 * size)
    n = allocate(objective, p, s, budget, 2, 12)
    moved = allocate(objective, p[order], s[order], budget, 2, 12)
    assert worth(objective, p, n)[1] == pytest.approx(worth(objective, p[order], moved)[1], rel=1e-9)
    if objective in ("mean_only", "rloo", "non_degenerate"):
        np.testing.assert_array_equal(moved, n[order])
    if objective in ("mean_only", "rloo"):
        assert (np.diff(n[np.argsort(p)]) >= 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_impossible_budgets_are_refused_with_their_numbers(objective: Objective) -> None:
    p = np.array([0.2, 0.5])
    for budget in (3, 17):
        with pytest.raises(ValueError, match=r"budget|rollouts beyond"):
            allocate(objective, p, np.sqrt(p * (1 - p)), budget, 2, 8)
    if LEAST.get(objective):
        with pytest.raises(ValueError, match="n_low"):
            allocate(objective, p, np.sqrt(p * (1 - p)), 4, LEAST[objective] - 1, 8)


def test_greedy_would_miss_the_optimum_of_knapsacks_value() -> None:
    """For rare successes a second rollout gains more than the first: taking units by gain is not optimal."""
    p = np.array([0.05, 0.5])
    n = np.arange(0, 40)
    gain = np.diff(both_outcomes(p[:, None], n) * (p * (1 - p) ** 2)[:, None], axis=1)
    assert gain[0, 1] > gain[0, 0]
    assert (np.diff(gain[1, 1:]) <= 0).all()


def test_dynamic_programming_takes_any_values() -> None:
    value = np.array([[0.0, -1.0, 5.0], [0.0, 3.0, 4.0]])
    np.testing.assert_array_equal(best_values(value, 2), [2, 0])
    np.testing.assert_array_equal(best_values(value, 3), [2, 1])
    with pytest.raises(ValueError, match=r"5 rollouts.*\[0, 4\]"):
        best_values(value, 5)


def test_leave_one_out_is_neymans_rule_for_n_minus_one() -> None:
    n = allocate("rloo", np.array([0.5, 0.1]), np.array([0.5, 0.25]), 32, 2, 32)
    np.testing.assert_array_equal(n - 1, [20, 10])


def test_gvm_prefers_hard_prompts_and_skips_what_has_no_gradient() -> None:
    w = gvm_weight([0.03125, 0.125, 0.5, 1.0, 0.0, 0.5], [1, 1, 1, 1, 1, 0])
    # 1 / sqrt(p + 0.001 / p)
    np.testing.assert_allclose(w, [3.976214, 2.742042, 1.411394, 0.9995, 0, 0], rtol=1e-4)
    n = min_variance_allocation(w, 60, 2, 30)
    assert n[0] > n[1] > n[2] > n[3] > n[4] == n[5] == 2


def view(successes: list[float], trials: list[float]) -> HistoryView:
    none = np.zeros(len(trials), dtype=np.int64)
    return HistoryView(np.array(successes), np.array(trials), (np.array(trials) > 0).astype(np.int64), none, none)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("budget", [1, 2, 5, 24, 37])
def test_a_method_can_ask_for_any_objective_at_any_budget(objective: Objective, budget: int) -> None:
    n = NeymanAllocation(objective=objective)(view([0, 8, 16], [16, 16, 16]), budget)
    assert n.sum() == budget
    assert n.min() >= 0


def test_unseen_prompts_first() -> None:
    seen = view([8, 8, 0, 0], [16, 16, 0, 0])
    n = NeymanAllocation(n_low=2, n_high=20, explore=12)(seen, 32)
    np.testing.assert_array_equal(n, [4, 4, 12, 12])
    # No more than the budget holds, and no more than n_high.
    np.testing.assert_array_equal(NeymanAllocation(n_low=2, n_high=20, explore=12)(seen, 20), [2, 2, 8, 8])
    np.testing.assert_array_equal(NeymanAllocation(n_low=2, n_high=9, explore=12)(seen, 32), [7, 7, 9, 9])


def test_floors_decide_what_dead_prompts_get() -> None:
    seen = view([0, 16, 8], [16, 16, 16])
    plain = NeymanAllocation(n_low=1, n_high=30)(seen, 30)
    raised = NeymanAllocation(n_low=1, n_high=30, floor_unsolved=0.4)(seen, 30)
    assert plain[0] == plain[1]
    assert raised[0] > plain[0]
    assert raised[0] > raised[1]
    solved = NeymanAllocation(n_low=1, n_high=30, floor_solved=0.4)(seen, 30)
    np.testing.assert_array_equal(solved[[1, 0, 2]], raised)


@pytest.mark.parametrize(
    "bad", [{"floor_solved": 0.6}, {"floor_unsolved": -0.1}, {"explore": -1}, {"explore": 4, "objective": "rloo"}]
)
def test_bad_parameters_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        NeymanAllocation(**bad)  # type: ignore[arg-type]
