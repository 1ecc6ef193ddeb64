r"""Verification of answers: exact for integers, math-verify in killable processes for everything else.

The answer of a response is the content of its last ``\boxed{...}``; a response with several boxes has given only
the last. No box, an empty one or one that is never closed is `Verdict.NO_ANSWER`; an answer outside a box is not
looked for. An answer that offers alternatives in words ("3 or 4") where the gold does not is wrong. docs/verifier.md
states the rules in full.

math-verify guards itself with SIGALRM, which fails outside the main thread and cannot stop native code. Here its
timeouts are off and every comparison runs in a child process under a wall-clock limit that the parent enforces: a
child that exceeds it, its memory limit, or dies costs one answer its verdict and nothing else.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

from benchmark.errors import InputError
from benchmark.verdict import Verdict
from benchmark.verifier_pool import WorkerPool

AnswerForm = Literal["any", "integer"]
Pair = tuple[str, str]

LONGEST = 4_000  # characters; a longer answer is wrong unread (no gold comes near)
REMEMBERED = 200_000  # distinct (gold, answer) pairs

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_ALTERNATIVES = re.compile(r"\\(?:lor|vee)(?![a-zA-Z])|(?<![a-zA-Z])(?:or|either|otherwise|maybe)(?![a-zA-Z])", re.I)
_INTEGER = re.compile(r"\s*([+-]?)([0-9]+)\s*")


class Verifier:
    r"""Verdicts for (gold, response) pairs; a context manager that ends its child processes on exit.

    ``answer_form="integer"`` is for generated arithmetic: both sides must be integer literals and no child
    process is ever started. Anything else in the box is wrong, since math-verify would take ``\boxed{5+2}`` for 7
    and teach a policy to copy the problem into the box. ``"any"`` compares integer literals in the same exact way
    and leaves every other pair to math-verify.

    Args:
        workers: child processes, started when first needed. timeout_s: seconds of wall clock for one answer.
        answer_form: ``any`` or ``integer``. memory_mb: address space of a child, in MiB.
    """

    def __init__(
        self,
        workers: int = 1,
        timeout_s: float = 2.0,
        answer_form: AnswerForm = "any",
        memory_mb: int = 2048,
    ) -> None:
        for key, value in (("workers", workers), ("timeout_s", timeout_s), ("memory_mb", memory_mb)):
            if not value > 0:
                raise InputError("not positive", key=key, value=value, remedy="Give a number above 0")
        if answer_form not in ("any", "integer"):
            remedy = "Choose any or integer"
            raise InputError("unknown form", key="answer_form", value=answer_form, remedy=remedy)
        self.answer_form = answer_form
        self._pool = WorkerPool(workers, timeout_s, memory_mb)
        self._known: OrderedDict[Pair, Verdict] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child processes; a later `verify` starts new ones."""
        with self._lock:
            self._pool.close()

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per (gold, response), in order. No answer makes it raise or hang.

        Raises:
            InputError: child processes cannot be started on this machine.
        """
        asked = [(bare(gold), last_boxed(response)) for gold, response in pairs]
        quick = [self._quick(gold, answer) for gold, answer in asked]
        open_ = [(g, bare(a)) for (g, a), verdict in zip(asked, quick, strict=True) if verdict is None and a]
        with self._lock:
            judged = self._judge(open_)
        rest = iter(judged)
        return [next(rest) if verdict is None else verdict for verdict in quick]

    def verify_rollouts(self, golds: Sequence[str], texts: Sequence[str], finished: Sequence[bool]) -> list[Verdict]:
        """As `verify`, for rollouts of which some met the token limit before they ended.

        Such a rollout is `Verdict.TRUNCATED` when it holds no answer; an answer it has already given counts.
        """
        verdicts = self.verify(list(zip(golds, texts, strict=True)))
        cut = {Verdict.NO_ANSWER: Verdict.TRUNCATED}
        return [v if done else cut.get(v, v) for v, done in zip(verdicts, finished, strict=True)]

    def check_golds(self, golds: Sequence[str]) -> list[int]:
        """Positions of the unusable golds: those that, boxed as a response, would not count as correct."""
        verdicts = self.verify([(gold, f"\\boxed{{{bare(gold)}}}") for gold in golds])
        return [position for position, verdict in enumerate(verdicts) if verdict is not Verdict.CORRECT]

    def _quick(self, gold: str, answer: str | None) -> Verdict | None:
        """The verdict, where it takes no math-verify."""
        gold_integer = integer(gold)
        if not gold or len(gold) > LONGEST:
            return Verdict.GOLD_UNPARSABLE
        if gold_integer is None and (self.answer_form == "integer" or not _balanced(gold)):
            return Verdict.GOLD_UNPARSABLE  # math-verify would read some part of a gold that was cut off
        if answer is None:
            return Verdict.NO_ANSWER
        given = integer(answer)
        if gold_integer is not None and (given is not None or self.answer_form == "integer"):
            return Verdict.CORRECT if given == gold_integer else Verdict.WRONG
        hedged = _ALTERNATIVES.search(answer[: LONGEST + 1]) and not _ALTERNATIVES.search(gold)
        return Verdict.WRONG if len(answer) > LONGEST or hedged else None

    def _judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Verdicts by math-verify; equal pairs are asked once, in this call and in later ones."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        found = dict(zip(new, self._pool.compare(new), strict=True))
        verdicts = [found[pair] if pair in found else self._known[pair] for pair in pairs]
        self._known |= found
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return verdicts


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` with balanced braces (``\{`` and ``\}`` do not count), stripped.

    None if there is no box, or the last is empty or never closed.
    """
    end = len(text)
    while (start := text.rfind("\\boxed", 0, end)) >= 0:
        if opening := _BOX.match(text, start):
            return _until_closed(text, opening.end())
        end = start
    return None


def _until_closed(text: str, begin: int) -> str | None:
    depth = 1
    for brace in _BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[begin : brace.start()].strip() or None
    return None


def _balanced(text: str) -> bool:
    """Whether braces pair up in a non-empty, stripped text."""
    return _until_closed(text + "}", 0) == text


def bare(answer: str) -> str:
    """An answer without white space and one pair of dollar signs around it."""
    answer = answer.strip()
    inside = answer[1:-1]
    return inside.strip() if answer[:1] == answer[-1:] == "$" and inside.strip("$") and "$" not in inside else answer


def integer(text: str) -> str | None:
    """Canonical digits of an integer literal such as ``-7``, ``+7`` or ``007``; None for anything else.

    Text and not a number, because numbers of a million digits take Python seconds to read.
    """
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = match[2].lstrip("0") or "0"
    return f"-{digits}" if match[1] == "-" and digits != "0" else digits
