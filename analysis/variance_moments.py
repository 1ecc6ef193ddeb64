"""Variance of a prompt's gradient estimate for every group size, from one pool of its rollouts; exact and unbiased.

Rollout j of a prompt has a 0/1 reward r_j and a gradient G_j = sum_t grad log pi. A group of n of them, k right, gives

    g = (1/n) sum_j A_j G_j,    A_j = a(k, n) if r_j = 1 else b(k, n)

for every advantage that depends on the group's rewards alone. Then E g and E |g|^2 depend on the prompt through p and
five numbers only: S1, S0 = E|G|^2 given right or wrong, and C11, C00, C10 = products of the means given right or wrong.
A pool of m rollouts, c right, yields the average of |g|^2 over *all* its groups of n, and that of g.g' over *all* pairs
of disjoint groups, by (multivariate) hypergeometric weights and means over pairs of distinct rollouts:

    V(n) = mean |g|^2 - mean g.g'       a complete U-statistic: unbiased, no partition is drawn at random

It is the mean over every partition of the pool into disjoint groups, which has no noise of its own (2 n <= m).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln

from baselines.dr_grpo import DrGRPO
from baselines.grpo import GRPO
from baselines.rloo import RLOO
from benchmark.groups import Groups

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Credit = Callable[[Groups], torch.Tensor]

ADVANTAGES: dict[str, Credit] = {
    "mean only": DrGRPO().credit,
    "leave one out": RLOO().credit,
    "mean and std": GRPO().credit,
}
"""Advantage kinds by name: those of Dr. GRPO, RLOO and GRPO."""


@dataclass(frozen=True)
class BlockSums:
    """Pools of P prompts, each cut into B blocks of rollouts; class 0 is wrong, 1 is right.

    Attributes:
        count: (P, B, 2) rollouts. square: (P, B, 2) sum of |G_j|^2. product: (P, B, 2, B, 2) inner products of the
            sums of G_j of a block and class.
    """

    count: Ints
    square: Floats
    product: Floats

    @classmethod
    def of_gram(cls, gram: Floats, right: NDArray[np.bool_], blocks: int) -> BlockSums:
        """From Gram matrices (P, M, M) and rewards (P, M); rollout j is in block j * blocks // M."""
        rollouts = right.shape[1]
        block = np.arange(rollouts) * blocks // rollouts
        cell = np.eye(2 * blocks)[2 * block + right]  # (P, M, 2 B)
        prompts = len(right)
        return cls(
            cell.sum(1).astype(np.int64).reshape(prompts, blocks, 2),
            np.einsum("pmm,pmc->pc", gram, cell).reshape(prompts, blocks, 2),
            np.einsum("pmc,pmn,pnd->pcd", cell, gram, cell, optimize=True).reshape(prompts, blocks, 2, blocks, 2),
        )

    @property
    def blocks(self) -> int:
        """Number of blocks B."""
        return len(self.count[0])

    def moments(self, chosen: Ints) -> Moments:
        """Moments of the rollouts of the chosen blocks."""
        count, square = self.count[:, chosen].sum(1), self.square[:, chosen].sum(1)
        product = self.product[:, chosen][:, :, :, chosen].sum((1, 3))
        wrong, right = count[:, 0], count[:, 1]

        def mean(total: Floats, pairs: Ints) -> Floats:
            # Where there is no such pair its weight is 0 as well.
            return total / np.maximum(pairs, 1)

        values = (
            mean(square[:, 1], right),
            mean(square[:, 0], wrong),
            mean(product[:, 1, 1] - square[:, 1], right * (right - 1)),
            mean(product[:, 0, 0] - square[:, 0], wrong * (wrong - 1)),
            mean(product[:, 1, 0], right * wrong),
        )
        return Moments(right, int(count[0].sum()), np.stack(values, axis=-1))


class Moments(NamedTuple):
    """Pools of m rollouts of P prompts: right (P,) of them right, values (P, 5): S1, S0, C11, C00, C10."""

    right: Ints
    size: int
    values: Floats


class Weights(NamedTuple):
    """What the five moments weigh for groups of one size, by right answers c = 0..m of the pool.

    Attributes:
        variance, square: (m + 1, 5) for V(n) and for |E g|^2.
        mean: (m + 1, 2): E g = mean[c, 1] * mean G given right + mean[c, 0] * mean G given wrong.
    """

    variance: Floats
    square: Floats
    mean: Floats


def advantages(credit: Credit, n: int) -> tuple[Floats, Floats]:
    """Advantage of a right and of a wrong rollout of a group of n >= 1 with k = 0..n right, (n + 1,) each.

    As `credit` computes them; 0 for a rollout that such a group does not have.
    """
    right = torch.arange(n) < torch.arange(n + 1)[:, None]
    prompt = torch.arange(n + 1).repeat_interleave(n)
    length = torch.ones(len(prompt), dtype=torch.int64)
    groups = Groups(prompt, n + 1, right.flatten().float(), length, torch.zeros(len(prompt), dtype=torch.bool), 1)
    value = credit(groups).double().view(n + 1, n)
    zero = torch.zeros(1, dtype=torch.float64)
    # Right rollouts come first: column 0 is right for k >= 1 and column n - 1 wrong for k <= n - 1.
    return torch.cat([zero, value[1:, 0]]).numpy(), torch.cat([value[:-1, n - 1], zero]).numpy()


def _hypergeometric(k: Ints, total: int, good: Ints, drawn: int) -> Floats:
    """P(k good among `drawn` of `total`, `good` of them good); 0 where impossible."""

    def log_choose(a: Ints, b: Ints) -> Floats:
        possible = (b >= 0) & (b <= a) & (a >= 0)
        a, b = np.where(possible, a, 0), np.where(possible, b, 0)
        value: Floats = np.where(possible, gammaln(a + 1.0) - gammaln(b + 1.0) - gammaln(a - b + 1.0), -np.inf)
        return value

    whole = log_choose(np.asarray(total), np.asarray(drawn))
    result: Floats = np.exp(log_choose(good, k) + log_choose(total - good, drawn - k) - whole)
    return result


@lru_cache(maxsize=2048)
def weights(advantage: str, n: int, m: int) -> Weights:
    """Weights of the moments of a pool of m for groups of n; a group of 0 estimates 0 without variance.

    Raises:
        ValueError: two disjoint groups do not fit into the pool.
    """
    if n == 0:
        return Weights(np.zeros((m + 1, 5)), np.zeros((m + 1, 5)), np.zeros((m + 1, 2)))
    if 2 * n > m:
        raise ValueError(f"two disjoint groups of {n} need a pool of {2 * n}, not {m}")
    a, b = advantages(ADVANTAGES[advantage], n)
    k, c = np.arange(n + 1), np.arange(m + 1)[:, None]
    x, y = k * a, (n - k) * b
    first = _hypergeometric(k, m, c, n)
    # The second group is drawn from what the first left over: m - n rollouts, c - k of them right.
    second = _hypergeometric(k, m - n, c, n)
    left = np.maximum(c - k, 0)
    cross = x * (n - k) * b
    within = first @ np.stack([x * a, y * b, x * (k - 1) * a, y * (n - k - 1) * b, 2 * cross], axis=1)
    other_x, other_y = (second @ x)[left], (second @ y)[left]
    pairs = np.stack([x * other_x, y * other_y, 2 * x * other_y], axis=-1)
    square = np.zeros((m + 1, 5))
    square[:, 2:] = np.einsum("ck,ckv->cv", first, pairs)
    mean = first @ np.stack([y, x], axis=1) / n
    return Weights((within - square) / n**2, square / n**2, mean)


def variance(moments: Moments, advantage: str, n: int) -> Floats:
    """V_i(n) of every prompt, (P,); unbiased, so it may be negative."""
    weight = weights(advantage, n, moments.size).variance[moments.right]
    result: Floats = (weight * moments.values).sum(-1)
    return result


def variance_curve(moments: Moments, advantage: str, most: int) -> Floats:
    """V_i(n) for n = 0..most, (P, most + 1)."""
    return np.stack([variance(moments, advantage, n) for n in range(most + 1)], axis=1)


@dataclass(frozen=True)
class Curves:
    """V_i(n) from some blocks of a pool, and again with each of these blocks left out.

    Attributes:
        whole: (P, N). without: (B', P, N).
    """

    whole: Floats
    without: Floats

    @classmethod
    def of(cls, sums: BlockSums, chosen: Ints, advantage: str, most: int) -> Curves:
        """Curves for n = 0..most of the blocks `chosen`."""

        def curve(blocks: Ints) -> Floats:
            return variance_curve(sums.moments(blocks), advantage, most)

        return cls(curve(chosen), np.stack([curve(chosen[chosen != block]) for block in chosen]))

    def at(self, n: Ints) -> tuple[Floats, Floats]:
        """V_i(n_i), (P,), and with each block left out, (B', P)."""
        prompt = np.arange(len(n))
        return self.whole[prompt, n], self.without[:, prompt, n]


class Ratio(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def total_ratio(parts: list[tuple[Curves, Ints, Ints]]) -> Ratio:
    """sum_i V_i(n_i) / sum_i V_i(u_i) over fixed prompts, added up over `parts` (curves, n, u).

    The interval is a stratified delete-one-block jackknife of the logarithm: prompts are independent, a prompt's blocks
    are independent and alike, and V is a U-statistic of them, for which the jackknife is consistent (a bootstrap that
    repeats rollouts puts |G_j|^2 in the place of products of distinct rollouts, and is biased).
    """
    top, top_without = _add(parts, 1)
    bottom, bottom_without = _add(parts, 2)
    return _interval(np.log(top.sum() / bottom.sum()), _log(top, top_without) - _log(bottom, bottom_without))


def total(parts: list[tuple[Curves, Ints, Ints]]) -> Ratio:
    """sum_i V_i(n_i), the mean over `parts`, with a jackknife interval like that of `total_ratio`."""
    top, without = _add(parts, 1)
    return _interval(np.log(top.sum() / len(parts)), _log(top, without))


def _add(parts: list[tuple[Curves, Ints, Ints]], which: int) -> tuple[Floats, Floats]:
    """Sum over parts per prompt (P,), and with each block of each part left out (B, P)."""
    values = [part[0].at(part[which]) for part in parts]  # type: ignore[arg-type]
    whole = np.sum([value for value, _ in values], axis=0)
    return whole, np.concatenate([whole - value + without for value, without in values])


def _log(whole: Floats, without: Floats) -> Floats:
    """Logarithm of the sum over prompts with one block of one prompt left out, (B, P)."""
    result: Floats = np.log(np.maximum(whole.sum() - whole + without, 1e-300))
    return result


def _interval(centre: float, replicates: Floats) -> Ratio:
    blocks = len(replicates)
    error = np.sqrt((blocks - 1) / blocks * ((replicates - replicates.mean(0)) ** 2).sum())
    return Ratio(float(np.exp(centre)), float(np.exp(centre - 1.96 * error)), float(np.exp(centre + 1.96 * error)))
