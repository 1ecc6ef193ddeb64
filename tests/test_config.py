"""The schema: types, ranges and combinations it refuses, and what makes up a run's identity."""

from __future__ import annotations

import copy
import json
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmark import config as schema
from benchmark import ledger
from benchmark.config import RunConfig, StudyConfig, canonical, digest

RUN: dict[str, Any] = {
    "study": "s",
    "arm": "grpo",
    "seed": 0,
    "scale": "small",
    "task": {"name": "sums", "mix": [{"family": "chain_sum", "num_terms": [2, 3]}]},
    "budget": {"amount": 100_000},
    "method": {"name": "grpo"},
}
STUDY: dict[str, Any] = {"study": "s", "question": "?", "arms": ["grpo", "rloo"], "seeds": 3}


def changed(path: str, value: Any, base: dict[str, Any] = RUN) -> dict[str, Any]:
    """`base` with the value at a dotted path replaced."""
    tree = copy.deepcopy(base)
    *parents, last = path.split(".")
    node: Any = tree
    for part in parents:
        node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
    node[last] = value
    return tree


def run(path: str = "seed", value: Any = 0) -> RunConfig:
    return RunConfig.model_validate(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        ("rollout.temperature", 0.0, "rollout.temperature"),
        ("evaluation.temperature", -1.0, "evaluation.temperature"),
        ("rollout.rollouts_per_prompt", 0, "rollout.rollouts_per_prompt"),
        ("rollout.rollouts_per_prompt", "8", "rollout.rollouts_per_prompt"),
        ("rollout.rollouts_per_prompt", True, "rollout.rollouts_per_prompt"),
        ("rollout.rollouts_per_prompt", 8.5, "rollout.rollouts_per_prompt"),
        ("rollout.rollouts", 8, "rollout.rollouts"),
        ("optimiser.learning_rate", float("inf"), "optimiser.learning_rate"),
        ("optimiser.learning_rate", float("nan"), "optimiser.learning_rate"),
        ("seed", -1, "seed"),
        ("arm", "../up", "arm"),
        ("budget.currency", "device_seconds", "budget.currency"),
        ("task.mix.0.num_terms", [2], "task.mix.0.num_terms.1"),
    ],
)
def test_a_wrong_value_is_named_by_its_place(path: str, value: Any, place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        run(path, value)
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == place


@pytest.mark.parametrize(
    ("path", "bad", "good", "key"),
    [
        ("optimiser.minibatches_per_batch", 65, 64, "optimiser.minibatches_per_batch"),
        ("evaluation.final_samples", 63, 64, "final_samples"),
        ("evaluation.k", [1, 33], [1, 32], "final_samples"),
        ("evaluation.k", [8, 1], [1, 8], "k"),
        ("budget.amount", 8 * 48 - 1, 8 * 48, "budget.amount"),
        (
            "budget",
            {"currency": "rollouts", "amount": 7},
            {"currency": "rollouts", "amount": 8},
            "budget.amount",
        ),
        ("task.train_items", 63, 64, "rollout.prompts_per_batch"),
        ("policy.architecture.heads", 3, 2, "heads"),
        ("policy.architecture.kv_heads", 3, 2, "kv_heads"),
        ("policy.warmup.styles.full", 0.5, 0.45, "full"),
        ("task.mix.0.num_terms", [3, 2], [3, 3], "num_terms"),
        ("task.train_file", "a.jsonl", None, "mix"),
    ],
)
def test_values_that_clash_are_refused_with_a_remedy(path: str, bad: Any, good: Any, key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        run(path, bad)
    context = caught.value.errors()[0]["ctx"]
    assert context["key"] == key
    assert context["remedy"]
    run(path, good)


def test_two_components_need_two_names() -> None:
    part = {"family": "chain_sum"}
    with pytest.raises(ValidationError, match="two components"):
        run("task.mix", [part, part])
    named = run("task.mix", [part, {**part, "name": "other"}])
    assert named.task.families == ("chain_sum", "other")


def test_a_task_is_generated_or_read_from_files() -> None:
    files = {
        "name": "maths",
        "train_file": "train.jsonl",
        "eval_files": {"aime": "a.jsonl", "amc": "b.jsonl"},
    }
    assert run("task", files).task.families == ("aime", "amc")
    with pytest.raises(ValidationError):
        run("task", {"name": "maths", "train_file": "train.jsonl"})
    with pytest.raises(ValidationError):
        run("task", {"name": "nothing"})


def test_equal_configurations_have_equal_hashes_however_they_are_written() -> None:
    explicit = run("rollout", {"temperature": 1, "prompts_per_batch": 64})
    reordered = RunConfig.model_validate(dict(reversed(RUN.items())))
    assert explicit.run_hash == run().run_hash == reordered.run_hash
    assert len(run().run_hash) == 64


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("budget.amount", 100_001),
        ("method.params", {"alpha": 0.1}),
        ("arm", "x"),
        ("scale", "y"),
    ],
)
def test_every_value_counts_for_the_run_and_only_the_seed_not_for_the_plan(path: str, value: Any) -> None:
    assert run(path, value).run_hash != run().run_hash
    assert (run(path, value).plan_hash == run().plan_hash) == (path == "seed")


def test_the_name_of_the_study_decides_nothing() -> None:
    assert run("study", "other") != run()
    assert (run("study", "other").run_hash, run("study", "other").plan_hash) == (run().run_hash, run().plan_hash)


def test_the_hash_is_that_of_documented_canonical_json() -> None:
    text = canonical(run())
    assert json.loads(text) == run().model_dump(mode="json")
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    with pytest.raises(ValueError, match="JSON"):
        digest({"x": float("nan")})


@given(
    rate=st.floats(1e-9, 1.0),
    seed=st.integers(0, 2**31),
    amount=st.integers(10_000, 10**12),
    share=st.floats(0, 1),
)
@settings(deadline=None)
def test_a_stored_configuration_reads_back_to_the_same_run(rate: float, seed: int, amount: int, share: float) -> None:
    tree = changed("optimiser.learning_rate", rate, changed("seed", seed, changed("budget.amount", amount)))
    tree["method"]["params"] = {"alpha": share, "nested": {"on": True, "list": [1, 2]}}
    config = RunConfig.model_validate(tree)
    stored = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    assert RunConfig.model_validate(yaml.safe_load(stored)).run_hash == config.run_hash


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        run().seed = 3  # type: ignore[misc]


def test_the_currencies_are_those_of_the_ledger() -> None:
    assert get_args(schema.Currency) == ledger.CURRENCIES
    assert set(get_args(schema.BudgetCurrency)) <= set(ledger.CURRENCIES)


def test_a_study_reads_short_forms() -> None:
    study = StudyConfig.model_validate(
        {**STUDY, "arms": ["grpo", {"name": "dynamo", "label": "half", "params": {"alpha": 0.1}}]}
    )
    assert study.seeds == (0, 1, 2)
    assert [(arm.name, arm.label) for arm in study.arms] == [("grpo", "grpo"), ("dynamo", "half")]
    assert StudyConfig.model_validate({**STUDY, "seeds": [4, 2]}).seeds == (4, 2)


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("arms", ["grpo", "grpo"], "arms"),
        ("arms", ["rloo"], "reference"),
        ("seeds", [1, 1], "seeds"),
        ("seeds", 0, "seeds"),
        ("claims", [{"id": "a", "text": "t", "arm": "dapo", "reference": "grpo"}], "claims.0.arm"),
        ("claims", [{"id": "a", "text": "t", "arm": "rloo", "reference": "dapo"}], "claims.0.reference"),
    ],
)
def test_a_study_that_cannot_be_answered_is_refused(key: str, value: Any, place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        StudyConfig.model_validate({**STUDY, key: value})
    assert caught.value.errors()[0]["ctx"]["key"] == place


@pytest.mark.parametrize("value", [True, "3", 2.5, [True]])
def test_seeds_are_whole_numbers(value: Any) -> None:
    with pytest.raises(ValidationError):
        StudyConfig.model_validate({**STUDY, "seeds": value})
