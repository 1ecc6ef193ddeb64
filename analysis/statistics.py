"""Estimators behind the numbers of a report: pass@k, aggregates over runs, multiplicity, detectable effects.

How means and differences are resampled is in `analysis.resampling`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaincinv, ndtr, stdtrit

Floats = NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95


def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> Floats:
    """Unbiased estimate of pass@k, ``1 - C(n - c, k) / C(n, k)`` (arXiv 2107.03374), as a product of k
    ratios.

    Args:
        n: samples per problem. c: correct samples per problem. k: samples a user may try. They broadcast.

    Returns:
        Estimates in the broadcast shape; 1 where fewer than k samples are wrong.

    Raises:
        ValueError: n < k, c > n, k < 1, c < 0, or a value that is no whole number.
    """
    trials, correct, tries = np.broadcast_arrays(*(_whole(name, x) for name, x in (("n", n), ("c", c), ("k", k))))
    if np.any(tries < 1) or np.any(correct < 0):
        raise ValueError("pass@k needs k >= 1 and c >= 0")
    if np.any(trials < tries):
        raise ValueError("pass@k needs at least k samples: n < k")
    if np.any(correct > trials):
        raise ValueError("more correct samples than samples: c > n")
    wrong = np.ones(trials.shape)
    for j in range(int(tries.max(initial=0))):
        left = np.maximum(trials - correct - j, 0) / np.maximum(trials - j, 1)
        wrong = np.where(j < tries, wrong * left, wrong)
    return 1.0 - wrong


def _whole(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    whole = array.astype(np.int64)
    if np.any(whole != array):
        raise ValueError(f"{name} must hold whole numbers")
    return whole


def avg_at_n(n: ArrayLike, c: ArrayLike) -> Floats:
    """Mean reward over the n samples of a problem, c / n; equals pass@1.

    Raises:
        ValueError: as `pass_at_k`.
    """
    return pass_at_k(n, c, 1)


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its 95 % interval; arrays of one shape, or scalars."""

    mean: Floats
    low: Floats
    high: Floats


def strata(families: Sequence[str]) -> list[NDArray[np.intp]]:
    """Positions of the items of each family, in order of first appearance."""
    names = np.asarray(families)
    return [np.flatnonzero(names == family) for family in dict.fromkeys(families)]


def family_weights(families: Sequence[str]) -> Floats:
    """(I,) weights that add up to 1 and turn item values into the mean over families of family means."""
    groups = strata(families)
    weights = np.empty(len(families))
    for group in groups:
        weights[group] = 1.0 / (len(groups) * len(group))
    return weights


def percentile_interval(mean: ArrayLike, draws: Floats) -> Estimate:
    """95 % percentile interval over the first axis of `draws`."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return Estimate(np.asarray(mean, dtype=np.float64), low, high)


def holm(p: ArrayLike) -> Floats:
    """Holm's step-down adjustment (Scandinavian Journal of Statistics 6, 1979); NaN entries take no part."""
    values = np.asarray(p, dtype=np.float64)
    adjusted = values.copy().ravel()
    known = np.flatnonzero(~np.isnan(adjusted))
    order = known[np.argsort(adjusted[known], kind="stable")]
    steps = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.reshape(values.shape)


@lru_cache(maxsize=1024)
def detectable_shift(seeds: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """True difference, in standard errors, that a two-sided t-test over S seeds finds with probability
    `power`.

    The power is that of the noncentral t distribution: the normal power, averaged over the estimated error.
    (SciPy's `nctdtr` has no answer for many shifts of few degrees of freedom.) NaN for fewer than two seeds.
    """
    if seeds < 2:
        return math.nan
    degrees = seeds - 1
    critical = float(stdtrit(degrees, 1 - alpha / 2))
    middles = (np.arange(10_000) + 0.5) / 10_000
    error = np.sqrt(2 * gammaincinv(degrees / 2, middles) / degrees)  # of chi / sqrt(degrees), equally likely
    low, high = 0.0, 100.0 * critical
    for _ in range(60):
        middle = (low + high) / 2
        found = float(np.mean(ndtr(middle - critical * error) + ndtr(-middle - critical * error)))
        low, high = (middle, high) if found < power else (low, middle)
    return (low + high) / 2


def iqm(values: Floats) -> Floats:
    """Interquartile mean over the last axis: the mean without the lowest and the highest quarter (rounded
    down).
    """
    ordered = np.sort(values, axis=-1)
    cut = ordered.shape[-1] // 4
    return np.asarray(ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1), dtype=np.float64)


def probability_of_improvement(x: Floats, y: Floats) -> float:
    """Chance that a run of one arm beats a run of another on a random family: Mann-Whitney, ties count half.

    Args:
        x: (S, F) scores of one arm. y: (T, F) scores of the other.
    """
    return float(_improvements(x, y).mean())


def _improvements(x: Floats, y: Floats) -> Floats:
    difference = x[:, None, :] - y[None, :, :]
    return np.asarray((difference > 0) + 0.5 * (difference == 0), dtype=np.float64)


def seed_draws(seeds: int, *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.int64]:
    """(B, S) seed positions drawn with replacement, for statistics that are no means."""
    return np.random.default_rng([seed, seeds]).integers(0, seeds, size=(resamples, seeds))


def iqm_estimate(scores: Floats) -> Estimate:
    """IQM over runs and families of (S, F) scores; plain percentile interval over seeds, narrow with few of
    them.
    """
    draws = scores[seed_draws(len(scores))]
    return percentile_interval(iqm(scores.ravel()), iqm(draws.reshape(len(draws), -1)))


def improvement_estimate(x: Floats, y: Floats) -> Estimate:
    """`probability_of_improvement` of paired (S, F) scores; plain percentile interval over seeds, kept
    paired.
    """
    wins = _improvements(x, y).mean(axis=-1)
    drawn = seed_draws(len(x))
    draws = wins[drawn[:, :, None], drawn[:, None, :]].mean(axis=(1, 2))
    return percentile_interval(wins.mean(), draws)
