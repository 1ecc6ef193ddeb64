"""Pre-sampling: what an allocator is told, what it costs, and that it disturbs nothing else."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.comparisons import Scores
from analysis.results import load_study
from analysis.table_spend import rollouts_table, seconds_table, spend_table
from baselines.grpo import GRPO
from benchmark.collect import Collector
from benchmark.draws import Batch
from benchmark.groups import Groups
from benchmark.history import HistoryView, PromptHistory
from benchmark.ledger import CURRENCIES, Budget, Ledger
from benchmark.method import Method, Probe
from benchmark.mirror_points import result_points
from benchmark.mirror_record import find_cells
from benchmark.run import Interrupted, run_cell
from benchmark.verdict import Verdict

sys.path.append(str(Path(__file__).parent))
training: Any = importlib.import_module("test_training")
synthetic: Any = importlib.import_module("synthetic_results")
policy, train, rows = training.policy, training.train, training.rows

Train = Callable[..., Path]
WIDTH = 17  # numbers in a row: ten counts, gradient norms of two classes and their squares, alignment
ROLLOUTS = {"currency": "rollouts", "amount": 200}


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """A run flushes denormals in its process, with which hypothesis makes no floats."""
    yield
    torch.set_flush_denormal(False)


def probing(monkeypatch: pytest.MonkeyPatch, probe: Probe | None) -> None:
    """GRPO asks for `probe` and goes on as ever."""
    monkeypatch.setattr(GRPO, "probe", property(lambda self: probe))


def table(view: HistoryView) -> list[list[float]]:
    columns = [values.reshape(len(view), -1) for values in view.columns().values() if values.size]
    return np.concatenate(columns, axis=1).tolist()


def spy_on_samples(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[list[int], list[list[int]]]]]:
    """Prompts and token ids of everything sampled from now on, by purpose."""
    seen: dict[str, list[tuple[list[int], list[list[int]]]]] = {}
    sample = Collector._sample

    def spy(self: Collector, purpose: str, step: int, prompts: list[int], *rest: Any) -> Any:
        result = sample(self, purpose, step, prompts, *rest)
        seen.setdefault(purpose, []).append((prompts, result[0].texts()))
        return result

    monkeypatch.setattr(Collector, "_sample", spy)
    return seen


# -- admission and accounts


@given(
    st.sampled_from(["tokens_generated", "rollouts"]),
    st.integers(1, 5000),
    st.integers(1, 12),
    st.integers(1, 16),
    st.integers(1, 64),
    st.integers(1, 20),
)
@settings(max_examples=200, deadline=None)
def test_a_probe_is_admitted_with_its_groups_or_not_at_all(
    currency: str, remaining: int, prompts: int, group: int, max_tokens: int, probe: int
) -> None:
    budget = Budget(currency, 10_000)
    admitted = budget.admit(remaining, prompts, group, max_tokens, probe)
    price = max_tokens if currency == "tokens_generated" else 1
    per_prompt = (group + probe) * price
    if remaining < per_prompt:
        assert admitted == budget.admit(remaining, prompts, group, max_tokens)
        assert admitted.probe == 0
        return
    assert admitted.probe == probe
    assert not admitted.cut
    assert admitted.rollouts == admitted.prompts * group
    assert admitted.prompts * per_prompt <= remaining
    assert admitted.prompts == prompts or (admitted.prompts + 1) * per_prompt > remaining


def test_an_oracles_rollouts_are_an_account_of_their_own(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.charge(0, "oracle", rollouts=64, prompt_tokens=9, tokens_generated=500, flops=70)
    assert ledger.spent == ledger.evaluated == dict.fromkeys(CURRENCIES, 0)
    assert sum(ledger.drawn.values()) == 0
    ledger.charge(0, "probe", "probed", rollouts=4, prompt_tokens=9, tokens_generated=30, flops=5)
    assert (ledger.spent["rollouts"], ledger.drawn["probed"], ledger.oracle["rollouts"]) == (4, 4, 64)
    restored = Ledger.restore(ledger.path, json.loads(json.dumps(ledger.state())))
    assert restored == ledger


def test_a_probe_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Probe(0)


# -- what a method is shown


def some_views() -> tuple[HistoryView, HistoryView]:
    history = PromptHistory(5, half_life=2.0)
    history.record([0, 2, 3], np.array([1.0, 2.0, 0.0]), np.array([4.0, 4.0, 4.0]))
    history.record([2, 4], np.array([3.0, 1.0]), np.array([8.0, 1.0]))
    probed = replace(history.view([2, 1]), probe_successes=np.array([5, 0]), probe_trials=np.array([6, 6]))
    return history.view([0, 4, 3]), probed


def test_views_are_selected_and_joined_row_by_row() -> None:
    first, second = some_views()
    joined = HistoryView.concatenate([first.select(np.array([2, 0])), second])
    assert len(joined) == 4
    assert table(joined) == [table(first)[2], table(first)[0], *table(second)]
    assert joined.probe_trials.tolist() == [0, 0, 6, 6]
    assert joined.visits.dtype == joined.probe_successes.dtype == np.int64
    assert len(first.select(np.zeros(0, dtype=np.int64))) == 0


def test_visits_fade_by_half_in_a_half_life() -> None:
    history = PromptHistory(3, half_life=2.0)
    history.record([0, 1], np.array([1.0, 2.0]), np.array([4.0, 0.0]), np.array([10.0, 9.0]), np.array([3.0, 9.0]))
    history.record([0], np.array([2.0]), np.array([2.0]), np.array([5.0]), np.array([1.0]))
    seen, fade = history.view([0, 1]), 0.5**0.5
    assert seen.successes.tolist() == [2 + fade * 1, 0]
    assert seen.trials.tolist() == [2 + fade * 4, 0]
    assert seen.tokens.tolist() == [5 + fade * 10, 0]
    assert seen.surprisal.tolist() == [1 + fade * 3, 0]
    assert seen.visits.tolist() == [2, 0]
    assert seen.last_trials.tolist() == [2, 0]
    history.record([0], np.array([0.0]), np.array([1.0]))
    assert seen.visits.tolist() == [2, 0]  # a snapshot


def test_groups_made_by_hand_are_of_prompts_never_seen() -> None:
    index, reward = torch.tensor([0, 0, 2]), torch.tensor([1.0, 0.0, 1.0])
    length = torch.tensor([3, 4, 5])
    groups = Groups(index, 3, reward, length, length > 9, 9)
    assert table(groups.history) == [[0.0] * WIDTH] * 3
    shown = Groups(index, 3, reward, length, length > 9, 9, some_views()[0]).history
    assert table(shown) == table(some_views()[0])
    with pytest.raises(ValueError, match="2 prompts for groups of 3"):
        Groups(index, 3, reward, length, length > 9, 9, some_views()[1])


@pytest.mark.parametrize("arm", ["grpo", "dapo"])
def test_credit_sees_the_history_its_allocator_saw_in_the_order_of_the_groups(
    train: Train, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    probing(monkeypatch, Probe(3))
    shown: list[HistoryView] = []
    batches: list[tuple[Method, Batch]] = []
    allocate, collect = GRPO.allocate, Collector.collect

    def spy_allocate(self: GRPO, history: HistoryView, budget: int, rng: np.random.Generator) -> Any:
        shown.append(history)
        return allocate(self, history, budget, rng)

    def spy_collect(self: Collector, step: int) -> Batch:
        batch = collect(self, step)
        batches.append((self.method, batch))
        return batch

    monkeypatch.setattr(GRPO, "allocate", spy_allocate)
    monkeypatch.setattr(Collector, "collect", spy_collect)
    train(arm)
    draws = [draw for _, batch in batches for draw in batch.drawn]
    assert [table(draw.history) for draw in draws] == [table(view) for view in shown]
    several, dropped = 0, 0
    for method, batch in batches:
        expected: list[list[float]] = []
        for draw in batch.drawn:
            reward = torch.tensor([float(v is Verdict.CORRECT) for v in draw.verdicts])
            r = draw.rollouts
            kept = method.keep(Groups(r.prompt, r.prompts, reward, r.length, ~r.finished, 12))
            expected += [row for row, k in zip(table(draw.history), kept.tolist(), strict=True) if k and not draw.cut]
            dropped += int((~kept).sum())
        several += len(batch.drawn) > 1
        assert table(batch.groups.history) == expected[: batch.groups.prompts]
        assert batch.groups.prompts == min(8, len(expected))
    assert several > 0
    assert (dropped > 0) == (arm == "dapo")
    assert max(view.visits.max() for view in shown) >= 1


# -- whole runs


@pytest.mark.parametrize("currency", ["tokens_generated", "rollouts"])
def test_a_charged_probe_is_paid_from_the_budget_which_is_still_met_exactly(
    train: Train, monkeypatch: pytest.MonkeyPatch, currency: str
) -> None:
    probing(monkeypatch, Probe(2))
    amount = 2201 if currency == "tokens_generated" else 203
    out = train("grpo", budget={"currency": currency, "amount": amount})
    result, ledger = json.loads((out / "result.json").read_text()), rows(out, "ledger.jsonl")
    assert result["spent"][currency] == amount
    assert sum(result["drawn"].values()) == result["spent"]["rollouts"]
    charged = [row for row in ledger if row["event"] != "evaluation"]
    for name in CURRENCIES:
        assert sum(row[name] for row in charged) == result["spent"][name]
    probes = [row for row in ledger if row["event"] == "probe"]
    assert {row["fate"] for row in probes} == {"probed"}
    assert sum(row["rollouts"] for row in probes) == result["drawn"]["probed"] > 0
    # Two of a probe to eight that are allocated, but for the end, which cannot hold both.
    others = result["spent"]["rollouts"] - result["drawn"]["probed"]
    assert 0 < others - 4 * result["drawn"]["probed"] < 40
    trained = sum(row["tokens_generated"] for row in ledger if row["fate"] == "trained")
    assert result["spent"]["tokens_backpropagated"] == trained
    assert result["oracle"] == dict.fromkeys(CURRENCIES, 0)


def test_an_oracle_is_recorded_and_changes_nothing_it_is_not_asked_about(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train("grpo", name="plain")
    probing(monkeypatch, Probe(5, charged=False))
    out = train("grpo", name="oracle")
    training.assert_same_weights(plain, out)
    for name in ("metrics.jsonl", "evaluation.jsonl", "allocation.jsonl"):
        assert (plain / name).read_bytes() == (out / name).read_bytes()
    ledger = rows(out, "ledger.jsonl")
    free = [row for row in ledger if row["event"] == "oracle"]
    assert len(free) > 2
    assert {row["fate"] for row in free} == {None}

    def without_number(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {key: row[key] for key in row if key not in ("row", "hash")} for row in found if row["event"] != "oracle"
        ]

    assert without_number(ledger) == without_number(rows(plain, "ledger.jsonl"))
    result = json.loads((out / "result.json").read_text())
    assert result["oracle"] == {name: sum(row[name] for row in free) for name in CURRENCIES}
    assert result["oracle"]["rollouts"] >= 5 * 8 * len(rows(plain, "metrics.jsonl")) / 2
    seconds = result["seconds"]
    assert seconds["oracle"] > 0
    charged = sum(value for phase, value in seconds.items() if phase not in ("evaluate", "oracle"))
    assert result["spent"]["device_seconds"] == pytest.approx(charged)
    (cell,) = find_cells(out)
    points = {point.key: point.value for point in result_points(cell.folder, cell.currency)}
    assert points["cost/oracle_tokens"] == result["oracle"]["tokens_generated"]


def test_a_method_without_a_probe_leaves_no_trace_of_one(train: Train) -> None:
    out = train("dapo")
    ledger = rows(out, "ledger.jsonl")
    assert {row["event"] for row in ledger} <= {"rollouts", "score", "backprop", "evaluation"}
    assert {row["fate"] for row in ledger} <= {"trained", "filtered", "overflow", "failed", None}
    assert all(list(row) == ["row", "step", "event", "fate", *CURRENCIES, "hash"] for row in ledger)
    assert json.loads((out / "result.json").read_text())["drawn"]["probed"] == 0


def test_probes_have_streams_of_their_own_and_reach_allocate_but_not_the_history(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[int, list[HistoryView]] = {}
    samples = {}
    allocate = GRPO.allocate
    for size in (2, 4):
        with monkeypatch.context() as patch:
            probing(patch, Probe(size, charged=False))
            samples[size] = spy_on_samples(patch)

            def spy(self: GRPO, history: HistoryView, *rest: Any, size: int = size) -> Any:
                shown.setdefault(size, []).append(history)
                return allocate(self, history, *rest)

            patch.setattr(GRPO, "allocate", spy)
            train("grpo", name=str(size), budget=ROLLOUTS)
    prompts, probed = samples[2]["probe"][0]
    same, rolled = samples[2]["rollout"][0]
    assert prompts == same
    # Rollout j of a prompt's probe is the same whatever the probe's size, and no rollout that trains.
    longer = samples[4]["probe"][0][1]
    assert probed == [longer[4 * p + j] for p in range(8) for j in range(2)]
    assert probed != [rolled[8 * p + j] for p in range(8) for j in range(2)]
    for size, views in shown.items():
        assert all((view.probe_trials == size).all() for view in views)
        assert sum(int(view.probe_successes.sum()) for view in views) > 0
        assert all((view.probe_successes <= size).all() for view in views)
        assert set(views[0].trials) == {0.0}
    past = {size: [row[:5] for view in views for row in table(view)] for size, views in shown.items()}
    assert past[2] == past[4]
    assert {row[4] for row in past[2]} == {0.0, 8.0}


def test_the_number_of_successes_is_that_of_the_probes_verdicts(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    probing(monkeypatch, Probe(3))
    verdicts: list[list[bool]] = []
    views: list[HistoryView] = []
    sample, allocate = Collector._sample, GRPO.allocate

    def spy_sample(self: Collector, purpose: str, *rest: Any) -> Any:
        result = sample(self, purpose, *rest)
        if purpose == "probe":
            verdicts.append([verdict is Verdict.CORRECT for verdict in result[1]])
        return result

    def spy_allocate(self: GRPO, history: HistoryView, *rest: Any) -> Any:
        views.append(history)
        return allocate(self, history, *rest)

    monkeypatch.setattr(Collector, "_sample", spy_sample)
    monkeypatch.setattr(GRPO, "allocate", spy_allocate)
    train("grpo", budget=ROLLOUTS)
    probed = [view for view in views if view.probe_trials.any()]
    assert [np.reshape(v, (-1, 3)).sum(1).tolist() for v in verdicts] == [v.probe_successes.tolist() for v in probed]
    assert not views[-1].probe_trials.any()  # the end of the budget does without


@pytest.mark.parametrize("probe", [Probe(2), Probe(2, charged=False)])
def test_a_resumed_run_with_a_probe_equals_an_uninterrupted_one(
    train: Train, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: Probe
) -> None:
    probing(monkeypatch, probe)
    whole, resumed = train("grpo"), tmp_path / "resumed"
    answers = iter([False, True])
    with pytest.raises(Interrupted):
        run_cell(training.make_config(policy, "grpo"), resumed, should_stop=lambda: next(answers))
    assert {row["step"] for row in rows(resumed, "ledger.jsonl")} == {0}
    run_cell(training.make_config(policy, "grpo"), resumed)
    for name in training.DETERMINISTIC:
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    training.assert_same_weights(whole, resumed)
    first, second = (json.loads((out / "result.json").read_text()) for out in (whole, resumed))
    assert first["oracle"] == second["oracle"]
    assert first["drawn"] == second["drawn"]


# -- tables


def test_tables_show_probes_and_oracles_where_there_are_any(tmp_path: Path) -> None:
    arms = {"grpo": 0.0, "rloo": 0.0}
    made = synthetic.make_study(
        tmp_path / "made_up", synthetic.Recipe(arms=arms, seeds=(0, 1), items=4, points=2, steps=4)
    )
    before = Scores(load_study(made))
    assert "oracle_tokens" not in spend_table(before).data
    assert "probed" not in rollouts_table(before).data
    for seed in (0, 1):
        path = made / "cells" / f"rloo-s{seed}-0123abcd" / "result.json"
        result = json.loads(path.read_text())
        result["oracle"] = dict.fromkeys(CURRENCIES, 0) | {"rollouts": 10, "tokens_generated": 700 + 200 * seed}
        result["drawn"] |= {"trained": result["drawn"]["trained"] - 90, "probed": 90}
        result["seconds"]["oracle"] = 5.0
        path.write_text(json.dumps(result))
    scores = Scores(load_study(made))
    assert scores.study.problems == ()  # probed rollouts are drawn rollouts
    spend: Any = spend_table(scores)
    assert spend.data.set_index("arm")["oracle_tokens"].to_dict() == {"grpo": 0.0, "rloo": 800.0}
    assert any("Oracle" in note for note in spend.notes)
    assert rollouts_table(scores).data.set_index("arm")["probed"].to_dict() == {"grpo": 0.0, "rloo": 90.0}
    seconds: Any = seconds_table(scores).data.set_index("arm")
    assert seconds["training"]["rloo"] == seconds["training"]["grpo"] == pytest.approx(sum(synthetic.PHASES.values()))
    assert seconds["oracle"].to_dict() == {"grpo": 0.0, "rloo": 5.0}
