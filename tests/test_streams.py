"""Random streams: draws depend on their key alone, and are uniform."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from benchmark import streams


def keys(count: int, *parts: object) -> np.ndarray:
    return np.array([streams.key(*parts, i) for i in range(count)], dtype=np.uint64)


@given(st.permutations(range(12)), st.integers(1, 12), st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_a_draw_does_not_depend_on_what_else_is_drawn(order: list[int], kept: int, shorter: int) -> None:
    all_keys, lanes = np.repeat(keys(4, "prompt"), 3), np.tile(np.arange(3), 4)
    whole = streams.uniforms(all_keys, lanes, 6)
    chosen = np.array(order[:kept])
    part = streams.uniforms(all_keys[chosen], lanes[chosen], shorter)
    np.testing.assert_array_equal(part, whole[chosen, :shorter])


def test_keys_lanes_and_positions_all_differ() -> None:
    all_keys, lanes = np.repeat(keys(50, "prompt"), 8), np.tile(np.arange(8), 50)
    draws = streams.uniforms(all_keys, lanes, 32)
    assert len(np.unique(draws)) == draws.size


def test_draws_are_uniform_and_uncorrelated() -> None:
    draws = streams.uniforms(np.repeat(keys(250, "prompt"), 8), np.tile(np.arange(8), 250), 24)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert kstest(draws.ravel(), "uniform").pvalue > 1e-4
    noise = 4 / np.sqrt(draws[:, 1:].size)
    assert abs(np.corrcoef(draws[:, 1:].ravel(), draws[:, :-1].ravel())[0, 1]) < noise
    # Neighbouring lanes of one key must not follow each other either.
    assert abs(np.corrcoef(draws[0::2].ravel(), draws[1::2].ravel())[0, 1]) < noise


def test_keys_are_64_bit_and_keep_parts_and_types_apart() -> None:
    names = [(1, "a", 2), (1, "a", "2"), (1, "a2"), ("1", "a", 2), (1, "a", 2.0), (1, 2, "a"), ("ab", "c"), ("a", "bc")]
    found = {streams.key(*name) for name in names}
    assert len(found) == len(names)
    assert all(0 <= key < 2**64 for key in found)


@pytest.mark.parametrize("name", [("minibatch", 3), ("order", 0)])
def test_generators_repeat_by_name_only(name: tuple[object, ...]) -> None:
    first = streams.generator(7, *name).random(5)
    streams.generator(7, "something else").random(100)
    np.testing.assert_array_equal(streams.generator(7, *name).random(5), first)
    assert not np.array_equal(streams.generator(8, *name).random(5), first)
