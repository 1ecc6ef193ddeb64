"""MLflow's interface and optuna-dashboard on this machine, and links to the view of every mirrored study."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmark.errors import InputError, RunError
from benchmark.installing import install_line
from benchmark.mirror_view import TAG, view_path

HOST = "127.0.0.1"
JOURNAL = "journal.log"
_GRACE_SECONDS = 10.0


def mlflow_server(store: str, port: int) -> subprocess.Popen[bytes]:
    """MLflow's server for `store`, a database URL, on this machine only.

    Raises:
        InputError: the port is taken, or `store` is a sqlite file that is not there.
    """
    file = Path(store.removeprefix("sqlite:///"))
    if store.startswith("sqlite:///") and not file.exists():
        raise InputError(
            "no such store",
            key="--tracking-uri",
            value=store,
            remedy="Run a study, or bring its results there: rolloutbench mirror results/STUDY",
        )
    # Without its job runners the server starts 2 processes instead of 15. A store may hold a password, so it is
    # not among the arguments, which everybody on the machine can read.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": store}
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    return _start([*command, "--host", HOST, "--port", str(port)], port, "--port", environment)


def optuna_server(journal: Path, port: int) -> subprocess.Popen[bytes]:
    """optuna-dashboard for a journal file, on this machine only.

    Raises:
        InputError: it is not installed, there is no such journal, or the port is taken.
    """
    program = shutil.which("optuna-dashboard", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        what = "it is a journal of Optuna, but optuna-dashboard is not installed"
        raise InputError(what, file=journal, remedy=install_line("dashboard"))
    if not journal.is_file():
        raise InputError("no such journal", file=journal, remedy="Name the journal.log of a sweep's results")
    command = [program, str(journal), "--host", HOST, "--port", str(port), "--quiet"]
    return _start(command, port, "--optuna-port", {})


def journals(results: Path = Path("results")) -> list[Path]:
    """Journals of Optuna among the results."""
    return sorted(results.rglob(JOURNAL))


def links(root: str) -> dict[str, str]:
    """Address of the view of every study that was mirrored to the server at `root`, by its name."""
    from mlflow import MlflowClient

    found = MlflowClient(tracking_uri=root).search_experiments()
    return {e.name: f"{root}/{view_path(e.experiment_id)}" for e in found if TAG in e.tags}


def wait_until_up(root: str, server: subprocess.Popen[bytes]) -> None:
    """Return when `server` answers at `root`.

    Raises:
        RunError: it ended instead.
    """
    while server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(root, timeout=5):
            return
        time.sleep(0.2)
    raise RunError(f"the server for {root} ended with exit code {server.returncode}; its output is above")


@contextlib.contextmanager
def stopping(servers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """End the servers with all that they started, whatever happens inside the ``with``."""
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for server in servers:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, number)
            for server in servers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(_GRACE_SECONDS)


def _start(command: Sequence[str], port: int, option: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(str(error.strerror), key=option, value=port, remedy="Choose another port") from None
    # A session of its own: the server's children are ended with it, and Ctrl-C reaches us first.
    return subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
