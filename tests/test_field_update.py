"""Arms that change the update: closed forms, examples worked out by hand, and autograd as the judge."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.capo import CAPO, curvature
from baselines.grpo import GRPO
from baselines.lco import LCO
from baselines.oblr_po import OBLRPO
from benchmark import head as head_module
from benchmark import optimiser, scoring
from benchmark.backend import NativeBackend
from benchmark.clock import Clock
from benchmark.config import ArchitectureConfig, OptimiserConfig
from benchmark.config_model import BackendConfig
from benchmark.draws import Batch
from benchmark.errors import InputError, MethodError
from benchmark.groups import Groups
from benchmark.head import Head, adam_step
from benchmark.jsonl import read_rows
from benchmark.ledger import Ledger, Prices
from benchmark.losses import logit_losses
from benchmark.method import Loss, Method, Need, Signal, TokenCredit, Tokens
from benchmark.policy import Policy
from benchmark.registry import build
from benchmark.rollouts import Rollouts
from benchmark.scoring import score
from benchmark.staleness import Past
from benchmark.update import Updater
from benchmark.warmup import new_policy

POLICY = ArchitectureConfig(hidden_size=16, layers=2, heads=2, kv_heads=1, mlp=24)
PROMPTS = [3, 6, 2, 8]
LENGTHS = [[5, 3, 7, 4], [6, 2], [4, 8, 3], [1, 9, 5]]
REWARD = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1])
TEMPERATURE = 0.7


def random_head(seed: int = 0) -> Head:
    """Nine tokens, six words, hidden size 4."""
    random = torch.Generator().manual_seed(seed)
    return Head(
        torch.randn(9, 4, generator=random),
        torch.randn(6, 4, generator=random),
        torch.randint(6, (9,), generator=random),
        TEMPERATURE,
    )


def log_probs(head: Head, weight: Tensor | None = None) -> Tensor:
    weight = head.weight if weight is None else weight
    return (F.linear(head.hidden, weight) / head.temperature).log_softmax(-1)


def tokens_of(head: Head, old: Tensor, advantage: Tensor, rollout: Tensor, method: Method, prompt: Tensor) -> Tokens:
    log_p = log_probs(head)
    own = log_p.gather(1, head.token[:, None])[:, 0]
    p, zero = log_p.exp(), torch.zeros(len(own))
    entropy, square = -(p * log_p).sum(-1), (p * p).sum(-1)
    return Tokens(advantage, own, old, entropy, square, zero, rollout, zero, method.loss, prompt, head)


# -- the output layer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_heads_gradient_shift_and_norms_are_those_of_autograd(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    for module in (head_module, scoring):
        monkeypatch.setattr(module, "LOGITS", 6 * chunk)
    head = random_head()
    assert len(head.rows) == -(-9 // chunk)
    weight = head.weight.clone().requires_grad_()
    own = log_probs(head, weight).gather(1, head.token[:, None])[:, 0]
    outer = torch.linspace(-1, 2, 9)
    (expected,) = torch.autograd.grad(own @ outer, weight, retain_graph=True)
    torch.testing.assert_close(head.gradient(outer), expected)

    step = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    moved = F.linear(head.hidden, step) / TEMPERATURE
    p = log_probs(head).exp()
    mean = (p * moved).sum(-1)
    variance = (p * moved**2).sum(-1) - mean**2
    sampled = moved.gather(1, head.token[:, None])[:, 0]
    for found, right in zip(head.shift(step), (sampled, mean, variance), strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)

    rollout = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    norms = []
    for number in range(3):
        (gradient,) = torch.autograd.grad(own[rollout == number].sum(), weight, retain_graph=True)
        norms.append(float(gradient.square().sum()))
    assert head.score_norms(rollout).tolist() == pytest.approx(norms, rel=1e-5)


def test_the_head_counts_its_products() -> None:
    head = random_head()
    head.gradient(torch.ones(9))
    assert head.meter.flops == 2 * 2 * 9 * 6 * 4  # logits, and the outer products
    head.shift(head.weight)
    assert head.meter.flops == 2 * 2 * 2 * 9 * 6 * 4
    assert head.detach().meter is head.meter


def test_the_candidate_step_is_the_one_adam_takes() -> None:
    parameter = torch.nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    optimiser = torch.optim.AdamW([parameter], lr=0.01, betas=(0.8, 0.95), weight_decay=0.0)
    random = torch.Generator().manual_seed(1)
    for _ in range(3):
        gradient = torch.randn(5, 3, generator=random)
        before, candidate = parameter.detach().clone(), adam_step(optimiser, parameter, 0.01, gradient)
        parameter.grad = gradient
        optimiser.step()
        torch.testing.assert_close(parameter.detach() - before, candidate, atol=1e-7, rtol=1e-4)
    with pytest.raises(InputError, match="frozen"):
        adam_step(optimiser, torch.nn.Parameter(torch.zeros(5, 3)), 0.01, gradient)


# -- CAPO ------------------------------------------------------------------------------------------------------------


def test_directional_curvature_is_the_quadratic_form_of_the_explicit_matrices() -> None:
    head, advantage = random_head(), torch.linspace(-2, 2, 9)
    step = 0.3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    m_H, m_F = curvature(head, advantage, step)
    d = step.flatten()
    for t in range(9):

        def objective(weight: Tensor, t: int = t) -> Tensor:
            return advantage[t] * log_probs(head[t : t + 1], weight)[0, head.token[t]]

        g = torch.autograd.functional.jacobian(objective, head.weight).flatten()
        H = torch.autograd.functional.hessian(objective, head.weight).reshape(24, 24)
        assert float(m_H[t]) == pytest.approx(float(g @ d + d @ H @ d / 2), abs=1e-5)
        p = log_probs(head[t : t + 1])[0].exp()
        F_logits = torch.diag(p) - torch.outer(p, p)
        fisher = torch.kron(F_logits, torch.outer(head.hidden[t], head.hidden[t])) / TEMPERATURE**2
        assert float(m_F[t]) == pytest.approx(float(d @ fisher @ d / 2), rel=1e-4)


def test_predicted_divergence_is_that_of_a_small_step() -> None:
    head = random_head()
    step = 1e-2 * torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    _, m_F = curvature(head, torch.ones(9), step)
    old, new = log_probs(head).double(), log_probs(head, head.weight + step).double()
    torch.testing.assert_close(m_F.double(), (old.exp() * (old - new)).sum(-1), rtol=0.05, atol=1e-8)


def test_capo_rejects_what_leaves_its_bounds() -> None:
    """Two words, one hidden unit: a step (s, -s) moves the logit gap by 2 s h, and Var = p (1 - p) (2 s h)^2."""
    hidden = torch.tensor([[0.0], [1.0], [3.0]])
    step = torch.tensor([[0.1], [-0.1]])
    head = Head(hidden, torch.zeros(2, 1), torch.zeros(3, dtype=torch.int64), step=lambda gradient: step)
    gap = 0.2 * hidden[:, 0]
    change, variance = gap / 2, gap**2 / 4  # p = 1/2
    zero = torch.zeros(3, dtype=torch.int64)
    advantage = torch.tensor([1.0, 1.0, -1.0])
    m_H = advantage * (change - variance / 2)
    off: dict[str, float | None] = {"low": None, "high": None, "kl": None}

    def kept(**bounds: float | None) -> list[bool]:
        method = CAPO(**(off | bounds))
        old = torch.full((3,), math.log(0.5))
        return (method.modulate(tokens_of(head, old, advantage, zero, method, zero)).advantage != 0).tolist()

    assert kept(kl=float(variance[2]) / 2 - 1e-6) == [True, True, False]
    assert kept(kl=float(variance[2]) / 2 + 1e-6) == [True, True, True]
    assert kept(high=float(m_H[1]) - 1e-6) == [True, False, True]
    assert kept(low=float(m_H[2]) + 1e-6) == [True, True, False]
    assert kept() == [True, True, True]


# -- LCO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mse", "lch", "kld"])
def test_lco_is_least_at_its_target_and_convex_in_the_logits(form: str) -> None:
    method = build("lco", {"form": form, "beta": 0.5})
    old = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    token, advantage = torch.tensor([0, 3, 4]), torch.tensor([1.0, -2.0, 0.0])
    target = old.clone()
    target[torch.arange(3), token] += 2 * advantage
    at_target = target.clone().requires_grad_()
    value = method.logit_loss(at_target, old, token, advantage)
    torch.testing.assert_close(value.detach(), torch.zeros(3), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(value.sum(), at_target)
    torch.testing.assert_close(gradient, torch.zeros(3, 5), atol=1e-6, rtol=0)
    for row in range(3):

        def one(z: Tensor, row: int = row) -> Tensor:
            some = slice(row, row + 1)
            return method.logit_loss(z[None], old[some], token[some], advantage[some])[0]

        hessian = torch.autograd.functional.hessian(one, old[row] + 0.3)
        assert float(torch.linalg.eigvalsh(hessian).min()) > -1e-6


def test_lcos_gradients_at_the_sampling_policy() -> None:
    """mse: -(A / beta) e_a; lch: -tanh(A / beta) e_a; kld: pi - pi*."""
    old = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    token, advantage = torch.tensor([1, 2]), torch.tensor([1.0, -0.5])
    pushed = F.one_hot(token, 5) * advantage[:, None] / 2
    pi, wanted = old.softmax(-1), (old + pushed).softmax(-1)
    for form, expected in {"mse": -pushed, "lch": -pushed.tanh(), "kld": pi - wanted}.items():
        z = old.clone().requires_grad_()
        loss = build("lco", {"form": form, "beta": 2.0}).logit_loss(z, old, token, advantage).sum()
        (found,) = torch.autograd.grad(loss, z)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    # Far from the optimum, A / beta is large: first order in 1 / beta it is the policy gradient weighted by pi(a).
    z = old.clone().requires_grad_()
    loss = build("lco", {"beta": 1e4}).logit_loss(z, old, token, advantage).sum() * 1e4
    (found,) = torch.autograd.grad(loss, z)
    own = pi.gather(1, token[:, None])
    torch.testing.assert_close(found, -advantage[:, None] * own * (F.one_hot(token, 5) - pi), atol=2e-3, rtol=0)


def test_chunks_of_the_loss_on_logits_change_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    old, advantage = random_head(seed=7), torch.linspace(-1, 1, 9)
    found = []
    for limit in (1 << 20, 12):
        for module in (head_module, scoring):
            monkeypatch.setattr(module, "LOGITS", limit)
        head = random_head()
        head = replace(head, hidden=head.hidden.requires_grad_(), weight=head.weight.requires_grad_())
        assert len(head.rows) == (1 if limit > 12 else 5)
        value = logit_losses(LCO().logit_loss, head, old, advantage)
        found.append([value, *torch.autograd.grad(value.sum(), (head.hidden, head.weight))])
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(whole, chunked)


# -- DPPO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppos_buckets_by_a_loop(name: str) -> None:
    current, sampler = random_head(), random_head()
    sampler = replace(sampler, weight=sampler.weight + 0.4 * random_head(seed=9).weight)
    p, q = log_probs(current).exp(), log_probs(sampler).exp()
    old = q.gather(1, current.token[:, None])[:, 0].log()
    advantage = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 1])
    rollout = torch.arange(9)
    for k in (0, 2, 6):
        for delta in (0.02, 0.1, 0.3):
            method = build(name, {"top_k": k, "delta": delta})
            plain = tokens_of(current, old, advantage, rollout, method, rollout)
            found = method.modulate(replace(plain, rollout_head=sampler)).advantage
            for t in range(9):
                inside = {*q[t].topk(k).indices.tolist(), int(current.token[t])}
                rest = [b for b in range(6) if b not in inside]
                pairs = [(float(p[t, b]), float(q[t, b])) for b in inside]
                pairs += [(float(p[t, rest].sum()), float(q[t, rest].sum()))] if rest else []
                tv = sum(abs(a - b) for a, b in pairs) / 2
                kl = sum(b * math.log(b / a) for a, b in pairs)
                ratio = float(plain.ratio[t])
                away = (ratio > 1) == (float(advantage[t]) > 0)
                blocked = away and (tv if name == "dppo_tv" else kl) > delta
                assert float(found[t]) == pytest.approx(0.0 if blocked else float(advantage[t]) * ratio, rel=1e-4)
            if k == 0:  # one bucket for the rest is the binary form
                binary = build(name, {"delta": delta}).modulate(plain).advantage
                torch.testing.assert_close(found, binary)


# -- OBLR-PO ---------------------------------------------------------------------------------------------------------


def test_the_baseline_by_hand() -> None:
    """Two words at p = 1/2 and hidden states of length 1, 2, 3 and 1: squared norms h^2 / 2."""
    hidden = torch.tensor([[1.0], [2.0], [3.0], [1.0]])
    head = Head(hidden, torch.zeros(2, 1), torch.zeros(4, dtype=torch.int64))
    reward, prompt = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    method = OBLRPO(schedule=False)
    old = torch.full((4,), math.log(0.5))
    found = method.modulate(tokens_of(head, old, reward, torch.arange(4), method, prompt)).advantage
    assert found.tolist() == pytest.approx([1 - 1 / 5, -1 / 5, 1 - 9 / 10, -9 / 10])
    groups = Groups(prompt, 2, reward, torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool), 1)
    assert method.credit(groups).tolist() == reward.tolist()


def test_the_baseline_has_the_least_variance() -> None:
    """A bandit with known gradients: tr Var((r - b) G) over actions is least at b = E[|G|^2 r] / E[|G|^2]."""
    logits, reward = torch.tensor([0.3, -1.0, 1.2]), torch.tensor([1.0, 0.0, 0.4])
    p = logits.softmax(0)
    G = torch.eye(3) - p
    norm = G.square().sum(-1)
    best = float((p * norm * reward).sum() / (p * norm).sum())

    def variance(b: float) -> float:
        samples = (reward - b)[:, None] * G
        return float((p * samples.square().sum(-1)).sum() - (p @ samples).square().sum())

    assert variance(best) < min(variance(best + 0.01), variance(best - 0.01), variance(float(p @ reward)))
    # The arm's estimate on a group that holds the actions in these proportions (last layer, h = 1).
    counts = (p * 20_000).round().long()
    action = torch.repeat_interleave(torch.arange(3), counts)
    head = Head(torch.ones(len(action), 1), logits[:, None], action)
    zero = torch.zeros_like(action)
    method = OBLRPO()
    tokens = tokens_of(head, torch.zeros(len(action)), reward[action], torch.arange(len(action)), method, zero)
    assert float(reward[0] - method.modulate(tokens).advantage[0]) == pytest.approx(best, abs=1e-3)


def test_the_schedule_is_the_shrinkage_of_a_noisy_gradient() -> None:
    """With g1, g2 ~ N(mu, S): E<g1, g2> / E|g|^2 = |mu|^2 / (|mu|^2 + tr S / 2)."""
    random = torch.Generator().manual_seed(0)
    mu = torch.randn(50, generator=random)
    g1, g2 = mu + torch.randn(2, 20_000, 50, generator=random)
    product, square = float((g1 * g2).sum(-1).mean()), float(((g1 + g2) / 2).square().sum(-1).mean())
    truth = float(mu @ mu) / (float(mu @ mu) + 25)
    assert OBLRPO(scale=2.0).learning_rate(Signal(product, square)) == pytest.approx(2 * truth, rel=0.02)
    assert OBLRPO(low=0.2).learning_rate(Signal(-1.0, 2.0)) == OBLRPO(low=0.2).learning_rate(Signal(0.0, 0.0)) == 0.2
    assert OBLRPO(high=3.0).learning_rate(Signal(0.9, 1.0)) == 3.0


# -- the update ------------------------------------------------------------------------------------------------------


def make_batch(policy: Policy, gap: float) -> Rollouts:
    """Random tokens, with the log-probabilities of the policy plus noise of size `gap`."""
    random = torch.Generator().manual_seed(1)
    lengths = [length for group in LENGTHS for length in group]
    batch = Rollouts(
        torch.randint(23, (sum(PROMPTS),), generator=random),
        torch.tensor(PROMPTS),
        torch.tensor([i for i, group in enumerate(LENGTHS) for _ in group]),
        torch.randint(23, (sum(lengths),), generator=random),
        torch.tensor(lengths),
        torch.zeros(sum(lengths)),
        torch.ones(len(lengths), dtype=torch.bool),
    )
    with torch.no_grad():
        own = score(policy.fused(), batch).log_prob
    return replace(batch, log_prob=own + gap * torch.randn(len(own), generator=random))


@dataclass
class Outcome:
    """A batch's updates: metrics, weights after them, last gradient, ledger rows and the policy before."""

    metrics: dict[str, float]
    weights: dict[str, Tensor]
    gradient: Tensor
    rows: list[dict[str, object]]
    batch: Rollouts
    start: Policy


def make_updater(file: Path, method: Method, policy: Policy, limit: int = 65_536, parts: int = 1) -> Updater:
    config = OptimiserConfig(minibatches_per_batch=parts, gradient_clip=1e9)
    return Updater(
        method=method,
        backend=NativeBackend(policy, BackendConfig(tokens_per_pass=limit)),
        optimiser=optimiser.make(policy, config),
        config=config,
        temperature=1.0,
        seed=0,
        ledger=Ledger(file),
        prices=Prices(1),
        clock=Clock(torch.device("cpu")),
    )


def with_groups(batch: Rollouts) -> Batch:
    return Batch(batch, Groups(batch.prompt, batch.prompts, REWARD, batch.length, ~batch.finished, 12))


def update(
    folder: Path, method: Method, limit: int = 65_536, parts: int = 1, gap: float = 0.0, *, exact: bool = True
) -> Outcome:
    policy, start = new_policy(POLICY, seed=0), new_policy(POLICY, seed=0)
    file = folder / f"{type(method).__name__}-{limit}-{parts}-{hash(method)}.jsonl"
    batch = make_batch(policy, gap)
    updater = make_updater(file, method, policy, limit, parts)
    updater.backend.exact = exact
    metrics = updater.update(0, with_groups(batch))
    rows, _ = read_rows(file)
    parameters = {name: p.detach().clone() for name, p in policy.parameters().items()}
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters().values() if p.grad is not None])
    return Outcome(metrics, parameters, gradient, [dict(row) for row in rows], batch, start)


ARMS: dict[str, tuple[str, dict[str, object]]] = {
    "oblr_po": ("oblr_po", {}),
    "capo": ("capo", {"low": -3e-3, "high": 3e-3, "kl": None}),
    "lco": ("lco", {}),
    "lco_mse": ("lco", {"form": "mse"}),
    "dppo_topk": ("dppo_tv", {"top_k": 4, "delta": 1e-4}),
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("case", ARMS)
def test_passes_change_nothing(tmp_path: Path, case: str, parts: int) -> None:
    name, params = ARMS[case]
    whole = update(tmp_path, build(name, params), parts=parts)
    pieces = update(tmp_path, build(name, params), 16, parts=parts)
    assert float(whole.gradient.norm()) > 1e-4
    assert float((whole.gradient - pieces.gradient).norm() / whole.gradient.norm()) < 1e-4
    assert pieces.metrics == pytest.approx(whole.metrics, rel=1e-3, abs=1e-5)
    assert parts == 1 or whole.metrics["policy/ratio_max"] > 1


OFF: dict[str, Method] = {
    "oblr_po": OBLRPO(baseline=False, schedule=False),
    "capo": CAPO(low=None, high=None, kl=None),
    "lco": LCO(loss=Loss()),
}


@pytest.mark.parametrize("name", OFF)
def test_an_arm_with_its_idea_off_updates_as_grpo_bit_for_bit(tmp_path: Path, name: str) -> None:
    reference, other = update(tmp_path, GRPO(), parts=4, gap=0.1), update(tmp_path, OFF[name], parts=4, gap=0.1)
    on = update(tmp_path, build(name, {"kl": 0.0} if name == "capo" else {}), parts=4, gap=0.1)
    assert all(torch.equal(reference.weights[key], other.weights[key]) for key in reference.weights)
    assert any(not torch.equal(reference.weights[key], on.weights[key]) for key in reference.weights)
    assert reference.rows == other.rows
    assert reference.metrics == other.metrics


def test_lcos_update_is_the_gradient_of_its_loss_over_the_vocabulary(tmp_path: Path) -> None:
    found = update(tmp_path, LCO())
    policy = found.start
    from benchmark.scoring import states

    weights = policy.fused()
    hidden = states(weights, found.batch)
    logits = F.linear(hidden, weights.head)
    groups = Groups(found.batch.prompt, 4, REWARD, found.batch.length, ~found.batch.finished, 12)
    advantage = torch.repeat_interleave(GRPO().credit(groups), found.batch.length)
    target = logits.detach() + F.one_hot(found.batch.tokens, logits.shape[1]) * advantage[:, None]
    loss = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    expected = torch.autograd.grad(loss, list(policy.parameters().values()))
    torch.testing.assert_close(found.gradient, torch.cat([g.flatten() for g in expected]), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppo_starts_from_what_the_sampler_told(tmp_path: Path, name: str, *, recompute: bool) -> None:
    """A sampler half a nat off: r = pi / mu and nothing on top; D and its direction from mu, or from pi_old = pi."""
    delta = {"dppo_tv": 0.01, "dppo_kl": 0.002}[name]
    method = build(name, {"delta": delta, "truncation": 1.5, "recompute": recompute})
    found = update(tmp_path, method, gap=0.5, exact=False)
    batch = found.batch
    advantage = torch.repeat_interleave(GRPO().credit(with_groups(batch).groups), batch.length)
    log_pi = score(found.start.fused(), batch).log_prob
    pi, mu = log_pi.detach().exp(), batch.log_prob.exp()
    far = (pi - mu).abs() if name == "dppo_tv" else mu * (mu / pi).log() + (1 - mu) * ((1 - mu) / (1 - pi)).log()
    blocked = (advantage * (pi - mu) > 0) & (far > delta) & (not recompute)
    assert recompute or 5 < int(blocked.sum()) < 50
    assert float((pi / mu).max()) > 1.5
    weight = torch.where(blocked, 0.0, advantage * (pi / mu).clamp(max=1.5))
    loss = -(weight * log_pi).sum() / len(weight)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(found.start.parameters().values()))])
    torch.testing.assert_close(found.gradient, expected, atol=1e-6, rtol=1e-4)
    assert found.metrics["policy/logprob_abs_diff"] == pytest.approx(float((mu / pi).log().abs().mean()), rel=1e-4)
    assert "policy/importance_truncated_fraction" not in found.metrics


@pytest.mark.parametrize("exact", [True, False])
def test_every_token_keeps_what_its_sampler_told(tmp_path: Path, *, exact: bool) -> None:
    told, old = [], []

    @dataclass(frozen=True)
    class Spy(GRPO):
        def modulate(self, tokens: Tokens) -> TokenCredit:
            told.append(tokens.rollout_log_prob)
            old.append(tokens.old_log_prob)
            return super().modulate(tokens)

    found = update(tmp_path, Spy(), parts=2, gap=0.5, exact=exact)
    assert len(told) == 2
    wanted = found.batch.select_prompts(torch.tensor(_order_of_prompts()))
    assert _order_of_prompts() != [0, 1, 2, 3]
    assert torch.equal(torch.cat(told), wanted.log_prob)
    with torch.no_grad():
        trainers = score(found.start.fused(), wanted).log_prob
    torch.testing.assert_close(torch.cat(old), wanted.log_prob if exact else trainers)


def test_an_inexact_samplers_stale_rollouts_start_from_the_stale_policy(tmp_path: Path) -> None:
    policy, past = new_policy(POLICY, seed=0), Past(1)
    past.advance(policy)
    batch = make_batch(policy, gap=0.1)
    with torch.no_grad():
        stale = score(policy.fused(), batch).log_prob
        for value in policy.parameters().values():
            value.mul_(1.1)
        now = score(policy.fused(), batch).log_prob
    past.advance(policy)
    updater = make_updater(tmp_path / "ledger.jsonl", GRPO(), policy)
    updater.past, updater.backend.exact = past, False
    metrics = updater.update(0, with_groups(batch))
    assert metrics["policy/ratio_max"] == pytest.approx(float((now - stale).exp().max()), rel=1e-4)
    assert metrics["policy/ratio_max"] > 1.01
    assert metrics["policy/logprob_abs_diff"] == pytest.approx(float((stale - batch.log_prob).abs().mean()), rel=1e-4)


@dataclass(frozen=True)
class Steady(GRPO):
    factor: float = 1.0

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset[Need]({"signal"})

    def learning_rate(self, signal: Signal) -> float:
        return self.factor


def test_the_signal_is_that_of_the_two_halves(tmp_path: Path) -> None:
    found = update(tmp_path, Steady())
    policy, batch = found.start, found.batch
    groups = Groups(batch.prompt, 4, REWARD, batch.length, ~batch.finished, 12)
    advantage = torch.repeat_interleave(GRPO().credit(groups), batch.length)
    rollout = torch.repeat_interleave(torch.arange(len(batch)), batch.length)
    order = _order_of_prompts()
    halves = []
    for prompts in (order[:2], order[2:]):
        inside = torch.isin(batch.prompt[rollout], torch.tensor(prompts))
        log_prob = score(policy.fused(), batch).log_prob
        loss = -(log_prob * advantage)[inside].sum() / len(advantage)
        halves.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters().values()))]))
    g1, g2 = 2 * halves[0], 2 * halves[1]
    g = (g1 + g2) / 2
    assert found.metrics["optim/signal_product"] == pytest.approx(float(g1 @ g2), rel=1e-3)
    assert found.metrics["optim/signal_square"] == pytest.approx(float(g @ g), rel=1e-3)
    torch.testing.assert_close(found.gradient, update(tmp_path, GRPO()).gradient, atol=1e-6, rtol=1e-4)


def _order_of_prompts() -> list[int]:
    from benchmark import streams

    found: list[int] = streams.generator(0, "minibatch", 0, 0).permutation(4).tolist()
    return found


def test_the_factor_scales_the_learning_rate_and_must_be_sane(tmp_path: Path) -> None:
    plain, half = update(tmp_path, Steady(factor=1.0)), update(tmp_path, Steady(factor=0.5))
    assert half.metrics["optim/learning_rate"] == pytest.approx(plain.metrics["optim/learning_rate"] / 2)
    start = dict(plain.start.parameters())
    for name, before in start.items():
        moved, less = plain.weights[name] - before, half.weights[name] - before
        torch.testing.assert_close(moved, 2 * less, atol=2e-7, rtol=1e-3)
    with pytest.raises(MethodError, match="learning_rate"):
        update(tmp_path, Steady(factor=-1.0))


def test_what_is_needed_is_charged(tmp_path: Path) -> None:
    tokens, prompts = sum(sum(group) for group in LENGTHS), sum(PROMPTS)
    words = len(new_policy(POLICY, seed=0).fused().head)

    def cost(method: Method) -> tuple[int, int]:
        rows = update(tmp_path, method).rows
        plain = 6 * (tokens + prompts)
        return sum(int(str(row["tokens_scored"])) for row in rows), sum(int(str(row["flops"])) for row in rows) - plain

    assert cost(GRPO()) == (0, 0)
    assert cost(OBLRPO(baseline=False)) == (0, 0)  # half-batches are two passes over half of the tokens each
    product = 2 * tokens * words * 16
    assert cost(CAPO()) == (0, 4 * product)  # the candidate's gradient and its shift of the logits
    assert cost(LCO()) == (tokens, 2 * (tokens + prompts))
    scored, flops = cost(build("dppo_tv", {"top_k": 3}))
    assert (scored, flops) == (tokens, 2 * (tokens + prompts) + 2 * product)


def test_a_loss_on_logits_has_to_name_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="rollout_head"):
        update(tmp_path, GRPO(loss=Loss(surrogate="logits")))
