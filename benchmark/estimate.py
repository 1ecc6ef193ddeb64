"""What a study would cost and could detect, before it runs.

Costs are prices per unit of budget, from finished cells or from a probe, times what is left to run.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.cells import Cell
from benchmark.config import RunConfig
from benchmark.jsonl import read_rows

Prices = Mapping[str, float]
"""Units of each currency, ``wall_seconds`` and ``disk_bytes`` per unit of the budget's currency."""

ASSUMED_SD = 0.015
"""Standard deviation over seeds of a paired difference in pass@1, as seen at the small scale."""


@dataclass(frozen=True)
class Estimate:
    """Amounts for the whole study and for its missing cells; what nothing is known about is absent.

    Attributes:
        total, missing: amount by currency; ``wall_seconds`` is worker time, not yet divided by workers.
        cells, missing_cells: how many cells there are, and how many have no result.
        source: where the prices come from, in words.
    """

    total: Mapping[str, float]
    missing: Mapping[str, float]
    cells: int
    missing_cells: int
    source: str


def estimate(
    cells: Sequence[Cell], probe: Callable[[RunConfig], Prices] | None = None, how: str = "measured now"
) -> Estimate:
    """Price `cells`: an arm by its own finished cells, else by all finished ones, else by `probe`; `how` it does so."""
    by_arm: dict[str, list[Prices]] = defaultdict(list)
    missing = []
    for cell in cells:
        result = cell.result()
        if result is None:
            missing.append(cell)
        else:
            by_arm[cell.config.plan_hash].append(prices_of(cell, result))
    known = [prices for group in by_arm.values() for prices in group]
    if known:
        source = f"unit prices measured in {len(known)} finished cells"
    elif probe is not None and cells:
        known, source = [probe(cells[0].config)], f"unit prices {how} with {cells[0].config.arm}"
    else:
        source = "no unit prices yet: run one cell to know the rest"

    def add_up(some: Sequence[Cell]) -> dict[str, float]:
        amounts: dict[str, float] = defaultdict(float)
        for cell in some:
            budget = cell.config.budget
            prices = _mean(by_arm.get(cell.config.plan_hash) or known)
            for currency, price in {**prices, budget.currency: 1.0}.items():
                amounts[currency] += price * budget.amount
        return dict(amounts)

    return Estimate(add_up(cells), add_up(missing), len(cells), len(missing), source)


def detectable_difference(seeds: int, sd: float, level: float = 0.05, power: float = 0.8) -> float:
    """Smallest true mean difference that a two-sided paired t-test over `seeds` pairs finds with `power`.

    ``(t_{1 - level/2} + t_{power}) sd / sqrt(seeds)``, seeds - 1 degrees of freedom; inf for one seed.
    """
    from scipy.stats import t

    if seeds < 2:
        return math.inf
    quantiles = t.ppf(1 - level / 2, seeds - 1) + t.ppf(power, seeds - 1)
    return float(quantiles * sd / math.sqrt(seeds))


def paired_sd(cells: Sequence[Cell], reference: str) -> float | None:
    """Pooled sd over seeds of final pass@1 minus the reference's; None if no arm has two finished pairs."""
    final: dict[str, dict[int, float]] = defaultdict(dict)
    for cell in cells:
        if cell.result() is not None:
            rows, _ = read_rows(cell.folder / "evaluation.jsonl")
            rates = [row["c"] / row["n"] for row in rows if row["final"]]
            if rates:
                final[cell.config.arm][cell.config.seed] = statistics.fmean(rates)
    base, squares, freedom = final.pop(reference, {}), 0.0, 0
    for scores in final.values():
        differences = [scores[seed] - base[seed] for seed in scores if seed in base]
        if len(differences) >= 2:
            squares += statistics.variance(differences) * (len(differences) - 1)
            freedom += len(differences) - 1
    return math.sqrt(squares / freedom) if freedom else None


def prices_of(cell: Cell, result: Mapping[str, Any]) -> Prices:
    """Unit prices of a finished cell."""
    amount = cell.config.budget.amount
    spent = {currency: float(value) / amount for currency, value in result["spent"].items()}
    size = sum(path.stat().st_size for path in cell.folder.rglob("*") if path.is_file())
    return {**spent, "wall_seconds": result["wall_seconds"] / amount, "disk_bytes": size / amount}


def _mean(prices: Sequence[Prices]) -> Prices:
    if not prices:
        return {}
    shared = set(prices[0]).intersection(*prices[1:])
    return {name: statistics.fmean(price[name] for price in prices) for name in sorted(shared)}
