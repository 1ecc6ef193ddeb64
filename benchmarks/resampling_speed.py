"""How much faster the tests of a report are than one label swap after the other.

    python benchmarks/resampling_speed.py

A study of 14 arms, 5 seeds and 192 problems in 3 families, on one core: all label swaps of `swap_tests` at once beside
`spread` on every swapped matrix. Exit code 1: it is not at least ten times faster, or the p-values differ.
"""

from __future__ import annotations

import time

import numpy as np

from analysis.resampling import TwoLevelBootstrap, spread, swap_tests
from analysis.statistics import RESAMPLES, Floats

FAMILIES = ["a"] * 64 + ["b"] * 64 + ["c"] * 64
SWAPS = 100  # of the slow way, which is priced by them
AT_LEAST = 10


def one_by_one(values: Floats, swaps: int) -> Floats:
    """(K,) p-values of the average over families, from as many swaps as `swap_tests` would make of this number."""
    rng = np.random.default_rng([0, *values.shape[1:]])
    cells = values[0].size
    bits = np.unpackbits(rng.integers(0, 256, size=(swaps, (cells + 7) // 8), dtype=np.uint8), axis=1)
    signs = bits[:, :cells].reshape(swaps, *values.shape[1:]) * 2.0 - 1.0
    signs[0] = 1.0
    swapped = [[abs(d.mean()) / spread(d, FAMILIES).error for d in values * sign] for sign in signs]
    statistic = np.array(swapped)
    return np.asarray((statistic >= statistic[0] * (1 - 1e-9)).mean(axis=0), dtype=np.float64)


def main() -> None:
    """Print the table."""
    values = np.random.default_rng(8).standard_normal((13, 5, len(FAMILIES)))
    begin = time.process_time()
    swap_tests(values, FAMILIES)
    fast = time.process_time() - begin
    begin = time.process_time()
    bootstrap = TwoLevelBootstrap(values.shape[1], FAMILIES)
    for matrix in values:
        bootstrap.estimate(matrix)
    intervals = time.process_time() - begin
    begin = time.process_time()
    slow_p = one_by_one(values, SWAPS)
    slow = (time.process_time() - begin) * RESAMPLES / SWAPS
    print("| 13 comparisons, 5 seeds, 192 problems | CPU s |\n| :-- | --: |")
    print(f"| {RESAMPLES:,} label swaps, `swap_tests` | {fast:.2f} |")
    print(f"| the same one by one (priced by {SWAPS}) | {slow:.1f} |")
    print(f"| {RESAMPLES:,} resamples of each, `TwoLevelBootstrap` | {intervals:.2f} |")
    if not np.array_equal(slow_p, swap_tests(values, FAMILIES, resamples=SWAPS)[:, 0]):
        raise SystemExit("the p-values differ")
    if slow < AT_LEAST * fast:
        raise SystemExit(f"only {slow / fast:.1f} times faster, {AT_LEAST} were asked for")


if __name__ == "__main__":
    main()
