"""YAML files and ``--set`` options as layers of one configuration tree that remember where values came from.

The YAML read here is the 1.2 core schema: ``5e-7`` is a number and ``no`` a word (PyYAML alone has both the
other way round); a repeated key is an error instead of a silent overwrite.
"""

from __future__ import annotations

import copy
import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from benchmark.errors import InputError

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file and line, or an option of the command line."""

    file: str | Path
    line: int | None = None


@dataclass(frozen=True)
class Layer:
    """A tree of plain values, and the origin of every dotted path in it."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def origin(self, key: str) -> Origin | None:
        """Origin of `key`, or of the nearest enclosing key that was written anywhere."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key)

    def over(self, base: Layer) -> Layer:
        """This layer on top of `base`: mappings merge, lists and scalars replace."""
        below = {key: at for key, at in base.origins.items() if key not in self.origins}
        return Layer(_merge(base.values, self.values), {**below, **self.origins})

    def part(self, *sections: str) -> Layer:
        """The top-level `sections` alone."""
        values = {key: value for key, value in self.values.items() if key in sections}
        return Layer(values, {key: at for key, at in self.origins.items() if key.partition(".")[0] in sections})

    def moved(self, source: str, target: str, values: Mapping[str, Any]) -> Layer:
        """`values`, written under `source` in this layer, as a layer of its own under `target`."""
        tree = dict(values)
        for part in reversed(target.split(".") if target else []):
            tree = {part: tree}
        inside = {key: at for key, at in self.origins.items() if key == source or key.startswith(f"{source}.")}
        return Layer(tree, {(target + key[len(source) :]).lstrip("."): at for key, at in inside.items()})

    def renamed(self, section: str, key: str, apart: Iterable[str]) -> Layer:
        """Everything in `section` moved into ``section.key``, except the keys in `apart` and `key` itself."""
        inside = self.values.get(section)
        stays = (key, *apart)
        if not isinstance(inside, dict) or not isinstance(inside.get(key, {}), dict):
            return self
        loose = {name: value for name, value in inside.items() if name not in stays}
        kept = {name: value for name, value in inside.items() if name in apart}
        tree = {**self.values, section: {**kept, key: _merge(inside.get(key, {}), loose)}}
        origins = {}
        for path, at in self.origins.items():
            top, _, rest = path.partition(".")
            moved = top == section and rest.partition(".")[0] in loose
            origins[f"{section}.{key}.{rest}" if moved else path] = at
        return Layer(tree, origins)

    def error(self, key: str, what: str, remedy: str, value: object = None, also: Iterable[str] = ()) -> InputError:
        """The error of a value in this layer, placed where `key` or a key it clashes with was written."""
        # Upper layers come last in `origins`; the slip is more likely there than in what lies below.
        exact = [origin for name, origin in self.origins.items() if name in (key, *also)]
        at = exact[-1] if exact else self.origin(key)
        file, line = (at.file, at.line) if at else (None, None)
        return InputError(what, file=file, line=line, key=key, value=value, remedy=remedy)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remedy: the nearest of the `known` words, or all of them."""
    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, n=1) or [each for each in choices if word and each.startswith(word)]
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(choices) or 'none'}"


def read_yaml(path: Path) -> Layer:
    """The mapping in the YAML file at `path`.

    Raises:
        InputError: the file is missing, is not YAML, is not a mapping, or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot be read: {reason}", file=path, remedy="Check the path") from None
    values, origins = _parse_once(text, path)
    if not isinstance(values, dict):
        raise InputError("not a mapping of keys to values", file=path, line=1, remedy="Write 'key: value' lines")
    return Layer(copy.deepcopy(values), dict(origins))


@lru_cache(maxsize=64)
def _parse_once(text: str, path: Path) -> tuple[Any, dict[str, Origin]]:
    origins: dict[str, Origin] = {}
    return _parse(text, path, origins), origins


def read_options(options: Iterable[str]) -> Layer:
    """``a.b=c`` options as one layer, later ones on top; values are YAML, so ``k=[1,8]`` is a list.

    Raises:
        InputError: an option is not ``key=value``.
    """
    layer = Layer()
    for option in options:
        key, separator, text = option.partition("=")
        key, place = key.strip(), f"--set {option}"
        if not separator or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise InputError("not an option", file=place, remedy="Write --set key.of.value=5")
        tree: Any = _parse(text, place, {})
        for part in reversed(key.split(".")):
            tree = {part: tree}
        layer = Layer(tree, {key: Origin(place)}).over(layer)
    return layer


def validate(model: type[M], layer: Layer, file: Path | None = None) -> M:
    """`layer` as a `model`; `file` is where a key that nothing has written would have to be.

    Raises:
        InputError: the first thing that pydantic finds wrong, in words of the configuration.
    """
    try:
        return model.model_validate(layer.values)
    except ValidationError as error:
        faults = error.errors(include_url=False)
    # An unknown key often explains a missing one, so it goes first.
    first = min(faults, key=lambda fault: fault["type"] != "extra_forbidden")
    context: Mapping[str, Any] = first.get("ctx", {})
    location = [str(part) for part in first["loc"]]
    key = ".".join([*location, *([context["key"]] if "key" in context else [])])
    what = first["msg"].removeprefix("Input ").replace("tuple", "list").replace("dictionary", "mapping")
    what = re.sub(r" or (an )?instance of \w+", "", what)
    value = first["input"] if isinstance(first["input"], str | int | float) else None
    remedy = context.get("remedy", "Write a value that fits")
    if first["type"] == "extra_forbidden":
        what, remedy = "unknown key", did_you_mean(location[-1], _fields(model, location[:-1]))
    elif first["type"] == "missing":
        if layer.origin(key) is None and file is not None:
            raise InputError("is missing", file=file, key=key, remedy="Add it")
        what, value, remedy = "is missing", None, "Add it"
    prefix = "".join(f"{part}." for part in location)
    raise layer.error(key, what, remedy, value, also=[prefix + other for other in context.get("also", [])])


def dump(config: BaseModel) -> str:
    """YAML text that `validate` reads back to an equal configuration."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in top.items():
        below = result.get(key)
        result[key] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return result


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML copies it per class)


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|)", "~n\0"),
    ("bool", r"(?:true|false)", "tf"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _first_characters = ["" if character == "\0" else character for character in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), _first_characters)


def _parse(text: str, file: str | Path, origins: dict[str, Origin]) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _plain(loader, node, "", file, origins)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark and isinstance(file, Path) else None
        remedy = "Mend the YAML there"
        raise InputError(error.problem or "not YAML", file=file, line=line, remedy=remedy) from None
    except yaml.YAMLError:
        raise InputError("not YAML text", file=file, remedy="Remove control characters") from None
    except RecursionError:
        raise InputError("nested too deeply", file=file, remedy="Write it flatter") from None
    finally:
        if loader is not None:
            loader.dispose()


def _plain(loader: _Loader, node: yaml.Node, path: str, file: str | Path, origins: dict[str, Origin]) -> Any:
    """The value of `node`, with an origin for each path on the way."""
    if path:
        origins[path] = Origin(file, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, f"{path}.{i}", file, origins) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    result: dict[str, Any] = {}
    for name, value in node.value:
        key, line = str(name.value), name.start_mark.line + 1
        if key in result:
            remedy = "Keep one of the two"
            raise InputError("written twice in one mapping", file=file, line=line, key=key, remedy=remedy)
        below = f"{path}.{key}" if path else key
        result[key] = _plain(loader, value, below, file, origins)
        # The key's line is where a reader looks; a block value starts one line later.
        origins[below] = Origin(file, line)
    return result


def _fields(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Names of the fields of the model at `location` inside `model`."""
    for part in location:
        inner = model.model_fields.get(part) if not part.isdigit() else None
        model = (_model_in(inner.annotation) if inner else None) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in typing.get_args(annotation) if (found := _model_in(inner))), None)
