"""What adaptive low-rank attention could save of a rollout's FLOPs: an entry of the cost model, in closed form.

``python -m analysis.low_rank`` prints, for every scale, how much of a token's forward pass attention takes and how much
of the pass rank 64 in every layer saves at most (`benchmark.pricing.low_rank_saving`).
"""

from __future__ import annotations

from benchmark.compose import compose_run, scale_pricing
from benchmark.pricing import ShapeConfig, attention_flops, low_rank_saving
from benchmark.vocabulary import build_tokenizer

PAPER = ("paper-1.5b", "paper-7b", "paper-14b")
CONTEXTS = (32, 1024, 4096, 32_768)
RANK = 64


def shapes() -> dict[str, ShapeConfig]:
    """The decoders of the default scale and of the paper scales."""
    small = compose_run("grpo").policy.architecture
    found = {"small": ShapeConfig(**small.model_dump(), vocabulary=len(build_tokenizer()), tied=True)}
    for scale in PAPER:
        assumed = scale_pricing(scale)
        if assumed is not None:
            found[scale] = assumed.shape
    return found


def main() -> None:
    """Print the table."""
    print(f"share of a token's forward FLOPs: attention scores and mixing / saved at most by rank {RANK}")
    print("scale       " + "".join(f"{f'{context:,} tokens':>20}" for context in CONTEXTS))
    for name, shape in shapes().items():
        cells = []
        for context in CONTEXTS:
            attention = attention_flops(shape, context)
            share = attention / (2 * shape.multiplied + attention)
            cells.append(f"{share:>10.1%} / {low_rank_saving(shape, context, RANK):>7.1%}")
        print(f"{name:12}" + "".join(cells))


if __name__ == "__main__":
    main()
