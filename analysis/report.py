"""The report of a study: REPORT.md and index.html with their tables and figures, made from the recorded files alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.claims import RULE, Answer, answer_claims
from analysis.comparisons import Difference, Scores
from analysis.figures import Drawn, write_figures
from analysis.page import Findings, write_page
from analysis.provenance import audit, caveats, facts, made_by, measured_on, reproduce
from analysis.readme import read_marked, write_readme
from analysis.results import Study, load_study, read_json
from analysis.summary import METHOD, headline
from analysis.table_changes import changes_table
from analysis.table_difficulty import difficulty_table
from analysis.table_scores import (
    aggregates_table,
    claims_table,
    differences_table,
    family_table,
    main_table,
)
from analysis.table_spend import cost_table, ranking_table, rollouts_table, seconds_table, spend_table
from analysis.table_variance import variance_table
from analysis.tables import Table, code_block, no_html, no_links
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_text, clear_partial
from benchmark.seal import write_manifest

TABLES, FIGURES = "tables", "figures"


def write_report(study_dir: Path, readme: Path | None = None, out: Path | None = None) -> Path:
    """Write ``tables/*.{md,csv,tex}``, ``figures/*.{svg,pdf,png}``, ``REPORT.md`` and ``index.html`` of a study.

    What is missing or failed is named first and left out of every number. The same records give the same
    bytes. ``manifest.json`` is written last, with the hashes of all files (`benchmark.seal`).

    Args:
        study_dir: ``results/<study>``, with ``plan.json`` and ``cells/``.
        readme: a README whose marked parts are to show the same results (`analysis.readme`).
        out: another folder for the report, which gets no manifest; `study_dir` then stays as it is.

    Returns:
        The path of REPORT.md.

    Raises:
        InputError: there is no plan, no cell is done, a record is damaged, or `readme` lacks its marks.
    """
    if readme is not None:
        read_marked(readme)
    study = load_study(study_dir)
    variance = _variance(study_dir)
    if variance is not None and not _is_of(study, variance):
        variance = None
        told = "The gradient variance in the folder was measured for another configuration: it is left out."
        study = replace(study, problems=(*study.problems, told))
    scores = Scores(study)
    answers = answer_claims(scores, study.claims)
    differences = _differences(scores)
    tables = {table.name: table for table in _tables(scores, answers, differences, variance)}
    place = out or study_dir
    folder = place / TABLES
    folder.mkdir(exist_ok=True)
    for written_to in (place, folder, place / FIGURES):
        clear_partial(written_to)
    for written in [path for suffix in ("md", "csv", "tex") for path in folder.glob(f"*.{suffix}")]:
        if written.stem not in tables:
            written.unlink()
    for table in tables.values():
        table.write(folder)
    figures = {drawn.name: drawn for drawn in write_figures(scores, place / FIGURES, variance)}
    path, result = place / "REPORT.md", headline(scores, differences)
    atomic_write_text(path, _compose(scores, answers, result, tables, figures))
    write_page(place / "index.html", Findings(scores, result, answers, tables, figures))
    if readme is not None:
        write_readme(readme, scores, differences, answers, place / FIGURES)
    if out is None:
        write_manifest(study_dir, made_by())
    return path


def write_failures(study_dir: Path) -> Path:
    """REPORT.md of a study of which nothing is done: what failed, where its output is, and what runs it again.

    Raises:
        InputError: there is no plan.
    """
    plan = read_json(study_dir / "plan.json")
    if plan is None:
        raise InputError("no plan.json", file=study_dir, remedy="Name the results folder of a study")
    failed = {(failure["arm"], failure["seed"]): str(failure["error"]) for failure in plan.get("failures", [])}
    lines = [
        no_links(f"{cell['arm']}, seed {cell['seed']}: {why} (output: {cell['dir']}/run.log)")
        for cell in plan["cells"]
        if (why := failed.get((cell["arm"], cell["seed"]))) is not None
    ]
    told = f"No run of {len(plan['cells'])} is done; {len(lines)} failed.\n\n{_listed(lines)}"
    again = f"They are run again by:\n\n{code_block(plan.get('command') or 'the command that made this study')}"
    path = study_dir / "REPORT.md"
    atomic_write_text(path, no_html(f"# {plan['study']}\n\n## What failed\n\n{told}\n{again}\n"))
    return path


rebuild = write_report
"""The same: a report is always made anew from the records."""


def _variance(folder: Path) -> dict[str, Any] | None:
    """The gradient-variance measurement in a study's folder, if one was made."""
    path = folder / "gradient_variance.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        complete = all({"allocator", "advantage", "ratio"} <= set(row) for row in record["rows"])
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise InputError(
            "not a record of gradient variances",
            file=path,
            remedy="Measure again, or remove the file and the report goes without it",
        )
    return dict(record) if record["rows"] else None


def _is_of(study: Study, variance: dict[str, Any]) -> bool:
    """Whether a measurement was made with the configuration of the study's reference arm, as far as both say."""
    own = [cell["dir"] for cell in study.done[study.done["arm"] == study.reference].to_dict("records")]
    known = {(read_json(study.folder / str(cell) / "result.json") or {}).get("plan_hash") for cell in own}
    return not known or variance.get("plan_hash") in {*known, None}


def _differences(scores: Scores) -> list[Difference]:
    """Every arm against the reference, by metric and family; none where the reference has no finished run."""
    study = scores.study
    pairs = [(arm, study.reference) for arm in study.arms if arm != study.reference]
    return [difference for metric in study.metrics for difference in scores.differences(pairs, metric)]


def _tables(
    scores: Scores, answers: Sequence[Answer], differences: Sequence[Difference], variance: dict[str, Any] | None
) -> Iterator[Table]:
    yield main_table(scores)
    if answers:
        yield claims_table(answers)
    if differences:
        primary = [d for d in differences if d.metric == scores.study.metric]
        yield differences_table(scores, primary)
        by_change = changes_table(scores, primary)
        if by_change is not None:
            yield by_change
        yield family_table(scores, differences)
        yield difficulty_table(scores)
        yield cost_table(scores)
    yield aggregates_table(scores)
    yield ranking_table(scores)
    yield spend_table(scores)
    yield rollouts_table(scores)
    yield seconds_table(scores)
    if variance is not None:
        yield variance_table(variance)


def _compose(
    scores: Scores, answers: Sequence[Answer], result: str, tables: dict[str, Table], figures: dict[str, Drawn]
) -> str:
    """REPORT.md: what is missing, the answers, then the evidence from the most to the least important."""

    def table(name: str) -> str:
        return _table(tables[name]) if name in tables else ""

    def figure(name: str) -> str:
        return _figure(figures[name]) if name in figures else ""

    study = scores.study
    sections = {
        "What to know first": _listed([no_links(line) for line in caveats(scores)]),
        "Claims": _claims(study, answers),
        "Main table": f"{result}\n\n{table('main_table')}{figure('final_accuracy')}",
        f"Difference to {study.reference}": table("differences")
        + figure("differences")
        + figure("probability_of_improvement"),
        "By what the arms change": table("by_change"),
        "By family, number of tries and difficulty": table("differences_by_family")
        + figure("pass_at_k")
        + figure("performance_profiles")
        + table("difficulty"),
        "Learning curves and cost": figure("learning_curves") + table("cost_to_target") + figure("pareto"),
        "Ranking under other currencies": table("ranking_by_currency"),
        "Robust aggregates": table("aggregates"),
        "What was spent": _listed(audit(study))
        + "\n"
        + table("spend")
        + table("rollouts")
        + table("seconds")
        + figure("spend_by_phase"),
        "During training": figure("entropy_and_gradient_norm") + figure("rollouts_per_prompt"),
        "Gradient variance": table("gradient_variance") + figure("gradient_variance"),
        "How the numbers were made": METHOD,
        "How to reproduce": _reproduce(study),
        "Measured on": _listed(measured_on(study)),
    }
    body = "".join(f"## {title}\n\n{text.strip()}\n\n" for title, text in sections.items() if text.strip())
    return no_html(f"# {no_links(study.name)}\n\n{_opening(scores)}\n\n{body.rstrip()}\n")


def _opening(scores: Scores) -> str:
    question = no_links(str(scores.study.plan.get("question") or ""))
    told = facts(scores)
    line = (
        f"{told['runs']}: {told['arms']}, {told['seeds']}, {told['budget']}, scale `{told['scale']}`; final "
        f"evaluation on {told['problems']} with {told['samples']} each."
    )
    return f"**{question}**\n\n{line}" if question else line


def _claims(study: Study, answers: Sequence[Answer]) -> str:
    if not answers:
        return ""
    stated = no_links(str(study.plan.get("decision_rule") or ""))
    lines = [f"- **{answer.verdict}**: {no_links(answer.text)} {_evidence(answer)}\n" for answer in answers]
    links = ", ".join(f"[{suffix}]({TABLES}/claims.{suffix})" for suffix in ("csv", "tex"))
    plan = f"The rule as the plan states it: {stated}\n\n" if stated else ""
    return f"Stated before any run ({links}).\n\n{''.join(lines)}\n{plan}The rule as it was applied: {RULE}"


def _evidence(answer: Answer) -> str:
    effect = f" The difference had to exceed {100 * answer.min_effect:g} points." if answer.min_effect else ""
    return f"(`{answer.id}`; {answer.reason.rstrip('.')}.){effect}"


def _table(table: Table) -> str:
    links = ", ".join(f"[{suffix}]({TABLES}/{table.name}.{suffix})" for suffix in ("csv", "tex"))
    notes = "".join(f"{note}\n" for note in table.notes)
    return f"**{table.title}** ({links})\n\n{table.markdown()}\n{notes}\n"


def _figure(drawn: Drawn) -> str:
    links = ", ".join(f"[{suffix}]({FIGURES}/{drawn.name}.{suffix})" for suffix in ("svg", "pdf"))
    return f"![{drawn.caption}]({FIGURES}/{drawn.name}.png)\n\n*{drawn.caption}* ({links})\n\n"


def _reproduce(study: Study) -> str:
    return (
        f"{code_block(reproduce(study))}\n\nOnly missing runs are run. `rolloutbench report` with this folder makes "
        "this report again from the recorded files."
    )


def _listed(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)
