"""What a run spends: an append-only record, one row per event that costs, and the budget that ends the run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.jsonl import Record, dumps

CURRENCIES = (
    "rollouts",
    "prompt_tokens",
    "tokens_generated",
    "tokens_scored",
    "tokens_backpropagated",
    "flops",
)
FATES = ("trained", "filtered", "overflow", "failed", "probed")
UNCHARGED_PHASES = ("evaluate", "oracle")
"""Phases of the clock whose seconds are no arm's device seconds, as their tokens are in no arm's budget."""


def link(head: str, row: Mapping[str, Any]) -> str:
    """The hash of `row` (without its own) behind a row with the hash `head`: SHA-256 of `head` and the row's bytes."""
    return hashlib.sha256(f"{head}{dumps(row)}".encode()).hexdigest()


@dataclass(frozen=True)
class Prices:
    """FLOPs of a token: 2 per parameter forward, 4 per parameter backward (attention scores left out).

    Attributes:
        parameters: parameters that multiply a token (the tied output head once; embedding look-ups are free).
    """

    parameters: int

    def forward(self, tokens: int) -> int:
        """FLOPs of reading `tokens` tokens."""
        return 2 * self.parameters * tokens

    def backward(self, tokens: int) -> int:
        """FLOPs of back-propagating through `tokens` tokens, their forward not included."""
        return 4 * self.parameters * tokens


@dataclass
class Ledger:
    """Cumulative spend of one run and the rows that add up to it.

    ``ledger.jsonl`` holds only countable currencies, so equal runs write equal bytes; measured seconds are in
    ``timings.jsonl``. Rollout rows carry a fate; drawn = trained + filtered + overflow + failed + probed.
    Every row's ``hash`` covers the row and the hash before it (`link`), so no row changes, goes or comes unnoticed.

    Attributes:
        spent: what counts against the budget, by currency; includes probes.
        evaluated, oracle: accounts of their own for evaluation and for the rollouts of an uncharged probe.
        drawn: rollouts of `spent` by fate.
        head: hash of the last row, empty before the first; None in a run begun by a version that had none.
        record: the file of the rows.
    """

    path: Path
    rows: int = 0
    spent: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CURRENCIES, 0))
    evaluated: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CURRENCIES, 0))
    oracle: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CURRENCIES, 0))
    drawn: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FATES, 0))
    head: str | None = field(default="", kw_only=True)
    record: Record = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.record = Record(self.path)

    def charge(self, step: int, event: str, fate: str | None = None, **amounts: int) -> None:
        """Append one event. `amounts` are keyed by currency; evaluation and oracle never count against the budget."""
        row: dict[str, Any] = {"row": self.rows, "step": step, "event": event, "fate": fate}
        row |= {currency: amounts.pop(currency, 0) for currency in CURRENCIES}
        if amounts:
            raise KeyError(f"unknown currencies {sorted(amounts)}; known: {', '.join(CURRENCIES)}")
        if self.head is not None:
            self.head = row["hash"] = link(self.head, row)
        self.record.append([row])
        self.rows += 1
        account = {"evaluation": self.evaluated, "oracle": self.oracle}.get(event, self.spent)
        for currency in CURRENCIES:
            account[currency] += row[currency]
        if fate is not None:
            self.drawn[fate] += row["rollouts"]

    def state(self) -> dict[str, Any]:
        """Totals for a checkpoint."""
        return {name: getattr(self, name) for name in ("rows", "spent", "evaluated", "oracle", "drawn", "head")}

    @classmethod
    def restore(cls, path: Path, state: dict[str, Any]) -> Ledger:
        """A ledger that goes on at `path` from the totals of `state`."""
        totals = (dict(state[name]) for name in ("spent", "evaluated", "oracle", "drawn"))
        return cls(path, state["rows"], *totals, head=state.get("head"))


@dataclass(frozen=True)
class Admission:
    """A part of a batch that certainly fits the rest of the budget.

    Attributes:
        prompts: prompts that are drawn. rollouts: what the method may allocate among them.
        max_tokens: token limit of a rollout.
        cut: the token limit is the budget's, not the protocol's: such rollouts never train.
        probe: rollouts a prompt that fit on top, for a charged probe; 0 where the draw has to do without.
    """

    prompts: int
    rollouts: int
    max_tokens: int
    cut: bool = False
    probe: int = 0


@dataclass(frozen=True)
class Budget:
    """A currency and an amount; the only stop rule, and the x-axis of every curve.

    A run ends exactly at its amount without favouring short answers: rollouts are admitted by their worst case
    before they are drawn, never by their outcome after. Near the end a batch is therefore drawn in shrinking parts,
    and the few tokens that cannot hold one whole rollout are spent on rollouts that do not train.
    """

    currency: str
    amount: int

    def remaining(self, spent: int) -> int:
        """Amount left after `spent`, both in the budget's currency."""
        return self.amount - spent

    def worst(self, max_tokens: int) -> int:
        """The most that one rollout can cost, in the budget's currency."""
        return max_tokens if self.currency == "tokens_generated" else 1

    def admit(
        self, remaining: int, prompts: int, group: int, max_tokens: int, probe: int = 0, fixed: int = 0
    ) -> Admission:
        """The largest part of ``prompts * group`` rollouts whose worst case fits `remaining` (> 0).

        With `probe` rollouts a prompt and `fixed` a draw ahead of them, as many prompts as fit with all; where not even
        one does, the probe is left out.
        """
        worst = self.worst(max_tokens)
        whole = min((remaining - worst * fixed) // (worst * (group + probe)), prompts)
        if probe and whole > 0:
            return Admission(whole, whole * group, max_tokens, probe=probe)
        affordable = min(remaining // worst, prompts * group)
        if affordable >= group:
            whole = affordable // group
            return Admission(whole, whole * group, max_tokens)
        if affordable >= 1:
            return Admission(1, affordable, max_tokens)
        return Admission(1, 1, remaining, cut=True)
