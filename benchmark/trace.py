"""A few rollouts of a run, token by token, for people to look at: ``traces.jsonl``.

The first and the last training step that updated, and the final evaluation. Training rows hold what the update
computed anyway; evaluation rows cost one forward pass over at most `PROBLEMS` x `SAMPLES` rollouts, in the account of
the evaluation. Nothing that trains reads any of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmark.backend import Backend
from benchmark.draws import Batch
from benchmark.jsonl import Row
from benchmark.method import TokenCredit
from benchmark.policy import Policy
from benchmark.problems import Item
from benchmark.rollouts import Rollouts, ragged_index
from benchmark.scoring import TokenStatistics
from benchmark.verdict import Verdict

GROUPS, ROLLOUTS = 3, 8
"""Groups of a training step, and rollouts of each."""
PROBLEMS, SAMPLES = 8, 4
"""Problems of the final evaluation, and samples of each."""
TOKENS = 192
"""Tokens of a rollout; the rest is cut, and `length` tells."""


@dataclass
class Trace:
    """What the newest update saw of the first groups of its batch in which answers disagree.

    Attributes:
        policy: its tokenizer spells the tokens. items: the training pool.
        rows: the newest update's rows; one a group, in the order of the batch.
    """

    policy: Policy
    items: Sequence[Item]
    _heads: dict[int, tuple[Row, list[Verdict]]] = field(default_factory=dict)
    _seen: dict[int, tuple[Rollouts, dict[str, Tensor]]] = field(default_factory=dict)
    _restored: list[Row] = field(default_factory=list)

    def begin(self, step: int, batch: Batch) -> None:
        """Choose the groups of a batch that is about to train; mixed ones first, as others have no advantage."""
        mixed = batch.groups.mixed().tolist()
        chosen = sorted(range(len(mixed)), key=lambda prompt: not mixed[prompt])[:GROUPS]
        owner = batch.rollouts.prompt.tolist()
        self._heads, self._seen, self._restored = {}, {}, []
        for prompt in sorted(chosen):
            verdicts = [verdict for verdict, of in zip(batch.verdicts, owner, strict=True) if of == prompt]
            if verdicts:
                row = head(step, "training", self.items[batch.prompts[prompt]], verdicts)
                self._heads[prompt] = row, verdicts[:ROLLOUTS]

    def observe(
        self, prompts: Tensor, part: Rollouts, seen: TokenStatistics, advantage: Tensor, credit: TokenCredit
    ) -> None:
        """Keep what the first update on a chosen group saw; nothing waits for the device.

        Args:
            prompts: numbers in the batch of the minibatch's groups. part: their rollouts, T tokens.
            seen: (T,) each, under the policy that is updated. advantage: (T,) before, `credit` after modulation.
        """
        for place, prompt in enumerate(prompts.tolist()):
            if prompt not in self._heads or prompt in self._seen:
                continue
            rows = torch.nonzero(part.prompt == place).flatten()[:ROLLOUTS]
            flat = ragged_index(rows, part.length)
            group = part.select_rows(rows)
            given = credit.advantage[flat]
            if credit.mask is not None:
                given = given * credit.mask[flat]
            channels = {
                "entropy": seen.entropy[flat],
                "ratio": (seen.log_prob - part.log_prob)[flat].exp(),
                "advantage": given,
                "factor": given / advantage[flat],  # NaN where there is no advantage to modulate
            }
            if credit.kl_coefficient is not None:
                channels["kl_coefficient"] = credit.kl_coefficient[flat]
            self._seen[prompt] = group, channels | {"base": advantage[flat]}

    def restore(self, rows: list[Row]) -> None:
        """Go on from the `rows` of a checkpoint."""
        self._heads, self._seen, self._restored = {}, {}, rows

    @property
    def rows(self) -> list[Row]:
        """The rows of the newest update; waits for the device."""
        made = []
        for prompt, (row, verdicts) in self._heads.items():
            group, channels = self._seen[prompt]
            base = channels["base"].tolist()
            rollouts = spell(self.policy, group, verdicts, {k: v for k, v in channels.items() if k != "base"})
            first = 0
            for rollout in rollouts:
                rollout["advantage_of_rollout"] = rounded(base[first])
                first += rollout["length"]
            made.append(row | {"rollouts": rollouts})
        return self._restored or made


@dataclass
class EvaluationTrace:
    """Watches an evaluation (`benchmark.evaluation.Evaluator`) and keeps a few samples of a few problems.

    Attributes:
        backend: what is evaluated. items: the evaluation problems. step: training steps so far.
        rows: one a problem. tokens, read: generated tokens that were scored, and all that were read for it.
    """

    backend: Backend
    items: Sequence[Item]
    step: int
    temperature: float
    rows: list[Row] = field(default_factory=list)
    tokens: int = 0
    read: int = 0

    @torch.no_grad()
    def __call__(self, items: Sequence[int], rollouts: Rollouts, verdicts: Sequence[Verdict]) -> None:
        """Score the traced ones among the problems `items`, each with the same number of `rollouts`."""
        per_item = len(rollouts) // len(items)
        for place, number in enumerate(items):
            if number not in traced(self.items):
                continue
            begin = place * per_item
            own = verdicts[begin : begin + per_item]
            rows = torch.arange(begin, begin + min(SAMPLES, per_item), device=rollouts.prompt.device)
            few = rollouts.select_prompts(torch.tensor([place], device=rows.device)).select_rows(rows - begin)
            seen = self.backend.score(few, self.temperature)
            self.tokens += len(few.tokens)
            self.read += len(few.tokens) + len(few.prompt_tokens)
            told = head(self.step, "evaluation", self.items[number], own)
            made = spell(self.backend.policy, few, own[:SAMPLES], {"entropy": seen.entropy})
            self.rows.append(told | {"rollouts": made})


def head(step: int, phase: str, item: Item, verdicts: Sequence[Verdict]) -> Row:
    """What a row says of its problem: how many rollouts were drawn of it and how many were correct."""
    correct = sum(verdict is Verdict.CORRECT for verdict in verdicts)
    told: Row = {"phase": phase, "step": step, "item": item.id, "family": item.family}
    return told | {"prompt": item.prompt, "answer": item.answer, "n": len(verdicts), "c": correct}


def traced(items: Sequence[Item]) -> list[int]:
    """Numbers of the evaluation problems to trace: the first of every family, then the second, ..."""
    seen: dict[str, int] = {}
    ranks = []
    for item in items:
        ranks.append(seen.get(item.family, 0))
        seen[item.family] = ranks[-1] + 1
    return sorted(sorted(range(len(items)), key=lambda number: ranks[number])[:PROBLEMS])


def spell(
    policy: Policy, rollouts: Rollouts, verdicts: Sequence[Verdict], channels: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """The first ``len(verdicts)`` rollouts, token by token.

    Args:
        channels: numbers per token of these rollouts, (T,), by name; NaN is written as null.
    """
    lengths = rollouts.length[: len(verdicts)].tolist()
    numbers = {"log_prob": rollouts.log_prob, **channels}
    values = {name: column[: sum(lengths)].tolist() for name, column in numbers.items()}
    texts = policy.pieces(rollouts.tokens[: sum(lengths)].tolist())
    made, begin = [], 0
    for length, verdict in zip(lengths, verdicts, strict=True):
        here = slice(begin, begin + min(length, TOKENS))
        row: dict[str, Any] = {"verdict": verdict.value, "length": length, "tokens": texts[here]}
        made.append(row | {name: [rounded(x) for x in column[here]] for name, column in values.items()})
        begin += length
    return made


def rounded(value: float) -> float | None:
    """Four significant digits; None for NaN and infinities, which JSON cannot say."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
