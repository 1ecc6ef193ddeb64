"""A study on a local Ray cluster of two workers: every cell once, failures and dead workers as without Ray."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmark.compose import compose_study
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_text
from benchmark.ray_workers import RayPool, connect
from benchmark.study import Outcome, run_study

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray leaves sockets and processes to its exit

STUDY = "study: pair\nquestion: Which?\nscale: smoke\narms: [grpo, rloo]\nseeds: 3\n"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Outcome]]:
    """Runs a study of two arms and three seeds with a stand-in of `tests/fake_cells.py` for training."""
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)
    atomic_write_text(tmp_path / "pair.yaml", STUDY)

    def go(name: str) -> Outcome:
        assert connect("local") >= 1
        run: Any = getattr(importlib.import_module("fake_cells"), name)
        plan = compose_study("pair.yaml", seeds=3)
        nothing: Any = lambda *_: None  # noqa: E731
        return run_study(
            plan, Path("results"), workers=2, run=run, pool=RayPool, prepare=nothing, report=nothing, tracking_uri=None
        )

    yield go
    ray.shutdown()


def test_every_cell_runs_once_by_two_workers_with_one_thread(study: Callable[[str], Outcome], tmp_path: Path) -> None:
    assert study("finish") == Outcome(6, 6, {}, False)
    rows = [json.loads(line) for line in (tmp_path / "results" / "order.jsonl").read_text().splitlines()]
    assert sorted((row["arm"], row["seed"]) for row in rows) == [(a, s) for a in ("grpo", "rloo") for s in range(3)]
    assert {row["threads"] for row in rows} == {"1"}
    holders = [json.loads(file.read_text()) for file in tmp_path.glob("results/cells/*/lease/0")]
    assert len(holders) == 6
    assert os.getpid() not in {holder["pid"] for holder in holders}
    assert study("exit_early") == Outcome(6, 6, {}, False)


@pytest.mark.parametrize("fault", ["fail_rloo", "kill_rloo"])
def test_a_failure_costs_its_cell_only(fault: str, study: Callable[[str], Outcome]) -> None:
    outcome = study(fault)
    assert (outcome.done, outcome.total) == (3, 6)
    assert len(outcome.failed) == 3
    assert all(name.startswith("rloo") for name in outcome.failed)
    why = "rloo is broken today" if fault == "fail_rloo" else "worker died"
    assert all(why in text for text in outcome.failed.values())


def test_what_ray_cannot_give_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="GPUs"):
        connect("local", gpus=1)
    ray.shutdown()
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match="pip install"):
        connect("auto")
