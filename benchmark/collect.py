"""The first half of a step: prompts -> (probe) -> select -> allocate -> rollouts -> verify -> (extend) -> keep."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark import ranks, streams
from benchmark.backend import Backend, Request
from benchmark.clock import Clock
from benchmark.config import RolloutConfig
from benchmark.draws import Batch, Draw, Pool, successes_of
from benchmark.errors import MethodError
from benchmark.groups import Groups, segment_sum
from benchmark.history import HistoryView, PromptHistory
from benchmark.ledger import Admission, Budget, Ledger, Prices
from benchmark.method import Method, Probe
from benchmark.policy import Policy
from benchmark.probing import alignment, gradient_norms, halves
from benchmark.recall import Recall, joined
from benchmark.rollouts import Rollouts, concatenate, merge
from benchmark.verdict import Verdict, flipped, reward
from benchmark.verifier import Verifier


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
    flip_rate: float = 0.0  # chance that a verdict is the opposite (`VerifierConfig`)
    recall: Recall = field(default_factory=Recall)

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
            fate = np.full(len(draw.prompts), "failed", dtype=object)
            groups = self.groups(draw.rollouts, draw.verdicts, draw.history)
            if not draw.cut:
                mask = self.method.keep(groups)
                chosen = torch.nonzero(mask).flatten()[: wanted - have]
                have += len(chosen)
                kept.append((draw, chosen))
                fate = np.where(mask.cpu().numpy(), "overflow", "filtered").astype(object)
                fate[chosen.cpu().numpy()] = "trained"
            self.charge(step, draw, fate, self.method.keep_rollouts(groups))
        self.history.record_step(*self._outcome(drawn))
        kept = kept or [(drawn[0], torch.zeros(0, dtype=torch.int64, device=self.clock.device))]
        rollouts = concatenate([d.rollouts.select_prompts(c) for d, c in kept])
        verdicts = [d.verdicts[row] for d, c in kept for row in d.rollouts.rows_of(c).tolist()]
        prompts = [d.prompts[p] for d, c in kept for p in c.tolist()]
        if self.method.recalls:
            rollouts, verdicts = self._recall(step, rollouts, verdicts, prompts)
            for draw in drawn:
                if not draw.cut:  # as in the history
                    self.recall.remember(draw)
        groups = self.groups(
            rollouts, verdicts, HistoryView.concatenate([d.history.select(c.cpu().numpy()) for d, c in kept])
        )
        rows = torch.nonzero(self.method.keep_rollouts(groups)).flatten()
        judged = [verdicts[row] for row in rows.tolist()]
        return Batch(rollouts.select_rows(rows), groups, drawn, prompts, judged, rows)

    def _recall(
        self, step: int, rollouts: Rollouts, verdicts: list[Verdict], prompts: list[int]
    ) -> tuple[Rollouts, list[Verdict]]:
        """`rollouts` with a kept correct one in each group without one, scored by the policy that trains; charged."""
        found = self.recall.missing(rollouts, verdicts, prompts)
        if found is None:
            return rollouts, verdicts
        alone = found.ungrouped(torch.arange(len(found), device=found.prompt.device))
        with self.clock.phase("forward"), torch.no_grad():
            seen = self.backend.score(alone, self.config.temperature)
        made = len(alone.tokens)
        flops = self.prices.forward(made + len(alone.prompt_tokens))
        self.ledger.charge(step, "recall", tokens_scored=made, flops=flops)
        return joined(rollouts, verdicts, replace(found, log_prob=seen.log_prob))

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

    def _outcome(self, drawn: list[Draw]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Successes and rollouts of the prompts of a step that got any."""
        whole = [draw for draw in drawn if not draw.cut]
        counts = np.concatenate([np.zeros(0), *(draw.counts for draw in whole)])
        successes = np.concatenate([np.zeros(0), *(draw.successes for draw in whole)])
        return successes[counts > 0], counts[counts > 0]

    def _draw(self, step: int, prompts_left: int) -> Draw:
        seen, prompts, passed, admitted = self._choose(step, prompts_left)
        budget = admitted.rollouts * len(prompts) // admitted.prompts
        # A GPU's rounding, in what a probe measured, must not let processes of one run decide differently.
        seen, counts = ranks.agree((seen, self._allocate(seen, budget, step)))
        rollouts, verdicts = self._sample("rollout", step, prompts, counts, admitted.max_tokens)
        draw = Draw(prompts, counts, rollouts, verdicts, seen, admitted.cut)
        if not admitted.cut:
            for done in range(1, self.method.rounds.most):
                extra = self._extend(draw, done)
                if not extra.any():
                    break
                draw = self._another_round(step, draw, extra)
            self._remember(draw)
        self.place += passed
        return draw

    def _choose(self, step: int, prompts_left: int) -> tuple[HistoryView, list[int], int, Admission]:
        """What is seen of the prompts that are drawn next, the prompts, places passed with them, what is admitted."""
        probe, config, size = self.method.probe, self.config, len(self.pool.items)
        group = self.method.rounds.first or config.rollouts_per_prompt
        reserved = fixed = 0
        if probe and probe.charged:
            reserved = probe.rollouts * (self.method.candidates if probe.candidates else 1)
            fixed = probe.trusted * probe.trusted_rollouts
        looked = 0
        while True:
            # A draw ends with its epoch, so that its prompts are distinct.
            in_epoch = size - self.place % size
            wanted = min(prompts_left, in_epoch)
            admitted = self.budget.admit(self.remaining, wanted, group, config.max_tokens, reserved, fixed)
            probing = probe if admitted.probe == reserved and not admitted.cut else None
            window = self.pool.prompts(self.place, min(admitted.prompts * self.method.candidates, in_epoch))
            seen = self.history.view(window)
            if probing and probing.candidates:
                seen = self._probe(step, probing, window, seen)
            chosen, passed = ranks.agree(self._select(seen, admitted.prompts, step))
            if len(chosen):
                break
            self.place, looked = self.place + passed, looked + passed
            if looked > 2 * size:
                raise MethodError(f"{type(self.method).__name__}.select chose none of {looked} prompts in a row")
        seen, prompts = seen.select(chosen), [window[number] for number in chosen]
        if probing and not probing.candidates:
            seen = self._probe(step, probing, prompts, seen)
        return seen, prompts, passed, admitted

    def _select(self, seen: HistoryView, wanted: int, step: int) -> tuple[NDArray[np.int64], int]:
        """At most `wanted` numbers of the candidates, and how many candidates are passed with them."""
        rng = streams.generator(self.pool.seed, "select", step, self.place)
        mask = np.asarray(self.method.select(seen, wanted, rng))
        if mask.shape != (len(seen),) or mask.dtype != np.bool_:
            raise MethodError(
                f"{type(self.method).__name__}.select returned {mask.dtype} {mask.shape}; it must return "
                f"{len(seen)} booleans"
            )
        chosen = np.flatnonzero(mask)
        return chosen[:wanted], int(chosen[wanted]) if len(chosen) > wanted else len(seen)

    def _extend(self, draw: Draw, done: int) -> NDArray[np.int64]:
        """What every prompt of the draw gets in the next round, as far as the budget holds it."""
        groups = self.groups(draw.rollouts, draw.verdicts, draw.history)
        extra = ranks.agree(np.asarray(self.method.extend(groups, done)))
        if extra.shape != (len(draw.prompts),) or extra.dtype != np.int64 or extra.min() < 0:
            raise MethodError(
                f"{type(self.method).__name__}.extend returned {extra.dtype} {extra.shape}; it must return "
                f"{len(draw.prompts)} int64 counts >= 0"
            )
        # The draw is charged when its fate is known.
        held = len(draw.rollouts.tokens) if self.budget.currency == "tokens_generated" else len(draw.rollouts)
        affordable = (self.remaining - held) // self.budget.worst(self.config.max_tokens)
        before = np.cumsum(extra) - extra
        result: NDArray[np.int64] = np.clip(affordable - before, 0, extra)
        return result

    def _another_round(self, step: int, draw: Draw, extra: NDArray[np.int64]) -> Draw:
        asked = np.flatnonzero(extra)
        prompts = [draw.prompts[number] for number in asked]
        more, verdicts = self._sample(
            "rollout", step, prompts, extra[asked], self.config.max_tokens, first=draw.counts[asked]
        )
        owner = torch.from_numpy(asked).to(more.prompt.device)[more.prompt]
        rollouts, order = merge(draw.rollouts, replace(more, prompt=owner))
        both = [*draw.verdicts, *verdicts]
        return replace(
            draw,
            counts=draw.counts + extra,
            rollouts=rollouts,
            verdicts=[both[row] for row in order.tolist()],
            reads=draw.reads + (extra > 0),
        )

    def _remember(self, draw: Draw) -> None:
        rollouts = draw.rollouts
        owner = torch.repeat_interleave(rollouts.prompt, rollouts.length)
        tokens = segment_sum(rollouts.length.double(), rollouts.prompt, rollouts.prompts)
        surprisal = segment_sum(-rollouts.log_prob.double(), owner, rollouts.prompts)
        self.history.record(
            draw.prompts,
            draw.successes,
            draw.counts.astype(np.float64),
            tokens.cpu().numpy(),
            surprisal.cpu().numpy(),
        )

    def _probe(self, step: int, probe: Probe, prompts: list[int], seen: HistoryView) -> HistoryView:
        """`seen` with the outcome of the probe, which is charged, or recorded apart where it is an oracle's."""
        trials = np.full(len(prompts), probe.rollouts, dtype=np.int64)
        rollouts, verdicts = self._pre_sample("probe", step, probe, prompts, trials)
        found = replace(seen, probe_successes=successes_of(rollouts, verdicts).astype(np.int64), probe_trials=trials)
        backward = "backward" if probe.charged else "oracle"
        if probe.gradients:
            right = torch.tensor([reward(v) > 0 for v in verdicts])
            with self.clock.phase(backward):
                norm, square = gradient_norms(
                    self.policy.fused(), rollouts, right, probe.gradients, self.config.temperature
                )
            self._charge_gradients(step, probe, rollouts)
            found = replace(found, probe_norm=norm, probe_square=square)
        if probe.trusted:
            order = streams.generator(self.pool.seed, "trusted").permutation(len(self.pool.items))
            known = order[: probe.trusted].tolist()
            counts = np.full(len(known), probe.trusted_rollouts, dtype=np.int64)
            trusted, judged = self._pre_sample("trusted", step, probe, known, counts)
            own, other = self._credit(rollouts, verdicts), self._credit(trusted, judged)
            with self.clock.phase(backward):
                values = alignment(self.policy.fused(), rollouts, own, trusted, other, self.config.temperature)
            self._charge_gradients(step, probe, rollouts)
            self._charge_gradients(step, probe, trusted)
            found = replace(found, probe_alignment=values)
        return found

    def _pre_sample(
        self, purpose: str, step: int, probe: Probe, prompts: list[int], counts: NDArray[np.int64]
    ) -> tuple[Rollouts, list[Verdict]]:
        phases = ("decode", "verify") if probe.charged else ("oracle", "oracle")
        rollouts, verdicts = self._sample(purpose, step, prompts, counts, self.config.max_tokens, phases)
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
        return rollouts, verdicts

    def _credit(self, rollouts: Rollouts, verdicts: list[Verdict]) -> Tensor:
        """The method's advantage of every rollout within its group, and within its half of it, (R, 2)."""
        groups = self.groups(rollouts, verdicts, HistoryView.unseen(rollouts.prompts))
        twice = replace(groups, prompt=halves(rollouts), prompts=2 * rollouts.prompts, history=HistoryView.unseen(0))
        return torch.stack([self.method.credit(groups), self.method.credit(twice)], dim=1)

    def _charge_gradients(self, step: int, probe: Probe, rollouts: Rollouts) -> None:
        """A forward and backward pass in which every rollout reads its prompt anew."""
        made = len(rollouts.tokens)
        tokens = made + int(rollouts.prompt_length[rollouts.prompt].sum())
        flops = self.prices.forward(tokens) + self.prices.backward(tokens)
        event = "gradients" if probe.charged else "oracle"
        self.ledger.charge(step, event, tokens_backpropagated=made, flops=flops)

    def _sample(
        self,
        purpose: str,
        step: int,
        prompts: list[int],
        counts: NDArray[np.int64],
        max_tokens: int,
        phases: tuple[str, str] = ("decode", "verify"),
        first: NDArray[np.int64] | None = None,
    ) -> tuple[Rollouts, list[Verdict]]:
        """`counts` (P,) rollouts of `prompts` from the streams of `purpose`, from lane `first` on; their verdicts."""
        epoch = self.place // len(self.pool.items)
        keys = np.repeat(self.pool.stream_keys(purpose, step, epoch, prompts), counts)
        begin = np.zeros(len(prompts), dtype=np.int64) if first is None else first
        lanes = np.concatenate([np.arange(b, b + n) for b, n in zip(begin, counts, strict=True)])
        request = Request(
            [self.pool.tokens[p] for p in prompts], counts, keys, lanes, max_tokens, self.config.temperature
        )
        with self.clock.phase(phases[0]):
            rollouts = self.backend.generate(request)
        with self.clock.phase(phases[1]):
            texts = self.policy.decode(rollouts.texts())
            golds = [self.pool.items[prompts[p]].answer for p in rollouts.prompt.tolist()]
            verdicts = ranks.divided(self.verifier.verify_rollouts, golds, texts, rollouts.finished.tolist())
        if self.flip_rate and "oracle" not in phases:
            noise = self.pool.stream_keys(f"{purpose} verdict", step, epoch, prompts)
            flips = streams.uniforms(np.repeat(noise, counts), lanes, 1)[:, 0] < self.flip_rate
            verdicts = flipped(verdicts, flips.tolist())
        return rollouts, verdicts

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
        """The verified `rollouts` as a method sees them, with its prompts' `history`."""
        return Groups(
            rollouts.prompt,
            rollouts.prompts,
            torch.tensor([reward(v) for v in verdicts], dtype=torch.float32, device=rollouts.prompt.device),
            rollouts.length,
            ~rollouts.finished,
            self.config.max_tokens,
            history,
        )

    def charge(self, step: int, draw: Draw, fate: NDArray[np.object_], kept: Tensor | None = None) -> None:
        """One ledger row per fate: trained, filtered by the method, overflow, failed (cut).

        `fate` is per prompt; rollouts of a group that trains but are not `kept` (R,) are filtered.
        """
        rollouts = draw.rollouts
        owner, length = rollouts.prompt.cpu().numpy(), rollouts.length.cpu().numpy()
        read = rollouts.prompt_length.cpu().numpy() * draw.reads
        each = fate[owner]
        if kept is not None:
            each[(each == "trained") & ~kept.cpu().numpy()] = "filtered"
        for name in sorted({*fate, *each}):
            of = each == name
            prompt_tokens, made = int(read[fate == name].sum()), int(length[of].sum())
            if not of.any() and not prompt_tokens:
                continue
            self.ledger.charge(
                step,
                "rollouts",
                name,
                rollouts=int(of.sum()),
                prompt_tokens=prompt_tokens,
                tokens_generated=made,
                flops=self.prices.forward(prompt_tokens + made),
            )
