"""What variance each allocator would have had on recorded counts.

At every visit t > 1 an allocator reads the counts before it and gives the prompts of the visit their rollouts n_i. The
counts *of* the visit, which it has not seen, score it: v_i = c (n - c) / (n (n - 1)) is an unbiased estimate of
p_i (1 - p_i), and

    variance ratio = sum_{t, i} v_i / n_i  /  sum_{t, i} v_i / uniform_i

is that of the gradient if every prompt's variance were p (1 - p) / n, the law of outcomes. `rolloutbench variance`
measures what the law leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.replay_log import CountLog, Floats, Ints
from analysis.replay_predictors import RESAMPLES, Rule, decayed, remembered
from benchmark import registry, streams
from benchmark.errors import InputError
from benchmark.history import HistoryView, PromptHistory
from benchmark.method import Method
from methods.allocation import bounds, min_variance_allocation
from methods.neyman import NeymanAllocation

ARMS = ("grpo", "dynamo_released", "dynamo_readme", "dynamo_allocation", "knapsack", "hora", "coba_rl")
"""Arms that are replayed unless others are named: those that allocate by counts alone."""

Rules = Callable[[HistoryView, int, np.random.Generator], Ints]


@dataclass(frozen=True)
class Replayed:
    """An allocator on the log.

    Attributes:
        variance_ratio, low, high: relative to uniform, with a 95 % interval (bootstrap over prompts).
        decided_share: share of the rollouts that went to prompts whose visit was all right or all wrong.
        least, most: rollouts that any prompt got.
    """

    name: str
    variance_ratio: float
    low: float
    high: float
    decided_share: float
    least: int
    most: int


def views(log: CountLog, half_life: float | None) -> list[tuple[Ints, HistoryView]]:
    """Per visit t > 1: the prompts that have one (numbers of the log) and what was remembered of them before.

    A visit of all prompts is a step of the run.
    """
    S, N = remembered(log, half_life)
    steps = PromptHistory(0)
    found = []
    for visit in range(1, log.correct.shape[1]):
        rows = np.flatnonzero(log.seen[:, visit])
        last_correct, last_trials = log.correct[rows, visit - 1], log.trials[rows, visit - 1]
        past = np.full(len(rows), visit, dtype=np.int64)
        before = log.seen[:, visit - 1]
        steps.record_step(log.correct[before, visit - 1].astype(float), log.trials[before, visit - 1].astype(float))
        view = HistoryView(S[rows, visit], N[rows, visit], past, last_correct, last_trials, batches=steps.batches)
        found.append((rows, view))
    return found


def _method(name: str) -> Method:
    method = registry.build(name, {})
    if method.probe is not None:
        raise InputError(
            "samples before it allocates, which a log of counts cannot replay",
            key="arm",
            value=name,
            remedy="Name arms that allocate by history",
        )
    return method


def replay(
    log: CountLog,
    arms: Sequence[str],
    fitted: Rule,
    each: int,
    progress: Callable[[float], None] = lambda _: None,
) -> list[Replayed]:
    """Every arm, Neyman with the `fitted` prior and half-life, and the limit that hindsight allows.

    Args:
        arms: names of `rolloutbench methods`. each: rollouts per prompt on average.
        progress: called with the share that is done.

    Raises:
        InputError: an arm that does not exist or that needs more than counts.
    """
    plain = {name: _method(name) for name in arms}
    rules: dict[str, tuple[float | None, Rules]] = {name: (m.half_life, m.allocate) for name, m in plain.items()}
    tuned = NeymanAllocation(prior=fitted.prior, half_life=fitted.half_life)
    rules["neyman_fitted"] = (tuned.half_life, lambda history, budget, _: tuned(history, budget))
    found = []
    for number, (name, (half_life, rule)) in enumerate(rules.items()):
        counts = np.zeros(log.correct.shape, dtype=np.int64)
        for visit, (rows, history) in enumerate(views(log, half_life), start=1):
            rng = streams.generator("replay", visit)
            counts[rows, visit] = rule(history, each * len(rows), rng)
        found.append(_score(log, name, counts, each))
        progress((number + 1) / (len(rules) + 1))
    found.append(_score(log, "hindsight", _hindsight(log, each), each))
    progress(1.0)
    return found


def _hindsight(log: CountLog, each: int, half_life: float = 2.0) -> Ints:
    """Neyman with p from the visits before *and* after the one that is scored, heavier the nearer."""
    c, n = log.correct.astype(float), log.trials.astype(float)
    S = decayed(c, half_life) + decayed(c[:, ::-1], half_life)[:, ::-1]
    N = decayed(n, half_life) + decayed(n[:, ::-1], half_life)[:, ::-1]
    p = (0.5 + S) / (1.0 + N)
    counts = np.zeros(log.correct.shape, dtype=np.int64)
    for visit in range(1, log.correct.shape[1]):
        rows = np.flatnonzero(log.seen[:, visit])
        low, high = bounds(len(rows), each * len(rows), None, None)
        s = np.sqrt(p[rows, visit] * (1 - p[rows, visit]))
        counts[rows, visit] = min_variance_allocation(s, each * len(rows), low, high)
    return counts


def _score(log: CountLog, name: str, counts: Ints, each: int) -> Replayed:
    scored = log.seen.copy()
    scored[:, 0] = False
    v = np.where(scored, log.outcome_variance, 0.0)
    # A prompt without rollouts has no estimate at all: as if from one rollout.
    own: Floats = (v / np.maximum(counts, 1)).sum(1)
    uniform = (v / each).sum(1)
    weight = streams.generator("replay bootstrap", len(v)).multinomial(len(v), np.full(len(v), 1 / len(v)), RESAMPLES)
    low, high = np.quantile((weight @ own) / (weight @ uniform), [0.025, 0.975])
    decided = scored & ((log.correct == 0) | (log.correct == log.trials))
    return Replayed(
        name,
        float(own.sum() / uniform.sum()),
        float(low),
        float(high),
        float(counts[decided].sum() / counts[scored].sum()),
        int(counts[scored].min()),
        int(counts[scored].max()),
    )
