"""Cleaning of training problems: repeats, conflicting answers, and overlap with what is evaluated.

Overlap is the share of an evaluation problem's distinct 8-grams that one training problem holds, over words and numbers
in lower case without drawings and LaTeX spacing. Rewordings and translations are not found.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GRAM = 8
_UNREAD = re.compile(r"\[asy\].*?\[/asy\]|\\(?:[,;:!> ]|quad|qquad)|~", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+|\d+")

Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One problem.

    Attributes:
        id: unique, ``family/number``. family: what results are grouped by.
        prompt: text given to the policy. answer: the gold answer, without the box.
    """

    id: str
    family: str
    prompt: str
    answer: str


def clean(train: Sequence[Item], evaluation: Sequence[Item], least: float) -> tuple[list[Item], list[Row]]:
    """`train` without repeats (white space apart; the first stays), conflicting answers (all go) and overlap.

    Args:
        least: share of an evaluation problem's 8-grams from which a training problem goes; equal words always go.

    Returns:
        What stays, in order, and a row ``{"train_id", "reason", "with", "share"}`` for every reason to drop:
        ``conflict`` and ``repeat`` name the first problem of the same text, ``overlap`` the evaluation problem
        (``share`` is 1 for equal words).
    """
    texts: dict[str, list[Item]] = defaultdict(list)
    for item in train:
        texts[" ".join(item.prompt.split())].append(item)
    kept, dropped = [], []
    shared = _Overlaps(evaluation)
    for first, *others in texts.values():
        if any(other.answer.strip() != first.answer.strip() for other in others):
            dropped += [_row(item, "conflict", first.id) for item in (first, *others)]
            continue
        dropped += [_row(item, "repeat", first.id) for item in others]
        found = [(item, share) for item, share in shared.of(first.prompt) if share >= least]
        dropped += [_row(first, "overlap", item.id, round(share, 3)) for item, share in found]
        if not found:
            kept.append(first)
    return kept, dropped


def _row(item: Item, reason: str, other: str, share: float | None = None) -> Row:
    return {"train_id": item.id, "reason": reason, "with": other, "share": share}


def words(text: str) -> list[str]:
    """Words and numbers of a problem, in lower case."""
    return _WORD.findall(_UNREAD.sub(" ", text.lower()))


def grams(text: Sequence[str]) -> set[tuple[str, ...]]:
    """Distinct runs of `GRAM` words."""
    return {tuple(text[i : i + GRAM]) for i in range(len(text) - GRAM + 1)}


class _Overlaps:
    """8-grams of evaluation problems, looked up by those of a training problem."""

    def __init__(self, evaluation: Sequence[Item]) -> None:
        self.items = evaluation
        self.whole: dict[str, list[int]] = defaultdict(list)
        self.holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self.size = []
        for number, item in enumerate(evaluation):
            text = words(item.prompt)
            self.whole["".join(text)].append(number)
            distinct = grams(text)
            self.size.append(len(distinct))
            for gram in distinct:
                self.holders[gram].append(number)

    def of(self, prompt: str) -> list[tuple[Item, float]]:
        """Evaluation problems that share anything with `prompt`, and the share of theirs."""
        text = words(prompt)
        count = Counter(number for gram in grams(text) for number in self.holders.get(gram, ()))
        share = {number: held / self.size[number] for number, held in count.items()}
        share |= dict.fromkeys(self.whole.get("".join(text), ()), 1.0)
        return [(self.items[number], share[number]) for number in sorted(share)]
