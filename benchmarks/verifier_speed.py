"""Answers verified per second, by what the verifier has to do for them.

    python benchmarks/verifier_speed.py [--workers 1]

Exit code 1: a verdict is wrong, integers are not ten times faster than what math-verify compares, or reading a
response takes more than three times as long when it is twice as long.
"""

from __future__ import annotations

import argparse
import time

from benchmark.verdict import Verdict
from benchmark.verifier import Verifier, last_boxed


def rate(verifier: Verifier, pairs: list[tuple[str, str]], expected: Verdict, repeats: int) -> float:
    """Best of `repeats` answers per second; every verdict is checked, and nothing is remembered between repeats."""
    best = 0.0
    for _ in range(repeats):
        verifier._known.clear()
        begin = time.perf_counter()
        verdicts = verifier.verify(pairs)
        best = max(best, len(pairs) / (time.perf_counter() - begin))
        if set(verdicts) != {expected}:
            raise SystemExit(f"unexpected verdicts: {set(verdicts)}")
    return best


def growth() -> float:
    """The largest factor by which twice as long a response without an answer takes longer to read; 2 is linear."""
    found = 0.0
    for piece in ("\\boxed", "\\boxed{", "\\boxed{1} ", "{", "\\", " "):
        taken = []
        for length in (1_000_000, 2_000_000):
            text = "\\boxed" + piece * (length // len(piece)) + "\\boxed{"
            begin = time.process_time()
            for _ in range(5):
                last_boxed(text)
            taken.append(time.process_time() - begin)
        found = max(found, taken[1] / max(taken[0], 1e-3))
    return found


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1)
    workers = parser.parse_args().workers
    integers = [(str(value), f"1+2=3 so \\boxed{{{value}}}") for value in range(10_000)]
    fractions = [(f"{value}/7", f"so \\boxed{{\\frac{{{2 * value}}}{{14}}}}") for value in range(1, 1001) if value % 7]
    algebra = [(f"x^2+{2 * a}x+{a * a}", f"so \\boxed{{(x+{a})^2}}") for a in range(2, 202)]
    print(f"| answers | path | per second, {workers} worker{'s' * (workers > 1)} |")
    print("| :-- | :-- | --: |")
    rates = {}
    with Verifier(workers=workers, timeout_s=10.0) as verifier:
        verifier.verify([("1/2", "\\boxed{0.5}"), ("1/3", "\\boxed{2/6}")])  # children are up before the clock runs
        for name, path, pairs, repeats in (
            ("integers", "exact", integers, 5),
            ("fractions", "math-verify", fractions, 3),
            ("quadratics to factor", "math-verify", algebra, 3),
        ):
            rates[name] = rate(verifier, pairs, Verdict.CORRECT, repeats)
            print(f"| {name} | {path} | {rates[name]:,.0f} |")
        again = verifier.verify
        again(fractions)
        begin = time.perf_counter()
        again(fractions)
        print(f"| fractions seen before | remembered | {len(fractions) / (time.perf_counter() - begin):,.0f} |")
    if rates["integers"] < 10 * rates["fractions"]:
        raise SystemExit("integers are not ten times faster than what math-verify compares")
    if (factor := growth()) > 3:
        raise SystemExit(f"reading takes {factor:.1f} times as long for twice the length")


if __name__ == "__main__":
    main()
