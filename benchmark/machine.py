"""Names this machine, so that files on a shared disk can tell whose process numbers they hold."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

import psutil


@cache
def machine() -> str:
    """Names the processes among which a pid means something: host, boot and pid namespace."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))  # noqa: PTH115 (not a path)
    except OSError:
        # Elsewhere than on Linux; a clock that was set in between only delays the takeover.
        parts.append(f"{psutil.boot_time():.0f}")
    return "/".join(parts)
