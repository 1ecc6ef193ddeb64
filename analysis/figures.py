"""Every figure of a study, with the sentence that says how to read it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.captions import paper_captions, study_captions
from analysis.comparisons import Scores
from analysis.plotting import COLUMNS, PAPER_HEIGHT, save, theme
from benchmark.jsonl import atomic_write_text

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


@dataclass(frozen=True)
class Plan:
    """How to draw a figure, which is None where there is no data for it, and its caption."""

    draw: Callable[[], Figure | None]
    caption: str

    def __call__(self) -> Figure | None:
        """Draw it."""
        return self.draw()


Plans = Mapping[str, Plan]
"""Figures by name."""


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
    written = []
    with theme():
        for name in ORDER:
            figure = draw[name]()
            if figure is None:
                for stale in folder.glob(f"{name}.*"):
                    stale.unlink()
                continue
            save(figure, folder, name)
            written.append(Drawn(name, draw[name].caption))
    return written


def report_figures(scores: Scores, variance: Mapping[str, Any] | None = None) -> Plans:
    """The figures of a report, in `ORDER`."""
    from analysis import figures_curves as curves
    from analysis import figures_forest as forests
    from analysis import figures_paper as paper

    draw: dict[str, Callable[[], Figure | None]] = {
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
    captions = study_captions(scores)
    return {name: Plan(draw[name], captions[name]) for name in ORDER}


def paper_figures(scores: Scores, variance: Mapping[str, Any] | None = None) -> Plans:
    """The figures of a report, and those that papers add."""
    from analysis import figures_histograms as histograms
    from analysis import figures_paper as paper

    added: dict[str, Callable[[], Figure | None]] = {
        "difficulty": lambda: paper.difficulty(scores),
        "step_histograms": lambda: histograms.step_histograms(scores),
        "token_entropy": lambda: histograms.token_entropy(scores),
        "token_ratio": lambda: histograms.token_ratio(scores),
    }
    draw = {**{name: plan.draw for name, plan in report_figures(scores, variance).items()}, **added}
    return {name: Plan(draw[name], caption) for name, caption in paper_captions(scores).items()}


def write_paper_figures(plans: Plans, folder: Path, prefix: str, wide: Collection[str] = ()) -> list[Path]:
    """Write ``<prefix>_<name>_<column>.{svg,pdf,png}`` at the widths of one and of two columns of a paper.

    What would be higher than a page is written in parts, ``<prefix>_<name>_<column>_<part>``. Beside every figure or
    part stands its caption, ``.caption.txt``.

    Args:
        wide: names of figures that need two columns.

    Returns:
        The PNG files of two columns' width, for a notebook to show.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown: list[Path] = []
    for column, width in COLUMNS.items():
        for name, plan in plans.items():
            if column == "single" and name in wide:
                continue
            stem = f"{prefix}_{name}_{column}"
            for stale in (*folder.glob(f"{stem}.*"), *folder.glob(f"{stem}_[0-9]*")):
                stale.unlink()
            written = _write_parts(plan, width, folder, stem)
            shown += [folder / f"{part}.png" for part in written] if column == "double" else []
    return shown


def _write_parts(plan: Plan, width: float, folder: Path, stem: str) -> list[str]:
    """Draw and save every part of a figure with its caption; returns the names."""
    names: list[str] = []
    part, parts = 0, 1
    while part < parts:
        with theme(width, PAPER_HEIGHT, part) as sheet:
            figure = plan()
            if figure is None:
                break
            parts = sheet.parts
            names.append(stem if parts == 1 else f"{stem}_{part + 1}")
            save(figure, folder, names[-1])
        part += 1
        told = "" if parts == 1 else f" Part {part} of {parts}."
        atomic_write_text(folder / f"{names[-1]}.caption.txt", f"{plan.caption}{told}\n")
    return names
