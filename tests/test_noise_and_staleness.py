"""A verifier that errs, and rollouts of an older policy: what is drawn, what is shared, what outlives a stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmark import registry, streams
from benchmark.collect import Collector
from benchmark.config import ArchitectureConfig, RunConfig, VerifierConfig
from benchmark.draws import Batch
from benchmark.errors import InputError
from benchmark.jsonl import read_rows
from benchmark.policy import Policy
from benchmark.run import Interrupted, run_cell
from benchmark.staleness import Past
from benchmark.verdict import Verdict, flipped
from benchmark.warmup import new_policy
from methods.allocation import min_variance_allocation

Weights = dict[str, Tensor]
PLAIN: dict[str, Any] = {
    "study": "test",
    "arm": "arm",
    "seed": 3,
    "scale": "test",
    "task": {
        "name": "sums",
        "mix": [{"family": "chain_sum", "num_terms": [2, 2], "num_digits": [1, 1]}],
        "train_items": 24,
        "eval_items_per_family": 4,
    },
    "rollout": {"prompts_per_batch": 8, "rollouts_per_prompt": 4, "max_tokens": 8},
    "optimiser": {"learning_rate": 0.01, "minibatches_per_batch": 2},
    "budget": {"currency": "rollouts", "amount": 160},
    "evaluation": {"points": 2, "samples": 2, "final_samples": 2, "k": [1]},
}


def small() -> Policy:
    return new_policy(ArchitectureConfig(hidden_size=16, layers=1, heads=2, kv_heads=1, mlp=24), seed=0)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained policy: it guesses, so that a noisy verdict is what there is to learn from."""
    folder = tmp_path_factory.mktemp("policy")
    small().save(folder)
    return str(folder)


def config(path: str | None, method: str, **changes: Any) -> dict[str, Any]:
    plain = {**PLAIN, "policy": {"path": path}, "method": {"name": method}}
    return plain | {key: {**plain.get(key, {}), **value} for key, value in changes.items()}


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Weights, Batch]]:
    """Of every step: the weights that sampled, and the batch."""
    seen: list[tuple[Weights, Batch]] = []
    collect = Collector.collect

    def spy(self: Collector, step: int) -> Batch:
        weights = {name: value.detach().clone() for name, value in self.policy.parameters().items()}
        seen.append((weights, collect(self, step)))
        return seen[-1][1]

    monkeypatch.setattr(Collector, "collect", spy)
    return seen


def run(plain: dict[str, Any], folder: Path, stop: Callable[[], bool] = lambda: False) -> Path:
    run_cell(RunConfig.model_validate(plain), folder, progress=lambda _: None, should_stop=stop)
    return folder


# -- the verifier


def test_a_verdict_is_flipped_to_its_opposite() -> None:
    verdicts = [Verdict.CORRECT, Verdict.WRONG, Verdict.TRUNCATED, Verdict.CORRECT]
    assert flipped(verdicts, [True, True, True, False]) == [
        Verdict.WRONG,
        Verdict.CORRECT,
        Verdict.CORRECT,
        Verdict.CORRECT,
    ]


def test_where_nothing_is_asked_for_identity_and_file_are_those_of_a_run_without_the_key() -> None:
    plain = RunConfig.model_validate(config("p", "grpo"))
    off = RunConfig.model_validate(config("p", "grpo", verifier={"flip_rate": 0.0}, rollout={"staleness": 0}))
    assert "verifier" not in plain.model_dump(mode="json")
    assert "staleness" not in plain.model_dump(mode="json")["rollout"]
    assert off.run_hash == plain.run_hash
    changed = [config("p", "grpo", verifier={"flip_rate": 0.1}), config("p", "grpo", rollout={"staleness": 1})]
    hashes = {RunConfig.model_validate(other).run_hash for other in changed}
    assert len(hashes | {plain.run_hash}) == 3
    again = RunConfig.model_validate(RunConfig.model_validate(changed[0]).model_dump(mode="json"))
    assert again.verifier == VerifierConfig(flip_rate=0.1)


def test_a_rate_of_one_turns_every_training_verdict_and_no_evaluation(
    policy: str, tmp_path: Path, draws: list[tuple[Weights, Batch]]
) -> None:
    run(config(policy, "grpo"), tmp_path / "true")
    honest = draws[0][1].drawn[0].verdicts
    draws.clear()
    run(config(policy, "grpo", verifier={"flip_rate": 1.0}), tmp_path / "false")
    assert [v is Verdict.CORRECT for v in draws[0][1].drawn[0].verdicts] == [v is not Verdict.CORRECT for v in honest]
    before = [
        [(row["item"], row["c"]) for row in read_rows(tmp_path / name / "evaluation.jsonl")[0] if row["point"] == 0]
        for name in ("true", "false")
    ]
    assert before[0] == before[1]


def test_all_arms_meet_the_same_errors(policy: str, tmp_path: Path, draws: list[tuple[Weights, Batch]]) -> None:
    """Rollout j of a prompt is flipped or not, however many rollouts the arm gives the prompt."""
    for arm, per_prompt in (("grpo", 4), ("gvm", 6)):
        noisy = config(policy, arm, verifier={"flip_rate": 0.4}, rollout={"rollouts_per_prompt": per_prompt})
        run(noisy | {"budget": {"currency": "rollouts", "amount": 160}}, tmp_path / arm)
    first = {}
    for _, batch in draws:
        draw = batch.drawn[0]
        place = dict.fromkeys(range(len(draw.prompts)), 0)
        table = {}
        for row, p in enumerate(draw.rollouts.prompt.tolist()):
            table[draw.prompts[p], place[p]] = draw.verdicts[row]
            place[p] += 1
        first.setdefault(draw.counts.sum() // len(draw.counts), table)
    four, six = first[4], first[6]
    both = [key for key in four if key in six]
    assert len(both) > 8
    assert all(four[key] is six[key] for key in both)


def test_dead_prompts_show_a_variance_and_get_a_share() -> None:
    """p becomes p (1 - 2 e) + e: a dead prompt shows variance e (1 - e), and Neyman's rule pays for it."""
    e, p = 0.1, np.array([0.0, 0.0, 0.5, 1.0])
    shown = p * (1 - 2 * e) + e
    flips = streams.uniforms(np.full(40_000, 7, dtype=np.uint64), np.arange(40_000), 1)[:, 0] < e
    for true, expected in ((Verdict.WRONG, shown[0]), (Verdict.CORRECT, shown[3])):
        seen = [verdict is Verdict.CORRECT for verdict in flipped([true] * len(flips), flips.tolist())]
        assert np.mean(seen) == pytest.approx(expected, abs=4 * np.sqrt(e * (1 - e) / len(flips)))
    variance = shown * (1 - shown)
    np.testing.assert_allclose(variance, [0.09, 0.09, 0.25, 0.09])
    # Standard deviations .3, .3, .5, .3 share 28 rollouts as 6, 6, 10, 6: nearly two thirds go to dead prompts.
    assert min_variance_allocation(np.sqrt(variance), 28, 0, 28).tolist() == [6, 6, 10, 6]
    assert min_variance_allocation(np.sqrt(p * (1 - p)), 28, 0, 28).tolist() == [0, 0, 28, 0]


# -- stale rollouts


@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_samples_from_the_weights_of_so_many_steps_ago(
    policy: str,
    tmp_path: Path,
    draws: list[tuple[Weights, Batch]],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    begun: list[Weights] = []
    advance = Past.advance

    def spy(self: Past, policy: Any) -> None:
        begun.append({name: value.detach().clone() for name, value in policy.parameters().items()})
        advance(self, policy)

    monkeypatch.setattr(Past, "advance", spy)
    noisy = config(policy, "grpo", rollout={"staleness": steps}, verifier={"flip_rate": 0.3})
    run(noisy | {"optimiser": {"learning_rate": 0.01, "minibatches_per_batch": 1}}, tmp_path / "run")
    assert len(draws) >= 4
    assert not all(torch.equal(begun[0][name], begun[-1][name]) for name in begun[0])
    for step, (sampled, _) in enumerate(draws):
        wanted = begun[max(0, step - steps)]
        assert all(torch.equal(sampled[name], wanted[name]) for name in wanted)
    # With one update a batch, ratios leave 1 only because the rollouts are stale.
    ratios = [row["metrics"]["policy/ratio_max"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")[0]]
    assert ratios[0] == pytest.approx(1, abs=1e-4)
    assert max(ratios[2:]) > 1.001


@pytest.mark.parametrize("arm", ["grpo", "lco"])
def test_an_interrupted_run_goes_on_with_the_same_old_weights(policy: str, tmp_path: Path, arm: str) -> None:
    """The output layer of the policy that sampled, which `lco` reads, is the old one too."""
    plain = config(policy, arm, rollout={"staleness": 2}, verifier={"flip_rate": 0.3})
    whole, broken = run(plain, tmp_path / "whole"), tmp_path / "broken"
    for after in (1, 1, 2):
        calls = iter(range(1, 99))
        with pytest.raises(Interrupted):
            run(plain, broken, lambda calls=calls, after=after: next(calls) > after)
    run(plain, broken)
    for name in ("ledger.jsonl", "metrics.jsonl", "evaluation.jsonl", "allocation.jsonl"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_the_sampling_policy_leaves_no_trace() -> None:
    made = small()
    past = Past(1)
    past.advance(made)
    old = {name: value.detach().clone() for name, value in made.parameters().items()}
    with torch.no_grad():
        for value in made.parameters().values():
            value.add_(1.0)
    past.advance(made)
    with past.sampling(made):
        assert all(torch.equal(value, old[name]) for name, value in made.parameters().items())
    assert all(torch.equal(value, old[name] + 1.0) for name, value in made.parameters().items())
    again = Past(1)
    again.restore({**past.state(), "counts": torch.zeros(2)}, made)
    assert [sorted(kept) for kept in again.queue] == [sorted(kept) for kept in past.queue]


@pytest.mark.parametrize("backend", [{"name": "transformers"}, {"name": "vllm"}])
def test_who_cannot_sample_from_the_past_says_so(policy: str, backend: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"the {backend['name']} backend samples from the newest policy"):
        RunConfig.model_validate(config(policy, "grpo", rollout={"staleness": 1}, backend=backend))


@pytest.mark.parametrize("changes", [{"rollout": {"staleness": 1}}, {"verifier": {"flip_rate": 0.1}}])
def test_trl_refuses_what_it_would_leave_out(policy: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert registry.load("trl_grpo").engine.startswith("benchmark.engine_trl")
    with pytest.raises(InputError, match="TRL's trainer does not know it"):
        run(config(policy, "trl_grpo", **changes), tmp_path)
