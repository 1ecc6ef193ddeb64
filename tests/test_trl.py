"""Stock TRL on the harness's account, and its own numbers against those that the suite states for it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from baselines.cispo import CISPO
from baselines.fork_tokens import ForkTokens
from baselines.gspo import sequence_ratio
from baselines.trl_grpo import TRLGRPO
from benchmark.cli import app
from benchmark.compose import compose_run
from benchmark.config import RunConfig
from benchmark.engine import load
from benchmark.engine_trl import TRL, _passes
from benchmark.errors import InputError
from benchmark.groups import Groups
from benchmark.losses import policy_loss, token_weights
from benchmark.method import Loss, Method, TokenCredit, Tokens
from benchmark.registry import build
from benchmark.rollouts import Rollouts, concatenate
from benchmark.run import Interrupted, Run, run_cell
from benchmark.scoring import TokenStatistics, score
from benchmark.vocabulary import build_tokenizer
from benchmark.warmup import warm_up

MIX = [{"family": "chain_sum", "num_terms": [2, 2], "num_digits": [1, 1]}]
TINY = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 64}


@dataclass(frozen=True)
class Case:
    """TRL's trainer and what the suite states for it.

    Attributes:
        arm, params: the arm that trains with TRL. more: arguments of `trl.GRPOConfig` beside the arm's.
        own: the suite's arm and its parameters; the same by default.
        whole: TRL divides by the mean tokens of a minibatch, so that the mean over minibatches is the loss of them all.
        objective: the suite's loss where the arm's has its gradient and another value.
    """

    arm: str = "trl_grpo"
    params: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    own: tuple[str, dict[str, Any]] | None = None
    whole: bool = False
    objective: Loss | None = None


NARROW = {"clip_low": 0.01, "clip_high": 0.02}
CASES = {
    "bnpo": Case(),
    "grpo": Case(params={"loss": {"aggregation": "sequence_mean"}}),
    "dr_grpo": Case(params={"loss": {"aggregation": "constant_length"}, "scale_rewards": "none"}),
    "dapo": Case(params={"batch_normaliser": True}, whole=True),
    "dapo, clip range and penalty": Case("trl_dapo", whole=True),
    "two-sided clipping": Case(params={"loss": {"dual_clip": 1.3}}),
    # TRL's range is an upper bound of the ratio, without a lower one.
    "cispo": Case(
        more={"loss_type": "cispo", "epsilon_high": 1.2},
        own=("cispo", {"epsilon": 1e-4, "loss": {"clip_low": 1.0, "clip_high": 0.2}}),
        whole=True,
    ),
    "gspo": Case(
        params={"loss": {"aggregation": "sequence_mean", **NARROW}},
        more={"importance_sampling_level": "sequence"},
        own=("gspo", {"epsilon": 1e-4, "loss": NARROW}),
        objective=Loss(aggregation="sequence_mean", dual_clip=None, **NARROW),
    ),
    # TRL ranks within a pass, here a whole minibatch, and divides by all tokens: equal where no token is counted.
    "fork_tokens": Case(
        params={"loss": {"aggregation": "constant_length"}},
        own=("fork_tokens", {"epsilon": 1e-4, "loss": {"aggregation": "constant_length"}}),
    ),
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


def tokens_of(part: Rollouts, seen: TokenStatistics, advantage: Tensor, loss: Loss) -> Tokens:
    """A minibatch as a method sees it before an update; `advantage` is (R,)."""
    rollout = torch.repeat_interleave(torch.arange(len(part)), part.length)
    sums = (seen.log_prob.detach(), part.log_prob, seen.entropy.detach(), seen.sum_p2, seen.sum_p2_log_p)
    return Tokens(advantage[rollout], *sums, rollout, torch.zeros(len(rollout)), loss)


def gradient_of(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_advantages_loss_and_gradient_are_trls(
    trl: Callable[..., tuple[Run, TRL]], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = TRLGRPO.grpo_config
    monkeypatch.setattr(TRLGRPO, "grpo_config", lambda self: {**arguments(self), **case.more})
    run, engine = trl(case.arm, case.params)
    method = build(*case.own) if case.own else run.method
    run.step_once()
    ((_, trainer),) = engine._trainers.items()
    minibatches = trainer._buffered_inputs
    assert len(minibatches) == 2

    # Advantages: TRL shuffles rollouts over the minibatches, so both sides are compared as sorted by what they hold.
    (batch,) = run_batches(engine)
    expected = method.credit(batch[0])
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
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in run.policy.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=random))
    if isinstance(method, ForkTokens):
        method = replace(method, fraction=clear_share(run, minibatches))
        trainer.top_entropy_quantile = method.fraction
    units = [minibatches] if case.whole else [[inputs] for inputs in minibatches]
    assert sum(compare(run, trainer, method, case, unit) for unit in units) > 0


def clear_share(run: Run, minibatches: Sequence[dict[str, Tensor]]) -> float:
    """A share of the tokens of every minibatch that entropy tells apart from the rest.

    Tokens after equal words tie, and TRL keeps all of a tie, the suite the share. Of shares 1 / k, TRL's quantile keeps
    as many tokens as the suite's rounding up, to rounding where it falls on a token.
    """
    parts = [rollouts_of(inputs) for inputs in minibatches]
    ranked = [score(run.policy.fused(), part).entropy.detach().sort(descending=True).values for part in parts]

    def clear(k: int, entropy: Tensor) -> bool:
        edge = math.ceil(len(entropy) / k)
        return (len(entropy) - 1) % k > 0 and float(entropy[edge - 1] - entropy[edge]) > 1e-4

    return next(1 / k for k in range(2, 25) if all(clear(k, entropy) for entropy in ranked))


def compare(run: Run, trainer: Any, method: Method, case: Case, minibatches: Sequence[dict[str, Tensor]]) -> int:
    """Hold the mean loss of TRL's `minibatches` and its gradient to the suite's of all their rollouts.

    Returns:
        how many tokens the clip range, or the choice of tokens, acts on.
    """
    model, loss, limit = run.policy.model.train(), method.loss, run.config.rollout.max_tokens
    theirs = torch.stack([trainer._compute_loss(model, inputs) for inputs in minibatches]).mean()
    gradient = gradient_of(model, theirs)
    part = concatenate([rollouts_of(inputs) for inputs in minibatches])
    seen = score(run.policy.fused(), part)
    tokens = tokens_of(part, seen, torch.cat([inputs["advantages"] for inputs in minibatches]), loss)
    credit = method.modulate(tokens)
    weights = token_weights(part, loss, limit, credit.mask)
    ours = policy_loss(seen.log_prob, seen.entropy, part.log_prob, weights, credit, loss)
    (push,) = torch.autograd.grad(ours, seen.log_prob, retain_graph=True)
    assert relative(gradient_of(model, ours), gradient) < 1e-5
    if case.objective is not None:
        weights, log_ratio = token_weights(part, case.objective, limit), sequence_ratio(tokens).log()
        plain, start = TokenCredit(tokens.advantage), torch.zeros_like(log_ratio)
        ours = policy_loss(log_ratio, tokens.entropy, start, weights, plain, case.objective)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6, rel=1e-5)
    unbounded = (weights * tokens.advantage * tokens.ratio).abs()
    acts = push.abs() < 0.999 * unbounded if isinstance(method, CISPO) else push == 0
    return int((acts & (tokens.advantage != 0)).sum())


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


# --- the backend's settings ------------------------------------------------------------------------------------------


class Watch:
    """What a step computes: the gradient of every update, and size and type of a projection in passes with one."""

    def __init__(self, run: Run, engine: TRL, prompts: int = 8) -> None:
        from transformers import TrainerCallback

        gradients: list[Tensor] = []

        class Keep(TrainerCallback):  # type: ignore[misc]
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

        def see(module: Any, inputs: Any, output: Tensor) -> None:
            if torch.is_grad_enabled():
                self.passes.append((output.shape[0] * output.shape[1], output.dtype))

        self.gradients, self.passes = gradients, list[tuple[int, torch.dtype]]()
        self.trainer = engine._trainer(prompts)
        self.trainer.add_callback(Keep())
        run.policy.model.model.layers[0].self_attn.q_proj.register_forward_hook(see)


@pytest.mark.parametrize("case", ["grpo", "dr_grpo", "dapo", "dapo, clip range and penalty"])
def test_an_update_in_passes_has_the_gradient_of_one_pass(trl: Callable[..., tuple[Run, TRL]], case: str) -> None:
    arm, params = CASES[case].arm, CASES[case].params
    watches = []
    for limit in (65_536, 150):
        run, engine = trl(arm, params, backend={"tokens_per_pass": limit})
        watches.append(Watch(run, engine))
        engine._trainer(1)  # the last batch's, in passes of another number
        run.step_once()
        assert run.updater.updates == len(watches[-1].gradients) == 2
    whole, parts = watches
    assert len(whole.passes) == 2
    assert len(parts.passes) > 4
    assert max(size for size, _ in parts.passes) <= 150
    assert relative(parts.gradients[0], whole.gradients[0]) < 1e-5
    logged = [[row["loss"] for row in watch.trainer.state.log_history if "grad_norm" in row] for watch in watches]
    assert logged[1][0] == pytest.approx(logged[0][0], abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "most", "passes"), [(24, 24, 1), (24, 23, 2), (24, 7, 4), (24, 1, 24), (24, 0, 24), (7, 6, 7)]
)
def test_passes_are_the_fewest_equal_ones_that_fit(rows: int, most: int, passes: int) -> None:
    assert _passes(rows, most) == passes


def test_a_minibatch_that_fits_is_one_pass(trl: Callable[..., tuple[Run, TRL]]) -> None:
    _, engine = trl("trl_grpo", {})
    args = engine._trainer(8).args
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.steps_per_generation) == (24, 1, 2)
    assert (args.bf16, args.gradient_checkpointing, args.max_steps) == (False, False, 2)


def test_type_and_checkpointing_are_the_backends(trl: Callable[..., tuple[Run, TRL]]) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "bfloat16": {"dtype": "bfloat16", "importance_cap": None},
        "checkpointing": {"gradient_checkpointing": True},
    }
    seen = {}
    for name, changes in kinds.items():
        run, engine = trl("trl_grpo", {}, backend={"name": "transformers", **changes})
        seen[name] = watch = Watch(run, engine)
        run.step_once()
        assert all(value.dtype == torch.float32 for value in run.policy.parameters().values())
        assert watch.trainer.args.gradient_checkpointing == (name == "checkpointing")
        run.evaluator.evaluate(1)
    assert [{kind for _, kind in watch.passes} for watch in seen.values()] == [
        {torch.float32},
        {torch.bfloat16},
        {torch.float32},
    ]
    # Two updates; a checkpointed layer is passed again backwards.
    assert [len(watch.passes) for watch in seen.values()] == [2, 2, 4]
    assert relative(seen["checkpointing"].gradients[0], seen["plain"].gradients[0]) < 1e-5


REFUSED = {
    "vllm": (["backend.name=vllm"], "backend.name"),
    "decoding in parts": (["backend.name=transformers", "backend.rows_per_decode=8"], "backend.rows_per_decode"),
    "correction": (["backend.name=transformers", "backend.dtype=bfloat16"], "backend.importance_cap"),
    "one rollout": (["rollout.rollouts_per_prompt=1"], "rollout.rollouts_per_prompt"),
    "uneven": (["optimiser.minibatches_per_batch=7"], "optimiser.minibatches_per_batch"),
    "bnpo in passes": (["backend.tokens_per_pass=64"], "backend.tokens_per_pass"),
    "staleness": (["rollout.staleness=1"], "rollout.staleness"),
    "noise": (["verifier.flip_rate=0.1"], "verifier.flip_rate"),
}


@pytest.mark.parametrize(("options", "key"), REFUSED.values(), ids=REFUSED)
def test_settings_that_trl_would_leave_out_are_refused_when_they_are_read(options: list[str], key: str) -> None:
    with pytest.raises(InputError, match=f"{key} = "):
        compose_run("trl_grpo", scale="smoke", options=options)
    compose_run("grpo", scale="smoke", options=options)


def test_losses_that_accumulate_are_read_with_small_passes() -> None:
    for options in (["method.batch_normaliser=true"], ["method.loss.aggregation=sequence_mean"]):
        compose_run("trl_grpo", scale="smoke", options=["backend.tokens_per_pass=64", *options])


def test_a_dry_run_at_paper_scale_says_that_trl_cannot() -> None:
    result = CliRunner().invoke(app, ["study", "trl", "--scale", "paper-7b", "--dry-run"])
    assert result.exit_code == 2
    assert "paper-7b.yaml" in result.output
    assert "backend.name" in result.output


def test_bnpo_is_refused_where_the_longest_prompt_makes_it_accumulate(trl: Callable[..., tuple[Run, TRL]]) -> None:
    run, _ = trl("trl_grpo", {})
    longest = max(map(len, run.collector.pool.tokens)) + 12
    with pytest.raises(InputError, match="tokens_per_pass"):
        trl("trl_grpo", {}, backend={"tokens_per_pass": 24 * longest - 1})
    trl("trl_grpo", {}, backend={"tokens_per_pass": 24 * longest})


def test_several_gpus_in_one_process_are_refused(
    trl: Callable[..., tuple[Run, TRL]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        trl("trl_grpo", {})


# --- whole runs ------------------------------------------------------------------------------------------------------


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
    unscaled = build("trl_dapo", {"scale_rewards": "none"}).credit(groups).tolist()
    assert unscaled == pytest.approx([1.125, 0.125, -0.375, -0.875, 0.0])


@pytest.mark.parametrize(
    "params",
    [
        {"loss": {"prompt_weight": "equal"}},
        {"loss": {"entropy_coefficient": 0.1}},
        {"epsilon": 0.1},
        {"batch_normaliser": True, "loss": {"aggregation": "sequence_mean"}},
        {"loss": {"dual_clip": 1.1}},
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
