"""The rollouts that a page lets people look at, token by token, from the runs' ``traces.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2.utils import htmlsafe_json_dumps

from analysis.palette import styles
from analysis.results import Study
from benchmark.jsonl import read_rows

LIMIT = 2_500_000
"""Most characters of JSON in a page; beyond, every problem shows fewer rollouts."""
MOST_ROLLOUTS = (8, 4, 2, 1)


def trace_data(study: Study, limit: int = LIMIT) -> dict[str, Any] | None:
    """Traces of one run of every arm, of the smallest seed that all or else that arm has them for.

    Args:
        limit: characters of JSON. Rollouts are left out evenly until they fit; then later problems of a run are.

    Returns:
        ``{"rollouts": most shown of a problem, "runs": [{"arm", "seed", "colour", "rows"}]}``; None without traces.
    """
    found: dict[str, dict[int, list[dict[str, Any]]]] = {arm: {} for arm in study.arms}
    for cell in study.done.to_dict("records"):
        rows = read_rows(study.folder / str(cell["dir"]) / "traces.jsonl")[0]
        if rows:
            found[str(cell["arm"])][int(cell["seed"])] = rows
    kept = {arm: seeds for arm, seeds in found.items() if seeds}
    if not kept:
        return None
    shared = set.intersection(*(set(seeds) for seeds in kept.values()))
    chosen = {arm: min(shared or set(seeds)) for arm, seeds in kept.items()}
    looks = styles(list(study.plan["arms"]))
    totals = _totals(study)
    for most, problems in ((n, p) for p in (None, 4, 2, 1) for n in MOST_ROLLOUTS):
        runs = [
            {
                "arm": arm,
                "seed": seed,
                "colour": looks[arm].colour.lower(),
                "rows": [_cut(row, most, totals.get(arm, {})) for row in _first(kept[arm][seed], problems)],
            }
            for arm, seed in chosen.items()
        ]
        data = {"rollouts": most, "runs": runs}
        if len(htmlsafe_json_dumps(data, separators=(",", ":"))) <= limit:
            return data
    return None


def _first(rows: list[dict[str, Any]], problems: int | None) -> list[dict[str, Any]]:
    """The first problems of every moment of a run."""
    seen: dict[tuple[str, int], int] = {}
    kept = []
    for row in rows:
        moment = str(row["phase"]), int(row["step"])
        seen[moment] = seen.get(moment, 0) + 1
        kept += [row] if problems is None or seen[moment] <= problems else []
    return kept


def _cut(row: Mapping[str, Any], most: int, totals: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """A row with fewer rollouts; an evaluated problem with its counts over all seeds."""
    n, c = totals.get(str(row["item"]), (0, 0)) if row["phase"] == "evaluation" else (0, 0)
    return {**row, "rollouts": row["rollouts"][:most], "all_n": n, "all_c": c}


def _totals(study: Study) -> dict[str, dict[str, tuple[int, int]]]:
    """Samples and correct ones in the final evaluations, over seeds, by arm and problem."""
    final = study.points.loc[study.points["final"], ["arm", "seed", "point"]]
    counts = study.evaluations.merge(final, on=["arm", "seed", "point"]).groupby(["arm", "item"])[["n", "c"]].sum()
    totals: dict[str, dict[str, tuple[int, int]]] = {}
    for row in counts.reset_index().to_dict("records"):
        totals.setdefault(str(row["arm"]), {})[str(row["item"])] = int(row["n"]), int(row["c"])
    return totals
