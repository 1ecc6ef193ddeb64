"""`rolloutbench dashboard`: the interfaces of MLflow and Optuna. Needs only typer, mlflow and optuna-dashboard."""

# ruff: noqa: D301 (typer takes a backspace in a docstring as "keep these lines")

from __future__ import annotations

import os
import signal
import sys
import time
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from benchmark.errors import InputError, RunError

STORE = "sqlite:///mlflow.db"


def dashboard(
    tracking_uri: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow store, or the address of a server that runs.")
    ] = STORE,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of MLflow, on 127.0.0.1.")] = 5000,
    journal: Annotated[
        list[Path] | None, typer.Option(help="Journal of Optuna; repeatable; all results/**/journal.log by default.")
    ] = None,
    optuna_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Of the first journal's dashboard; one more for each other.")
    ] = 8080,
    browser: Annotated[
        bool | None, typer.Option(help="Open the first study in a browser; where there is a desktop by default.")
    ] = None,
) -> None:
    """Serve MLflow and optuna-dashboard on 127.0.0.1 until Ctrl-C and print a link for every study.

    \b
    Examples:
      rolloutbench dashboard
      rolloutbench dashboard --port 5001 --journal results/modulation/journal.log
    """
    from benchmark.dashboard import HOST, journals, links, mlflow_server, optuna_server, stopping, wait_until_up

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    running = {}
    with stopping(servers := []):
        root = tracking_uri.rstrip("/")
        if not root.startswith(("http://", "https://")):
            root = f"http://{HOST}:{port}"
            servers.append(mlflow_server(tracking_uri, port))
            running[root] = servers[-1]
        for number, file in enumerate(journals() if journal is None else journal):
            address = f"http://{HOST}:{optuna_port + number}"
            servers.append(optuna_server(file, optuna_port + number))
            running[address] = servers[-1]
            typer.echo(f"optuna {file}: {address}/dashboard")
        for address, server in running.items():
            wait_until_up(address, server)
        views = links(root)
        for name, address in views.items():
            typer.echo(f"{name}: {address}")
        if not views:
            typer.echo(f"{root} holds no study yet: rolloutbench mirror results/STUDY brings one there")
        if views and (_desktop() if browser is None else browser):
            webbrowser.open(next(iter(views.values())))
        if running:
            typer.echo("Ctrl-C ends this")
        try:
            while running:
                for address, server in running.items():
                    if server.poll() is not None:
                        raise RunError(f"the server at {address} ended with exit code {server.returncode}")
                time.sleep(0.5)
        except KeyboardInterrupt:
            typer.echo("stopped")


def _desktop() -> bool:
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


if __name__ == "__main__":  # as `nox -s dashboard` runs it, without the rest of the suite
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(dashboard)
    try:
        app()
    except (InputError, RunError) as fault:
        typer.echo(f"error: {fault}", err=True)
        sys.exit(2 if isinstance(fault, InputError) else 1)
