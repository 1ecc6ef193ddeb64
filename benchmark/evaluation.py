"""Sampling the evaluation items with streams that every arm shares, and counting correct answers per item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmark import ranks
from benchmark.backend import Backend, Request
from benchmark.draws import Pool
from benchmark.rollouts import Rollouts
from benchmark.verdict import Verdict
from benchmark.verifier import Verifier

ROWS = 1024  # rollouts decoded at a time


@dataclass(frozen=True)
class Evaluator:
    """Draws n samples per evaluation item and verifies them.

    The stream of a sample depends on the seed, the item and the sample's number only: arms, and points of one run,
    are compared on common random numbers.
    """

    pool: Pool
    backend: Backend
    verifier: Verifier
    max_tokens: int
    temperature: float

    def evaluate(
        self, samples: int, watch: Callable[[list[int], Rollouts, list[Verdict]], None] | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Rows ``{"item", "family", "n", "c", "tokens", "verdicts"}`` per item, and the spend by currency.

        Args:
            watch: called with each chunk: numbers of its items, and `samples` rollouts of each with their verdicts.
        """
        rows: list[dict[str, Any]] = []
        spent = {"rollouts": 0, "prompt_tokens": 0, "tokens_generated": 0}
        self.backend.load_weights()
        per_chunk = max(1, ROWS // samples)
        for begin in range(0, len(self.pool.items), per_chunk):
            items = list(range(begin, min(begin + per_chunk, len(self.pool.items))))
            keys = np.repeat(self.pool.stream_keys("evaluate", 0, 0, items), samples)
            lanes = np.tile(np.arange(samples), len(items))
            counts = np.full(len(items), samples, dtype=np.int64)
            prompts = [self.pool.tokens[i] for i in items]
            rollouts = self.backend.generate(Request(prompts, counts, keys, lanes, self.max_tokens, self.temperature))
            golds = [self.pool.items[i].answer for i in items for _ in range(samples)]
            texts = self.backend.policy.decode(rollouts.texts())
            verdicts = ranks.divided(self.verifier.verify_rollouts, golds, texts, rollouts.finished.tolist())
            if watch is not None:
                watch(items, rollouts, verdicts)
            lengths = rollouts.length.view(len(items), samples).sum(1).tolist()
            for place, i in enumerate(items):
                count = Counter(verdicts[place * samples : (place + 1) * samples])
                item = self.pool.items[i]
                rows.append(
                    {
                        "item": item.id,
                        "family": item.family,
                        "n": samples,
                        "c": count[Verdict.CORRECT],
                        "tokens": lengths[place],
                        "verdicts": {verdict.value: count[verdict] for verdict in Verdict if count[verdict]},
                    }
                )
            spent["rollouts"] += len(rollouts)
            spent["prompt_tokens"] += len(rollouts.prompt_tokens)
            spent["tokens_generated"] += len(rollouts.tokens)
        return rows, spent
