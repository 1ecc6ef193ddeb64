"""The measured gradient variance of allocators as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.formatting import MISSING
from analysis.tables import Column, Table, Text

_KEYS = ("allocator", "advantage", "ratio", "low", "high")


def variance_table(record: Mapping[str, Any]) -> Table:
    """Ratio of every allocator's gradient variance to uniform's, one row an allocator and advantage.

    Args:
        record: ``gradient_variance.json``: checkpoint, and rows of allocator, advantage, ratio, low, high.
    """
    data = pd.DataFrame([{key: row.get(key) for key in _KEYS} for row in record["rows"]], columns=list(_KEYS))
    numbers = data[["ratio", "low", "high"]].astype(float)
    rows = [
        [Text(str(allocator).replace("_", " ")), Text(str(advantage)), *map(Text, _ratio(*values))]
        for allocator, advantage, values in zip(
            data["allocator"], data["advantage"], numbers.itertuples(index=False), strict=True
        )
    ]
    columns = [Column("allocation", left=True), Column("advantage", left=True)]
    checkpoint = str(record.get("checkpoint", "one checkpoint"))
    notes = [
        f"Trace of the covariance of the whole gradient estimate at equal draws, relative to uniform allocation, "
        f"95 % interval; measured on {checkpoint}. Below 1 is better."
    ]
    return Table(
        "gradient_variance",
        "Gradient variance of allocations",
        [*columns, Column("ratio to uniform"), Column("95 % interval")],
        rows,
        data,
        notes,
    )


def _ratio(ratio: float, low: float, high: float) -> tuple[str, str]:
    known = math.isfinite(low) and math.isfinite(high)
    return f"{ratio:.3f}", f"[{low:.3f}, {high:.3f}]" if known else MISSING
