"""The first half of a step: prompts -> (probe) -> allocate -> rollouts -> verify -> keep."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark import streams
from benchmark.backend import Backend, Request
from benchmark.clock import Clock
from benchmark.config import RolloutConfig
from benchmark.groups import Groups, segment_sum
from benchmark.history import HistoryView, PromptHistory
from benchmark.ledger import Budget, Ledger, Prices
from benchmark.method import Method, Probe
from benchmark.policy import Policy
from benchmark.problems import Item
from benchmark.rollouts import Rollouts, concatenate
from benchmark.verdict import Verdict, reward
from benchmark.verifier import Verifier


class MethodError(RuntimeError):
    """A method returned something that its decision must not return."""


@dataclass(frozen=True)
class Pool:
    """The training prompts, tokenised once, in an order every arm of a seed shares.

    Attributes:
        items: the problems. tokens: their prompt ids. keys: (N,) uint64 identity of each prompt's random stream.
    """

    items: list[Item]
    tokens: list[Tensor]
    seed: int

    @classmethod
    def of(cls, items: list[Item], policy: Policy, seed: int, device: torch.device) -> Pool:
        """Tokenise the prompts of `items` once, onto `device`."""
        return cls(items, [torch.tensor(ids, device=device) for ids in policy.encode([i.prompt for i in items])], seed)

    def prompts(self, start: int, count: int) -> list[int]:
        """`count` pool positions from place `start` of an endless sequence of shuffled epochs; distinct in an epoch."""
        chosen: list[int] = []
        size = len(self.items)
        while len(chosen) < count:
            epoch, offset = divmod(start + len(chosen), size)
            order = streams.generator(self.seed, "order", epoch).permutation(size)
            taken = order[offset : offset + count - len(chosen)].tolist()
            chosen += taken
        return chosen

    def stream_keys(self, purpose: str, step: int, epoch: int, prompts: list[int]) -> NDArray[np.uint64]:
        """One 64-bit key per prompt; rollout j of the prompt is lane j of it in every arm.

        The epoch keeps a prompt that comes back within one step (dynamic sampling) from repeating its rollouts.
        """
        ids = (streams.key(self.seed, purpose, step, epoch, self.items[p].id) for p in prompts)
        return np.fromiter(ids, dtype=np.uint64, count=len(prompts))


@dataclass(frozen=True)
class Draw:
    """Verified rollouts of some prompts.

    Attributes:
        prompts: pool positions, (P,). counts: rollouts of each, (P,). verdicts: one per rollout.
        history: what `allocate` saw of the prompts.
        cut: the budget, not the protocol, set the token limit: never trains.
    """

    prompts: list[int]
    counts: NDArray[np.int64]
    rollouts: Rollouts
    verdicts: list[Verdict]
    history: HistoryView
    cut: bool


@dataclass(frozen=True)
class Batch:
    """What trains in this step, and the whole of what was drawn for it.

    Attributes:
        prompts: pool positions of the groups that train, (P,). verdicts: one per rollout that trains.
    """

    rollouts: Rollouts
    groups: Groups
    drawn: list[Draw] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)


@dataclass
class Collector:
    """Draws batches for one method until enough groups are kept, its patience ends, or the budget does."""

    method: Method
    pool: Pool
    backend: Backend
    verifier: Verifier
    history: PromptHistory
    ledger: Ledger
    budget: Budget
    prices: Prices
    config: RolloutConfig
    clock: Clock
    place: int = 0  # prompts consumed from the pool's sequence

    @property
    def policy(self) -> Policy:
        """The policy that samples."""
        return self.backend.policy

    @property
    def remaining(self) -> int:
        """What is left of the budget, in its currency."""
        return self.budget.remaining(self.ledger.spent[self.budget.currency])

    def collect(self, step: int) -> Batch:
        """One step's batch, charged to the ledger; it may hold no group that trains. Needs budget left."""
        self.backend.load_weights()
        wanted = self.config.prompts_per_batch
        drawn: list[Draw] = []
        kept: list[tuple[Draw, Tensor]] = []  # per draw, kept prompts (numbers within the draw)
        have, left, draws = 0, 0, 0
        while have < wanted and self.remaining > 0:
            if left == 0:
                if draws == self.method.max_draws:
                    break
                draws, left = draws + 1, wanted
            draw = self._draw(step, left)
            left -= len(draw.prompts)
            drawn.append(draw)
            if draw.cut:
                self.charge(step, draw, np.full(len(draw.prompts), "failed", dtype=object))
                continue
            mask = self.method.keep(self.groups(draw.rollouts, draw.verdicts, draw.history))
            chosen = torch.nonzero(mask).flatten()[: wanted - have]
            have += len(chosen)
            kept.append((draw, chosen))
            fate = np.where(mask.cpu().numpy(), "overflow", "filtered").astype(object)
            fate[chosen.cpu().numpy()] = "trained"
            self.charge(step, draw, fate)
        kept = kept or [(drawn[0], torch.zeros(0, dtype=torch.int64, device=self.clock.device))]
        rollouts = concatenate([d.rollouts.select_prompts(c) for d, c in kept])
        verdicts = [d.verdicts[row] for d, c in kept for row in d.rollouts.rows_of(c).tolist()]
        history = HistoryView.concatenate([d.history.select(c.cpu().numpy()) for d, c in kept])
        prompts = [d.prompts[p] for d, c in kept for p in c.tolist()]
        return Batch(rollouts, self.groups(rollouts, verdicts, history), drawn, prompts, verdicts)

    def exhaust(self, step: int) -> Batch:
        """Spend the rest of the budget on rollouts that do not train, for an engine that cannot use so few."""
        self.backend.load_weights()
        drawn: list[Draw] = []
        while self.remaining > 0:
            draw = self._draw(step, 1)
            self.charge(step, draw, np.full(len(draw.prompts), "failed", dtype=object))
            drawn.append(draw)
        nothing = drawn[0].rollouts.select_prompts(torch.zeros(0, dtype=torch.int64, device=self.clock.device))
        return Batch(nothing, self.groups(nothing, [], drawn[0].history.select(np.zeros(0, dtype=np.int64))), drawn)

    def _draw(self, step: int, prompts_left: int) -> Draw:
        # A draw ends with its epoch, so that its prompts are distinct.
        prompts_left = min(prompts_left, len(self.pool.items) - self.place % len(self.pool.items))
        probe, config = self.method.probe, self.config
        reserved = probe.rollouts if probe and probe.charged else 0
        admitted = self.budget.admit(
            self.remaining, prompts_left, config.rollouts_per_prompt, config.max_tokens, reserved
        )
        prompts = self.pool.prompts(self.place, admitted.prompts)
        seen = self.history.view(prompts)
        if probe and admitted.probe == reserved and not admitted.cut:
            seen = self._probe(step, probe, prompts, seen)
        counts = self._allocate(seen, admitted.rollouts, step)
        rollouts, verdicts = self._sample("rollout", step, prompts, counts, admitted.max_tokens)
        self.place += len(prompts)
        if not admitted.cut:
            self._remember(prompts, rollouts, verdicts, counts)
        return Draw(prompts, counts, rollouts, verdicts, seen, admitted.cut)

    def _remember(
        self, prompts: list[int], rollouts: Rollouts, verdicts: list[Verdict], counts: NDArray[np.int64]
    ) -> None:
        owner = torch.repeat_interleave(rollouts.prompt, rollouts.length)
        tokens = segment_sum(rollouts.length.double(), rollouts.prompt, rollouts.prompts)
        surprisal = segment_sum(-rollouts.log_prob.double(), owner, rollouts.prompts)
        self.history.record(
            prompts,
            _successes(rollouts, verdicts),
            counts.astype(np.float64),
            tokens.cpu().numpy(),
            surprisal.cpu().numpy(),
        )

    def _probe(self, step: int, probe: Probe, prompts: list[int], seen: HistoryView) -> HistoryView:
        """`seen` with the outcome of the probe, which is charged, or recorded apart where it is an oracle's."""
        trials = np.full(len(prompts), probe.rollouts, dtype=np.int64)
        phases = ("decode", "verify") if probe.charged else ("oracle", "oracle")
        rollouts, verdicts = self._sample("probe", step, prompts, trials, self.config.max_tokens, phases)
        read, made = len(rollouts.prompt_tokens), len(rollouts.tokens)
        self.ledger.charge(
            step,
            "probe" if probe.charged else "oracle",
            "probed" if probe.charged else None,
            rollouts=len(rollouts),
            prompt_tokens=read,
            tokens_generated=made,
            flops=self.prices.forward(read + made),
        )
        return replace(seen, probe_successes=_successes(rollouts, verdicts).astype(np.int64), probe_trials=trials)

    def _sample(
        self,
        purpose: str,
        step: int,
        prompts: list[int],
        counts: NDArray[np.int64],
        max_tokens: int,
        phases: tuple[str, str] = ("decode", "verify"),
    ) -> tuple[Rollouts, list[Verdict]]:
        """`counts` (P,) rollouts of `prompts` from the streams of `purpose`, with their verdicts."""
        epoch = self.place // len(self.pool.items)
        keys = np.repeat(self.pool.stream_keys(purpose, step, epoch, prompts), counts)
        lanes = np.concatenate([np.arange(n) for n in counts])
        request = Request(
            [self.pool.tokens[p] for p in prompts], counts, keys, lanes, max_tokens, self.config.temperature
        )
        with self.clock.phase(phases[0]):
            rollouts = self.backend.generate(request)
        with self.clock.phase(phases[1]):
            texts = self.policy.decode(rollouts.texts())
            golds = [self.pool.items[prompts[p]].answer for p in rollouts.prompt.tolist()]
            return rollouts, self.verifier.verify_rollouts(golds, texts, rollouts.finished.tolist())

    def _allocate(self, seen: HistoryView, budget: int, step: int) -> NDArray[np.int64]:
        rng = streams.generator(self.pool.seed, "allocate", step, self.place)
        counts = np.asarray(self.method.allocate(seen, budget, rng))
        if counts.shape != (len(seen),) or counts.dtype != np.int64 or counts.min() < 0 or counts.sum() != budget:
            raise MethodError(
                f"{type(self.method).__name__}.allocate returned {counts.dtype} {counts.shape} summing to "
                f"{counts.sum()}; it must return {len(seen)} int64 counts >= 0 that sum to {budget}"
            )
        return counts

    def groups(self, rollouts: Rollouts, verdicts: list[Verdict], history: HistoryView) -> Groups:
        """The groups of `rollouts`, as a method sees them."""
        return Groups(
            rollouts.prompt,
            rollouts.prompts,
            torch.tensor([reward(v) for v in verdicts], dtype=torch.float32, device=rollouts.prompt.device),
            rollouts.length,
            ~rollouts.finished,
            self.config.max_tokens,
            history,
        )

    def charge(self, step: int, draw: Draw, fate: NDArray[np.object_]) -> None:
        """One ledger row per fate; `fate` is per prompt: trained, filtered by the method, overflow, failed (cut)."""
        rollouts = draw.rollouts
        sizes = np.bincount(rollouts.prompt.cpu().numpy(), minlength=len(draw.prompts))
        generated = np.zeros(len(draw.prompts), dtype=np.int64)
        np.add.at(generated, rollouts.prompt.cpu().numpy(), rollouts.length.cpu().numpy())
        prompt_tokens = rollouts.prompt_length.cpu().numpy() * (sizes > 0)
        for name in sorted(set(fate)):
            of = fate == name
            read, made = int(prompt_tokens[of].sum()), int(generated[of].sum())
            if not sizes[of].sum():
                continue
            self.ledger.charge(
                step,
                "rollouts",
                name,
                rollouts=int(sizes[of].sum()),
                prompt_tokens=read,
                tokens_generated=made,
                flops=self.prices.forward(read + made),
            )


def _successes(rollouts: Rollouts, verdicts: list[Verdict]) -> NDArray[np.float64]:
    """Correct rollouts per prompt, (P,)."""
    correct = torch.tensor([reward(v) for v in verdicts], dtype=torch.float64)
    return segment_sum(correct, rollouts.prompt.cpu(), rollouts.prompts).numpy()
