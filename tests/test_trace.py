"""Traces: what they say is what the update saw, and keeping them changes nothing."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmark import checkpoint, trace
from benchmark.draws import Batch
from benchmark.groups import Groups
from benchmark.jsonl import read_rows
from benchmark.policy import Policy
from benchmark.problems import Item
from benchmark.rollouts import Rollouts
from benchmark.run import Interrupted, run_cell
from benchmark.trace import GROUPS, PROBLEMS, ROLLOUTS, SAMPLES, EvaluationTrace, Trace, traced
from benchmark.verdict import Verdict

RECORDS = ("metrics.jsonl", "evaluation.jsonl", "allocation.jsonl", "policy/model.safetensors")


@pytest.fixture(scope="module")
def training() -> ModuleType:
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("test_training")


@pytest.fixture(scope="module")
def policy(training: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    made, _ = training.warm_up(training.make_config(None, "grpo"), lambda *_: None)
    made.save(folder)
    return str(folder)


@pytest.fixture
def train(training: ModuleType, policy: str, tmp_path: Path) -> Callable[..., Path]:
    def run(method: str, name: str = "", params: dict[str, Any] | None = None, **changes: Any) -> Path:
        out = tmp_path / (name or method)
        run_cell(training.make_config(policy, method, params, **changes), out)
        return out

    return run


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in read_rows(out / "traces.jsonl")[0]]


def tokens_of(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    return ((rollout, i) for row in rows for rollout in row["rollouts"] for i in range(len(rollout["tokens"])))


@pytest.mark.parametrize("arm", ["dynamo", "fork_tokens"])
def test_a_run_that_keeps_no_traces_is_the_same_run(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    kept = train(arm, "kept")
    monkeypatch.setattr(Trace, "begin", lambda *_: None)
    monkeypatch.setattr(Trace, "observe", lambda *_: None)
    monkeypatch.setattr(EvaluationTrace, "__call__", lambda *_: None)
    bare = train(arm, "bare")
    assert (bare / "traces.jsonl").read_bytes() == b""
    assert len(rows_of(kept)) > GROUPS
    for name in RECORDS:
        assert (kept / name).read_bytes() == (bare / name).read_bytes(), name
    # The ledger differs in one number: what the last evaluation read for the traces.
    ledgers = [read_rows(out / "ledger.jsonl")[0] for out in (kept, bare)]
    differ = [(a, b) for a, b in zip(*ledgers, strict=True) if a != b]
    assert [(a["event"], a["tokens_generated"] == b["tokens_generated"]) for a, b in differ] == [("evaluation", True)]
    scored = sum(r["length"] for row in rows_of(kept) if row["phase"] == "evaluation" for r in row["rollouts"])
    assert (differ[0][0]["tokens_scored"], differ[0][1]["tokens_scored"]) == (scored, 0)


def test_first_and_last_update_and_the_evaluation_are_kept(train: Callable[..., Path]) -> None:
    out = train("dynamo")
    rows = rows_of(out)
    steps = [row["step"] for row in rows if row["phase"] == "training"]
    updated = [row["step"] for row in read_rows(out / "metrics.jsonl")[0] if "optim/loss" in row["metrics"]]
    assert sorted(set(steps)) == [updated[0], updated[-1]]
    assert updated[0] < updated[-1]
    assert all(0 < steps.count(step) <= GROUPS for step in set(steps))
    evaluated = {row["item"]: row for row in read_rows(out / "evaluation.jsonl")[0] if row["final"]}
    final = [row for row in rows if row["phase"] == "evaluation"]
    assert 0 < len(final) <= PROBLEMS
    for row in final:
        assert (row["n"], row["c"]) == (evaluated[row["item"]]["n"], evaluated[row["item"]]["c"])
        assert len(row["rollouts"]) == min(SAMPLES, row["n"])
    for rollout, i in tokens_of(rows):
        assert rollout["log_prob"][i] <= 0
        assert -1e-6 <= rollout["entropy"][i] <= math.log(32)  # words of the vocabulary


def test_tokens_verdicts_and_numbers_belong_together(train: Callable[..., Path]) -> None:
    out = train("grpo")
    for row in rows_of(out):
        assert len(row["rollouts"]) <= ROLLOUTS
        for rollout in row["rollouts"]:
            lengths = {len(value) for value in rollout.values() if isinstance(value, list)}
            assert lengths == {rollout["length"]}
            answered = f"\\boxed{{{row['answer']}}}" in "".join(rollout["tokens"])
            if rollout["verdict"] == "correct":
                assert answered
                assert rollout["tokens"][-1] == "<end>"
            if answered and rollout["tokens"][-1] == "<end>":
                assert rollout["verdict"] == "correct"


def test_advantages_are_those_of_grpo(train: Callable[..., Path]) -> None:
    """(r - mean) / sd of the group, from the group's own counts; the factor of an arm that modulates nothing is 1."""
    mixed = 0
    for row in (row for row in rows_of(train("grpo")) if row["phase"] == "training"):
        n, c = row["n"], row["c"]
        sd = math.sqrt(c * (n - c) / n / (n - 1))
        for rollout in row["rollouts"]:
            assert set(rollout["advantage"]) == {rollout["advantage_of_rollout"]}
            if 0 < c < n:
                mixed += 1
                expected = ((rollout["verdict"] == "correct") - c / n) / sd
                assert rollout["advantage_of_rollout"] == pytest.approx(expected, rel=1e-3)
                assert set(rollout["factor"]) == {1.0}
            else:
                assert rollout["advantage_of_rollout"] == 0
                assert set(rollout["factor"]) == {None}
    assert mixed > 0


def test_ratios_are_one_until_an_update_has_moved_the_policy(train: Callable[..., Path]) -> None:
    def farthest(out: Path) -> float:
        rows = [row for row in rows_of(out) if row["phase"] == "training"]
        return max(abs(rollout["ratio"][i] - 1) for rollout, i in tokens_of(rows))

    assert farthest(train("grpo", "one", optimiser={"minibatches_per_batch": 1})) < 1e-4
    assert farthest(train("grpo", "four", optimiser={"minibatches_per_batch": 4})) > 0.01


def test_factors_are_those_of_the_method(train: Callable[..., Path]) -> None:
    compensated = [row for row in rows_of(train("dynamo_compensation")) if row["phase"] == "training"]
    boosts = []
    for rollout, i in tokens_of(compensated):
        factor, base = rollout["factor"][i], rollout["advantage_of_rollout"]
        if base > 0:
            boosts.append((rollout["entropy"][i], factor))
            assert rollout["advantage"][i] == pytest.approx(base * factor, rel=1e-3)
        elif base < 0:
            assert factor == 1.0
    assert min(f for _, f in boosts) >= 1.0
    assert 1.15 < max(f for _, f in boosts) <= 1.2
    first = [(h, f) for row in compensated[:1] for r, i in tokens_of([row]) if r["advantage_of_rollout"] > 0
             for h, f in [(r["entropy"][i], r["factor"][i])]]  # fmt: skip
    ordered = sorted(first)  # within one update batch: the surer the token, the larger its boost
    assert all(a[1] >= b[1] - 1e-3 for a, b in pairwise(ordered))
    left_out = {r["factor"][i] for r, i in tokens_of(rows_of(train("fork_tokens"))) if "factor" in r}
    assert left_out == {0.0, 1.0, None}
    penalised = {r["kl_coefficient"][i] for r, i in tokens_of(rows_of(train("kl_cov"))) if "kl_coefficient" in r}
    assert len(penalised) == 2


def test_arms_of_a_seed_begin_with_the_same_rollouts(train: Callable[..., Path]) -> None:
    """So that what methods make of them can be compared side by side."""
    first = [rows_of(train(arm))[0] for arm in ("grpo", "dynamo_modulation")]
    texts = [[(r["verdict"], r["tokens"], r["log_prob"]) for r in row["rollouts"]] for row in first]
    assert texts[0] == texts[1]
    assert first[0]["prompt"] == first[1]["prompt"]


def test_a_resume_after_the_last_update_still_knows_it(
    training: ModuleType, policy: str, train: Callable[..., Path], tmp_path: Path
) -> None:
    whole, asked = train("grpo", "whole"), 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    config = training.make_config(policy, "grpo")
    with pytest.raises(Interrupted):
        run_cell(config, tmp_path / "resumed", should_stop=stop)
    found = checkpoint.latest(tmp_path / "resumed" / "checkpoint")
    assert found is not None
    state = found[1]
    assert {row["step"] for row in state["trace"]} == {1}
    run_cell(config, tmp_path / "resumed")
    assert (whole / "traces.jsonl").read_bytes() == (tmp_path / "resumed" / "traces.jsonl").read_bytes()


def test_long_rollouts_are_cut_and_many_are_left_out(
    policy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trace, "TOKENS", 5)
    groups, per_group, length = 7, 20, 9
    rows = groups * per_group
    rollouts = Rollouts(
        torch.full((groups,), 3),
        torch.ones(groups, dtype=torch.int64),
        torch.arange(groups).repeat_interleave(per_group),
        torch.full((rows * length,), 6),
        torch.full((rows,), length),
        torch.full((rows * length,), -0.5),
        torch.ones(rows, dtype=torch.bool),
    )
    wrong, right = [Verdict.WRONG] * (per_group - 1), [Verdict.CORRECT]
    verdicts = [v for g in range(groups) for v in (wrong + right if g >= 4 else [*wrong, Verdict.WRONG])]
    reward = torch.tensor([float(v is Verdict.CORRECT) for v in verdicts])
    items = [Item(f"sum/{i}", "sum", f"Compute {i}.", str(i)) for i in range(groups)]
    loaded = Policy.load(policy, torch.device("cpu"))
    keeper = Trace(loaded, items)
    keeper.begin(0, Batch(rollouts, Groups(rollouts.prompt, groups, reward, rollouts.length, ~rollouts.finished, 12),
                          [], list(reversed(range(groups))), verdicts))  # fmt: skip
    statistics = trace.TokenStatistics(*(torch.full((rows * length,), x) for x in (-0.5, 0.7, 0.0, 0.0)))
    advantage = torch.repeat_interleave(reward, length)
    keeper.observe(torch.arange(groups), rollouts, statistics, advantage, trace.TokenCredit(advantage * 2))
    made = keeper.rows
    assert [row["item"] for row in made] == ["sum/2", "sum/1", "sum/0"]  # groups 4, 5, 6: those that disagree
    assert all(len(row["rollouts"]) == ROLLOUTS and (row["n"], row["c"]) == (20, 1) for row in made)
    assert all(len(r["tokens"]) == len(r["entropy"]) == 5 and r["length"] == 9 for row in made for r in row["rollouts"])


def test_traced_problems_cover_the_families() -> None:
    items = [Item(f"{family}/{i}", family, "", "") for family, count in [("a", 20), ("b", 1), ("c", 5)]
             for i in range(count)]  # fmt: skip
    chosen = [items[i].id for i in traced(items)]
    assert chosen == ["a/0", "a/1", "a/2", "a/3", "b/0", "c/0", "c/1", "c/2"]
    assert len(traced(items[:3])) == 3
