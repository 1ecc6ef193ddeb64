"""Experiments from neighbouring work: what their closed forms say, and what holds in expectation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.all_action import Tabular, decided_at_answer, guessing, last_digit_chance
from analysis.audit import audit
from analysis.experiment import KINDS, load, rebuild_experiment, run_experiment
from analysis.forgetting import Mean, Probe, only
from analysis.low_rank import shape_of
from analysis.variance_pool import Bench
from analysis.verifier_noise import compare, half_dead
from benchmark.compose import compose_run
from benchmark.draws import Pool
from benchmark.errors import InputError
from benchmark.policy import Policy, prepare_machine
from benchmark.pricing import ShapeConfig, attention_flops, low_rank_saving
from benchmark.problems import load_task
from benchmark.rollouts import Rollouts
from benchmark.scoring import states
from benchmark.verifier import Verifier
from benchmark.warmup import ensure_policy


def random_case(ways: int, answers: int) -> Tabular:
    rng = np.random.default_rng(ways)
    reward = (rng.random((ways, answers)) < 0.5).astype(float)
    return Tabular(rng.normal(size=ways), rng.normal(size=(ways, answers)), reward)


@pytest.mark.parametrize("rollouts", [2, 3])
@pytest.mark.parametrize("all_actions", [False, True])
def test_both_estimates_have_the_gradient_as_their_mean(rollouts: int, all_actions: bool) -> None:
    case = random_case(3, 2)
    mean, _ = case.moments(rollouts, all_actions=all_actions)
    np.testing.assert_allclose(mean, case.gradient, atol=1e-14)
    nudge, step = np.random.default_rng(0).normal(size=len(mean)), 1e-6

    def expected(t: float) -> float:
        moved = Tabular(case.prefix + t * nudge[:3], case.answer + t * nudge[3:].reshape(3, 2), case.reward)
        pi, mu = moved.probabilities
        return float(pi @ (mu * case.reward).sum(1))

    assert mean @ nudge == pytest.approx((expected(step) - expected(-step)) / (2 * step), rel=1e-6)


def test_a_bandit_by_hand() -> None:
    """One way, two answers, groups of 2: g is (e_0 - e_1) / 2 where they differ, so tr Cov = pq - 2 (pq)^2."""
    case = Tabular(np.zeros(1), np.log([[0.3, 0.7]]), np.array([[1.0, 0.0]]))
    pq = 0.3 * 0.7
    _, trace = case.moments(2, all_actions=False)
    assert trace == pytest.approx(pq - 2 * pq**2)
    assert case.moments(2, all_actions=True)[1] == pytest.approx(0, abs=1e-15)


def test_summing_answers_out_never_adds_variance_and_helps_while_answers_are_open() -> None:
    ratios = []
    for case in (random_case(2, 3), random_case(3, 3), *(guessing(nats, answers=3) for nats in (0.0, 2.0, 8.0))):
        ratios.append(case.moments(3, all_actions=True)[1] / case.moments(3, all_actions=False)[1])
    assert max(ratios) <= 1
    guess, open_, settled = ratios[2:]
    # Of a guess only the choice of the way is left; once the way settles the answer, nothing is taken out.
    assert guess < 0.2
    assert guess < open_ < settled
    assert settled > 0.99


def smoke_bench(each: int) -> tuple[Bench, Rollouts, torch.Tensor]:
    """Some rollouts of the smallest policy with whether they are right."""
    config = compose_run("grpo", scale="smoke")
    device = prepare_machine()
    policy = Policy.load(ensure_policy(config), device)
    train, _ = load_task(config.task)
    with Verifier(answer_form=config.task.answer_form) as verifier:
        pool = Pool.of(train, policy, 0, device)
        bench = Bench(policy, config.rollout, pool, verifier, list(range(12)), device)
        return bench, *bench.draw("test", 0, each)


@torch.no_grad()
def test_the_last_digit_by_scoring_one_rollout_at_a_time() -> None:
    """Every rollout alone through the network, its right answer written out and cut before the last digit."""
    bench, drawn, _ = smoke_bench(8)
    answers = [bench.pool.items[p].answer for p in bench.prompts]
    q = last_digit_chance(bench.policy, drawn, answers, 1.0)
    weights, pieces = bench.policy.fused(), bench.policy.pieces
    expected = []
    for ids, p in zip(drawn.texts(), drawn.prompt.tolist(), strict=True):
        before, boxed, written = "".join(pieces(ids)).rpartition("\\boxed{")
        if not boxed or not written.startswith(answers[p][:-1]) or len(written) < len(answers[p]):
            expected.append(0.0)
            continue
        prefix = bench.policy.tokenizer(before + boxed + answers[p], add_special_tokens=False)["input_ids"]
        one = Rollouts.none([bench.pool.tokens[bench.prompts[p]]])
        tokens = torch.tensor(prefix)
        row = replace(
            one,
            prompt=torch.tensor([0]),
            tokens=tokens,
            length=torch.tensor([len(prefix)]),
            log_prob=torch.zeros(len(prefix)),
            finished=torch.tensor([True]),
        )
        logits = (states(weights, row) @ weights.head.T)[-1]
        expected.append(float(torch.softmax(logits, -1)[tokens[-1]]))
    torch.testing.assert_close(q, torch.tensor(expected), atol=1e-5, rtol=1e-4)
    assert 0 < (q > 0).sum() < len(q)


def test_the_chance_of_the_last_digit_is_the_success_rate_in_expectation() -> None:
    bench, drawn, reward = smoke_bench(64)
    q = last_digit_chance(bench.policy, drawn, [bench.pool.items[p].answer for p in bench.prompts], 1.0)
    difference = q - reward
    assert float(difference.mean().abs()) < 4 * float(difference.std()) / len(q) ** 0.5
    # It knows more than the prompt and less than the outcome.
    assert float((q - q.round()).abs().max()) > 0.1


def test_a_vocabulary_without_digits_of_their_own_is_refused() -> None:
    config = compose_run("grpo", scale="smoke", options=["policy.path=somewhere"])
    with pytest.raises(InputError, match="no tokens of their own"):
        decided_at_answer(config, 2, 2)


# -- low-rank attention in the cost model


def test_attention_by_counting_its_products() -> None:
    """Per layer and head: a query meets every key (head size products), its weights meet every value; 2 FLOPs each."""
    shape = ShapeConfig(hidden_size=12, layers=5, heads=3, kv_heads=1, mlp=7, vocabulary=11)
    products = sum(4 + 4 for _layer in range(5) for _head in range(3) for _token in range(9))
    assert attention_flops(shape, 9) == 2 * products
    assert attention_flops(shape, 9, ranks=[3] * 5) == 2 * products / 3
    assert attention_flops(shape, 9, ranks=[9, 9, 9, 9, 100]) == attention_flops(shape, 9)
    assert attention_flops(shape, 9, ranks=[9, 9, 9, 9, 3]) == 2 * products * (4 + 1 / 3) / 5
    with pytest.raises(ValueError, match="5 layers"):
        attention_flops(shape, 9, ranks=[1])


def test_low_rank_saves_what_attention_costs_at_most() -> None:
    shape = ShapeConfig(hidden_size=12, layers=5, heads=3, kv_heads=1, mlp=7, vocabulary=11)
    full = 2 * shape.multiplied + attention_flops(shape, 90)
    assert low_rank_saving(shape, 90, 9) == pytest.approx(0.9 * attention_flops(shape, 90) / full)
    assert low_rank_saving(shape, 9, 9) == 0
    # Long contexts of a wide model: 4 L d c against 2 N, so the share goes to 1 with c.
    assert low_rank_saving(shape, 10**9, 1) == pytest.approx(1, abs=1e-5)


def test_shapes_are_those_of_the_scales() -> None:
    assert shape_of("small").hidden_size == 128
    assert [shape_of(f"paper-{size}").layers for size in ("1.5b", "7b", "14b")] == [28, 28, 48]
    with pytest.raises(InputError, match="shape of its policy"):
        shape_of("cpu-llm")


# -- an EMA of the weights


def test_the_mean_forgets_its_start_by_its_decay() -> None:
    mean = Mean({"w": torch.tensor([8.0])}, decay=0.5)
    for value in (0.0, 4.0):
        mean.update({"w": torch.tensor([value])})
    assert mean.weights["w"].tolist() == [4.0]  # (8 / 2 + 0 / 2) / 2 + 4 / 2


def test_one_family_trains_and_all_are_evaluated() -> None:
    config = compose_run("grpo", scale="smoke")
    train, held_out = load_task(only(config, "sum_long", "policy").task)
    assert {item.family for item in train} == {"sum_long"}
    assert {item.family for item in held_out} == set(config.task.families)
    assert len(train) == config.task.train_items
    # The same problems as in the mixed run, whatever the training family.
    assert [item.id for item in held_out] == [item.id for item in load_task(config.task)[1]]


@pytest.mark.slow
def test_a_whole_probe_says_every_moment_and_family() -> None:
    config = compose_run("grpo", scale="smoke", options=["budget.amount=6000"])
    told: list[float] = []
    probe = Probe(config, [0.0, 1.0], samples=2, tell=told.append)
    rows = probe.run("sum_long", "products")
    table = {(moment, family): value for moment, family, value in rows}
    assert len(table) == 5 * 4
    for family in config.task.families:
        # A mean that keeps nothing is the policy itself; one that keeps everything is where the phase began.
        assert table["then products, EMA 0", family] == table["then products", family]
        assert table["then products, EMA 1", family] == table["after sum_long", family]
    assert told == sorted(told)
    assert told[-1] == 2 * 6000
    # Five evaluations of every problem, beside what both phases draw.
    assert probe.spent["rollouts"] > 5 * 2 * len(load_task(config.task)[1])
    assert probe.spent["tokens_generated"] > 2 * 6000


# -- a verifier that errs


def test_label_noise_feeds_dead_prompts() -> None:
    """Two dead prompts, two at 1/2, e = .1: deviations .3 and .5, so 3 of 8 rollouts go to what teaches nothing."""
    p = np.array([0.0, 1.0, 0.5, 0.5])
    found = compare(p, 0.1)
    variances = np.array([0.09, 0.09, 0.25, 0.25])
    assert found["uniform"] == (0.5, 1.0)
    share, noise = found["standard deviation"]
    assert share == pytest.approx(3 / 8)
    assert noise == pytest.approx(np.sqrt(variances).sum() ** 2 / (4 * variances.sum()))
    assert found["variance"][0] == pytest.approx(0.09 / 0.34)
    # Of the oracle's sum only the living are left: (2 x .5)^2 over 4 x .68.
    assert found["oracle"] == pytest.approx((0.0, 1 / (4 * 0.68)))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.floats(0.01, 0.4))
def test_the_released_rule_gains_nothing_once_no_prompt_looks_dead(rates: list[float], flip_rate: float) -> None:
    found = compare(np.array([*rates, 0.3]), flip_rate)
    assert found["variance"][1] == pytest.approx(1.0)
    assert found["oracle"][1] <= found["standard deviation"][1] + 1e-12 <= 1 + 2e-12


def test_without_noise_neyman_is_the_oracle() -> None:
    found = compare(half_dead(), 0.0)
    assert found["standard deviation"] == found["oracle"]
    assert found["oracle"][0] == 0.0


# -- experiments as files and folders


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_shipped_file(kind: str) -> None:
    experiment = load(kind)
    assert experiment.experiment == kind
    assert experiment.parts()
    assert experiment.differs


def test_mistakes_in_a_file_name_key_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="forgetting"):
        load("forgeting")
    path = tmp_path / "mine.yaml"
    path.write_text("experiment: forgeting\n")
    with pytest.raises(InputError, match=r"mine\.yaml.*Did you mean 'forgetting'"):
        load(str(path))
    with pytest.raises(InputError, match="rank"):
        load("low_rank", ["rank=0"])
    config = compose_run("grpo", scale="smoke")
    with pytest.raises(InputError, match=r"second.*Did you mean 'products'"):
        Probe(config, []).run("sum_long", "product")


def test_parts_are_measured_once_and_reports_follow_from_them(tmp_path: Path) -> None:
    """Settings that decide a part make a new one; seeds add parts; a changed part shows in the audit."""
    options = ["scale=smoke", "prompts=4", "rollouts_per_prompt=4", "sharpness=[0.0]", "seeds=[0]"]
    out = tmp_path / "all action"
    report = run_experiment(load("all_action", options), out)
    first = {path.name: path.read_bytes() for path in (out / "parts").iterdir()}
    assert len(first) == 2
    assert "16 rollouts" in report.read_text()
    run_experiment(load("all_action", [*options[:-1], "seeds=[0,1]"]), out)
    again = {path.name: path.read_bytes() for path in (out / "parts").iterdir()}
    assert len(again) == 3
    assert first.items() <= again.items()
    assert "--set seeds='[0, 1]'" in report.read_text()
    assert not audit(out).wrong
    elsewhere = tmp_path / "elsewhere"
    assert rebuild_experiment(out, elsewhere).read_bytes() == report.read_bytes()
    table = out / "tables" / "all_action_policy.csv"
    table.write_text(table.read_text().replace("0,", "7,", 1))
    assert any("all_action_policy.csv" in line for line in audit(out).wrong)
    with pytest.raises(InputError, match="holds the experiment all_action"):
        run_experiment(load("low_rank"), out)
    for path in (out / "parts").glob("policy_seed_1*"):
        path.unlink()
    with pytest.raises(InputError, match="not measured"):
        rebuild_experiment(out)
    run_experiment(load("all_action", [*options[:-1], "seeds=[0,1]"]), out)
    assert not audit(out).wrong


def test_closed_forms_reach_their_reports(tmp_path: Path) -> None:
    """What a reader sees in the table is what the closed form says, and what is found speaks of the same numbers."""
    report = run_experiment(load("label_noise", ["flip_rates=[0.1]"]), tmp_path / "noise").read_text()
    share, noise = compare(half_dead(), 0.1)["standard deviation"]
    assert f"{100 * share:.1f} % / {noise:.3f}" in report
    assert f"by the standard deviation: {100 * (1 - noise):.1f} % at 0.1." in report
    report = run_experiment(load("low_rank", ["scales=[small]", "contexts=[1024]"]), tmp_path / "rank").read_text()
    shape = shape_of("small")
    attention = attention_flops(shape, 1024)
    share = attention / (2 * shape.multiplied + attention)
    saved = low_rank_saving(shape, 1024, 64)
    assert f"| small | {100 * share:.1f} % / {100 * saved:.1f} % |" in report
    assert f"small: at most {100 * saved:.1f} % at 1,024 tokens" in report


def test_what_forgetting_finds_is_paired_by_seed() -> None:
    """The first family falls by 10 points with one seed and rises by 2 with the other; the second gains 20 in both."""
    experiment = load("forgetting", ["seeds=[0,1]", "decays=[]"])
    after = {"seed_0": {"sum_long": (0.5, 0.4), "products": (0.3, 0.5)}, "seed_1": {"sum_long": (0.4, 0.42)}}
    after["seed_1"]["products"] = (0.2, 0.4)
    rows = [
        {"part": part, "moment": moment, "family": family, "pass_at_1": values[place]}
        for part, found in after.items()
        for place, moment in ((0, "before"), (0, "after sum_long"), (1, "then products"))
        for family, values in found.items()
    ]
    lines = experiment.findings(pd.DataFrame(rows))
    found = lines[0].replace("\N{MINUS SIGN}", "-")
    assert "-4.0 (-10.0 to +2.0) on sum_long, +20.0 (+20.0 to +20.0) on products" in found
    (table,) = experiment.tables(pd.DataFrame(rows))
    assert [cell.text for cell in table.rows[-1][:2]] == ["then products", "41.0 (40.0 to 42.0)"]
