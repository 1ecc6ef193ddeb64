"""Measured gradient variance of rollout allocations on one frozen checkpoint, at equal draws.

R independent replicates of the whole estimator (rollouts, group baseline, normalisation, length weights) on a fixed
batch of prompts; with g_r the full-model gradient of replicate r and g-bar their mean:

    trace of the covariance   tr = sum_r |g_r - g-bar|^2 / (R - 1)
    squared mean (unbiased)   |E g|^2 = |g-bar|^2 - tr / R          (a U-statistic; may be negative)

Prompts are fixed, so this is the variance within prompts: the part that an allocation can change. All allocations see
the same rollouts (rollout j of a prompt is the same in each), so ratios are paired; intervals resample replicates.
`analysis.variance_study` gets the same from pools of single rollouts, for every allocator at once; a test holds the two
against each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from analysis.variance_pool import Bench
from baselines.dr_grpo import DrGRPO
from baselines.grpo import GRPO
from benchmark import streams
from benchmark.config import RunConfig
from benchmark.draws import Pool
from benchmark.groups import Groups, segment_sum
from benchmark.history import HistoryView, PromptHistory
from benchmark.jsonl import atomic_write_json
from benchmark.losses import token_weights
from benchmark.method import Loss
from benchmark.policy import Policy, prepare_machine
from benchmark.problems import load_task
from benchmark.rollouts import ragged_index
from benchmark.scoring import score
from benchmark.verifier import Verifier
from benchmark.warmup import ensure_policy
from methods.allocation import min_variance_allocation
from methods.neyman import NeymanAllocation, expected_deviation

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
OBJECTIVE = Loss(prompt_weight="equal")
CREDITS = {"mean only": DrGRPO().credit, "mean and std": GRPO().credit}
HISTORY_ROLLOUTS = 16


def allocations(history: HistoryView, budget: int) -> dict[str, Ints]:
    """Rollouts per prompt (P,) of each allocation at the same `budget` and bounds."""
    rule = NeymanAllocation()
    prompts = len(history.trials)
    low, high = rule.bounds(prompts, budget)
    a, b = history.posterior(rule.prior)
    weights = {"variance": a * b / ((a + b) * (a + b + 1)), "standard_deviation": expected_deviation(a, b)}
    uniform = min_variance_allocation(np.ones(prompts), budget, low, high)
    # n_i proportional to w_i within bounds is what the solver returns for s = w.
    return {"uniform": uniform} | {name: min_variance_allocation(w, budget, low, high) for name, w in weights.items()}


def gradients(bench: Bench, number: int, counts: Mapping[str, Ints]) -> dict[tuple[str, str], Tensor]:
    """Full gradient (D,) of replicate `number` per (allocation, advantage): one forward, a backward for each."""
    most = int(max(n.max() for n in counts.values()))
    drawn, rewards = bench.draw("replicate", number, most)
    log_prob = score(bench.policy.fused(), drawn, temperature=bench.rollout.temperature).log_prob
    parameters = list(bench.policy.parameters().values())
    lane = torch.arange(most, device=bench.device).repeat(len(bench.prompts))
    result = {}
    for allocation, n in counts.items():
        rows = torch.nonzero(lane < torch.from_numpy(n).to(bench.device)[drawn.prompt]).flatten()
        flat = ragged_index(rows, drawn.length)
        part = replace(
            drawn,
            prompt=drawn.prompt[rows],
            tokens=drawn.tokens[flat],
            length=drawn.length[rows],
            log_prob=drawn.log_prob[flat],
            finished=drawn.finished[rows],
        )
        limit = bench.rollout.max_tokens
        groups = Groups(part.prompt, part.prompts, rewards[rows], part.length, ~part.finished, limit)
        weights = token_weights(part, OBJECTIVE, limit)
        for advantage, credit in CREDITS.items():
            outer = torch.zeros_like(log_prob)
            outer[flat] = weights * torch.repeat_interleave(credit(groups), part.length)
            pieces = torch.autograd.grad(log_prob, parameters, outer, retain_graph=True)
            result[allocation, advantage] = torch.cat([piece.flatten() for piece in pieces])
    return result


def trace_and_square(gram: Floats) -> tuple[float, float]:
    """(trace of the covariance, unbiased squared norm of the mean) from the Gram matrix (R, R) of replicates."""
    replicates = len(gram)
    trace = (np.trace(gram) - gram.sum() / replicates) / (replicates - 1)
    return float(trace), float(gram.sum() / replicates**2 - trace / replicates)


def ratio_interval(gram: Floats, reference: Floats, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of two traces with a 95 % percentile interval; replicates of both are resampled together."""
    replicates = len(gram)
    draws = streams.generator("gradient variance", seed).multinomial(
        replicates, np.full(replicates, 1 / replicates), size=resamples
    )

    draws = draws[(draws > 0).sum(1) > 1]  # a resample of one replicate alone has no variance

    def traces(g: Floats) -> Floats:
        spread: Floats = draws @ np.diag(g) - np.einsum("br,br->b", draws @ g, draws) / replicates
        return spread

    with np.errstate(invalid="ignore"):  # 0 / 0 ends as an interval that is not a number
        ratios = traces(gram) / traces(reference)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return trace_and_square(gram)[0] / trace_and_square(reference)[0], float(low), float(high)


def cosine(cross: Floats, square: float, reference_square: float) -> float | None:
    """Cosine of two mean gradients without noise bias: off-diagonal products over unbiased norms."""
    if square <= 0 or reference_square <= 0:
        return None
    replicates = len(cross)
    product = (cross.sum() - np.trace(cross)) / (replicates * (replicates - 1))
    return float(product / np.sqrt(square * reference_square))


def measure(
    config: RunConfig, replicates: int = 48, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Variance of each allocation and advantage kind on the policy before RL.

    Returns:
        The content of ``gradient_variance.json``: checkpoint, settings and one row per allocation and advantage with
        ratio (to uniform), low, high, trace, squared_mean, signal_to_noise and cosine (to uniform's mean). Without a
        row where gradients are zero, as of a policy that solves nothing yet: there is no variance to compare.
    """
    device = prepare_machine()
    path = ensure_policy(config)
    policy = Policy.load(path, device)
    train, _ = load_task(config.task)
    pool = Pool.of(train, policy, config.seed, device)
    prompts = pool.prompts(0, min(config.rollout.prompts_per_batch, len(train)))
    with Verifier(answer_form=config.task.answer_form) as verifier:
        bench = Bench(policy, config.rollout, pool, verifier, prompts, device)
        history = PromptHistory(len(train))
        drawn, rewards = bench.draw("history", 0, HISTORY_ROLLOUTS)
        successes = segment_sum(rewards.double(), drawn.prompt, len(prompts)).cpu().numpy()
        history.record(prompts, successes, np.full(len(prompts), float(HISTORY_ROLLOUTS)))
        counts = allocations(history.view(prompts), len(prompts) * config.rollout.rollouts_per_prompt)
        samples: dict[tuple[str, str], list[Tensor]] = {}
        for number in range(replicates):
            for key, gradient in gradients(bench, number, counts).items():
                samples.setdefault(key, []).append(gradient)
            if progress is not None:
                progress(number + 1, replicates)
    return {
        "checkpoint": f"the policy before RL ({Path(path).name})",
        "prompts": len(prompts),
        "replicates": replicates,
        "rollouts_per_prompt": config.rollout.rollouts_per_prompt,
        "plan_hash": config.plan_hash,
        "rows": [row for key in samples if (row := _row(key, samples)) is not None],
    }


def _row(key: tuple[str, str], samples: Mapping[tuple[str, str], list[Tensor]]) -> dict[str, Any] | None:
    own, uniform = torch.stack(samples[key]).double(), torch.stack(samples["uniform", key[1]]).double()
    gram, reference = (own @ own.T).cpu().numpy(), (uniform @ uniform.T).cpu().numpy()
    (trace, square), (reference_trace, reference_square) = trace_and_square(gram), trace_and_square(reference)
    if not (trace > 0 and reference_trace > 0):
        return None
    ratio, low, high = ratio_interval(gram, reference)
    if not np.isfinite([low, high]).all():  # so few replicates have a gradient that some resamples have none
        return None
    return {
        "allocator": key[0],
        "advantage": key[1],
        "ratio": ratio,
        "low": low,
        "high": high,
        "trace": trace,
        "squared_mean": square,
        "signal_to_noise": square / trace,
        "cosine": cosine((own @ uniform.T).cpu().numpy(), square, reference_square),
    }


def measure_for_study(study: Path, replicates: int = 48, progress: Callable[[int, int], None] | None = None) -> Path:
    """Measure for a study's reference arm and first seed; kept in ``gradient_variance.json`` and not measured twice."""
    plan = json.loads((study / "plan.json").read_text(encoding="utf-8"))
    first = next(cell for cell in plan["cells"] if cell["arm"] == plan["reference"])
    settings = yaml.safe_load((study / first["dir"] / "config.yaml").read_text(encoding="utf-8"))
    config = RunConfig.model_validate(settings)
    path = study / "gradient_variance.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["plan_hash"] == config.plan_hash:
        return path
    atomic_write_json(path, measure(config, replicates, progress))
    return path
