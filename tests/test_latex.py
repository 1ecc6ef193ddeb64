"""The LaTeX tables in a paper with two columns, by a real TeX run."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from analysis import plotting
from analysis.report import write_report

LATEX = shutil.which("pdflatex")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LATEX is None, reason="no pdflatex here; it comes with texlive-latex-recommended"),
]
PREAMBLE = r"""\documentclass[twocolumn]{article}
\usepackage{booktabs,graphicx}
%s\begin{document}
"""
# Tells how wide every table is by itself, instead of scaling it.
MEASURE = r"""\renewcommand{\resizebox}[3]{\setbox0\hbox{#3}\typeout{NATURAL \the\wd0\space LINE \the\linewidth}\box0}
"""


@pytest.fixture(scope="module")
def made() -> ModuleType:
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("synthetic_results")


@pytest.fixture(scope="module")
def tables(made: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of fourteen arms and four families, one of them with a name that TeX would stumble over."""
    patch = pytest.MonkeyPatch()
    patch.setattr(plotting, "FORMATS", ("svg",))
    arms = {**made.ARMS, "50%_of & $x^2 #{}~\\": 0.0}
    claim = {
        "id": "c",
        "text": "DynaMO's p < 0.05 & more.",
        "arm": "dynamo",
        "reference": "grpo",
        "metric": "pass_at_1",
    }
    families = ("sum_short", "sum_long", "products", "equations")
    recipe = made.Recipe(arms=arms, seeds=(0, 1, 2), families=families, items=8, points=3, steps=4, claims=[claim])
    folder: Path = made.make_study(tmp_path_factory.mktemp("results") / "paper", recipe)
    write_report(folder)
    patch.undo()
    return folder / "tables"


@pytest.fixture(scope="module")
def many(made: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of as many arms as the shipped study ``field`` has."""
    patch = pytest.MonkeyPatch()
    patch.setattr("analysis.report.write_figures", lambda *_: [])
    arms = {**made.ARMS, **{f"arm_of_number_{number}": 0.001 * number for number in range(38 - len(made.ARMS))}}
    families = ("sum_short", "sum_long", "products", "equations")
    recipe = made.Recipe(arms=arms, seeds=(0, 1, 2), families=families, items=8, points=3, steps=4)
    folder: Path = made.make_study(tmp_path_factory.mktemp("results") / "field", recipe)
    write_report(folder)
    patch.undo()
    return folder / "tables"


def compiled(tables: Path, out: Path, extra: str = "") -> str:
    """Compile all tables in one paper; returns TeX's log."""
    files = sorted(tables.glob("*.tex"))
    assert len(files) >= 9
    body = "".join(f"\\input{{{file.name}}}\n\\clearpage\n" for file in files)
    for file in files:
        shutil.copy(file, out)
    (out / "paper.tex").write_text(PREAMBLE % extra + body + "\\end{document}\n")
    command = [str(LATEX), "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "paper.tex"]
    run = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False, timeout=120)
    log = (out / "paper.log").read_text(errors="replace")
    assert run.returncode == 0, log[-2000:]
    return log.replace("\n", " ")


def test_every_table_compiles_and_fits(tables: Path, tmp_path: Path) -> None:
    log = compiled(tables, tmp_path)
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000
    assert re.findall(r"Overfull \\hbox", log) == []
    assert "Missing character" not in log
    assert "Float too large" not in log


def test_tables_of_a_whole_field_compile_and_fit(many: Path, tmp_path: Path) -> None:
    log = compiled(many, tmp_path)
    assert re.findall(r"Overfull \\hbox", log) == []
    assert "Float too large" not in log
    high = {path.stem: path.read_text().count("(continued)") for path in many.glob("*.tex")}
    assert {name: count for name, count in high.items() if count} == {
        "main_table": 1,
        "differences_by_family": 2,
        "spend": 1,
    }


def test_no_table_is_scaled_to_unreadable_print(tables: Path, tmp_path: Path) -> None:
    log = compiled(tables, tmp_path, MEASURE)
    shown = re.findall(r"NATURAL\s+([\d.]+)pt\s*LINE\s+([\d.]+)pt", log)
    widths = [(float(natural), float(line)) for natural, line in shown]
    assert len(widths) > len(list(tables.glob("*.tex")))  # some are in parts
    # Footnote size is 8 pt: what is left of it after scaling is at least 5.5 pt.
    assert [(natural, line) for natural, line in widths if 8 * min(1.0, line / natural) < 5.5] == []


@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="no pdftotext here; it comes with poppler-utils")
def test_intervals_and_ties_are_in_print(tables: Path, tmp_path: Path) -> None:
    compiled(tables, tmp_path)
    subprocess.run(["pdftotext", "-layout", "paper.pdf"], cwd=tmp_path, check=True, timeout=60)
    text = (tmp_path / "paper.txt").read_text()
    source = (tables / "main_table.tex").read_text()
    assert source.count("$^{\\dagger}$") > 5
    assert text.count("†") >= source.count("$^{\\dagger}$")
    mean, half = re.findall(r"\\textbf\{([\d.]+) \$\\pm\$ ([\d.]+)\}", source)[0]
    assert re.search(rf"{re.escape(mean)}\s*±\s*{re.escape(half)}", text)
    assert re.search(r"50%.{0,2}of & \$x", text)  # the default font draws its underscore: no character
