"""Finding methods by name. Ours and everyone else's come through the same entry point group."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from benchmark.errors import InputError
from benchmark.method import Method

GROUP = "rolloutbench.methods"


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """One row of ``rolloutbench methods``."""

    name: str
    family: str
    kind: str
    changes: list[str]
    reference: str
    faithful_to: str


@cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def names() -> list[str]:
    """Every installed arm, sorted."""
    return list(_entries())


@contextmanager
def registered(name: str, value: str) -> Iterator[None]:
    """An arm of this process for a while: `value` is ``module:Class``, as an entry point would say it."""
    _entries()[name] = EntryPoint(name, value, GROUP)
    try:
        yield
    finally:
        del _entries()[name]


def suggest(word: str, known: list[str]) -> str:
    """A remedy sentence: the closest known word, or all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known) or 'none'}"


def load(name: str) -> type[Method]:
    """The class behind an arm's name.

    Raises:
        InputError: no such arm, or what the entry point names is not a Method.
    """
    if name not in _entries():
        remedy = f"{suggest(name, names())}. An arm of your own is known once its package is installed"
        raise InputError("no such method", key="method", value=name, remedy=remedy.replace("?.", "?"))
    try:
        found = _entries()[name].load()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"its entry point cannot be loaded ({error})",
            key="method",
            value=_entries()[name].value,
            remedy="Install its package again; a folder of that name in the working directory hides it",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(
            "is not a subclass of benchmark.method.Method",
            key="method",
            value=_entries()[name].value,
            remedy="Point the entry point at a Method class",
        )
    return found


def describe(name: str) -> MethodInfo:
    """Family, kind, changes and reference of an arm."""
    cls = load(name)
    return MethodInfo(name, cls.family, cls.kind, list(cls.changes), cls.reference, cls.faithful_to)


def build(name: str, params: Mapping[str, object]) -> Method:
    """The arm `name` with `params` changed from its defaults; nested parameters are nested mappings.

    Raises:
        InputError: unknown method or parameter, wrong type, or a value the method refuses.
    """
    try:
        default = load(name)()
    except TypeError as error:
        remedy = "Give every parameter a default: a method is run by its name alone"
        raise InputError(f"cannot be made ({error})", key="method", value=name, remedy=remedy) from error
    method: Method = _changed(default, params, "method")
    return method


def _changed(default: Any, params: Mapping[str, object], key: str) -> Any:
    hints = get_type_hints(type(default))
    known = [field.name for field in dataclasses.fields(default) if field.init]
    values: dict[str, Any] = {}
    for name, value in params.items():
        place = f"{key}.{name}"
        if name not in known:
            raise InputError("no such parameter", key=place, value=value, remedy=suggest(name, known))
        current = getattr(default, name)
        if dataclasses.is_dataclass(current) and isinstance(value, Mapping):
            values[name] = _changed(current, value, place)
            continue
        try:
            strict = ConfigDict(strict=False, allow_inf_nan=False)
            values[name] = TypeAdapter(
                hints[name], config=None if dataclasses.is_dataclass(current) else strict
            ).validate_python(value)
        except ValidationError as error:
            said = re.sub(r" or (an )?instance of \w+", "", error.errors()[0]["msg"]).replace("dictionary", "mapping")
            reason = said[0].lower() + said[1:]
            raise InputError(reason, key=place, value=value, remedy=f"The default is {current!r}") from error
    try:
        return dataclasses.replace(default, **values)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(error), key=key, value=dict(params), remedy="See the method's docstring") from error
