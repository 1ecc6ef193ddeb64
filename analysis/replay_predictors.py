"""How well a history rule predicts the next visit of a prompt: Brier score and calibration on recorded counts.

A rule says, before visit t > 1 of a prompt, that a rollout will be right with probability p-hat, from earlier visits
only. With c of n right, its score at the visit is the mean squared error of a rollout,

    (c / n) (1 - p_hat)^2 + (1 - c / n) p_hat^2

and its Brier score the mean over all visits after the first. Even the true p scores E p (1 - p): the noise floor.

    beta(a, b, h):  p_hat = (a + S) / (a + b + N),  S, N the right and all rollouts so far, half as heavy every h visits
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

from analysis.replay_log import CountLog, Floats
from benchmark import streams
from methods.neyman import NeymanAllocation

HALF_LIVES: tuple[float | None, ...] = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, None)
MEANS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
RESAMPLES = 2000
BINS = 10


@dataclass(frozen=True)
class Rule:
    """A Beta posterior with forgetting.

    Attributes:
        prior: (a, b); with `follows_pool` their sum is the strength of a prior whose mean is that of the whole pool
            at the visit before.
        half_life: visits after which an outcome counts half; ``None`` remembers everything.
    """

    prior: tuple[float, float]
    half_life: float | None
    follows_pool: bool = False


@dataclass(frozen=True)
class Predictor:
    """A history rule and its score.

    Attributes:
        brier, low, high: score with a 95 % interval (bootstrap over prompts).
        difference, difference_low, difference_high: score minus the suite's default's, paired.
        calibration_error: mean |observed - predicted| over bins of p-hat, weighted by rollouts.
        calibration: a bin each: predicted and observed success rate, rollouts.
        rule: its parameters, where it has some.
    """

    name: str
    brier: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    calibration_error: float
    calibration: list[dict[str, float]] = field(repr=False)
    rule: Rule | None = None


def decayed(values: Floats, half_life: float | None) -> Floats:
    """Sum of earlier columns of (P, T), half as heavy every `half_life` columns; column 0 is 0."""
    keep = 1.0 if half_life is None else 0.5 ** (1 / half_life)
    result = np.zeros(values.shape)
    for visit in range(1, values.shape[1]):
        result[:, visit] = keep * result[:, visit - 1] + values[:, visit - 1]
    return result


def pool_mean(log: CountLog) -> Floats:
    """(T,) success rate of all prompts at the visit before; 1/2 before the first."""
    right, all_ = log.correct.sum(0), log.trials.sum(0)
    return np.concatenate([[0.5], right[:-1] / np.maximum(all_[:-1], 1)])


def remembered(log: CountLog, half_life: float | None) -> tuple[Floats, Floats]:
    """S and N before every visit, (P, T) each."""
    return decayed(log.correct.astype(float), half_life), decayed(log.trials.astype(float), half_life)


def beta(log: CountLog, rule: Rule, memory: tuple[Floats, Floats] | None = None) -> Floats:
    """p-hat (P, T) of a `Rule`; `memory` is what `remembered` says, where the caller has it."""
    S, N = memory or remembered(log, rule.half_life)
    a, strength = rule.prior[0], sum(rule.prior)
    start: Floats | float = strength * pool_mean(log) if rule.follows_pool else a
    return (start + S) / (strength + N)


def squared_error(log: CountLog, p_hat: Floats) -> Floats:
    """(P, T) mean squared error of a visit's rollouts; 0 at first visits and where there is none."""
    error = log.rate * (1 - p_hat) ** 2 + (1 - log.rate) * p_hat**2
    return np.where(_scored(log), error, 0.0)


def _scored(log: CountLog) -> NDArray[np.bool_]:
    scored = log.seen.copy()
    scored[:, 0] = False
    return scored


def noise_floor(log: CountLog) -> float:
    """Score of the true success rates: mean unbiased p (1 - p) over the visits that are scored."""
    return float(log.outcome_variance[_scored(log)].mean())


def halves(log: CountLog) -> NDArray[np.int64]:
    """(P,) 0 or 1 for each prompt, from a hash of its id: the same whatever the order of the log."""
    digests = (hashlib.sha256(name.encode()).digest()[0] & 1 for name in log.ids)
    return np.fromiter(digests, dtype=np.int64, count=len(log.ids))


def choose(log: CountLog, rules: Sequence[Rule]) -> tuple[Rule, tuple[Rule, Rule], Floats]:
    """The rule of least score on all prompts, on each half of them, and p-hat (P, T) of the half that did not choose.

    Equal scores go to the earlier rule.
    """
    half = halves(log)
    memory = {half_life: remembered(log, half_life) for half_life in {rule.half_life for rule in rules}}
    scores = np.array([_totals(log, beta(log, rule, memory[rule.half_life])) for rule in rules])  # (rules, P)
    best = [rules[int(scores[:, half == part].sum(1).argmin())] for part in (0, 1)]
    other = [beta(log, best[1 - part]) for part in (0, 1)]
    held_out = np.where(half[:, None] == 0, other[0], other[1])
    return rules[int(scores.sum(1).argmin())], (best[0], best[1]), held_out


def _totals(log: CountLog, p_hat: Floats) -> Floats:
    result: Floats = squared_error(log, p_hat).sum(1)
    return result


def grid(*, follows_pool: bool) -> Iterator[Rule]:
    """Rules to choose from."""
    means = (0.5,) if follows_pool else MEANS
    for half_life, strength, mean in product(HALF_LIVES, STRENGTHS, means):
        yield Rule((strength * mean, strength * (1 - mean)), half_life, follows_pool)


def predictors(log: CountLog, progress: Callable[[float], None] = lambda _: None) -> list[Predictor]:
    """Every history rule with its score, simple ones first; the last two are chosen on one half, scored on the other.

    Args:
        progress: called with the share that is done.
    """
    default = NeymanAllocation()
    plain = Rule(default.prior, default.half_life)
    fixed, _, fixed_out = choose(log, list(grid(follows_pool=False)))
    progress(0.8)
    moving, _, moving_out = choose(log, list(grid(follows_pool=True)))
    progress(0.9)
    last, cumulative = Rule((0.0, 0.0), 1e-9), Rule((0.0, 0.0), None)
    shown: list[tuple[str, Floats, Rule | None]] = [
        ("constant", np.full(log.correct.shape, 0.5), None),
        ("pool", np.broadcast_to(pool_mean(log), log.correct.shape), None),
        ("last_visit", _raw(log, last), None),
        ("cumulative", _raw(log, cumulative), None),
        ("cumulative_beta", beta(log, Rule((1.0, 1.0), None)), Rule((1.0, 1.0), None)),
        ("default", beta(log, plain), plain),
        ("fitted", fixed_out, fixed),
        ("fitted_pool", moving_out, moving),
    ]
    weight = _bootstrap(len(log.ids))
    reference = _totals(log, beta(log, plain))
    found = [_predictor(log, name, p_hat, rule, reference, weight) for name, p_hat, rule in shown]
    progress(1.0)
    return found


def _raw(log: CountLog, rule: Rule) -> Floats:
    """Success rate of what is remembered; 1/2 before the first visit, which is never scored."""
    S, N = remembered(log, rule.half_life)
    return np.where(N > 0, S / np.where(N > 0, N, 1.0), 0.5)


def _predictor(
    log: CountLog, name: str, p_hat: Floats, rule: Rule | None, reference: Floats, weight: Floats
) -> Predictor:
    visits = _scored(log).sum(1)
    own = _totals(log, p_hat)
    low, high = np.quantile((weight @ own) / (weight @ visits), [0.025, 0.975])
    less, more = np.quantile((weight @ (own - reference)) / (weight @ visits), [0.025, 0.975])
    table = calibration(log, p_hat)
    rollouts = sum(row["rollouts"] for row in table)
    return Predictor(
        name,
        float(own.sum() / visits.sum()),
        float(low),
        float(high),
        float((own - reference).sum() / visits.sum()),
        float(less),
        float(more),
        sum(row["rollouts"] * abs(row["observed"] - row["predicted"]) for row in table) / rollouts,
        table,
        rule,
    )


def _bootstrap(prompts: int) -> Floats:
    rng = streams.generator("replay bootstrap", prompts)
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES).astype(float)


def calibration(log: CountLog, p_hat: Floats) -> list[dict[str, float]]:
    """Predicted and observed success rate of the rollouts in each of `BINS` equal bins of p-hat; no empty bins."""
    scored = _scored(log)
    p, c, n = p_hat[scored], log.correct[scored], log.trials[scored]
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    sums = [np.bincount(place, weights=values, minlength=BINS) for values in (p * n, c, n)]
    return [
        {"predicted": float(predicted / count), "observed": float(observed / count), "rollouts": float(count)}
        for predicted, observed, count in zip(*sums, strict=True)
        if count
    ]
