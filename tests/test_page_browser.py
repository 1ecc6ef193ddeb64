"""The HTML report in a real browser: a reader sorts, opens problems and changes colours; nothing hostile runs."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from analysis.report import write_report

pytestmark = pytest.mark.slow
HOSTILE = "</script><script>window.hacked = 1</script>"
ATTRIBUTE = '"><img src=x onerror="window.hacked = 2">'
PROBLEM = "Compute 6*7."


@pytest.fixture(scope="module")
def made() -> ModuleType:
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("synthetic_results")


@pytest.fixture(scope="module")
def study(made: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = made.Recipe(
        arms={"grpo": 0.0, "dynamo": 0.1, "w_reinforce": -0.1, HOSTILE: 0.02},
        seeds=(0, 1, 2),
        families=("sums", ATTRIBUTE),
        items=8,
        points=3,
        steps=6,
        claims=[{"id": "c", "text": HOSTILE, "arm": "dynamo", "reference": "grpo", "metric": "pass_at_1"}],
        traced=(PROBLEM, HOSTILE, ATTRIBUTE),
    )
    folder: Path = made.make_study(tmp_path_factory.mktemp("results") / "browsed", recipe)
    taken_over = next((folder / "cells").glob("grpo-*")) / "origin.json"
    taken_over.write_text(json.dumps({"folder": "/a-folder-whose-name-is-wider-than-a-phone" * 3}), encoding="utf-8")
    write_report(folder)
    return folder


@dataclass
class Visit:
    """A page and what it did unasked."""

    page: Any
    said: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)


def visit(browser: Any, study: Path, **settings: Any) -> Visit:
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | settings)
    seen = Visit(context.new_page())
    seen.page.on("console", lambda message: seen.said.append(message.text))
    seen.page.on("pageerror", lambda error: seen.said.append(str(error)))
    seen.page.on("dialog", lambda dialog: (seen.said.append(dialog.message), dialog.dismiss()))
    seen.page.on("request", lambda request: seen.requested.append(request.url))
    seen.page.goto((study / "index.html").as_uri())
    return seen


def leave(seen: Visit, study: Path) -> None:
    """What holds after every visit: silence, no request but the page's own, no script of others."""
    assert seen.page.evaluate("window.hacked") is None
    assert seen.said == []
    outside = [url for url in seen.requested if not url.startswith("data:")]
    assert outside == [(study / "index.html").as_uri()]
    seen.page.context.close()


def column(page: Any, table: str, place: int) -> list[str]:
    texts: list[str] = page.locator(f"#table-{table} tbody tr > :nth-child({place})").all_inner_texts()
    return texts


def test_tables_sort_by_mouse_and_by_keyboard(browser: Any, study: Path) -> None:
    seen = visit(browser, study)
    page = seen.page
    before = column(page, "main_table", 1)
    head = page.locator("#table-main_table thead tr:last-child th").nth(1)
    orders = []
    for _ in range(3):
        head.locator("button").click()
        orders.append(head.get_attribute("aria-sort"))
        numbers = [float(text.split(" ")[0]) for text in column(page, "main_table", 2)]
        if orders[-1] != "none":
            assert numbers == sorted(numbers, reverse=orders[-1] == "descending")
    assert orders == ["descending", "ascending", "none"]
    assert column(page, "main_table", 1) == before
    name = page.locator("#table-main_table thead tr:last-child th").first
    name.locator("button").focus()
    page.keyboard.press("Enter")
    assert name.get_attribute("aria-sort") == "ascending"
    assert head.get_attribute("aria-sort") == "none"
    arms = column(page, "main_table", 1)
    assert sorted(arms, key=str.casefold) == arms != before
    assert any(HOSTILE in arm for arm in arms)
    leave(seen, study)


def test_values_that_are_missing_stay_last(browser: Any, study: Path) -> None:
    seen = visit(browser, study)
    table = seen.page.locator("#table-cost_to_target")
    places = [i for i, text in enumerate(table.locator("thead th").all_inner_texts()) if "of the budget" in text]
    assert "\N{EM DASH}" in column(seen.page, "cost_to_target", places[0] + 1)
    for _ in range(2):
        table.locator("thead th").nth(places[0]).locator("button").click()
        values = column(seen.page, "cost_to_target", places[0] + 1)
        missing = [value == "\N{EM DASH}" for value in values]
        assert missing == sorted(missing)
    leave(seen, study)


def test_a_problem_can_be_opened_and_its_tokens_coloured(browser: Any, study: Path) -> None:
    seen = visit(browser, study)
    page = seen.page
    page.locator("#problems button", has_text=PROBLEM).click()
    assert page.locator("#problem h3").inner_text() == PROBLEM
    answers = page.locator(".answers li")
    assert answers.count() == 8
    assert answers.first.locator(".is-correct").inner_text() == "✓ correct"
    assert answers.nth(1).locator(".is-not").inner_text() == "✗ wrong"
    assert answers.first.locator(".tokens").inner_text() == r"42\boxed{42}<end>"
    backgrounds = {}
    for channel in ("entropy", "advantage", "factor", "surprisal"):
        page.check(f"input[name=channel][value={channel}]", force=True)
        spans = page.locator(".answers li").first.locator(".tokens span")
        backgrounds[channel] = spans.evaluate_all("all => all.map(s => getComputedStyle(s).backgroundColor)")
    assert len({tuple(colours) for colours in backgrounds.values()}) == 4
    # One colour for the whole answer would say nothing: tokens differ by their own numbers.
    assert all(len(set(colours)) > 2 for colours in backgrounds.values())
    leave(seen, study)


def test_the_readout_gives_the_numbers_of_the_record(browser: Any, study: Path) -> None:
    seen = visit(browser, study)
    page = seen.page
    page.select_option("#choice-arm", label="dynamo")
    page.check("input[name=moment][value=last]", force=True)
    page.locator("#problems button", has_text=PROBLEM).click()
    (cell,) = (study / "cells").glob("dynamo-s0-*")
    rows = [json.loads(line) for line in (cell / "traces.jsonl").read_text().splitlines()]
    rollout = next(r for r in rows if (r["step"], r["phase"], r["prompt"]) == (5, "training", PROBLEM))["rollouts"][0]
    page.locator(".answers li").first.locator(".tokens").focus()
    for place in range(2):
        page.keyboard.press("ArrowRight")
        told = page.locator("#readout").inner_text()
        assert told.startswith(rollout["tokens"][place])
        for name, word in (("entropy", "entropy"), ("advantage", "advantage"), ("factor", "factor")):
            assert f"{word} {float(f'{rollout[name][place]:.3g}'):g}" in told
    page.locator(".answers li").first.locator(".tokens span").nth(4).hover()
    assert page.locator("#readout b").inner_text() == "}"
    leave(seen, study)


def test_moments_offer_only_what_was_recorded(browser: Any, study: Path) -> None:
    seen = visit(browser, study)
    page = seen.page
    page.check("input[name=channel][value=factor]", force=True)
    page.check("input[name=moment][value=final]", force=True)
    assert page.locator("input[name=channel][value=factor]").is_disabled()
    assert page.locator("input[name=channel][value=entropy]").is_checked()
    assert "over all seeds" in page.locator("#problem .about").inner_text()
    page.locator(".others button", has_text="w_reinforce").click()
    assert "w_reinforce, seed 0, after 6 steps" in page.locator("#problem .about").inner_text()
    leave(seen, study)


def test_hostile_names_and_problems_are_shown_and_do_nothing(browser: Any, study: Path) -> None:
    seen = visit(browser, study)
    page = seen.page
    page.select_option("#choice-arm", label=HOSTILE)
    page.locator("#problems .text", has_text="onerror").click()
    assert page.locator("#problem h3").inner_text() == ATTRIBUTE
    assert ATTRIBUTE in page.locator(".answers li").nth(1).locator(".tokens").inner_text()
    page.locator("#problems .text", has_text="window.hacked = 1").click()
    assert page.locator("#problem h3").inner_text() == HOSTILE
    assert page.locator("#claims .claim").first.inner_text() == HOSTILE
    assert page.locator("img").count() == 0
    leave(seen, study)


def test_the_policy_stops_a_script_that_got_in(browser: Any, study: Path, tmp_path: Path) -> None:
    """A second line behind the escaping: a page with a foreign script does not run it, and cannot send anything."""
    text = (study / "index.html").read_text(encoding="utf-8")
    foreign = "<script>window.hacked = 1</script><img src='http://127.0.0.1:9/x' onerror='window.hacked = 2'>"
    (tmp_path / "index.html").write_text(text.replace("<h2 id=", foreign + "<h2 id=", 1), encoding="utf-8")
    seen = visit(browser, tmp_path)
    assert seen.page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in line for line in seen.said)
    assert seen.page.locator("#problem h3").count() == 1  # its own script still runs
    seen.page.context.close()


@pytest.mark.parametrize("width", [1280, 390, 320])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_every_screen(browser: Any, study: Path, width: int, scheme: str) -> None:
    seen = visit(browser, study, viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = seen.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    bright = [sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) for colour in (ink, paper)]
    assert (bright[0] < bright[1]) == (scheme == "light")
    assert abs(bright[0] - bright[1]) > 500
    drawn = page.locator(".plot svg")
    assert drawn.count() >= 6
    assert all(box["height"] > 100 for box in (drawn.nth(i).bounding_box() for i in range(drawn.count())))
    leave(seen, study)


def test_without_scripts_the_page_still_reads(browser: Any, study: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((study / "index.html").as_uri())
    assert page.locator("#table-main_table tbody tr").count() == 4
    assert page.locator("noscript").inner_text().startswith("This part needs JavaScript")
    context.close()
