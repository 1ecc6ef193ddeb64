"""Accuracy by how often a problem was solved before training: what lifts hard problems, what polishes easy ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.comparisons import Scores
from analysis.formatting import counted, interval, points
from analysis.resampling import bootstrap_for
from analysis.statistics import Estimate, Floats
from analysis.tables import Column, Table, Text

UPPER_ENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the bins of success before training; the first holds problems that were never solved."""


def difficulty_bins(scores: Scores) -> tuple[NDArray[np.int64], Floats]:
    """Bin of every problem, (I,), by its success before training pooled over seeds, and that success, (I,).

    Arms share weights and streams before training, so the bins are the same for all of them.
    """
    arm = scores.study.reference if scores.study.reference in scores.study.arms else scores.study.arms[0]
    before = np.mean([scores.curve(arm, seed, "pass_at_1")[0] for seed in scores.seeds(arm)], axis=0)
    bins = np.searchsorted(np.array(UPPER_ENDS), np.asarray(before), side="left").astype(np.int64)
    return np.asarray(bins), np.asarray(before, dtype=np.float64)


@dataclass(frozen=True)
class InBin:
    """Final pass@1 on the problems of a bin, of the reference, or of another arm minus the reference."""

    arm: str
    bin: int
    problems: int
    found: Estimate

    @property
    def name(self) -> str:
        """The bin's range of success before training, in percent."""
        if self.bin == 0:
            return "0"
        return f"{100 * UPPER_ENDS[self.bin - 1]:g}\N{EN DASH}{100 * UPPER_ENDS[self.bin]:g}"

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0; not corrected for the number of cells."""
        return bool(self.found.low > 0 or self.found.high < 0)


def by_difficulty(scores: Scores) -> Iterator[InBin]:
    """The reference and then every arm that shares a seed with it, each in all bins that hold problems."""
    study = scores.study
    bins, _ = difficulty_bins(scores)
    others = [arm for arm in study.arms if arm != study.reference and scores.seeds(arm, study.reference)]
    for arm in (study.reference, *others):
        own = arm == study.reference
        values = scores.final(arm, "pass_at_1") if own else scores.paired((arm, study.reference), "pass_at_1")
        for number in sorted(set(bins.tolist())):
            places = np.flatnonzero(bins == number)
            found = bootstrap_for(len(values), ("bin",) * len(places)).estimate(values[:, places])
            yield InBin(arm, number, len(places), found)


def difficulty_table(scores: Scores) -> Table:
    """The reference's pass@1 by bin, and every other arm's paired difference to it."""
    study = scores.study
    cells = list(by_difficulty(scores))
    heads = [cell for cell in cells if cell.arm == study.reference]
    rows: dict[str, list[Text]] = {}
    for cell in cells:
        mean, low, high = (float(x) for x in (cell.found.mean, cell.found.low, cell.found.high))
        level = f"{points(mean)} %"
        told = f"{points(mean, sign=True)} {interval(low, high)}"
        own = cell.arm == study.reference
        rows.setdefault(cell.arm, [Text(cell.arm)]).append(Text(level if own else told))
    data = [[c.arm, c.name, c.problems, *(float(x) for x in (c.found.mean, c.found.low, c.found.high))] for c in cells]
    notes = [
        f"Bins of problems by their success before training, in percent, pooled over seeds; {study.reference}: pass@1; "
        "others: paired difference to it in points with its two-level 95 % interval, not corrected for the number of "
        "cells: a description, no test.",
    ]
    return Table(
        "difficulty",
        "Final pass@1 by success before training",
        [
            Column("arm", left=True),
            *(Column(f"{head.name} % ({counted(head.problems, 'problem')})") for head in heads),
        ],
        list(rows.values()),
        pd.DataFrame(data, columns=["arm", "success_before", "problems", "mean", "low", "high"]),
        notes,
    )
