"""Recorded success counts of a run: how many rollouts of every prompt were right at each of its visits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST = 1_000_000
"""Rollouts of a visit beyond which a count is taken for a slip."""
FORMAT = 'A line is {"id": "prompt 7", "n_rollouts": 8, "correct": [0, 3, 5]}: docs/replay.md'


@dataclass(frozen=True)
class CountLog:
    """P prompts with up to T visits each, in order; a prompt's visits are the first ones of its row.

    Attributes:
        ids: of the prompts. correct, trials: (P, T) right rollouts and rollouts of every visit; 0 trials is no visit.
    """

    ids: tuple[str, ...]
    correct: Ints
    trials: Ints

    @property
    def seen(self) -> NDArray[np.bool_]:
        """(P, T) whether there was such a visit."""
        return self.trials > 0

    @property
    def rate(self) -> Floats:
        """(P, T) success rate of a visit; 0 without one."""
        result: Floats = self.correct / np.maximum(self.trials, 1)
        return result

    @property
    def outcome_variance(self) -> Floats:
        """(P, T) unbiased estimate c (n - c) / (n (n - 1)) of p (1 - p) from a visit alone; needs n >= 2."""
        n = np.maximum(self.trials, 2)
        result: Floats = self.correct * (self.trials - self.correct) / (n * (n - 1))
        return result


def load_counts(path: Path) -> CountLog:
    """Read a JSONL file of counts.

    Args:
        path: lines of ``id``, ``correct`` (a list, one entry a visit) and ``n_rollouts`` (one number, or a list).

    Raises:
        InputError: no such file, a line that is not such an object, counts outside 0..n, an id that comes twice, a
            visit of fewer than 2 rollouts, or fewer than 2 prompts with a second visit.
    """
    if not path.is_file():
        raise InputError("no such file", file=path, remedy="Name a JSONL file of success counts")
    rows: dict[str, tuple[list[int], list[int]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 ({error.reason})", file=path, remedy="Save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, correct, trials = _row(line, path, number)
        if name in rows:
            raise InputError("the id comes twice", file=path, line=number, key="id", value=name, remedy=FORMAT)
        rows[name] = correct, trials
    if sum(len(correct) > 1 for correct, _ in rows.values()) < 2:
        raise InputError(
            "fewer than 2 prompts have a second visit",
            file=path,
            remedy="Record at least two visits: the first is what a rule learns from",
        )
    width = max(len(correct) for correct, _ in rows.values())
    padded = [[column + [0] * (width - len(column)) for column in row] for row in rows.values()]
    values = np.array(padded, dtype=np.int64)
    return CountLog(tuple(rows), values[:, 0], values[:, 1])


def _row(line: str, path: Path, number: int) -> tuple[str, list[int], list[int]]:
    def bad(what: str, key: str | None = None, value: object = None) -> InputError:
        return InputError(what, file=path, line=number, key=key, value=value, remedy=FORMAT)

    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise bad("not JSON") from None
    if not isinstance(row, dict):
        raise bad("not a JSON object")
    for key in ("id", "n_rollouts", "correct"):
        if key not in row:
            raise bad("is missing", key)
    correct, trials = row["correct"], row["n_rollouts"]
    if not isinstance(correct, list):
        raise bad("is not a list of one count a visit", "correct", correct)
    trials = trials if isinstance(trials, list) else [trials] * len(correct)
    if len(trials) != len(correct):
        raise bad(f"has {len(trials)} entries for {len(correct)} visits", "n_rollouts")
    for c, n in zip(correct, trials, strict=True):
        if type(n) is not int or not 2 <= n <= MOST:
            raise bad(f"is not a whole number of at least 2 rollouts, at most {MOST}", "n_rollouts", n)
        if type(c) is not int or not 0 <= c <= n:
            raise bad(f"is not a whole number from 0 to {n}", "correct", c)
    return str(row["id"]), correct, trials
