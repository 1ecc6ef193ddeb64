"""What a method has to hold, whoever wrote it: `rolloutbench check`.

Decisions must be functions of what they are given: the same answer again, in another order of questions and whatever
the state of the global random generators, with nothing written into their arguments. The cases are those that a run
really meets: prompts never seen, groups of no or one rollout, groups all right or all wrong, the last prompts of a
budget.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark.groups import Groups
from benchmark.head import Head
from benchmark.history import HistoryView, PromptHistory
from benchmark.method import Anchor, Change, Kind, Loss, Method, Probe, Rounds, TokenCredit, Tokens

SEEDS = range(6)
ROUNDING = 1e-5


class BreachError(Exception):
    """What a method does against the contract, in one sentence."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: its name, what it demands, and why it failed (empty: it holds)."""

    check: str
    demand: str
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether the method passed."""
        return not self.reason


Check = tuple[str, str, Callable[[Method], None]]


def decision_checks() -> list[Check]:
    """Name, demand and function of every check that needs no training."""
    return [
        ("declaration", "a frozen dataclass whose defaults work; known labels; survives pickling", declaration),
        ("allocate", "(P,) int64 counts >= 0 that sum to the budget, on any history", allocation),
        ("select", "(C,) bool over candidates that have what was asked for", selection),
        ("extend", "(P,) int64 counts >= 0 for the next round, on any outcome", extension),
        ("keep", "(P,) bool; a group without rollouts never trains; (R,) bool for its rollouts", keeping),
        ("credit", "one finite number per rollout, for groups of any size and outcome", advantages),
        ("modulate", "one finite advantage per token, for any signs and ratios", modulation),
        ("pure", "same question, same answer: no memory, no global randomness, arguments untouched", purity),
        ("order", "renamed prompts and reordered rollouts keep their advantages (where `exchangeable`)", equivariance),
        ("labels", "`changes` names what differs from uniform, unfiltered, unmodulated", labels),
    ]


def examine(method: Method, checks: list[Check]) -> Iterator[Finding]:
    """Run checks one by one; whatever a decision raises is the reason why its check fails."""
    for name, demand, check in checks:
        try:
            check(method)
        except BreachError as breach:
            yield Finding(name, demand, str(breach))
        except Exception as error:  # a method is foreign code: it may raise anything
            yield Finding(name, demand, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        else:
            yield Finding(name, demand)


# -- what a run may ask --------------------------------------------------------------------------------------------


def histories(seed: int) -> Iterator[tuple[HistoryView, int]]:
    """Histories with the budgets that a run asks for them: whole batches, and the last prompt of a budget."""
    rng = np.random.default_rng(seed)
    for prompts, group in ((64, 8), (7, 4), (5, 16), (1, 8), *((1, k) for k in range(1, 8))):
        yield HistoryView.unseen(prompts), prompts * group
        memory = PromptHistory(prompts, half_life=None if seed % 2 else 3.0)
        chance = rng.beta(0.4, 0.4, prompts).round(1)
        for _ in range(3):
            trials = rng.integers(0, 12, prompts)
            correct = rng.binomial(trials, chance).astype(float)
            memory.record(range(prompts), correct, trials.astype(float))
            memory.record_step(correct[trials > 0], trials[trials > 0].astype(float))
        yield memory.view(range(prompts)), prompts * group
        for share in (0.0, 1.0):
            memory.record(range(prompts), np.full(prompts, 8 * share), np.full(prompts, 8.0))
            yield memory.view(range(prompts)), prompts * group


def asked_history(method: Method, view: HistoryView, seed: int) -> HistoryView:
    """`view` with what the method asks to be told, a probe's outcome and embeddings, if any; read-only."""
    rng, whole = np.random.default_rng(seed), view.whole
    if method.features:
        features = rng.normal(size=(len(view), 3))
        view = replace(view, features=features, whole=whole and replace(whole, features=features))
    if method.probe is not None:
        trials = np.full(len(view), method.probe.rollouts, dtype=np.int64)
        correct = rng.binomial(trials, 0.4).astype(np.int64)
        view = replace(view, probe_successes=correct, probe_trials=trials)
        if method.probe.gradients:
            norm = rng.gamma(4.0, size=(len(view), 2)) * np.stack([correct < trials, correct > 0], axis=1)
            view = replace(view, probe_norm=norm, probe_square=1.1 * norm**2)
        if method.probe.trusted:
            view = replace(view, probe_alignment=rng.uniform(-1, 1, (len(view), 3)))
    for part in (view, view.everyone):
        for values in (*part.columns().values(), part.batches):
            values.setflags(write=False)
    return view


def groups(seed: int) -> Iterator[Groups]:
    """Batches of ragged groups: every outcome, truncated answers, empty groups, single rollouts, a lone group."""
    rng = np.random.default_rng(seed)
    for prompts in (1, 6, 32):
        sizes = rng.integers(0, 9, prompts)
        sizes[0] = max(1, sizes[0])
        chance = rng.choice([0.0, 0.3, 0.7, 1.0], prompts)
        prompt = torch.from_numpy(np.repeat(np.arange(prompts), sizes))
        reward = torch.from_numpy((rng.random(len(prompt)) < np.repeat(chance, sizes)).astype(np.float32))
        length = torch.from_numpy(rng.integers(1, 13, len(prompt)))
        yield Groups(prompt, prompts, reward, length, length == 12, 12)


def update_batches(method: Method, seed: int) -> Iterator[Tokens]:
    """Token statistics of update batches as the trainer hands them out, with the method's own advantages."""
    generator = torch.Generator().manual_seed(seed)
    for batch in groups(seed):
        rollout = torch.repeat_interleave(torch.arange(len(batch.prompt)), batch.length)
        logits = 3 * torch.randn(len(rollout), 8, generator=generator)
        logits[0] = torch.tensor([200.0, *[0.0] * 7])  # a token without entropy
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        pick = torch.multinomial(p, 1, generator=generator)[:, 0]
        log_prob = log_p.gather(1, pick[:, None])[:, 0]
        drift = 0.3 * torch.randn(len(rollout), generator=generator)
        head = Head(logits, torch.eye(8), pick, step=_descend)
        yield Tokens(
            method.credit(batch)[rollout],
            log_prob,
            log_prob - drift * float(seed % 3 > 0),
            -(p * log_p).sum(-1),
            (p * p).sum(-1),
            (p * p * log_p).sum(-1),
            rollout,
            torch.rand(len(rollout), generator=generator),
            method.loss,
            batch.prompt[rollout],
            head,
            replace(head, hidden=logits + float(seed % 3 > 0) * 0.3 * torch.randn(logits.shape, generator=generator)),
        )


def _descend(gradient: Tensor) -> Tensor:
    return -gradient


# -- the checks ----------------------------------------------------------------------------------------------------


def declaration(method: Method) -> None:
    """Class attributes and properties have their documented types; equal parameters make equal methods."""
    cls = type(method)
    parameters = getattr(cls, "__dataclass_params__", None)
    _require(
        "__dataclass_fields__" in vars(cls) and parameters is not None and parameters.frozen,
        "the class is not a @dataclass(frozen=True) of its own",
    )
    _require(cls.kind in get_args(Kind), f"kind {cls.kind!r} is none of {', '.join(get_args(Kind))}")
    unknown = set(cls.changes) - set(get_args(Change))
    _require(not unknown, f"changes {sorted(unknown)}: known are {', '.join(get_args(Change))}")
    _require(cls.anchor in get_args(Anchor), f"anchor {cls.anchor!r} is none of {', '.join(get_args(Anchor))}")
    for name in ("family", "faithful_to"):
        _require(bool(getattr(cls, name)), f"{name} is empty: say it, the table of methods shows it")
    _require(isinstance(method.loss, Loss), "loss is not a benchmark.method.Loss")
    _require(isinstance(method.max_draws, int) and method.max_draws >= 1, "max_draws is not an integer >= 1")
    _require(method.half_life is None or method.half_life > 0, "half_life is neither None nor above 0")
    _require(method.probe is None or isinstance(method.probe, Probe), "probe is neither None nor a Probe")
    _require(cls() == cls(), "two instances with equal parameters are not equal")
    _require(pickle.loads(pickle.dumps(method)) == method, "a pickled copy is not equal: workers get copies")


def allocation(method: Method) -> None:
    """Every count is legal and the budget is spent to the rollout."""
    for seed in SEEDS:
        for view, budget in histories(seed):
            n = _allocate(method, asked_history(method, view, seed), budget, seed)
            where = f"for {len(view)} prompts and {budget} rollouts"
            _require(isinstance(n, np.ndarray) and n.dtype == np.int64, f"not an int64 array {where}")
            _require(n.shape == (len(view),), f"shape {n.shape} {where}")
            _require(n.min() >= 0, f"a count of {n.min()} {where}")
            _require(n.sum() == budget, f"the counts sum to {n.sum()} {where}")


def selection(method: Method) -> None:
    """A mask over candidates; it may be empty, since further candidates are then looked at."""
    for seed in SEEDS:
        for view, _ in histories(seed):
            mask = _select(method, asked_history(method, view, seed), seed)
            _require(isinstance(mask, np.ndarray) and mask.dtype == np.bool_, "not an array of booleans")
            _require(mask.shape == (len(view),), f"shape {mask.shape} for {len(view)} candidates")


def extension(method: Method) -> None:
    """Every count of a further round is legal."""
    _require(isinstance(method.rounds, Rounds), "rounds is not a benchmark.method.Rounds")
    for seed in SEEDS:
        for batch in groups(seed):
            for done in range(1, method.rounds.most):
                n = method.extend(batch, done)
                _require(isinstance(n, np.ndarray) and n.dtype == np.int64, "not an int64 array")
                _require(n.shape == (batch.prompts,), f"shape {n.shape} for {batch.prompts} prompts")
                _require(n.min() >= 0, f"a count of {n.min()}")


def keeping(method: Method) -> None:
    """A mask over prompts without the empty groups, and one over rollouts."""
    for seed in SEEDS:
        for batch in groups(seed):
            kept = method.keep(batch)
            _require(kept.dtype == torch.bool, f"dtype {kept.dtype}")
            _require(kept.shape == (batch.prompts,), f"shape {tuple(kept.shape)} for {batch.prompts} prompts")
            _require(not bool((kept & (batch.size == 0)).any()), "a group without rollouts was kept")
            rows = method.keep_rollouts(batch)
            _require(rows.dtype == torch.bool and rows.shape == batch.prompt.shape, "keep_rollouts is not (R,) bool")


def advantages(method: Method) -> None:
    """(R,) finite floats."""
    for seed in SEEDS:
        for batch in groups(seed):
            _numbers(method.credit(batch), len(batch.reward), "rollouts")


def modulation(method: Method) -> None:
    """(T,) finite floats; mask and KL weights of the same shape; the weights not below 0."""
    for seed in SEEDS:
        for tokens in update_batches(method, seed):
            credit = method.modulate(tokens)
            count = len(tokens.advantage)
            _numbers(credit.advantage, count, "tokens")
            _require(not credit.advantage.requires_grad, "the advantages carry a gradient")
            if credit.mask is not None:
                _require(credit.mask.dtype == torch.bool, f"a mask of dtype {credit.mask.dtype}")
                _require(credit.mask.shape == (count,), f"a mask of shape {tuple(credit.mask.shape)}")
            if credit.kl_coefficient is not None:
                _numbers(credit.kl_coefficient, count, "tokens")
                _require(bool((credit.kl_coefficient >= 0).all()), "a KL weight below 0")


def purity(method: Method) -> None:
    """Answers do not depend on what was asked before or on global generators, and arguments stay as they were."""
    questions = list(_questions(method))
    torch.manual_seed(1)
    np.random.seed(1)  # a method that draws from the global generator must be caught
    first = []
    for name, argument, ask in questions:
        before = pickle.dumps(argument)
        first.append(ask())
        _require(pickle.dumps(argument) == before, f"{name} writes into its argument")
    torch.manual_seed(2)
    np.random.seed(2)
    for (name, _, ask), answer in zip(reversed(questions), reversed(first), strict=True):
        _require(_same(ask(), answer), f"{name} gives another answer when it is asked again")


def equivariance(method: Method) -> None:
    """Renumbered prompts and reordered rollouts get the same advantages and the same fate, where that is claimed."""
    for seed in SEEDS if method.exchangeable else ():
        rng = np.random.default_rng(seed)
        for batch in groups(seed):
            renamed = torch.from_numpy(rng.permutation(batch.prompts))
            # Rollouts stay sorted by prompt, as everywhere; within a prompt their order is shuffled.
            shuffled = torch.from_numpy(rng.permutation(len(batch.prompt)))
            rows = shuffled[torch.argsort(renamed[batch.prompt][shuffled], stable=True)]
            other = replace(
                batch,
                prompt=renamed[batch.prompt][rows],
                reward=batch.reward[rows],
                length=batch.length[rows],
                truncated=batch.truncated[rows],
            )
            one, two = method.credit(other), method.credit(batch)[rows]
            near = torch.allclose(one, two, atol=ROUNDING, equal_nan=True)
            _require(near, f"credit depends on the order (by up to {float((one - two).abs().max()):.3g})")
            same = bool((method.keep(other)[renamed] == method.keep(batch)).all())
            _require(same, "keep depends on the order of the prompts")


def labels(method: Method) -> None:
    """What a decision is seen to change is in `changes`."""
    uniform = Method()
    seen: dict[str, bool] = {"allocation": False, "selection": False, "token": False}
    for seed in SEEDS:
        for view, budget in histories(seed):
            n = _allocate(method, asked_history(method, view, seed), budget, seed)
            seen["allocation"] |= bool((n != _allocate(uniform, view, budget, seed)).any())
            seen["selection"] |= not _select(method, asked_history(method, view, seed), seed).all()
        for batch in groups(seed):
            seen["allocation"] |= method.rounds.most > 1 and bool(method.extend(batch, 1).any())
            dropped = (method.keep(batch) != (batch.size > 0)).any() or not method.keep_rollouts(batch).all()
            seen["selection"] |= bool(dropped)
        for tokens in update_batches(method, seed):
            credit = method.modulate(tokens)
            changed = credit.mask is not None or credit.kl_coefficient is not None
            seen["token"] |= changed or not _same(credit.advantage, tokens.advantage)
    silent = [change for change, acts in seen.items() if acts and change not in type(method).changes]
    _require(not silent, f"it changes {' and '.join(silent)}, but `changes` does not say so")


def _questions(method: Method) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """Decision, argument and the call, for a sample of all cases."""
    for seed in SEEDS:
        for view, budget in histories(seed):
            seen = asked_history(method, view, seed)
            yield "select", seen, partial(_select, method, seen, seed)
            yield "allocate", seen, partial(_allocate, method, seen, budget, seed)
        for batch in groups(seed):
            yield "extend", batch, partial(method.extend, batch, 1)
            yield "keep", batch, partial(method.keep, batch)
            yield "keep_rollouts", batch, partial(method.keep_rollouts, batch)
            yield "credit", batch, partial(method.credit, batch)
        for tokens in update_batches(method, seed):
            yield "modulate", tokens, partial(method.modulate, tokens)


def _allocate(method: Method, view: HistoryView, budget: int, seed: int) -> NDArray[np.int64]:
    return method.allocate(view, budget, np.random.default_rng(seed))


def _select(method: Method, view: HistoryView, seed: int) -> NDArray[np.bool_]:
    return method.select(view, max(1, len(view) // method.candidates), np.random.default_rng(seed))


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, TokenCredit) and isinstance(two, TokenCredit):
        return all(_same(getattr(one, field.name), getattr(two, field.name)) for field in fields(one))
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, two))
    return bool(one == two)


def _numbers(values: Tensor, count: int, what: str) -> None:
    _require(values.shape == (count,), f"shape {tuple(values.shape)} for {count} {what}")
    _require(values.dtype.is_floating_point, f"dtype {values.dtype}, not a float")
    bad = int((~torch.isfinite(values)).sum())
    _require(bad == 0, f"{bad} of {count} {what} get NaN or an infinity")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BreachError(otherwise)
