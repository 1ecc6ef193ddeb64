"""A package with one method, ready to install: the skeleton that `rolloutbench new-method` writes."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from benchmark.errors import InputError
from benchmark.registry import names

NAME = r"[a-z][a-z0-9_]{1,39}"
TEMPLATES = Path(__file__).parent / "templates"


def write_package(name: str, folder: Path) -> list[Path]:
    """Write the package of a method called `name` into `folder`, which must not exist or be empty.

    Returns:
        The files: ``pyproject.toml``, ``<name>.py``, ``test_<name>.py``, ``study.yaml``.

    Raises:
        InputError: the name is no identifier in lower case or is taken, or the folder holds something.
    """
    if keyword.iskeyword(name):
        raise InputError("is a Python keyword", key="NAME", value=name, remedy=f"Take another, such as {name}_method")
    if not re.fullmatch(NAME, name):
        near = re.sub(r"\W+", "_", name.lower(), flags=re.ASCII)
        remedy = "Take 2 to 40 lower-case letters, digits and underscores, a letter first"
        remedy = f"Did you mean {near}? {remedy}" if re.fullmatch(NAME, near) else remedy
        raise InputError("is not a name for a module", key="NAME", value=name, remedy=remedy)
    if name in names():
        raise InputError("an installed arm has this name", key="NAME", value=name, remedy="Choose another")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("is there already", file=folder, remedy="Give another folder with --out")
    words = name.split("_")
    known = {
        "name": name,
        "cls": "".join(word.capitalize() for word in words),
        "distribution": name.replace("_", "-").strip("-"),
        "title": " ".join(words).strip().capitalize(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "pyproject.toml.in": "pyproject.toml",
        "method.py.in": f"{name}.py",
        "test.py.in": f"test_{name}.py",
        "study.yaml.in": "study.yaml",
    }
    for template, target in made.items():
        text = Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(known)
        (folder / target).write_text(text, encoding="utf-8")
    return [folder / target for target in made.values()]
