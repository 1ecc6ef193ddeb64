"""``result.json``: what a finished run spent, with what code and data, and the hashes of its files."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from benchmark import ranks
from benchmark.ledger import UNCHARGED_PHASES
from benchmark.seal import run_files, sealed

if TYPE_CHECKING:
    from benchmark.run import Run

LIBRARIES = ("torch", "transformers", "trl", "numpy", "rolloutbench")


def result_of(run: Run) -> dict[str, Any]:
    """The content of ``result.json`` for a run whose other files are all written."""
    config, spent, budget = run.config, run.ledger.spent, run.budget
    training = ranks.size() * sum(value for phase, value in run.seconds.items() if phase not in UNCHARGED_PHASES)
    return sealed(
        {
            "run_hash": config.run_hash,
            "plan_hash": config.plan_hash,
            "study": config.study,
            "arm": config.arm,
            "seed": config.seed,
            "scale": config.scale,
            "planned": {budget.currency: budget.amount},
            "spent": spent | {"device_seconds": training, "verifier_seconds": run.seconds.get("verify", 0.0)},
            "overshoot": spent[budget.currency] - budget.amount,
            "steps": run.step,
            "drawn": run.ledger.drawn,
            "evaluation_tokens": run.ledger.evaluated["tokens_generated"],
            "oracle": run.ledger.oracle,
            "seconds": run.seconds,
            "wall_seconds": run.elapsed + time.time() - run.started,
            "device": run.clock.device.type,
            "processes": ranks.size(),
            "versions": {name: version(name) for name in LIBRARIES},
            "data": run.data,
            "code": run.code,
            "files": run_files(run.out),
        }
    )
