"""How the cost of an allocation grows with the number of prompts, beside the released code's rule.

    python benchmarks/allocation_speed.py

Prints seconds on one core (median of five), for 8 rollouts a prompt on average; a history of 16 rollouts a prompt
drawn from Beta(1/2, 1/2) success rates. Growth is the factor from the row above: 10 is linear.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from benchmark.history import HistoryView
from methods.allocation import min_variance_allocation
from methods.neyman import expected_deviation
from methods.objectives import allocate
from methods.released_allocation import ReleasedAllocation

DYNAMIC = 10_000  # prompts beyond which dynamic programming, whose cost is prompts x budget, is not run


def history(prompts: int) -> HistoryView:
    """Counts of 16 earlier rollouts of each prompt."""
    rng = np.random.default_rng(0)
    trials = np.full(prompts, 16.0)
    successes = rng.binomial(16, rng.beta(0.5, 0.5, prompts)).astype(np.float64)
    ones, sixteen = np.ones(prompts, dtype=np.int64), trials.astype(np.int64)
    return HistoryView(successes, trials, ones, successes.astype(np.int64), sixteen)


def seconds(call: Callable[[], object]) -> float:
    """Median of five calls, after one that is not counted; one call where it takes longer than five seconds."""
    taken = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
        if taken[0] > 5:
            return taken[0]
    return median(taken[1:])


def rules(prompts: int) -> dict[str, Callable[[], object] | None]:
    """Every rule, ready to be called on the same history."""
    seen, budget = history(prompts), 8 * prompts
    a, b = seen.posterior((1.0, 1.0))
    p, s = a / (a + b), expected_deviation(a, b)
    dynamic = prompts <= DYNAMIC and prompts * budget <= 1e8
    return {
        "minimum variance, 4 to 12": lambda: min_variance_allocation(s, budget, 4, 12),
        "minimum variance, 0 to 128": lambda: min_variance_allocation(s, budget, 0, 128),
        "leave-one-out, 4 to 12": lambda: allocate("rloo", p, s, budget, 4, 12),
        "non-degenerate, 4 to 12": lambda: allocate("non_degenerate", p, s, budget, 4, 12),
        "knapsack (exact), 4 to 12": (lambda: allocate("knapsack", p, s, budget, 4, 12)) if dynamic else None,
        "released rule, 4 to 12": lambda: ReleasedAllocation()(seen, budget),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--largest", type=int, default=1_000_000, help="prompts of the last row")
    largest = parser.parse_args().largest
    names, before = list(rules(8)), dict[str, float]()
    print("| prompts | " + " | ".join(names) + " |")
    print("|--:|" + "--:|" * len(names))
    prompts = 1_000
    while prompts <= largest:
        cells = []
        for name, call in rules(prompts).items():
            if call is None:
                cells.append("")
                continue
            taken = seconds(call)
            growth = f" (x {taken / before[name]:.1f})" if name in before else ""
            before[name] = taken
            cells.append(f"{taken:.2g} s{growth}")
        print(f"| {prompts:,} | " + " | ".join(cells) + " |", flush=True)
        prompts *= 10


if __name__ == "__main__":
    main()
