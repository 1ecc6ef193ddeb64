"""A rollout ends with any of the ids that its model, its tokenizer or its chat template ends answers with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from benchmark import backend_vllm
from benchmark.backend import Request, make
from benchmark.backend_vllm import Answer, Engine
from benchmark.config_model import BackendConfig, TemplateConfig, VLLMConfig
from benchmark.policy import Policy
from benchmark.rollouts import Rollouts
from benchmark.vocabulary import build_tokenizer

CPU = torch.device("cpu")
LIMIT = 12
CHAT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }} <|turn|>{% endfor %}a:"


def saved(folder: Path, ends: int | list[int] | None, **changes: Any) -> Path:
    """A tiny model whose generation configuration has the ids `ends`, and a tokenizer whose own is 1."""
    tokenizer = build_tokenizer()
    if "chat_template" in changes:
        tokenizer.chat_template = changes.pop("chat_template")
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    torch.manual_seed(0)
    make_config: Any = transformers.Qwen2Config
    config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=ends,
        tie_word_embeddings=True,
    )
    Policy(transformers.Qwen2ForCausalLM(config), tokenizer).save(folder)
    return folder


def asked() -> Request:
    prompts, counts = [torch.tensor(ids) for ids in ([3, 9, 4], [8], [7, 6, 11, 5])], np.array([40, 0, 60])
    return Request(prompts, counts, np.arange(100, dtype=np.uint64), np.zeros(100, dtype=np.int64), LIMIT, 1.0)


def check(batch: Rollouts, ends: list[int]) -> None:
    """Every rollout stops at its first end, which it holds, or at the limit."""
    of_ends = torch.isin(batch.tokens, torch.tensor(ends))
    last = torch.cumsum(batch.length, 0) - 1
    assert torch.equal(of_ends[last], batch.finished)
    assert int(of_ends.sum()) == int(batch.finished.sum())
    assert set(batch.tokens[last][batch.finished].tolist()) == set(ends)
    assert set(batch.length[~batch.finished].tolist()) == {LIMIT}


@pytest.mark.parametrize("name", ["native", "transformers"])
@pytest.mark.parametrize("ends", [[1, 5], [5, 7], 5])
def test_each_declared_id_ends_a_rollout_and_survives_saving(tmp_path: Path, ends: Any, name: Any) -> None:
    config = BackendConfig(name=name)
    Policy.load(saved(tmp_path / "read", ends), CPU, backend=config).save(tmp_path / "again")
    policy = Policy.load(tmp_path / "again", CPU, backend=config)
    assert policy.end == 1
    assert policy.ends == tuple(dict.fromkeys([1, *([ends] if isinstance(ends, int) else ends)]))
    backend = make(policy, config)
    batch = backend.generate(asked())
    check(batch, list(policy.ends))
    assert backend.usage.tokens_generated == len(batch.tokens)
    scored = backend.score(batch, 1.0).log_prob.detach()
    assert float((scored - batch.log_prob).abs().max()) < 1e-5


@pytest.mark.parametrize("ends", [None, 1, [1]])
def test_a_model_with_the_tokenizers_end_only_has_one(tmp_path: Path, ends: Any) -> None:
    assert Policy.load(saved(tmp_path / "read", ends), CPU).ends == (1,)


def test_the_special_token_behind_an_answer_of_the_chat_template_ends_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "read", 1, chat_template=CHAT)
    plain, chat = (Policy.load(folder, CPU, template=TemplateConfig(chat=chat)) for chat in (False, True))
    turn = chat.tokenizer.convert_tokens_to_ids("<|turn|>")
    assert plain.ends == (1,)
    assert chat.ends == (1, turn)
    assert chat.model.generation_config.eos_token_id == [1, turn]
    check(make(chat, BackendConfig()).generate(asked()), [1, turn])


def test_a_chat_template_that_ends_answers_with_plain_text_adds_no_end(tmp_path: Path) -> None:
    folder = saved(tmp_path / "read", 1, chat_template=CHAT.replace("<|turn|>", ";"))
    assert Policy.load(folder, CPU, template=TemplateConfig(chat=True)).ends == (1,)


def test_the_verifier_reads_an_answer_without_the_token_that_ended_it(tmp_path: Path) -> None:
    policy = Policy.load(saved(tmp_path / "read", [1, 5]), CPU)
    five, seven = policy.pieces([5, 7])
    assert policy.decode([[5, 7], [7, 5], [7, 1], [5], [7, 7]]) == [five + seven, seven, seven, "", seven + seven]


class Scripted(Engine):
    """Stands for vLLM: keeps what it was asked for, and stops there."""

    def __init__(self, _: VLLMConfig) -> None:
        self.settings: list[dict[str, Any]] = []

    def sample(self, prompts: list[list[int]], settings: list[dict[str, Any]]) -> list[Answer]:
        self.settings += settings
        return [Answer([7, one["stop_token_ids"][-1]], [-1.0, -1.0], True) for one in settings]

    def load(self, file: Path) -> None:
        raise NotImplementedError


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setattr(backend_vllm, "_Server", Scripted)
    config = BackendConfig(name="vllm", vllm=VLLMConfig(url="http://127.0.0.1:9"))
    made = make(Policy.load(saved(tmp_path / "read", [1, 5]), CPU, backend=config), config)
    yield made
    made.close()


def test_vllm_is_told_every_id_that_ends_a_rollout(engine: Any) -> None:
    batch = engine.generate(asked())
    assert len(engine.engine.settings) == 100
    assert all(one["stop_token_ids"] == [1, 5] for one in engine.engine.settings)
    assert batch.texts() == [[7, 5]] * 100
    assert batch.finished.all()
