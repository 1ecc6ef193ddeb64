"""What a run records of the code that made it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmark.source import code_of, code_state, method_changed


def test_the_code_of_a_method_is_its_files_and_those_they_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own file, its parent's and a helper's count; another module of its package and the harness do not."""
    package = tmp_path / "edited_methods"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("def half(x):\n    return x / 2\n")
    (package / "parent.py").write_text(
        "from benchmark.method import Method\nfrom edited_methods.helper import half\n"
        "\n\nclass Parent(Method):\n    pass\n"
    )
    (package / "child.py").write_text("from edited_methods.parent import Parent\n\nclass Child(Parent):\n    pass\n")
    (package / "stranger.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    child = importlib.import_module("edited_methods.child").Child
    importlib.import_module("edited_methods.stranger")
    before = code_of(child)
    assert before == code_of(child)
    assert before.items() >= code_state().items()
    for name, counts in (("child", True), ("parent", True), ("helper", True), ("stranger", False)):
        path = package / f"{name}.py"
        kept = path.read_text()
        path.write_text(kept + "# edited\n")
        assert (code_of(child) != before) == counts, name
        assert method_changed({"code": [before]}, child) == counts, name
        path.write_text(kept)
    assert not method_changed({}, child)
    assert not method_changed({"code": [code_state()]}, child)  # of a version that kept no hash of the method
