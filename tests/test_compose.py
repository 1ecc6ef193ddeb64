"""Composition: which layer wins, what a layer may touch, and errors that name file, line, key and remedy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmark import compose, registry
from benchmark.compose import compose_run, compose_study, find
from benchmark.config import RunConfig
from benchmark.errors import InputError
from benchmark.layers import dump, read_options, read_yaml, validate

BASELINES = ["grpo", "dr_grpo", "rloo", "dapo", "clip_higher", "entropy_loss", "fork_tokens"]
BASELINES += ["entropy_advantage", "clip_cov", "kl_cov", "w_reinforce"]
ARMS = [*BASELINES, "dynamo", "dynamo_allocation", "dynamo_modulation"]
STUDY = """\
study: mine
question: Which?
scale: small
arms:
  - grpo
  - name: dynamo
    label: half
    params:
      allocation: {n_low: 2}
seeds: 2
"""


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped configs/ that a test may change."""
    folder = tmp_path / "configs"
    shutil.copytree(compose.config_folder(), folder)
    monkeypatch.setattr(compose, "config_folder", lambda: folder)
    return folder


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# -- the shipped files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", sorted(path.stem for path in (compose.config_folder() / "scales").glob("*.yaml")))
def test_the_main_table_composes_at_every_shipped_scale(scale: str) -> None:
    plan = compose_study("main_table", scale=scale)
    assert {run.scale for run in plan.runs} == {scale}
    assert [run.arm for run in plan.runs[: len(ARMS)]] == ARMS
    assert len({run.run_hash for run in plan.runs}) == len(plan.runs)
    assert len(plan.runs[0].task.families) >= 3


def test_the_main_table_is_the_promised_one() -> None:
    plan = compose_study("main_table")
    assert plan.study.seeds == (0, 1, 2, 3, 4)
    assert plan.study.primary_currency == plan.runs[0].budget.currency == "tokens_generated"
    assert plan.runs[0].evaluation.k == (1, 8, 32)
    assert plan.runs[0].evaluation.final_samples >= 64
    pairs = {(claim.arm, claim.reference) for claim in plan.study.claims}
    assert pairs >= {
        ("dynamo", "grpo"),
        ("dynamo", "clip_higher"),
        ("dynamo_allocation", "grpo"),
        ("dynamo_modulation", "grpo"),
    }


def test_arms_differ_in_nothing_but_the_method() -> None:
    runs = compose_study("main_table").runs
    same = {run.model_dump_json(exclude={"arm", "method", "seed"}) for run in runs}
    assert len(same) == 1


def test_seeds_come_one_after_the_other_so_that_an_early_stop_leaves_pairs() -> None:
    runs = compose_study("main_table", seeds=3).runs
    assert [run.seed for run in runs] == [0] * 14 + [1] * 14 + [2] * 14


# -- which layer wins ----------------------------------------------------------------------------------------


def test_later_layers_win_and_mappings_merge(configs: Path) -> None:
    written(configs / "scales/tiny.yaml", "task: {name: sums, train_items: 100}\nbudget: {amount: 5000}\n")
    written(
        configs / "tasks/sums.yaml",
        "task:\n  mix: [{family: chain_sum}]\nrollout: {max_tokens: 20, rollouts_per_prompt: 4}\n",
    )
    path = written(
        configs / "studies/mine.yaml",
        STUDY.replace("small", "tiny") + "overrides:\n  rollout: {rollouts_per_prompt: 6}\n  budget: {amount: 6000}\n",
    )
    run = compose_study(str(path), options=["budget.amount=7000"]).runs[0]
    assert (run.task.name, run.task.train_items) == ("sums", 100)  # task file and scale merge
    assert (run.rollout.max_tokens, run.rollout.rollouts_per_prompt) == (20, 6)  # study over task
    assert run.budget.amount == 7000  # --set over study over scale


def test_lists_replace(configs: Path) -> None:
    run = compose_run("grpo", options=["evaluation.k=[1, 4]"])
    assert run.evaluation.k == (1, 4)


def test_a_task_can_be_chosen_by_name_or_by_option(configs: Path) -> None:
    chosen = compose_run("grpo", task="arithmetic_hard")
    assert chosen.task.mix == compose_run("grpo", options=["task.name=arithmetic_hard"]).task.mix
    assert chosen.task.mix != compose_run("grpo").task.mix


def test_method_parameters_come_from_file_then_arm_then_option(configs: Path) -> None:
    written(configs / "methods/dynamo.yaml", "method:\n  allocation: {n_low: 1, n_high: 30}\n")
    path = written(configs / "studies/mine.yaml", STUDY)
    grpo, half = compose_study(str(path)).runs[:2]
    assert half.method.params == {"allocation": {"n_low": 2, "n_high": 30}}
    assert grpo.method.params == {}
    option = compose_run("dynamo", options=["method.allocation.n_low=3"])
    assert option.method.params == {"allocation": {"n_low": 3, "n_high": 30}}
    assert compose_run("dynamo", options=["method.params.allocation.n_low=3"]) == option


def test_seeds_of_a_scale_are_used_unless_some_are_asked_for(configs: Path) -> None:
    small = (configs / "scales/small.yaml").read_text(encoding="utf-8")
    written(configs / "scales/brief.yaml", small + "seeds: 1\n")
    assert compose_study("main_table", scale="brief").study.seeds == (0,)
    assert compose_study("main_table", scale="brief", seeds=2).study.seeds == (0, 1)


def test_seeds_of_a_study_file_win_over_its_own_scale_and_not_over_what_is_typed(configs: Path) -> None:
    small = (configs / "scales/small.yaml").read_text(encoding="utf-8")
    written(configs / "scales/brief.yaml", small + "seeds: 1\ngradient_variance_replicates: 8\n")
    text = STUDY.replace("small", "brief")
    path = str(written(configs / "studies/mine.yaml", text.replace("seeds: 2", "seeds: [0, 7]")))
    plan = compose_study(path)
    assert plan.study.seeds == (0, 7)
    assert {run.seed for run in plan.runs} == {0, 7}
    assert plan.study.gradient_variance_replicates == 8  # the file says nothing of it
    assert compose_study(path, scale="brief").study.seeds == (0,)
    assert compose_study(path, scale="brief", seeds=3).study.seeds == (0, 1, 2)
    assert compose_study(path, seeds=3).study.seeds == (0, 1, 2)
    without = str(written(configs / "studies/other.yaml", text.replace("seeds: 2", "")))
    assert compose_study(without).study.seeds == (0,)


@pytest.mark.parametrize("seeds", ["two", "3.5", "0"])
@pytest.mark.parametrize("typed", [{}, {"scale": "brief"}, {"seeds": 2}])
def test_seeds_of_a_study_file_are_checked_also_where_others_replace_them(
    configs: Path, seeds: str, typed: dict[str, Any]
) -> None:
    small = (configs / "scales/small.yaml").read_text(encoding="utf-8")
    written(configs / "scales/brief.yaml", small + "seeds: 1\n")
    text = STUDY.replace("small", "brief").replace("seeds: 2", f"seeds: {seeds}")
    path = written(configs / "studies/mine.yaml", text)
    with pytest.raises(InputError, match="seeds") as caught:
        compose_study(str(path), **typed)
    assert (caught.value.file, caught.value.key) == (path, "seeds")


def test_a_budget_option_changes_the_currency_of_the_study() -> None:
    plan = compose_study("main_table", options=["budget.currency=rollouts", "budget.amount=4096"])
    assert plan.study.primary_currency == plan.runs[0].budget.currency == "rollouts"


def test_config_yaml_reads_back_to_the_same_run(tmp_path: Path) -> None:
    config = compose_run("dynamo", options=["optimiser.learning_rate=5e-7", "method.allocation.n_low=2"])
    path = written(tmp_path / "config.yaml", dump(config))
    assert validate(RunConfig, read_yaml(path)) == config
    assert RunConfig.model_validate(yaml.safe_load(dump(config))).run_hash == config.run_hash


# -- YAML ----------------------------------------------------------------------------------------------------


def test_scalars_are_read_as_in_yaml_1_2(tmp_path: Path) -> None:
    text = "a: 5e-7\nb: 1_000\nc: no\nd: true\ne: ~\nf: -.5\ng: '5'\nh: 2026-01-02\ni:\nj: 010\nk: 12:30\n"
    assert read_yaml(written(tmp_path / "x.yaml", text)).values == {
        "a": 5e-7,
        "b": 1000,
        "c": "no",
        "d": True,
        "e": None,
        "f": -0.5,
        "g": "5",
        "h": "2026-01-02",
        "i": None,
        "j": "010",
        "k": "12:30",
    }


def test_options_are_yaml_too() -> None:
    options = ["a.b=5e-7", "a.c=[1, 8]", "d=x=y", "a.b=2"]
    assert read_options(options).values == {"a": {"b": 2, "c": [1, 8]}, "d": "x=y"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", 3),
        ("a: 1\nb: c: d\n", 2),
        ("- 1\n", 1),
        ("a: 1\nb: {c: 1, c: 2}\n", 2),
        ("", 1),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = written(tmp_path / "x.yaml", text)
    with pytest.raises(InputError) as caught:
        read_yaml(path)
    assert (caught.value.file, caught.value.line) == (path, line)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_yaml(path)
    with pytest.raises(InputError, match="No such file"):
        read_yaml(tmp_path / "absent.yaml")


# -- errors --------------------------------------------------------------------------------------------------


def error_of(configs: Path, tail: str, options: list[str] | None = None) -> InputError:
    """The error of a study file whose text is STUDY and then `tail` (line 11 on)."""
    path = written(configs / "studies/mine.yaml", STUDY + tail)
    with pytest.raises(InputError) as caught:
        compose_study(str(path), options=options or [])
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("tail", "line", "key", "hint"),
    [
        (
            "overrides:\n  rollout:\n    temperatur: 2\n",
            13,
            "rollout.temperatur",
            "Did you mean 'temperature'?",
        ),
        ("overrides:\n  rollout: {temperature: hot}\n", 12, "rollout.temperature", "Write a value that fits"),
        ("overrides:\n  evaluation:\n    k: [1, 64]\n", 13, "evaluation.final_samples", "128"),
        ("overrides:\n  method: {loss: {}}\n", 12, "method", "Known"),
        ("reference: grop\n", 11, "reference", "Add it to arms"),
        ("questions: 3\n", 11, "questions", "Did you mean 'question'?"),
        ("primary_metric: pass_at_16\n", 11, "primary_metric", "Did you mean 'pass_at_1'?"),
        ("primary_currency: rollouts\n", 11, "primary_currency", "overrides.budget"),
    ],
)
def test_faults_of_a_study_are_placed(configs: Path, tail: str, line: int, key: str, hint: str) -> None:
    error = error_of(configs, tail)
    assert error.file == configs / "studies/mine.yaml"
    assert (error.line, error.key) == (line, key)
    assert hint in error.remedy


def test_a_fault_between_two_layers_is_placed_at_the_one_typed_last(configs: Path) -> None:
    error = error_of(configs, "", ["rollout.prompts_per_batch=2"])
    assert error.key == "optimiser.minibatches_per_batch"
    assert str(error).startswith("--set rollout.prompts_per_batch=2: ")


def test_a_wrong_parameter_of_an_arm_is_placed_in_the_study(configs: Path) -> None:
    path = written(configs / "studies/mine.yaml", STUDY.replace("n_low: 2", "n_loww: 2"))
    with pytest.raises(InputError, match="n_low") as caught:
        compose_study(str(path))
    assert (caught.value.file, caught.value.line) == (path, 9)


def test_an_unknown_method_is_placed_in_the_study(configs: Path) -> None:
    path = written(configs / "studies/mine.yaml", STUDY.replace("name: dynamo", "name: dynamoo"))
    with pytest.raises(InputError, match="dynamo") as caught:
        compose_study(str(path))
    assert (caught.value.file, caught.value.line) == (path, 6)


@pytest.mark.parametrize(
    ("place", "text", "who"),
    [
        (
            "methods/grpo.yaml",
            "method: {}\nrollout: {temperature: 2.0}\n",
            "a method file may set only method",
        ),
        ("scales/small.yaml", "budget: {amount: 9}\nmethod: {clip: 1}\n", "a scale file may set only"),
        ("tasks/arithmetic.yaml", "task: {}\nbudget: {amount: 9}\n", "a task file may set only"),
    ],
)
def test_a_file_may_touch_only_what_is_its_own(configs: Path, place: str, text: str, who: str) -> None:
    path = written(configs / place, text if place[0] != "t" else "task: {}\nbudget: {amount: 9}\n")
    with pytest.raises(InputError, match=who) as caught:
        compose_run("grpo", task="arithmetic")
    assert (caught.value.file, caught.value.line) == (path, 2)


@pytest.mark.parametrize("option", ["seed=3", "scale=smoke", "arm=x", "study=x", "method.name=rloo"])
def test_identity_is_not_an_option(option: str) -> None:
    with pytest.raises(InputError, match="not an option"):
        compose_run("grpo", options=[option])


@pytest.mark.parametrize(
    "option",
    ["temperature", "=3", "a..b=3", "task=3", "task.mix=3", "method=3", "method.params=3", "budget=[1"],
)
def test_any_bad_option_is_an_input_error(option: str) -> None:
    with pytest.raises(InputError) as caught:
        compose_run("grpo", options=[option])
    assert "\n" not in str(caught.value)


def test_names_of_files_are_suggested() -> None:
    with pytest.raises(InputError, match="Did you mean 'main_table'"):
        find("studies", "main_tabel")
    with pytest.raises(InputError, match="Did you mean 'smoke'"):
        compose_run("grpo", scale="smoek")
    with pytest.raises(InputError, match=r"Did you mean .?grpo"):
        compose_run("grppo")


def test_a_study_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose_study("configs/studies/main_table.yaml").study.study == "main_table"
    assert compose_study("main_table").study.study == "main_table"


def test_every_arm_of_the_main_table_is_a_known_method() -> None:
    assert set(ARMS) <= set(registry.names())
