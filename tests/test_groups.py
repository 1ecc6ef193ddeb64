"""Ragged group statistics against a Python loop, with groups of size 0 and 1."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.groups import Groups, segment_sum
from benchmark.rollouts import ragged_index


def make_groups(rewards: list[list[float]]) -> Groups:
    prompt = [number for number, group in enumerate(rewards) for _ in group]
    flat = torch.tensor([reward for group in rewards for reward in group], dtype=torch.float32)
    length = torch.ones(len(flat), dtype=torch.int64)
    return Groups(
        torch.tensor(prompt, dtype=torch.int64), len(rewards), flat, length, torch.zeros(len(flat), dtype=torch.bool), 9
    )


ragged = st.lists(st.lists(st.sampled_from([0.0, 1.0]), max_size=7), min_size=1, max_size=8)


@given(ragged)
@settings(max_examples=100, deadline=None)
def test_statistics_equal_a_loop_over_groups(rewards: list[list[float]]) -> None:
    groups = make_groups(rewards)
    assert groups.size.tolist() == [len(group) for group in rewards]
    mean, std = groups.mean(groups.reward).tolist(), groups.std(groups.reward).tolist()
    centred = groups.centred(groups.reward).tolist()
    mixed = groups.mixed().tolist()
    for number, group in enumerate(rewards):
        expected_mean = statistics.fmean(group) if group else 0.0
        expected_std = statistics.stdev(group) if len(group) > 1 else 0.0
        assert mean[number] == pytest.approx(expected_mean, abs=1e-6)
        assert std[number] == pytest.approx(expected_std, abs=1e-6)
        assert mixed[number] == (0.0 in group and 1.0 in group)
        for reward in group:
            assert centred.pop(0) == pytest.approx(reward - expected_mean, abs=1e-6)


@given(ragged, st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_statistics_do_not_depend_on_the_order_of_rollouts(rewards: list[list[float]], seed: int) -> None:
    groups = make_groups(rewards)
    order = torch.randperm(len(groups.reward), generator=torch.Generator().manual_seed(seed))
    shuffled = Groups(
        groups.prompt[order], groups.prompts, groups.reward[order], groups.length, groups.truncated, groups.max_tokens
    )
    assert torch.allclose(groups.std(groups.reward), shuffled.std(shuffled.reward), atol=1e-6)
    assert torch.equal(groups.mixed(), shuffled.mixed())


def test_real_valued_statistics_of_a_ragged_batch() -> None:
    values = [[0.5, -1.0, 2.25], [], [3.5], [1.0, 1.0]]
    groups = make_groups(values)
    std = groups.std(groups.reward).tolist()
    assert std == pytest.approx([statistics.stdev(values[0]), 0.0, 0.0, 0.0], abs=1e-6)
    assert all(math.isfinite(value) for value in std)
    assert groups.mean(groups.reward).tolist() == pytest.approx([1.75 / 3, 0.0, 3.5, 1.0])


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5)), max_size=20))
@settings(max_examples=50, deadline=None)
def test_segment_sum_equals_a_loop(pairs: list[tuple[int, float]]) -> None:
    index = torch.tensor([number for number, _ in pairs], dtype=torch.int64)
    values = torch.tensor([value for _, value in pairs], dtype=torch.float64)
    expected = [math.fsum(value for number, value in pairs if number == segment) for segment in range(5)]
    assert segment_sum(values, index, 5).tolist() == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.randoms())
@settings(max_examples=50, deadline=None)
def test_ragged_index_equals_slices(lengths: list[int], random: object) -> None:
    rows = random.sample(range(len(lengths)), len(lengths) // 2 + 1)  # type: ignore[attr-defined]
    expected = [sum(lengths[:row]) + offset for row in rows for offset in range(lengths[row])]
    assert ragged_index(torch.tensor(rows), torch.tensor(lengths)).tolist() == expected
