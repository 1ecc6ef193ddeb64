"""GradAlign: prompts whose policy gradient agrees with that of a trusted set (arXiv 2602.21492, released code).

    score_i = <g_i, v> / (|g_i| |v|),    g_i: gradient of prompt i's group,    v: mean gradient of the trusted prompts

Of every `pool` candidates the one share with the largest scores is trained on; a group without an advantage scores 0.
Candidates and trusted prompts are sampled anew for every batch and their gradients, over all weights, are charged. The
published setting scores 20 candidates a place with up to 128 rollouts each, once for ten updates. ``dot`` (in the
released code) divides by nothing. Noise in g_i biases its cosine to 0; ``debiased`` (ours) credits the even and the odd
rollouts of a group apart and divides by |E g_i| |E v| as their gradients agree, each norm estimated at half of what was
measured or more, so that no score grows beyond four times its cosine by chance (`benchmark.probing.alignment`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from baselines.grpo import GRPO
from benchmark.history import HistoryView
from benchmark.method import Change, Probe

SCORES = ("dot", "cosine", "debiased")
"""Columns of ``history.probe_alignment``."""


@dataclass(frozen=True)
class GradAlign(GRPO):
    """Selection by gradient alignment.

    Attributes:
        score: what candidates are ranked by. pool: candidates per place.
        rollouts: of every candidate. trusted, trusted_rollouts: prompts of the trusted set, rollouts of each.
    """

    family: ClassVar[str] = "selection"
    changes: ClassVar[tuple[Change, ...]] = ("selection",)
    reference: ClassVar[str] = "2602.21492"
    faithful_to: ClassVar[str] = "the released code's score; pool, rollouts and the trusted set (of the pool) are ours"

    score: Literal["dot", "cosine", "debiased"] = "cosine"
    pool: int = 2
    rollouts: int = 4
    trusted: int = 8
    trusted_rollouts: int = 8

    def __post_init__(self) -> None:
        if self.score not in SCORES or self.pool < 1 or self.trusted < 1:
            raise ValueError(
                f"score = {self.score!r}, pool = {self.pool}, trusted = {self.trusted}: one of {', '.join(SCORES)}, "
                "and at least 1"
            )

    @property
    def candidates(self) -> int:
        """Candidates per place."""
        return self.pool

    @property
    def probe(self) -> Probe:
        """Rollouts of every candidate and of the trusted prompts, with gradients over all weights."""
        return Probe(self.rollouts, candidates=True, trusted=self.trusted, trusted_rollouts=self.trusted_rollouts)

    def select(self, history: HistoryView, wanted: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """The `wanted` best, (C,) bool; of equal ones, and without a probe, the first."""
        order = np.argsort(-history.probe_alignment[:, SCORES.index(self.score)], kind="stable")
        mask = np.zeros(len(history), dtype=np.bool_)
        mask[order[:wanted]] = True
        return mask
