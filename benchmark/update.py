"""The second half of a step: credit -> modulate -> loss -> update, for every minibatch of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from torch import Tensor

from benchmark import ranks, streams
from benchmark.averages import Averages, observe
from benchmark.backend import Backend, Piece
from benchmark.clock import Clock
from benchmark.config import OptimiserConfig
from benchmark.draws import Batch
from benchmark.errors import MethodError
from benchmark.head import Head, Meter, adam_step
from benchmark.ledger import Ledger, Prices
from benchmark.losses import logit_losses, policy_loss, token_weights
from benchmark.method import SIGNAL_DECAY, Method, Signal, TokenCredit, Tokens
from benchmark.numerics import Checks, Minibatch, require, sound
from benchmark.optimiser import Optimiser
from benchmark.rollouts import Rollouts, ragged_index
from benchmark.scoring import TokenStatistics, vocabulary_statistics
from benchmark.staleness import Past
from benchmark.trace import Trace


@dataclass(frozen=True)
class Scored:
    """A forward pass: statistics of every token, and the output layer behind them where the method asks for it."""

    statistics: TokenStatistics
    head: Head | None = None


@dataclass
class Updater:
    """Turns a batch into ``epochs x minibatches_per_batch`` optimiser updates."""

    method: Method
    backend: Backend
    optimiser: Optimiser
    config: OptimiserConfig
    temperature: float
    seed: int
    ledger: Ledger
    prices: Prices
    clock: Clock
    updates: int = 0
    signal: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # running weight, product, square
    trace: Trace | None = None
    past: Past = field(default_factory=Past)

    def update(self, step: int, batch: Batch) -> dict[str, float]:
        """Train on `batch`; returns metrics of the step.

        Raises:
            NumericalError: a loss, gradient norm, log-probability, ratio, entropy or advantage is not finite or out of
                range; it holds the minibatch, and the weights are those from before it.
        """
        advantage = self.method.credit(batch.groups)[batch.rows]
        if self.trace is not None:
            self.trace.begin(step, batch)
        metrics = Averages()
        trained = 0
        rollouts, told = batch.rollouts, None
        if not self.backend.exact:
            rollouts, told = self._rescore(step, rollouts, metrics), rollouts.log_prob
        sampler = self._sampler(step, rollouts) if "rollout_head" in self.method.needs else None
        for epoch in range(self.config.epochs):
            order = streams.generator(self.seed, "minibatch", step, epoch).permutation(batch.rollouts.prompts)
            for prompts in torch.from_numpy(order).to(advantage.device).tensor_split(self.config.minibatches_per_batch):
                part = rollouts.select_prompts(prompts)
                if len(part) == 0:
                    continue
                rows = rollouts.rows_of(prompts)
                flat = ragged_index(rows, rollouts.length)
                mu = None if told is None else told[flat]
                before = None if sampler is None else sampler[flat]
                given = Minibatch(part, advantage[rows], mu, before, step, batch.groups.max_tokens)
                self._minibatch(prompts, given, metrics)
                trained += len(part.tokens)
        prompt_tokens = int(batch.rollouts.prompt_length.sum()) * self.config.epochs
        both = self.prices.forward(trained + prompt_tokens) + self.prices.backward(trained + prompt_tokens)
        self.ledger.charge(step, "backprop", tokens_backpropagated=trained, flops=both)
        return metrics.read()

    def again(self, batch: Minibatch) -> dict[str, float]:
        """The update of one minibatch that was kept; its metrics.

        Raises:
            NumericalError: it fails again.
        """
        metrics = Averages()
        self._minibatch(torch.arange(batch.rollouts.prompts, device=batch.rollouts.tokens.device), batch, metrics)
        return metrics.read()

    def _rescore(self, step: int, rollouts: Rollouts, metrics: Averages) -> Rollouts:
        """`rollouts` with the trainer's log-probabilities under the weights that sampled.

        Ratios and clip ranges then start from the policy that is trained, whatever the sampler's rounding.
        """
        pieces = self.backend.split(rollouts, ranks.size())
        with self.past.sampling(self.backend.policy):
            seen = _join(self._score_ahead(step, rollouts, pieces), pieces)
        gap = seen.log_prob - rollouts.log_prob
        metrics.add("policy/logprob_abs_diff", gap.abs().mean(), float(len(gap)))
        metrics.maximum("policy/logprob_abs_diff_max", gap.abs().max())
        if (cap := self._cap) is not None:
            metrics.add("policy/importance_truncated_fraction", (gap.exp() > cap).float().mean(), float(len(gap)))
        return replace(rollouts, log_prob=seen.log_prob)

    @property
    def _cap(self) -> float | None:
        """Of truncated importance sampling; None where tokens are not to be corrected for the sampler."""
        return self.backend.config.importance_cap if self.method.anchor == "old" else None

    def _sampler(self, step: int, rollouts: Rollouts) -> Head:
        """The trainer's output layer under the weights that sampled, at every token of the batch; one more pass."""
        with self.past.sampling(self.backend.policy):
            parts = self._score_ahead(step, rollouts, self.backend.split(rollouts, ranks.size()))
            heads = [part.head for part in parts if part.head is not None]
            weight = heads[0].weight.detach().clone()
        hidden = torch.cat([head.hidden for head in heads])
        # The updates of this batch change the head in place.
        return replace(heads[0], hidden=hidden, weight=weight, token=rollouts.tokens)

    def _minibatch(self, prompts: Tensor, batch: Minibatch, metrics: Averages) -> None:
        step, part, sampler = batch.step, batch.rollouts, batch.sampler
        pieces, middle = self._pieces(part)
        owners, fits = self._divide(pieces)
        rollout = torch.repeat_interleave(torch.arange(len(part), device=part.tokens.device), part.length)
        advantage = batch.advantage[rollout]
        credit = TokenCredit(advantage)
        mine = [number for number, owner in enumerate(owners) if owner == ranks.rank()]
        # A minibatch that fits in one pass is scored once, for the method's eyes and for its gradient.
        ready = {number: self._score(pieces[number].rollouts) for number in mine} if fits else {}
        if self.method.modulates:
            ahead = _exchange(pieces, owners, ready) if fits else self._score_ahead(step, part, pieces)
            seen = _join(ahead, pieces)
            tokens = self._tokens(batch, advantage, rollout, seen, self._head(ahead, part))
            with batch.blamed(lambda: sound(seen, part.log_prob, advantage, self.backend.policy.vocabulary)):
                credit = self.method.modulate(tokens)
            if tokens.head is not None and tokens.head.meter.flops:
                self.ledger.charge(step, "head", flops=tokens.head.meter.flops)
        weights = token_weights(part, self.method.loss, batch.max_tokens, credit.mask)
        if batch.rollout_log_prob is not None and (cap := self._cap) is not None:
            weights = weights * (part.log_prob - batch.rollout_log_prob).exp().clamp(max=cap)
        self.optimiser.clear()
        total = torch.zeros((), device=part.tokens.device)
        scored: dict[int, Scored] = {}
        half: Tensor | None = None
        for number, piece in enumerate(pieces):
            if number in mine:
                pass_ = ready.pop(number) if fits else self._score(piece.rollouts)
                loss = self._loss(pass_, part, piece.place, weights, credit, sampler)
                last = number == mine[-1] and not self._lacks(pieces, len(mine))
                with self.clock.phase("backward"):
                    self.optimiser.backward(loss, last=last)
                total += loss.detach()
                scored[number] = Scored(_detached(pass_))
            half = self._gradient() if isinstance(piece.place, slice) and piece.place.stop == middle else half
        self._keep_step(pieces, len(mine))
        whole = _join(_exchange(pieces, owners, scored), pieces)
        with self.clock.phase("backward"):
            self.optimiser.add_up([total] if half is None else [total, half])
        good = sound(whole, part.log_prob, credit.advantage, self.backend.policy.vocabulary)
        self._step(batch, good | {"loss": torch.isfinite(total)}, half, metrics)
        metrics.add("optim/loss", total)
        observe(whole, part.log_prob, advantage, credit, self.method.loss, metrics)
        if self.trace is not None:
            self.trace.observe(prompts, part, whole, advantage, credit)

    def _pieces(self, part: Rollouts) -> tuple[list[Piece], int]:
        """The passes of a minibatch, and the token at which its second half begins where a method needs both apart."""
        half = part.prompts // 2
        middle = int(part.length[part.prompt < half].sum())
        if "signal" not in self.method.needs or middle in (0, len(part.tokens)):
            return self.backend.split(part, ranks.size()), -1
        number = torch.arange(part.prompts, device=part.tokens.device)
        low, high = part.select_prompts(number[:half]), part.select_prompts(number[half:])
        later = [replace(piece, place=_moved(piece.place, middle)) for piece in self.backend.split(high, ranks.size())]
        return [*self.backend.split(low, ranks.size()), *later], middle

    def _divide(self, pieces: list[Piece]) -> tuple[list[int], bool]:
        """The process of each piece, and whether every process can hold all of its own at a time."""
        costs = [piece.cost for piece in pieces]
        if self.optimiser.lockstep:
            # In turns, so that those passed at the same time are of like size and no process has two more than another.
            return [number % ranks.size() for number in range(len(pieces))], len(pieces) == ranks.size()
        owners = ranks.owners(costs)
        loads = [[cost for cost, owner in zip(costs, owners, strict=True) if owner == r] for r in range(ranks.size())]
        fits = all(len(load) < 2 or sum(load) <= self.backend.config.tokens_per_pass for load in loads)
        return owners, fits and not (ranks.size() > 1 and self.method.needs & {"head", "rollout_head"})

    def _lacks(self, pieces: list[Piece], passed: int) -> bool:
        """Whether this process makes one pass less than others, where all have to make the same number."""
        return self.optimiser.lockstep and passed * ranks.size() < len(pieces)

    def _keep_step(self, pieces: list[Piece], passed: int) -> None:
        """Make the pass that lacks, an empty one."""
        if self._lacks(pieces, passed):
            idle = self._score(pieces[-1].rollouts).statistics.log_prob.sum() * 0.0
            if idle.requires_grad:
                self.optimiser.backward(idle, last=True)

    def _loss(
        self,
        piece: Scored,
        part: Rollouts,
        here: slice | Tensor,
        weights: Tensor,
        credit: TokenCredit,
        sampler: Head | None,
    ) -> Tensor:
        """The loss of the tokens `here` of a minibatch, with its graph."""
        seen, loss = piece.statistics, self.method.loss
        kl = None if credit.kl_coefficient is None else credit.kl_coefficient[here]
        local = TokenCredit(credit.advantage[here], kl_coefficient=kl)
        with self.clock.phase("forward"):
            per_token = None
            if loss.surrogate == "logits":
                if piece.head is None or sampler is None:
                    raise MethodError(f"{type(self.method).__name__}: a loss on logits `needs` head and rollout_head")
                per_token = logit_losses(self.method.logit_loss, piece.head, sampler[here], local.advantage)
            return policy_loss(seen.log_prob, seen.entropy, part.log_prob[here], weights[here], local, loss, per_token)

    def _score(self, rows: Rollouts) -> Scored:
        with self.clock.phase("forward"):
            if not self.method.needs & {"head", "rollout_head"}:
                return Scored(self.backend.score(rows, self.temperature))
            hidden, weight = self.backend.states(rows)
            statistics = vocabulary_statistics(hidden, weight, rows.tokens, temperature=self.temperature)
            return Scored(statistics, Head(hidden, weight, rows.tokens, self.temperature))

    def _score_ahead(self, step: int, part: Rollouts, pieces: list[Piece]) -> list[Scored]:
        """Statistics of rollouts before any gradient: methods see all of an update batch at once."""
        # The output layer of a whole batch is too much to send around: every process then makes all of it.
        everywhere = bool(self.method.needs & {"head", "rollout_head"})
        owners = [ranks.rank()] * len(pieces) if everywhere else self._divide(pieces)[0]
        with torch.no_grad():
            own = {n: self._score(piece.rollouts) for n, piece in enumerate(pieces) if owners[n] == ranks.rank()}
            if self.backend.divided:
                self._keep_step(pieces, len(own))
        parts = list(own.values()) if everywhere else _exchange(pieces, owners, own)
        read = len(part.tokens) + int(part.prompt_length.sum())
        self.ledger.charge(step, "score", tokens_scored=len(part.tokens), flops=self.prices.forward(read))
        return parts

    def _tokens(
        self, batch: Minibatch, advantage: Tensor, rollout: Tensor, seen: TokenStatistics, head: Head | None
    ) -> Tokens:
        part, sampler, meter = batch.rollouts, batch.sampler, Meter()
        draws = streams.generator(self.seed, "token", batch.step, self.updates).random(len(part.tokens))
        return Tokens(
            advantage,
            seen.log_prob,
            part.log_prob,
            seen.entropy,
            seen.sum_p2,
            seen.sum_p2_log_p,
            rollout,
            torch.from_numpy(draws).to(advantage),
            self.method.loss,
            part.prompt[rollout],
            None if head is None else replace(head, meter=meter),
            None if sampler is None else replace(sampler, meter=meter),
            part.log_prob if batch.rollout_log_prob is None else batch.rollout_log_prob,
        )

    def _head(self, scored: Sequence[Scored], part: Rollouts) -> Head | None:
        """The output layer at every token of the minibatch, detached, with the step that the optimiser would take."""
        heads = [piece.head for piece in scored if piece.head is not None]
        if not heads:
            return None
        hidden = torch.cat([head.hidden.detach() for head in heads])
        parameter = self.backend.policy.model.get_output_embeddings().weight
        step = partial(adam_step, self.optimiser.adam, parameter, self._rate)
        return replace(heads[0].detach(), hidden=hidden, token=part.tokens, step=step)

    def _gradient(self) -> Tensor:
        """The gradient so far, all weights as one vector (D,)."""
        parameters = self.backend.policy.parameters().values()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return torch.cat([grad.flatten() for grad in grads])

    def _factor(self, batch: Minibatch, good: Checks, half: Tensor | None, metrics: Averages) -> float:
        """What the method makes of the learning rate; `half` is the gradient of the first half's prompts (D,)."""
        if half is None:
            return 1.0
        whole = self._gradient()
        now = (1.0, 4 * float(half @ (whole - half)), float(whole @ whole))
        if not all(map(math.isfinite, now)):
            require(good | {"gradient": torch.isfinite(whole)}, batch)
        self.signal = [SIGNAL_DECAY * old + (1 - SIGNAL_DECAY) * new for old, new in zip(self.signal, now, strict=True)]
        weight, product, square = self.signal
        factor = self.method.learning_rate(Signal(product / weight, square / weight))
        if not 0 <= factor < float("inf"):
            raise MethodError(f"{type(self.method).__name__}.learning_rate returned {factor}; it must be finite, >= 0")
        metrics.add("optim/signal_product", torch.tensor(now[1]))
        metrics.add("optim/signal_square", torch.tensor(now[2]))
        return factor

    @property
    def _rate(self) -> float:
        """The configured learning rate of the next update."""
        return self.config.learning_rate * min(1.0, (self.updates + 1) / max(1, self.config.warmup_steps))

    def _step(self, batch: Minibatch, good: Checks, half: Tensor | None, metrics: Averages) -> None:
        factor = self._factor(batch, good, half, metrics)
        with self.clock.phase("optimiser"):
            rate, norm = self._rate * factor, self.optimiser.clip()
            require(good | {"gradient norm": torch.isfinite(norm)}, batch)
            self.optimiser.step(rate)
        self.updates += 1
        metrics.add("optim/gradient_norm", norm)
        metrics.add("optim/learning_rate", torch.tensor(rate))


def _detached(scored: Scored) -> TokenStatistics:
    return TokenStatistics(*(value.detach() for value in vars(scored.statistics).values()))


def _join(parts: Sequence[Scored], pieces: Sequence[Piece]) -> TokenStatistics:
    """The statistics of all `pieces` in the order of the batch's tokens, detached."""
    columns = ([getattr(part.statistics, field.name).detach() for part in parts] for field in fields(TokenStatistics))
    joined = map(torch.cat, columns)
    places = [piece.place for piece in pieces if isinstance(piece.place, Tensor)]
    if not places:  # consecutive
        return TokenStatistics(*joined)
    place = torch.cat(places)
    return TokenStatistics(*(torch.empty_like(column).index_copy_(0, place, column) for column in joined))


def _moved(place: slice | Tensor, by: int) -> slice | Tensor:
    return slice(place.start + by, place.stop + by) if isinstance(place, slice) else place + by


def _exchange(pieces: list[Piece], owners: list[int], own: dict[int, Scored]) -> list[Scored]:
    """The forward pass of every piece in order; those of other processes are detached."""
    if ranks.size() == 1:
        return list(own.values())
    made = []
    for number, piece in enumerate(pieces):
        tokens = piece.rollouts.tokens
        seen = torch.empty(len(fields(TokenStatistics)), len(tokens), device=tokens.device)
        if number in own:
            seen = torch.stack(list(vars(_detached(own[number])).values()))
        made.append(Scored(TokenStatistics(*ranks.share(seen, owners[number]))))
    return made
