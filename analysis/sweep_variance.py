"""The variance of one setting's gradient estimator, as an objective of a sweep.

R replicates of the whole estimator of the first update (allocation, rollouts, selection, advantages, modulation, loss)
on the policy before RL and one fixed batch of prompts. With g-bar their mean and tr the trace of their covariance,

    relative variance = tr / |g-bar|^2

does not change when a setting merely scales the gradient, and lies in (0, R). Settings see the same rollouts: the j-th
rollout of a prompt in replicate r is the same for all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from analysis.gradient_variance import HISTORY_ROLLOUTS, trace_and_square
from analysis.variance_pool import Bench
from benchmark import registry, streams
from benchmark.cells import read_json
from benchmark.config import RunConfig
from benchmark.draws import Pool
from benchmark.errors import InputError
from benchmark.groups import Groups, segment_sum
from benchmark.history import HistoryView, PromptHistory
from benchmark.jsonl import atomic_write_json
from benchmark.losses import policy_loss, token_weights
from benchmark.method import Method, TokenCredit, Tokens
from benchmark.policy import Policy, prepare_machine
from benchmark.problems import load_task
from benchmark.rollouts import Rollouts, ragged_index
from benchmark.scoring import score
from benchmark.verifier import Verifier
from benchmark.warmup import ensure_policy

RECORD = "estimator_variance.json"


def relative_variance(config: RunConfig, folder: Path, replicates: int) -> float:
    """tr / |g-bar|^2 of a run's estimator; kept in the run's folder and not measured twice.

    Raises:
        InputError: the method draws a probe before it allocates, which this does not replay.
    """
    known = read_json(folder / RECORD)
    if known is None or known["replicates"] != replicates:
        gram = _gram(config, replicates)
        trace, _ = trace_and_square(gram)
        squared = float(gram.sum()) / replicates**2
        known = {"replicates": replicates, "trace": trace, "mean_squared": squared}
        atomic_write_json(folder / RECORD, known)
    return float(known["trace"]) / float(known["mean_squared"])


def _gram(config: RunConfig, replicates: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Inner products (R, R) of the replicates' gradients."""
    device = prepare_machine()
    method = registry.build(config.method.name, config.method.params)
    if method.probe is not None:
        remedy = "Leave gradient_variance out of the sweep's objective"
        raise InputError("draws a probe before it allocates", key="method", value=config.method.name, remedy=remedy)
    policy = Policy.load(ensure_policy(config), device)
    train, _ = load_task(config.task)
    pool = Pool.of(train, policy, config.seed, device)
    prompts = pool.prompts(0, min(config.rollout.prompts_per_batch, len(train)))
    with Verifier(answer_form=config.task.answer_form) as verifier:
        bench = Bench(policy, config.rollout, pool, verifier, prompts, device)
        history = PromptHistory(len(train), method.half_life)
        drawn, rewards = bench.draw("history", 0, HISTORY_ROLLOUTS)
        successes = segment_sum(rewards.double(), drawn.prompt, len(prompts)).cpu().numpy()
        history.record(prompts, successes, np.full(len(prompts), float(HISTORY_ROLLOUTS)))
        view = history.view(prompts)
        budget = len(prompts) * config.rollout.rollouts_per_prompt
        counts = method.allocate(view, budget, streams.generator(config.seed, "allocate", 0))
        rows = [_gradient(bench, method, view, counts, number, config.seed) for number in range(replicates)]
    matrix = torch.stack(rows).double()
    gram: np.ndarray[tuple[int, int], np.dtype[np.float64]] = (matrix @ matrix.T).cpu().numpy()
    return gram


def _gradient(
    bench: Bench,
    method: Method,
    view: HistoryView,
    counts: np.ndarray[tuple[int], np.dtype[np.int64]],
    r: int,
    seed: int,
) -> Tensor:
    """Gradient (D,) of replicate `r`: one batch with `counts` rollouts per prompt, one update's loss over all of it."""
    most = int(counts.max())
    drawn, rewards = bench.draw("replicate", r, most)
    lane = torch.arange(most, device=bench.device).repeat(len(bench.prompts))
    part, rewards = _select(drawn, rewards, lane < torch.from_numpy(counts).to(bench.device)[drawn.prompt])
    limit = bench.rollout.max_tokens
    groups = Groups(part.prompt, part.prompts, rewards, part.length, ~part.finished, limit, view)
    advantage = method.credit(groups)
    kept = method.keep(groups)[part.prompt]
    part, advantage = _select(part, advantage, kept)
    rollout = torch.repeat_interleave(torch.arange(len(part), device=bench.device), part.length)
    seen = score(bench.policy.fused(), part, temperature=bench.rollout.temperature)
    flat = advantage[rollout]
    tokens = Tokens(
        flat,
        seen.log_prob.detach(),
        part.log_prob,
        seen.entropy.detach(),
        seen.sum_p2.detach(),
        seen.sum_p2_log_p.detach(),
        rollout,
        torch.from_numpy(streams.generator(seed, "token", r, 0).random(len(flat))).to(flat),
        method.loss,
        part.prompt[rollout],
    )
    credit = method.modulate(tokens) if method.modulates else TokenCredit(flat)
    weights = token_weights(part, method.loss, limit, credit.mask)
    loss = policy_loss(seen.log_prob, seen.entropy, part.log_prob, weights, credit, method.loss)
    pieces = torch.autograd.grad(loss, list(bench.policy.parameters().values()))
    return torch.cat([piece.flatten() for piece in pieces])


def _select(drawn: Rollouts, values: Tensor, chosen: Tensor) -> tuple[Rollouts, Tensor]:
    """The `chosen` (R,) rollouts and their `values` (R,), prompts numbered as before."""
    rows = torch.nonzero(chosen).flatten()
    flat = ragged_index(rows, drawn.length)
    part = replace(
        drawn,
        prompt=drawn.prompt[rows],
        tokens=drawn.tokens[flat],
        length=drawn.length[rows],
        log_prob=drawn.log_prob[flat],
        finished=drawn.finished[rows],
    )
    return part, values[rows]
