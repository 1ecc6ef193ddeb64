"""CPU time of a native training step against stock TRL GRPOTrainer: same model, prompts, batch and updates.

One step: 64 prompts x 8 rollouts of at most 48 tokens, verified, then 4 updates on 128 rollouts each. The two sample
their own rollouts, so the table gives seconds per step and per 1,000 generated tokens. Run on an idle machine:

    python benchmarks/step_speed.py [--steps 6] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmark.compose import compose_run
from benchmark.config import RunConfig
from benchmark.policy import Policy, prepare_machine
from benchmark.problems import Item, load_task
from benchmark.run import Run
from benchmark.verdict import reward
from benchmark.verifier import Verifier
from benchmark.warmup import ensure_policy

PHASES = ("decode", "verify", "forward", "backward", "optimiser", "other")


@dataclass
class Steps:
    """CPU seconds and generated tokens of each measured step, and seconds by phase over all of them."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    flops: int = 0

    @property
    def per_step(self) -> float:
        """Median CPU seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def per_thousand(self) -> float:
        """Median CPU seconds of a step per thousand tokens it generated."""
        return statistics.median(1000 * s / t for s, t in zip(self.seconds, self.tokens, strict=True))


def native(config: RunConfig, steps: int) -> Steps:
    """`steps` native steps after one that is not counted."""
    found = Steps()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Path(folder), lambda _: None)
        with run.verifier:
            run.step_once()
            run.seconds.clear()
            before = dict(run.ledger.spent)
            for _ in range(steps):
                tokens, start = run.ledger.spent["tokens_generated"], time.process_time()
                run.step_once()
                found.seconds.append(time.process_time() - start)
                found.tokens.append(run.ledger.spent["tokens_generated"] - tokens)
        found.phases, found.flops = dict(run.seconds), run.ledger.spent["flops"] - before["flops"]
    return found


def stock_trl(config: RunConfig, steps: int) -> Steps:
    """`steps` generation batches of TRL's GRPOTrainer after one that is not counted."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    policy = Policy.load(ensure_policy(config), prepare_machine())
    items: list[Item] = load_task(config.task)[0]
    found, tokens = Steps(), [0]
    verifier = Verifier(answer_form=config.task.answer_form)

    def correct(completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        tokens[0] += sum(map(len, completion_ids))
        return [reward(v) for v in verifier.verify_rollouts(answer, completions, [True] * len(answer))]

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % config.optimiser.minibatches_per_batch == 0:
                found.seconds.append(time.process_time() - self.mark)
                found.tokens.append(max(1, tokens[0] - self.seen))
                self.mark, self.seen = time.process_time(), tokens[0]

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.mark, self.seen = time.process_time(), 0

    with tempfile.TemporaryDirectory() as folder:
        rows = [{"prompt": item.prompt, "answer": item.answer} for item in items]
        trainer = GRPOTrainer(
            model=policy.model,
            reward_funcs=correct,
            args=trl_settings(config, steps, folder),
            train_dataset=Dataset.from_list(rows),
            processing_class=policy.tokenizer,
            callbacks=[Timer()],
        )
        with verifier:
            trainer.train()
    found.seconds, found.tokens = found.seconds[1:], found.tokens[1:]
    return found


def trl_settings(config: RunConfig, steps: int, folder: str) -> Any:
    """The run's settings in TRL's words, for `steps` batches and one before them."""
    from trl import GRPOConfig

    rollout, optimiser = config.rollout, config.optimiser
    batch = rollout.prompts_per_batch * rollout.rollouts_per_prompt
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=batch // optimiser.minibatches_per_batch,
        gradient_accumulation_steps=1,
        steps_per_generation=optimiser.minibatches_per_batch,
        num_generations=rollout.rollouts_per_prompt,
        max_completion_length=rollout.max_tokens,
        max_steps=(steps + 1) * optimiser.minibatches_per_batch,
        learning_rate=optimiser.learning_rate,
        lr_scheduler_type="constant",
        beta=0.0,
        loss_type="dapo",
        temperature=rollout.temperature,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def matrix_rate(config: RunConfig, rows: int) -> float:
    """FLOP/s of this machine over the linear layers of one forward at `rows` tokens."""
    a = config.policy.architecture
    kv = a.hidden_size // a.heads * a.kv_heads
    shapes = [(a.hidden_size + 2 * kv, a.hidden_size), (a.hidden_size, a.hidden_size)]
    shapes += [(2 * a.mlp, a.hidden_size), (a.hidden_size, a.mlp)]
    pairs = [(torch.randn(rows, inner), torch.randn(outer, inner)) for outer, inner in shapes]
    times = []
    for _ in range(40):
        start = time.process_time()
        for x, weight in pairs:
            F.linear(x, weight)
        times.append(time.process_time() - start)
    return sum(2 * rows * outer * inner for outer, inner in shapes) / statistics.median(times)


def report(config: RunConfig, ours: Steps, theirs: Steps) -> str:
    """The figures as Markdown."""
    rows = round(statistics.mean(ours.tokens) / config.optimiser.minibatches_per_batch)
    rate = matrix_rate(config, rows)
    total = sum(ours.phases.values())
    lines = [
        "| | native | TRL | native / TRL |",
        "|---|---|---|---|",
        f"| CPU seconds a step (median) | {ours.per_step:.2f} | {theirs.per_step:.2f} "
        f"| {ours.per_step / theirs.per_step:.2f} |",
        f"| CPU seconds per 1,000 generated tokens | {ours.per_thousand:.3f} | {theirs.per_thousand:.3f} "
        f"| {ours.per_thousand / theirs.per_thousand:.2f} |",
        f"| generated tokens a step (mean) | {statistics.mean(ours.tokens):,.0f} "
        f"| {statistics.mean(theirs.tokens):,.0f} | |",
        "",
        "| phase | share of the native step |",
        "|---|---|",
        *(f"| {phase} | {100 * ours.phases.get(phase, 0.0) / total:.1f} % |" for phase in PHASES),
        "",
        f"Matrix rate at {rows} rows: {rate / 1e9:.0f} GFLOP/s. The step's counted FLOPs at that rate would take "
        f"{100 * ours.flops / rate / total:.0f} % of its time.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure native, TRL, native; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="counted steps of each (default 6)")
    parser.add_argument("--scale", default="small")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    config = compose_run("grpo", scale=options.scale, options=["budget.amount=1000000000"])
    half = max(1, options.steps // 2)
    ours = native(config, half)
    theirs = stock_trl(config, options.steps)
    again = native(config, half)
    ours.seconds += again.seconds
    ours.tokens += again.tokens
    ours.flops += again.flops
    for phase, seconds in again.phases.items():
        ours.phases[phase] = ours.phases.get(phase, 0.0) + seconds
    text = report(config, ours, theirs)
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
