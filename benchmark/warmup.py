"""The policy before RL: a small transformer trained on imperfect worked solutions, made once and cached.

Deterministic: the folder's name is a hash of everything that decides the weights. The default scale's policy is
shipped with the package, so a first run starts at once and everyone starts from the same weights.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark import streams
from benchmark.config import ArchitectureConfig, RunConfig, digest
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_json
from benchmark.policy import Policy, prepare_machine
from benchmark.pretrained import locate
from benchmark.problems import Item, candidates, held_out, shares
from benchmark.problems import digest as data_digest
from benchmark.rollouts import Rollouts
from benchmark.scoring import score
from benchmark.solutions import STYLES, worked_solution
from benchmark.vocabulary import build_tokenizer

POOL = 16_384  # distinct problems the warm-up cycles through
SHIPPED = Path(__file__).parent / "policies"


def policy_identity(config: RunConfig) -> str:
    """First 12 hex digits of the hash of all that decides the warmed-up weights."""
    parts = {
        "architecture": config.policy.architecture.model_dump(mode="json"),
        "warmup": config.policy.warmup.model_dump(mode="json"),
        "mix": [part.model_dump(mode="json") for part in config.task.mix],
    }
    return digest(parts)[:12]


def cache_folder() -> Path:
    """Where policies made on this machine are kept: ``ROLLOUTBENCH_CACHE``, or ``.rolloutbench`` here."""
    return Path(os.environ.get("ROLLOUTBENCH_CACHE", ".rolloutbench")) / "policies"


def ensure_policy(config: RunConfig, progress: Callable[[int, int, float], None] | None = None) -> str | Path:
    """Path of the policy before RL: given, shipped, cached, or made now (a few CPU-minutes).

    Args:
        progress: called as (step, steps, loss) while the policy is made.

    Raises:
        InputError: a task read from files has no warm-up data and no ``policy.path``.
    """
    if config.policy.path is not None:
        return locate(config.policy.path, cache_folder())
    if not config.task.mix:
        raise InputError(
            "a task read from files has no worked solutions to warm up on",
            key="policy.path",
            remedy="Name a model folder or hub id",
        )
    name = policy_identity(config)
    for folder in (SHIPPED / name, cache_folder() / name):
        if (folder / "provenance.json").exists():
            return folder
    return _make(config, cache_folder() / name, progress or (lambda *_: None))


def _make(config: RunConfig, folder: Path, progress: Callable[[int, int, float], None]) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        policy, items = warm_up(config, progress)
        policy.save(partial)
        partial.chmod(0o755)  # mkdtemp's folders are private
        provenance = {
            "command": f"rolloutbench warmup --scale {config.scale}",
            "identity": policy_identity(config),
            "architecture": config.policy.architecture.model_dump(mode="json"),
            "warmup": config.policy.warmup.model_dump(mode="json"),
            "mix": [part.model_dump(mode="json", exclude_none=True) for part in config.task.mix],
            "data_sha256": data_digest(items),
            "parameters": policy.size,
            "torch": torch.__version__,
        }
        atomic_write_json(partial / "provenance.json", provenance)
        if folder.exists():  # another process made the same weights
            shutil.rmtree(partial)
        else:
            partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def new_policy(architecture: ArchitectureConfig, seed: int) -> Policy:
    """A randomly initialised Qwen2 model with the small tokenizer."""
    import transformers

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    settings = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.mlp,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    make: Any = transformers.Qwen2ForCausalLM
    return Policy(make(settings).float(), tokenizer)


def warm_up(config: RunConfig, progress: Callable[[int, int, float], None]) -> tuple[Policy, list[Item]]:
    """Supervised training on worked solutions: Muon on the matrices, AdamW on the rest, linear decay to zero."""
    device = prepare_machine()
    settings = config.policy.warmup
    policy = new_policy(config.policy.architecture, settings.seed)
    policy.model.to(device)
    items = _problems(config)
    matrices = [p for name, p in policy.parameters().items() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in policy.parameters().items() if p.dim() != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=settings.learning_rate, momentum=0.95, weight_decay=0.0)
    adam = torch.optim.AdamW(others, lr=settings.learning_rate * 0.15, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    peaks = [(group, group["lr"]) for optimiser in (muon, adam) for group in optimiser.param_groups]
    for step in range(settings.steps):
        rate = min(1.0, (step + 1) / 50) * (1 - step / settings.steps)
        for group, peak in peaks:
            group["lr"] = peak * rate
        batch = _supervised_batch(config, policy, items, step, device)
        loss = -score(policy.fused(), batch).log_prob.mean()
        muon.zero_grad()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.parameters().values(), 1.0)
        muon.step()  # type: ignore[no-untyped-call]
        adam.step()
        if step % 10 == 0 or step + 1 == settings.steps:
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(f"warm-up step {step}: loss {value}; lower policy.warmup.learning_rate")
            progress(step + 1, settings.steps, value)
    return policy, items


def _problems(config: RunConfig) -> list[Item]:
    counts = shares([part.weight for part in config.task.mix], POOL)
    items = []
    for part, count in zip(config.task.mix, counts, strict=True):
        draws = candidates(part, config.policy.warmup.seed, "warmup")
        kept = ((prompt, answer) for prompt, answer in draws if not held_out(prompt))
        items += [
            Item(f"{part.name}/warmup-{i}", part.family, *problem)
            for i, problem in zip(range(count), kept, strict=False)
        ]
    return items


def _supervised_batch(
    config: RunConfig, policy: Policy, items: list[Item], step: int, device: torch.device
) -> Rollouts:
    settings = config.policy.warmup
    rng = streams.generator(settings.seed, "warmup", step)
    chosen = [items[i] for i in rng.integers(len(items), size=settings.batch)]
    weights = [settings.styles.direct, settings.styles.partial, settings.styles.full]
    styles = rng.choice(np.array(STYLES), p=weights, size=settings.batch)
    solutions = [
        worked_solution(item.family, item.prompt, style, rng, settings.error_rate)
        for item, style in zip(chosen, styles.tolist(), strict=True)
    ]
    prompts = policy.encode([item.prompt for item in chosen])
    answers = [[*ids, policy.end] for ids in policy.encode(solutions)]

    def flat(rows: list[list[int]]) -> Tensor:
        return torch.tensor([token for row in rows for token in row], device=device)

    def lengths(rows: list[list[int]]) -> Tensor:
        return torch.tensor([len(row) for row in rows], device=device)

    tokens = flat(answers)
    return Rollouts(
        flat(prompts),
        lengths(prompts),
        torch.arange(settings.batch, device=device),
        tokens,
        lengths(answers),
        torch.zeros(len(tokens), device=device),
        torch.ones(settings.batch, dtype=torch.bool, device=device),
    )
