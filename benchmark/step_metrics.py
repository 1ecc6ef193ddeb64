"""What a step records of the rollouts it drew."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmark.draws import Batch
from benchmark.groups import segment_sum
from benchmark.verdict import Verdict


def _counts(batch: Batch) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.concatenate([draw.counts for draw in batch.drawn])


def allocation_row(step: int, batch: Batch) -> dict[str, Any]:
    """How many prompts of the step got how many rollouts."""
    values, times = np.unique(_counts(batch), return_counts=True)
    histogram = {str(value): int(count) for value, count in zip(values, times, strict=True)}
    return {"step": step, "n_min": int(values[0]), "n_max": int(values[-1]), "histogram": histogram}


def rollout_metrics(batch: Batch) -> dict[str, float]:
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
