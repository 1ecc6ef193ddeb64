"""How numbers look in tables and figures: percentage points, compact amounts, p-values."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
MISSING = "\N{EM DASH}"
_PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

CURRENCY_NAMES = {
    "rollouts": "rollouts",
    "prompt_tokens": "prompt tokens",
    "tokens_generated": "generated tokens",
    "tokens_scored": "scored tokens",
    "tokens_backpropagated": "back-propagated tokens",
    "flops": "FLOPs",
    "device_seconds": "device seconds",
    "verifier_seconds": "verifier seconds",
}


def currency_name(currency: str) -> str:
    """A currency in words."""
    return CURRENCY_NAMES.get(currency, currency.replace("_", " "))


def metric_name(metric: str) -> str:
    """``pass_at_8`` as people write it: ``pass@8``."""
    return metric.replace("_at_", "@")


def amount(value: float, digits: int = 3) -> str:
    """A count with `digits` significant digits and an SI prefix: 600k, 1.25M, 3.1T; seconds too."""
    if not math.isfinite(value):
        return MISSING
    for size, prefix in _PREFIXES:
        # Rounded first, so that 999,999 is 1M and not 1000k.
        if abs(float(f"{value:.{digits}g}")) >= size:
            return f"{_plain(value / size, digits)}{prefix}".replace("-", MINUS)
    return _plain(value, digits).replace("-", MINUS)


def _plain(value: float, digits: int) -> str:
    text = f"{float(f'{value:.{digits}g}'):.{digits}f}"
    return text.rstrip("0").rstrip(".")


def exact(value: float) -> str:
    """A whole number in full, with thousands separators."""
    return MISSING if not math.isfinite(value) else f"{round(value):,}".replace("-", MINUS)


def counted(count: int, one: str, many: str = "") -> str:
    """A number of things: 1 seed, 5 seeds, 1,209 prompts; `many` where the plural is not `one` with an s."""
    return f"{exact(count)} {one if count == 1 else many or f'{one}s'}"


def points(value: float, *, digits: int = 1, sign: bool = False) -> str:
    """A fraction in percentage points: 0.614 is 61.4; never -0.0."""
    if not math.isfinite(value):
        return MISSING
    rounded = round(100 * value, digits) + 0.0
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}".replace("-", MINUS)


def interval(low: float, high: float, *, digits: int = 1, sign: bool = True) -> str:
    """An interval in percentage points: [-0.3, +2.1]."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return MISSING
    return f"[{points(low, digits=digits, sign=sign)}, {points(high, digits=digits, sign=sign)}]"


def plus_minus(mean: float, low: float, high: float, *, digits: int = 1) -> str:
    """A value in percentage points and half the width of its interval."""
    if not math.isfinite(mean):
        return MISSING
    if not (math.isfinite(low) and math.isfinite(high)):
        return points(mean, digits=digits)
    return f"{points(mean, digits=digits)} ± {points((high - low) / 2, digits=digits)}"


def p_value(p: float) -> str:
    """A p-value: two significant digits below 0.1, never 0."""
    if not math.isfinite(p):
        return MISSING
    if p < 0.001:
        return "<0.001"
    return f"{p:.2f}" if p >= 0.0995 else f"{p:.3f}"
