"""Token modulation: worked examples, its released form, and independence of how a batch is packed."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmark import registry
from benchmark.method import Loss, Tokens
from benchmark.scoring import LOGITS, vocabulary_statistics
from methods.dynamo import DynaMO
from methods.dynamo_released import DynaMOReleased
from methods.modulation import Compensation, Stabilisation, entropy_change, extremes, micro_batches


def batch(lengths: list[int], seed: int = 0, words: int = 7) -> Tokens:
    """Random statistics of `lengths` tokens per rollout, consistent with a softmax over `words` words."""
    random = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    log_p = torch.log_softmax(3 * torch.randn(count, words, generator=random), -1)
    p, action = log_p.exp(), torch.randint(words, (count,), generator=random)
    log_prob = log_p.gather(1, action[:, None]).squeeze(1)
    rollout = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    advantage = torch.randn(len(lengths), generator=random)[rollout]
    old = log_prob + 0.1 * torch.randn(count, generator=random)
    entropy = -(p * log_p).sum(-1)
    sums = (p * p).sum(-1), (p * p * log_p).sum(-1)
    return Tokens(advantage, log_prob, old, entropy, *sums, rollout, torch.rand(count, generator=random), Loss())


def pick(tokens: Tokens, rows: Tensor) -> Tokens:
    """The rows of every (T,) tensor of `tokens`."""
    columns = {f.name: getattr(tokens, f.name) for f in fields(Tokens)}
    return replace(tokens, **{name: value[rows] for name, value in columns.items() if isinstance(value, Tensor)})


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_factors_do_not_depend_on_the_order_of_the_rollouts(lengths: list[int], seed: int) -> None:
    """Bit for bit: the statistics are those of the update batch, whatever pieces they were computed in."""
    tokens = batch(lengths, seed)
    factor = DynaMO().modulate(tokens).advantage
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([torch.nonzero(tokens.rollout == r).flatten() for r in order.tolist()])
    assert torch.equal(DynaMO().modulate(pick(tokens, rows)).advantage, factor[rows])


def test_splitting_a_batch_would_change_the_released_scope_only() -> None:
    """What the default avoids: normalised per piece, a token's factor depends on its neighbours."""
    tokens = batch([5, 4, 6, 3])
    whole, halves = DynaMO().modulate(tokens).advantage, [tokens.rollout < 2, tokens.rollout >= 2]
    pieces = torch.cat([DynaMO().modulate(pick(tokens, half)).advantage for half in halves])
    assert not torch.equal(whole, pieces)


def test_off_is_exactly_one() -> None:
    tokens = batch([4, 5])
    assert torch.equal(Compensation(alpha=0.0)(tokens), torch.ones(9))
    assert torch.equal(Stabilisation(floor=1.0)(tokens), torch.ones(9))


def test_the_sequence_mean_replaces_the_expectation() -> None:
    tokens = batch([2, 1])
    own = tokens.log_prob.exp() * (tokens.log_prob + tokens.entropy)
    xi = torch.where(tokens.clipped, 0.0, tokens.ratio * tokens.advantage)
    mean = torch.stack([(own[0] + own[1]) / 2, (own[0] + own[1]) / 2, own[2]])
    torch.testing.assert_close(entropy_change(tokens, "sequence_mean"), -xi * (own - mean))
    exact = tokens.sum_p2_log_p + tokens.entropy * tokens.sum_p2
    torch.testing.assert_close(entropy_change(tokens), -xi * (own - exact))
    assert entropy_change(tokens, "sequence_mean")[2] == 0  # a rollout of one token is its own mean


def test_the_approximation_ranks_tokens_differently() -> None:
    tokens = batch([40] * 50, words=30)
    exact, released = (entropy_change(tokens, how).abs() for how in ("exact", "sequence_mean"))
    top = torch.topk(exact, 20).indices
    kept = torch.isin(torch.topk(released, 20).indices, top).float().mean()
    ranks = torch.stack([exact.argsort().argsort().double(), released.argsort().argsort().double()])
    assert float(kept) < 0.9
    assert 0.1 < float(torch.corrcoef(ranks)[0, 1]) < 0.95


def test_micro_batches_hold_at_most_the_longest_rollout() -> None:
    rollout = torch.repeat_interleave(torch.arange(6), torch.tensor([3, 2, 5, 1, 4, 2]))
    # 3 + 2 | 5 | 1 + 4 | 2
    expected = [0] * 5 + [1] * 5 + [2] * 5 + [3] * 2
    assert micro_batches(rollout).tolist() == expected


def test_extremes_of_each_scope() -> None:
    values, rollout = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]), torch.tensor([0, 0, 1, 1, 2])
    low, high = extremes(values, rollout, "update_batch")
    assert (float(low), float(high)) == (1.0, 5.0)
    low, high = extremes(values, rollout, "micro_batch")
    assert low.tolist() == [1.0, 1.0, 2.0, 2.0, 4.0]
    assert high.tolist() == [3.0, 3.0, 5.0, 5.0, 4.0]


def test_released_modulation_is_that_of_each_micro_batch_alone() -> None:
    tokens = batch([5, 2, 3, 5, 4, 1])
    found = DynaMOReleased().modulate(tokens).advantage
    settings_: dict[str, Any] = {"expectation": "sequence_mean"}
    for number in range(int(micro_batches(tokens.rollout).max()) + 1):
        rows = torch.nonzero(micro_batches(tokens.rollout) == number).flatten()
        part = pick(tokens, rows)
        expected = part.advantage * Compensation()(part) * Stabilisation(**settings_)(part)
        assert torch.equal(found[rows], expected)


def test_released_modes() -> None:
    x = torch.tensor([0.9, 0.97, 1.0])

    def factor(rule: Stabilisation) -> list[float]:
        values: Tensor = rule.floor + (1 - rule.floor) * torch.sigmoid(-rule.slope * (x - rule.centre))
        return [round(v, 3) for v in values.tolist()]

    assert factor(Stabilisation()) == [0.996, 0.892, 0.751]
    assert factor(Stabilisation(centre=0.9)) == [0.8, 0.612, 0.603]


@pytest.mark.parametrize("name", ["dynamo", "dynamo_readme"])
def test_the_readmes_modulation_is_dynamos(name: str) -> None:
    tokens = batch([5, 2, 3])
    assert torch.equal(registry.build(name, {}).modulate(tokens).advantage, DynaMO().modulate(tokens).advantage)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_a_large_vocabulary_never_has_all_its_logits_at_once() -> None:
    words, count, width = 151_936, 700, 4
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=random).requires_grad_()
    head = torch.randn(words, width, generator=random).requires_grad_()
    targets = torch.randint(words, (count,), generator=random)
    with Largest() as largest:
        found = vocabulary_statistics(hidden, head, targets)
        (found.log_prob.sum() + found.entropy.sum()).backward()
    assert words < largest.numel <= LOGITS < words * count
    some = torch.tensor([0, 350, 699])
    log_p = torch.log_softmax(hidden.detach()[some] @ head.detach().T, -1)
    p = log_p.exp()
    torch.testing.assert_close(found.log_prob[some], log_p.gather(1, targets[some, None]).squeeze(1))
    torch.testing.assert_close(found.entropy[some], -(p * log_p).sum(-1))
    torch.testing.assert_close(found.sum_p2[some], (p * p).sum(-1))
    torch.testing.assert_close(found.sum_p2_log_p[some], (p * p * log_p).sum(-1))
