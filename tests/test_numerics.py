"""A number that is not finite stops the run, with the batch kept, and nothing is trained on it or skipped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from benchmark import bundle, update
from benchmark.backend import Backend
from benchmark.cli import app
from benchmark.config import RunConfig
from benchmark.errors import InputError
from benchmark.jsonl import read_rows
from benchmark.numerics import Minibatch, NumericalError, check_sampled, require, sound
from benchmark.rollouts import Rollouts
from benchmark.run import run_cell
from benchmark.scoring import TokenStatistics
from benchmark.update import Updater
from benchmark.warmup import warm_up

STEP = 2


def make_config(policy: str | None, arm: str) -> RunConfig:
    mix = [{"family": "chain_sum", "num_terms": [2, 2], "num_digits": [1, 1]}]
    plain: dict[str, Any] = {
        "study": "test",
        "arm": arm,
        "seed": 3,
        "scale": "test",
        "policy": {
            "path": policy,
            "architecture": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 64},
            "warmup": {"steps": 100, "batch": 64, "styles": {"direct": 1.0, "partial": 0.0, "full": 0.0}},
        },
        "task": {"name": "sums", "mix": mix, "train_items": 24, "eval_items_per_family": 4},
        "rollout": {"prompts_per_batch": 8, "rollouts_per_prompt": 4, "max_tokens": 8},
        "optimiser": {"learning_rate": 0.003, "minibatches_per_batch": 2},
        "budget": {"currency": "rollouts", "amount": 160},
        "evaluation": {"points": 2, "samples": 2, "final_samples": 2, "k": [1]},
        "method": {"name": arm, "params": {}},
    }
    return RunConfig.model_validate(plain)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    made, _ = warm_up(make_config(None, "grpo"), lambda *_: None)
    made.save(folder)
    return str(folder)


def poison(updater: Updater) -> None:
    """NaN in one weight of the last norm."""
    parameters = updater.backend.policy.parameters()
    name = next(key for key in reversed(parameters) if key.endswith("norm.weight"))
    with torch.no_grad():
        parameters[name][5] = math.nan


@pytest.mark.parametrize("arm", ["grpo", "dynamo", "fork_tokens", "capo", "lco", "oblr_po"])
def test_a_poisoned_weight_stops_the_run_and_the_batch_fails_again(
    arm: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, config = Updater.update, make_config(policy, arm)

    def bad(self: Updater, step: int, batch: Any) -> dict[str, float]:
        if step == STEP:
            poison(self)
        return honest(self, step, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "update", bad)
        with pytest.raises(NumericalError, match=rf"{arm}, seed 3, step {STEP}: not finite.*log-probability"):
            run_cell(config, tmp_path)
    kept = tmp_path / bundle.FOLDER
    about = json.loads((kept / "error.json").read_text())
    assert (about["arm"], about["seed"], about["step"]) == (arm, 3, STEP)
    assert about["update"] == 2 * STEP
    assert json.loads((tmp_path / "progress.json").read_text())["state"] == "failed"
    assert not (tmp_path / "result.json").exists()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")[0]] == list(range(STEP))

    before = sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file())
    again = CliRunner().invoke(app, ["replay-batch", str(kept)])
    assert again.exit_code == 1, again.output
    assert "log-probability" in json.loads(again.stdout)["again"]
    assert before == sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file())

    run_cell(config, tmp_path)  # the same command, without the fault
    assert (tmp_path / "result.json").exists()


def test_a_poisoned_sampler_is_noticed_before_anything_is_learnt(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Backend.generate
    count = 0

    def bad(self: Backend, request: Any) -> Rollouts:
        nonlocal count
        count += 1
        if count == 3:
            with torch.no_grad():
                next(iter(self.policy.parameters().values())).fill_(math.nan)
        return honest(self, request)

    with monkeypatch.context() as patch:
        patch.setattr(Backend, "generate", bad)
        with pytest.raises(NumericalError, match="sampled log-probability"):
            run_cell(make_config(policy, "grpo"), tmp_path)
    again = CliRunner().invoke(app, ["replay-batch", str(tmp_path / bundle.FOLDER)])
    assert again.exit_code == 1, again.output


def test_a_batch_that_is_fine_here_says_so(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object, batch: Minibatch) -> None:
        raise NumericalError("made up", batch)

    with monkeypatch.context() as patch:
        patch.setattr(update, "require", refuse)
        with pytest.raises(NumericalError, match="made up"):
            run_cell(make_config(policy, "dynamo"), tmp_path)
    again = CliRunner().invoke(app, ["replay-batch", str(tmp_path / bundle.FOLDER)])
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    assert found["again"] is None
    assert math.isfinite(found["metrics"]["optim/loss"])


def test_a_kept_batch_has_what_an_inexact_sampler_told(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Minibatch] = []

    def refuse(_: object, batch: Minibatch) -> None:
        kept.append(batch)
        raise NumericalError("made up", batch)

    def again(self: Updater, batch: Minibatch) -> dict[str, float]:
        kept.append(batch)
        return {}

    plain = make_config(policy, "dppo_tv").model_dump(mode="json")
    plain["backend"] |= {"name": "transformers", "dtype": "bfloat16"}
    with monkeypatch.context() as patch:
        patch.setattr(update, "require", refuse)
        with pytest.raises(NumericalError, match="made up"):
            run_cell(RunConfig.model_validate(plain), tmp_path)
    monkeypatch.setattr(Updater, "again", again)
    bundle.replay(tmp_path / bundle.FOLDER)
    (told, recomputed), (again_told, again_recomputed) = ((b.rollout_log_prob, b.rollouts.log_prob) for b in kept)
    assert told is not None
    assert again_told is not None
    assert not torch.equal(told, recomputed)
    assert torch.equal(again_told, told)
    assert torch.equal(again_recomputed, recomputed)


def test_a_folder_without_a_batch_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no saved batch"):
        bundle.replay(tmp_path)
    (tmp_path / "batch.safetensors").write_bytes(b"\xff" * 64)
    assert CliRunner().invoke(app, ["replay-batch", str(tmp_path)]).exit_code == 2


def statistics() -> tuple[TokenStatistics, Tensor, Tensor]:
    log_prob = torch.tensor([-0.5, -1.0, -2.0])
    seen = TokenStatistics(log_prob, torch.tensor([0.1, 0.2, 0.3]), torch.ones(3), torch.zeros(3))
    return seen, log_prob.clone(), torch.tensor([1.0, -1.0, 0.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["log-probability", "entropy", "sampled log-probability", "advantage"])
def test_every_kind_of_number_is_checked(where: str, bad: float) -> None:
    seen, sampled, advantage = statistics()
    require(sound(seen, sampled, advantage, 10))
    numbers = {
        "log-probability": seen.log_prob,
        "entropy": seen.entropy,
        "sampled log-probability": sampled,
        "advantage": advantage,
    }
    numbers[where][1] = bad
    with pytest.raises(NumericalError, match=rf"{where} \(1 of 3\)"):
        require(sound(seen, sampled, advantage, 10))


def test_ranges_are_checked() -> None:
    seen, sampled, advantage = statistics()
    for wrong, what in (
        (replace(seen, entropy=torch.full((3,), math.log(10) + 0.1)), "entropy"),
        (replace(seen, entropy=torch.full((3,), -0.1)), "entropy"),
        (replace(seen, log_prob=torch.full((3,), 0.1)), "log-probability"),
    ):
        with pytest.raises(NumericalError, match=what):
            require(sound(wrong, sampled, advantage, 10))
    with pytest.raises(NumericalError, match="ratio"):
        require(sound(seen, torch.full((3,), -200.0), advantage, 10))


class Syncs(TorchDispatchMode):
    """Counts reads of a tensor's value: on a GPU, each waits for the device."""

    count = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += "_local_scalar_dense" in str(func) or "is_nonzero" in str(func)
        return func(*args, **(kwargs or {}))


def test_all_checks_of_an_update_wait_for_the_device_once() -> None:
    seen, sampled, advantage = statistics()
    with Syncs() as syncs:
        checks = sound(seen, sampled, advantage, 10) | {"loss": torch.isfinite(seen.log_prob.sum())}
        assert syncs.count == 0
        require(checks)
    assert syncs.count == 1


def test_sampled_log_probabilities_that_are_sound_pass() -> None:
    ids = torch.tensor([4, 5])
    one = torch.tensor([1])
    check_sampled(Rollouts(ids[:1], one, torch.tensor([0]), ids[1:], one, torch.tensor([-0.1]), torch.tensor([True])))
