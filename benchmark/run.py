"""One run: an arm and a seed, from the warmed-up policy to the final evaluation, resumable at every checkpoint."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmark import checkpoint, registry
from benchmark.clock import Clock
from benchmark.collect import Collector
from benchmark.config import RunConfig
from benchmark.draws import Batch, Pool
from benchmark.errors import InputError
from benchmark.evaluation import Evaluator
from benchmark.groups import segment_sum
from benchmark.history import PromptHistory
from benchmark.jsonl import append_rows, atomic_write_json, atomic_write_text
from benchmark.ledger import UNCHARGED_PHASES, Budget, Ledger, Prices
from benchmark.policy import Policy, prepare_machine
from benchmark.probing import prompt_features
from benchmark.problems import load_task
from benchmark.update import Updater, make_optimiser
from benchmark.verdict import Verdict
from benchmark.verifier import Verifier
from benchmark.warmup import ensure_policy

RECORDS = ("ledger.jsonl", "timings.jsonl", "metrics.jsonl", "evaluation.jsonl", "allocation.jsonl")


class Interrupted(Exception):  # noqa: N818 - a request that was met, not a fault
    """The run was asked to stop; it checkpointed and can be resumed."""


@dataclass(frozen=True)
class RunProgress:
    """Where a run stands, in its budget's currency."""

    currency: str
    planned: int
    spent: int
    step: int
    message: str


def run_cell(
    config: RunConfig,
    out: Path,
    *,
    progress: Callable[[RunProgress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Run or resume one cell into the folder `out`; ``result.json`` is written last and means done.

    Raises:
        Interrupted: `should_stop` became true; a checkpoint was written first.
        InputError: `out` holds a run of another configuration.
    """
    out.mkdir(parents=True, exist_ok=True)
    if (out / "result.json").exists():
        return
    _claim_folder(config, out)
    run = Run(config, out, progress or (lambda _: None))
    try:
        with run.verifier:
            run.execute(should_stop)
    except BaseException as error:
        interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        run.report("interrupted" if interrupted else "failed", f"{type(error).__name__}: {error}")
        raise


def measure_unit_prices(config: RunConfig) -> dict[str, float]:
    """Price of a unit of budget on this machine, from two training steps and one small evaluation.

    Returns:
        Amounts per unit of the budget's currency: every countable currency, and ``wall_seconds`` of one worker
        (evaluations of the whole run included, spread over its budget).
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Path(folder), lambda _: None)
        with run.verifier:
            run.step_once()
            run.step_once()
            training = sum(run.seconds.values())
            with run.clock.phase("evaluate"):
                run.evaluator.evaluate(1)
            evaluating = sum(run.clock.take().values())
        spent = run.ledger.spent
    amount = spent[run.budget.currency]
    plan = config.evaluation
    repeats = plan.samples * (plan.points - 1) + plan.final_samples
    wall = training / amount + evaluating * repeats / run.budget.amount
    return {currency: value / amount for currency, value in spent.items()} | {"wall_seconds": wall}


def _claim_folder(config: RunConfig, out: Path) -> None:
    file = out / "config.yaml"
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    if not file.exists():
        atomic_write_text(file, text)
    elif RunConfig.model_validate(yaml.safe_load(file.read_text(encoding="utf-8"))).run_hash != config.run_hash:
        raise InputError(
            "the folder holds a run of another configuration",
            file=file,
            remedy="Choose another --out, or delete it",
        )


class Run:
    """The state of one run and its loop."""

    def __init__(self, config: RunConfig, out: Path, progress: Callable[[RunProgress], None]) -> None:
        self.config, self.out, self.progress = config, out, progress
        self.started = time.time()
        device = prepare_machine()
        self.clock = Clock(device)
        self.method = registry.build(config.method.name, config.method.params)
        policy = Policy.load(ensure_policy(config), device)
        self.policy, self.optimiser = policy, make_optimiser(policy, config.optimiser)
        train, held_out = load_task(config.task)
        self.verifier = Verifier(answer_form=config.task.answer_form)
        pool = Pool.of(train, policy, config.seed, device)
        rollout, evaluation = config.rollout, config.evaluation
        self.evaluator = Evaluator(
            Pool.of(held_out, policy, config.seed, device),
            policy,
            self.verifier,
            rollout.max_tokens,
            evaluation.temperature,
            device,
        )
        self.budget = Budget(config.budget.currency, config.budget.amount)
        self.history = PromptHistory(len(train), self.method.half_life)
        self.prices = Prices(policy.size)
        self.step, self.points, self.elapsed = 0, 0, 0.0
        self.seconds: dict[str, float] = {}
        self.ledger = Ledger(out / "ledger.jsonl")
        if self.method.features:
            with self.clock.phase("forward"):
                self.history.features = prompt_features(policy.fused(), pool.tokens)
        if not self._resume() and self.method.features:
            read = sum(map(len, pool.tokens))
            self.ledger.charge(0, "features", tokens_scored=read, flops=self.prices.forward(read))
        self.collector = Collector(
            self.method,
            pool,
            policy,
            self.verifier,
            self.history,
            self.ledger,
            self.budget,
            self.prices,
            rollout,
            self.clock,
            self.place,
        )
        self.updater = Updater(
            self.method,
            policy,
            self.optimiser,
            config.optimiser,
            rollout.temperature,
            config.seed,
            self.ledger,
            self.prices,
            self.clock,
            updates=self.updates,
        )

    # -- the loop ------------------------------------------------------------------------------------------------

    def execute(self, should_stop: Callable[[], bool]) -> None:
        """Alternate steps and evaluations until the budget is spent, then evaluate once more and write the result."""
        last = self.config.evaluation.points - 1
        while self.collector.remaining > 0:
            spent = self.budget.amount - self.collector.remaining
            if self.points < last and spent * last >= self.points * self.budget.amount:
                self._evaluate(final=False)
                self._save()
            if should_stop():
                self._save()
                raise Interrupted
            self.step_once()
        self._evaluate(final=True)
        self._finish()

    def step_once(self) -> None:
        """One training step: collect, update, record."""
        with self.clock.phase("other"):
            batch = self.collector.collect(self.step)
            metrics = _rollout_metrics(batch)
            if len(batch.rollouts):
                metrics |= self.updater.update(self.step, batch)
            append_rows(
                self.out / "metrics.jsonl",
                [{"step": self.step, "cost": self.ledger.spent, "metrics": metrics}],
            )
            append_rows(self.out / "allocation.jsonl", [_allocation_row(self.step, batch)])
            self.step += 1
            self.report("running", f"step {self.step}")
        self._time({"step": self.step - 1})

    def _evaluate(self, *, final: bool) -> None:
        samples = self.config.evaluation.final_samples if final else self.config.evaluation.samples
        with self.clock.phase("evaluate"):
            rows, spent = self.evaluator.evaluate(samples)
        tokens = spent["prompt_tokens"] + spent["tokens_generated"]
        self.ledger.charge(self.step, "evaluation", None, flops=self.prices.forward(tokens), **spent)
        head = {"point": self.points, "step": self.step, "final": final, "cost": dict(self.ledger.spent)}
        append_rows(self.out / "evaluation.jsonl", [head | row for row in rows])
        accuracy = sum(row["c"] / row["n"] for row in rows) / len(rows)
        self.points += 1
        self.report("running", f"evaluated: pass@1 {accuracy:.3f}")
        self._time({"step": self.step, "point": self.points - 1})

    def _time(self, where: dict[str, int]) -> None:
        taken = self.clock.take()
        for phase, value in taken.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        append_rows(self.out / "timings.jsonl", [where | {"seconds": taken}])

    # -- what is on disk -----------------------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "run_hash": self.config.run_hash,
            "step": self.step,
            "place": self.collector.place,
            "points": self.points,
            "updates": self.updater.updates,
            "elapsed": self.elapsed + time.time() - self.started,
            "seconds": self.seconds,
            "ledger": self.ledger.state(),
            "records": {name: _size(self.out / name) for name in RECORDS},
        }
        history = {name: torch.from_numpy(values) for name, values in self.history.state().items()}
        checkpoint.save(self.out / "checkpoint", self.policy, self.optimiser, history, state)

    def _resume(self) -> bool:
        """Continue from the newest checkpoint, or (False) from nothing: records are cut back to what it knew."""
        state = checkpoint.latest(self.out / "checkpoint")
        self.place = self.updates = 0
        for name in RECORDS:
            _truncate(self.out / name, 0 if state is None else state["records"][name])
        if state is None:
            return False
        history = checkpoint.load(self.out / "checkpoint", state, self.policy, self.optimiser)
        self.history.restore({name: values.numpy() for name, values in history.items()})
        self.step, self.place, self.points = state["step"], state["place"], state["points"]
        self.updates, self.elapsed, self.seconds = state["updates"], state["elapsed"], state["seconds"]
        self.ledger = Ledger.restore(self.out / "ledger.jsonl", state["ledger"])
        return True

    def report(self, state: str, message: str) -> None:
        """Tell the caller and ``progress.json`` where the run stands."""
        spent = self.ledger.spent[self.budget.currency]
        atomic_write_json(
            self.out / "progress.json",
            {
                "state": state,
                "currency": self.budget.currency,
                "planned": self.budget.amount,
                "spent": spent,
                "started_at": self.started,
                "updated_at": time.time(),
                "message": message,
            },
        )
        self.progress(RunProgress(self.budget.currency, self.budget.amount, spent, self.step, message))

    def _finish(self) -> None:
        config, spent = self.config, self.ledger.spent
        training = sum(value for phase, value in self.seconds.items() if phase not in UNCHARGED_PHASES)
        self.policy.save(self.out / "policy")
        self.report("done", f"{self.step} steps")
        result: dict[str, Any] = {
            "run_hash": config.run_hash,
            "plan_hash": config.plan_hash,
            "study": config.study,
            "arm": config.arm,
            "seed": config.seed,
            "scale": config.scale,
            "planned": {self.budget.currency: self.budget.amount},
            "spent": spent | {"device_seconds": training, "verifier_seconds": self.seconds.get("verify", 0.0)},
            "overshoot": spent[self.budget.currency] - self.budget.amount,
            "steps": self.step,
            "drawn": self.ledger.drawn,
            "evaluation_tokens": self.ledger.evaluated["tokens_generated"],
            "oracle": self.ledger.oracle,
            "seconds": self.seconds,
            "wall_seconds": self.elapsed + time.time() - self.started,
            "device": self.clock.device.type,
            "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "rolloutbench")},
        }
        atomic_write_json(self.out / "result.json", result)
        checkpoint.clear(self.out / "checkpoint")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _truncate(path: Path, size: int) -> None:
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(size)


def _counts(batch: Batch) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.concatenate([draw.counts for draw in batch.drawn])


def _allocation_row(step: int, batch: Batch) -> dict[str, Any]:
    values, times = np.unique(_counts(batch), return_counts=True)
    histogram = {str(value): int(count) for value, count in zip(values, times, strict=True)}
    return {"step": step, "n_min": int(values[0]), "n_max": int(values[-1]), "histogram": histogram}


def _rollout_metrics(batch: Batch) -> dict[str, float]:
    """Metrics over everything drawn in the step; per-prompt means do not follow the allocation."""
    verdicts = [verdict for draw in batch.drawn for verdict in draw.verdicts]
    correct, groups, degenerate, tokens = [], 0, 0, 0
    for draw in batch.drawn:
        right = torch.tensor([v is Verdict.CORRECT for v in draw.verdicts], dtype=torch.float64)
        successes = segment_sum(right, draw.rollouts.prompt.cpu(), len(draw.prompts)).numpy()
        drawn = draw.counts > 0
        correct += (successes[drawn] / draw.counts[drawn]).tolist()
        groups += int(drawn.sum())
        degenerate += int(((successes == 0) | (successes == draw.counts))[drawn].sum())
        tokens += len(draw.rollouts.tokens)
    counts = _counts(batch)
    rates = {f"train/verdict_{v.value}_fraction": verdicts.count(v) / len(verdicts) for v in Verdict}
    return rates | {
        "train/accuracy_per_prompt_mean": float(np.mean(correct)),
        "train/accuracy_per_rollout_mean": rates["train/verdict_correct_fraction"],
        "train/degenerate_group_fraction": degenerate / groups,
        "train/tokens_per_rollout_mean": tokens / len(verdicts),
        "rollout/prompts": float(groups),
        "rollout/n_min": float(counts.min()),
        "rollout/n_max": float(counts.max()),
        "rollout/n_std": float(counts.std()),
    }
