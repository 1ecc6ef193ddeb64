"""One run: an arm and a seed, from the warmed-up policy to the final evaluation, resumable at every checkpoint."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmark import backend, bundle, checkpoint, engine, machine, optimiser, ranks, registry, sharding
from benchmark.cells import Fence
from benchmark.clock import Clock
from benchmark.collect import Collector
from benchmark.config import RunConfig
from benchmark.draws import Pool
from benchmark.errors import InputError, RunError, storing
from benchmark.errors import Interrupted as Interrupted
from benchmark.evaluation import Evaluator
from benchmark.history import Floats, PromptHistory
from benchmark.jsonl import (
    Record,
    atomic_write_json,
    atomic_write_text,
    clear_partial,
    fingerprint,
    read_rows,
    restart,
)
from benchmark.ledger import Budget, Ledger, Prices
from benchmark.numerics import NumericalError
from benchmark.policy import Policy, prepare_machine
from benchmark.preflight import check_verifier, preflight
from benchmark.probing import prompt_features
from benchmark.problems import digest, load_task
from benchmark.recall import Recall
from benchmark.result import result_of
from benchmark.source import code_of
from benchmark.staleness import Past
from benchmark.step_metrics import allocation_row, rollout_metrics
from benchmark.trace import EvaluationTrace, Trace
from benchmark.update import Updater
from benchmark.verifier import Verifier
from benchmark.warmup import ensure_policy

RECORDS = ("ledger.jsonl", "timings.jsonl", "metrics.jsonl", "evaluation.jsonl", "allocation.jsonl", "traces.jsonl")
CHECKPOINT_SECONDS = 60.0
"""Between two checkpoints; longer where saving takes so long that it would cost more than a twentieth of the time."""


@dataclass(frozen=True)
class RunProgress:
    """Where a run stands, in its budget's currency."""

    currency: str
    planned: int
    spent: int
    step: int
    message: str


Tell = Callable[[RunProgress], None]


def run_cell(
    config: RunConfig,
    out: Path,
    *,
    progress: Tell | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    fence: Fence = contextlib.nullcontext,
) -> None:
    """Run or resume one cell into the folder `out`; ``result.json`` is written last and means done.

    Records are begun, checkpoints and the result are written inside `fence`, which raises if another process owns the
    cell by then.

    Raises:
        Interrupted: `should_stop` became true; a checkpoint was written first, unless nothing had begun.
        InputError: `out` holds a run of another configuration.
        StorageError: a file cannot be written, or the folder was deleted or taken over.
        NumericalError: a number that must be finite is not.
    """
    with storing(out):
        out.mkdir(parents=True, exist_ok=True)
        clear_partial(out, owned=True)
    if (out / "result.json").exists():
        checkpoint.clear(out / "checkpoint")  # left by a process killed just after its last file
        return
    _claim_folder(config, out)
    run = Run(config, out, progress or (lambda _: None), fence, should_stop)
    try:
        with run.verifier, contextlib.closing(run.backend):
            if config.policy.path is not None:
                check_verifier(run.verifier, run.evaluator.pool)
                pools = [run.collector.pool, run.evaluator.pool]
                preflight(run.backend, run.optimiser, pools, config.rollout, out)
            run.execute(should_stop)
    except BaseException as error:
        interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        if isinstance(error, NumericalError):
            where = bundle.save(run, error)
            told = f"{config.arm}, seed {config.seed}, step {run.step}: {error}"
            error.args = (f"{told}. Lower optimiser.learning_rate; `rolloutbench replay-batch {where}` runs it again",)
        # What cannot be written any more must not hide why; a deleted folder does not come back.
        with contextlib.suppress(RunError):
            if (out / "config.yaml").exists():
                run.report("interrupted" if interrupted else "failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        run.close()


def measure_unit_prices(config: RunConfig) -> dict[str, float]:
    """Price of a unit of budget here, from two training steps (or all that it pays for) and one small evaluation.

    Returns:
        Amounts per unit of the budget's currency: every countable currency, and ``wall_seconds`` of one worker
        (evaluations of the whole run included, spread over its budget).
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Path(folder), lambda _: None)
        with run.verifier, contextlib.closing(run.backend):
            while run.step < 2 and run.collector.remaining > 0:
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

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        progress: Tell,
        fence: Fence = contextlib.nullcontext,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.out, self.progress, self.fence = config, out, progress, fence
        self.started = time.time()
        device = prepare_machine()
        self.clock = Clock(device)
        self.method = registry.build(config.method.name, config.method.params)
        trainer = engine.load(self.method.engine)
        trainer.check(config, self.method)
        sharding.check(config, self.method)
        written, start = config.policy, ensure_policy(config)
        policy = Policy.load(start, device, backend=config.backend, template=written.template, lora=written.lora)
        self.policy, self.optimiser = policy, optimiser.make(policy, config.optimiser)
        self.backend = backend.make(policy, config.backend, start, should_stop)
        train, held_out = load_task(config.task, out / "contamination.jsonl")
        self.data = {"train": digest(train), "evaluation": digest(held_out)}
        self.verifier = Verifier(answer_form=config.task.answer_form)
        rollout, temperature = config.rollout, config.evaluation.temperature
        pool, held_out_pool = (Pool.of(items, policy, config.seed, device) for items in (train, held_out))
        self.evaluator = Evaluator(held_out_pool, self.backend, self.verifier, rollout.max_tokens, temperature)
        self.budget = Budget(config.budget.currency, config.budget.amount)
        self.history = PromptHistory(len(train), self.method.half_life)
        self.prices, self.past, self.recall = Prices(policy.size), Past(rollout.staleness), Recall()
        self.step, self.points, self.elapsed, self.seconds = 0, 0, 0.0, dict[str, float]()
        self.saved: tuple[int, int] | None = None  # step and points of the newest checkpoint
        self.save_after = time.monotonic() + CHECKPOINT_SECONDS
        self.ledger, self.records = Ledger(out / "ledger.jsonl"), dict[str, Record]()
        self.trace = Trace(policy, train)
        features = self._features(pool)  # of the policy before RL: a checkpoint would replace it
        fresh = not self._resume()
        self.history.features = features
        if features.size and fresh:
            read = sum(map(len, pool.tokens))
            self.ledger.charge(0, "features", tokens_scored=read, flops=self.prices.forward(read))
        parts = (self.method, pool, self.backend, self.verifier, self.history, self.ledger, self.budget, self.prices)
        noise = config.verifier.flip_rate
        self.collector = Collector(*parts, rollout, self.clock, self.place, noise, self.recall)
        self.updater = Updater(
            self.method,
            self.backend,
            self.optimiser,
            config.optimiser,
            rollout.temperature,
            config.seed,
            self.ledger,
            self.prices,
            self.clock,
            updates=self.updates,
            signal=self.signal,
            trace=self.trace,
            past=self.past,
        )
        self.engine = trainer(self.collector, self.updater)

    def _features(self, pool: Pool) -> Floats:
        if not self.method.features:
            return self.history.features
        with self.clock.phase("forward"):
            return prompt_features(self.policy.fused(), pool.tokens)

    # -- the loop ------------------------------------------------------------------------------------------------

    def execute(self, should_stop: Callable[[], bool]) -> None:
        """Alternate steps and evaluations until the budget is spent, then evaluate once more and write the result."""
        last = self.config.evaluation.points - 1
        while self.collector.remaining > 0:
            spent = self.budget.amount - self.collector.remaining
            if self.points < last and spent * last >= self.points * self.budget.amount:
                self._evaluate(final=False)
                self._save()
            if ranks.agree(should_stop()):
                self._save()
                raise Interrupted
            self.step_once()
            if ranks.agree(time.monotonic() >= self.save_after):
                self._save()
        self._save()
        self._evaluate(final=True)
        self._finish()

    def step_once(self) -> None:
        """One training step: collect, update, record."""
        with self.clock.phase("other"):
            batch, trained = self.engine.step(self.step)
            metrics = rollout_metrics(batch) | trained
            traces = self.out / "traces.jsonl"
            if trained and not (traces.exists() and traces.stat().st_size):
                self.records["traces.jsonl"].append(self.trace.rows)
            self.records["metrics.jsonl"].append(
                [{"step": self.step, "cost": self.ledger.spent, "metrics": metrics}],
            )
            self.records["allocation.jsonl"].append([allocation_row(self.step, batch)])
            self.step += 1
            self.report("running", f"step {self.step}")
        self._time({"step": self.step - 1})

    def _evaluate(self, *, final: bool) -> None:
        samples = self.config.evaluation.final_samples if final else self.config.evaluation.samples
        watch = EvaluationTrace(self.backend, self.evaluator.pool.items, self.step, self.config.evaluation.temperature)
        with self.clock.phase("evaluate"):
            rows, spent = self.evaluator.evaluate(samples, watch if final else None)
            if final:
                self._write_traces(watch.rows)
        read = spent["prompt_tokens"] + spent["tokens_generated"] + watch.read
        flops = self.prices.forward(read)
        self.ledger.charge(self.step, "evaluation", None, tokens_scored=watch.tokens, flops=flops, **spent)
        head = {"point": self.points, "step": self.step, "final": final, "cost": dict(self.ledger.spent)}
        self.records["evaluation.jsonl"].append([head | row for row in rows])
        accuracy = sum(row["c"] / row["n"] for row in rows) / len(rows)
        self.points += 1
        self.report("running", f"evaluated: pass@1 {accuracy:.3f}")
        self._time({"step": self.step, "point": self.points - 1})

    def _write_traces(self, evaluated: list[dict[str, Any]]) -> None:
        """The newest update's rows, unless it was the first as well, and the evaluation's."""
        path, last = self.out / "traces.jsonl", self.trace.rows
        first = read_rows(path)[0]
        self.records["traces.jsonl"].append([row for row in last if row["step"] != first[0]["step"]] + evaluated)

    def _time(self, where: dict[str, int]) -> None:
        taken = self.clock.take()
        for phase, value in taken.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        device = self.clock.device
        gpu = torch.cuda.mem_get_info(device) if device.type == "cuda" else None
        row = where | {"seconds": taken, "cost": dict(self.ledger.spent), "system": machine.usage(gpu)}
        row["elapsed"] = round(self.elapsed + time.time() - self.started, 3)
        self.records["timings.jsonl"].append([row])

    # -- what is on disk -----------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a checkpoint, unless this very state has one."""
        if self.saved == (self.step, self.points):
            return
        begin = time.monotonic()
        tensors = checkpoint.tensors_of(self.policy, self.optimiser)
        if ranks.rank() == 0:
            with self.fence():
                self._write_checkpoint(tensors)
        now = time.monotonic()
        self.saved = (self.step, self.points)
        self.save_after = now + max(CHECKPOINT_SECONDS, 20 * (now - begin))

    def _write_checkpoint(self, tensors: dict[str, torch.Tensor]) -> None:
        """Records go to the disk before what counts on them."""
        for record in self.records.values():
            record.check()
            record.sync()
        state = {
            "run_hash": self.config.run_hash,
            "step": self.step,
            "place": self.collector.place,
            "points": self.points,
            "updates": self.updater.updates,
            "signal": self.updater.signal,
            "elapsed": self.elapsed + time.time() - self.started,
            "seconds": self.seconds,
            "code": self.code,
            "ledger": self.ledger.state(),
            "trace": self.trace.rows,
            "records": {name: fingerprint(self.out / name) for name in RECORDS},
        }
        history = {name: torch.from_numpy(values) for name, values in self.history.state().items()}
        history |= self.past.state() | self.recall.state()
        checkpoint.save(self.out / "checkpoint", tensors, history, state)

    def _resume(self) -> bool:
        """Continue from the newest whole checkpoint, or (False) from nothing: records are cut back to what it knew."""
        self.place = self.updates = 0
        self.signal, self.code = [0.0, 0.0, 0.0], [code_of(type(self.method))]
        with self.fence():
            found = checkpoint.latest(self.out / "checkpoint", self._fits) if ranks.rank() == 0 else None
            kept = found[1]["records"] if found else {}
            for name in RECORDS:
                self.records[name] = restart(self.out / name, kept.get(name, (0, ""))[0], done=self.out / "result.json")
        found = ranks.agree(found)
        self.ledger.record = self.records["ledger.jsonl"]
        if found is None:
            return False
        file, state = found
        history = checkpoint.load(file, self.policy, self.optimiser)
        self.history.restore({name: values.numpy() for name, values in history.items()})
        self.past.restore(history, self.policy)
        self.recall.restore(history)
        self.step, self.place, self.points = state["step"], state["place"], state["points"]
        self.saved = (self.step, self.points)
        self.updates, self.elapsed, self.seconds = state["updates"], state["elapsed"], state["seconds"]
        self.signal, known = state["signal"], state.get("code", [])
        self.code = known + [code for code in self.code if code not in known]
        self.trace.restore(state.get("trace", []))
        self.ledger = Ledger.restore(self.out / "ledger.jsonl", state["ledger"])
        self.ledger.record = self.records["ledger.jsonl"]
        return True

    def _fits(self, state: dict[str, Any]) -> bool:
        """Whether the records still begin with what they held when the checkpoint was written."""
        same = (
            list(fingerprint(self.out / name, size)) == [size, sha] for name, (size, sha) in state["records"].items()
        )
        return state["run_hash"] == self.config.run_hash and all(same)

    def close(self) -> None:
        """Let go of the files of the records."""
        for record in self.records.values():
            record.close()

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
        weights = self.policy.gathered()
        if ranks.rank() > 0:
            return
        with self.fence():
            for record in self.records.values():
                record.check()
                record.sync()
            self.policy.save(self.out / "policy", weights)
            self.report("done", f"{self.step} steps")
            atomic_write_json(self.out / "result.json", result_of(self))
            checkpoint.clear(self.out / "checkpoint")
