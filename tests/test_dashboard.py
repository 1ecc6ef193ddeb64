"""The dashboard: what it refuses, and, in headless Chromium, that it shows the runs of a study and their charts."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmark.cli import app
from benchmark.mirror import Mirror

sys.path.insert(0, str(Path(__file__).parent))
files: Any = importlib.import_module("mirror_files")
ROOT = Path(__file__).parent.parent
ARMS = ("grpo", "dapo", "dynamo")


SEEDS = (0, 1, 2)
DRAWN = """() => [...document.querySelectorAll(".js-plotly-plot")].flatMap(plot => plot.data)
    .filter(line => line.mode && line.mode.includes("lines") && line.x)
    .map(line => [Array.from(line.x), Array.from(line.y)])"""


def free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def test_a_store_that_is_not_there_is_refused_and_not_made(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["dashboard", "--tracking-uri", f"sqlite:///{tmp_path}/none.db"])
    assert result.exit_code == 2
    assert "no such store" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = ["dashboard", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db", "--port", str(port)]
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert f"--port = {port}" in result.output


def _heed_interrupts() -> None:
    """Started in a shell's background, tests ignore Ctrl-C, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A study of three arms and three seeds and a journal of Optuna, served by the command as a user starts it."""
    optuna = pytest.importorskip("optuna")
    folder = tmp_path_factory.mktemp("dashboard")
    for number, cell in enumerate(files.plan(folder / "results" / "table", ARMS, SEEDS)):
        files.whole_cell(*cell, steps=4 + number)  # seeds and arms end at different costs
    assert Mirror(f"sqlite:///{folder}/mlflow.db", folder / "results" / "table", "table").close()
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "results" / "journal.log"))
    study = optuna.create_study(storage=optuna.storages.JournalStorage(backend), study_name="modulation")
    study.optimize(lambda trial: (trial.suggest_float("alpha", 0, 1) - 0.3) ** 2, n_trials=5)
    port, optuna_port = free_ports()
    command = [sys.executable, "-m", "benchmark.cli_dashboard", "--port", str(port), "--optuna-port", str(optuna_port)]
    server = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=_heed_interrupts,
    )
    assert server.stdout is not None
    found = {"store": f"sqlite:///{folder}/mlflow.db"}
    for line in server.stdout:
        name, _, address = line.strip().partition(": ")
        if line.startswith("Ctrl-C"):
            break
        found[name] = address
    yield found
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0
    for number in (port, optuna_port):  # nothing is left running
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", number)) != 0


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium or Chrome is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    # As root, as in containers, Chromium refuses to start in its sandbox.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as play, play.chromium.launch(executable_path=chromium, args=options) as browser:
        view = browser.new_page(viewport={"width": 1600, "height": 1300})
        view.set_default_timeout(120_000)
        yield view


@pytest.mark.slow
def test_the_runs_by_method_and_their_charts_are_there_at_once(
    page: Any, addresses: dict[str, str], tmp_path: Path
) -> None:
    page.goto(addresses["table"])
    for arm in ARMS:
        page.get_by_text(f"Group: {arm}", exact=True).wait_for()
    page.get_by_text("9 matching runs").wait_for()
    page.get_by_text("Step = tokens_generated").wait_for()
    page.locator(".js-plotly-plot .scatterlayer .trace").nth(3).wait_for(state="attached")
    page.wait_for_timeout(5000)
    shot = Path(os.environ.get("ROLLOUTBENCH_SCREENSHOTS", tmp_path)) / "dashboard.png"
    page.screenshot(path=shot)
    # Plotly keeps what it has drawn; what it should have is the mean over seeds of what was mirrored.
    drawn = page.evaluate(DRAWN)
    content = files.content(addresses["store"], "table")
    for name in ("average_pass_at_1", "entropy_nats"):
        for arm in ARMS:
            points = [point for seed in SEEDS for point in content[f"{arm}-s{seed}"][0][f"curve/{name}"]]
            costs = sorted({cost for cost, _ in points})
            means = [statistics.fmean(value for at, value in points if at == cost) for cost in costs]
            assert [costs, pytest.approx(means)] in drawn, f"{name} of {arm}"
    assert shot.stat().st_size > 20_000


@pytest.mark.slow
def test_the_journal_of_a_sweep_is_shown(page: Any, addresses: dict[str, str]) -> None:
    [address] = [url for name, url in addresses.items() if name.startswith("optuna ")]
    page.goto(address)
    page.get_by_text("modulation").first.wait_for()
