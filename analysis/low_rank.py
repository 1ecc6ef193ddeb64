"""What adaptive low-rank attention could save of a rollout's FLOPs: an entry of the cost model, in closed form.

Scores and mixing cost 4 d c FLOPs a layer and token with c tokens before it, at rank r at best 4 d r
(`benchmark.pricing.attention_flops`, `low_rank_saving`). `rolloutbench experiment low_rank` prices both at every scale.
"""

from __future__ import annotations

from typing import Annotated

import pandas as pd
from pydantic import Field

from analysis.experiment import Experiment, Measured
from analysis.formatting import exact, points
from analysis.jobs import Tell
from analysis.tables import Column, Table, Text
from benchmark.compose import compose_run, scale_pricing
from benchmark.config import Count, Counts
from benchmark.errors import InputError
from benchmark.pricing import ShapeConfig, attention_flops, low_rank_saving
from benchmark.vocabulary import build_tokenizer


def shape_of(scale: str) -> ShapeConfig:
    """The decoder of a scale: as its dry run assumes it, or made from scratch.

    Raises:
        InputError: its policy is read from a file or the hub, and its dry run assumes no shape.
    """
    assumed = scale_pricing(scale)
    if assumed is not None:
        return assumed.shape
    policy = compose_run("grpo", scale=scale).policy
    if policy.path is not None:
        remedy = "Choose a scale that makes its policy, or give the scale's file a section pricing"
        raise InputError("the shape of its policy is not known", key="scales", value=scale, remedy=remedy)
    return ShapeConfig(**policy.architecture.model_dump(), vocabulary=len(build_tokenizer()), tied=True)


class LowRank(Experiment):
    """Shares of a token's forward FLOPs.

    Attributes:
        contexts: tokens before it. rank: of the attention of every layer.
    """

    scales: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    contexts: Counts
    rank: Count = 64

    def parts(self) -> dict[str, float]:
        """One closed form."""
        return {"closed_form": 1.0}

    def measure(self, part: str, tell: Tell) -> Measured:
        """A row a scale and context."""
        rows = []
        for scale in self.scales:
            shape = shape_of(scale)
            for context in self.contexts:
                attention = attention_flops(shape, context)
                share = attention / (2 * shape.multiplied + attention)
                saved = low_rank_saving(shape, context, self.rank)
                rows.append({"scale": scale, "context": context, "attention": share, "saved": saved})
        tell(1.0)
        return Measured(rows)

    def tables(self, rows: pd.DataFrame) -> list[Table]:
        """Both shares, a row a scale."""
        numbers = zip(rows["scale"], rows["context"], rows["attention"], rows["saved"], strict=True)
        cells = {(scale, at): f"{points(share)} % / {points(saved)} %" for scale, at, share, saved in numbers}
        return [
            Table(
                "low_rank",
                f"Share of a token's forward FLOPs: attention takes / rank {self.rank} saves at most",
                [Column("scale", left=True), *(Column(f"{exact(context)} tokens") for context in self.contexts)],
                [[Text(scale), *(Text(cells[scale, context]) for context in self.contexts)] for scale in self.scales],
                rows[["scale", "context", "attention", "saved"]],
                ["Choosing ranks is taken to be free."],
            )
        ]

    def findings(self, rows: pd.DataFrame) -> list[str]:
        """The most that each scale can save at the shortest and longest context."""
        return [
            f"{scale}: at most {points(own['saved'].iloc[0])} % at {exact(own['context'].iloc[0])} tokens, "
            f"{points(own['saved'].iloc[-1])} % at {exact(own['context'].iloc[-1])}."
            for scale, own in rows.groupby("scale", sort=False)
        ]
