"""Every allocator, advantage kind and budget replayed on the pools of one checkpoint.

    g = (1 / (P L)) sum_i g_i,   g_i = (1 / n_i) sum_j A_ij G_ij       L: mean tokens of a rollout, over prompts

is the gradient of the token-mean loss with equal prompt weights (before any clip range acts). L of a batch is treated
as fixed: it varies by a few percent and scales all terms alike. With the prompts fixed, the variance of g is
(1 / (P L))^2 sum_i V_i(n_i): the part that allocation can change. Over batches of prompts there is the variance of the
means mu_i = E g_i as well, tr Cov(mu) / (P L^2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.variance_allocators import (
    NAMES,
    RULES,
    Known,
    assumed_deviation,
    oracle_p,
    oracle_variance,
    predicted_ratio,
)
from analysis.variance_moments import (
    ADVANTAGES,
    BlockSums,
    Curves,
    Floats,
    Ints,
    Moments,
    Ratio,
    advantages,
    total,
    total_ratio,
    weights,
)
from analysis.variance_pool import Statistics
from benchmark import streams

Part = tuple[Curves, Ints, Ints]


def most_rollouts(rollouts: int, blocks: int) -> int:
    """The largest group that half a pool can score with a block left out."""
    return (rollouts // 2 - rollouts // blocks) // 2


@dataclass(frozen=True)
class Choice:
    """What an allocator chose: counts that are scored on some curves, and what it predicted."""

    parts: list[Part]
    predicted: float


def replay(statistics: Statistics, budgets: Sequence[int]) -> list[dict[str, Any]]:
    """One row an allocator, budget per prompt, advantage and coordinates.

    Returns:
        Rows of coordinates, advantage, budget, allocator; ratio to uniform with low and high; variance of g with
        variance_low and variance_high; predicted ratio; squared_mean; signal_to_noise, within_share, cosine (to the
        expected gradient of the largest groups) and signal_ratio (signal_to_noise relative to uniform) with their
        intervals over prompts; n_min and n_max.
    """
    rows = []
    known, prompts = statistics.known, len(statistics.length)
    counts = {budget: {name: rule(known, budget * prompts) for name, rule in RULES.items()} for budget in budgets}
    for coordinates, sums in statistics.sums.items():
        most = most_rollouts(int(sums.count[0].sum()), sums.blocks)
        for advantage in ADVANTAGES:
            bench = _Replay(statistics, coordinates, sums, advantage, most)
            rows += [row for budget in budgets for row in bench.rows(budget, counts[budget])]
    return rows


class _Replay:
    """The pools of one checkpoint under one advantage and one system of coordinates."""

    def __init__(self, statistics: Statistics, coordinates: str, sums: BlockSums, advantage: str, most: int) -> None:
        self.known, self.advantage, self.head = statistics.known, advantage, {"coordinates": coordinates}
        self.most = most
        every = np.arange(sums.blocks)
        self.halves = [every[: len(every) // 2], every[len(every) // 2 :]]
        self.whole = Curves.of(sums, every, advantage, most)
        self.half = [Curves.of(sums, half, advantage, most) for half in self.halves]
        self.success = [sums.moments(half).right / sums.moments(half).size for half in self.halves]
        self.moments = sums.moments(every)
        self.class_products = _class_products(statistics.gram[coordinates], sums.count.sum(1))
        self.prompts = len(statistics.length)
        self.scale = 1 / (self.prompts * float(statistics.length.mean())) ** 2
        self.target = _coefficients(self.moments, advantage, None)

    def rows(self, budget: int, counts: Mapping[str, Ints]) -> Iterator[dict[str, Any]]:
        """A row an allocator at `budget` rollouts per prompt; `counts` of the rules."""
        reference: dict[str, Floats] = {}
        for name in NAMES:
            choice = self.choose(name, budget * self.prompts, counts)
            square, found = self.direction(choice)
            reference = reference or found
            found["signal_ratio"] = found["signal_to_noise"] / reference["signal_to_noise"]
            ratio, size = total_ratio(choice.parts), total(choice.parts)
            spread = np.concatenate([n for _, n, _ in choice.parts])
            yield {
                **self.head,
                "advantage": self.advantage,
                "budget": budget,
                "allocator": name,
                **_named("", ratio, "ratio"),
                **_named("variance_", Ratio(*(self.scale * value for value in size)), "variance"),
                "predicted": choice.predicted,
                "squared_mean": square,
                **{k: v for quantity, values in found.items() for k, v in _jackknife(quantity, values).items()},
                "n_min": int(spread.min()),
                "n_max": int(spread.max()),
            }

    def choose(self, name: str, budget: int, counts: Mapping[str, Ints]) -> Choice:
        """What an allocator gives; an oracle chooses on one half of the pool what is scored on the other, both ways."""
        uniform = counts["uniform"]
        if name in counts:
            n = counts[name]
            return Choice([(self.whole, n, uniform)], predicted_ratio(assumed_deviation(name, self.known), n, uniform))
        parts, predictions = [], []
        for own, other in ((0, 1), (1, 0)):
            curve, p = self.half[own], self.success[own]
            if name == "oracle_p":
                n = oracle_p(p, budget)
                predictions.append(predicted_ratio(np.sqrt(p * (1 - p)), n, uniform))
            else:
                n = oracle_variance(curve.whole, budget, (2, self.most) if name == "oracle_unbounded" else None)
                predictions.append(float(curve.at(n)[0].sum() / curve.at(uniform)[0].sum()))
            parts.append((self.half[other], n, uniform))
        return Choice(parts, float(np.mean(predictions)))

    def direction(self, choice: Choice) -> tuple[float, dict[str, Floats]]:
        """Squared norm of the mean gradient; signal_to_noise, within_share and cosine to the target.

        The latter (1 + P,): from all prompts, then with each one left out; no cosine where a squared norm, which has no
        noise bias, is not positive.
        """
        P = self.prompts
        found = []
        for curve, n, _ in choice.parts:
            V = curve.at(n)[0]
            own = _coefficients(self.moments, self.advantage, n)
            mean = self.product(own, own, _exact_squares(self.moments, self.advantage, n))
            plain, cross, target = (
                self.product(a, b) for a, b in ((own, own), (own, self.target), (self.target, self.target))
            )
            # Sums over all prompts, then with each prompt left out; prompts P and P - 1.
            size = np.array([P, *[P - 1] * P])
            square, noise, diagonal = _left_out(mean), _each_out(V), _each_out(np.diag(mean))
            between = np.maximum(diagonal - square / size, 0.0) / (size - 1)
            within = noise / size
            norms = _left_out(plain) * _left_out(target)
            cosine = np.where(norms > 0, _left_out(cross) / np.sqrt(np.where(norms > 0, norms, 1.0)), np.nan)
            found.append(np.stack([P * square / size / noise, within / (within + between), cosine, square]))
        *values, squares = np.mean(found, axis=0)
        return self.scale * float(squares[0]), dict(
            zip(("signal_to_noise", "within_share", "cosine"), values, strict=True)
        )

    def product(self, a: Floats, b: Floats, diagonal: Floats | None = None) -> Floats:
        """<mu_i, mu'_j> (P, P) for mean gradients with class coefficients a and b (P, 2); unbiased but for O(1 / m)."""
        result: Floats = ((self.class_products * a[:, :, None, None]).sum(1) * b).sum(-1)
        if diagonal is None:
            _, _, right, wrong, both = self.moments.values.T
            diagonal = a[:, 1] * b[:, 1] * right + a[:, 0] * b[:, 0] * wrong
            diagonal = diagonal + (a[:, 1] * b[:, 0] + a[:, 0] * b[:, 1]) * both
        np.fill_diagonal(result, diagonal)
        return result


def _class_products(gram: Floats, count: Ints) -> Floats:
    """Products of the mean gradients of every prompt and class, (P, 2, P, 2); a class without rollouts counts 0."""
    each = np.maximum(count.reshape(-1), 1)
    return (gram / each[:, None] / each).reshape(*count.shape, *count.shape)


def _coefficients(moments: Moments, advantage: str, n: Ints | None) -> Floats:
    """Weights (P, 2) of the mean gradients given wrong and right in E g_i; the whole pool as one group without `n`."""
    if n is not None:
        return np.stack(
            [weights(advantage, int(k), moments.size).mean[c] for k, c in zip(n, moments.right, strict=True)]
        )
    right, wrong = advantages(ADVANTAGES[advantage], moments.size)
    c = moments.right
    return np.stack([(moments.size - c) * wrong[c], c * right[c]], axis=1) / moments.size


def _exact_squares(moments: Moments, advantage: str, n: Ints) -> Floats:
    table = [weights(advantage, int(k), moments.size).square[c] for k, c in zip(n, moments.right, strict=True)]
    result: Floats = (np.stack(table) * moments.values).sum(-1)
    return result


def _left_out(products: Floats) -> Floats:
    """The sum of a (P, P) matrix, then without row and column i, (1 + P,)."""
    whole = products.sum()
    return np.array([whole, *(whole - products.sum(0) - products.sum(1) + np.diag(products))])


def _each_out(values: Floats) -> Floats:
    return np.array([values.sum(), *(values.sum() - values)])


def _jackknife(name: str, values: Floats) -> dict[str, float]:
    """The first of the (1 + P,) values with a 95 % interval from leaving one prompt out."""
    centre, rest = float(values[0]), values[1:]
    error = 1.96 * float(np.sqrt((len(rest) - 1) * rest.var()))
    return {name: centre, f"{name}_low": centre - error, f"{name}_high": centre + error}


def _named(prefix: str, ratio: Ratio, name: str) -> dict[str, float]:
    return {name: ratio.value, f"{prefix}low": ratio.low, f"{prefix}high": ratio.high}


def prompt_rows(statistics: Statistics, n: int) -> list[dict[str, Any]]:
    """One row a prompt, advantage and coordinates: success rates of pool and history sample, mean length and V_i(n)."""
    rows = []
    for coordinates, sums in statistics.sums.items():
        moments = sums.moments(np.arange(sums.blocks))
        for advantage in ADVANTAGES:
            V = (
                np.stack([weights(advantage, n, moments.size).variance[c] for c in moments.right]) * moments.values
            ).sum(-1)
            for i, value in enumerate(V / statistics.length.mean() ** 2):
                known: Known = statistics.known
                rows.append(
                    {
                        "coordinates": coordinates,
                        "advantage": advantage,
                        "prompt": i,
                        "p": float(moments.right[i] / moments.size),
                        "p_hat": float(known.p[i]),
                        "tokens": float(statistics.length[i]),
                        "variance": float(value),
                    }
                )
    return rows


def allocation_rows(statistics: Statistics, budgets: Sequence[int]) -> list[dict[str, Any]]:
    """One row a prompt, rule and budget: the history's success rate and the rollouts that the rule gives."""
    known = statistics.known
    return [
        {"budget": budget, "allocator": name, "prompt": i, "p_hat": float(known.p[i]), "n": int(count)}
        for budget in budgets
        for name, rule in RULES.items()
        for i, count in enumerate(rule(known, budget * len(known.history)))
    ]


def proxy(p: Floats, V: Floats, resamples: int = 1000) -> dict[str, float]:
    """How well p (1 - p) explains the variance of prompts: regression of log V_i on log p_i (1 - p_i).

    Prompts without variance (p = 0 or 1, or an estimate that is not positive) are left out.

    Returns:
        prompts, r_squared with r_squared_low and r_squared_high (bootstrap over prompts), slope (1 in the law).
    """
    use: NDArray[np.bool_] = (p > 0) & (p < 1) & (V > 0)
    x, y = np.log(p[use] * (1 - p[use])), np.log(V[use])
    draws = streams.generator("variance proxy", len(x)).integers(len(x), size=(resamples, len(x)))
    found = np.corrcoef(x, y)[0, 1] ** 2
    xs, ys = x[draws] - x[draws].mean(1, keepdims=True), y[draws] - y[draws].mean(1, keepdims=True)
    spread = np.maximum((xs**2).sum(1) * (ys**2).sum(1), 1e-300)
    low, high = np.quantile((xs * ys).sum(1) ** 2 / spread, [0.025, 0.975])
    return {
        "prompts": int(use.sum()),
        "r_squared": float(found),
        "r_squared_low": float(low),
        "r_squared_high": float(high),
        "slope": float(np.polyfit(x, y, 1)[0]),
    }
