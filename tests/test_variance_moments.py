"""V(n) from a pool: against every partition of it, against enumeration of a tabular policy, and its interval."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.variance_moments import (
    ADVANTAGES,
    BlockSums,
    Curves,
    advantages,
    total,
    total_ratio,
    variance,
    variance_curve,
    weights,
)
from benchmark.groups import Groups

KINDS = tuple(ADVANTAGES)


def estimate(kind: str, reward: np.ndarray, G: np.ndarray) -> np.ndarray:
    """(1/n) sum_j A_j G_j of one group, with the real credit function."""
    n = len(reward)
    nothing = torch.zeros(n, dtype=torch.int64)
    groups = Groups(nothing, 1, torch.from_numpy(reward).float(), nothing + 1, nothing.bool(), 1)
    return ADVANTAGES[kind](groups).double().numpy() @ G / n


def pool_variance(kind: str, reward: np.ndarray, G: np.ndarray, n: int, blocks: int = 1) -> float:
    sums = BlockSums.of_gram((G @ G.T)[None], reward[None] > 0, blocks)
    return float(variance(sums.moments(np.arange(blocks)), kind, n)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "right"), [(2, 0), (2, 1), (2, 3), (3, 2), (3, 4), (3, 6)])
def test_it_is_the_mean_over_all_disjoint_groups_of_the_pool(kind: str, n: int, right: int) -> None:
    rng = np.random.default_rng(right)
    G, reward = rng.normal(size=(6, 3)), rng.permutation((np.arange(6) < right).astype(float))
    of = {group: estimate(kind, reward[list(group)], G[list(group)]) for group in combinations(range(6), n)}
    square = np.mean([g @ g for g in of.values()])
    pairs = [of[a] @ of[b] for a in of for b in of if not set(a) & set(b)]
    assert pool_variance(kind, reward, G, n) == pytest.approx(square - np.mean(pairs), rel=1e-5, abs=1e-7)


def softmax_policy() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of four actions, their rewards, and grad log pi = e_a - pi with respect to the logits."""
    pi = np.array([0.5, 0.25, 0.15, 0.1])
    return pi, np.array([1.0, 0.0, 1.0, 0.0]), np.eye(4) - pi


def enumerated(kind: str, n: int) -> tuple[float, np.ndarray]:
    """Variance and mean of the estimator, over all 4^n groups."""
    pi, reward, score = softmax_policy()
    groups = [np.array(group) for group in product(range(4), repeat=n)]
    chance = np.array([pi[group].prod() for group in groups])
    g = np.array([estimate(kind, reward[group], score[group]) for group in groups])
    mean = chance @ g
    return float(chance @ (g**2).sum(1) - mean @ mean), mean


@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_on_a_tabular_softmax_policy(kind: str) -> None:
    pi, reward, score = softmax_policy()
    rng, size, pools = np.random.default_rng(7), 12, 4000
    actions = rng.choice(4, p=pi, size=(pools, size))
    G = score[actions]
    sums = BlockSums.of_gram(np.einsum("pmd,pnd->pmn", G, G), reward[actions] > 0, 1)
    moments = sums.moments(np.array([0]))
    class_mean = np.einsum("pmc,pmd->pcd", np.eye(2)[reward[actions].astype(int)], G)
    class_mean /= np.maximum(sums.count[:, 0, :, None], 1)
    for n in (2, 3, 4):
        truth, mean = enumerated(kind, n)
        found = variance(moments, kind, n)
        assert abs(found.mean() - truth) < 4 * found.std() / np.sqrt(pools)
        weight = weights(kind, n, size)
        square = (weight.square[moments.right] * moments.values).sum(-1)
        assert abs(square.mean() - mean @ mean) < 4 * square.std() / np.sqrt(pools)
        first = np.einsum("pc,pcd->pd", weight.mean[moments.right], class_mean)
        assert (np.abs(first.mean(0) - mean) < 4.5 * first.std(0) / np.sqrt(pools)).all()


@given(st.integers(0, 8), st.integers(1, 4), st.sampled_from(KINDS))
@settings(max_examples=30, deadline=None)
def test_blocks_and_scale(right: int, n: int, kind: str) -> None:
    rng = np.random.default_rng(right)
    G, reward = rng.normal(size=(8, 5)), rng.permutation((np.arange(8) < right).astype(float))
    one = pool_variance(kind, reward, G, n)
    assert pool_variance(kind, reward, G, n, blocks=4) == pytest.approx(one, abs=1e-9)
    assert pool_variance(kind, reward, 3 * G, n) == pytest.approx(9 * one, abs=1e-8)
    if right in (0, 8):
        assert one == 0.0


def test_advantages_are_those_of_the_credit_functions() -> None:
    right, wrong = advantages(ADVANTAGES["leave one out"], 4)
    k = np.arange(5)
    assert right == pytest.approx(np.where(k > 0, (4 - k) / 3, 0))
    assert wrong == pytest.approx(np.where(k < 4, -k / 3, 0))
    right, wrong = advantages(ADVANTAGES["mean and std"], 1)
    assert (right == 0).all()
    assert (wrong == 0).all()


def test_leave_one_out_follows_the_textbook_law_for_gradients_of_one_size() -> None:
    """With G_j = +-e_j' of a huge space, V(n) = p (1 - p) / n up to terms of the mean: s^2 / n, so 2 n halves it."""
    rng = np.random.default_rng(0)
    G, reward = rng.normal(size=(400, 20000)) / np.sqrt(20000), (np.arange(400) < 120).astype(float)
    p = 0.3
    for n in (4, 8, 16, 32):
        assert pool_variance("leave one out", reward, G, n) == pytest.approx(p * (1 - p) / (n - 1), rel=0.03)


def test_groups_that_do_not_fit_are_refused() -> None:
    assert weights("mean only", 0, 8).variance.sum() == 0
    with pytest.raises(ValueError, match="pool of 10"):
        weights("mean only", 5, 8)


def synthetic(rng: np.random.Generator, prompts: int, rollouts: int) -> BlockSums:
    """Prompts whose gradients differ in size, direction and noise; G depends on the reward."""
    p = np.linspace(0.1, 0.9, prompts)[:, None]
    size = np.linspace(0.5, 2.0, prompts)[:, None, None]
    right = rng.random((prompts, rollouts)) < p
    G = size * rng.standard_t(6, size=(prompts, rollouts, 6)) + 0.7 * right[..., None]
    return BlockSums.of_gram(np.einsum("pmd,pnd->pmn", G, G), right, 16)


@pytest.mark.parametrize("kind", ["mean only", "mean and std"])
def test_intervals_cover(kind: str) -> None:
    rng, prompts = np.random.default_rng(11), 8
    n, uniform = np.array([2, 3, 4, 6, 6, 8, 9, 10]), np.full(8, 6)
    whole, blocks = synthetic(rng, prompts, 64), np.arange(16)
    truth = np.zeros((prompts, 11))
    for _ in range(200):
        truth += variance_curve(synthetic(rng, prompts, 128).moments(blocks), kind, 10) / 200
    exact_top = truth[np.arange(prompts), n].sum()
    exact = exact_top / truth[np.arange(prompts), uniform].sum()
    hits, both, trials = 0, 0, 120
    for _ in range(trials):
        whole = synthetic(rng, prompts, 64)
        part = (Curves.of(whole, blocks, kind, 10), n, uniform)
        found = total_ratio([part])
        hits += found.low <= exact <= found.high
        size = total([part])
        both += size.low <= exact_top <= size.high
    assert 0.88 * trials <= hits
    assert 0.88 * trials <= both


def test_ratio_of_an_allocation_to_itself_is_one_without_error() -> None:
    sums = synthetic(np.random.default_rng(0), 4, 64)
    curve = Curves.of(sums, np.arange(16), "mean only", 8)
    n = np.array([2, 8, 4, 6])
    assert total_ratio([(curve, n, n)]) == pytest.approx((1.0, 1.0, 1.0))
    halves = [np.arange(8), np.arange(8, 16)]
    parts = [(Curves.of(sums, half, "mean only", 8), n, n) for half in halves]
    assert total(parts).value == pytest.approx(np.mean([total([part]).value for part in parts]))
