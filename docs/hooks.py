"""What the documentation site makes by itself: its front page from the README, and one page for each arm.

Everything is read from source text (griffe, no import), so that the site needs neither torch nor a GPU.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
GROUP = "rolloutbench.methods"
LABELS = ("family", "kind", "changes", "reference", "faithful_to")
ARXIV = re.compile(r"\d{4}\.\d{5}")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page and the arms' pages, and put the arms into the navigation."""
    files.append(File.generated(config, "index.md", content=front_page()))
    arms = arm_pages()
    for name, text in arms.items():
        files.append(File.generated(config, f"methods/{name}.md", content=text))
    for entry in config.nav or []:
        if "Arms" in entry:
            entry["Arms"] = ["methods.md", *({name: f"methods/{name}.md"} for name in arms)]
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Names in the list of arms lead to their pages."""
    if page.file.src_uri != "methods.md":
        return markdown
    known = set(entry_points())

    def link(match: re.Match[str]) -> str:
        name = match[1]
        return f"[`{name}`](methods/{name}.md)" if name in known else match[0]

    rows = (re.sub(r"`(\w+)`", link, line.split("|", 2)[1]) for line in markdown.splitlines() if line.startswith("| `"))
    found = iter(rows)
    lines = [
        f"|{next(found)}|{line.split('|', 2)[2]}" if line.startswith("| `") else line for line in markdown.splitlines()
    ]
    return "\n".join(lines)


def front_page() -> str:
    """The README with its links seen from the site."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text).replace("[CITATION.cff](CITATION.cff)", "`CITATION.cff`")


def entry_points() -> dict[str, str]:
    """``module:Class`` of every arm of the distribution, by name, in the order of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return dict(project["entry-points"][GROUP])


def arm_pages() -> dict[str, str]:
    """Markdown of every arm's page, by name."""
    loader = griffe.GriffeLoader(search_paths=[ROOT])
    for package in ("benchmark", "baselines", "methods"):
        loader.load(package)
    loader.resolve_aliases()
    pages = {}
    for name, target in entry_points().items():
        module, _, cls = target.partition(":")
        found = loader.modules_collection[module][cls]
        pages[name] = "\n".join(arm_page(name, found))
    return pages


def arm_page(name: str, cls: griffe.Class) -> Iterator[str]:
    """Lines of an arm's page: what it is, its labels, its equations, its parameters, its code."""
    yield f"# {name}\n"
    yield f"{_text(cls)}\n"
    for label in LABELS:
        value = _literal(cls, label)
        shown = ", ".join(value) if isinstance(value, tuple) else str(value or "")
        if label == "reference":
            shown = ARXIV.sub(lambda m: f"[arXiv {m[0]}](https://arxiv.org/abs/{m[0]})", shown)
        yield f"- **{label.replace('_', ' ')}:** {shown or 'nothing'}"
    yield f"\n## Equations and where it deviates\n\nFrom `{Path(str(cls.relative_filepath)).as_posix()}`:\n"
    yield f"{_text(cls.module)}\n"
    parameters = list(_parameters(cls))
    yield "## Parameters\n"
    yield "Change one with `--set method.<name>=<value>`, or with `params` of an arm in a study file.\n"
    yield "| parameter | default |\n|---|---|"
    yield from (f"| `{parameter}` | `{default}` |" for parameter, default in parameters)
    yield f"\n## Code\n\n::: {cls.path}\n    options:\n      show_root_heading: true\n      show_source: true\n"


def _text(thing: griffe.Object) -> str:
    return "" if thing.docstring is None else thing.docstring.value


def _literal(cls: griffe.Class, name: str) -> Any:
    value = cls.all_members[name].value
    return None if value is None else ast.literal_eval(str(value))


def _parameters(cls: griffe.Class) -> Iterator[tuple[str, str]]:
    """Dataclass fields, inherited ones too: name and default as written."""
    for name, member in cls.all_members.items():
        if not member.is_attribute or "instance-attribute" not in member.labels:  # griffe's word for a field
            continue
        if member.value is not None:
            default = str(member.value)
            made = re.fullmatch(r"field\(default_factory=(?:lambda: )?(.+)\)", default)
            yield name, (made[1] if made else default).replace("|", "\\|")
