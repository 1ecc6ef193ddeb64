"""What the documentation site makes by itself: its front page from the README, and one page for each arm."""

from __future__ import annotations

import logging
import re

from arms import arm_pages, entry_points, unexplained
from classes import ROOT
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LOG = logging.getLogger("mkdocs.hooks")  # a warning there ends a strict build
FORMULA = re.compile(r'<div class="highlight"><pre><span></span><code>(.*?)</code></pre></div>', re.DOTALL)
HANGING = 4  # columns that a wrapped line of a formula stands behind its first
LISTS = ("methods.md", "field.md")
"""Pages with tables whose first column names arms."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page and the arms' pages, and put the arms into the navigation."""
    files.append(File.generated(config, "index.md", content=front_page()))
    for parameter in unexplained():
        LOG.warning("%s: no meaning, neither in its class nor in docs/meanings.toml", parameter)
    arms = arm_pages()
    for name, text in arms.items():
        files.append(File.generated(config, f"methods/{name}.md", content=text))
    for entry in config.nav or []:
        if "Arms" in entry:
            entry["Arms"] = ["methods.md", *({name: f"methods/{name}.md"} for name in arms)]
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Names in lists of arms lead to their pages."""
    if page.file.src_uri not in LISTS:
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


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Indented blocks, which are formulas: each line wraps behind its own indentation, and none is there to copy."""
    return FORMULA.sub(lambda match: formula(match[1]) if "<span" not in match[1] else match[0], html)


def formula(text: str) -> str:
    """HTML of a formula: its lines, and in them what wide gaps separate, which is where a line breaks first."""
    lines = []
    for line in text.rstrip("\n").split("\n"):
        columns = len(line) - len(line.lstrip()) + HANGING
        parts = re.sub(r"\S+(?: \S+)*", r"<span>\g<0></span>", line)
        lines.append(f'<span style="padding-left: {columns}ch; text-indent: -{columns}ch">{parts or " "}</span>')
    return f'<div class="highlight formula no-copy"><pre><code>{"".join(lines)}</code></pre></div>'


def front_page() -> str:
    """The README with its links seen from the site."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text).replace("[CITATION.cff](CITATION.cff)", "`CITATION.cff`")
