"""Whole runs with a tiny policy: determinism, resume, budgets, and the identities between arms."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmark import registry
from benchmark.collect import Collector
from benchmark.config import RunConfig
from benchmark.draws import Batch
from benchmark.jsonl import read_rows
from benchmark.ledger import CURRENCIES
from benchmark.run import Interrupted, measure_unit_prices, run_cell
from benchmark.verdict import Verdict
from benchmark.warmup import warm_up

DETERMINISTIC = ("ledger.jsonl", "metrics.jsonl", "evaluation.jsonl", "allocation.jsonl", "traces.jsonl")
FILTERING = ("dapo", "greso", "reinforce_ada", "gvm_raft")
PROBING = ("cures", "gradalign", "gvm", "gvm_raft")
MIX = [{"family": "chain_sum", "num_terms": [2, 2], "num_digits": [1, 1]}]


def make_config(policy: str | None, method: str, params: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    plain: dict[str, Any] = {
        "study": "test",
        "arm": method,
        "seed": 3,
        "scale": "test",
        "policy": {
            "path": policy,
            "architecture": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 64},
            "warmup": {"steps": 200, "batch": 64, "styles": {"direct": 1.0, "partial": 0.0, "full": 0.0}},
        },
        "task": {"name": "sums", "mix": MIX, "train_items": 24, "eval_items_per_family": 4},
        "rollout": {"prompts_per_batch": 8, "rollouts_per_prompt": 8, "max_tokens": 12},
        "optimiser": {"learning_rate": 0.003, "minibatches_per_batch": 2},
        "budget": {"currency": "tokens_generated", "amount": 2201},
        "evaluation": {"points": 3, "samples": 2, "final_samples": 2, "k": [1]},
        "method": {"name": method, "params": params or {}},
    }
    for key, value in changes.items():
        plain[key] = plain[key] | value if isinstance(value, dict) else value
    return RunConfig.model_validate(plain)


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy that answers some sums right, so that groups are mixed and advantages live."""
    folder = tmp_path_factory.mktemp("policy")
    made, _ = warm_up(make_config(None, "grpo"), lambda *_: None)
    made.save(folder)
    return str(folder)


@pytest.fixture
def train(policy: str, tmp_path: Path) -> Callable[..., Path]:
    """Run an arm to its end; returns the run's folder."""

    def run(method: str, params: dict[str, Any] | None = None, name: str = "", **changes: Any) -> Path:
        out = tmp_path / (name or method)
        run_cell(make_config(policy, method, params, **changes), out)
        return out

    return run


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "policy" / "model.safetensors")


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    found, _ = read_rows(out / name)
    return [dict(row) for row in found]


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def assert_trained(out: Path, policy: str) -> None:
    """The policy moved, and gradients came from mixed groups: an identity between idle runs would say nothing."""
    before = load_file(Path(policy) / "model.safetensors")
    after = weights(out)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert sum(row["metrics"].get("optim/gradient_norm", 0.0) > 0 for row in rows(out, "metrics.jsonl")) >= 2


def test_equal_runs_are_equal_bit_for_bit(train: Callable[..., Path], policy: str) -> None:
    first, second = train("dynamo", name="a"), train("dynamo", name="b")
    for name in DETERMINISTIC:
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert (first / name).stat().st_size > 0
    assert_same_weights(first, second)
    assert_trained(first, policy)


@pytest.mark.parametrize("amount", [100, 300, 2201])
def test_a_budget_that_ends_within_two_steps_is_priced_too(policy: str, amount: int) -> None:
    prices = measure_unit_prices(make_config(policy, "grpo", budget={"currency": "tokens_generated", "amount": amount}))
    assert prices["tokens_generated"] == 1
    assert prices["wall_seconds"] > 0
    assert prices["rollouts"] > 0


def test_another_seed_is_another_run(train: Callable[..., Path]) -> None:
    first, second = train("grpo", name="a"), train("grpo", name="b", seed=4)
    assert (first / "ledger.jsonl").read_bytes() != (second / "ledger.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arm", "steps"),
    [("dynamo", 1), ("dapo", 2), ("oblr_po", 1), ("vip", 1), ("gradalign", 1), ("greso", 2), ("reinforce_ada", 1)],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    train: Callable[..., Path], policy: str, tmp_path: Path, arm: str, steps: int
) -> None:
    whole, resumed = train(arm), tmp_path / "resumed"
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > steps

    with pytest.raises(Interrupted):
        run_cell(make_config(policy, arm), resumed, should_stop=stop)
    assert json.loads((resumed / "progress.json").read_text())["state"] == "interrupted"
    assert not (resumed / "result.json").exists()
    # What a killed process wrote after its last checkpoint must not survive.
    with (resumed / "ledger.jsonl").open("a") as file:
        file.write('{"row":99}\n{"to')
    run_cell(make_config(policy, arm), resumed)
    for name in DETERMINISTIC:
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    assert_same_weights(whole, resumed)
    assert not (resumed / "checkpoint").exists()


@pytest.mark.parametrize("currency", ["tokens_generated", "rollouts"])
@pytest.mark.parametrize("arm", registry.names())
def test_every_arm_spends_exactly_its_budget_and_accounts_for_all_of_it(
    train: Callable[..., Path], arm: str, currency: str
) -> None:
    amount = 1201 if currency == "tokens_generated" else 141
    out = train(arm, budget={"currency": currency, "amount": amount})
    result = json.loads((out / "result.json").read_text())
    assert result["spent"][currency] == amount
    assert result["overshoot"] == 0
    ledger = rows(out, "ledger.jsonl")
    training = [row for row in ledger if row["event"] not in ("evaluation", "oracle")]
    for name in CURRENCIES:
        assert sum(row[name] for row in training) == result["spent"][name]
    assert sum(result["drawn"].values()) == result["spent"]["rollouts"]
    for fate, count in result["drawn"].items():
        assert sum(row["rollouts"] for row in training if row["fate"] == fate) == count
    trained = sum(row["tokens_generated"] for row in training if row["fate"] == "trained")
    gradients = [row for row in training if row["event"] == "gradients"]
    assert bool(gradients) == (arm in PROBING)
    probed = sum(row["tokens_backpropagated"] for row in gradients)
    recalled = sum(row["tokens_scored"] for row in training if row["event"] == "recall")
    assert result["spent"]["tokens_backpropagated"] == trained + probed + recalled
    apart = result["evaluation_tokens"] + result["oracle"]["tokens_generated"]
    assert sum(row["tokens_generated"] for row in ledger) == amount + apart or currency == "rollouts"
    if arm in FILTERING:
        assert result["drawn"]["filtered"] > 0
    else:
        assert result["drawn"]["filtered"] == result["drawn"]["overflow"] == 0
    assert (result["drawn"]["probed"] > 0) == (arm in PROBING)
    points = rows(out, "evaluation.jsonl")
    assert points[0]["step"] == 0
    assert points[-1]["final"]
    assert points[-1]["cost"][currency] == amount
    drawn_per_step = {
        row["step"]: sum(int(n) * c for n, c in row["histogram"].items()) for row in rows(out, "allocation.jsonl")
    }
    assert sum(drawn_per_step.values()) == result["spent"]["rollouts"] - result["drawn"]["probed"]


IDENTITIES = {
    "dynamo with every switch off": (
        "dynamo",
        {"allocation": {"enabled": False}, "compensation": {"alpha": 0.0}, "stabilisation": {"floor": 1.0}},
    ),
    "gradient allocation switched off": (
        "dynamo_gradient",
        {"allocation": {"enabled": False}},
    ),
    "allocation with equal bounds": ("dynamo_allocation", {"allocation": {"n_low": 8, "n_high": 8}}),
    "dapo without its parts": (
        "dapo",
        {"filter_groups": False, "loss": {"clip_high": 0.2}, "overlong_factor": 0.0},
    ),
    "no entropy in the advantage": ("entropy_advantage", {"alpha": 0.0}),
    "every token is a fork": ("fork_tokens", {"fraction": 1.0}),
    "no entropy bonus": ("entropy_loss", {"loss": {"entropy_coefficient": 0.0}}),
    "oblr_po without its parts": ("oblr_po", {"baseline": False, "schedule": False}),
    "capo without thresholds": ("capo", {"low": None, "high": None, "kl": None}),
    "another surrogate than logits": ("lco", {"loss": {"surrogate": "clipped_ratio"}}),
    "equal clips": ("clip_higher", {"loss": {"clip_high": 0.2}}),
}


@pytest.mark.parametrize("case", IDENTITIES)
def test_an_arm_with_its_idea_off_is_grpo_bit_for_bit(train: Callable[..., Path], policy: str, case: str) -> None:
    method, params = IDENTITIES[case]
    # Whole groups only: the last, smaller group of a token budget makes equal prompt weights act (see below).
    budget = {"currency": "rollouts", "amount": 424}
    reference, other = train("grpo", budget=budget), train(method, params, name="other", budget=budget)
    assert_trained(reference, policy)
    assert_same_weights(reference, other)
    assert (reference / "ledger.jsonl").read_bytes() == (other / "ledger.jsonl").read_bytes()
    assert (reference / "evaluation.jsonl").read_bytes() == (other / "evaluation.jsonl").read_bytes()


@pytest.mark.parametrize("case", ["dynamo with every switch off", "allocation with equal bounds"])
def test_the_identity_holds_for_a_token_budget_until_groups_get_smaller_and_to_the_end_with_grpos_loss(
    train: Callable[..., Path], case: str
) -> None:
    method, params = IDENTITIES[case]
    reference = train("grpo")
    other = train(method, params | {"loss": {"prompt_weight": "rollouts"}}, name="other")
    assert_same_weights(reference, other)
    weighted = train(method, params, name="weighted")
    ragged = next(row["step"] for row in rows(reference, "allocation.jsonl") if set(row["histogram"]) != {"8"})
    assert ragged >= 3

    def until(out: Path) -> list[dict[str, Any]]:
        return [row for row in rows(out, "metrics.jsonl") if row["step"] < ragged]

    assert until(reference) == until(weighted)
    assert len(until(reference)) == ragged


@pytest.mark.parametrize(
    "arm",
    ["dr_grpo", "rloo", "w_reinforce", "dapo", "dynamo_modulation", "kl_cov", "fork_tokens", "oblr_po", "capo", "lco"],
)
def test_an_arm_with_its_idea_on_is_not_grpo(train: Callable[..., Path], arm: str) -> None:
    reference, other = weights(train("grpo")), weights(train(arm))
    assert any(not torch.equal(reference[key], other[key]) for key in reference)


def test_arms_share_their_first_rollouts_and_evaluation_streams(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[str, Batch] = {}
    collect = Collector.collect

    def spy(self: Collector, step: int) -> Batch:
        batch = collect(self, step)
        first.setdefault(type(self.method).__name__, batch)
        return batch

    monkeypatch.setattr(Collector, "collect", spy)
    outs = [train(arm, budget={"currency": "rollouts", "amount": 80}) for arm in ("grpo", "dr_grpo", "dynamo")]
    reference = first["GRPO"]
    for name in ("DrGRPO", "DynaMO"):  # an unseen prompt's allocation is uniform
        assert torch.equal(first[name].rollouts.tokens, reference.rollouts.tokens)
        assert torch.equal(first[name].rollouts.log_prob, reference.rollouts.log_prob)
        assert first[name].drawn[0].prompts == reference.drawn[0].prompts
    before = [[row for row in rows(out, "evaluation.jsonl") if row["point"] == 0] for out in outs]
    assert before[0] == before[1] == before[2]


def test_the_jth_rollout_of_a_prompt_is_the_same_whatever_its_group_size(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[int, Batch] = {}
    collect = Collector.collect

    def spy(self: Collector, step: int) -> Batch:
        batch = collect(self, step)
        first.setdefault(self.config.rollouts_per_prompt, batch)
        return batch

    monkeypatch.setattr(Collector, "collect", spy)
    small = {"prompts_per_batch": 4, "max_tokens": 12}
    once = {"currency": "rollouts", "amount": 20}
    train("grpo", name="a", rollout=small | {"rollouts_per_prompt": 3}, budget=once)
    train("grpo", name="b", rollout=small | {"rollouts_per_prompt": 5}, budget=once)
    three, five = first[3].rollouts.texts(), first[5].rollouts.texts()
    assert [three[3 * p + j] for p in range(4) for j in range(3)] == [
        five[5 * p + j] for p in range(4) for j in range(3)
    ]


def test_every_rollout_is_verified_and_remembered_under_its_own_prompt(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With uneven groups, where the released DynaMO code credits most rollouts to other prompts."""
    collect, uneven = Collector.collect, []

    def spy(self: Collector, step: int) -> Batch:
        before = self.history.counts.copy()
        batch = collect(self, step)
        right, made, surprise = torch.zeros(3, len(self.pool.items), dtype=torch.float64)
        for draw in batch.drawn:
            owners = [draw.prompts[p] for p in draw.rollouts.prompt.tolist()]
            assert owners == [p for p, n in zip(draw.prompts, draw.counts.tolist(), strict=True) for _ in range(n)]
            texts = self.policy.decode(draw.rollouts.texts())
            own = torch.split(draw.rollouts.log_prob.double(), draw.rollouts.length.tolist())
            for owner, text, verdict, log_prob in zip(owners, texts, draw.verdicts, own, strict=True):
                boxed = re.search(r"\\boxed\{(-?\d+)\}$", text)
                answers = boxed is not None and int(boxed[1]) == int(self.pool.items[owner].answer)
                assert (verdict is Verdict.CORRECT) == answers
                if not draw.cut:
                    right[owner] += verdict is Verdict.CORRECT
                    made[owner] += len(log_prob)
                    surprise[owner] -= log_prob.sum()
            uneven.append(len(set(draw.counts.tolist())) > 1)
        change = self.history.counts - before
        assert change[:, 0].tolist() == right.tolist()
        assert change[:, 2].tolist() == made.tolist()
        assert change[:, 3] == pytest.approx(surprise.numpy(), abs=1e-9)
        return batch

    monkeypatch.setattr(Collector, "collect", spy)
    train("dynamo_released")
    assert any(uneven)
