"""What is checked before the first step of a pretrained run: context, disk, the longest pass, the verifier."""

from __future__ import annotations

import weakref
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmark import preflight as checks
from benchmark.compose import compose_run
from benchmark.config import RunConfig
from benchmark.errors import InputError, RunError, StorageError
from benchmark.jsonl import read_rows
from benchmark.preflight import check_verifier, preflight
from benchmark.rollouts import Rollouts
from benchmark.run import Run, run_cell
from benchmark.verdict import Verdict
from benchmark.verifier import Verifier
from benchmark.warmup import ensure_policy

Usage = namedtuple("Usage", "total used free")


def settings(*more: str) -> RunConfig:
    path = ensure_policy(compose_run("grpo", scale="smoke"))
    return compose_run("grpo", scale="smoke", options=[f"policy.path={path}", *more])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(settings("backend.tokens_per_pass=1000"), tmp_path, lambda _: None)
    with made.verifier:
        yield made
    made.close()


def check(run: Run) -> None:
    pools = [run.collector.pool, run.evaluator.pool]
    preflight(run.backend, run.optimiser, pools, run.config.rollout, run.out)


def test_the_longest_pass_is_tried_and_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Rollouts] = []
    score = run.backend.score

    def watch(batch: Rollouts, temperature: float) -> Any:
        seen.append(batch)
        return score(batch, temperature)

    monkeypatch.setattr(run.backend, "score", watch)
    before = {name: value.detach().clone() for name, value in run.policy.parameters().items()}
    check(run)
    (batch,) = seen
    rollout = run.config.rollout
    longest = max(len(tokens) for pool in (run.collector.pool, run.evaluator.pool) for tokens in pool.tokens)
    assert set(batch.prompt_length.tolist()) == {longest}
    assert set(batch.length.tolist()) == {rollout.max_tokens}
    group = longest + rollout.rollouts_per_prompt * rollout.max_tokens
    tokens = len(batch.tokens) + len(batch.prompt_tokens)
    assert tokens <= 1000 < tokens + group
    assert all(torch.equal(before[name], value) for name, value in run.policy.parameters().items())
    assert all(value.grad is None for value in run.policy.parameters().values())
    assert not run.optimiser.adam.state


def test_a_pass_that_does_not_fit_names_what_to_lower(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(run.backend, "score", full)
    with pytest.raises(RunError, match=r"1000 tokens does not fit the memory: lower backend\.tokens_per_pass"):
        check(run)


@pytest.fixture
def sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run by transformers on a device that says when its memory is short."""
    monkeypatch.setattr(checks, "UNTRIED", ())
    made = Run(settings("backend.name=transformers", "backend.rows_per_decode=7"), tmp_path, lambda _: None)
    with made.verifier:
        yield made
    made.close()


def test_decoding_is_tried_at_its_widest_and_longest(sampler: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = sampler.backend
    hidden, shapes = backend._hidden, []

    def watch(tokens: Tensor, mask: Any, positions: Any, cache: Any) -> Tensor:
        states: Tensor = hidden(tokens, mask, positions, cache)
        if cache is not None:
            assert not backend.policy.model.training
            shapes.append([tuple(layer.keys.shape) for layer in cache.layers])
            assert torch.equal(positions[:, -1] + 1, torch.full((len(tokens),), mask.shape[1]))
        return states

    monkeypatch.setattr(backend, "_hidden", watch)
    check(sampler)
    rollout, shape = sampler.config.rollout, backend.policy.model.config
    longest = max(len(tokens) for pool in (sampler.collector.pool, sampler.evaluator.pool) for tokens in pool.tokens)
    width = longest + rollout.max_tokens
    size = shape.hidden_size // shape.num_attention_heads
    expected = (7, shape.num_key_value_heads, width, size)
    assert shapes[-1] == [expected] * shape.num_hidden_layers
    assert backend.policy.model.training
    assert backend.usage.tokens_generated == 0
    assert not sampler.optimiser.adam.state


def test_decoding_that_does_not_fit_names_what_to_lower(sampler: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sampler.backend, "rehearse", full)
    limit = sampler.config.rollout.max_tokens
    says = rf"decoding 7 rollouts of \d+ \+ {limit} tokens .* lower backend\.rows_per_decode"
    with pytest.raises(RunError, match=says):
        check(sampler)
    monkeypatch.setattr(checks, "UNTRIED", ("cpu",))
    check(sampler)


def test_prompts_that_do_not_fit_the_context_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = run.config.rollout.max_tokens + 3
    monkeypatch.setattr(run.policy.model.config, "max_position_embeddings", limit)
    with pytest.raises(InputError, match=rf"exceed the context of {limit}\. Lower it to"):
        check(run)


def test_a_full_disk_ends_a_run_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))
    with pytest.raises(StorageError, match="checkpoints and policy need"):
        run_cell(settings(), tmp_path)
    assert read_rows(tmp_path / "metrics.jsonl")[0] == []


def test_a_sampler_wakes_beside_what_the_optimiser_will_keep(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    held: list[weakref.ref[Tensor]] = []

    def reserve(value: Tensor) -> Tensor:
        made = torch.zeros_like(value)
        if order == ["rest"]:  # the pass has some of its own
            held.append(weakref.ref(made))
        return made

    def load_weights() -> None:
        order.append("wake")
        assert len(held) == 2 * len(run.policy.parameters())
        assert all(moment() is not None for moment in held)
        assert [one for one in seen if one() is not None] == []

    seen: list[weakref.ref[Tensor]] = []
    score = run.backend.score

    def watch(batch: Rollouts, temperature: float) -> Any:
        order.append("pass")
        found = score(batch, temperature)
        seen.extend(map(weakref.ref, (found.log_prob, batch.tokens)))
        return found

    monkeypatch.setattr(checks.torch, "empty_like", reserve)
    monkeypatch.setattr(run.backend, "rest", lambda: order.append("rest"))
    monkeypatch.setattr(run.backend, "score", watch)
    monkeypatch.setattr(run.backend, "load_weights", load_weights)
    check(run)
    assert order == ["rest", "pass", "wake"]
    assert all(moment() is None for moment in held)


@pytest.mark.parametrize("form", ["any", "integer"])
def test_a_verifier_that_works_passes(run: Run, form: Any) -> None:
    with Verifier(timeout_s=30, answer_form=form) as verifier:
        check_verifier(verifier, run.collector.pool)


def test_a_verifier_that_does_not_answer_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with Verifier(answer_form="any") as verifier:
        monkeypatch.setattr(verifier._pool, "compare", lambda pairs: [Verdict.TIMEOUT] * len(pairs))
        with pytest.raises(RunError, match="the verifier calls right answers timeout, correct"):
            check_verifier(verifier, run.collector.pool)
