"""Reports made again from what is recorded, whatever kind of results a folder holds."""

from __future__ import annotations

from pathlib import Path

from analysis.experiment import SETTINGS as EXPERIMENT
from analysis.experiment import rebuild_experiment
from analysis.report import write_report
from analysis.sweep_report import write_sweep_report
from analysis.variance_report import rebuild_variance_report
from analysis.variance_study import SETTINGS as VARIANCE
from benchmark.sweep import SWEEP

WITHOUT_PLAN = (VARIANCE, EXPERIMENT)
"""Files whose folder has a report but no ``plan.json``."""


def rebuild(folder: Path, readme: Path | None = None, out: Path | None = None) -> Path:
    """REPORT.md, tables and figures of a study, a sweep, measured variances or an experiment.

    Args:
        readme: a README whose marked parts are to show the same results (studies only).
        out: another folder for the report; `folder` then stays as it is.

    Returns:
        The path of REPORT.md.

    Raises:
        InputError: the folder holds nothing to report, or a record is damaged.
    """
    if (folder / SWEEP).exists():
        write_sweep_report(folder, out=out)
        return (out or folder) / "REPORT.md"
    if (folder / VARIANCE).exists():
        return rebuild_variance_report(folder, out)
    if (folder / EXPERIMENT).exists():
        return rebuild_experiment(folder, out)
    return write_report(folder, readme, out)
