"""Every test runs on one thread, without a network, and on a processor in its usual state."""

from __future__ import annotations

import ipaddress
import os
import shutil
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


@pytest.fixture(scope="module")
def uneven_policy() -> Any:
    """Two small layers whose biases and norms are not trivially 0 and 1."""
    import torch

    from benchmark.config import ArchitectureConfig
    from benchmark.warmup import new_policy

    small = new_policy(ArchitectureConfig(hidden_size=16, layers=2, heads=2, kv_heads=1, mlp=24), seed=3)
    with torch.no_grad():
        for parameter in small.parameters().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return small


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, where there is one."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here; install it, for instance apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
