"""The README's measured part: it says what the records say, and nothing around it changes."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from analysis import plotting
from analysis.figure_data import dynamic_arms, uneven_share
from analysis.readme import MARKS, read_marked
from analysis.report import write_report
from analysis.results import load_study
from benchmark.errors import InputError
from benchmark.progress import duration

TEXT = """# Mine

Before \N{DAGGER}.

<!-- main table -->
an old table
<!-- /main table -->

![figure](docs/images/final_accuracy.png)

**How long:** <!-- time -->a while.<!-- /time -->

After.
"""
EFFECTS = {"grpo": 0.0, "rloo": 0.0, "dynamo": 0.25, "w_reinforce": -0.25}
CLAIMS = [{"id": arm, "arm": arm, "reference": "grpo", "metric": "pass_at_1"} for arm in ("dynamo", "rloo")]


@pytest.fixture(scope="module")
def made() -> ModuleType:
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("synthetic_results")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plotting, "FORMATS", ("svg", "png"))
    monkeypatch.setitem(plotting._RC, "savefig.dpi", 40)


def make(made: ModuleType, folder: Path, **changes: Any) -> Path:
    settings = {"arms": EFFECTS, "seeds": (0, 1, 2, 3), "items": 16, "points": 3, "steps": 12, "claims": CLAIMS}
    found: Path = made.make_study(folder, made.Recipe(**{**settings, **changes}))
    return found


@pytest.fixture(scope="module")
def study(made: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(made, tmp_path_factory.mktemp("results") / "made_up")


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "project" / "README.md"
    path.parent.mkdir()
    path.write_text(TEXT, encoding="utf-8")
    return path


def block(text: str, mark: str) -> str:
    return text.partition(f"<!-- {mark} -->")[2].partition(f"<!-- /{mark} -->")[0]


def outside(text: str) -> str:
    for mark in MARKS:
        text = text.replace(block(text, mark), "")
    return text


def words(text: str) -> str:
    return " ".join(text.split())


def test_only_what_is_marked_is_written_and_a_second_time_changes_nothing(study: Path, readme: Path) -> None:
    write_report(study, readme)
    first = readme.read_text(encoding="utf-8")
    assert outside(first) == outside(TEXT)
    assert all(block(first, mark) != block(TEXT, mark) for mark in MARKS)
    assert max(map(len, block(first, "time").splitlines())) <= 120
    write_report(study, readme)
    assert readme.read_text(encoding="utf-8") == first


def test_the_table_is_that_of_the_report(study: Path, readme: Path) -> None:
    write_report(study, readme)
    shown = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in block(readme.read_text(encoding="utf-8"), "main table").splitlines()
        if line.startswith("|")
    ]
    assert shown[0] == ["arm", "pass@1", "pass@8", "pass@32", "pass@1 minus grpo", "Holm p"]
    assert [row[0] for row in shown[2:]] == list(EFFECTS)
    report = (study / "tables" / "main_table.md").read_text(encoding="utf-8")
    differences = (study / "tables" / "differences.md").read_text(encoding="utf-8")
    for row in shown[2:]:
        assert f"| {' | '.join(row[:4])} |" in report  # the report's averages come first
        if row[0] == "grpo":
            assert row[4:] == ["reference", ""]
            continue
        own = next(line for line in differences.splitlines() if line.startswith(f"| {row[0]} |"))
        cells = [cell.strip() for cell in own.strip("|").split("|")]
        assert row[4].replace("*", "") == f"{cells[1].replace('*', '')} {cells[2]}"
        assert ("**" in row[4]) == ("**" in cells[1])
        assert row[5] == cells[4]
    bold = {row[0] for row in shown[2:] if "**" in row[4]}
    assert bold == {"dynamo", "w_reinforce"}


def test_the_findings_are_those_that_were_put_in(study: Path, readme: Path) -> None:
    write_report(study, readme)
    text = words(block(readme.read_text(encoding="utf-8"), "main table"))
    assert "at 800,000 generated tokens a run. Percent, mean over 4 seeds and 48 problems" in text
    assert re.search(r"\*\*Clearly above grpo, after Holm's correction: dynamo \(\+[\d.]+ \[.*?\]\)\.", text)
    assert re.search(r"Clearly below grpo, after Holm's correction: w_reinforce \(.*?\]\)\.\*\*", text)
    assert "Of 2 claims stated before any run: 1 supported and 1 inconclusive." in text
    loaded = load_study(study)
    assert dynamic_arms(loaded) == ["dynamo"]
    assert f"in {100 * uneven_share(loaded)['dynamo']:.0f} % of the steps of dynamo:" in text
    assert float(uneven_share(loaded)["grpo"]) == 0.0


def test_the_figure_is_copied_beside_the_readme(study: Path, readme: Path) -> None:
    write_report(study, readme)
    copied = readme.parent / "docs" / "images" / "final_accuracy.png"
    assert copied.read_bytes() == (study / "figures" / "final_accuracy.png").read_bytes()


def test_time_is_added_up_where_no_end_is_recorded(study: Path, readme: Path) -> None:
    write_report(study, readme)
    text = words(block(readme.read_text(encoding="utf-8"), "time"))
    assert (
        text
        == "16 runs of 800,000 generated tokens with their evaluation: 16 min, added up over the runs (device: cpu)."
    )


def test_time_together_leaves_out_a_night_between_two_starts(study: Path, readme: Path, tmp_path: Path) -> None:
    folder = tmp_path / "timed"
    shutil.copytree(study, folder)
    # Two at a time, 60 s each, the second half twelve hours after the first.
    for place, cell in enumerate(sorted((folder / "cells").iterdir())):
        end = 1_000.0 + 60 * (1 + place // 2) + (12 * 3600 if place >= 8 else 0)
        record = json.loads((cell / "progress.json").read_text()) | {"updated_at": end}
        (cell / "progress.json").write_text(json.dumps(record))
    write_report(folder, readme)
    text = words(block(readme.read_text(encoding="utf-8"), "time"))
    assert f"took {duration(8 * 60)}, 2.0 at a time; added up over the runs, {duration(16 * 60)} (device: cpu)." in text


def test_an_unfinished_study_says_so_in_the_readme(made: ModuleType, tmp_path: Path, readme: Path) -> None:
    gone = {("rloo", 0): "missing", ("dynamo", 1): "interrupted"}
    write_report(make(made, tmp_path / "cut", seeds=(0, 1), items=6, steps=4, unfinished=gone), readme)
    text = words(readme.read_text(encoding="utf-8"))
    assert "rloo seed 0 (it never ran)" in text
    assert "dynamo seed 1" in text
    assert "6 of 8 runs of 800,000 generated tokens" in text


def test_one_seed_without_its_reference_still_makes_a_readme(made: ModuleType, tmp_path: Path, readme: Path) -> None:
    gone = {("grpo", 0): "missing"}
    write_report(make(made, tmp_path / "one", seeds=(0,), items=6, steps=4, unfinished=gone), readme)
    text = readme.read_text(encoding="utf-8")
    assert "There is one seed" in words(text)
    assert "Clearly" not in text
    assert outside(text) == outside(TEXT)


@pytest.mark.parametrize(
    "text",
    [
        "no marks",
        TEXT.replace("<!-- /time -->", ""),
        TEXT.replace("<!-- main table -->", "<!-- main_table -->"),
        TEXT + TEXT,
        TEXT.replace("<!-- time -->", "X").replace("<!-- /time -->", "<!-- time -->").replace("X", "<!-- /time -->"),
    ],
)
def test_a_readme_without_its_marks_is_refused_untouched(study: Path, readme: Path, text: str) -> None:
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"README\.md: not exactly one <!-- .* -->"):
        write_report(study, readme)
    assert readme.read_text(encoding="utf-8") == text
    assert not (readme.parent / "docs").exists()


def test_a_readme_that_is_not_there_is_refused(study: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--readme = .*no such file"):
        write_report(study, tmp_path / "absent.md")


def test_the_projects_own_readme_has_its_marks() -> None:
    own = Path(__file__).parent.parent / "README.md"
    assert "](docs/images/final_accuracy.png)" in read_marked(own)
