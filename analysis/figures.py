"""Every figure of a study, with the sentence that says how to read it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.comparisons import Scores
from analysis.formatting import currency_name, metric_name
from analysis.plotting import COLUMNS, CROWDED, PAPER_HEIGHT, save, theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDER = (
    "final_accuracy",
    "differences",
    "probability_of_improvement",
    "learning_curves",
    "pareto",
    "pass_at_k",
    "performance_profiles",
    "entropy_and_gradient_norm",
    "rollouts_per_prompt",
    "spend_by_phase",
    "gradient_variance",
)
"""Names of the figures, in the order in which a report shows them."""


@dataclass(frozen=True)
class Drawn:
    """A written figure: its name (``figures/<name>.{svg,pdf,png}``) and its caption, one sentence."""

    name: str
    caption: str

    def section(self) -> str:
        """The figure in a report, with its caption and links to the vector files."""
        links = ", ".join(f"[{suffix}](figures/{self.name}.{suffix})" for suffix in ("svg", "pdf"))
        return f"![{self.caption}](figures/{self.name}.png)\n\n*{self.caption}* ({links})\n\n"


Plans = Mapping[str, Callable[[], "Figure | None"]]
"""How to draw each figure, by name; a figure there is no data for is None."""


def write_figures(scores: Scores, folder: Path, variance: Mapping[str, Any] | None = None) -> list[Drawn]:
    """Draw what the study has data for, and remove the files of figures that it has none for.

    Args:
        scores: the study's scores. folder: ``results/<study>/figures``, made if missing.
        variance: the content of ``gradient_variance.json``, if there is one.

    Returns:
        The figures that were written, in `ORDER`.
    """
    draw = report_figures(scores, variance)
    folder.mkdir(parents=True, exist_ok=True)
    captions, written = _captions(scores), []
    with theme():
        for name in ORDER:
            figure = draw[name]()
            if figure is None:
                for stale in folder.glob(f"{name}.*"):
                    stale.unlink()
                continue
            save(figure, folder, name)
            written.append(Drawn(name, captions[name]))
    return written


def report_figures(scores: Scores, variance: Mapping[str, Any] | None = None) -> Plans:
    """The figures of a report, in `ORDER`."""
    from analysis import figures_curves as curves
    from analysis import figures_forest as forests
    from analysis import figures_paper as paper

    return {
        "final_accuracy": lambda: forests.final_accuracy(scores),
        "differences": lambda: forests.differences(scores),
        "probability_of_improvement": lambda: paper.improvement(scores),
        "learning_curves": lambda: curves.learning_curves(scores),
        "pareto": lambda: paper.pareto(scores),
        "pass_at_k": lambda: curves.pass_at_k(scores),
        "performance_profiles": lambda: paper.performance_profiles(scores),
        "entropy_and_gradient_norm": lambda: curves.entropy_and_gradient_norm(scores),
        "rollouts_per_prompt": lambda: curves.rollouts_per_prompt(scores),
        "spend_by_phase": lambda: forests.spend_by_phase(scores),
        "gradient_variance": lambda: forests.gradient_variance(variance or {}),
    }


def paper_figures(scores: Scores, variance: Mapping[str, Any] | None = None) -> Plans:
    """The figures of a report, and those that papers add."""
    from analysis import figures_histograms as histograms
    from analysis import figures_paper as paper

    return {
        **report_figures(scores, variance),
        "difficulty": lambda: paper.difficulty(scores),
        "step_histograms": lambda: histograms.step_histograms(scores),
        "token_entropy": lambda: histograms.token_entropy(scores),
        "token_ratio": lambda: histograms.token_ratio(scores),
    }


def write_paper_figures(plans: Plans, folder: Path, prefix: str, wide: Collection[str] = ()) -> list[Path]:
    """Write ``<prefix>_<name>_<column>.{svg,pdf,png}`` at the widths of one and of two columns of a paper.

    What would be higher than a page is written in parts, ``<prefix>_<name>_<column>_<part>``.

    Args:
        wide: names of figures that need two columns.

    Returns:
        The PNG files of two columns' width, for a notebook to show.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown: list[Path] = []
    for column, width in COLUMNS.items():
        for name, draw in plans.items():
            if column == "single" and name in wide:
                continue
            stem = f"{prefix}_{name}_{column}"
            for stale in (*folder.glob(f"{stem}.*"), *folder.glob(f"{stem}_[0-9]*")):
                stale.unlink()
            written = _write_parts(draw, width, folder, stem)
            shown += [folder / f"{part}.png" for part in written] if column == "double" else []
    return shown


def _write_parts(draw: Callable[[], Figure | None], width: float, folder: Path, stem: str) -> list[str]:
    """Draw and save every part of a figure; returns the names."""
    names: list[str] = []
    part, parts = 0, 1
    while part < parts:
        with theme(width, PAPER_HEIGHT, part) as sheet:
            figure = draw()
            if figure is None:
                break
            parts = sheet.parts
            names.append(stem if parts == 1 else f"{stem}_{part + 1}")
            save(figure, folder, names[-1])
        part += 1
    return names


def _captions(scores: Scores) -> dict[str, str]:
    study = scores.study
    metric, cost, reference = metric_name(study.metric), currency_name(study.currency), study.reference
    counts = [len(scores.seeds(arm)) for arm in study.arms]
    over = "over seeds and problems" if max(counts) > 1 else "over problems only, since there is one seed"
    if min(counts) == 1 < max(counts):
        over += " (of an arm with one seed over problems only)"
    spread = "bands are 95 % intervals over seeds" if max(counts) > 2 else "thin lines are single runs"
    if max(counts) == 1:
        spread = "one run an arm"
    own_scale = "numbers in an arm's colour: that panel has a scale of its own"
    return {
        "final_accuracy": f"Final {metric} by arm, mean over task families; 95 % interval {over}; the dashed "
        f"line is {reference}.",
        "differences": f"Paired difference of final {metric} to {reference}, in percentage points; 95 % "
        f"interval {over}; an interval across zero is no finding.",
        "probability_of_improvement": f"Probability that a run of an arm has a higher final {metric} than a run of "
        f"{reference} on a family drawn at random; 95 % interval over seeds; the line at one half is no difference.",
        "learning_curves": f"pass@1 over training spend in {cost}; {spread}; {reference} in grey behind each arm.",
        "pareto": f"Final {metric} over what a run cost in currencies other than the budget's; bars are 95 % intervals "
        "over seeds, the line is the Pareto front.",
        "pass_at_k": f"Final pass@k over the number of tries k, and its difference to {reference}."
        if len(study.arms) <= CROWDED
        else f"Difference of final pass@k to {reference} over the number of tries k; {spread}; {own_scale}.",
        "performance_profiles": "Share of runs and problems whose final pass@1 is at least as high as the value below, "
        f"families weighted equally, and its difference to {reference}."
        if len(study.arms) <= CROWDED
        else "Share of runs and problems whose final pass@1 is at least as high as the value below, families weighted "
        f"equally, minus that of {reference}; {spread}; {own_scale}.",
        "entropy_and_gradient_norm": f"Policy entropy and gradient norm over training spend in {cost}, mean "
        "over seeds, averaged over neighbouring steps"
        + ("." if len(study.arms) <= CROWDED else f"; {reference} in grey behind each arm."),
        "rollouts_per_prompt": "Share of a step's prompts by the number of rollouts they got, over training, "
        "for the arms that allocate; the dashed line is the mean.",
        "spend_by_phase": "Device seconds of a run by phase, mean over seeds; evaluation is not part of the budget.",
        "gradient_variance": "Measured variance of the gradient (trace of its covariance) on one checkpoint "
        "at equal draws, relative to uniform allocation; lower is better.",
    }
