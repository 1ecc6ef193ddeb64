"""A table once, in three forms: Markdown and LaTeX to read, CSV to compute with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from benchmark.jsonl import atomic_write_text

TIED = "†"
ONE_COLUMN, TWO_COLUMNS = 62, 150
"""Characters that one column, and the whole width, of a paper with two columns can hold in small print."""
SENTENCE = 46
"""Longer texts run over several lines."""
LETTERS_OF_LONG = 38
"""Characters in a line of those."""
PAGE_HEIGHT, LINE = 540.0, 10.0
"""Points: what a float may take of a page, where the article class has 550, and a line of a table in small print."""
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "\N{MINUS SIGN}": r"$-$",
    "\N{EM DASH}": "---",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    TIED: r"$^{\dagger}$",
}


@dataclass(frozen=True)
class Column:
    """A column's heading; neighbours with the same `group` share a heading above theirs."""

    title: str
    group: str = ""
    left: bool = False


@dataclass(frozen=True)
class Text:
    """What a cell shows; a tied cell carries a dagger."""

    text: str
    bold: bool = False
    tied: bool = False

    @property
    def plain(self) -> str:
        """The text with its mark."""
        return self.text + (TIED if self.tied else "")


_Block = tuple[Sequence[int], range]  # columns and rows that stand in one tabular


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        name: stem of its files. title: what it shows. notes: how to read it, one sentence each.
        columns, rows: what people see. data: the same and more as numbers in fractions, for the CSV file.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Text]]
    data: pd.DataFrame
    notes: Sequence[str] = field(default_factory=tuple)

    def section(self) -> str:
        """Title, links to the files, table and notes, as a report shows them."""
        links = ", ".join(f"[{suffix}](tables/{self.name}.{suffix})" for suffix in ("csv", "tex"))
        notes = "".join(f"{note}\n" for note in self.notes)
        return f"**{self.title}** ({links})\n\n{self.markdown()}\n{notes}\n"

    def markdown(self) -> str:
        """The table in Markdown, without title and notes."""
        titles = [f"{c.group} {c.title}".strip() for c in self.columns]
        cells = [[_markdown(cell) for cell in row] for row in self.rows]
        lines = [titles, [":--" if c.left else "--:" for c in self.columns], *cells]
        return "".join("| " + " | ".join(line) + " |\n" for line in lines)

    def csv(self) -> str:
        """The data with seven significant digits, so that rounding of the last bits changes no byte."""
        return self.data.to_csv(index=False, float_format="%.7g", lineterminator="\n")

    def latex(self) -> str:
        """Floats for a document that loads booktabs and graphicx, readable in a paper with two columns.

        What is too wide for one column spans both; what is too wide for both is broken into parts below each other,
        between groups of columns where there are groups. What is too high for a page goes on in further floats with
        the same number and notes, between parts where each of them fits a page, else between rows.
        """
        parts = self._parts()
        spanning = any(self._letters(part) > ONE_COLUMN for part in parts)
        pages = self._pages(parts, spanning)
        floats = [line for place in range(len(pages)) for line in self._float(pages, place, spanning)]
        return "\n".join(["% needs \\usepackage{booktabs,graphicx}", *floats]) + "\n"

    def _float(self, pages: Sequence[Sequence[_Block]], place: int, spanning: bool) -> list[str]:
        kind = "table*" if spanning else "table"
        title, label = latex_text(self.title), rf"\label{{tab:{self.name.replace('_', '-')}}}"
        # The number of the first: a paper speaks of one table.
        head = [rf"\caption{{{title}}}", label]
        if place:
            head = [r"\addtocounter{table}{-1}", rf"\caption{{{title} (continued)}}"]
        tabulars = [line for block in pages[place] for line in (r"\par\medskip", *self._tabular(*block))]
        notes = [rf"\par\smallskip\raggedright {latex_text(' '.join(self.notes))}\par"] if self.notes else []
        body = [r"\centering", *head, r"\footnotesize", *tabulars[1:], *notes]
        return [rf"\begin{{{kind}}}", *body, rf"\end{{{kind}}}"]

    def _pages(self, parts: Sequence[Sequence[int]], spanning: bool) -> list[list[_Block]]:
        """Parts, and rows of parts, that fill a page each by about how high they are."""
        letters = TWO_COLUMNS if spanning else ONE_COLUMN
        lines = -(-len(self.title) // (0.6 * letters)) - (
            -sum(len(note) + 1 for note in self.notes) // (0.75 * letters)
        )
        room = PAGE_HEIGHT - LINE * (2 + lines)
        pages: list[list[_Block]] = [[]]
        left = room
        for part in parts:
            scale = min(1.0, 0.78 * letters / self._letters(part))  # what `\\resizebox` makes of it
            heights = [scale * LINE * self._lines(row, part) for row in self.rows]
            head = LINE * (1 + scale * (4 if any(self.columns[place].group for place in part) else 2.5))
            if pages[-1] and head + sum(heights) > left:
                pages, left = [*pages, []], room
            start, used = 0, head
            for place, height in enumerate(heights):
                if used + height > left and place > start:
                    pages = [*pages[:-1], [*pages[-1], (part, range(start, place))], []]
                    start, used, left = place, head, room
                used += height
            pages[-1].append((part, range(start, len(heights))))
            left -= used
        return pages

    def _lines(self, row: Sequence[Text], places: Sequence[int]) -> int:
        """Lines that a row takes."""
        long = [place for place in places if self._longest(place) > SENTENCE]
        return max([1, *(-(-len(row[place].plain) // LETTERS_OF_LONG) for place in long)])

    def _letters(self, places: Sequence[int]) -> int:
        """About how many characters wide some columns are."""
        return sum(2 + min(self._longest(place), SENTENCE) for place in places)

    def _longest(self, place: int) -> int:
        return max(len(self.columns[place].title), *(len(row[place].plain) for row in self.rows))

    def _parts(self) -> list[list[int]]:
        """Columns of each part; every part begins with the first column, which names the rows."""
        spans: list[list[int]] = []
        for place in range(1, len(self.columns)):
            group = self.columns[place].group
            joined = spans and group and self.columns[place - 1].group == group
            spans = [*spans[:-1], [*spans[-1], place]] if joined else [*spans, [place]]
        parts = [[0]]
        for span in spans:
            full = len(parts[-1]) > 1 and self._letters([*parts[-1], *span]) > TWO_COLUMNS
            parts = [*parts, [0, *span]] if full else [*parts[:-1], [*parts[-1], *span]]
        return parts

    def _tabular(self, places: Sequence[int], rows: range) -> list[str]:
        columns = [self.columns[place] for place in places]
        kinds = ["p{20em}" if self._longest(p) > SENTENCE else "l" if self.columns[p].left else "r" for p in places]
        return [
            # Wider than the text: scaled down; narrower: left as it is.
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{''.join(kinds)}}}",
            r"\toprule",
            *_latex_groups(columns),
            _latex_row([latex_text(column.title) for column in columns]),
            r"\midrule",
            *(_latex_row([_latex(self.rows[row][place]) for place in places]) for row in rows),
            r"\bottomrule",
            r"\end{tabular}}",
        ]

    def write(self, folder: Path) -> list[Path]:
        """Write ``<folder>/<name>.{md,csv,tex}``."""
        notes = "".join(f"\n{note}\n" for note in self.notes)
        contents = {
            "md": no_html(f"**{self.title}**\n\n{self.markdown()}{notes}"),
            "csv": self.csv(),
            "tex": self.latex(),
        }
        paths = [folder / f"{self.name}.{suffix}" for suffix in contents]
        for path, text in zip(paths, contents.values(), strict=True):
            atomic_write_text(path, text)
        return paths


def _latex_groups(columns: Sequence[Column]) -> list[str]:
    """The row of shared headings and the rules below them."""
    if not any(column.group for column in columns):
        return []
    cells, rules, start = [], [], 1
    while start <= len(columns):
        group, end = columns[start - 1].group, start
        while group and end < len(columns) and columns[end].group == group:
            end += 1
        width = end - start + 1
        cells.append(rf"\multicolumn{{{width}}}{{c}}{{{latex_text(group)}}}" if group else "")
        rules += [rf"\cmidrule(lr){{{start}-{end}}}"] if group else []
        start = end + 1
    return [_latex_row(cells), " ".join(rules)]


def no_html(markdown: str) -> str:
    """Markdown in which no angle bracket opens an element, whoever chose the names and texts in it."""
    return re.sub(r"(?<!\\)<", r"\\<", markdown)


def no_links(text: str) -> str:
    """Words of others in one line of Markdown, in which no bracket makes a link or loads an image."""
    return re.sub(r"\](?=[(\[:])", r"]\\", re.sub(r"\s*\n\s*", " ", text.strip()))


def code_block(line: str) -> str:
    """One line as a block of code, which nothing in it ends."""
    return f"```\n{' '.join(line.split()).replace('```', '')}\n```"


def latex_text(text: str) -> str:
    """Plain text with every character that LaTeX would not take as it is spelled out."""
    return "".join(_LATEX.get(character, character) for character in text)


def _latex(cell: Text) -> str:
    text = latex_text(cell.text)
    return (rf"\textbf{{{text}}}" if cell.bold else text) + (_LATEX[TIED] if cell.tied else "")


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _markdown(cell: Text) -> str:
    # Underscores inside words are safe in Markdown; stars, bars and angle brackets are not.
    text = re.sub(r"([*|<])", r"\\\1", no_links(cell.text))
    return (f"**{text}**" if cell.bold else text) + (TIED if cell.tied else "")
