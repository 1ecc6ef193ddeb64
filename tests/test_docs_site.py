"""The documentation: what its site makes by itself, and links that lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from benchmark import registry

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs", reason="`nox -s docs` has what the site needs")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(path: Path) -> None:
    targets = [link for link in LINK.findall(path.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in targets if not (path.parent / link).exists()] == []


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_load(text)["nav"]
    found = set(re.findall(r"[\w/]+\.md", str(nav)))
    assert found == {path.relative_to(ROOT / "docs").as_posix() for path in PAGES} | {"index.md"}


def test_the_site_asks_nobody_for_anything() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["theme"]["font"] is False
    assert settings["use_directory_urls"] is False
    assert all((ROOT / "docs" / file).is_file() for file in settings["extra_css"])
    assert not {"extra_javascript", "extra"} & set(settings)
    assert [next(iter(p)) if isinstance(p, dict) else p for p in settings["plugins"]] == ["search", "mkdocstrings"]


def test_every_arm_has_a_page_with_what_its_class_says(hooks: ModuleType) -> None:
    pages = hooks.arm_pages()
    assert list(pages) == list(hooks.entry_points())
    for name, text in pages.items():
        if name not in registry.names():  # an installed older copy
            continue
        cls = registry.load(name)
        assert cls.faithful_to in text
        assert all(change in text for change in cls.changes)
        shown = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
        assert set(shown) == {field.name for field in dataclasses.fields(cls) if field.init}
        assert f"::: {cls.__module__}.{cls.__qualname__}" in text
    assert "https://arxiv.org/abs/2402.03300" in pages["grpo"]
    assert "A_ij = (r_ij - mean_i) / (std_i + epsilon)" in pages["grpo"]
    assert re.search(r"^\| `epsilon` \| `1e-0?6` \|$", pages["dynamo_allocation"], flags=re.MULTILINE), "inherited"


def test_the_front_page_is_the_readme_with_links_that_hold(hooks: ModuleType) -> None:
    text = hooks.front_page()
    assert "](docs/" not in text
    assert [link for link in LINK.findall(text) if "://" not in link and not (ROOT / "docs" / link).exists()] == []
