"""Extension of griffe: parameters that share a line of a docstring become one each before the docstring is parsed."""

from __future__ import annotations

from typing import Any

import griffe
from docstrings import spread


class Spread(griffe.Extension):
    """Gives every parameter of a docstring a line of its own."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class or function."""
        if obj.docstring is not None:
            obj.docstring.value = spread(obj.docstring.value)
