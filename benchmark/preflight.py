"""Checks of a pretrained run before its first step: what would end it hours later ends it in the first minute."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmark import ranks
from benchmark.backend import Backend, Request
from benchmark.backend_transformers import TransformersBackend
from benchmark.backend_vllm import VLLMBackend
from benchmark.checkpoint import KEPT
from benchmark.config import RolloutConfig
from benchmark.draws import Pool
from benchmark.errors import InputError, RunError, StorageError
from benchmark.optimiser import Optimiser
from benchmark.rollouts import Rollouts
from benchmark.verdict import Verdict
from benchmark.verifier import Verifier, bare

TRIED, TRIED_TOKENS = 8, 32  # prompts, and tokens of their answers
GAP_NATS = 0.1
"""Mean distance of sampled and trained log-probabilities that bfloat16 on both sides stays well below."""
UNTRIED = ("cpu",)
"""Devices on which memory that is short does not raise: the machine ends the process."""
KNOWN = {"integer": ("42", "42"), "any": (r"\frac{1}{2}", "0.5")}


def preflight(backend: Backend, optimiser: Optimiser, pools: list[Pool], rollout: RolloutConfig, folder: Path) -> None:
    """Context, disk and memory: prompts fit the model, checkpoints the disk, the longest pass and decode the memory.

    An engine of vLLM fits beside what the optimiser keeps, and samples from the model in training.

    Nothing that a run computes changes.

    Args:
        pools: every prompt that the run may read.

    Raises:
        InputError: a prompt and its answer are longer than the model's context, or the engine holds another model.
        StorageError: the disk has no room for the checkpoints.
        RunError: the longest pass or decode, or the engine, does not fit the memory of the device.
    """
    longest = max((tokens for pool in pools for tokens in pool.tokens), key=len)
    _check_context(backend, len(longest), rollout.max_tokens)
    if ranks.rank() == 0:  # who writes
        _check_disk(backend, folder)
    _check_memory(backend, optimiser, longest, rollout)
    _check_decoding(backend, optimiser, longest, rollout)
    if isinstance(backend, VLLMBackend):
        _check_engine(backend, pools[0], rollout)


def check_verifier(verifier: Verifier, pool: Pool) -> None:
    """A known pair and the first gold answer come back correct.

    Raises:
        RunError: they do not.
    """
    gold = pool.items[0].answer
    known, given = KNOWN[verifier.answer_form]
    verdicts = verifier.verify([(known, f"\\boxed{{{given}}}"), (gold, f"\\boxed{{{bare(gold)}}}")])
    if set(verdicts) != {Verdict.CORRECT}:
        raise RunError(f"the verifier calls right answers {', '.join(verdicts)}: see that math-verify is installed")


def _check_context(backend: Backend, prompt: int, answer: int) -> None:
    limits = [getattr(backend.policy.model.config, "max_position_embeddings", None)]
    if backend.config.name == "vllm":
        limits.append(backend.config.vllm.max_model_len)
    limit = min((number for number in limits if number), default=None)
    if limit is not None and prompt + answer > limit:
        what = f"the longest prompt has {prompt} tokens; with the answer they exceed the context of {limit}"
        raise InputError(what, key="rollout.max_tokens", value=answer, remedy=f"Lower it to {limit - prompt} or less")


def _check_disk(backend: Backend, folder: Path) -> None:
    trained = sum(value.numel() * value.element_size() for value in backend.policy.parameters().values())
    policy = sum(value.numel() * value.element_size() for value in backend.policy.model.parameters())
    # Checkpoints hold weights and two moments; one more is written before the oldest goes.
    needed = 3 * trained * (KEPT + 1) + policy
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free + held < needed:
        what = f"{free / 1e9:.1f} GB free, checkpoints and policy need {(needed - held) / 1e9:.1f}"
        raise StorageError(folder, what, "Free some space, or choose another folder")


def _check_memory(backend: Backend, optimiser: Optimiser, prompt: Tensor, rollout: RolloutConfig) -> None:
    config = backend.config
    batch = _longest(prompt, rollout, config.tokens_per_pass)
    parameters = list(backend.policy.parameters().values())
    backend.rest()
    try:
        # What AdamW keeps comes with its first step, and has to fit beside the activations and beside the engine.
        moments = [torch.empty_like(value) for value in parameters if not optimiser.adam.state for _ in range(2)]
        piece = max(backend.split(batch), key=lambda piece: piece.cost).rollouts
        seen = backend.score(piece, rollout.temperature)
        optimiser.rehearse(seen.log_prob.mean() + seen.entropy.mean())
        del batch, piece, seen
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"a training pass of {config.tokens_per_pass} tokens does not fit the memory: lower "
            "backend.tokens_per_pass, or set backend.gradient_checkpointing"
        ) from error
    finally:
        optimiser.clear()
    backend.load_weights()
    del moments


@torch.no_grad()
def _check_engine(backend: VLLMBackend, pool: Pool, rollout: RolloutConfig) -> None:
    """The engine and the trainer agree about some rollouts; weights alone do not show a model that is set otherwise."""
    prompts = pool.tokens[:TRIED]
    numbers = np.arange(len(prompts))
    each, limit = np.ones(len(prompts), dtype=np.int64), min(rollout.max_tokens, TRIED_TOKENS)
    asked = Request(prompts, each, numbers.astype(np.uint64), numbers, limit, rollout.temperature)
    pieces = [piece.rollouts for piece in backend.split(backend.generate(asked))]
    gaps = [(backend.score(rows, rollout.temperature).log_prob - rows.log_prob).abs() for rows in pieces]
    gap = float(torch.cat(gaps).mean())
    if not gap <= GAP_NATS:
        what = (
            f"log-probabilities of {sum(map(len, gaps))} sampled tokens are {gap:.3g} nats off the trainer's on average"
        )
        raise backend.foreign(f"{what}, where rounding makes up to {GAP_NATS}")


def _check_decoding(backend: Backend, optimiser: Optimiser, prompt: Tensor, rollout: RolloutConfig) -> None:
    """The last step of the most and longest rollouts at a time, where the cache grows while rollouts do.

    The native backend and vLLM take theirs whole before the first token. A CPU is left out (`UNTRIED`).
    """
    if type(backend) is not TransformersBackend or prompt.device.type in UNTRIED:
        return
    weights = [value for value in optimiser.parameters if not optimiser.adam.state]
    try:
        moments = [torch.empty_like(value) for value in weights for _ in range(2)]  # kept while a run samples
        backend.rehearse(prompt, rollout.max_tokens, rollout.temperature)
        del moments
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"decoding {backend.config.rows_per_decode} rollouts of {len(prompt)} + {rollout.max_tokens} tokens at a "
            "time does not fit the memory: lower backend.rows_per_decode"
        ) from error


def _longest(prompt: Tensor, rollout: RolloutConfig, tokens_per_pass: int) -> Rollouts:
    """Groups of the longest prompt with answers of the most tokens, enough of them for a full pass."""
    group, limit, device = rollout.rollouts_per_prompt, rollout.max_tokens, prompt.device
    prompts = 1 + tokens_per_pass // (len(prompt) + group * limit)
    rows = prompts * group
    return Rollouts(
        prompt.repeat(prompts),
        torch.full((prompts,), len(prompt), device=device),
        torch.arange(prompts, device=device).repeat_interleave(group),
        prompt[:1].repeat(rows * limit),
        torch.full((rows,), limit, device=device),
        torch.zeros(rows * limit, device=device),
        torch.zeros(rows, dtype=torch.bool, device=device),
    )
