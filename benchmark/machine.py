"""This machine: its name, so that files on a shared disk can tell whose process numbers they hold, and its load."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

import psutil

_MEGABYTE = 1e6


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


@cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)


def usage(gpu: tuple[int, int] | None = None) -> dict[str, float]:
    """Load of the machine and of this process since the last call, under MLflow's names for system metrics.

    Args:
        gpu: free and total bytes of the process's GPU (``torch.cuda.mem_get_info``), if it has one.
    """
    process = _process(os.getpid())  # kept, because it measures from one call to the next
    memory = psutil.virtual_memory()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "process_cpu_utilization_percentage": process.cpu_percent(),
        "system_memory_usage_megabytes": (memory.total - memory.available) / _MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "process_memory_usage_megabytes": process.memory_info().rss / _MEGABYTE,
    }
    if gpu is not None:
        free, total = gpu
        found["gpu_0_memory_usage_megabytes"] = (total - free) / _MEGABYTE
        found["gpu_0_memory_usage_percentage"] = 100 * (total - free) / total
    return {name: round(value, 1) for name, value in found.items()}
