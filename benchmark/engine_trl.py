"""Stock TRL as an engine: `trl.GRPOTrainer` generates, scores, credits and trains; the harness keeps the account.

Nothing of the trainer is overridden. Each step is one generation batch: its prompts are the next of the order that all
arms share, its rewards are the harness's verdicts, its optimiser the run's own, so checkpoints and resume are those of
every run. What TRL decides itself: sampling (transformers' generate, a stream seeded by the run's seed and the step),
advantages, the shuffle of rollouts into minibatches, and the loss.

TRL draws whole groups in batches of a fixed size. Where a batch does not certainly fit the rest of the budget, a
smaller one is drawn; what cannot hold one group is spent on rollouts that do not train.

Of `backend`, TRL trains in `dtype` and with `gradient_checkpointing`, and accumulates gradients over passes of at most
`tokens_per_pass` tokens, padding included, each as large as the longest prompt and answer could make it. Evaluation is
the backend's. What TRL would leave out is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

import numpy as np
import torch

from benchmark import ranks, streams
from benchmark.collect import Collector
from benchmark.config import OptimiserConfig, RolloutConfig, RunConfig
from benchmark.draws import Batch, Draw
from benchmark.errors import InputError
from benchmark.method import Method
from benchmark.numerics import NumericalError
from benchmark.rollouts import Rollouts
from benchmark.update import Updater
from benchmark.verdict import reward

METRICS = {
    "loss": "optim/loss",
    "grad_norm": "optim/gradient_norm",
    "learning_rate": "optim/learning_rate",
    "entropy": "policy/entropy_nats",
    "clip_ratio/high_mean": "policy/clip_high_fraction",
    "clip_ratio/low_mean": "policy/clip_low_fraction",
}
"""TRL's log keys and the suite's; the latter are means over the step's updates, or over their passes."""
LEAVE_OUT = "leave TRL's arms out"


class TRLMethod(Protocol):
    """What this engine asks of a method."""

    def grpo_config(self) -> Mapping[str, Any]:
        """Arguments of `trl.GRPOConfig` that make the method: loss type, clip range, scale of rewards."""
        ...

    @property
    def overlong(self) -> tuple[float, float]:
        """Share of the token limit that is the soft overlong buffer, and the penalty's weight; 0 for none."""
        ...


class TRL:
    """One `GRPOTrainer` per size of batch, all on the run's model and optimiser."""

    def __init__(self, collector: Collector, updater: Updater) -> None:
        if torch.cuda.device_count() > 1:
            what = "TRL's trainer would spread the batches of one process over all GPUs that it sees"
            remedy = "Set CUDA_VISIBLE_DEVICES to one of them"
            raise InputError(what, key="method.name", value=type(collector.method).__name__, remedy=remedy)
        self.collector, self.updater = collector, updater
        self.method = cast(TRLMethod, collector.method)
        longest = max(map(len, collector.pool.tokens)) + collector.config.max_tokens
        self._rows = collector.backend.config.tokens_per_pass // longest  # of a pass, padded to the longest
        _check_passes(self.method, collector.config, updater.config, longest, collector.backend.config.tokens_per_pass)
        self._trainers: dict[int, Any] = {}
        self._folder = TemporaryDirectory(prefix="trl-")
        self._answers: tuple[list[list[int]], list[Any]] = ([], [])  # tokens and verdicts of the batch at hand

    @classmethod
    def check(cls, config: RunConfig, method: Method) -> None:
        """See `benchmark.engine.Engine.check`: what TRL's trainer would leave out, or do in another way."""
        if ranks.size() > 1:
            what = "TRL's trainer divides a batch among processes in its own way, off the harness's account"
            raise InputError(what, key="method.name", value=config.method.name, remedy="Run it in one process")
        rollout, backend = config.rollout, config.backend
        rows, group = rollout.prompts_per_batch * rollout.rollouts_per_prompt, rollout.rollouts_per_prompt
        unknown, leave = "TRL's trainer does not know it", LEAVE_OUT.capitalize()
        vllm = f"Set it to transformers, or {LEAVE_OUT}"
        faults: list[tuple[bool, str, object, str, str]] = [
            (rollout.staleness > 0, "rollout.staleness", rollout.staleness, unknown, leave),
            (config.verifier.flip_rate > 0, "verifier.flip_rate", config.verifier.flip_rate, unknown, leave),
            (backend.name == "vllm", "backend.name", "vllm", "TRL's trainer samples by transformers here", vllm),
            (
                backend.name == "transformers" and backend.rows_per_decode < rows,
                "backend.rows_per_decode",
                backend.rows_per_decode,
                f"TRL's trainer decodes all {rows} rollouts of a batch at a time",
                f"Raise it to {rows}, lower rollout.prompts_per_batch, or {LEAVE_OUT}",
            ),
            (
                backend.dtype != "float32" and backend.importance_cap is not None,
                "backend.importance_cap",
                backend.importance_cap,
                f"TRL's trainer does not correct rollouts for the rounding of {backend.dtype}",
                f"Set it to null, or {LEAVE_OUT}",
            ),
            (group < 2, "rollout.rollouts_per_prompt", group, "TRL's trainer needs two to compare", "Raise it to 2"),
        ]
        for wrong, key, value, what, remedy in faults:
            if wrong:
                raise InputError(what, key=key, value=value, remedy=remedy)
        # A prompt has at least one token; those of the pool are known once its tokenizer is.
        longest = 1 + rollout.max_tokens
        _check_passes(cast(TRLMethod, method), rollout, config.optimiser, longest, backend.tokens_per_pass)

    def step(self, step: int) -> tuple[Batch, dict[str, float]]:
        """One generation batch and its updates, or the last rollouts that the budget holds."""
        collector, config = self.collector, self.collector.config
        group = config.rollouts_per_prompt
        admitted = collector.budget.admit(collector.remaining, config.prompts_per_batch, group, config.max_tokens)
        if admitted.cut or admitted.rollouts < group:
            return collector.exhaust(step), {}
        prompts = collector.pool.prompts(collector.place, admitted.prompts)
        trainer = self._trainer(len(prompts))
        trainer.train_dataset = self._dataset(prompts)
        # Here, since making a trainer sets the seed as well.
        torch.manual_seed(streams.key(collector.pool.seed, "trl", step) >> 1)
        trainer.train()
        collector.place += len(prompts)
        batch = self._batch(prompts)
        self._charge(step, batch)
        return batch, self._metrics(step, trainer)

    # -- the trainer ---------------------------------------------------------------------------------------------

    def _trainer(self, prompts: int) -> Any:
        if prompts not in self._trainers:
            self._trainers[prompts] = self._make(prompts)
        return self._trainers[prompts]

    def _make(self, prompts: int) -> Any:
        from transformers import PrinterCallback, TrainerCallback
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        updater, rollout, policy = self.updater, self.collector.config, self.collector.policy
        optimiser, backend = updater.config, self.collector.backend.config
        minibatches = _minibatches(rollout, optimiser, prompts)
        rows = prompts * rollout.rollouts_per_prompt // minibatches
        passes = _passes(rows, self._rows)

        class Schedule(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                warm = min(1.0, (updater.updates + 1) / max(1, optimiser.warmup_steps))
                for part in updater.optimiser.adam.param_groups:
                    part["lr"] = optimiser.learning_rate * warm

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                updater.updates += 1

        on_cpu = self.collector.clock.device.type == "cpu"
        rewards, reward_weights = self._rewards()
        arguments = GRPOConfig(
            output_dir=str(Path(self._folder.name) / str(prompts)),
            per_device_train_batch_size=rows // passes,
            gradient_accumulation_steps=passes,
            steps_per_generation=minibatches * passes,
            num_iterations=optimiser.epochs,
            max_steps=minibatches * optimiser.epochs,
            num_generations=rollout.rollouts_per_prompt,
            max_completion_length=rollout.max_tokens,
            temperature=rollout.temperature,
            reward_weights=reward_weights,
            lr_scheduler_type="constant",
            learning_rate=optimiser.learning_rate,
            max_grad_norm=optimiser.gradient_clip,
            shuffle_dataset=False,
            bf16=backend.dtype == "bfloat16",
            use_cpu=on_cpu,
            gradient_checkpointing=backend.gradient_checkpointing,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            **self.method.grpo_config(),
        )
        trainer: Any = GRPOTrainer(
            model=policy.model,
            reward_funcs=rewards,
            args=arguments,
            train_dataset=self._dataset(self.collector.pool.prompts(0, 1)),
            processing_class=policy.tokenizer,
            callbacks=[Schedule()],
            optimizers=(updater.optimiser.adam, None),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _rewards(self) -> tuple[list[Any], list[float]]:
        """TRL's reward functions and their weights: right answers, and the penalty if the method has one."""
        from trl.rewards.other_rewards import get_soft_overlong_punishment

        (buffer, factor), limit = self.method.overlong, self.collector.config.max_tokens
        if not factor:
            return [self._correct], [1.0]
        return [self._correct, get_soft_overlong_punishment(limit, int(buffer * limit))], [1.0, factor]

    def _dataset(self, prompts: list[int]) -> Any:
        from datasets import Dataset

        pool, policy = self.collector.pool, self.collector.policy
        texts = [policy.render(pool.items[p].prompt) for p in prompts]
        read = policy.tokenizer(text=texts)["input_ids"]
        for p, ids in zip(prompts, read, strict=True):
            if ids != pool.tokens[p].tolist():
                what = "TRL would tokenise this prompt in another way than the harness (special tokens)"
                raise InputError(what, key="policy.path", value=pool.items[p].id, remedy="Use another tokenizer")
        return Dataset.from_list([{"prompt": text, "place": p} for text, p in zip(texts, prompts, strict=True)])

    def _correct(self, completion_ids: list[list[int]], place: list[int], **_: Any) -> list[float]:
        """TRL's reward function: 1 for a correct answer, by the harness's verifier."""
        collector = self.collector
        with collector.clock.phase("verify"):
            texts = collector.policy.decode(completion_ids)
            golds = [collector.pool.items[p].answer for p in place]
            finished = [ids[-1] in collector.policy.ends for ids in completion_ids]
            verdicts = collector.verifier.verify_rollouts(golds, texts, finished)
        self._answers = completion_ids, verdicts
        return [reward(verdict) for verdict in verdicts]

    # -- the account ---------------------------------------------------------------------------------------------

    def _batch(self, prompts: list[int]) -> Batch:
        """What TRL drew, in the harness's terms; TRL does not tell the log-probabilities (NaN)."""
        collector, (answers, verdicts) = self.collector, self._answers
        device, group = collector.clock.device, collector.config.rollouts_per_prompt
        length = torch.tensor([len(ids) for ids in answers], device=device)
        rollouts = Rollouts(
            prompt_tokens=torch.cat([collector.pool.tokens[p] for p in prompts]),
            prompt_length=torch.tensor([len(collector.pool.tokens[p]) for p in prompts], device=device),
            prompt=torch.repeat_interleave(torch.arange(len(prompts), device=device), group),
            tokens=torch.tensor([token for ids in answers for token in ids], device=device),
            length=length,
            log_prob=torch.full((int(length.sum()),), math.nan, device=device),
            finished=torch.tensor([ids[-1] in collector.policy.ends for ids in answers], device=device),
        )
        seen = collector.history.view(prompts)
        counts = np.full(len(prompts), group, dtype=np.int64)
        draw = Draw(prompts, counts, rollouts, verdicts, seen, cut=False)
        return Batch(rollouts, collector.groups(rollouts, verdicts, seen), [draw])

    def _charge(self, step: int, batch: Batch) -> None:
        collector, epochs = self.collector, self.updater.config.epochs
        (draw,) = batch.drawn
        collector.charge(step, draw, np.full(len(draw.prompts), "trained", dtype=object))
        made = len(batch.rollouts.tokens)
        read = made + int(batch.rollouts.prompt_length.sum())
        updates = _minibatches(collector.config, self.updater.config, len(draw.prompts)) * epochs
        if updates > 1:  # TRL then reads the batch once more before its updates
            collector.ledger.charge(step, "score", tokens_scored=made, flops=collector.prices.forward(read))
        both = collector.prices.forward(read) + collector.prices.backward(read)
        collector.ledger.charge(step, "backprop", tokens_backpropagated=made * epochs, flops=both * epochs)

    def _metrics(self, step: int, trainer: Any) -> dict[str, float]:
        logged = [row for row in trainer.state.log_history if "grad_norm" in row]
        if not all(math.isfinite(row["grad_norm"] + row["loss"]) for row in logged):
            raise NumericalError(f"step {step} of TRL: a loss or gradient norm is not finite; lower the learning rate")
        known = {key: name for key, name in METRICS.items() if all(key in row for row in logged)}  # by loss type
        return {name: float(np.mean([row[key] for row in logged])) for key, name in known.items()}


def _minibatches(rollout: RolloutConfig, optimiser: OptimiserConfig, prompts: int) -> int:
    """Updates of a batch: as many as keep a minibatch at its size, among those that split the rollouts evenly."""
    whole, wanted = rollout.prompts_per_batch, optimiser.minibatches_per_batch
    rows, most = prompts * rollout.rollouts_per_prompt, math.ceil(wanted * prompts / whole)
    if prompts == whole and rows % wanted:
        raise InputError(
            f"TRL cannot split {rows} rollouts into {wanted} equal minibatches",
            key="optimiser.minibatches_per_batch",
            value=wanted,
            remedy="Choose a divisor",
        )
    return max(parts for parts in range(1, most + 1) if rows % parts == 0)


def _passes(rows: int, most: int) -> int:
    """Equal passes of a minibatch of `rows` rollouts: the fewest of at most `most` each, or of one."""
    return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= max(1, most))


def _check_passes(
    method: TRLMethod, rollout: RolloutConfig, optimiser: OptimiserConfig, longest: int, limit: int
) -> None:
    """Refuse to accumulate a loss that TRL normalises within a pass: its result would depend on the passes.

    Raises:
        InputError: a minibatch of rows of `longest` tokens is no pass of `limit` tokens, or there is no even split.
    """
    sizes = range(rollout.prompts_per_batch, 0, -1)
    rows = max(n * rollout.rollouts_per_prompt // _minibatches(rollout, optimiser, n) for n in sizes)
    if method.grpo_config()["loss_type"] == "bnpo" and rows * longest > limit:
        what = f"TRL normalises loss_type bnpo within a pass, and a minibatch may take {rows * longest} tokens"
        remedy = (
            f"Raise it to {rows * longest} or more, give a loss that accumulates (method.batch_normaliser: true, "
            f"method.loss.aggregation: sequence_mean), or {LEAVE_OUT}"
        )
        raise InputError(what, key="backend.tokens_per_pass", value=limit, remedy=remedy)
