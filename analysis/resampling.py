"""Intervals and tests of means and paired differences: two-level bootstrap, label swaps, sign flips.

The unit of comparison is a matrix D of paired differences between two arms, one row per seed and one column
per evaluation problem. Every seed is evaluated on the same problems, so rows and columns are crossed:
``D[s, i] = mean + seed effect + problem effect + rest``. Problems belong to families; the mean is the mean
over families of the family means.

* Intervals are 95 % percentile intervals of a two-level bootstrap (`TwoLevelBootstrap`): they answer what
  would change with other training seeds *and* other problems of the same families. They decide claims.
* p-values come from swapping the labels of the two arms in (seed, problem) cells (`swap_tests`). Five seeds
  allow only 32 sign flips of whole seeds, so that test (`sign_flip_test`) cannot fall below 0.0625; swapping
  cells can. Swapping alone would test only that the two arms are exchangeable in every cell, and would call
  the luck of a training run an effect of the method. The statistic is therefore studentised by a standard
  error that holds the differences between seeds: the test is exact for exchangeable cells and close to a
  paired t-test over seeds (S - 1 degrees of freedom) where only the mean difference is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from analysis.statistics import (
    CONFIDENCE,
    RESAMPLES,
    Estimate,
    Floats,
    family_weights,
    percentile_interval,
    strata,
)

_NORMAL_QUANTILE = 1.959963984540054  # of (1 + CONFIDENCE) / 2
_CHUNK = 500  # label swaps held in memory at a time


class TwoLevelBootstrap:
    """Percentile intervals over seeds and problems that are crossed (every seed sees every problem).

    A resample draws S seeds with replacement and, independently, the problems of each family with
    replacement. It moves the mean by a seed part (mean over the drawn seeds of the seed means) plus a problem
    part (likewise). Two corrections make the interval hold its 95 % from two seeds on, where the plain
    percentile interval of five seeds covers about 84 % of a difference between seeds and counts the remaining
    noise three times:

    * the seed part is stretched by ``sqrt(S / (S - 1)) * t(.975, S - 1) / 1.96``, so that it alone is as wide
      as a t interval over seeds (after Hesterberg 2015, The American Statistician 69(4));
    * the problem part is shrunk to the variance between problems, without the noise that the seed part holds
      already (after Davison and Hinkley 1997, Bootstrap Methods and their Application, hierarchical data).

    One seed has no seed part: the interval is then over problems only, and the caller has to say so.

    Args:
        seeds: S. families: the family of each item, (I,). resamples: B. seed: of the resampling.
    """

    def __init__(self, seeds: int, families: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, seeds, len(families)])
        self.seeds, self.weights, self.groups = seeds, family_weights(families), strata(families)
        drawn = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=resamples)
        self._seed_part = seed_stretch(seeds) * (drawn - 1.0) / seeds
        self._item_part = np.empty((resamples, len(families)))
        for group in self.groups:
            counts = rng.multinomial(len(group), np.full(len(group), 1.0 / len(group)), size=resamples)
            self._item_part[:, group] = (counts - 1.0) * self.weights[group]

    def draws(self, values: Floats, *, problems: bool = True) -> tuple[Floats, Floats]:
        """The mean of `values` and its resampled means.

        Args:
            values: (S, I) or (S, I, G): G quantities resampled together.
            problems: resample problems too; False holds them fixed.

        Returns:
            The mean, () or (G,), and (B,) or (B, G) draws.
        """
        rows = np.tensordot(values, self.weights, axes=(1, 0))
        mean = rows.mean(axis=0)
        draws = mean + np.tensordot(self._seed_part, rows, axes=1)
        if problems:
            draws = draws + np.tensordot(self._item_part, self._shrunk(values), axes=1)
        return mean, draws

    def estimate(self, values: Floats, *, problems: bool = True) -> Estimate:
        """Mean and 95 % percentile interval of (S, I) or (S, I, G) values."""
        mean, draws = self.draws(values, problems=problems)
        return percentile_interval(mean, draws)

    def _shrunk(self, values: Floats) -> Floats:
        """Problem means, pulled to their family's mean until they vary as much as the problems really do."""
        columns = values.mean(axis=0)
        for group in self.groups:
            part, size = values[:, group], len(group)
            centre = columns[group].mean(axis=0)
            spread = np.square(columns[group] - centre).sum(axis=0) / max(size - 1, 1) / size
            real = _item_variance(
                np.moveaxis(part.mean(axis=1), 0, -1),
                np.square(columns[group]).sum(axis=0),
                np.square(part).sum(axis=(0, 1)),
                size,
            )
            ratio = np.divide(real, spread, out=np.zeros_like(spread), where=spread > 0)
            columns[group] = centre + np.sqrt(np.minimum(ratio, 1.0)) * (columns[group] - centre)
        return np.asarray(columns, dtype=np.float64)


@lru_cache(maxsize=64)
def bootstrap_for(seeds: int, families: tuple[str, ...]) -> TwoLevelBootstrap:
    """The resampling of a shape, made once: arms compared in one table share their resamples."""
    return TwoLevelBootstrap(seeds, families)


def seed_stretch(seeds: int) -> float:
    """What the bootstrap of S seeds has to be widened by; tends to 1, and is 0 for a single seed."""
    if seeds < 2:
        return 0.0
    quantile = float(stdtrit(seeds - 1, (1 + CONFIDENCE) / 2))
    return math.sqrt(seeds / (seeds - 1)) * quantile / _NORMAL_QUANTILE


def _item_variance(rows: Floats, columns2: Floats, squares: Floats, items: int) -> Floats:
    """Variance of a family's mean that comes from the choice of its items (two-way random effects, >= 0).

    Args:
        rows: (..., S) seed means. columns2: (...) sum over items of squared item means.
        squares: (...) sum of all squared values. items: n.
    """
    seeds = rows.shape[-1]
    mean = rows.mean(axis=-1)
    if items == 1:
        return np.zeros_like(mean)
    between = seeds * (columns2 - items * mean**2) / (items - 1)
    if seeds == 1:
        return np.asarray(np.maximum(between, 0.0) / items, dtype=np.float64)
    rest = squares - items * np.square(rows).sum(axis=-1) - seeds * columns2 + seeds * items * mean**2
    rest = rest / ((seeds - 1) * (items - 1))
    return np.asarray(np.maximum(between - rest, 0.0) / (seeds * items), dtype=np.float64)


def _mean_and_variance(rows: list[Floats], items: list[Floats]) -> tuple[Floats, Floats]:
    """Mean over families and its squared standard error, from (..., S) seed means and item variances a
    family.
    """
    average = np.mean(rows, axis=0)
    seeds = average.shape[-1]
    variance = np.sum(items, axis=0) / len(rows) ** 2
    if seeds > 1:
        variance = variance + average.var(axis=-1, ddof=1) / seeds
    return average.mean(axis=-1), variance


@dataclass(frozen=True)
class Spread:
    """How sure a mean over seeds and problems is.

    Attributes:
        error: standard error of the mean, seeds and problems together.
        seed_sd: standard deviation of the seed means. item_error: the part of `error` that comes from
            problems.
    """

    error: float
    seed_sd: float
    item_error: float


def spread(values: Floats, families: Sequence[str]) -> Spread:
    """Standard error of the mean of an (S, I) matrix, and its parts."""
    rows = [values[:, group].mean(axis=1) for group in strata(families)]
    items = [
        _item_variance(
            values[:, group].mean(axis=1),
            np.square(values[:, group].mean(axis=0)).sum(),
            np.square(values[:, group]).sum(),
            len(group),
        )
        for group in strata(families)
    ]
    _, variance = _mean_and_variance(rows, items)
    average = np.mean(rows, axis=0)
    seed_sd = float(average.std(ddof=1)) if len(average) > 1 else math.nan
    return Spread(float(np.sqrt(variance)), seed_sd, float(np.sqrt(np.sum(items))) / len(rows))


def swap_tests(values: Floats, families: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Two-sided p-values of paired differences by swapping the two arms' labels in (seed, item) cells.

    Null hypothesis: in every cell the two arms are exchangeable (exact), or their mean difference over seeds
    and problems is zero (approximate, see the module's docstring). Statistic: |mean| / standard error, the
    error from the variance between seeds and the variance between problems, computed anew for every swap.

    Args:
        values: (K, S, I) paired differences of K comparisons; all see the same swaps.
        families: (I,). resamples: swaps, the identity among them. seed: of the swaps.

    Returns:
        (K, 1 + F) p-values: of the average over families, then of each family. The smallest is 1 / resamples.
    """
    groups = strata(families)
    exceeded = np.zeros((len(values), 1 + len(groups)))
    observed: Floats | None = None
    for signs in _signs(resamples, values.shape[1], len(families), seed):
        statistic = _swapped_statistics(values, groups, signs)
        if observed is None:
            observed = statistic[0] * (1 - 1e-9)  # equal statistics count as equal in spite of rounding
        exceeded += (statistic >= observed).sum(axis=0)
    return exceeded / resamples


def _signs(resamples: int, seeds: int, items: int, seed: int) -> Iterator[Floats]:
    """(b, S, I) random signs in chunks; the first of all is the identity."""
    rng = np.random.default_rng([seed, seeds, items])
    for begin in range(0, resamples, _CHUNK):
        count = min(_CHUNK, resamples - begin)
        bits = np.unpackbits(rng.integers(0, 256, size=(count, (seeds * items + 7) // 8), dtype=np.uint8), axis=1)
        signs = bits[:, : seeds * items].reshape(count, seeds, items) * 2.0 - 1.0
        if begin == 0:
            signs[0] = 1.0
        yield np.asarray(signs, dtype=np.float64)


def _swapped_statistics(values: Floats, groups: list[NDArray[np.intp]], signs: Floats) -> Floats:
    """(b, K, 1 + F) studentised means. Sums over items are products of sign matrices, with no (b, K, I)
    array.
    """
    seeds = values.shape[1]
    rows, item_variances = [], []
    first, second = np.triu_indices(seeds, k=1)
    for group in groups:
        part, sign, size = values[:, :, group], signs[:, :, group], len(group)
        row = np.stack([sign[:, s] @ part[:, s].T for s in range(seeds)], axis=-1) / size
        own = np.square(part).sum(axis=(1, 2))
        # The square of an item's sum over seeds: its own squares, which no sign changes, and the products of
        # pairs.
        pairs = (sign[:, first] * sign[:, second]).reshape(len(sign), -1)
        products = (part[:, first] * part[:, second]).reshape(len(part), -1)
        columns2 = (own + 2.0 * pairs @ products.T) / seeds**2
        rows.append(row)
        item_variances.append(_item_variance(row, columns2, own, size))
    parts = [(rows, item_variances), *(([r], [v]) for r, v in zip(rows, item_variances, strict=True))]
    moments = [_mean_and_variance(*part) for part in parts]
    mean = np.abs(np.stack([m for m, _ in moments], axis=-1))
    error = np.sqrt(np.stack([v for _, v in moments], axis=-1))
    # A difference without any spread is certain, no difference at all is none; rounding must not decide
    # between them.
    nothing = mean <= 1e-12
    ratio = np.divide(mean, error, out=np.full_like(mean, np.inf), where=error > 1e-12 * mean)
    return np.where(nothing, 0.0, ratio)


def sign_flip_test(differences: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of a mean of S seed differences by flipping the signs of whole seeds.

    Exact over all 2**S flips up to 13 seeds, so never below 2 / 2**S; sampled beyond.
    """
    count = len(differences)
    if count <= 13:
        flips = 1.0 - 2.0 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    else:
        flips = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, count))
        flips[0] = 1.0
    totals = np.abs(flips @ differences)
    return float(np.mean(totals >= totals[0] * (1 - 1e-9)))
