"""What is measured of prompts and their gradients, against one backward pass of autograd per rollout."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmark import probing
from benchmark.layout import prompt_layout
from benchmark.policy import Policy
from benchmark.probing import LEAST_SIGNAL, alignment, gradient_norms, group_gradients, halves, prompt_features
from benchmark.rollout_gradients import places, reference_gradients
from benchmark.rollouts import Rollouts
from benchmark.scoring import forward_hidden
from benchmark.transformer import Weights

TEMPERATURE = 0.7
# Halves all right and all wrong; all wrong; no rollout; mixed halves, of 3 and of 2.
OUTCOMES = [[1, 0, 1, 0], [0, 0, 0], [], [1, 1, 0, 0, 0]]
TRUSTED = [[1, 1, 0, 0, 0, 1], [0, 1, 1, 0]]
Array = np.ndarray


@pytest.fixture(scope="module")
def policy(uneven_policy: Policy) -> Policy:
    return uneven_policy


@pytest.fixture(params=[64, 3])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts at a time, and one at a time."""
    monkeypatch.setattr(probing, "CHUNK", request.param)


def batch(outcomes: list[list[int]], seed: int) -> Rollouts:
    """Random prompts of different lengths with a random rollout of different length per outcome."""
    random = torch.Generator().manual_seed(seed)
    size = torch.tensor([len(row) for row in outcomes])
    rows = int(size.sum())
    asked = torch.randint(2, 6, (len(outcomes),), generator=random)
    length = torch.randint(1, 6, (rows,), generator=random)
    return Rollouts(
        torch.randint(3, 20, (int(asked.sum()),), generator=random),
        asked,
        torch.arange(len(outcomes)).repeat_interleave(size),
        torch.randint(3, 20, (int(length.sum()),), generator=random),
        length,
        torch.zeros(int(length.sum())),
        torch.ones(rows, dtype=torch.bool),
    )


def standard(rewards: list[int]) -> list[float]:
    """GRPO's advantages of one group."""
    r = np.array(rewards, dtype=float)
    deviation = r.std(ddof=1) if len(r) > 1 else 0.0
    return ((r - r.mean()) / (deviation + 1e-6)).tolist() if len(r) else []


def credited(outcomes: list[list[int]]) -> Tensor:
    """Advantages (R, 2) in the group and in its even or odd half."""
    rows = []
    for group in outcomes:
        split = [standard(group[0::2]), standard(group[1::2])]
        rows += [(a, split[j % 2][j // 2]) for j, a in enumerate(standard(group))]
    return torch.tensor(rows, dtype=torch.float32)


def expected_gradients(weights: Weights, rollouts: Rollouts, outcomes: list[list[int]]) -> Array:
    """(P, 3, D): of every group, its even and its odd half, by a loop; 0 without a rollout."""
    G = reference_gradients(weights, rollouts, TEMPERATURE).double().numpy()
    found, first = np.zeros((len(outcomes), 3, G.shape[1])), 0
    for i, group in enumerate(outcomes):
        own = G[first : first + len(group)]
        for k, part in enumerate((slice(None), slice(0, None, 2), slice(1, None, 2))):
            if group[part]:
                found[i, k] = np.mean([a * g for a, g in zip(standard(group[part]), own[part], strict=True)], axis=0)
        first += len(group)
    return found


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("block", ["embedding", "head", "all"])
def test_gradient_norms_are_those_of_wrong_and_right_rollouts(policy: Policy, block: str, tied: bool) -> None:
    rollouts, weights = batch(OUTCOMES, 1), policy.fused()
    untied = replace(weights, head=weights.head.detach().clone().requires_grad_())
    weights = weights if tied else untied
    judge = untied if block == "head" else weights  # what flows through a tied head alone
    part = slice(None) if block == "all" else places(judge)[block]
    size = reference_gradients(judge, rollouts, TEMPERATURE)[:, part].norm(dim=1).tolist()
    right = [r for group in OUTCOMES for r in group]
    norm, square = gradient_norms(weights, rollouts, torch.tensor(right) > 0, block, TEMPERATURE)
    assert norm.shape == square.shape == (4, 2)
    for i in range(4):
        for kind in range(2):
            own = [s for s, p, r in zip(size, rollouts.prompt.tolist(), right, strict=True) if (p, r) == (i, kind)]
            assert norm[i, kind] == pytest.approx(np.mean(own) if own else 0.0, rel=1e-4)
            assert square[i, kind] == pytest.approx(np.mean(np.square(own)) if own else 0.0, rel=1e-4)
    assert (norm[0] > 0).all()
    assert norm[1, 1] == norm[2, 0] == norm[2, 1] == 0


@pytest.mark.usefixtures("chunk")
def test_gradients_of_groups_and_halves_are_those_of_autograd(policy: Policy) -> None:
    weights, rollouts = policy.fused(), batch(OUTCOMES, 1)
    assert halves(rollouts).tolist() == [0, 1, 0, 1, 2, 3, 2, 6, 7, 6, 7, 6]
    expected = expected_gradients(weights, rollouts, OUTCOMES)
    found = np.zeros_like(expected)
    seen: list[int] = []
    for prompts, gradient in group_gradients(weights, rollouts, credited(OUTCOMES), TEMPERATURE):
        found[prompts.numpy()] = gradient.numpy()
        seen += prompts.tolist()
    assert seen == [0, 1, 3]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found[0, 0]).max() > 0.01
    assert not found[0, 1:].any()  # halves without both outcomes
    assert not found[1].any()  # all wrong


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("seeds", "measured"), [((10, 6), True), ((1, 2), False)])
def test_alignment_is_that_of_the_groups_gradients(policy: Policy, seeds: tuple[int, int], measured: bool) -> None:
    """Where halves agree enough for an estimate of the signal, and where they do not."""
    weights, rollouts, trusted = policy.fused(), batch(OUTCOMES, seeds[0]), batch(TRUSTED, seeds[1])
    found = alignment(weights, rollouts, credited(OUTCOMES), trusted, credited(TRUSTED), TEMPERATURE)
    g = expected_gradients(weights, rollouts, OUTCOMES)
    v = expected_gradients(weights, trusted, TRUSTED).mean(0)
    expected = np.zeros((4, 3))
    for i in (0, 3):
        inner = g[i, 0] @ v[0]
        expected[i, :2] = inner, inner / (np.linalg.norm(g[i, 0]) * np.linalg.norm(v[0]))
    (_, a, b), (_, va, vb) = g[3], v
    own, mean = (a + b) / 2, (va + vb) / 2
    assert (a @ b > 0.25 * own @ own) == (va @ vb > 0.25 * mean @ mean) == measured
    signal = (a @ b) * (va @ vb) if measured else (own @ own) * (mean @ mean) / 16
    expected[3, 2] = own @ mean / math.sqrt(signal)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    # The first group has an advantage; its halves have none.
    assert abs(found[0, 1]) > 0.01
    assert np.abs(found[3]).min() > 0.01


def test_a_trusted_set_without_an_advantage_aligns_with_nothing(policy: Policy) -> None:
    weights, same = policy.fused(), [[1, 1, 1, 1], [0, 0]]
    found = alignment(weights, batch(OUTCOMES, 1), credited(OUTCOMES), batch(same, 2), credited(same), TEMPERATURE)
    assert found.tolist() == [[0.0] * 3] * 4


def doubled(rollouts: Rollouts) -> Rollouts:
    """Every rollout twice in a row, so that both halves of a group are what it was."""
    rows = torch.arange(len(rollouts)).repeat_interleave(2)
    return rollouts.select_rows(rows)


def test_alignment_in_closed_form(policy: Policy) -> None:
    weights, outcomes = policy.fused(), [[1, 0, 1, 0, 1]]
    rollouts = batch(outcomes, 4)
    twice, credit = doubled(rollouts), credited([[r for r in outcomes[0] for _ in range(2)]])
    # Aligned with itself, and with its opposite. Equal halves are signal alone: nothing to correct.
    for sign in (1, -1):
        found = alignment(weights, twice, credit, twice, sign * credit, TEMPERATURE)
        assert found[0, 1:] == pytest.approx([sign, sign], abs=1e-5)
    # One half without an advantage: <a, b> = 0, and |g'|^2 / 4 is what is taken for signal.
    mixed = [[1, 1, 0, 1]]
    one = alignment(weights, *(batch(mixed, 5), credited(mixed)) * 2, TEMPERATURE)
    assert one[0, 1:] == pytest.approx([1, 1 / LEAST_SIGNAL], abs=1e-4)
    # Halves that contradict each other: g' = (a - a) / 2 = 0.
    against = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    pair = doubled(batch([[1]], 6))
    assert alignment(weights, pair, against, pair, against, TEMPERATURE)[0] == pytest.approx(
        [float(reference_gradients(weights, pair, TEMPERATURE)[0].square().sum()), 1, 0], rel=1e-4, abs=1e-4
    )


def test_prompt_features_are_means_of_each_prompts_own_states(policy: Policy) -> None:
    """More prompts than one pass takes, of one to five tokens."""
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 20, (1 + i % 5,), generator=random) for i in range(260)]
    found = prompt_features(policy.fused(), prompts)
    assert found.shape == (260, 16)
    for i in (0, 1, 4, 255, 256, 259):
        hidden, _ = forward_hidden(policy.fused(), prompt_layout(prompts[i], torch.tensor([len(prompts[i])])))
        assert len(hidden) == len(prompts[i])
        np.testing.assert_allclose(found[i], hidden.detach().mean(0).numpy(), atol=1e-5)
