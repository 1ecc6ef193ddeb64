"""Gradients of single rollouts: every path against autograd on a small model."""

from __future__ import annotations

import pytest
import torch

from benchmark.decode import generate
from benchmark.policy import Policy
from benchmark.rollout_gradients import (
    flatten,
    last_layer_gram,
    places,
    reference_gradients,
    rollout_gradients,
    sketch,
)
from benchmark.rollouts import Rollouts
from benchmark.scoring import score

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def policy(uneven_policy: Policy) -> Policy:
    return uneven_policy


def drawn(policy: Policy, each: int, seed: int = 0) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    length = torch.tensor([3, 5])
    return generate(
        policy.fused(),
        torch.randint(3, 20, (int(length.sum()),), generator=generator),
        length,
        torch.tensor([each, each]),
        torch.rand(2 * each, 9, generator=generator),
        max_tokens=9,
        ends=policy.ends,
        temperature=TEMPERATURE,
    )


def test_per_rollout_gradients_are_those_of_autograd(policy: Policy) -> None:
    rollouts = drawn(policy, 6)
    assert len(set(rollouts.length.tolist())) > 1
    exact = reference_gradients(policy.fused(), rollouts, TEMPERATURE)
    found = rollout_gradients(policy.fused(), rollouts, TEMPERATURE)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_their_sum_is_the_gradient_with_respect_to_the_parameters(policy: Policy) -> None:
    rollouts = drawn(policy, 4)
    total = score(policy.fused(), rollouts, temperature=TEMPERATURE).log_prob.sum()
    pieces = torch.autograd.grad(total, list(policy.parameters().values()))
    own = rollout_gradients(policy.fused(), rollouts, TEMPERATURE).sum(0)
    assert own.numel() == sum(piece.numel() for piece in pieces) == flatten(policy.fused()).numel()
    assert float(own.norm()) == pytest.approx(float(torch.cat([p.flatten() for p in pieces]).norm()), rel=1e-4)
    embedding = own[places(policy.fused())["embedding"]]
    torch.testing.assert_close(embedding, pieces[0].flatten(), rtol=1e-3, atol=1e-4)


def test_other_rollouts_of_the_batch_change_nothing(policy: Policy) -> None:
    both = rollout_gradients(policy.fused(), drawn(policy, 3), TEMPERATURE)
    second = rollout_gradients(policy.fused(), drawn(policy, 3).select_prompts(torch.tensor([1])), TEMPERATURE)
    torch.testing.assert_close(both[3:], second, rtol=1e-4, atol=1e-5)


def test_untied_head_has_coordinates_of_its_own(policy: Policy) -> None:
    from dataclasses import replace

    weights = policy.fused()
    untied = replace(weights, head=(weights.head * 1.1).detach().requires_grad_())
    rollouts = drawn(policy, 3)
    assert places(untied)["head"].stop == flatten(weights).numel() + weights.head.numel()
    exact = reference_gradients(untied, rollouts, TEMPERATURE)
    torch.testing.assert_close(rollout_gradients(untied, rollouts, TEMPERATURE), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4, 5, 100])
def test_last_layer_gram_is_that_of_the_heads_gradient(policy: Policy, rows: int) -> None:
    from dataclasses import replace

    weights = policy.fused()
    untied = replace(weights, head=weights.head.detach().clone().requires_grad_())
    rollouts = drawn(policy, 5)
    head = reference_gradients(untied, rollouts, TEMPERATURE)[:, places(untied)["head"]]
    found = last_layer_gram(weights, rollouts, TEMPERATURE, rows)
    torch.testing.assert_close(found, head @ head.T, rtol=1e-4, atol=1e-4)


def test_sketch_is_unbiased_within_its_stated_error(policy: Policy) -> None:
    G = rollout_gradients(policy.fused(), drawn(policy, 4), TEMPERATURE).double()
    K, width, repeats = G @ G.T, 64, 400
    found = torch.stack([(s := sketch(G, width, seed)) @ s.T for seed in range(repeats)])
    squares = torch.diag(K)
    variance = (squares[:, None] * squares + K**2 - 2 * (G**2) @ (G**2).T) / width
    error = (variance / repeats).sqrt()
    assert ((found.mean(0) - K).abs() < 4.5 * error).all()
    spread = found.var(0) / variance
    assert float(spread.mean()) == pytest.approx(1.0, abs=0.15)
    assert float((found.std(0).diag() / squares).mean()) < (2 / width) ** 0.5 * 1.1
