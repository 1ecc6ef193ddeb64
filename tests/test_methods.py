"""Every arm's decisions against examples worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmark import registry
from benchmark.groups import Groups
from benchmark.history import HistoryView
from benchmark.method import Loss, Method, Tokens
from methods.modulation import Compensation, Stabilisation, entropy_change

# Five prompts: 1 of 4 right, no rollout, a single right one, all right, none right.
PROMPT = torch.tensor([0, 0, 0, 0, 2, 3, 3, 4, 4])
REWARD = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
LENGTH = torch.tensor([4, 8, 9, 10, 10, 3, 10, 2, 10])
GROUPS = Groups(PROMPT, 5, REWARD, LENGTH, LENGTH == 10, 10)
DEAD = [0.0] * 5
# mean 1/4, standard deviation (n-1) 1/2: (1 - 1/4) / (1/2) and (0 - 1/4) / (1/2)
GRPO = [1.5, -0.5, -0.5, -0.5, *DEAD]

CREDIT = {
    "grpo": GRPO,
    "clip_higher": GRPO,
    "entropy_loss": GRPO,
    "fork_tokens": GRPO,
    "entropy_advantage": GRPO,
    "clip_cov": GRPO,
    "kl_cov": GRPO,
    "dynamo": GRPO,
    "dynamo_allocation": GRPO,
    "dynamo_modulation": GRPO,
    "dynamo_compensation": GRPO,
    "dynamo_stabilisation": GRPO,
    "dynamo_readme": GRPO,
    "dynamo_gradient": GRPO,
    "dynamo_released": GRPO,
    "dr_grpo": [0.75, -0.25, -0.25, -0.25, *DEAD],
    # r minus the mean of the others: 1 - 0, 0 - 1/3
    "rloo": [1.0, -1 / 3, -1 / 3, -1 / 3, *DEAD],
    "w_reinforce": [0.1, -1.0, -1.0, -1.0, 0.1, 0.1, 0.1, -1.0, -1.0],
    # Buffer 2 of 10 tokens: penalties 0, 0, 1/2, 1 | 1 | 0, 1 | 0, 1; shaped rewards 1, 0, -1/2, -1 have mean -1/8.
    "dapo": [
        *(np.array([1.125, 0.125, -0.375, -0.875]) / np.std([1, 0, -0.5, -1], ddof=1)).tolist(),
        0.0,
        math.sqrt(0.5),
        -math.sqrt(0.5),
        math.sqrt(0.5),
        -math.sqrt(0.5),
    ],
}


def close(found: Tensor, expected: list[float]) -> None:
    assert found.tolist() == pytest.approx(expected, abs=2e-5)


def test_every_registered_arm_has_an_example_somewhere() -> None:
    # Controls have theirs in test_controls.py, TRL in test_trl.py, arms beyond the main table in test_field*.py.
    arms = {name for name in registry.names() if registry.load(name).kind not in ("control", "external")}
    files = ("test_field.py", "test_field_sampling.py")
    field = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in files)
    assert {name for name in arms if name not in CREDIT and f'"{name}": ' not in field} == set()
    assert set(CREDIT) <= arms


@pytest.mark.parametrize("name", CREDIT)
def test_advantages(name: str) -> None:
    close(registry.build(name, {}).credit(GROUPS), CREDIT[name])


@pytest.mark.parametrize("name", CREDIT)
def test_only_dapo_drops_groups_and_empty_groups_never_train(name: str) -> None:
    kept = registry.build(name, {}).keep(GROUPS).tolist()
    everything = [True, False, True, True, True]
    assert kept == ([True, False, False, False, False] if name == "dapo" else everything)


def test_dapo_in_parts() -> None:
    off = registry.build("dapo", {"filter_groups": False, "overlong_factor": 0.0})
    close(off.credit(GROUPS), GRPO)
    assert off.max_draws == 1
    assert off.keep(GROUPS).tolist() == [True, False, True, True, True]
    assert registry.build("dapo", {}).max_draws == 10


LOSSES = {
    "clip_higher": Loss(clip_high=0.28),
    "dapo": Loss(clip_high=0.28),
    "dr_grpo": Loss(aggregation="constant_length"),
    "entropy_loss": Loss(entropy_coefficient=1e-3),
    "kl_cov": Loss(clip=False),
    "dynamo": Loss(prompt_weight="equal"),
    "dynamo_allocation": Loss(prompt_weight="equal"),
}


@pytest.mark.parametrize("name", CREDIT)
def test_losses_differ_from_the_reference_in_what_the_arm_says(name: str) -> None:
    method = registry.build(name, {})
    if name == "dynamo_readme":
        assert method.loss == Loss()
    elif name == "dynamo_released":
        assert method.loss == Loss(clip_high=0.28)
    elif name.startswith("dynamo"):  # harmless where the allocation is uniform
        assert method.loss == Loss(prompt_weight="equal")
    else:
        assert method.loss == LOSSES.get(name, Loss())


def tokens_of(
    advantage: list[float],
    log_prob: list[float] | None = None,
    old: list[float] | None = None,
    entropy: list[float] | None = None,
    uniform: list[float] | None = None,
    loss: Loss | None = None,
) -> Tokens:
    count = len(advantage)
    log_p = torch.tensor([-1.0] * count if log_prob is None else log_prob)
    return Tokens(
        torch.tensor(advantage),
        log_p,
        log_p if old is None else torch.tensor(old),
        torch.tensor([0.5] * count if entropy is None else entropy),
        torch.full((count,), 0.3),
        torch.full((count,), -0.2),
        torch.arange(count),
        torch.tensor([0.5] * count if uniform is None else uniform),
        Loss() if loss is None else loss,
    )


PLAIN = ["grpo", "dr_grpo", "rloo", "dapo", "clip_higher", "entropy_loss", "w_reinforce"]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_arms_repeat_the_rollouts_advantage(name: str) -> None:
    credit = registry.build(name, {}).modulate(tokens_of([1.5, -0.5, 0.0]))
    assert credit.advantage.tolist() == [1.5, -0.5, 0.0]
    assert credit.mask is None
    assert credit.kl_coefficient is None


def test_fork_tokens_keeps_the_most_uncertain_tokens() -> None:
    tokens = tokens_of([1.0] * 6, entropy=[0.1, 0.9, 0.3, 0.9, 0.2, 0.0])
    credit = registry.build("fork_tokens", {"fraction": 0.5}).modulate(tokens)
    assert credit.mask is not None
    assert credit.mask.tolist() == [False, True, True, True, False, False]
    # A fifth of six tokens rounds up to two.
    assert registry.build("fork_tokens", {}).modulate(tokens).mask.sum() == 2  # type: ignore[union-attr]
    tied = registry.build("fork_tokens", {"fraction": 0.1}).modulate(tokens).mask
    assert tied is not None
    assert tied.tolist() == [False, True, False, False, False, False]


def test_entropy_advantage_adds_a_bonus_that_never_turns_the_sign() -> None:
    tokens = tokens_of([1.0, 1.0, -1.0, -0.1, 0.0], entropy=[0.5, 3.0, 0.5, 3.0, 3.0])
    credit = registry.build("entropy_advantage", {}).modulate(tokens)
    close(credit.advantage, [1.2, 1.5, -0.8, -0.05, 0.0])


def test_clip_cov_removes_chosen_tokens_of_high_covariance() -> None:
    advantage = [2.0, 2.0, -1.0, 3.0, -0.5, -2.0, 0.5, -4.0]
    log_prob = [-1.0, -1.0, -2.5, 0.0, -3.0, -3.0, -1.0, -3.625]
    method = registry.build("clip_cov", {"fraction": 0.25})
    mean_a, mean_l = np.mean(advantage), np.mean(log_prob)
    assert (mean_a, mean_l) == (0.0, pytest.approx(-1.890625))
    uniform = [0.9, 0.2, 0.0, 0.0, 0.0, 0.4, 0.0, 0.0]
    credit = method.modulate(tokens_of(advantage, log_prob, uniform=uniform))
    covariance = (np.array(advantage) - mean_a) * (np.array(log_prob) - mean_l)
    assert [i for i, c in enumerate(covariance) if 1 < c < 5] == [0, 1, 5]
    # Two of eight tokens, the candidates with the smallest draws: 1 and 5.
    close(credit.advantage, [2.0, 0.0, -1.0, 3.0, -0.5, 0.0, 0.5, -4.0])
    # A token that PPO clips anyway is no candidate: ratio e at token 1.
    old = list(log_prob)
    old[1] -= 1.0
    close(method.modulate(tokens_of(advantage, log_prob, old, uniform=uniform)).advantage[:2], [0.0, 2.0])


def test_clip_cov_without_candidates_changes_nothing() -> None:
    advantage = [0.5, -0.5, 0.5]
    credit = registry.build("clip_cov", {}).modulate(tokens_of(advantage))
    close(credit.advantage, advantage)


def test_kl_cov_penalises_the_tokens_of_largest_covariance() -> None:
    tokens = tokens_of([1.0, 1.0, -1.0, -1.0], log_prob=[-0.5, -2.0, -0.6, -3.0])
    credit = registry.build("kl_cov", {"fraction": 0.5, "beta": 0.7}).modulate(tokens)
    assert credit.kl_coefficient is not None
    # cov = A (log pi + 1.525) = 1.025, -0.475, -0.925, 1.475
    close(credit.kl_coefficient, [0.7, 0.0, 0.0, 0.7])
    close(credit.advantage, [1.0, 1.0, -1.0, -1.0])
    one = registry.build("kl_cov", {}).modulate(tokens).kl_coefficient
    assert one is not None
    close(one, [0.0, 0.0, 0.0, 1.0])


def test_compensation_boosts_confident_correct_tokens() -> None:
    tokens = tokens_of([1.0, 1.0, 1.0, -1.0, 0.0], entropy=[0.0, 1.0, 2.0, 0.0, 0.0])
    close(Compensation(alpha=0.2)(tokens), [1.2, 1.1, 1.0, 1.0, 1.0])
    assert Compensation(alpha=0.0)(tokens).tolist() == [1.0] * 5
    assert Compensation()(tokens_of([1.0, 1.0])).tolist() == [1.0, 1.0]


def test_stabilisation_shrinks_the_largest_entropy_changes() -> None:
    # Ratio 1, equal statistics: |dH| is proportional to |A|, so x = 1, 1/2, 0.
    tokens = tokens_of([2.0, -1.0, 0.0])
    expected = [0.6 + 0.4 / (1 + math.exp(50 * (x - 0.99))) for x in (1.0, 0.5, 0.0)]
    close(Stabilisation()(tokens), expected)
    assert expected[0] == pytest.approx(0.75102, abs=1e-4)
    assert Stabilisation(floor=1.0)(tokens).tolist() == [1.0] * 3
    assert Stabilisation()(tokens_of([0.0, 0.0])).tolist() == pytest.approx([1.0, 1.0])


def test_the_entropy_change_of_a_clipped_token_is_zero() -> None:
    tokens = tokens_of([1.0, -1.0, -1.0], old=[-1.5, -0.5, -1.5])  # ratios e^.5, e^-.5, e^.5
    change = entropy_change(tokens).tolist()
    assert change[:2] == [0.0, 0.0]
    own = math.exp(-1.0) * (-1.0 + 0.5)
    assert change[2] == pytest.approx(math.exp(0.5) * (own - (-0.2 + 0.5 * 0.3)), rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_entropy_change_is_the_derivative_of_a_real_softmax(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, 9, generator=random, dtype=torch.float64) * 2
    taken = torch.randint(9, (12,), generator=random)
    advantage = torch.randn(12, generator=random, dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    log_prob = log_p.gather(1, taken[:, None]).squeeze(1)
    old = log_prob + 0.1 * torch.randn(12, generator=random, dtype=torch.float64)
    loss = Loss(clip_low=0.9, clip_high=9.0)
    entropy = -(p * log_p).sum(-1)
    tokens = Tokens(
        advantage,
        log_prob,
        old,
        entropy,
        (p * p).sum(-1),
        (p * p * log_p).sum(-1),
        torch.arange(12),
        torch.zeros(12),
        loss,
    )

    def entropy_after(step: float) -> Tensor:
        """A gradient step on each token's own logits: dz = step * r A * d log pi_a / dz."""
        direction = torch.nn.functional.one_hot(taken, 9) - p
        moved = (logits + step * (tokens.ratio * advantage)[:, None] * direction).log_softmax(-1)
        return -(moved.exp() * moved).sum(-1)

    step = 1e-5
    numeric = (entropy_after(step) - entropy_after(-step)) / (2 * step)
    torch.testing.assert_close(entropy_change(tokens), numeric, rtol=1e-6, atol=1e-8)


def test_dynamo_multiplies_both_factors_and_its_parts_are_its_ablations() -> None:
    tokens = tokens_of([1.0, 1.0, -2.0, 0.0], entropy=[0.1, 0.9, 0.5, 0.5])
    both = Compensation()(tokens) * Stabilisation()(tokens) * tokens.advantage
    assert not torch.equal(both, tokens.advantage)

    def modulated(name: str) -> Tensor:
        return registry.build(name, {}).modulate(tokens).advantage

    assert torch.equal(modulated("dynamo"), both)
    assert torch.equal(modulated("dynamo_modulation"), both)
    assert torch.equal(modulated("dynamo_compensation"), Compensation()(tokens) * tokens.advantage)
    assert torch.equal(modulated("dynamo_stabilisation"), Stabilisation()(tokens) * tokens.advantage)
    assert torch.equal(modulated("dynamo_allocation"), tokens.advantage)


def history(successes: list[float], trials: list[float]) -> HistoryView:
    visits = np.ones(len(trials), dtype=np.int64)
    return HistoryView(np.array(successes), np.array(trials), visits, visits, visits)


@pytest.mark.parametrize("name", CREDIT)
def test_only_dynamos_allocation_is_not_uniform(name: str) -> None:
    method: Method = registry.build(name, {})
    seen = history([0, 16, 8, 1], [16, 16, 16, 16])
    n = method.allocate(seen, 33, np.random.default_rng(0))
    assert n.dtype == np.int64
    assert n.sum() == 33
    if name in ("dynamo", "dynamo_allocation", "dynamo_readme"):
        assert n[2] > n[3] > n[0] == n[1]
    elif name == "dynamo_released":
        # Floors 4. Of 17 left, 0.49, 0.49, 12.98, 3.04: 1, 0, 13 (room for 9), 3. Of 4 left, 0.49, 0.49, -, 3.03.
        assert n.tolist() == [6, 4, 13, 10]
    else:
        assert n.tolist() == [9, 8, 8, 8]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("fork_tokens", {"fraction": 0.0}),
        ("entropy_advantage", {"kappa": 1.0}),
        ("clip_cov", {"low": 5.0}),
        ("dynamo", {"stabilisation": {"floor": 1.5}}),
        ("dynamo", {"allocation": {"n_low": 9, "n_high": 8}}),
        ("grpo", {"alpha": 1}),
    ],
)
def test_bad_parameters_are_one_clear_error(name: str, params: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"method"):
        registry.build(name, params)
