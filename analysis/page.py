"""The report as one HTML page: sortable tables, figures, claims, methods, and rollouts to look into.

The page is a single file that needs no network. Names and texts of others (arms, problems, answers) reach it through
Jinja's escaping or as JSON that the script shows as text; a content security policy lets no script run but the page's
own, by its hash, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from analysis import provenance
from analysis.claims import RULE, Answer
from analysis.comparisons import Scores
from analysis.figures import Drawn
from analysis.formatting import MINUS, MISSING, amount, exact
from analysis.page_figures import inline_svg, theme_css
from analysis.page_traces import trace_data
from analysis.palette import styles
from analysis.results import Study
from analysis.summary import METHOD
from analysis.table_spend import NOT_REACHED
from analysis.tables import Column, Table, Text
from benchmark import registry
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_text
from benchmark.opening import stored_config

TEMPLATES = Path(__file__).parent / "templates"
_NUMBER = re.compile(rf"[+\-{MINUS}]?\d[\d,]*(?:\.\d+)?")
_SIZES = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21}


@dataclass(frozen=True)
class Findings:
    """What a report shows.

    Attributes:
        result: the study's result in a paragraph. tables, figures: by name; figures' files are written already.
    """

    scores: Scores
    result: str
    answers: Sequence[Answer]
    tables: Mapping[str, Table]
    figures: Mapping[str, Drawn]


def write_page(path: Path, findings: Findings) -> None:
    """Write the page of a study to `path`, whose folder holds ``figures/*.svg``; the same findings, the same bytes."""
    script = Markup((TEMPLATES / "page.js").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    study, scores = findings.scores.study, findings.scores
    drawings = {name: inline_svg(path.parent / "figures" / f"{name}.svg") for name in findings.figures}
    looks = {arm: style.colour.lower() for arm, style in styles(list(study.plan["arms"])).items()}
    text = (
        _environment()
        .get_template("page.html")
        .render(
            study=study,
            facts=provenance.facts(scores),
            caveats=provenance.caveats(scores),
            audit=provenance.audit(study),
            result=findings.result,
            rule=RULE,
            stated_rule=" ".join(str(study.plan.get("decision_rule") or "").split()),
            claims=[claim_view(answer) for answer in findings.answers],
            tables={name: table_view(table) for name, table in findings.tables.items()},
            figures=findings.figures,
            svg={name: Markup(drawing) for name, (drawing, _) in drawings.items()},
            colours=looks,
            arms=[arm_view(study, arm) for arm in study.arms],
            traces=trace_data(study),
            method_text=Markup(MarkdownIt("commonmark", {"html": False}).render(METHOD)),
            command=provenance.reproduce(study),
            measured_on=provenance.measured_on(study),
            runs=table_view(_runs(study)),
            style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
            palette=Markup(theme_css({*looks.values(), *(c for _, found in drawings.values() for c in found)})),
            script=script,
            script_digest=digest,
        )
    )
    atomic_write_text(path, text)


def _environment() -> Environment:
    """Templates in which every value is escaped and a missing one is an error."""
    made = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    made.trim_blocks = made.lstrip_blocks = True
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    made.tests["arxiv"] = lambda reference: re.fullmatch(r"\d{4}\.\d{4,5}(?:v\d+)?", str(reference)) is not None
    return made


def _data_link(mime: str, text: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(text.encode()).decode()}"


def table_view(table: Table) -> dict[str, Any]:
    """A table for the template: cells with sort keys, and its data as links that need no other file."""
    groups: list[dict[str, Any]] = []
    for column in table.columns:
        if groups and column.group and groups[-1]["title"] == column.group:
            groups[-1]["span"] += 1
        else:
            groups.append({"title": column.group, "span": 1})
    rows = [
        [{"cell": cell, "sort": cell.text if column.left else sort_key(cell.text), "left": column.left}
         for column, cell in zip(table.columns, row, strict=True)]
        for row in table.rows
    ]  # fmt: skip
    return {
        "table": table,
        "groups": groups if any(group["title"] for group in groups) else [],
        "rows": rows,
        "files": {"csv": _data_link("text/csv", table.csv()), "tex": _data_link("text/x-tex", table.latex())},
    }


def sort_key(text: str) -> str:
    """What a column of numbers is sorted by: a cell's first number; nothing for a cell without one."""
    if text == NOT_REACHED:
        return "Infinity"
    match = _NUMBER.search(text)
    if match is None:
        return ""
    size = _SIZES.get(text[match.end() : match.end() + 1], 1.0)
    value = float(match[0].replace(",", "").replace(MINUS, "-")) * size
    return f"{value - 1e-9 if text.startswith('<') else value:.9g}"


def claim_view(answer: Answer) -> dict[str, Any]:
    """A claim for the template; places on its strip are percent of the strip's width, which is symmetric around 0."""
    d, strip = answer.difference, None
    if d is not None and math.isfinite(d.low) and math.isfinite(d.high):
        reach = 1.15 * max(abs(d.low), abs(d.high), abs(answer.min_effect), 1e-9)
        ends = {"low": d.low, "high": d.high, "mean": d.mean, "needed": answer.min_effect}
        strip = {name: f"{50 + 50 * value / reach:.2f}" for name, value in ends.items()}
    return {"answer": answer, "kind": answer.verdict.replace(" ", "-"), "strip": strip}


def arm_view(study: Study, arm: str) -> dict[str, Any]:
    """Which method an arm is, with which parameters, and what the method's file says of itself."""
    cell = study.done[study.done["arm"] == arm].iloc[0]
    path = study.folder / str(cell["dir"]) / "config.yaml"
    section = stored_config(path).get("method") if path.exists() else None
    chosen = section if isinstance(section, dict) else {}
    params = chosen.get("params")
    shown = _flat(params) if isinstance(params, Mapping) else []
    view: dict[str, Any] = {"arm": arm, "method": str(chosen.get("name", arm)), "params": shown}
    try:
        info, cls = registry.describe(view["method"]), registry.load(view["method"])
    except InputError as error:  # made elsewhere, with a method that is not installed here
        return view | {"info": None, "absent": str(error), "text": ""}
    return view | {"info": info, "absent": "", "text": inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")}


def _flat(params: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested parameters as ``a.b = value``."""
    found: list[str] = []
    for key, value in params.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key} = {value}"]
    return found


def _runs(study: Study) -> Table:
    """Every planned run: state, spend, identity."""
    columns = [Column("arm", left=True), Column("seed"), Column("state", left=True), Column("steps"), Column("spent")]
    columns += [Column("wall seconds"), Column("folder", left=True)]
    rows = []
    for cell in study.cells.to_dict("records"):
        finished = cell["state"] == "done"
        told = [exact(cell["steps"]), exact(cell[f"spent/{study.currency}"]), amount(float(cell["wall_seconds"]))]
        texts = [str(cell["arm"]), str(cell["seed"]), str(cell["state"]), *(told if finished else [MISSING] * 3)]
        rows.append([Text(text) for text in (*texts, str(cell["dir"]))])
    frame = study.cells.drop(columns=["versions", "message"], errors="ignore")
    return Table("runs", "Every run of the plan", columns, rows, frame)
