"""One page for each arm: what it is, its labels, its equations, its parameters, its code.

Everything is read from source text, none is imported, so that the site needs neither torch nor a GPU.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from classes import ROOT, Parameter, Source, docstring, file_of, find, label, origins, parameters, tree
from docstrings import description

GROUP = "rolloutbench.methods"
LABELS = ("family", "kind", "changes", "reference", "faithful_to")
ARXIV = re.compile(r"\d{4}\.\d{5}")
EVIDENCE = {
    "ours": r"\bour own\b|formula is ours|^control:|^oracle:",
    "secondary": r"secondary source",
    "abstract": r"\babstract\b",
    "code": r"\breleased code\b|\bverl\b|\btrl\.|\b(?:its|paper's) code\b",
    "text": r"\bpaper\b|\bREADME\b|\btheory\b|\bpublished\b",
}
"""What an arm was written from, by words of its `faithful_to`: the first that is found."""


@cache
def entry_points() -> dict[str, str]:
    """``module:Class`` of every arm of the distribution, by name, in the order of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return dict(project["entry-points"][GROUP])


def arm_class(name: str) -> Source:
    """The class of an arm."""
    module, _, cls = entry_points()[name].partition(":")
    found = find(module, cls)
    if found is None:
        raise LookupError(f"{name}: no class {cls} in {module}")
    return found


@cache
def arm_pages() -> dict[str, str]:
    """Markdown of every arm's page, by name."""
    return {name: "\n".join(arm_page(name, arm_class(name))) for name in entry_points()}


def unexplained() -> list[str]:
    """``arm: parameter`` of every parameter that neither its class nor meanings.toml says anything of."""
    return [f"{name}: {row.name}" for name in entry_points() for row in parameters(arm_class(name)) if not row.meaning]


def evidence(faithful_to: str) -> str:
    """What an arm was written from: code, text, abstract, secondary or ours."""
    return next(word for word, pattern in EVIDENCE.items() if re.search(pattern, faithful_to))


def arm_page(name: str, cls: Source) -> Iterator[str]:
    """Lines of an arm's page."""
    yield f"# {name}\n"
    yield f"{description(cls.doc)}\n"
    for attribute in LABELS:
        value = label(cls, attribute)
        shown = ", ".join(value) if isinstance(value, tuple) else str(value or "")
        if attribute == "reference":
            shown = ARXIV.sub(lambda m: f"[arXiv {m[0]}](https://arxiv.org/abs/{m[0]})", shown)
        yield f"- **{attribute.replace('_', ' ')}:** {shown or 'nothing'}"
    yield f"- **evidence:** {evidence(label(cls, 'faithful_to'))} ([what the words mean](../field.md#evidence))"
    yield f"\n## Equations and where it deviates\n\nFrom `{file_of(cls.module).relative_to(ROOT).as_posix()}`:\n"
    yield f"{description(docstring(tree(cls.module)))}\n"
    yield from parameter_tables(cls)
    yield f"\n## Code\n\n::: {cls.path}\n    options:\n      show_root_heading: true\n      show_source: true"
    yield "      show_docstring_attributes: false\n"


def parameter_tables(cls: Source) -> Iterator[str]:
    """What the arm sets itself, then what it inherits and from where; every parameter once."""
    rows, origin = parameters(cls), origins(cls)
    own = {row.name for row in rows if origin[row.name] == cls}
    yield "## Parameters\n"
    yield "Change one with `--set method.<name>=<value>`, or with `params` of an arm in a study file.\n"
    if own:
        yield "| parameter | default | meaning |\n|---|---|---|"
        yield from (_row(row) for row in rows if row.name in own)
    else:
        yield "None of its own."
    if inherited := [row for row in rows if row.name not in own]:
        yield "\nInherited unchanged:\n"
        yield "| parameter | default | meaning | from |\n|---|---|---|---|"
        yield from (f"{_row(row)} {_link(origin[row.name])} |" for row in inherited)


def _row(row: Parameter) -> str:
    default = re.sub(r"^'(.+)'$", r"\1", row.default)  # as it is written after --set
    cells = [f"`{row.name}`", f"`{default}`", row.meaning + (_more(row.nested) if row.nested else "")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _more(nested: Source) -> str:
    page = _documented().get(nested.module)
    return f" [More]({page}#{nested.path})" if page else ""


def _link(origin: Source) -> str:
    """The page of an arm, or the documentation of a class that is none."""
    for name, target in entry_points().items():
        if target == f"{origin.module}:{origin.node.name}":
            return f"[`{name}`]({name}.md)"
    page = _documented().get(origin.module)
    return f"[`{origin.node.name}`]({page}#{origin.path})" if page else f"`{origin.node.name}`"


@cache
def _documented() -> dict[str, str]:
    """The page of the interface that documents a module, by module, seen from an arm's page."""
    return {
        module: f"../api/{path.name}"
        for path in sorted((Path(__file__).parent / "api").glob("*.md"))
        for module in re.findall(r"^::: ([\w.]+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
