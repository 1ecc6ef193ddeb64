"""Replay of recorded counts: formulas against loops, causality, choice on held-out prompts, allocators, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from analysis.replay_allocators import replay, views
from analysis.replay_log import CountLog, load_counts
from analysis.replay_predictors import (
    Rule,
    beta,
    calibration,
    choose,
    halves,
    noise_floor,
    pool_mean,
    predictors,
    squared_error,
)
from benchmark.cli import app
from benchmark.errors import InputError
from benchmark.history import PromptHistory

N = 8


def simulate(prompts: int = 80, visits: int = 12, seed: int = 0, dead: float = 0.5) -> CountLog:
    """Prompts of constant success rates, a share of them dead; every fourth leaves two visits early."""
    rng = np.random.default_rng(seed)
    p = np.where(rng.random(prompts) < dead, 0.0, rng.random(prompts))
    correct = rng.binomial(N, p[:, None], size=(prompts, visits))
    trials = np.full_like(correct, N)
    correct[::4, -2:], trials[::4, -2:] = 0, 0
    return CountLog(tuple(f"p{i}" for i in range(prompts)), correct, trials)


def write(path: Path, log: CountLog) -> Path:
    rows = [
        {"id": name, "n_rollouts": N, "correct": c[n > 0].tolist()}
        for name, c, n in zip(log.ids, log.correct, log.trials, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_log_is_read_back_with_its_short_rows(tmp_path: Path) -> None:
    log = simulate()
    read = load_counts(write(tmp_path / "counts.jsonl", log))
    assert read.ids == log.ids
    assert (read.correct == log.correct).all()
    assert (read.trials == log.trials).all()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1, 2]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"id": "x", "correct": [1]}', "n_rollouts: is missing"),
        ('{"id": "x", "n_rollouts": 8, "correct": [1, 9]}', r"correct = 9: is not a whole number from 0 to 8"),
        ('{"id": "x", "n_rollouts": 1, "correct": [1]}', "at least 2 rollouts"),
        ('{"id": "x", "n_rollouts": [8], "correct": [1, 2]}', "1 entries for 2 visits"),
        ('{"id": "p0", "n_rollouts": 8, "correct": [1, 2]}', "comes twice"),
        ('{"id": "x", "n_rollouts": 8, "correct": [true]}', "correct = True"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path / "counts.jsonl", simulate(3))
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=said) as caught:
        load_counts(path)
    assert caught.value.line == 4


def test_one_visit_is_not_enough(tmp_path: Path) -> None:
    path = tmp_path / "counts.jsonl"
    path.write_text('{"id": 1, "n_rollouts": 8, "correct": [3]}\n', encoding="utf-8")
    with pytest.raises(InputError, match="second visit"):
        load_counts(path)


@settings(max_examples=25)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.5, 1.0, 4.0, None]),
    st.tuples(st.floats(0.1, 4), st.floats(0.1, 4)),
)
def test_the_score_is_the_mean_over_rollouts_one_by_one(
    seed: int, half_life: float | None, prior: tuple[float, float]
) -> None:
    log = simulate(6, 5, seed)
    found = squared_error(log, beta(log, Rule(prior, half_life)))
    keep = 1.0 if half_life is None else 0.5 ** (1 / half_life)
    for i in range(6):
        S = R = 0.0
        for t in range(5):
            c, n = int(log.correct[i, t]), int(log.trials[i, t])
            p_hat = (prior[0] + S) / (sum(prior) + R)
            rollouts = [1.0] * c + [0.0] * (n - c)
            expected = np.mean([(r - p_hat) ** 2 for r in rollouts]) if n and t else 0.0
            assert found[i, t] == pytest.approx(expected, abs=1e-12)
            S, R = keep * S + c, keep * R + n


def test_predictions_do_not_see_the_visit_they_predict() -> None:
    log = simulate()
    later = CountLog(log.ids, log.correct.copy(), log.trials)
    later.correct[:, 6:] = N - later.correct[:, 6:]
    for rule in (Rule((1.0, 1.0), 4.0), Rule((0.5, 0.5), None, follows_pool=True)):
        assert (beta(log, rule)[:, :7] == beta(later, rule)[:, :7]).all()
        assert (beta(log, rule)[:, 7:] != beta(later, rule)[:, 7:]).any()
    assert (pool_mean(log)[:7] == pool_mean(later)[:7]).all()


def test_the_floor_is_the_score_of_the_true_rates() -> None:
    rng = np.random.default_rng(5)
    p = rng.random(4000)
    correct = rng.binomial(N, p[:, None], size=(4000, 10))
    log = CountLog(tuple(map(str, range(4000))), correct, np.full_like(correct, N))
    true = squared_error(log, np.broadcast_to(p[:, None], correct.shape))[:, 1:].mean()
    assert noise_floor(log) == pytest.approx(true, abs=2e-3)
    assert noise_floor(log) == pytest.approx((p * (1 - p)).mean(), abs=2e-3)


def test_steady_prompts_are_best_remembered_forever_and_drifting_ones_are_not() -> None:
    rules = [Rule((1.0, 1.0), half_life) for half_life in (1.0, 4.0, None)]
    assert choose(simulate(200, 20), rules)[0].half_life is None
    rng = np.random.default_rng(1)
    p = 0.5 + 0.45 * np.sin(np.linspace(0, 12, 30) + rng.uniform(0, 6, size=(200, 1)))
    correct = rng.binomial(N, p)
    drifting = CountLog(tuple(map(str, range(200))), correct, np.full_like(correct, N))
    assert choose(drifting, rules)[0].half_life == 1.0


def test_a_prompt_is_scored_by_the_choice_of_the_other_half() -> None:
    log = simulate()
    rules = [Rule((0.2, 1.0), 1.0), Rule((1.0, 0.2), None)]
    half = halves(log)
    assert set(half.tolist()) == {0, 1}
    _, best, held_out = choose(log, rules)
    for part in (0, 1):
        assert (held_out[half == part] == beta(log, best[1 - part])[half == part]).all()


def test_calibration_by_hand() -> None:
    log = CountLog(("a", "b"), np.array([[0, 4], [0, 1]]), np.array([[8, 8], [8, 8]]))
    table = calibration(log, np.array([[0.5, 0.31], [0.5, 0.39]]))
    assert table == [{"predicted": pytest.approx(0.35), "observed": pytest.approx(5 / 16), "rollouts": 16.0}]


def test_predictors_are_ordered_as_theory_says() -> None:
    found = {row.name: row for row in predictors(simulate(300, 15))}
    score = {name: row.brier for name, row in found.items()}
    assert score["fitted"] <= score["cumulative_beta"] < score["default"] < score["pool"] < score["constant"] == 0.25
    assert found["default"].difference == 0
    assert found["pool"].difference_low > 0
    assert found["fitted"].low < found["fitted"].brier < found["fitted"].high


def test_allocators_see_what_a_run_would_have_remembered() -> None:
    log = simulate()
    history = PromptHistory(len(log.ids), half_life=3.0)
    for visit, (rows, seen) in enumerate(views(log, 3.0), start=1):
        before = log.seen[:, visit - 1]
        counts = (log.correct[before, visit - 1].astype(float), log.trials[before, visit - 1].astype(float))
        history.record(np.flatnonzero(before).tolist(), *counts)
        history.record_step(*counts)
        expected = history.view(rows.tolist())
        assert seen.successes == pytest.approx(expected.successes)
        assert seen.trials == pytest.approx(expected.trials)
        assert (seen.last_successes == expected.last_successes).all()
        assert (seen.visits == expected.visits).all()
        np.testing.assert_array_equal(seen.batches, expected.batches)


def test_neyman_gains_on_dead_prompts_and_uniform_is_one() -> None:
    found = {
        row.name: row for row in replay(simulate(200, 12), ("grpo", "dynamo_allocation"), Rule((0.5, 0.5), None), 8)
    }
    assert found["grpo"].variance_ratio == found["grpo"].low == found["grpo"].high == 1
    assert found["grpo"].least == found["grpo"].most == 8
    assert found["dynamo_allocation"].high < 0.9
    assert found["neyman_fitted"].variance_ratio < found["dynamo_allocation"].variance_ratio
    assert found["dynamo_allocation"].decided_share < found["grpo"].decided_share


def test_an_arm_that_samples_first_is_refused() -> None:
    with pytest.raises(InputError, match="samples before it allocates"):
        replay(simulate(8, 3), ("control_oracle_allocation",), Rule((1.0, 1.0), None), 8)


def test_the_command_writes_its_contract(tmp_path: Path) -> None:
    path = write(tmp_path / "counts.jsonl", simulate(40, 5))
    out, folder = tmp_path / "out.json", tmp_path / "report"
    result = CliRunner().invoke(
        app, ["replay", str(path), "--json", str(out), "--out", str(folder), "--arm", "dynamo_released"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert {"name", "brier"} <= set(found["predictors"][0])
    assert [row["name"] for row in found["allocators"]] == ["dynamo_released", "neyman_fitted", "hindsight"]
    assert found["log"]["prompts"] == 40
    assert {"default", "fitted"} <= {row["name"] for row in found["predictors"]}
    report = (folder / "REPORT.md").read_text(encoding="utf-8")
    for name in ("calibration", "allocators", "success_rate"):
        assert f"figures/{name}.png" in report
        assert (folder / "figures" / f"{name}.pdf").stat().st_size > 1000
    assert (folder / "tables" / "predictors.tex").exists()
    wrong = CliRunner().invoke(app, ["replay", str(path), "--arm", "dynamo_alocation"])
    assert wrong.exit_code == 2
    assert "dynamo_allocation" in wrong.output
