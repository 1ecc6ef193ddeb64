"""Every test runs on one thread, without a network, and on a processor in its usual state."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

# Here, because OpenMP and the libraries read these once, when the test modules import them.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class NetworkBlockedError(OSError):
    """A test tried to leave the machine."""


def _is_local(family: int, address: Any) -> bool:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = str(address[0]).partition("%")[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(autouse=True, scope="session")
def _offline_and_single_threaded() -> Iterator[None]:
    """Refuse every connection that is not to this machine, and keep torch to one thread."""
    import torch

    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: Any, _original: Any = original) -> Any:
            if not _is_local(self.family, address):
                raise NetworkBlockedError(f"tests have no network: connection to {address!r} refused")
            return _original(self, address)

        patch.setattr(socket.socket, name, guarded)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _denormals_restored() -> Iterator[None]:
    """A run flushes denormals to zero for its whole process; the next test must not notice."""
    import torch

    yield
    torch.set_flush_denormal(False)
