"""What every configuration model is built from: types, the frozen base, cross-field errors and the hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def fault(key: str, what: str, remedy: str, *also: str) -> PydanticCustomError:
    """The error of a cross-field check: `key` and the keys it clashes with, relative to the model."""
    context = {"key": key, "what": what, "remedy": remedy, "also": also}
    return PydanticCustomError("cross_check", "{what}", context)


def canonical(value: BaseModel | Mapping[str, Any]) -> str:
    """Canonical JSON: sorted keys, no spaces, UTF-8, finite numbers only."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: BaseModel | Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


class Model(BaseModel):
    """Frozen, strict in types (no ``"8"`` for 8, no ``true`` for 1), closed against unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)
