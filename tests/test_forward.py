"""The packed forward, its hand-written gradients and the decode loop against transformers' own forward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from benchmark import optimiser
from benchmark.backend import NativeBackend
from benchmark.clock import Clock
from benchmark.config import ArchitectureConfig, OptimiserConfig
from benchmark.config_model import BackendConfig
from benchmark.decode import generate, sample
from benchmark.draws import Batch
from benchmark.errors import InputError
from benchmark.groups import Groups
from benchmark.ledger import Ledger, Prices
from benchmark.policy import Policy
from benchmark.registry import build
from benchmark.rollouts import Rollouts
from benchmark.scoring import score
from benchmark.transformer import Shape, fuse
from benchmark.update import Updater
from benchmark.warmup import new_policy

VOCABULARY = 23


def make_model(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if kind == "llama" else 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # far from uniform softmaxes, or the tests would be too easy
    }
    if kind == "llama":
        config: Any = transformers.LlamaConfig(**settings, tie_word_embeddings=False, rope_theta=500.0)
        model: Any = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.Qwen2Config(**settings, tie_word_embeddings=True)
        model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # ones and zeros would hide mistakes
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.float()


def make_batch(groups: list[list[int]], prompts: list[int], seed: int = 1) -> Rollouts:
    """Random tokens: `groups` holds the rollout lengths of each prompt, `prompts` the prompts' lengths."""
    random = torch.Generator().manual_seed(seed)
    lengths = [length for group in groups for length in group]
    return Rollouts(
        torch.randint(VOCABULARY, (sum(prompts),), generator=random),
        torch.tensor(prompts),
        torch.tensor([i for i, group in enumerate(groups) for _ in group], dtype=torch.int64),
        torch.randint(VOCABULARY, (sum(lengths),), generator=random),
        torch.tensor(lengths, dtype=torch.int64),
        torch.full((sum(lengths),), -3.0),
        torch.ones(len(lengths), dtype=torch.bool),
    )


# Groups of size 3, 0, 1 and 2; rollouts of one token, which have no input of their own; a prompt of one token.
RAGGED = make_batch([[5, 1, 7], [], [4], [1, 9]], [3, 6, 1, 8])


def reference_log_p(model: Any, batch: Rollouts, temperature: float) -> Tensor:
    """(T, V) log-probabilities, one sequence at a time through transformers."""
    prompts = torch.split(batch.prompt_tokens, batch.prompt_length.tolist())
    rows = []
    for prompt, tokens in zip(batch.prompt.tolist(), torch.split(batch.tokens, batch.length.tolist()), strict=True):
        sequence = torch.cat([prompts[prompt], tokens])
        logits = model(sequence[None]).logits[0, len(prompts[prompt]) - 1 : -1]
        rows.append((logits / temperature).log_softmax(-1))
    return torch.cat(rows)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def gradients(model: Any, objective: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    objective.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("tile_rows", [2, 48])
def test_statistics_and_all_gradients_equal_transformers(kind: str, temperature: float, tile_rows: int) -> None:
    model = make_model(kind)
    log_p = reference_log_p(model, RAGGED, temperature)
    p = log_p.exp()
    log_prob = log_p.gather(1, RAGGED.tokens[:, None]).squeeze(1)
    entropy = -(p * log_p).sum(-1)
    random = torch.Generator().manual_seed(5)
    on_log_prob, on_entropy = torch.randn(2, len(log_prob), generator=random)

    found = score(fuse(model), RAGGED, temperature=temperature, tile_rows=tile_rows)
    assert relative(found.log_prob, log_prob) < 1e-5
    assert relative(found.entropy, entropy) < 1e-5
    assert relative(found.sum_p2, (p * p).sum(-1)) < 1e-5
    assert relative(found.sum_p2_log_p, (p * p * log_p).sum(-1)) < 1e-5
    assert not found.sum_p2.requires_grad

    expected = gradients(model, (on_log_prob * log_prob + on_entropy * entropy).sum())
    ours = gradients(model, (on_log_prob * found.log_prob + on_entropy * found.entropy).sum())
    for name, gradient in expected.items():
        assert relative(ours[name], gradient) < 1e-5, name


@pytest.mark.parametrize("part", ["log_prob", "entropy"])
def test_each_statistic_alone_has_the_right_gradient(part: str) -> None:
    model = make_model("qwen2")
    log_p = reference_log_p(model, RAGGED, 1.0)
    wanted = {"log_prob": log_p.gather(1, RAGGED.tokens[:, None]), "entropy": -log_p.exp() * log_p}
    expected = gradients(model, wanted[part].sum())["model.embed_tokens.weight"]
    ours = gradients(model, getattr(score(fuse(model), RAGGED), part).sum())["model.embed_tokens.weight"]
    assert relative(ours, expected) < 1e-5


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_decoding_samples_from_the_distribution_it_reports(kind: str, temperature: float) -> None:
    model = make_model(kind)
    counts = torch.tensor([3, 0, 1, 12])
    uniforms = torch.rand(16, 10, generator=torch.Generator().manual_seed(2))
    drawn = generate(
        fuse(model),
        RAGGED.prompt_tokens,
        RAGGED.prompt_length,
        counts,
        uniforms,
        max_tokens=10,
        ends=[4],
        temperature=temperature,
    )
    assert torch.bincount(drawn.prompt, minlength=4).tolist() == counts.tolist()
    log_p = reference_log_p(model, drawn, temperature).detach()
    reported = log_p.gather(1, drawn.tokens[:, None]).squeeze(1)
    assert relative(drawn.log_prob, reported) < 1e-5
    assert relative(score(fuse(model), drawn, temperature=temperature).log_prob.detach(), drawn.log_prob) < 1e-5
    # Every token is the inverse-CDF draw of its own uniform, whatever was compacted away on the way.
    own = torch.cat([uniforms[row, :length] for row, length in enumerate(drawn.length.tolist())])
    above = log_p.exp().cumsum(-1).gather(1, drawn.tokens[:, None]).squeeze(1)
    below = above - reported.exp()
    assert bool(((below - 1e-5 <= own) & (own <= above + 1e-5)).all())
    # A rollout ends with its first end token, or at the limit.
    pieces = drawn.texts()
    assert drawn.finished.tolist() == [piece[-1] == 4 for piece in pieces]
    assert all(4 not in piece[:-1] for piece in pieces)
    assert all(
        len(piece) == 10 for piece, finished in zip(pieces, drawn.finished.tolist(), strict=True) if not finished
    )
    assert bool(drawn.finished.any())


def test_sampling_takes_the_token_whose_interval_holds_the_uniform() -> None:
    log_p = torch.tensor([[0.25, 0.5, 0.25]]).log().repeat(5, 1)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 1 - 2**-24])
    assert sample(log_p, uniform).tolist() == [0, 0, 1, 1, 2]
    # No probability, no sample: not even at the ends.
    assert sample(torch.tensor([[0.0, 1.0, 0.0]]).log().repeat(2, 1), torch.tensor([0.0, 1 - 2**-24])).tolist() == [
        1,
        1,
    ]


@dataclass
class Seen:
    gradient: dict[str, Tensor]
    metrics: dict[str, float]


def updated(tmp_path: Path, arm: str, tokens_per_pass: int, batch: Rollouts, reward: Tensor) -> Seen:
    """One update of a small policy; its clipped gradient and metrics."""
    policy = new_policy(ArchitectureConfig(hidden_size=16, layers=2, heads=2, kv_heads=1, mlp=24), seed=0)
    config = OptimiserConfig(minibatches_per_batch=1, gradient_clip=1e9)
    updater = Updater(
        build(arm, {}),
        NativeBackend(policy, BackendConfig(tokens_per_pass=tokens_per_pass)),
        optimiser.make(policy, config),
        config,
        1.0,
        0,
        Ledger(tmp_path / f"{arm}-{tokens_per_pass}.jsonl"),
        Prices(1),
        Clock(torch.device("cpu")),
    )
    groups = Groups(batch.prompt, batch.prompts, reward, batch.length, ~batch.finished, 12)
    metrics = updater.update(0, Batch(batch, groups))
    gradient = {name: p.grad.clone() for name, p in policy.parameters().items() if p.grad is not None}
    return Seen(gradient, metrics)


@pytest.mark.parametrize("arm", ["grpo", "dynamo", "fork_tokens", "kl_cov", "entropy_loss", "clip_cov"])
def test_micro_batches_change_nothing_but_rounding(tmp_path: Path, arm: str) -> None:
    batch = make_batch([[5, 3, 7, 4], [6, 2], [4, 8, 3], [1, 9, 5]], [3, 6, 2, 8])
    reward = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1])
    whole = updated(tmp_path, arm, 65_536, batch, reward)
    pieces = updated(tmp_path, arm, 16, batch, reward)
    assert whole.gradient.keys() == pieces.gradient.keys()
    assert max(float(g.abs().max()) for g in whole.gradient.values()) > 1e-3
    total = torch.stack([g.norm() for g in whole.gradient.values()]).norm()
    for name, gradient in whole.gradient.items():
        assert float((pieces.gradient[name] - gradient).norm() / total) < 1e-5, name
    # A method that does not modulate is not given the current policy's statistics ahead of a split pass.
    same = {"optim/loss", "optim/gradient_norm"}
    if build(arm, {}).modulates:
        same |= whole.metrics.keys()
    for name in same:
        assert pieces.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-4, abs=1e-6), name


def test_other_architectures_are_refused() -> None:
    with pytest.raises(InputError, match=r"model_type.*gpt2.*qwen2, llama"):
        Shape.of(transformers.GPT2Config())
    scaled = transformers.LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(InputError, match="scaled rotary"):
        Shape.of(scaled)


def test_a_saved_policy_is_read_back_unchanged(tmp_path: Path) -> None:
    policy = new_policy(ArchitectureConfig(hidden_size=16, layers=1, heads=2, kv_heads=1, mlp=24), seed=3)
    policy.save(tmp_path)
    again = Policy.load(tmp_path, torch.device("cpu"))
    assert policy.parameters().keys() == again.parameters().keys()
    assert all(torch.equal(value, again.parameters()[name]) for name, value in policy.parameters().items())
    text = "Compute 12+3."
    assert again.decode(again.encode([text])) == [text]
    assert policy.size == sum(value.numel() for value in policy.parameters().values())
    assert again.end == policy.end
