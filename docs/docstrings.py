"""Docstrings as this project writes them: parameters may share a line, as in ``low, high: bounds. kl: a bound.``."""

from __future__ import annotations

import re
from collections.abc import Iterator

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
PARAMETERS = ("Args", "Attributes")
NAMES = r"\*{0,2}[A-Za-z_]\w*(?:, \*{0,2}[A-Za-z_]\w*)*"
ENTRY = re.compile(rf"(?:^|(?<=\. ))({NAMES}): ")
FORMULA = re.compile(r"^\w+_i(?::| =) |\S {2,}\S", re.MULTILINE)


def sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """The parts of a docstring in order: the name of a section, empty for prose, and its lines without that name."""
    name, lines = "", list[str]()
    for line in text.splitlines():
        begins = SECTION.fullmatch(line)
        if begins or (name and line and not line.startswith(" ")):
            yield name, lines
            name, lines = (begins[1], []) if begins else ("", [line])
        else:
            lines.append(line)
    yield name, lines


def description(text: str) -> str:
    """A docstring without its sections."""
    return "\n".join(line for name, lines in sections(with_formulas(text)) if not name for line in lines).strip()


def with_formulas(text: str) -> str:
    """A docstring whose formulas are indented, which sets them as such, where they stand at the margin."""
    summary, *others = re.split(r"(\n\s*\n)", text)
    return summary + "".join(_formula(paragraph) for paragraph in others)


def meanings(text: str) -> dict[str, str]:
    """What a docstring says of each attribute, by name."""
    return {
        name: meaning
        for section, lines in sections(text)
        if section in PARAMETERS
        for names, meaning in _entries(lines)
        for name in names
    }


def spread(text: str) -> str:
    """A docstring as other readers of docstrings want it: formulas indented, a line of its own for every parameter."""
    parts = []
    for section, lines in sections(with_formulas(text)):
        if section in PARAMETERS:
            end = [""] if lines and not lines[-1].strip() else []
            lines = [f"    {name}: {meaning}" for names, meaning in _entries(lines) for name in names] + end
        parts += [f"{section}:", *lines] if section else lines
    return "\n".join(parts)


def _entries(lines: list[str]) -> Iterator[tuple[list[str], str]]:
    """Names and what is said of them; a line that names nothing goes on with what was said before it."""
    text = ""
    for line in (line.strip() for line in lines if line.strip()):
        text += f"\n{line}" if ENTRY.match(line) else f" {line}"
    for line in text.strip().splitlines():
        starts = [*ENTRY.finditer(line)]
        for start, end in zip(starts, [*(match.start() for match in starts[1:]), len(line)], strict=True):
            yield start[1].split(", "), line[start.end() : end].strip()


def _formula(paragraph: str) -> str:
    lines = paragraph.splitlines()
    at_the_margin = not any(line.startswith((" ", "- ", "1. ")) for line in lines)
    if not (at_the_margin and FORMULA.search(paragraph)):
        return paragraph
    return "\n".join(f"    {line}" for line in lines)
