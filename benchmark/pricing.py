"""Prices of a unit of budget in closed form, for scales that no machine at hand can measure.

FLOPs are the ledger's (`benchmark.ledger.Prices`): 2 per parameter and token forward, 4 backward, attention scores left
out. GPU time divides them by an assumed share of the peak, one for sampling and one for training; there every rollout
reads its prompt anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmark.config import RunConfig
from benchmark.ledger import Prices
from benchmark.schema import Count, Fraction, Model, Positive

BYTES_A_PARAMETER = 16  # float32 weights, gradients and two moments of AdamW


class ShapeConfig(Model):
    """A Qwen2 or Llama decoder: the numbers of its ``config.json``."""

    hidden_size: Count
    layers: Count
    heads: Count
    kv_heads: Count
    mlp: Count
    vocabulary: Count
    tied: bool = False

    @property
    def multiplied(self) -> int:
        """Parameters that multiply every token; biases and norms left out."""
        d, kv = self.hidden_size, self.hidden_size // self.heads * self.kv_heads
        return self.layers * (2 * d * d + 2 * d * kv + 3 * d * self.mlp) + self.vocabulary * d

    @property
    def parameters(self) -> int:
        """All of them, input embeddings too."""
        return self.multiplied + (0 if self.tied else self.vocabulary * self.hidden_size)


class GPUConfig(Model):
    """A GPU: dense bf16 peak in TFLOP/s and the shares of it that sampling and training reach; its memory in GB."""

    name: str
    tflops: Positive
    memory_gb: Positive
    sampling: Fraction
    training: Fraction


class PricingConfig(Model):
    """What a dry run assumes of a model and machine that are not here.

    Attributes:
        prompt_tokens, answer_tokens: mean lengths. evaluation_items: problems that are evaluated.
    """

    shape: ShapeConfig
    prompt_tokens: Positive
    answer_tokens: Positive
    evaluation_items: Count
    gpu: GPUConfig


def closed_form(config: RunConfig, assumed: PricingConfig) -> dict[str, float]:
    """Amounts per unit of the budget's currency, as GRPO spends them, and ``evaluation_tokens`` beside the budget.

    ``wall_seconds`` are GPU seconds of training and evaluation; ``disk_bytes`` the final policy in float32.
    """
    answer, prompt = assumed.answer_tokens, assumed.prompt_tokens
    shared = prompt / config.rollout.rollouts_per_prompt  # a rollout's part of its prompt, in the ledger
    rescored = config.backend.name == "vllm" or config.backend.dtype != "float32"
    epochs, forward = config.optimiser.epochs, float(Prices(assumed.shape.multiplied).forward(1))
    training = forward * (rescored + 3 * epochs)
    plan = config.evaluation
    samples = assumed.evaluation_items * (plan.samples * (plan.points - 1) + plan.final_samples)
    peak = 1e12 * assumed.gpu.tflops
    sampling_seconds, training_seconds = (
        flops * (prompt + answer) / (peak * share)
        for flops, share in ((forward, assumed.gpu.sampling), (training, assumed.gpu.training))
    )
    per_rollout = {
        "rollouts": 1.0,
        "prompt_tokens": shared,
        "tokens_generated": answer,
        "tokens_scored": answer * rescored,
        "tokens_backpropagated": answer * epochs,
        "flops": (forward + training) * (shared + answer),
        "wall_seconds": sampling_seconds + training_seconds,
    }
    unit = per_rollout[config.budget.currency]
    amounts = {name: value / unit for name, value in per_rollout.items()}
    amounts["wall_seconds"] += samples * sampling_seconds / config.budget.amount
    amounts["evaluation_tokens"] = samples * answer / config.budget.amount
    amounts["disk_bytes"] = 4.0 * assumed.shape.parameters / config.budget.amount
    return amounts


def attention_flops(shape: ShapeConfig, context: float, ranks: Sequence[float] | None = None) -> float:
    """FLOPs of a token's attention scores and of mixing values, forward, with `context` tokens before it.

    2 for every product of a query with a key and of a weight with a value: ``4 d c`` a layer. The ledger leaves this
    out. With `ranks`, one a layer, the c keys and values are replaced by r combinations of them where that is fewer;
    making and choosing the combinations is taken as free, so this is the least that low-rank attention can cost.

    Raises:
        ValueError: `ranks` does not have one rank a layer.
    """
    reached = [context] * shape.layers if ranks is None else [min(rank, context) for rank in ranks]
    if len(reached) != shape.layers:
        raise ValueError(f"{len(reached)} ranks for {shape.layers} layers: give one each")
    return float(4 * shape.hidden_size * sum(reached))


def low_rank_saving(shape: ShapeConfig, context: float, rank: float) -> float:
    """Most of a token's forward FLOPs that attention of this rank in every layer can save, as a fraction."""
    full = attention_flops(shape, context)
    saved = full - attention_flops(shape, context, [rank] * shape.layers)
    return saved / (Prices(shape.multiplied).forward(1) + full)


def assumptions(assumed: PricingConfig) -> str:
    """What `closed_form` takes for granted, in words."""
    shape, gpu = assumed.shape, assumed.gpu
    held = BYTES_A_PARAMETER * shape.parameters / 1e9
    more = f", more than the {gpu.memory_gb:g} GB of one: launch each run over several GPUs (docs/paper_scale.md)"
    return (
        f"assumed, not measured: {shape.parameters / 1e9:.2f}B parameters; mean prompt {assumed.prompt_tokens:g} and "
        f"answer {assumed.answer_tokens:g} tokens; {gpu.name} at {gpu.sampling:.0%} of {gpu.tflops:g} TFLOP/s sampling "
        f"and {gpu.training:.0%} training; every arm as GRPO; a run holds "
        f"{held:.0f} GB of weights, gradients and optimiser state" + (more if held > gpu.memory_gb else "")
    )
