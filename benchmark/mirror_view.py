"""The view of an experiment in MLflow's interface that compares methods at equal cost.

MLflow keeps named views of an experiment's runs in its tags; a link names one. The state in it is that of the
interface (``ExperimentPageUIState`` and the search facets), which MLflow 3.17 completes with its own defaults.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

VIEW = "rolloutbench"
NAME = "Methods at equal cost"
TAG = f"mlflow.sharedViewState.{VIEW}"
_SECTION = "rolloutbench-methods"
_CHARTS = ("average_pass_at_1", "accuracy_per_prompt_mean", "entropy_nats", "tokens_per_rollout_mean")


def view_tags(experiment: str, currency: str, groups: Sequence[str], by: str) -> dict[str, str]:
    """Tags of an experiment that give it the view, and a description that links to it.

    Args:
        experiment: its id. currency: the primary one, which is on the x-axis. groups: of runs, shown closed.
        by: the tag that names a run's group.
    """
    view = {"name": NAME, "createdAt": 0, "state": json.dumps(view_state(currency, groups, by))}
    link = f"[{NAME}]({view_path(experiment)})"
    what = "seeds" if by == "arm" else "settings and seeds"
    note = f"{link}: means over {what} at equal {currency}, the runs grouped by method."
    # The kind keeps the interface from asking for it.
    return {TAG: json.dumps(view), "mlflow.note.content": note, "mlflow.experimentKind": "custom_model_development"}


def view_path(experiment: str) -> str:
    """Where the interface shows the view, relative to its root."""
    return f"#/experiments/{quote(experiment)}/runs?viewStateShareKey={VIEW}&compareRunsMode=CHART"


def view_state(currency: str, groups: Sequence[str], by: str) -> dict[str, Any]:
    """State of the interface: runs grouped by tag `by`, curves over cost, averages over the runs of a group."""
    common = {"deleted": False, "isGenerated": False, "metricSectionId": _SECTION, "runsCountToCompare": 100}
    lines = [
        {
            **common,
            "uuid": f"{VIEW}-{name}",
            "type": "LINE",
            "metricKey": f"curve/{name}",
            "selectedMetricKeys": [f"curve/{name}"],
            "xAxisKey": "step",
            "selectedXAxisMetricKey": "",
            "xAxisScaleType": "linear",
            "scaleType": "linear",
            "lineSmoothness": 0,
            "useGlobalXaxisKey": False,
            "useGlobalLineSmoothing": False,
        }
        for name in _CHARTS
    ]
    final = {
        **common,
        "uuid": f"{VIEW}-final",
        "type": "BAR",
        "metricKey": "eval/average_pass_at_1",
    }
    return {
        "searchFilter": "tags.`rolloutbench.cell` != ''",
        "orderByKey": f"tags.`{by}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": by}]},
        "groupsExpanded": {f"tag.{by}.{group}": False for group in groups},
        "useGroupedValuesInCharts": True,
        "runsHiddenMode": "SHOW_ALL",
        "hideEmptyCharts": True,
        "isAccordionReordered": True,
        "compareRunSections": [
            {
                "uuid": _SECTION,
                "name": f"Step = {currency}",
                "display": True,
                "isReordered": True,
                "deleted": False,
                "isGenerated": False,
                "columns": 2,
            }
        ],
        "compareRunCharts": [*lines, final],
    }
