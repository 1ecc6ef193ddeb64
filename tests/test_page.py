"""The HTML report as text: what it holds, that hostile names and texts stay text, that it needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
from jinja2.utils import htmlsafe_json_dumps

from analysis import page_traces, plotting
from analysis.claims import SUPPORTED, Answer
from analysis.comparisons import Difference
from analysis.page import claim_view, sort_key
from analysis.page_figures import _to_oklab, inline_svg, on_dark, theme_css
from analysis.page_traces import trace_data
from analysis.palette import ARMS, SPARE
from analysis.report import write_report
from analysis.results import load_study

HOSTILE = "</script><script>window.hacked = 1</script>"
ATTRIBUTE = '" onmouseover="window.hacked = 2" x=\''
MARKUP = "<img src=x onerror='window.hacked = 3'>"
ENTITY = "&lt;b&gt; & {{ 7 * 7 }} {% raw %} ]]> -->"
CLAIM = {"id": MARKUP, "text": f"It is better {HOSTILE}", "arm": MARKUP, "reference": "grpo", "metric": "pass_at_1"}
LIMIT = 5_000_000


@pytest.fixture(scope="module")
def made() -> ModuleType:
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("synthetic_results")


@pytest.fixture(scope="module")
def study(made: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose arms, families, claims and problems are all out to run a script."""
    patch = pytest.MonkeyPatch()
    patch.setattr(plotting, "FORMATS", ("svg",))
    recipe = made.Recipe(
        arms={"grpo": 0.0, "dynamo": 0.1, HOSTILE: 0.1, ATTRIBUTE: 0.0, MARKUP: -0.1},
        seeds=(0, 1),
        families=("sums", MARKUP),
        items=6,
        points=3,
        steps=4,
        claims=[CLAIM],
        traced=(HOSTILE, ATTRIBUTE, MARKUP, ENTITY),
    )
    folder: Path = made.make_study(tmp_path_factory.mktemp("results") / "hostile", recipe)
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"question": HOSTILE, "study": f"study {MARKUP}"}))
    write_report(folder)
    patch.undo()
    return folder


class Reader(HTMLParser):
    """Collects elements, attributes and visible text as a browser's tokeniser would see them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._inside = tag if tag in ("script", "style") else self._inside
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text.append(data)


def read(folder: Path) -> Reader:
    reader = Reader()
    reader.feed((folder / "index.html").read_text(encoding="utf-8"))
    return reader


def test_hostile_names_and_texts_stay_text(study: Path) -> None:
    page = read(study)
    assert len(page.scripts) == 2  # the data, and the page's own
    assert json.loads(page.scripts[0])["runs"][2]["arm"] == HOSTILE
    assert {row["prompt"] for row in json.loads(page.scripts[0])["runs"][0]["rows"]} == {
        HOSTILE,
        ATTRIBUTE,
        MARKUP,
        ENTITY,
    }
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []
    assert [tag for tag, _ in page.elements if tag in ("img", "iframe", "object", "b")] == []
    text = "".join(page.text)
    for shown in (HOSTILE, ATTRIBUTE, MARKUP):
        assert shown in text
    assert f"It is better {HOSTILE}" in text


def test_only_the_pages_own_script_may_run_and_nothing_be_fetched(study: Path) -> None:
    page = read(study)
    policies = [a["content"] for tag, a in page.elements if tag == "meta" and "Policy" in a.get("http-equiv", "")]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    assert f"script-src 'sha256-{digest}';" in policies[0]


def test_the_page_is_one_file(study: Path) -> None:
    for tag, attributes in read(study).elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            target = attributes.get(name, "#")
            elsewhere = tag == "a" and target.startswith("https://arxiv.org/abs/")  # followed by a click only
            assert target.startswith(("#", "data:")) or elsewhere, (tag, target)
    text = (study / "index.html").read_text()
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert len(text.encode()) < LIMIT


def test_ids_are_unique_and_every_link_within_the_page_arrives(study: Path) -> None:
    elements = read(study).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    inner = {a["href"][1:] for _, a in elements if a.get("href", "").startswith("#")}
    assert len(inner) > 20
    assert inner <= set(ids)
    used = set(re.findall(r"url\(#([^)]+)\)", (study / "index.html").read_text()))
    assert used
    assert used <= set(ids)


def test_tables_can_be_read_by_a_screen_reader(study: Path) -> None:
    elements = read(study).elements
    tables = sum(tag == "table" for tag, _ in elements)
    assert tables >= 9
    assert sum(tag == "caption" for tag, _ in elements) == tables
    heads = [attributes for tag, attributes in elements if tag == "th"]
    assert {attributes["scope"] for attributes in heads} == {"col", "colgroup", "row"}
    assert all(a["aria-sort"] == "none" for a in heads if a["scope"] == "col")
    assert sum(tag == "button" and a.get("class") == "sort" for tag, a in elements) == sum(
        a["scope"] == "col" for a in heads
    )
    assert all(a.get("aria-label") for tag, a in elements if a.get("role") in ("img", "region"))


def test_tables_hold_what_the_report_says(study: Path) -> None:
    page, report = "".join(read(study).text), (study / "REPORT.md").read_text()
    rows = re.findall(r"^\| dynamo \|(.+)\|$", report, re.M)
    assert len(rows) >= 8
    for row in rows:
        for cell in row.split("|"):
            assert cell.strip().strip("*").rstrip("†").strip("*").replace("\\", "") in page
    for heading in ("Spend audit", "Methods", "Provenance", "How the numbers were made"):
        assert heading in page
    assert "10 of 10 runs ended exactly at the budget." in page
    assert "arXiv 2602.19208" in page
    assert "rolloutbench study" in page


def test_downloads_are_the_files_of_the_tables(study: Path) -> None:
    links = {a["download"]: a["href"] for _, a in read(study).elements if "download" in a}
    for name in ("main_table.csv", "main_table.tex", "spend.csv", "claims.tex"):
        content = base64.b64decode(links[name].partition("base64,")[2])
        assert content == (study / "tables" / name).read_bytes()


def test_a_method_that_is_not_installed_is_named(study: Path) -> None:
    assert "method = '</script>" in "".join(read(study).text)  # the arm's own name, since it has no configuration


def test_a_study_without_traces_says_so(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plotting, "FORMATS", ("svg",))
    folder = tmp_path / "bare"
    shutil.copytree(study, folder)
    for file in folder.glob("cells/*/traces.jsonl"):
        file.unlink()
    write_report(folder)
    assert "kept no rollouts" in "".join(read(folder).text)
    assert len(read(folder).scripts) == 1


def test_traces_are_those_of_one_seed_with_counts_of_all(study: Path) -> None:
    loaded = load_study(study)
    data = trace_data(loaded)
    assert data is not None
    assert [run["arm"] for run in data["runs"]] == loaded.arms
    assert {run["seed"] for run in data["runs"]} == {0}
    final = loaded.points[loaded.points["final"]]
    for run in data["runs"]:
        for row in run["rows"]:
            if row["phase"] == "training":
                assert (row["all_n"], row["all_c"]) == (0, 0)
                continue
            own = loaded.evaluations[
                (loaded.evaluations["arm"] == run["arm"]) & (loaded.evaluations["item"] == row["item"])
            ]
            own = own.merge(final[["arm", "seed", "point"]])
            assert (row["all_n"], row["all_c"]) == (own["n"].sum(), own["c"].sum())
            assert row["all_n"] == 2 * 64


@pytest.mark.parametrize("limit", [80_000, 30_000, 14_000])
def test_traces_are_bounded_by_showing_less_of_every_arm(study: Path, limit: int) -> None:
    whole, part = trace_data(load_study(study)), trace_data(load_study(study), limit)
    assert whole is not None
    assert part is not None
    assert len(htmlsafe_json_dumps(part, separators=(",", ":"))) <= limit
    assert len(htmlsafe_json_dumps(whole, separators=(",", ":"))) > limit
    assert [run["arm"] for run in part["runs"]] == [run["arm"] for run in whole["runs"]]
    assert {(row["phase"], row["step"]) for run in part["runs"] for row in run["rows"]} == {
        (row["phase"], row["step"]) for run in whole["runs"] for row in run["rows"]
    }
    assert all(len(row["rollouts"]) == part["rollouts"] for run in part["runs"] for row in run["rows"])
    assert trace_data(load_study(study), 100) is None
    assert page_traces.LIMIT <= LIMIT / 2


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("53.2 ± 4.5", 53.2),
        ("\N{MINUS SIGN}2.0", -2.0),
        ("+0.4", 0.4),
        ("[\N{MINUS SIGN}1.5, +1.1]", -1.5),
        ("320,000", 320_000),
        ("1.25M", 1.25e6),
        ("717G", 717e9),
        ("52.9 (2)", 52.9),
        ("16,487 (100.0 %)", 16_487),
        ("0.79×", 0.79),
        ("not reached", float("inf")),
        ("0.007", 0.007),
    ],
)
def test_sort_keys_are_the_numbers_of_the_cells(text: str, key: float) -> None:
    assert float(sort_key(text)) == pytest.approx(key)


def test_cells_without_a_number_have_no_key_and_small_p_come_first() -> None:
    assert sort_key("\N{EM DASH}") == sort_key("") == ""
    assert float(sort_key("<0.001")) < float(sort_key("0.001"))


def test_a_claims_strip_is_drawn_to_scale() -> None:
    d = Difference("a", "b", "pass_at_1", "average", 5, 0.02, -0.01, 0.04, 0.1, 0.1, 0.01, 0.01)
    view = claim_view(Answer("id", "text", "a", "b", "pass_at_1", 0.01, d, 0.1, SUPPORTED, ""))
    strip = {name: float(place) - 50 for name, place in view["strip"].items()}
    assert 0 < strip["high"] < 50
    assert strip["low"] / strip["high"] == pytest.approx(-0.25, rel=1e-2)
    assert strip["mean"] / strip["high"] == pytest.approx(0.5, rel=1e-2)
    assert strip["needed"] / strip["high"] == pytest.approx(0.25, rel=1e-2)
    assert claim_view(Answer("id", "text", "a", "b", "pass_at_1", 0.0, None))["strip"] is None


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
              for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))]  # fmt: skip
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_arm_can_be_seen_on_dark_paper_and_keeps_its_hue() -> None:
    paper = luminance("#17191b")
    for style in (*ARMS.values(), *SPARE):
        shown = on_dark(style.colour)
        assert (luminance(shown) + 0.05) / (paper + 0.05) >= 3  # WCAG 2 for graphics
        (_, a, b), (_, x, y) = _to_oklab(style.colour), _to_oklab(shown)
        assert a * x + b * y >= 0
    assert luminance(on_dark("#000000")) > 0.6
    assert luminance(on_dark("#e4e4e4")) < 0.06
    assert _to_oklab("#ffffff") == pytest.approx((1.0, 0.0, 0.0), abs=1e-4)


def test_figures_keep_their_shapes_and_lose_what_is_foreign(study: Path) -> None:
    source = (study / "figures" / "final_accuracy.svg").read_text()
    drawn, colours = inline_svg(study / "figures" / "final_accuracy.svg")
    assert drawn.count("<path") == source.count("<path")
    assert drawn.count("<use") == source.count("<use")
    assert drawn.startswith("<svg viewBox=")
    for gone in ("<!--", "<metadata", "<style", "xlink", "<?xml", "#262626"):
        assert gone not in drawn
    assert {"#262626", "#ffffff", "#d55e00"} <= colours
    css = theme_css(colours)
    assert all(f"--c{colour[1:]}:" in css for colour in colours)
