"""Stand-ins for training that worker processes import by name: they obey the contract of `run_cell`."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from benchmark.cells import Fence, claim
from benchmark.config import RunConfig
from benchmark.jsonl import append_rows, atomic_write_json, atomic_write_text
from benchmark.layers import dump


def progress(config: RunConfig, out: Path, share: float, state: str = "running") -> None:
    amount = config.budget.amount
    row = {
        "state": state,
        "currency": config.budget.currency,
        "planned": amount,
        "spent": int(share * amount),
    }
    atomic_write_json(out / "progress.json", {**row, "message": "step"})


def finish(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """A run that is over at once; the last digit of its pass@1 is its seed's."""
    atomic_write_text(out / "config.yaml", dump(config))
    append_rows(
        out.parent.parent / "order.jsonl",
        [{"arm": config.arm, "seed": config.seed, "threads": os.environ["OMP_NUM_THREADS"]}],
    )
    correct = (3 if config.arm == "grpo" else 4) + config.seed % 2
    spent = {"rollouts": 100, "tokens_generated": config.budget.amount, "flops": 10 * config.budget.amount}
    head = {"point": 0, "step": 1, "final": True, "cost": spent}
    rows = [head | {"item": f"sum/{i}", "family": "sum", "n": 10, "c": correct, "tokens": 10} for i in range(4)]
    append_rows(out / "evaluation.jsonl", rows)
    progress(config, out, 1.0, "done")
    result = {"run_hash": config.run_hash, "spent": spent, "wall_seconds": 60.0}
    atomic_write_json(out / "result.json", result)


def fail_rloo(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """One arm does not work."""
    if config.arm == "rloo":
        print("about to fail")
        raise ValueError("rloo is broken today")
    finish(config, out, should_stop=should_stop)


def fail_all(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """No arm works."""
    raise ValueError("<b>nothing</b>\nworks today")


def kill_rloo(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """One arm takes its process down, as the kernel does when memory runs out."""
    if config.arm == "rloo":
        os.kill(os.getpid(), signal.SIGKILL)
    finish(config, out, should_stop=should_stop)


def with_helper(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """Ends a helper process of its own the polite way, as a verifier does with one that hangs."""
    helper = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"])
    time.sleep(0.3)
    helper.terminate()
    helper.wait(timeout=10)
    finish(config, out, should_stop=should_stop)


def exit_early(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """Must not be called."""
    raise AssertionError("a finished cell was run again")


def patient(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """Steps until it is told to stop, then saves; what it saved lets it finish at once."""
    if (out / "checkpoint").exists():
        finish(config, out, should_stop=should_stop)
        return
    progress(config, out, 0.5)
    for _ in range(3000):
        if should_stop():
            (out / "checkpoint").touch()
            raise RuntimeError("Interrupted")
        time.sleep(0.01)


def deaf(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """Never asks whether to stop."""
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (out / "helper").write_text(str(helper.pid))
    progress(config, out, 0.25)
    time.sleep(60)
    (out / "woken").touch()


def robbed(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """Another process takes the cell over in the middle of the run and finishes it."""
    heir = claim(out, stale_after=-math.inf)
    assert heir is not None
    progress(config, out, 0.5)
    try:
        should_stop()
    finally:
        finish(config, out, should_stop=should_stop)
        heir.release()
