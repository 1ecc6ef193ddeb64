"""Imperfect worked solutions of generated problems: what the small policy is warmed up on.

Three styles: the answer alone, the running results, and every step written out. Each step is wrong with a given
probability and the error is carried forward, so that the warmed-up policy makes plausible mistakes and RL has
something to correct.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

STYLES = ("direct", "partial", "full")
FULL_LIMIT = 40  # characters of steps beyond which a full solution is given as running results


@dataclass
class _Writer:
    """Collects the steps of one solution; slips change one digit of a result."""

    rng: np.random.Generator
    error_rate: float
    full: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)

    def step(self, left: str, value: int) -> int:
        if self.rng.random() < self.error_rate:
            value += int(self.rng.choice([-10, -2, -1, 1, 2, 10]))
        self.full.append(f"{left}={value}")
        self.partial.append(str(value))
        return value


def _sum(expression: str, write: _Writer) -> int:
    terms = re.findall(r"[+-]?\d+", expression)
    total = int(terms[0])
    for term in terms[1:]:
        total = write.step(f"{total}{term}", total + int(term))
    return total


def _product(expression: str, write: _Writer) -> int:
    factors = [int(factor) for factor in expression.split("*")]
    total = factors[0]
    for factor in factors[1:]:
        if total >= 10 and factor >= 10:
            tens, ones = factor // 10 * 10, factor % 10
            high = write.step(f"{total}*{tens}", total * tens)
            low = write.step(f"{total}*{ones}", total * ones)
            total = write.step(f"{high}+{low}", high + low)
        else:
            total = write.step(f"{total}*{factor}", total * factor)
    return total


def linear_sides(equation: str) -> tuple[int, int, int]:
    """(k, b, c) of an equation k*x + b = c whose left side is a sum of products."""
    left, right = equation.split("=")
    coefficient = constant = 0
    for sign, term in re.findall(r"([+-]?)([^+-]+)", left):
        factors = term.split("*")
        value = -1 if sign == "-" else 1
        for factor in factors:
            value *= 1 if factor == "x" else int(factor)
        if "x" in factors:
            coefficient += value
        else:
            constant += value
    return coefficient, constant, int(right)


def _equation(equation: str, write: _Writer) -> int:
    k, b, c = linear_sides(equation)
    if b:
        c = write.step(f"{k}*x", c - b)
    return write.step("x", round(c / k))


FAMILIES: Mapping[str, Callable[[str, _Writer], int]] = {
    "chain_sum": _sum,
    "products": _product,
    "equations": _equation,
}


def worked_solution(family: str, prompt: str, style: str, rng: np.random.Generator, error_rate: float = 0.14) -> str:
    """A solution text that ends in a boxed answer; `style` is direct, partial or full."""
    body = prompt.split(" ", 1)[1].rstrip(".")
    write = _Writer(rng, error_rate)
    answer = FAMILIES[family](body, write)
    steps = write.full if style == "full" and sum(map(len, write.full)) <= FULL_LIMIT else write.partial
    text = "" if style == "direct" else ";".join(steps) + ";"
    return f"{text}\\boxed{{{answer}}}"
