"""The documentation: what its site makes by itself, and links that lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import yaml

from benchmark import registry
from benchmark.method import Method, Need

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def arms() -> Iterator[ModuleType]:
    """What makes the arms' pages; it imports its neighbours by their names alone, as mkdocs lets it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield importlib.import_module("arms")


@pytest.fixture(scope="module")
def docstrings(arms: ModuleType) -> ModuleType:
    return importlib.import_module("docstrings")


@pytest.fixture(scope="module")
def hooks(arms: ModuleType) -> ModuleType:
    pytest.importorskip("mkdocs", reason="`nox -s docs` has what the site needs")
    return importlib.import_module("hooks")


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a method, nested ones after the field that holds them."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        yield prefix + field.name, inner
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{prefix}{field.name}.")


def rows(page: str) -> list[list[str]]:
    """Cells of a page's tables of parameters."""
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]


def shown(value: Any, cell: str) -> bool:
    """Whether a cell says this default."""
    word = cell.strip("`")
    if dataclasses.is_dataclass(value):
        return word == type(value).__name__
    return word == value if isinstance(value, str) else bool(ast.literal_eval(word) == value)


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


def test_every_arm_has_a_page_with_what_its_class_says(arms: ModuleType) -> None:
    pages = arms.arm_pages()
    assert list(pages) == list(arms.entry_points())
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
    epsilon = re.search(r"^\| `epsilon` \| `1e-0?6` \| .+ \| (.+) \|$", pages["dynamo_allocation"], flags=re.MULTILINE)
    assert epsilon is not None
    assert epsilon[1] == "[`grpo`](grpo.md)", "inherited"


def test_every_parameter_of_every_arm_is_there_once_with_its_default_and_a_meaning(arms: ModuleType) -> None:
    for name, text in arms.arm_pages().items():
        if name not in registry.names():
            continue
        fields, table = dict(leaves(registry.load(name)())), rows(text)
        assert sorted(row[0].strip("`") for row in table) == sorted(fields), name
        for row in table:
            assert shown(fields[row[0].strip("`")], row[1]), f"{name}: {row}"
            assert len(row) > 2, f"{name}: {row}"
            assert re.search(r"\w", row[2]), f"{name}: {row}"
    assert arms.unexplained() == []


def test_no_page_of_an_arm_shows_a_section_of_a_docstring_as_text(arms: ModuleType) -> None:
    pages = arms.arm_pages()
    leaked = re.compile(r"^\s*(?:Args|Attributes|Raises|Returns):", re.MULTILINE)
    assert [name for name, text in pages.items() if leaked.search(text)] == []
    assert "\n| `alpha` | `0.001` |" in pages["gvm"]
    assert "\n| `kl` | `0.0001` | upper bound of m_F" in pages["capo"]


def test_a_table_says_what_an_arm_sets_and_from_where_it_has_the_rest(arms: ModuleType) -> None:
    table = {row[0].strip("`"): row for row in rows(arms.arm_pages()["dynamo_allocation"])}
    assert table["compensation.alpha"][1:] == [
        "`0.0`",
        "largest relative boost, that of the most confident token; 0 is off",
    ]
    assert table["allocation.n_low"][3] == "[`dynamo`](dynamo.md)"
    assert table["loss.prompt_weight"][1] == "`equal`"
    assert table["loss.prompt_weight"][3] == "[`dynamo`](dynamo.md)"
    assert table["loss.clip_low"][3] == "[`Method`](../api/methods.md#benchmark.method.Method)"
    gradient = {row[0].strip("`"): row for row in rows(arms.arm_pages()["dynamo_gradient"])}
    assert len(gradient["allocation.length_exponent"]) == 3, "its own"
    assert gradient["allocation.n_low"][3] == "[`dynamo`](dynamo.md)", "of a class that this arm replaces by a subclass"


def test_parameters_that_share_a_line_are_told_apart(docstrings: ModuleType) -> None:
    text = """Bounds.

Attributes:
    low, high: bounds of m_H, e.g. ``x: y``. kl: bound of m_F; ``None``: no
        bound.
    rate: of all. Not: of some

More: prose.
"""
    assert docstrings.meanings(text.replace("Not:", "not:")) == {
        "low": "bounds of m_H, e.g. ``x: y``.",
        "high": "bounds of m_H, e.g. ``x: y``.",
        "kl": "bound of m_F; ``None``: no bound.",
        "rate": "of all.",
        "not": "of some",
    }
    assert docstrings.description(text) == "Bounds.\n\nMore: prose."
    spread = docstrings.spread(
        "Sums.\n\nArgs:\n    a, b: terms. c: factor.\n    Both are finite.\n\nReturns:\n    The sum."
    )
    expected = ["a: terms.", "b: terms.", "c: factor. Both are finite."]
    assert spread == "\n    ".join(["Sums.\n\nArgs:", *expected]) + "\n\nReturns:\n    The sum."
    assert docstrings.description("Sum.\n\nn_i = 1,   all i\n\nMean.") == "Sum.\n\n    n_i = 1,   all i\n\nMean."


def test_what_is_said_of_a_parameter_is_said_of_a_field(arms: ModuleType, docstrings: ModuleType) -> None:
    said = tomllib.loads((ROOT / "docs" / "meanings.toml").read_text(encoding="utf-8"))
    for path, its in said.items():
        module, _, name = path.rpartition(".")
        fields = {field.name for field in dataclasses.fields(getattr(importlib.import_module(module), name))}
        assert set(its) <= fields, path
    for name in registry.names():
        for cls in registry.load(name).__mro__:
            if cls.__module__.startswith(("baselines.", "methods.")):
                fields = {field.name for field in dataclasses.fields(cls)}
                assert set(docstrings.meanings("\n" + (inspect.getdoc(cls) or ""))) <= fields, cls


def test_warnings_of_docstrings_end_the_build() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    options = next(plugin for plugin in settings["plugins"] if "mkdocstrings" in plugin)["mkdocstrings"]
    assert settings["strict"] is True
    assert "warnings" not in str(options)


def test_the_field_says_of_every_arm_what_it_was_written_from(arms: ModuleType) -> None:
    text = (ROOT / "docs" / "field.md").read_text(encoding="utf-8")
    table = rows(text.split("\n## ")[0])
    said = {row[0].strip("`"): row[2] for row in table}
    labels = {"dppo_tv_top_8": "dppo_tv"}
    known = {name: arms.evidence(registry.load(labels.get(name, name)).faithful_to) for name in said}
    assert said == known
    assert len(said) == 38
    assert "\n## Evidence\n" in text


def test_every_decision_of_a_method_is_explained_with_an_arm_that_takes_it() -> None:
    text = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8").split("\n## ")[0]
    table = rows(text)
    names = [re.findall(r"\w+", row[0])[0] for row in table]
    decisions = {name for name in vars(Method) if not name.startswith("_")} | {"loss"}
    described = {"family", "kind", "changes", "reference", "faithful_to", "engine", "exchangeable", "modulates"}
    assert set(names) == decisions - described
    needed = set()
    for name, row in zip(names, table, strict=True):
        cls = registry.load(row[3].strip("`"))
        if name == "loss":
            assert cls().loss != Method().loss
        elif name == "needs":
            need = re.findall(r"\w+", row[0])[1]
            needed.add(need)
            assert need in cls().needs, row
        else:
            assert getattr(cls, name) is not getattr(Method, name), row
    assert needed == set(get_args(Need))


def test_the_front_page_is_the_readme_with_links_that_hold(hooks: ModuleType) -> None:
    text = hooks.front_page()
    assert "](docs/" not in text
    assert [link for link in LINK.findall(text) if "://" not in link and not (ROOT / "docs" / link).exists()] == []


def test_lines_of_a_formula_wrap_and_are_not_offered_to_copy(hooks: ModuleType) -> None:
    block = '<div class="highlight"><pre><span></span><code>a = b,    c\n  d &lt; e\n</code></pre></div>'
    html = hooks.on_page_content(f"<p>{block}</p>", page=None, config=None, files=None)
    assert html == (
        '<p><div class="highlight formula no-copy"><pre><code>'
        '<span style="padding-left: 4ch; text-indent: -4ch"><span>a = b,</span>    <span>c</span></span>'
        '<span style="padding-left: 6ch; text-indent: -6ch">  <span>d &lt; e</span></span>'
        "</code></pre></div></p>"
    )
    coloured = block.replace("a = b", '<span class="n">a</span> = b')
    assert hooks.on_page_content(coloured, page=None, config=None, files=None) == coloured
