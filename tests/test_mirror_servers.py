"""The mirror against real servers: killed, slow, mute, on sqlite and on PostgreSQL; training never waits for them."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmark import study as study_module
from benchmark.compose import compose_study
from benchmark.mirror import Mirror
from benchmark.progress import Display

sys.path.insert(0, str(Path(__file__).parent))
files: Any = importlib.import_module("mirror_files")
servers: Any = importlib.import_module("servers")
pytestmark = pytest.mark.slow
STORES = ["sqlite", "postgres"]
STUDY = """\
study: pair
question: Which?
scale: smoke
arms: [grpo, rloo]
seeds: 2
decision_rule: Look.
"""


@pytest.fixture
def postgres() -> Iterator[str]:
    binaries = servers.postgres_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL: pip install -e '.[pgserver]', or install one of the system")
    with servers.postgres(binaries) as uri:
        yield uri


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A tracking server behind a proxy, with a client that gives up after a second and a mirror that tries at once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(Mirror, "patience", 0.0)
    with servers.MlflowServer(f"sqlite:///{tmp_path}/server.db", tmp_path) as server:
        made = servers.Proxy(server.port)
        made.direct = server.uri
        yield made
        made.close()


def until(condition: Any, tries: int = 600) -> None:
    for _ in range(tries):
        if condition():
            return
        threading.Event().wait(0.1)
    raise AssertionError("it never came true")


@pytest.mark.parametrize("store", STORES)
def test_killed_servers_and_mirrors_lose_and_double_nothing(store: str, tmp_path: Path) -> None:
    if store == "postgres" and servers.postgres_binaries() is None:
        pytest.skip("no PostgreSQL: pip install -e '.[pgserver]', or install one of the system")
    driver = Path(__file__).with_name("mirror_crash_driver.py")
    command = [sys.executable, str(driver), str(tmp_path), *(["--postgres"] if store == "postgres" else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["lost"], found["doubled"]) == (0, 0), found
    assert (found["rebuilt"]["lost"], found["rebuilt"]["doubled"]) == (0, 0), found
    assert found["points"] > 5000


@pytest.mark.parametrize("fault", ["late", "mute", "hole"])
def test_requests_that_are_given_up_and_arrive_or_not_leave_every_point_once(
    proxy: Any, tmp_path: Path, fault: str
) -> None:
    study = tmp_path / "study"
    cells = files.plan(study, ("grpo", "dapo"))
    mirror = Mirror(proxy.uri, study, "table")
    assert mirror.sync()
    for number in range(6):
        # Every other step meets the fault: a request is late by more than the client waits, or its answer is lost.
        if number % 2:
            proxy.delay, proxy.mute, proxy.hole = (1.5 if fault == "late" else 0.0), fault == "mute", fault == "hole"
        for folder, resolved in cells:
            if number == 1:
                files.start(folder, resolved)
            if number:
                files.step(folder, number - 1)
        if number % 2:
            assert not mirror.sync(), "the fault has been met"
        proxy.delay, proxy.mute, proxy.hole = 0.0, False, False
        if not number % 2:
            until(mirror.sync)
    for folder, _ in cells:
        files.finish(folder, 5)
    threading.Event().wait(3.0)  # what was late has arrived
    until(mirror.close)
    peaceful = f"sqlite:///{tmp_path}/twin.db"
    (study / "mlflow_state.json").unlink()
    assert Mirror(peaceful, study, "table").close()
    assert files.content(proxy.direct, "table") == files.content(peaceful, "table")


def test_a_study_ends_while_the_server_keeps_every_request_and_is_mirrored_later(
    proxy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    fakes = importlib.import_module("fake_cells")
    monkeypatch.setattr(study_module, "MIRROR_SECONDS", 0.1)
    monkeypatch.setattr(study_module, "MIRROR_PATIENCE_SECONDS", 2.0)
    path = tmp_path / "pair.yaml"
    path.write_text(STUDY)
    plan, folder = compose_study(str(path)), tmp_path / "results"
    console = Console(record=True, file=(tmp_path / "console").open("w"), width=200)
    proxy.hole = True
    outcome = study_module.run_study(
        plan,
        folder,
        workers=2,
        tracking_uri=proxy.uri,
        run=fakes.finish,
        prepare=lambda _: None,
        report=lambda _: None,
        display=Display(console),
    )
    assert (outcome.done, outcome.failed) == (4, {})
    assert files.runs(proxy.direct, "pair") == []
    proxy.hole = False
    until(Mirror(proxy.uri, folder, "pair").close)
    _, children = files.parent_and_children(proxy.direct, "pair")
    assert [run.info.status for run in children.values()] == ["FINISHED"] * 4


def test_a_mirror_writes_to_postgresql_itself(postgres: str, tmp_path: Path) -> None:
    study = tmp_path / "study"
    for number, cell in enumerate(files.plan(study, ("grpo", "dapo"))):
        files.whole_cell(*cell, steps=3 + number)
    assert Mirror(postgres, study, "table").close()
    found = files.content(postgres, "table")
    assert Mirror(postgres, study, "table").rebuild()
    assert files.content(postgres, "table") == found
    (study / "mlflow_state.json").unlink()
    assert Mirror(f"sqlite:///{tmp_path}/twin.db", study, "table").close()
    assert files.content(f"sqlite:///{tmp_path}/twin.db", "table") == found
