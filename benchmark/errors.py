"""The one error users cause and can mend."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """Bad configuration, data or arguments; the command line prints it as one line and exits with 2.

    The message names where the fault lies (file, line, key, value) and what to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        key: str | None = None,
        value: object = None,
        remedy: str,
    ) -> None:
        place = "" if file is None else f"{file}" + ("" if line is None else f":{line}") + ": "
        at = "" if key is None else f"{key}" + ("" if value is None else f" = {value!r}") + ": "
        super().__init__(f"{place}{at}{what}. {remedy}")
        self.file, self.line, self.key, self.value, self.remedy = file, line, key, value, remedy
