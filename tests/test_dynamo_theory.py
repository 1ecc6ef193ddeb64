"""The theory DynaMO rests on, checked numerically: entropy change, gradient norm, and the variance laws."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baselines.dr_grpo import DrGRPO
from baselines.grpo import GRPO
from baselines.rloo import RLOO
from benchmark.groups import Groups
from benchmark.method import Loss, Method, Tokens
from methods.modulation import entropy_change

seeds = st.integers(0, 2**31 - 1)


def entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1)


def tokens(logits: Tensor, action: int, advantage: float, log_ratio: float = 0.0) -> Tokens:
    """One sampled token of a float64 softmax."""
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    return Tokens(
        torch.tensor([advantage], dtype=torch.float64),
        log_p[action : action + 1],
        log_p[action : action + 1] - log_ratio,
        entropy(logits)[None],
        (p * p).sum()[None],
        (p * p * log_p).sum()[None],
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1),
        Loss(),
    )


@given(seeds, st.integers(2, 12), st.sampled_from([-1.3, -0.2, 0.4, 2.0]), st.floats(0.3, 3.0))
@settings(max_examples=60, deadline=None)
def test_equation_29_is_the_entropy_change_of_a_small_step(
    seed: int, size: int, advantage: float, spread: float
) -> None:
    """Halving the step quarters the error: the prediction is exact to first order."""
    random = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(size, generator=random, dtype=torch.float64)
    action = int(torch.randint(size, (1,), generator=random))
    predicted = float(entropy_change(tokens(logits, action, advantage)))
    # The step of the logits along r A grad log pi(a) with r = 1.
    direction = advantage * (torch.eye(size, dtype=torch.float64)[action] - torch.softmax(logits, -1))

    def error(eta: float) -> float:
        change = float(entropy(logits + eta * direction) - entropy(logits))
        return abs(change - eta * predicted)

    coarse, fine = error(2e-3), error(1e-3)
    assert fine <= 1e-5
    if coarse > 1e-11:
        assert fine / coarse == pytest.approx(0.25, abs=0.02)


def test_clipped_tokens_predict_no_change_and_ratios_scale_it() -> None:
    logits = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
    plain = float(entropy_change(tokens(logits, 1, 1.0)))
    assert float(entropy_change(tokens(logits, 1, 1.0, np.log(1.1)))) == pytest.approx(1.1 * plain)
    assert float(entropy_change(tokens(logits, 1, 1.0, np.log(1.3)))) == 0
    assert float(entropy_change(tokens(logits, 1, -1.0, np.log(1.3)))) == pytest.approx(-1.3 * plain)


@given(seeds, st.integers(2, 16), st.floats(0.1, 6.0))
@settings(max_examples=60, deadline=None)
def test_gradient_norm_identity_and_its_bound_by_entropy(seed: int, size: int, spread: float) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(size, generator=random, dtype=torch.float64)).requires_grad_()
    p = torch.softmax(logits.detach(), -1)
    squares = []
    for action in range(size):
        (gradient,) = torch.autograd.grad(torch.log_softmax(logits, -1)[action], logits)
        squares.append(float(gradient.square().sum()))
        assert squares[-1] == pytest.approx(float(1 - 2 * p[action] + (p * p).sum()), rel=1e-9, abs=1e-12)
    expected = float(p @ torch.tensor(squares, dtype=torch.float64))
    assert expected == pytest.approx(float(1 - (p * p).sum()), rel=1e-9, abs=1e-12)
    assert expected <= 1 - np.exp(-float(entropy(logits.detach()))) + 1e-12


def prompt_moments(method: Method, p: float, n: int) -> tuple[np.ndarray, float]:
    """Mean and total variance of (1/n) sum_j A_j grad log pi(a_j) for n draws from a softmax over four actions, two
    of them right with probability p together, by enumeration of all groups.
    """
    probability = np.array([0.7 * p, 0.3 * p, 0.6 * (1 - p), 0.4 * (1 - p)])
    scores = np.eye(4) - probability
    mean, square = np.zeros(4), 0.0
    for actions in product(range(4), repeat=n):
        weight = probability[list(actions)].prod()
        reward = torch.tensor([float(a < 2) for a in actions])
        ones = torch.ones(n, dtype=torch.int64)
        groups = Groups(torch.zeros(n, dtype=torch.int64), 1, reward, ones, ones > 1, 4)
        gradient = method.credit(groups).double().numpy() @ scores[list(actions)] / n
        mean += weight * gradient
        square += weight * gradient @ gradient
    return mean, square - float(mean @ mean)


def reward_gradient(p: float) -> np.ndarray:
    """Gradient of the success rate p in the four logits."""
    probability = np.array([0.7 * p, 0.3 * p, 0.6 * (1 - p), 0.4 * (1 - p)])
    return probability * (np.array([1, 1, 0, 0]) - p)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_leave_one_out_is_unbiased_and_mean_only_is_it_shrunk(p: float, n: int) -> None:
    rloo, rloo_variance = prompt_moments(RLOO(), p, n)
    mean_only, mean_only_variance = prompt_moments(DrGRPO(), p, n)
    np.testing.assert_allclose(rloo, reward_gradient(p), atol=1e-6)
    np.testing.assert_allclose(mean_only, reward_gradient(p) * (n - 1) / n, atol=1e-6)
    assert mean_only_variance == pytest.approx(rloo_variance * ((n - 1) / n) ** 2, rel=1e-5)


def scalar_law(method: Method, p: float, n: int) -> float:
    """Variance of (1/n) sum_j A_j Z_j, Z independent of the outcomes with mean 0 and variance 1: E[mean A^2] / n.

    This is the setting in which the published laws hold: the score of a rollout does not depend on its reward.
    """
    total = 0.0
    for outcome in product((0.0, 1.0), repeat=n):
        ones = torch.ones(n, dtype=torch.int64)
        groups = Groups(torch.zeros(n, dtype=torch.int64), 1, torch.tensor(outcome), ones, ones > 1, 4)
        weight = np.prod([p if r else 1 - p for r in outcome])
        total += weight * float(method.credit(groups).double().square().mean()) / n
    return float(total)


@pytest.mark.parametrize("n", range(2, 9))
@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.8])
def test_variance_laws_of_the_three_advantages(p: float, n: int) -> None:
    s2, d = p * (1 - p), 1 - p**n - (1 - p) ** n
    assert scalar_law(DrGRPO(), p, n) == pytest.approx(s2 * (n - 1) / n**2, rel=1e-5)
    assert scalar_law(RLOO(), p, n) == pytest.approx(s2 / (n - 1), rel=1e-5)
    assert scalar_law(GRPO(), p, n) == pytest.approx((n - 1) / n**2 * d, rel=1e-4)


@given(st.lists(st.floats(0.05, 0.95), min_size=2, max_size=30), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_rollouts_in_proportion_to_the_variance_gain_nothing_over_uniform(rates: list[float], mean: int) -> None:
    """sum s^2 / n is N S / B for both; in proportion to s it is (sum s)^2 / B, never more."""
    s2 = np.array([p * (1 - p) for p in rates])
    budget = mean * len(s2)
    uniform = (s2 / mean).sum()
    by_variance = (s2 / (budget * s2 / s2.sum())).sum()
    by_deviation = (s2 / (budget * np.sqrt(s2) / np.sqrt(s2).sum())).sum()
    assert by_variance == pytest.approx(uniform)
    assert by_deviation <= uniform * (1 + 1e-12)
    cv2 = np.var(np.sqrt(s2)) / np.mean(np.sqrt(s2)) ** 2
    assert by_deviation == pytest.approx(uniform / (1 + cv2))
