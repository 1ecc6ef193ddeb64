"""The allocation by length and entropy: its closed form, its nesting, and what it does without a history."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark import registry
from benchmark.history import HistoryView, PromptHistory
from methods.gradient_allocation import GradientAllocation, shrunk_mean
from methods.neyman import NeymanAllocation, expected_deviation


def history(successes: list[float], tokens: list[float], surprisal: list[float], trials: float = 8.0) -> HistoryView:
    prompts = len(successes)
    remembered = PromptHistory(prompts)
    columns = (np.array(successes), np.full(prompts, trials), np.array(tokens), np.array(surprisal))
    remembered.record(range(prompts), *columns)
    return remembered.view(range(prompts))


def test_the_weight_by_hand() -> None:
    seen = history([2.0, 6.0], [80.0, 160.0], [8.0, 24.0])
    # Means per rollout 10 and 20 of 15, 1 and 3 of 2; shrunk with 4 rollouts of the batch's mean.
    length = np.array([(80 + 4 * 15) / 12, (160 + 4 * 15) / 12])
    entropy = np.array([(8 + 4 * 2) / 12, (24 + 4 * 2) / 12])
    outcome = expected_deviation(np.array([3.0, 7.0]), np.array([7.0, 3.0]))
    assert GradientAllocation().deviations(seen) == pytest.approx(outcome * np.sqrt(length * np.sqrt(entropy)))


@given(st.lists(st.tuples(st.integers(0, 8), st.floats(8, 400), st.floats(0, 60)), min_size=1, max_size=12))
def test_without_exponents_it_is_neyman_bit_for_bit(rows: list[tuple[int, float, float]]) -> None:
    seen = history(*(list(map(float, column)) for column in zip(*rows, strict=True)))
    plain, off = NeymanAllocation(), GradientAllocation(length_exponent=0.0, entropy_exponent=0.0)
    assert off.deviations(seen).tolist() == plain.deviations(seen).tolist()
    for budget in (len(rows), 5 * len(rows), 8 * len(rows) + 3):
        assert off(seen, budget).tolist() == plain(seen, budget).tolist()
        assert GradientAllocation()(seen, budget).sum() == budget


@pytest.mark.parametrize("strength", [0.0, 4.0])
def test_without_any_history_all_prompts_are_alike(strength: float) -> None:
    nothing = HistoryView.unseen(6)
    assert GradientAllocation(strength=strength)(nothing, 48).tolist() == [8] * 6


def test_prompts_never_seen_have_the_mean_and_long_ones_get_more() -> None:
    remembered = PromptHistory(3)
    remembered.record([0, 1], *np.array([[4.0, 4.0], [8.0, 8.0], [40.0, 120.0], [8.0, 8.0]]))
    seen = remembered.view(range(3))
    assert shrunk_mean(seen.tokens, seen.trials, 0.0).tolist() == [5.0, 15.0, 10.0]
    n = GradientAllocation(prior=(4.0, 4.0), half_life=None)(seen, 24)
    assert n[1] > n[0]


def test_a_policy_without_entropy_is_allocated_by_length() -> None:
    seen = history([4.0, 4.0], [80.0, 160.0], [0.0, 0.0])
    ratio = np.divide(*GradientAllocation(strength=0.0).deviations(seen))
    assert ratio == pytest.approx(np.sqrt(80 / 160))


@pytest.mark.parametrize("name", ["length_exponent", "entropy_exponent", "strength"])
def test_negative_parameters_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = -1"):
        GradientAllocation(**{name: -1.0})


def test_the_arm_differs_from_dynamo_allocation_in_the_weight_alone() -> None:
    arm, parent = registry.build("dynamo_gradient", {}), registry.build("dynamo_allocation", {})
    assert isinstance(arm, type(parent))
    differing = {f.name for f in fields(arm) if getattr(arm, f.name) != getattr(parent, f.name)}
    assert differing == {"allocation"}
    assert registry.build("dynamo_gradient", {"allocation": {"length_exponent": 2.0}}).half_life == parent.half_life
