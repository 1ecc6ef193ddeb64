"""The documentation site in a real browser: no code and no formula is cut, on a desk or on a phone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
CUT = """() => {
    document.querySelectorAll('details').forEach(details => { details.open = true; });
    const blocks = [...document.querySelectorAll('pre, pre > code')];
    return {
        blocks: blocks.length,
        cut: blocks.filter(block => block.scrollWidth > block.clientWidth).map(block => block.textContent),
        buttons: document.querySelectorAll('.formula .md-code__button').length,
        offered: document.querySelectorAll('.md-code__button').length,
        beyond: document.documentElement.scrollWidth - window.innerWidth,
    };
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra `docs` has what the site needs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("width", [1280, 390])
def test_no_block_is_cut_and_no_formula_has_a_button(site: Path, browser: Any, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    cut, buttons, beyond, blocks, offered = dict[str, list[str]](), 0, dict[str, int](), 0, 0
    for path in sorted(site.rglob("*.html")):
        page.goto(path.as_uri())
        found = page.evaluate(CUT)
        name = path.relative_to(site).as_posix()
        cut |= {name: found["cut"]} if found["cut"] else {}
        beyond |= {name: found["beyond"]} if found["beyond"] > 0 else {}
        blocks, buttons, offered = blocks + found["blocks"], buttons + found["buttons"], offered + found["offered"]
    page.close()
    assert cut == {}
    assert beyond == {}
    assert buttons == 0
    assert offered > 0
    assert blocks > 400
