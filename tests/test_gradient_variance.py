"""The estimators behind the measured gradient variance, and the allocations that are compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis import gradient_variance
from analysis.gradient_variance import allocations, cosine, ratio_interval, trace_and_square
from benchmark.history import HistoryView


def gram(samples: np.ndarray) -> np.ndarray:
    return samples @ samples.T


def test_trace_and_squared_mean_equal_their_definitions() -> None:
    samples = np.random.default_rng(0).normal(size=(7, 5)) + 1.0
    trace, square = trace_and_square(gram(samples))
    assert trace == pytest.approx(np.trace(np.cov(samples.T)))
    pairs = [samples[r] @ samples[s] for r in range(7) for s in range(7) if r != s]
    assert square == pytest.approx(np.mean(pairs))


def test_estimates_are_unbiased() -> None:
    rng = np.random.default_rng(1)
    mean, sd = np.array([0.5, -0.25, 0.0]), np.array([1.0, 2.0, 0.5])
    found = np.array([trace_and_square(gram(mean + sd * rng.normal(size=(6, 3)))) for _ in range(4000)])
    truth = np.array([(sd**2).sum(), (mean**2).sum()])
    error = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - truth) < 4 * error).all()


def test_ratio_of_an_estimator_to_itself_is_one_and_scaling_is_squared() -> None:
    samples = np.random.default_rng(2).normal(size=(20, 50))
    assert ratio_interval(gram(samples), gram(samples)) == pytest.approx((1.0, 1.0, 1.0))
    assert ratio_interval(gram(0.5 * samples), gram(samples)) == pytest.approx((0.25, 0.25, 0.25))


def test_interval_covers_the_true_ratio() -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(40):
        _, low, high = ratio_interval(gram(rng.normal(size=(24, 200)) * 0.8), gram(rng.normal(size=(24, 200))))
        inside += low <= 0.64 <= high
    assert inside >= 32


def test_cosine_is_free_of_shared_noise() -> None:
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(4000, 4))
    a, b = np.array([1.0, 0, 0, 0]) + noise, np.array([0, 1.0, 0, 0]) + noise
    value = cosine(a @ b.T, trace_and_square(gram(a))[1], trace_and_square(gram(b))[1])
    assert value == pytest.approx(0.0, abs=0.15)


def history(successes: list[float], trials: float = 16.0) -> HistoryView:
    count = np.array(successes)
    ones = np.ones(len(count), dtype=np.int64)
    return HistoryView(count, np.full(len(count), trials), ones, count.astype(np.int64), ones * int(trials))


def test_allocations_spend_the_same_and_agree_where_prompts_are_alike() -> None:
    mixed = allocations(history([0, 1, 4, 8, 12, 16, 16, 0]), 64)
    assert {name: int(n.sum()) for name, n in mixed.items()} == dict.fromkeys(mixed, 64)
    assert mixed["variance"].max() >= mixed["standard_deviation"].max() > mixed["uniform"].max() == 8
    alike = allocations(history([5.0] * 8), 64)
    assert all((n == 8).all() for n in alike.values())


def test_few_replicates_give_a_finite_interval() -> None:
    samples = np.random.default_rng(5).normal(size=(3, 20))
    assert np.isfinite(ratio_interval(gram(samples), gram(2 * samples))).all()


def test_gradients_of_zero_give_no_row_instead_of_a_ratio_of_nothing() -> None:
    nothing = [torch.zeros(3) for _ in range(4)]
    some = [torch.tensor([1.0, 0.0, float(i)]) for i in range(4)]
    assert gradient_variance._row(("variance", "raw"), {("uniform", "raw"): nothing, ("variance", "raw"): some}) is None
    assert gradient_variance._row(("variance", "raw"), {("uniform", "raw"): some, ("variance", "raw"): nothing}) is None
    lone = [torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.ones(3)]
    assert gradient_variance._row(("uniform", "raw"), {("uniform", "raw"): lone}) is None
    assert gradient_variance._row(("uniform", "raw"), {("uniform", "raw"): some}) is not None
