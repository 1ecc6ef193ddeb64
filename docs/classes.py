"""The parameters of an arm, read from source text: the fields of its dataclass and of those nested in it."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from docstrings import description, meanings

ROOT = Path(__file__).parent.parent
SAID_HERE = Path(__file__).parent / "meanings.toml"


@dataclass(frozen=True)
class Source:
    """A class as it is written: the module it is in, and its syntax tree."""

    module: str
    node: ast.ClassDef

    @property
    def path(self) -> str:
        """``module.Class``."""
        return f"{self.module}.{self.node.name}"

    @property
    def doc(self) -> str:
        """Its docstring."""
        return docstring(self.node)


@dataclass(frozen=True)
class Field:
    """A field of a dataclass: its type and default as written, the class that says so and the one that names it."""

    annotation: ast.expr
    default: ast.expr | None
    said_by: Source
    named_by: Source


@dataclass(frozen=True)
class Parameter:
    """A row of an arm's table.

    Attributes:
        name: dotted where it is nested. default: as written, or the class of a nested dataclass.
        meaning: empty where nobody says it.
        nested: the class whose fields follow, of a row that stands for all of them.
    """

    name: str
    default: str
    meaning: str
    nested: Source | None = None


@cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module of this repository."""
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


def file_of(module: str) -> Path:
    """The file that holds a module of this repository."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


@cache
def find(module: str, name: str) -> Source | None:
    """The class that `name` is in a module of this repository, imported names followed."""
    if not file_of(module).exists():
        return None
    for node in tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Source(module, node)
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(node.module, alias.name)
    return None


def lineage(cls: Source) -> list[Source]:
    """A class and its parents, itself first; the classes of this project have one parent each."""
    found = [cls]
    while bases := [base.id for base in found[-1].node.bases if isinstance(base, ast.Name)]:
        parent = find(found[-1].module, bases[0])
        if parent is None:
            break
        found.append(parent)
    return found


def docstring(node: ast.Module | ast.ClassDef) -> str:
    """A docstring without the margin of the code, which the least indented line may not show."""
    text = ast.get_docstring(node, clean=False) or ""
    margin = " " * (node.body[0].col_offset if node.body else 0)
    return "\n".join(line.removeprefix(margin).rstrip() for line in text.splitlines()).strip()


def label(cls: Source, name: str) -> Any:
    """The value of a class attribute, inherited where the class does not set it."""
    for owner in lineage(cls):
        for node in owner.node.body:
            if isinstance(node, ast.AnnAssign) and _is_class_variable(node) and ast.unparse(node.target) == name:
                return None if node.value is None else ast.literal_eval(node.value)
    return None


def fields(cls: Source) -> dict[str, Field]:
    """Fields by name, in the order of the dataclass: a field that is set again keeps its place."""
    found = dict[str, Field]()
    for owner in reversed(lineage(cls)):
        for node in owner.node.body:
            if isinstance(node, ast.AnnAssign) and not _is_class_variable(node):
                name = ast.unparse(node.target)
                first = found[name].named_by if name in found else owner
                found[name] = Field(node.annotation, node.value, owner, first)
    return found


@cache
def parameters(cls: Source) -> tuple[Parameter, ...]:
    """Every parameter of an arm once, nested ones after the row of their dataclass."""
    return tuple(row for name, field in fields(cls).items() for row in _rows(name, field, cls))


def origins(cls: Source) -> dict[str, Source]:
    """The class of the lineage that gave each parameter the default it has, by name."""
    found = {row.name: cls for row in parameters(cls)}
    unchanged = {row.name: row.default for row in parameters(cls)}
    for ancestor in lineage(cls)[1:]:
        before = {row.name: row.default for row in parameters(ancestor)}
        unchanged = {name: default for name, default in unchanged.items() if before.get(name) == default}
        found |= dict.fromkeys(unchanged, ancestor)
    return found


def _rows(name: str, field: Field, cls: Source) -> Iterator[Parameter]:
    nested, given = _dataclass(field)
    if nested is None:
        yield Parameter(name, _default(field), _meaning(cls, field, name.rpartition(".")[2]))
        return
    summary = " ".join(description(nested.doc).split("\n\n")[0].split())
    yield Parameter(name, nested.node.name, summary, nested)
    for inner, its in fields(nested).items():
        changed = Field(its.annotation, given.get(inner, its.default), its.said_by, its.named_by)
        yield from _rows(f"{name}.{inner}", changed, nested)


def _dataclass(field: Field) -> tuple[Source | None, dict[str, ast.expr]]:
    """The dataclass of this repository that a default makes, and what is given to it by name."""
    made, given = _factory(field.default) or field.default, dict[str, ast.expr]()
    if isinstance(made, ast.Call):
        given = {word.arg: word.value for word in made.keywords if word.arg}
        made = made.func
    elif made is field.default:
        return None, {}
    return (find(field.said_by.module, made.id) if isinstance(made, ast.Name) else None), given


def _factory(default: ast.expr | None) -> ast.expr | None:
    if isinstance(default, ast.Call) and isinstance(default.func, ast.Name) and default.func.id == "field":
        for word in default.keywords:
            if word.arg == "default_factory":
                return word.value.body if isinstance(word.value, ast.Lambda) else word.value
    return None


def _default(field: Field) -> str:
    made = _factory(field.default) or field.default
    return "" if made is None else ast.unparse(made)


def _meaning(cls: Source, field: Field, name: str) -> str:
    """What the nearest class says of a field, and the values it may have where they are named."""
    said = ""
    for owner in lineage(cls):
        said = said or said_here().get(owner.path, {}).get(name, "") or meanings(owner.doc).get(name, "")
    values = [f"`{value}`" for value in _choices(field.annotation, field.named_by.module)]
    if said and not all(value in said for value in values):
        return f"{said.rstrip('.')}; one of {', '.join(values)}"
    return said


@cache
def said_here() -> dict[str, dict[str, str]]:
    """Meanings that the docstrings leave to the equations, by class and field."""
    return tomllib.loads(SAID_HERE.read_text(encoding="utf-8"))


def _choices(annotation: ast.expr, module: str) -> list[str]:
    """The values of a ``Literal``, also one that has a name."""
    if isinstance(annotation, ast.BinOp):
        return _choices(annotation.left, module)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        values = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return [str(ast.literal_eval(value)) for value in values]
    if isinstance(annotation, ast.Name) and file_of(module).exists():
        for node in tree(module).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == annotation.id:
                return _choices(node.value, module)
            if isinstance(node, ast.ImportFrom) and node.module and annotation.id in {a.name for a in node.names}:
                return _choices(annotation, node.module)
    return []


def _is_class_variable(node: ast.AnnAssign) -> bool:
    return ast.unparse(node.annotation).startswith("ClassVar")
