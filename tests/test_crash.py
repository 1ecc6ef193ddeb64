"""A study killed with SIGKILL at random moments and restarted ends as one that was never interrupted, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmark.config import RunConfig
from benchmark.warmup import warm_up

ROOT = Path(__file__).parent.parent
PHASES = {"generation", "update", "checkpoint write", "ledger append", "evaluation", "table writing"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny policy that answers some sums right."""
    folder = tmp_path_factory.mktemp("policy")
    config = {
        "study": "crash",
        "arm": "grpo",
        "seed": 3,
        "scale": "test",
        "policy": {
            "architecture": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 64},
            "warmup": {"steps": 150, "batch": 64, "styles": {"direct": 1.0, "partial": 0.0, "full": 0.0}},
        },
        "task": {"name": "sums", "mix": [{"family": "chain_sum", "num_terms": [2, 2], "num_digits": [1, 1]}]},
        "budget": {"currency": "tokens_generated", "amount": 2201},
        "method": {"name": "grpo"},
    }
    made, _ = warm_up(RunConfig.model_validate(config), lambda *_: None)
    made.save(folder / "policy")
    return str(folder / "policy")


def crash(policy: str, out: Path, kills: int, seed: int, figures: bool) -> dict[str, Any]:
    command = [
        sys.executable,
        str(ROOT / "tests" / "crash_driver.py"),
        policy,
        str(out),
        str(kills),
        str(seed),
        str(int(figures)),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_few_kills_leave_no_trace(
    policy: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    found = crash(policy, tmp_path / "out", 12, seed=0, figures=False)
    record_property("crashes", found)
    assert (found["unequal"], found["failed"]) == ([], [])
    assert sum(found["kills"].values()) == 12


@pytest.mark.slow
def test_a_hundred_kills_leave_no_trace(
    policy: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    found = crash(policy, tmp_path / "out", 100, seed=1, figures=True)
    record_property("crashes", found)
    print(json.dumps(found))
    assert (found["unequal"], found["failed"]) == ([], [])
    assert sum(found["kills"].values()) == 100
    assert found["kills"].keys() >= PHASES
