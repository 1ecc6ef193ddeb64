"""Errors whose message is for the user: the command line prints them as one line, without a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
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
        super().__init__(" ".join(f"{place}{at}{what}. {remedy}".splitlines()))
        self.file, self.line, self.key, self.value, self.remedy = file, line, key, value, remedy


class RunError(Exception):
    """A run or a study cannot go on; the command line prints it as one line and exits with 1."""


class Interrupted(Exception):  # noqa: N818 - a request that was met, not a fault
    """The run was asked to stop; it checkpointed and can be resumed."""


class MethodError(RuntimeError):
    """A method returned something that its decision must not return."""


NO_NAME = (errno.ENAMETOOLONG, errno.EILSEQ)
"""Numbers of the system's errors that blame the name that the user gave."""
_ROOM = "Free some space; the same command then goes on from the last checkpoint"
_ACCESS = "Make it writable, or choose another folder"
REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EROFS: _ACCESS,
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.ENOENT: "The folder was deleted or moved; the same command starts what is missing again",
    errno.EEXIST: "A file stands where a folder should be; move it away, or choose another folder",
    errno.ENOTDIR: "A file stands where a folder should be; move it away, or choose another folder",
    errno.EIO: "The disk or its connection fails; mend it, and the same command goes on",
    errno.ESTALE: "The shared disk was away; the same command goes on",
}
"""What to do about a file that cannot be written, by the number of the system's error."""


class StorageError(RunError):
    """A file of a record cannot be written, or is no longer this process's to write."""

    def __init__(
        self, path: object, what: str, remedy: str = "The same command goes on from the last checkpoint"
    ) -> None:
        super().__init__(f"{path}: {what}. {remedy}. Results that were finished before are intact")
        self.path = path


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn the system's errors while writing `path` into `StorageError`, which names file, cause and remedy."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: object = None) -> StorageError:
    """`error` as a `StorageError`; `path` where the system named no file."""
    remedy = REMEDIES.get(error.errno or 0, "Mend it, and the same command goes on")
    if error.errno == errno.ENOENT and error.filename and Path(error.filename).parent.is_dir():
        # What a file system that makes no folders, such as /proc, says to those who want one.
        remedy = "It cannot be made there; choose another folder"
    return StorageError(error.filename or path, error.strerror or str(error), remedy)
