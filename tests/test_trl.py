"""Stock TRL on the harness's account, and its own numbers against those that the suite states for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmark.config import RunConfig
from benchmark.engine import load
from benchmark.engine_trl import TRL
from benchmark.errors import InputError
from benchmark.groups import Groups
from benchmark.losses import policy_loss, token_weights
from benchmark.method import TokenCredit
from benchmark.registry import build
from benchmark.rollouts import Rollouts
from benchmark.run import Interrupted, Run, run_cell
from benchmark.scoring import score
from benchmark.vocabulary import build_tokenizer
from benchmark.warmup import warm_up

MIX = [{"family": "chain_sum", "num_terms": [2, 2], "num_digits": [1, 1]}]
TINY = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 64}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "bnpo": ("trl_grpo", {}),
    "grpo": ("trl_grpo", {"loss": {"aggregation": "sequence_mean"}}),
    "dr_grpo": ("trl_grpo", {"loss": {"aggregation": "constant_length"}, "scale_rewards": "none"}),
    "dapo": ("trl_grpo", {"batch_normaliser": True}),
    "dapo, clip range and penalty": ("trl_dapo", {}),
    "two-sided clipping": ("trl_grpo", {"loss": {"dual_clip": 1.3}}),
}


def make_config(policy: str | None, method: str, params: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    plain: dict[str, Any] = {
        "study": "test",
        "arm": method,
        "seed": 3,
        "scale": "test",
        "policy": {
            "path": policy,
            "architecture": TINY,
            "warmup": {"steps": 200, "batch": 64, "styles": {"direct": 1.0, "partial": 0.0, "full": 0.0}},
        },
        "task": {"name": "sums", "mix": MIX, "train_items": 24, "eval_items_per_family": 4},
        "rollout": {"prompts_per_batch": 8, "rollouts_per_prompt": 6, "max_tokens": 12},
        "optimiser": {"learning_rate": 0.003, "minibatches_per_batch": 2},
        "budget": {"currency": "rollouts", "amount": 151},
        "evaluation": {"points": 3, "samples": 2, "final_samples": 2, "k": [1]},
        "method": {"name": method, "params": params or {}},
    }
    return RunConfig.model_validate(plain | changes)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    made, _ = warm_up(make_config(None, "grpo"), lambda *_: None)
    made.save(folder)
    return str(folder)


@pytest.fixture
def trl(policy: str, tmp_path: Path) -> Any:
    """Make a run's TRL engine; verifiers end with the test."""
    with ExitStack() as stack:

        def make(arm: str, params: dict[str, Any], source: str = policy, **changes: Any) -> tuple[Run, TRL]:
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            run = Run(make_config(source, arm, params, **changes), folder, print)
            stack.enter_context(run.verifier)
            assert isinstance(run.engine, TRL)
            return run, run.engine

        yield make


def rollouts_of(inputs: dict[str, Tensor]) -> Rollouts:
    """TRL's padded minibatch as ragged rollouts; every rollout is a prompt of its own, so that none is sorted."""
    reads, writes = inputs["prompt_mask"].bool(), inputs["completion_mask"].bool()
    old = inputs["old_per_token_logps"]
    rows = len(reads)
    return Rollouts(
        inputs["prompt_ids"][reads],
        reads.sum(1),
        torch.arange(rows),
        inputs["completion_ids"][writes],
        writes.sum(1),
        old[writes],
        torch.ones(rows, dtype=torch.bool),
    )


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("case", ARMS)
def test_advantages_loss_and_gradient_are_trls(trl: Callable[..., tuple[Run, TRL]], case: str) -> None:
    run, engine = trl(*ARMS[case], optimiser={"learning_rate": 0.003, "minibatches_per_batch": 2})
    run.step_once()
    ((_, trainer),) = engine._trainers.items()
    minibatches = trainer._buffered_inputs
    assert len(minibatches) == 2

    # Advantages: TRL shuffles rollouts over the minibatches, so both sides are compared as sorted by what they hold.
    (batch,) = run_batches(engine)
    expected = run.method.credit(batch[0])
    credited = {}
    for value, tokens in zip(expected.tolist(), batch[1].texts(), strict=True):
        credited.setdefault(tuple(tokens), []).append(value)
    found = {}
    for inputs in minibatches:
        part = rollouts_of(inputs)
        for value, tokens in zip(inputs["advantages"].tolist(), part.texts(), strict=True):
            found.setdefault(tuple(tokens), []).append(value)
    assert found.keys() == credited.keys()
    for tokens, values in credited.items():
        assert sorted(found[tokens]) == pytest.approx(sorted(values), abs=1e-5)
    assert float(expected.abs().max()) > 0.5

    # Loss and gradient away from the sampling policy, so that the clip range acts.
    model, loss = run.policy.model, run.method.loss
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=random))
    drawn = sum(int(inputs["completion_mask"].sum()) for inputs in minibatches)
    model.train()
    clipped = 0
    for inputs in minibatches:
        model.zero_grad()
        theirs = trainer._compute_loss(model, inputs)
        theirs.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        part = rollouts_of(inputs)
        seen = score(run.policy.fused(), part)
        advantage = inputs["advantages"].repeat_interleave(part.length)
        weights = token_weights(part, loss, run.config.rollout.max_tokens)
        if run.method.grpo_config()["loss_type"] == "dapo":
            weights = torch.full_like(weights, len(minibatches) / drawn)
        ours = policy_loss(seen.log_prob, seen.entropy, part.log_prob, weights, TokenCredit(advantage), loss)
        ours.backward()  # type: ignore[no-untyped-call]
        own = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-6, rel=1e-5)
        assert relative(own, gradient) < 1e-4
        ratio = (seen.log_prob.detach() - part.log_prob).exp()
        clipped += int((((advantage > 0) & (ratio > 1 + loss.clip_high)) | ((advantage < 0) & (ratio < 0.8))).sum())
    assert clipped > 0


def run_batches(engine: TRL) -> list[tuple[Groups, Rollouts]]:
    """Groups and rollouts of the engine's last batch."""
    collector = engine.collector
    prompts = collector.pool.prompts(collector.place - 8, 8)
    batch = engine._batch(prompts)
    return [(batch.groups, batch.rollouts)]


def test_rollouts_end_with_any_id_that_the_model_declares(
    policy: str, trl: Callable[..., tuple[Run, TRL]], tmp_path: Path
) -> None:
    declared = shutil.copytree(policy, tmp_path / "declared")
    said = json.loads((declared / "generation_config.json").read_text())
    closing = build_tokenizer().convert_tokens_to_ids("}")
    (declared / "generation_config.json").write_text(json.dumps(said | {"eos_token_id": [1, closing]}))
    run, engine = trl("trl_grpo", {}, str(declared))
    batch, _ = engine.step(0)
    assert batch.rollouts.finished.any()
    for tokens, finished in zip(batch.rollouts.texts(), batch.rollouts.finished.tolist(), strict=True):
        assert [token in (1, closing) for token in tokens] == [False] * (len(tokens) - 1) + [finished]
    assert closing in batch.rollouts.tokens
    assert run.ledger.spent["tokens_generated"] == len(batch.rollouts.tokens)


def test_a_train_call_a_batch_is_one_training_of_many_batches(trl: Callable[..., tuple[Run, TRL]]) -> None:
    from transformers import TrainerCallback

    class Reseed(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.updates = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.manual_seed(100 + self.updates)
            self.updates += 1

    stepwise, engine = trl("trl_grpo", {}, optimiser={"learning_rate": 0.003, "minibatches_per_batch": 2})
    engine._trainer(8).add_callback(Reseed())
    before = {name: value.clone() for name, value in stepwise.policy.model.state_dict().items()}
    stepwise.step_once()
    stepwise.step_once()

    whole, other = trl("trl_grpo", {}, optimiser={"learning_rate": 0.003, "minibatches_per_batch": 2})
    trainer = other._trainer(8)
    trainer.add_callback(Reseed())
    trainer.args.max_steps = 4
    trainer.train_dataset = other._dataset(whole.collector.pool.prompts(0, 16))
    trainer.train()
    after = whole.policy.model.state_dict()
    for name, value in stepwise.policy.model.state_dict().items():
        assert torch.equal(value, after[name]), name
        assert not torch.equal(value, before[name]) or "norm" in name


def test_a_resumed_run_of_trl_equals_an_uninterrupted_one(policy: str, tmp_path: Path) -> None:
    config = make_config(policy, "trl_grpo")
    run_cell(config, tmp_path / "whole")
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    with pytest.raises(Interrupted):
        run_cell(config, tmp_path / "resumed", should_stop=stop)
    run_cell(config, tmp_path / "resumed")
    for name in ("ledger.jsonl", "metrics.jsonl", "evaluation.jsonl", "allocation.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name


def test_arms_of_both_engines_share_the_evaluation_before_training(policy: str, tmp_path: Path) -> None:
    for arm in ("grpo", "trl_grpo"):
        run_cell(make_config(policy, arm), tmp_path / arm)
    first = [(tmp_path / arm / "evaluation.jsonl").read_text().splitlines()[:4] for arm in ("grpo", "trl_grpo")]
    assert first[0] == first[1]


def test_expected_advantages_of_the_arms() -> None:
    reward, length = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0]), torch.tensor([4, 8, 9, 10, 10])
    groups = Groups(torch.tensor([0, 0, 0, 0, 1]), 2, reward, length, length == 10, 10)
    assert build("trl_grpo", {}).credit(groups).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5, 0.0], abs=1e-3)
    # Buffer 2 of 10 tokens: penalties 0, 0, 1/2, 1 | 1; rewards 1, 0, -1/2, -1 have mean -1/8.
    shaped = torch.tensor([1.0, 0.0, -0.5, -1.0])
    expected = [*((shaped + 0.125) / shaped.std()).tolist(), 0.0]
    assert build("trl_dapo", {}).credit(groups).tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "params",
    [
        {"loss": {"prompt_weight": "equal"}},
        {"loss": {"entropy_coefficient": 0.1}},
        {"epsilon": 0.1},
        {"batch_normaliser": True, "loss": {"aggregation": "sequence_mean"}},
    ],
)
def test_what_trl_lacks_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        build("trl_grpo", params)


def test_prompts_that_trl_would_tokenise_otherwise_are_refused(trl: Callable[..., tuple[Run, TRL]]) -> None:
    run, engine = trl("trl_grpo", {})
    run.collector.pool.tokens[0] = run.collector.pool.tokens[0][:-1]
    with pytest.raises(InputError, match="tokenise"):
        engine._dataset([0])


def test_an_unknown_engine_is_an_input_error() -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        load("benchmark.engine:Nothing")
