"""The second half of a step: credit -> modulate -> loss -> update, for every minibatch of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from benchmark import streams
from benchmark.backend import Backend, Piece
from benchmark.clock import Clock
from benchmark.collect import Batch
from benchmark.config import OptimiserConfig
from benchmark.ledger import Ledger, Prices
from benchmark.losses import policy_loss, token_weights
from benchmark.method import Loss, Method, TokenCredit, Tokens
from benchmark.numerics import FailedBatch, NumericalError, check_tokens
from benchmark.policy import Policy
from benchmark.rollouts import Rollouts, ragged_index
from benchmark.scoring import TokenStatistics
from benchmark.trace import Trace


@dataclass
class Averages:
    """Token- or update-weighted means of metrics, kept as tensors until read (no sync per update)."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Count the scalar `value` with `weight` towards the mean of `name`."""
        self.sums[name] = self.sums.get(name, torch.zeros(())) + value.detach() * weight
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def maximum(self, name: str, value: Tensor) -> None:
        """Raise the maximum of `name` to the scalar `value`."""
        old = self.maxima.get(name)
        self.maxima[name] = value.detach() if old is None else torch.maximum(old, value.detach())

    def read(self) -> dict[str, float]:
        """Every mean and maximum so far; waits for the device."""
        means = {name: float(total) / self.weights[name] for name, total in self.sums.items()}
        return means | {name: float(value) for name, value in self.maxima.items()}


def make_optimiser(policy: Policy, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW over all parameters, one fused kernel."""
    return torch.optim.AdamW(
        policy.parameters().values(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


@dataclass
class Updater:
    """Turns a batch into ``epochs x minibatches_per_batch`` optimiser updates."""

    method: Method
    backend: Backend
    optimiser: torch.optim.AdamW
    config: OptimiserConfig
    temperature: float
    seed: int
    ledger: Ledger
    prices: Prices
    clock: Clock
    updates: int = 0
    trace: Trace | None = None

    def update(self, step: int, batch: Batch) -> dict[str, float]:
        """Train on `batch`; returns metrics of the step.

        Raises:
            NumericalError: a loss, gradient norm, log-probability, ratio, entropy or advantage is not finite or out of
                range; it holds the minibatch, and the weights are those from before it.
        """
        advantage = self.method.credit(batch.groups)
        if self.trace is not None:
            self.trace.begin(step, batch)
        metrics = Averages()
        trained = 0
        rollouts, correction = batch.rollouts, None
        if not self.backend.exact:
            rollouts, correction = self._rescore(step, rollouts, metrics)
        for epoch in range(self.config.epochs):
            order = streams.generator(self.seed, "minibatch", step, epoch).permutation(batch.rollouts.prompts)
            for prompts in torch.from_numpy(order).to(advantage.device).tensor_split(self.config.minibatches_per_batch):
                part = rollouts.select_prompts(prompts)
                if len(part) == 0:
                    continue
                rows = rollouts.rows_of(prompts)
                weight = None if correction is None else correction[ragged_index(rows, rollouts.length)]
                self._guarded(step, prompts, part, advantage[rows], weight, batch.groups.max_tokens, metrics)
                trained += len(part.tokens)
        prompt_tokens = int(batch.rollouts.prompt_length.sum()) * self.config.epochs
        both = self.prices.forward(trained + prompt_tokens) + self.prices.backward(trained + prompt_tokens)
        self.ledger.charge(step, "backprop", tokens_backpropagated=trained, flops=both)
        return metrics.read()

    def again(self, batch: FailedBatch) -> dict[str, float]:
        """The update of one saved minibatch; its metrics.

        Raises:
            NumericalError: it fails again.
        """
        assert batch.advantage is not None
        metrics, prompts = Averages(), torch.arange(batch.rollouts.prompts, device=batch.advantage.device)
        given = (batch.rollouts, batch.advantage, batch.correction, batch.max_tokens)
        self._guarded(batch.step, prompts, *given, metrics)
        return metrics.read()

    def _guarded(
        self,
        step: int,
        prompts: Tensor,
        part: Rollouts,
        advantage: Tensor,
        correction: Tensor | None,
        max_tokens: int,
        metrics: Averages,
    ) -> None:
        try:
            self._minibatch(step, prompts, part, advantage, correction, max_tokens, metrics)
        except NumericalError as error:
            where = f"step {step}, update {self.updates} of {type(self.method).__name__}"
            batch = FailedBatch(part, advantage, correction, step, self.updates, max_tokens)
            raise NumericalError(f"{where}: {error}", batch) from None

    def _rescore(self, step: int, rollouts: Rollouts, metrics: Averages) -> tuple[Rollouts, Tensor | None]:
        """`rollouts` with the trainer's log-probabilities, and the weight that corrects each token for the sampler's.

        Truncated importance sampling: min(pi_train / pi_sample, cap), (T,). Ratios and clip ranges then start from the
        policy that is trained, whatever the sampler's rounding.
        """
        seen = _join(self._score_ahead(step, rollouts, self.backend.split(rollouts)))
        gap = seen.log_prob - rollouts.log_prob
        count, cap = float(len(gap)), self.backend.config.importance_cap
        metrics.add("policy/logprob_abs_diff", gap.abs().mean(), count)
        metrics.maximum("policy/logprob_abs_diff_max", gap.abs().max())
        rescored = replace(rollouts, log_prob=seen.log_prob)
        if cap is None:
            return rescored, None
        metrics.add("policy/importance_truncated_fraction", (gap.exp() > cap).float().mean(), count)
        return rescored, gap.exp().clamp(max=cap)

    def _minibatch(
        self,
        step: int,
        prompts: Tensor,
        part: Rollouts,
        advantage: Tensor,
        correction: Tensor | None,
        max_tokens: int,
        metrics: Averages,
    ) -> None:
        pieces = self.backend.split(part)
        rollout = torch.repeat_interleave(torch.arange(len(part), device=part.tokens.device), part.length)
        advantage = advantage[rollout]
        credit = TokenCredit(advantage)
        # A minibatch of one piece is scored once, for the method's eyes and for its gradient.
        ready = [self._score(part)] if len(pieces) == 1 else []
        if self.method.modulates:
            seen = _join(ready or self._score_ahead(step, part, pieces))
            check_tokens(seen, part.log_prob, advantage, self.backend.policy.vocabulary)
            credit = self.method.modulate(self._tokens(step, part, advantage, rollout, seen))
        weights = token_weights(part, self.method.loss, max_tokens, credit.mask)
        if correction is not None:
            weights = weights * correction
        self.optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=part.tokens.device)
        scored: list[TokenStatistics] = []
        for rows, begin, end in pieces:
            piece = ready.pop() if ready else self._score(rows)
            here = slice(begin, end)
            local = TokenCredit(
                credit.advantage[here],
                kl_coefficient=None if credit.kl_coefficient is None else credit.kl_coefficient[here],
            )
            with self.clock.phase("forward"):
                loss = policy_loss(
                    piece.log_prob, piece.entropy, part.log_prob[here], weights[here], local, self.method.loss
                )
            with self.clock.phase("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            scored.append(_join([piece]))
        whole = _join(scored)
        check_tokens(whole, part.log_prob, credit.advantage, self.backend.policy.vocabulary)
        self._step(total, metrics)
        _observe(whole, part.log_prob, advantage, credit, self.method.loss, metrics)
        if self.trace is not None:
            self.trace.observe(prompts, part, whole, advantage, credit)

    def _score(self, rows: Rollouts) -> TokenStatistics:
        with self.clock.phase("forward"):
            return self.backend.score(rows, self.temperature)

    def _score_ahead(self, step: int, part: Rollouts, pieces: list[Piece]) -> list[TokenStatistics]:
        """Statistics of a minibatch too large for one pass, before its gradients: methods see all of it at once."""
        with torch.no_grad():
            parts = [self._score(rows) for rows, _, _ in pieces]
        read = len(part.tokens) + int(part.prompt_length.sum())
        self.ledger.charge(step, "score", tokens_scored=len(part.tokens), flops=self.prices.forward(read))
        return parts

    def _tokens(self, step: int, part: Rollouts, advantage: Tensor, rollout: Tensor, seen: TokenStatistics) -> Tokens:
        draws = streams.generator(self.seed, "token", step, self.updates).random(len(part.tokens))
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
        )

    def _step(self, loss: Tensor, metrics: Averages) -> None:
        with self.clock.phase("optimiser"):
            warm = min(1.0, (self.updates + 1) / max(1, self.config.warmup_steps))
            for group in self.optimiser.param_groups:
                group["lr"] = self.config.learning_rate * warm
            norm = torch.nn.utils.clip_grad_norm_(self.backend.policy.parameters().values(), self.config.gradient_clip)
            if not bool(torch.isfinite(norm + loss)):
                raise NumericalError(f"loss {float(loss)}, gradient norm {float(norm)}")
            self.optimiser.step()
        self.updates += 1
        metrics.add("optim/loss", loss)
        metrics.add("optim/gradient_norm", norm)
        metrics.add("optim/learning_rate", torch.tensor(self.config.learning_rate * warm))


def _join(parts: Sequence[TokenStatistics]) -> TokenStatistics:
    """The statistics of consecutive pieces as one, detached."""
    columns = ([getattr(part, field.name).detach() for part in parts] for field in fields(TokenStatistics))
    return TokenStatistics(*map(torch.cat, columns))


def _observe(
    seen: TokenStatistics, old_log_prob: Tensor, advantage: Tensor, credit: TokenCredit, loss: Loss, metrics: Averages
) -> None:
    """Policy and modulation metrics of one update, token-weighted, as its gradient saw them."""
    count = float(len(advantage))
    change = seen.log_prob - old_log_prob
    ratio = change.exp()
    metrics.add("policy/entropy_nats", seen.entropy.mean(), count)
    metrics.add("policy/kl_old_nats", (ratio - 1 - change).mean(), count)
    metrics.maximum("policy/ratio_max", ratio.max())
    given = credit.advantage
    metrics.add("policy/clip_high_fraction", ((given > 0) & (ratio > 1 + loss.clip_high)).float().mean(), count)
    metrics.add("policy/clip_low_fraction", ((given < 0) & (ratio < 1 - loss.clip_low)).float().mean(), count)
    active = advantage != 0
    if bool(active.any()):
        metrics.add("modulation/factor_mean", (given[active] / advantage[active]).mean(), float(active.sum()))
