"""Training faked for sweeps: what a run reaches is a known function of its configuration."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from benchmark.cells import Fence
from benchmark.config import RunConfig
from benchmark.errors import Interrupted
from benchmark.jsonl import append_rows, atomic_write_json, atomic_write_text
from benchmark.layers import dump
from benchmark.ledger import CURRENCIES, FATES

SAMPLES = 1000
ITEMS = 6


def accuracy(config: RunConfig) -> float:
    """Best at learning rate 5e-4 and alpha 0.6 (default 3e-4 and 0.2); seeds shift every setting alike."""
    import math

    alpha = config.method.params.get("compensation", {}).get("alpha", 0.2 if config.method.name == "dynamo" else 0.6)
    rate = math.log10(config.optimiser.learning_rate / 5e-4)
    return 0.6 - 0.2 * rate**2 - 0.3 * (alpha - 0.6) ** 2 + 0.01 * (config.seed % 3)


def log(out: Path, event: str, config: RunConfig) -> None:
    row = {"event": event, "arm": config.arm, "seed": config.seed, "hash": config.run_hash, "pid": os.getpid()}
    append_rows(out.parent.parent / "runs.jsonl", [row])


def evaluate(config: RunConfig, out: Path, point: int, *, final: bool) -> None:
    """Rows of an evaluation: half the accuracy at first, then three quarters of it, or all of it at the end."""
    rows = []
    for item in range(ITEMS):
        right = round(SAMPLES * (1.0 if final else 0.5 + 0.25 * point) * accuracy(config)) + item
        row = {"point": point, "step": point, "final": final, "item": f"i{item}", "family": f"f{item % 2}"}
        cost = dict.fromkeys(CURRENCIES, point * config.budget.amount)
        rows.append(row | {"n": SAMPLES, "c": right, "tokens": 1, "cost": cost})
    append_rows(out / "evaluation.jsonl", rows)


def train(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """A run that is over at once."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "result.json").exists():
        return
    atomic_write_text(out / "config.yaml", dump(config))
    log(out, "run", config)
    amount = config.budget.amount
    cost = dict.fromkeys(CURRENCIES, amount)
    (out / "evaluation.jsonl").unlink(missing_ok=True)
    for point in range(2):
        evaluate(config, out, point, final=point == 1)
    atomic_write_json(out / "progress.json", {"state": "done", "spent": amount, "planned": amount, "message": ""})
    result = {
        "run_hash": config.run_hash,
        "planned": {config.budget.currency: amount},
        "spent": cost | {"device_seconds": 1.5, "verifier_seconds": 0.0},
        "drawn": dict.fromkeys(FATES, 0) | {"trained": amount},
        "overshoot": 0,
        "steps": 2,
        "wall_seconds": 2.0,
        "evaluation_tokens": 7,
        "device": "cpu",
    }
    atomic_write_json(out / "result.json", result)


def slow(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """Ten steps with a checkpoint after each; a run that goes on does not repeat one."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "result.json").exists():
        return
    done = len(list(out.glob("step*")))
    for step in range(done, 10):
        if should_stop():
            raise RuntimeError("stopped")
        time.sleep(0.03)
        log(out, f"step {step}", config)
        (out / f"step{step}").touch()
    train(config, out, should_stop=should_stop)


def look_back(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """Evaluated on the way, where it may be told to stop."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "result.json").exists():
        atomic_write_text(out / "config.yaml", dump(config))
        (out / "checkpoint").mkdir(exist_ok=True)
        log(out, "begin", config)
        for point in range(2):
            evaluate(config, out, point, final=False)
        if should_stop():
            raise Interrupted
    train(config, out, should_stop=should_stop)


def die_once(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """The second seed of every trial takes its worker process down, the first time."""
    if config.seed == 1 and config.arm.endswith("t001") and not (out / "died").exists():
        out.mkdir(parents=True, exist_ok=True)
        (out / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    train(config, out, should_stop=should_stop)


def fail_one(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """One trial does not work until somebody mends it."""
    if config.arm == "grpo-t002" and not (out.parent.parent / "mended").exists():
        raise ValueError("broken today")
    train(config, out, should_stop=should_stop)


def diverge(config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence = nullcontext) -> None:
    """Large learning rates diverge."""
    if config.optimiser.learning_rate > 1e-3:
        out.mkdir(parents=True, exist_ok=True)
        raise FloatingPointError("loss is not finite")
    train(config, out, should_stop=should_stop)


def main() -> None:
    """``python fake_sweep.py FILE DIR [URL]``: a launcher of its own, for tests that kill it."""
    from benchmark.sweep import run_sweep
    from benchmark.sweep_space import read_sweep

    file, folder, *url = sys.argv[1:]
    sweep, storage = read_sweep(Path(file)), url[0] if url else None
    run_sweep(sweep, Path(folder), workers=2, url=storage, run=slow, prepare_policy=lambda _: None)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import fake_sweep

    fake_sweep.main()
