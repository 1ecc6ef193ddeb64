"""The measured part of a README: main table, what it says, how long it took, and the figure beside it.

The README marks what is measured; everything between the marks is written, nothing else is touched:

    <!-- main table -->  ...  <!-- /main table -->
    <!-- time -->  ...  <!-- /time -->
"""

from __future__ import annotations

import math
import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from analysis.claims import Answer
from analysis.comparisons import AVERAGE, Difference, Scores
from analysis.figure_data import dynamic_arms, uneven_share
from analysis.formatting import MISSING, counted, currency_name, exact, interval, metric_name, p_value, points
from analysis.results import Study, read_json
from analysis.statistics import holm
from analysis.summary import listed, standing
from analysis.table_scores import detectable_sentence, is_clear, main_table
from analysis.tables import Column, Table, Text
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_text
from benchmark.progress import duration

MARKS = ("main table", "time")
FIGURE = "final_accuracy.png"
IMAGES = Path("docs") / "images"
WIDTH = 120


def read_marked(readme: Path) -> str:
    """The text of a README that has every mark.

    Raises:
        InputError: no such file, or a mark is missing, repeated or out of order.
    """
    if not readme.is_file():
        raise InputError("no such file", key="--readme", value=str(readme), remedy="Give the path of a README")
    text = readme.read_text(encoding="utf-8")
    for mark in MARKS:
        begin, end = _marks(mark)
        if not text.count(begin) == text.count(end) == 1 or text.index(begin) > text.index(end):
            raise InputError(f"not exactly one {begin} ... {end}", file=readme, remedy="Mark where the results belong")
    return text


def write_readme(
    readme: Path, scores: Scores, differences: Sequence[Difference], answers: Sequence[Answer], figures: Path
) -> None:
    """Write the marked parts of `readme` anew and copy the figure of final accuracy to ``docs/images`` beside it.

    Args:
        differences: to the reference; only averages of the primary metric are read.
        answers: of the study's claims. figures: folder with the report's figures.

    Raises:
        InputError: as `read_marked`.
    """
    shown = [d for d in differences if (d.family, d.metric) == (AVERAGE, scores.study.metric)]
    table = _table(scores, shown)
    paragraphs = [" ".join(table.notes), _findings(scores, shown, answers)]
    body = "\n\n".join(textwrap.fill(paragraph, WIDTH, break_on_hyphens=False) for paragraph in paragraphs)
    text = _fill(read_marked(readme), "main table", f"\n{table.markdown().strip()}\n\n{body}\n")
    column = len(text[: text.index(_marks("time")[0])].rpartition("\n")[2]) + len(_marks("time")[0])
    time = textwrap.fill(_time(scores.study), WIDTH, initial_indent=" " * column, break_on_hyphens=False)
    atomic_write_text(readme, _fill(text, "time", time.strip()))
    images = readme.parent / IMAGES
    images.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(figures / FIGURE, images / FIGURE)


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def _fill(text: str, mark: str, content: str) -> str:
    begin, end = _marks(mark)
    return text.partition(begin)[0] + begin + content + end + text.partition(end)[2]


def _table(scores: Scores, shown: Sequence[Difference]) -> Table:
    """The averages of the report's main table, and the paired differences to the reference."""
    study, whole = scores.study, main_table(scores)
    places = [0, *(place for place, column in enumerate(whole.columns) if column.group == AVERAGE)]
    compared = {study.reference: [Text("reference"), Text("")]}
    for d, adjusted in zip(shown, holm([d.p for d in shown]), strict=True):
        difference = f"{points(d.mean, sign=True)} {interval(d.low, d.high)}"
        compared[d.arm] = [Text(difference, bold=is_clear(d, float(adjusted))), Text(p_value(float(adjusted)))]
    rows = [
        [*(row[place] for place in places), *compared.get(arm, [Text(MISSING)] * 2)]
        for arm, row in zip(study.arms, whole.rows, strict=True)
    ]
    columns = [replace(whole.columns[place], group="") for place in places]
    columns += [Column(f"{metric_name(study.metric)} minus {study.reference}"), Column("Holm p")]
    notes = [f"{whole.title}.", whole.notes[0], whole.notes[-1]]
    return Table(whole.name, whole.title, columns, rows, whole.data, notes)


def _findings(scores: Scores, shown: Sequence[Difference], answers: Sequence[Answer]) -> str:
    """What is missing, which arms differ, what became of the claims, what could not have been seen."""
    study = scores.study
    sentences = list(study.problems)
    if shown:
        sentences.append(f"**{standing(study.reference, shown)}**")
    if answers:
        verdicts = Counter(answer.verdict for answer in answers)
        told = listed([f"{count} {verdict}" for verdict, count in verdicts.items()])
        sentences.append(f"Of {counted(len(answers), 'claim')} stated before any run: {told}.")
    if shown:
        sentences.append(detectable_sentence(shown))
    if arms := dynamic_arms(study):
        share = uneven_share(study)[arms]
        low, high = points(share.min(), digits=0), points(share.max(), digits=0)
        sentences.append(
            f"Rollouts per prompt differed in {low if low == high else f'{low} to {high}'} % of the steps of "
            f"{listed(arms)}: an allocation that reads earlier outcomes acts only once prompts come back."
        )
    return " ".join(sentences)


def _time(study: Study) -> str:
    """How long the runs took: together, and added up."""
    done = study.done
    currency = currency_name(str(done["planned_currency"].iloc[0]))
    every = "" if len(done) == len(study.cells) else f"{exact(len(done))} of "
    runs = f"{every}{counted(len(study.cells), 'run')} of {exact(float(done['planned'].iloc[0]))} {currency}"
    devices = ", ".join(sorted({str(device) for device in done["device"].dropna()})) or "not recorded"
    added = float(done["wall_seconds"].sum())
    busy = _busy_seconds(study)
    if busy is None:
        return f"{runs} with their evaluation: {duration(added)}, added up over the runs (device: {devices})."
    return (
        f"{runs} with their evaluation took {duration(busy)}, {added / busy:.1f} at a time; added up over the runs, "
        f"{duration(added)} (device: {devices})."
    )


def _busy_seconds(study: Study) -> float | None:
    """Seconds in which at least one run was at work; None where a run did not record when it ended.

    A run counts from its end backwards by its own wall seconds, so that a night between two starts counts nothing.
    """
    spans = []
    for place, seconds in zip(study.done["dir"], study.done["wall_seconds"], strict=True):
        end = (read_json(study.folder / str(place) / "progress.json") or {}).get("updated_at")
        if end is None or not math.isfinite(seconds):
            return None
        spans.append((float(end) - float(seconds), float(end)))
    total, last = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, last))
        last = max(last, end)
    return total
