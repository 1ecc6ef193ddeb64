"""Token weights and the surrogate against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from benchmark.losses import policy_loss, surrogate, token_weights
from benchmark.method import Loss, TokenCredit
from benchmark.rollouts import Rollouts

# Three prompts with 1, 2 and 0 rollouts of 2, 1 and 3 tokens; token limit 4.
BATCH = Rollouts(
    prompt_tokens=torch.zeros(3, dtype=torch.int64),
    prompt_length=torch.ones(3, dtype=torch.int64),
    prompt=torch.tensor([0, 1, 1]),
    tokens=torch.zeros(6, dtype=torch.int64),
    length=torch.tensor([2, 1, 3]),
    log_prob=torch.zeros(6),
    finished=torch.ones(3, dtype=torch.bool),
)
# Under equal prompt weights a rollout weighs mean(n) / n = 1.5 / n: 1.5, 0.75, 0.75.
CASES = {
    ("token_mean", "rollouts"): [1 / 6] * 6,
    ("sequence_mean", "rollouts"): [1 / 6, 1 / 6, 1 / 3, 1 / 9, 1 / 9, 1 / 9],
    ("constant_length", "rollouts"): [1 / 12] * 6,
    ("token_mean", "equal"): [1.5 / 6, 1.5 / 6, 0.75 / 6, 0.75 / 6, 0.75 / 6, 0.75 / 6],
    ("sequence_mean", "equal"): [0.25, 0.25, 0.25, 1 / 12, 1 / 12, 1 / 12],
    ("constant_length", "equal"): [1.5 / 12, 1.5 / 12, 0.75 / 12, 0.75 / 12, 0.75 / 12, 0.75 / 12],
}
MASKED = {
    "token_mean": [1 / 3, 0, 0, 1 / 3, 0, 1 / 3],
    "sequence_mean": [1 / 3, 0, 0, 1 / 6, 0, 1 / 6],
    "constant_length": [1 / 12, 0, 0, 1 / 12, 0, 1 / 12],
}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_token_weights(case: tuple[str, str]) -> None:
    loss = Loss(aggregation=case[0], prompt_weight=case[1])  # type: ignore[arg-type]
    assert token_weights(BATCH, loss, max_tokens=4).tolist() == pytest.approx(CASES[case], rel=1e-6)


@pytest.mark.parametrize("aggregation", MASKED)
def test_masked_tokens_count_neither_above_nor_below(aggregation: str) -> None:
    mask = torch.tensor([True, False, False, True, False, True])
    loss = Loss(aggregation=aggregation)  # type: ignore[arg-type]
    assert token_weights(BATCH, loss, 4, mask).tolist() == pytest.approx(MASKED[aggregation], rel=1e-6)


@pytest.mark.parametrize("aggregation", MASKED)
def test_equal_groups_make_prompt_weights_equal_bit_for_bit(aggregation: str) -> None:
    batch = Rollouts(
        torch.zeros(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.int64),
        torch.arange(3).repeat_interleave(7),
        torch.zeros(21 * 3, dtype=torch.int64),
        torch.full((21,), 3),
        torch.zeros(63),
        torch.ones(21, dtype=torch.bool),
    )
    weights = [token_weights(batch, Loss(aggregation=aggregation, prompt_weight=w), 5) for w in ("rollouts", "equal")]  # type: ignore[arg-type]
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.1, 2.0, -2.2, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # clipped above at 1.2
        (0.5, 2.0, -1.0, -2.0),  # the way back is never clipped
        (1.1, -2.0, 2.2, 2.0),
        (0.5, -2.0, 1.6, 0.0),  # clipped below at 0.8
        (1.5, -2.0, 3.0, 2.0),
        (4.0, -2.0, 6.0, 0.0),  # dual clip at 3
        (4.0, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_surrogate_and_its_gradient(ratio: float, advantage: float, expected: float, slope: float) -> None:
    old = torch.tensor([-1.0], dtype=torch.float64)
    log_prob = (old + math.log(ratio)).requires_grad_()
    value = surrogate(log_prob, old, torch.tensor([advantage], dtype=torch.float64), Loss(dual_clip=3.0))
    assert value.item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(value, log_prob)
    assert gradient.item() == pytest.approx(slope * ratio)


def test_dual_clip_and_clip_can_be_off_and_the_clip_range_uneven() -> None:
    old, log_prob = torch.zeros(2), torch.tensor([math.log(40.0)] * 2)
    advantage = torch.tensor([-1.0, 1.0])
    assert surrogate(log_prob, old, advantage, Loss()).tolist() == pytest.approx([10.0, -1.2])
    assert surrogate(log_prob, old, advantage, Loss(dual_clip=None)).tolist() == pytest.approx([40.0, -1.2])
    assert surrogate(log_prob, old, advantage, Loss(clip_high=0.28)).tolist() == pytest.approx([10.0, -1.28])
    assert surrogate(log_prob, old, advantage, Loss(clip=False)).tolist() == pytest.approx([40.0, -40.0])


def test_policy_loss_adds_penalty_and_entropy_bonus() -> None:
    old = torch.tensor([-1.0, -2.0])
    log_prob = torch.tensor([-1.0 + math.log(1.1), -2.0 + math.log(0.9)])
    entropy, weights = torch.tensor([0.5, 1.5]), torch.tensor([0.25, 0.75])
    credit = TokenCredit(torch.tensor([1.0, -2.0]), kl_coefficient=torch.tensor([0.0, 3.0]))
    value = policy_loss(log_prob, entropy, old, weights, credit, Loss(entropy_coefficient=0.1))
    first = -1.1 - 0.1 * 0.5
    second = 1.8 + 3.0 * -math.log(0.9) - 0.1 * 1.5
    assert value.item() == pytest.approx(0.25 * first + 0.75 * second, rel=1e-6)
