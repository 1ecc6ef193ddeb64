"""The transformers backend against the native one, on models that both know, and what only it can do."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import Tensor

from benchmark import optimiser, ranks
from benchmark.backend import Backend, NativeBackend, Piece, Request, by_length, by_prompts, by_rollouts, make
from benchmark.backend_transformers import TransformersBackend
from benchmark.backend_vllm import merged
from benchmark.clock import Clock
from benchmark.config import OptimiserConfig
from benchmark.config_model import BackendConfig, LoRAConfig, TemplateConfig, VLLMConfig
from benchmark.draws import Batch
from benchmark.errors import InputError
from benchmark.groups import Groups
from benchmark.installing import install_line
from benchmark.ledger import Ledger, Prices
from benchmark.policy import Policy
from benchmark.registry import build
from benchmark.rollouts import ragged_index
from benchmark.update import Updater
from benchmark.vllm_server import command
from benchmark.vocabulary import build_tokenizer

CPU = torch.device("cpu")


def make_model(kind: str = "qwen2", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(build_tokenizer()),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,  # transformers keeps the input embedding of the padding token from training
    }
    if kind == "llama":
        make_config: Any = transformers.LlamaConfig
        return transformers.LlamaForCausalLM(make_config(**settings, tie_word_embeddings=False)).float().train()
    if kind == "qwen3":
        make_config = transformers.Qwen3Config
        return transformers.Qwen3ForCausalLM(make_config(**settings, head_dim=8, tie_word_embeddings=True)).float()
    make_config = transformers.Qwen2Config
    return transformers.Qwen2ForCausalLM(make_config(**settings, tie_word_embeddings=True)).float().train()


def both(kind: str = "qwen2", **settings: Any) -> tuple[NativeBackend, TransformersBackend]:
    policy = Policy(make_model(kind), build_tokenizer())
    return (
        NativeBackend(policy, BackendConfig(**settings)),
        TransformersBackend(policy, BackendConfig(name="transformers", **settings)),
    )


def request(counts: list[int], temperature: float = 1.0, max_tokens: int = 12) -> Request:
    random = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 30, (length,), generator=random) for length in (3, 7, 1, 5)]
    total = sum(counts)
    keys = np.arange(total, dtype=np.uint64) + np.uint64(17)
    return Request(prompts, np.array(counts), keys, np.zeros(total, dtype=np.int64), max_tokens, temperature)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("rows", [3, 256])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_the_same_streams_give_the_same_rollouts_in_both_backends(kind: str, temperature: float, rows: int) -> None:
    native, other = both(kind, rows_per_decode=rows)
    asked = request([4, 0, 3, 6], temperature)
    expected, found = native.generate(asked), other.generate(asked)
    for name in ("prompt_tokens", "prompt_length", "prompt", "tokens", "length", "finished"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert relative(found.log_prob, expected.log_prob) < 1e-5
    assert expected.finished.any()
    assert not expected.finished.all()
    assert other.usage.tokens_generated == len(found.tokens)
    assert other.usage.prompt_tokens == 16
    assert other.usage.requests == 1
    assert other.policy.model.training


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_scores_and_gradients_are_those_of_the_native_forward(
    kind: str, temperature: float, checkpointing: bool
) -> None:
    native, other = both(kind)
    if checkpointing:
        other.policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = native.generate(request([4, 0, 3, 6]))
    random = torch.Generator().manual_seed(5)
    on_log_prob, on_entropy = torch.randn(2, len(batch.tokens), generator=random)
    gradients: list[Tensor] = []
    seen = []
    for backend in (native, other):
        backend.policy.model.zero_grad()
        scored = backend.score(batch, temperature)
        (on_log_prob * scored.log_prob + on_entropy * scored.entropy).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backend.policy.model.parameters()]))
        seen.append(scored)
    for name in ("log_prob", "entropy", "sum_p2", "sum_p2_log_p"):
        assert relative(getattr(seen[1], name).detach(), getattr(seen[0], name).detach()) < 1e-5
    assert relative(gradients[1], gradients[0]) < 1e-4


@pytest.mark.parametrize("limit", [1, 20, 30, 1000])
def test_pieces_hold_every_token_once_in_order_and_keep_to_the_limit(limit: int) -> None:
    batch = both()[0].generate(request([4, 0, 3, 6]))
    for cut in (by_prompts, by_rollouts):
        pieces = cut(batch, limit)
        assert torch.equal(
            torch.cat([torch.arange(len(batch.tokens))[p.place] for p in pieces]), torch.arange(len(batch.tokens))
        )
        assert torch.equal(torch.cat([piece.rollouts.tokens for piece in pieces]), batch.tokens)
        assert torch.equal(torch.cat([piece.rollouts.log_prob for piece in pieces]), batch.log_prob)
        for piece in pieces:
            rows = piece.rollouts
            assert piece.cost <= limit or (len(rows) == 1 if cut is by_rollouts else rows.prompts == 1)
    prompts = torch.split(batch.prompt_tokens, batch.prompt_length.tolist())
    owners = [prompts[p].tolist() for p in batch.prompt.tolist()]
    read = [
        ids.tolist()
        for piece in by_rollouts(batch, limit)
        for ids in torch.split(piece.rollouts.prompt_tokens, piece.rollouts.prompt_length.tolist())
    ]
    assert read == owners


def test_pieces_add_up_to_the_whole_gradient() -> None:
    backend = both()[1]
    batch = backend.generate(request([4, 0, 3, 6]))
    weight = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(5))

    def gradient(pieces: list[Piece]) -> Tensor:
        backend.policy.model.zero_grad()
        for piece in pieces:
            (weight[piece.place] * backend.score(piece.rollouts, 1.0).log_prob).sum().backward()
        return torch.cat([p.grad.flatten() for p in backend.policy.model.parameters()])

    whole = gradient([Piece(batch, slice(0, len(batch.tokens)))])
    for cut in (by_rollouts, by_length):
        assert relative(gradient(cut(batch, 20)), whole) < 1e-5


@pytest.mark.parametrize("limit", [1, 20, 30, 1000])
def test_pieces_by_length_are_rectangles_that_hold_every_token_once(limit: int) -> None:
    batch = both()[0].generate(request([4, 0, 3, 6]))
    pieces = by_length(batch, limit)
    place = torch.cat([torch.arange(len(batch.tokens))[piece.place] for piece in pieces])
    assert torch.equal(place.sort().values, torch.arange(len(batch.tokens)))
    assert torch.equal(torch.cat([piece.rollouts.tokens for piece in pieces]), batch.tokens[place])
    lengths = [(p.rollouts.prompt_length[p.rollouts.prompt] + p.rollouts.length).tolist() for p in pieces]
    assert all(a >= b for a, b in pairwise(chain.from_iterable(lengths)))
    assert all(len(rows) * rows[0] <= limit or len(rows) == 1 for rows in lengths)
    for piece in pieces:
        rows = torch.searchsorted(batch.length.cumsum(0), piece.place, right=True).unique_consecutive()
        prompts = batch.prompt_tokens[ragged_index(batch.prompt[rows], batch.prompt_length)]
        assert torch.equal(piece.rollouts.prompt_tokens, prompts)


def test_an_architecture_that_only_transformers_knows(tmp_path: Path) -> None:
    policy = Policy(make_model("qwen3"), build_tokenizer())
    backend = TransformersBackend(policy, BackendConfig(name="transformers"))
    batch = backend.generate(request([4, 0, 3, 6]))
    prompts = torch.split(batch.prompt_tokens, batch.prompt_length.tolist())
    expected = []
    for p, tokens in zip(batch.prompt.tolist(), torch.split(batch.tokens, batch.length.tolist()), strict=True):
        sequence = torch.cat([prompts[p], tokens])
        logits = policy.model(sequence[None]).logits[0, len(prompts[p]) - 1 : -1]
        expected.append(logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1))
    assert relative(batch.log_prob, torch.cat(expected).detach()) < 1e-5
    assert relative(backend.score(batch, 1.0).log_prob.detach(), torch.cat(expected).detach()) < 1e-5
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="architecture"):
        Policy.load(tmp_path, CPU)
    Policy.load(tmp_path, CPU, backend=BackendConfig(name="transformers"))


def test_bfloat16_passes_over_float32_weights() -> None:
    native, _ = both()
    policy = native.policy
    backend = make(policy, BackendConfig(name="transformers", dtype="bfloat16"))
    assert not backend.exact
    batch = backend.generate(request([4, 0, 3, 6]))
    scored, exact = backend.score(batch, 1.0), native.score(batch, 1.0)
    assert 1e-6 < relative(scored.log_prob.detach(), exact.log_prob.detach()) < 0.05
    gradients = []
    for seen in (scored, exact):
        policy.model.zero_grad()
        seen.log_prob.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert relative(gradients[0], gradients[1]) < 0.1


def test_adapters_train_and_nothing_else(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    config = BackendConfig(name="transformers", gradient_checkpointing=True)
    policy = Policy.load(tmp_path, CPU, backend=config, lora=LoRAConfig(rank=4))
    assert policy.parameters()
    assert all("lora_" in name for name in policy.parameters())
    backend, plain = make(policy, config), both()[1]
    batch = backend.generate(request([4, 0, 3, 6]))
    # Fresh adapters add nothing.
    plain.policy.model.load_state_dict(transformers.Qwen2ForCausalLM.from_pretrained(tmp_path).state_dict())
    assert torch.equal(batch.tokens, plain.generate(request([4, 0, 3, 6])).tokens)
    backend.score(batch, 1.0).log_prob.sum().backward()
    trained = [name for name, value in policy.model.named_parameters() if value.grad is not None]
    assert sorted(trained) == sorted(policy.parameters())
    assert any(float(value.grad.abs().max()) > 0 for value in policy.parameters().values() if value.grad is not None)
    policy.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"gradient_checkpointing": True}, {"name": "transformer"}])
def test_what_a_backend_cannot_do_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BackendConfig(**settings)


def test_templates_put_the_problem_and_give_the_answer_its_first_words() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}({{ m.role[0] }}){{ m.content }};{% endfor %}:"
    plain = Policy(None, tokenizer)
    assert plain.render("Compute 1+2.") == "Compute 1+2."
    assert plain.decode([[plain.end]]) == [""]
    template = TemplateConfig(chat=True, system="s", user="Solve {problem}?", prefix="\\boxed{")
    chat = Policy(None, tokenizer, template)
    assert chat.render("1+2") == "(s)s;(u)Solve 1+2?;:\\boxed{"
    assert chat.decode(tokenizer(["3}"])["input_ids"]) == ["\\boxed{3}"]
    unboxed = Policy(None, tokenizer, TemplateConfig(prefix="= ", answer="-?[0-9]+"))
    ids = [tokenizer([text])["input_ids"][0] for text in ("-3, 4", ";;")]
    assert unboxed.decode(ids) == ["= -3, 4 \\boxed{-3}", "= ;;"]
    for wrong in ({"user": "no problem here"}, {"answer": "("}):
        with pytest.raises(ValidationError):
            TemplateConfig(**wrong)


def test_a_head_that_is_more_than_a_matrix_is_refused() -> None:
    model = make_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(InputError, match="head"):
        make(Policy(model, build_tokenizer()), BackendConfig(name="transformers"))


def test_backends_share_one_interface() -> None:
    assert all(isinstance(backend, Backend) for backend in both())


def test_a_missing_vllm_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=re.escape(install_line("vllm"))):
        make(both()[1].policy, BackendConfig(name="vllm"), "nowhere")


def test_a_server_that_is_not_there_is_an_input_error() -> None:
    config = BackendConfig(name="vllm", vllm=VLLMConfig(url="http://127.0.0.1:9", start_seconds=0))
    with pytest.raises(InputError, match="vllm_server"):
        make(both()[1].policy, config)


def test_the_server_command_lets_the_user_overrule_and_refuses_no_model() -> None:
    line = command(["model", "--port", "8001", "--host=0.0.0.0"])
    assert line[3:7] == ["--model", "model", "--port", "8001"]
    assert "127.0.0.1" not in line
    assert line[line.index("--logprobs-mode") + 1] == "processed_logprobs"
    with pytest.raises(InputError):
        command(["--port", "8001"])


def test_a_sampler_gets_merged_adapters_and_plain_names(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    config = BackendConfig(name="transformers")
    policy = Policy.load(tmp_path, CPU, backend=config, lora=LoRAConfig(rank=4))
    plain = make_model()
    assert merged(policy.model, torch.float32).keys() == dict(plain.named_parameters()).keys()
    with torch.no_grad():
        for value in policy.parameters().values():
            value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2)))
    plain.load_state_dict(merged(policy.model, torch.float32), strict=False)
    asked = request([4, 0, 3, 6])
    with_adapters = make(policy, config).generate(asked)
    without = make(Policy(plain, policy.tokenizer), config).generate(asked)
    assert torch.equal(with_adapters.tokens, without.tokens)
    assert relative(without.log_prob, with_adapters.log_prob) < 1e-4


@pytest.mark.parametrize("cap", [None, 2.0])
def test_updates_start_from_the_trainers_log_probabilities_and_correct_for_the_samplers(
    tmp_path: Path, cap: float | None
) -> None:
    gradients, metrics = {}, {}
    for name in ("exact", "off"):
        policy = Policy(make_model(), build_tokenizer())
        backend = NativeBackend(policy, BackendConfig(importance_cap=cap))
        batch = backend.generate(request([4, 0, 3, 6]))
        # The sampler gave the first half of the tokens e times less, the others e^-1/2 times, than the trainer.
        shift = torch.where(torch.arange(len(batch.tokens)) < len(batch.tokens) // 2, 1.0, -0.5)
        if name == "off":
            backend.exact = False
            batch = replace(batch, log_prob=batch.log_prob - shift)
        reward = (torch.arange(len(batch)) % 2).float()
        config = OptimiserConfig(minibatches_per_batch=1, gradient_clip=1e9)
        updater = Updater(
            build("grpo", {"loss": {"clip": False, "aggregation": "constant_length"}}),
            backend,
            optimiser.make(policy, config),
            config,
            1.0,
            0,
            Ledger(tmp_path / f"{name}.jsonl"),
            Prices(1),
            Clock(CPU),
        )
        groups = Groups(batch.prompt, batch.prompts, reward, batch.length, ~batch.finished, 12)
        metrics[name] = updater.update(0, Batch(batch, groups))
        gradients[name] = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
        assert updater.ledger.spent["tokens_scored"] == (len(batch.tokens) if name == "off" else 0)
    half = len(shift) // 2
    assert metrics["off"]["policy/logprob_abs_diff"] == pytest.approx(float(shift.abs().mean()), rel=1e-4)
    assert metrics["off"]["policy/logprob_abs_diff_max"] == pytest.approx(1.0, rel=1e-4)
    assert metrics["off"]["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    if cap is None:
        assert relative(gradients["off"], gradients["exact"]) < 1e-4
        return
    assert metrics["off"]["policy/importance_truncated_fraction"] == pytest.approx(half / len(shift))
    # Weights min(e, 2) = 2 and e^-1/2 on the tokens of the exact gradient.
    policy = Policy(make_model(), build_tokenizer())
    seen = NativeBackend(policy, BackendConfig()).score(batch, 1.0)
    advantage = build("grpo", {}).credit(groups).repeat_interleave(batch.length)
    weight = torch.where(shift > 0, 2.0, float(np.exp(-0.5))) / (12 * len(batch))
    (-(weight * advantage * seen.log_prob)).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    assert relative(gradients["off"], expected) < 1e-4


@pytest.mark.parametrize("gpu", [True, False])
def test_an_engine_in_this_process_gets_its_gpus_and_gives_their_memory_back(
    gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class FakeLLM:
        def __init__(self, **options: Any) -> None:
            calls.append(options)

        def __getattr__(self, name: str) -> Any:
            return lambda *given, **options: [calls.append((name, options.get("level")))] and [""]

    module = SimpleNamespace(LLM=FakeLLM, SamplingParams=dict, TokensPrompt=dict)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(("empty_cache", None)))
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, "0")
    settings = VLLMConfig(tensor_parallel=4, memory_fraction=0.3, max_model_len=256, exchange=str(tmp_path))
    backend = make(both()[1].policy, BackendConfig(name="vllm", dtype="bfloat16", vllm=settings), "somewhere")
    options = calls.pop(0)
    assert (options["model"], options["dtype"], options["tensor_parallel_size"]) == ("somewhere", "bfloat16", 4)
    assert options["max_model_len"] == 256
    assert options["logprobs_mode"] == "processed_logprobs"
    assert options.get("gpu_memory_utilization") == (0.3 if gpu else None)
    assert options.get("enable_sleep_mode", False) is gpu
    backend.load_weights()
    backend.rest()
    awake, asleep = ([("empty_cache", None), ("wake_up", None)], [("sleep", 2)]) if gpu else ([], [])
    assert calls == [*awake, ("collective_rpc", None), ("reset_prefix_cache", None), *asleep]
    backend.close()


def test_an_engine_in_each_process_of_one_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(InputError, match="vllm_server"):
        make(both()[1].policy, BackendConfig(name="vllm"), "somewhere")
