"""Recalled rollouts (AR3PO): what is kept, what a group gets, what it costs, and that it survives an interruption."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmark.draws import Draw
from benchmark.groups import segment_sum
from benchmark.history import HistoryView
from benchmark.jsonl import read_rows
from benchmark.recall import Recall, joined
from benchmark.rollouts import Rollouts
from benchmark.run import Interrupted, run_cell
from benchmark.verdict import Verdict

sys.path.append(str(Path(__file__).parent))
training: Any = importlib.import_module("test_training")
sampling: Any = importlib.import_module("test_field_sampling")
policy, train = training.policy, training.train

FEW = {"name": "sums", "mix": training.MIX, "train_items": 8, "eval_items_per_family": 4}
BUDGET = {"currency": "tokens_generated", "amount": 6000}


def rollouts_of(texts: list[list[list[int]]]) -> Rollouts:
    rows = [(prompt, text) for prompt, group in enumerate(texts) for text in group]
    length = torch.tensor([len(text) for _, text in rows])
    return Rollouts(
        torch.arange(len(texts)),
        torch.ones(len(texts), dtype=torch.int64),
        torch.tensor([prompt for prompt, _ in rows]),
        torch.tensor([token for _, text in rows for token in text]),
        length,
        -torch.ones(int(length.sum())),
        torch.ones(len(rows), dtype=torch.bool),
    )


RIGHT, WRONG = Verdict.CORRECT, Verdict.WRONG


def test_a_group_without_a_correct_rollout_gets_the_newest_one_of_its_prompt() -> None:
    recall = Recall()
    for texts, verdicts in (
        ([[[1], [2, 3]], [[4]]], [WRONG, RIGHT, RIGHT]),  # prompts 7 and 9 of the pool
        ([[[5, 6, 7], [8]], [[9]]], [RIGHT, RIGHT, WRONG]),
    ):
        drawn = rollouts_of(texts)
        recall.remember(Draw([7, 9], np.array([2, 1]), drawn, verdicts, HistoryView.unseen(2), cut=False))
    assert {prompt: text.tolist() for prompt, text in recall.kept.items()} == {7: [5, 6, 7], 9: [4]}
    again = Recall()
    again.restore(recall.state())
    assert {prompt: text.tolist() for prompt, text in again.kept.items()} == {7: [5, 6, 7], 9: [4]}

    now, verdicts = rollouts_of([[[1], [2]], [[3]], [], [[4, 4]]]), [WRONG, WRONG, RIGHT, WRONG]
    prompts = [7, 9, 9, 5]  # all wrong; one right; no rollout; all wrong and nothing kept
    found = again.missing(now, verdicts, prompts)
    assert found is not None
    assert (found.prompt.tolist(), found.texts()) == ([0], [[5, 6, 7]])
    both, judged = joined(now, verdicts, found)
    assert both.texts() == [[1], [2], [5, 6, 7], [3], [4, 4]]
    assert both.prompt.tolist() == [0, 0, 0, 1, 3]
    assert judged == [WRONG, WRONG, RIGHT, RIGHT, WRONG]
    assert again.missing(now, [RIGHT, WRONG, RIGHT, WRONG], prompts) is None
    assert Recall().missing(now, verdicts, prompts) is None


def test_recalled_rollouts_are_scored_charged_and_neither_drawn_nor_remembered(
    monkeypatch: pytest.MonkeyPatch, train: Callable[..., Path], tmp_path: Path
) -> None:
    """Many visits of few prompts: what a group lacks, an earlier visit of its prompt had."""
    recalled = 0
    for batch in sampling.batches_of(monkeypatch, train, "ar3po", 600, name="spied", task=FEW):
        drawn = torch.zeros(len(batch.prompts), dtype=torch.int64)
        place = {prompt: number for number, prompt in enumerate(batch.prompts)}
        for draw in batch.drawn:
            for prompt, count in zip(draw.prompts, draw.counts.tolist(), strict=True):
                if prompt in place:
                    drawn[place[prompt]] += count
        extra = batch.groups.size.long() - drawn
        right = segment_sum(batch.groups.reward, batch.groups.prompt, batch.groups.prompts)
        assert set(extra.tolist()) <= {0, 1}
        assert (right[extra == 1] == 1).all()
        recalled += int(extra.sum())
    assert recalled > 0
    rows = read_rows(tmp_path / "spied" / "ledger.jsonl")[0]
    scored = [row for row in rows if row["event"] == "recall"]
    assert scored
    assert all(row["tokens_scored"] > 0 and row["rollouts"] == row["tokens_generated"] == 0 for row in scored)
    rows = read_rows(train("ar3po", {"reuse": False}, "plain", task=FEW, budget=BUDGET) / "ledger.jsonl")[0]
    assert not [row for row in rows if row["event"] == "recall"]


def test_what_can_be_recalled_survives_an_interruption(policy: str, tmp_path: Path) -> None:
    config = training.make_config(policy, "ar3po", task=FEW, budget=BUDGET)
    run_cell(config, tmp_path / "whole")
    answers = iter([False] * 6 + [True])
    with pytest.raises(Interrupted):
        run_cell(config, tmp_path / "resumed", should_stop=lambda: next(answers))
    run_cell(config, tmp_path / "resumed")
    for name in ("ledger.jsonl", "metrics.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name
    events = Counter(row["event"] for row in read_rows(tmp_path / "whole" / "ledger.jsonl")[0])
    assert events["recall"] > 1
