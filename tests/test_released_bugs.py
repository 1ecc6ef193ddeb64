"""The two faults of DynaMO's released code that credit rollouts to the wrong prompts, on toy batches of our own.

They are reproduced here and nowhere else: `dynamo_released` is the released rule with right credits.
"""

from __future__ import annotations

import numpy as np

from benchmark.history import PromptHistory
from methods.released_allocation import ReleasedAllocation

PROMPTS, MEAN = 512, 16


def one_epoch(seed: int) -> tuple[np.ndarray, PromptHistory]:
    """Success rates, and the history after one epoch of uniform rollouts."""
    rng = np.random.default_rng(seed)
    p = rng.beta(0.5, 0.5, PROMPTS)
    history = PromptHistory(PROMPTS)
    history.record(range(PROMPTS), rng.binomial(MEAN, p).astype(float), np.full(PROMPTS, float(MEAN)))
    return p, history


def test_repeating_labels_evenly_gives_most_rollouts_another_prompts_answer() -> None:
    """Prompts are repeated n_i times, their labels MEAN times each: only the number of rows agrees."""
    _, history = one_epoch(0)
    n = ReleasedAllocation(n_low=8, n_high=24)(history.view(range(PROMPTS)), PROMPTS * MEAN)
    drawn_for = np.repeat(np.arange(PROMPTS), n)
    labelled = np.repeat(np.arange(PROMPTS), MEAN)
    assert len(drawn_for) == len(labelled)  # the only thing that is checked
    wrong = (drawn_for != labelled).mean()
    assert 0.7 < wrong < 0.97
    # While every prompt has MEAN rollouts, as in the first epoch, nothing is wrong.
    first = ReleasedAllocation(n_low=8, n_high=24)(PromptHistory(PROMPTS).view(range(PROMPTS)), PROMPTS * MEAN)
    assert (np.repeat(np.arange(PROMPTS), first) == labelled).all()


def test_reordering_rows_for_balance_credits_successes_to_random_prompts() -> None:
    """Indices are read after the batch was reordered by length, outcomes in the order before."""
    rng = np.random.default_rng(1)
    p, right = one_epoch(1)
    prompt = np.repeat(np.arange(PROMPTS), MEAN)
    outcome = rng.random(len(prompt)) < p[prompt]
    order = np.argsort(rng.integers(100, 2000, len(prompt)), kind="stable")
    credited = prompt[order]
    # Seen from outcomes, which are 0 or 1: how often the prompt gets another outcome than its own rollout's.
    wrong = (outcome != outcome[order]).mean()
    assert 0.4 < wrong < 0.6
    scrambled = PromptHistory(PROMPTS)
    scrambled.record(
        range(PROMPTS), np.bincount(credited, outcome, PROMPTS), np.bincount(credited, minlength=PROMPTS).astype(float)
    )

    def correlation(history: PromptHistory) -> float:
        view = history.view(range(PROMPTS))
        return float(np.corrcoef(view.successes / view.trials, p)[0, 1])

    assert correlation(right) > 0.9
    assert abs(correlation(scrambled)) < 0.2


def test_the_scrambled_history_costs_the_allocation_its_gain() -> None:
    """Neither fault leaves the rule anything to learn from: dead prompts keep their rollouts."""
    p, right = one_epoch(2)
    rng = np.random.default_rng(3)
    scrambled = PromptHistory(PROMPTS)
    scrambled.counts = right.counts[rng.permutation(PROMPTS)]
    dead = (p < 0.01) | (p > 0.99)

    def share(history: PromptHistory) -> float:
        n = ReleasedAllocation(n_low=8, n_high=24)(history.view(range(PROMPTS)), PROMPTS * MEAN)
        return float(n[dead].sum() / n.sum() / dead.mean())

    assert share(right) < 0.7
    assert 0.9 < share(scrambled) < 1.1
