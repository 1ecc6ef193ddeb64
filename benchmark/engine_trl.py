"""Stock TRL as an engine: `trl.GRPOTrainer` generates, scores, credits and trains; the harness keeps the account.

Nothing of the trainer is overridden. Each step is one generation batch: its prompts are the next of the order that all
arms share, its rewards are the harness's verdicts, its optimiser the run's own, so checkpoints and resume are those of
every run. What TRL decides itself: sampling (transformers' generate, a stream seeded by the run's seed and the step),
advantages, the shuffle of rollouts into minibatches, and the loss.

TRL draws whole groups in batches of a fixed size. Where a batch does not certainly fit the rest of the budget, a
smaller one is drawn; what cannot hold one group is spent on rollouts that do not train.
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
from benchmark.draws import Batch, Draw
from benchmark.errors import InputError
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
"""TRL's log keys and the suite's; the latter are means over the step's updates."""


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
        for key, value in (("rollout.staleness", updater.past.steps), ("verifier.flip_rate", collector.flip_rate)):
            if value:
                raise InputError("TRL's trainer does not know it", key=key, value=value, remedy="Leave TRL's arms out")
        if ranks.size() > 1:
            what = "TRL's trainer divides a batch among processes in its own way, off the harness's account"
            raise InputError(
                what, key="method.name", value=type(collector.method).__name__, remedy="Run it in one process"
            )
        self.collector, self.updater = collector, updater
        self.method = cast(TRLMethod, collector.method)
        self._trainers: dict[int, Any] = {}
        self._folder = TemporaryDirectory(prefix="trl-")
        self._answers: tuple[list[list[int]], list[Any]] = ([], [])  # tokens and verdicts of the batch at hand

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
        from trl.rewards.other_rewards import get_soft_overlong_punishment
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        updater, rollout = self.updater, self.collector.config
        optimiser, rows = updater.config, prompts * rollout.rollouts_per_prompt
        minibatches = self._minibatches(prompts)

        class Schedule(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                warm = min(1.0, (updater.updates + 1) / max(1, optimiser.warmup_steps))
                for part in updater.optimiser.adam.param_groups:
                    part["lr"] = optimiser.learning_rate * warm

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                updater.updates += 1

        on_cpu = self.collector.clock.device.type == "cpu"
        buffer, factor = self.method.overlong
        rewards: list[Any] = [self._correct]
        if factor:
            rewards.append(get_soft_overlong_punishment(rollout.max_tokens, int(buffer * rollout.max_tokens)))
        arguments = GRPOConfig(
            output_dir=str(Path(self._folder.name) / str(prompts)),
            per_device_train_batch_size=rows // minibatches,
            gradient_accumulation_steps=1,
            steps_per_generation=minibatches,
            num_iterations=optimiser.epochs,
            max_steps=minibatches * optimiser.epochs,
            num_generations=rollout.rollouts_per_prompt,
            max_completion_length=rollout.max_tokens,
            temperature=rollout.temperature,
            reward_weights=[1.0, factor][: len(rewards)],
            lr_scheduler_type="constant",
            learning_rate=optimiser.learning_rate,
            max_grad_norm=optimiser.gradient_clip,
            shuffle_dataset=False,
            bf16=False,
            use_cpu=on_cpu,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            **self.method.grpo_config(),
        )
        trainer: Any = GRPOTrainer(
            model=self.collector.policy.model,
            reward_funcs=rewards,
            args=arguments,
            train_dataset=self._dataset(self.collector.pool.prompts(0, 1)),
            processing_class=self.collector.policy.tokenizer,
            callbacks=[Schedule()],
            optimizers=(updater.optimiser.adam, None),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _minibatches(self, prompts: int) -> int:
        """Updates of a batch: as many as keep a minibatch at its size, among those that split the rollouts evenly."""
        whole, wanted = self.collector.config.prompts_per_batch, self.updater.config.minibatches_per_batch
        rows, most = prompts * self.collector.config.rollouts_per_prompt, math.ceil(wanted * prompts / whole)
        if prompts == whole and rows % wanted:
            raise InputError(
                f"TRL cannot split {rows} rollouts into {wanted} equal minibatches",
                key="optimiser.minibatches_per_batch",
                value=wanted,
                remedy="Choose a divisor",
            )
        return max(parts for parts in range(1, most + 1) if rows % parts == 0)

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
        if self._minibatches(len(draw.prompts)) * epochs > 1:  # TRL then reads the batch once more before its updates
            collector.ledger.charge(step, "score", tokens_scored=made, flops=collector.prices.forward(read))
        both = collector.prices.forward(read) + collector.prices.backward(read)
        collector.ledger.charge(step, "backprop", tokens_backpropagated=made * epochs, flops=both * epochs)

    def _metrics(self, step: int, trainer: Any) -> dict[str, float]:
        logged = [row for row in trainer.state.log_history if "grad_norm" in row]
        if not all(math.isfinite(row["grad_norm"] + row["loss"]) for row in logged):
            raise NumericalError(f"step {step} of TRL: a loss or gradient norm is not finite; lower the learning rate")
        return {name: float(np.mean([row[key] for row in logged])) for key, name in METRICS.items()}
