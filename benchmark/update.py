"""The second half of a step: credit -> modulate -> loss -> update, for every minibatch of the batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmark import streams
from benchmark.clock import Clock
from benchmark.collect import Batch
from benchmark.config import OptimiserConfig
from benchmark.ledger import Ledger, Prices
from benchmark.losses import policy_loss, token_weights
from benchmark.method import Method, TokenCredit, Tokens
from benchmark.policy import Policy
from benchmark.rollouts import Rollouts
from benchmark.scoring import TokenStatistics, score


class NumericalError(FloatingPointError):
    """A loss or gradient is not finite; the run stops instead of training on it."""


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
    policy: Policy
    optimiser: torch.optim.AdamW
    config: OptimiserConfig
    temperature: float
    seed: int
    ledger: Ledger
    prices: Prices
    clock: Clock
    tokens_per_pass: int = 65_536  # tokens whose activations are held at a time
    updates: int = 0

    def update(self, step: int, batch: Batch) -> dict[str, float]:
        """Train on `batch`; returns metrics of the step.

        Raises:
            NumericalError: a loss or gradient norm is NaN or infinite.
        """
        advantage = self.method.credit(batch.groups)
        metrics = Averages()
        trained = 0
        for epoch in range(self.config.epochs):
            order = streams.generator(self.seed, "minibatch", step, epoch).permutation(batch.rollouts.prompts)
            for prompts in torch.from_numpy(order).to(advantage.device).tensor_split(self.config.minibatches_per_batch):
                part = batch.rollouts.select_prompts(prompts)
                if len(part) == 0:
                    continue
                self._minibatch(
                    step, part, advantage[batch.rollouts.rows_of(prompts)], batch.groups.max_tokens, metrics
                )
                trained += len(part.tokens)
        prompt_tokens = int(batch.rollouts.prompt_length.sum()) * self.config.epochs
        both = self.prices.forward(trained + prompt_tokens) + self.prices.backward(trained + prompt_tokens)
        self.ledger.charge(step, "backprop", tokens_backpropagated=trained, flops=both)
        return metrics.read()

    def _minibatch(self, step: int, part: Rollouts, advantage: Tensor, max_tokens: int, metrics: Averages) -> None:
        pieces = self._split(part)
        rollout = torch.repeat_interleave(torch.arange(len(part), device=part.tokens.device), part.length)
        statistics: TokenStatistics | None = None
        if len(pieces) == 1:
            with self.clock.phase("forward"):
                statistics = score(self.policy.fused(), part, temperature=self.temperature)
            seen = statistics
        else:
            seen = self._statistics(step, part, pieces)
        tokens = self._tokens(step, part, advantage[rollout], rollout, seen)
        credit = self.method.modulate(tokens)
        weights = token_weights(part, self.method.loss, max_tokens, credit.mask)
        self.optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=part.tokens.device)
        for rows, begin, end in pieces:
            if statistics is None:
                with self.clock.phase("forward"):
                    piece = score(self.policy.fused(), rows, temperature=self.temperature)
            else:
                piece = statistics
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
        self._step(step, total, metrics)
        _observe(tokens, credit, metrics)

    def _statistics(self, step: int, part: Rollouts, pieces: list[tuple[Rollouts, int, int]]) -> TokenStatistics:
        """Statistics of a minibatch too large for one pass, before its gradients: methods see all of it at once.

        A method that does not modulate needs none; it gets the rollout policy's log-probabilities for its metrics.
        """
        if not self.method.modulates:
            zero = torch.zeros_like(part.log_prob)
            return TokenStatistics(part.log_prob, zero, zero, zero)
        with torch.no_grad(), self.clock.phase("forward"):
            parts = [score(self.policy.fused(), rows, temperature=self.temperature) for rows, _, _ in pieces]
        read = len(part.tokens) + int(part.prompt_length.sum())
        self.ledger.charge(step, "score", tokens_scored=len(part.tokens), flops=self.prices.forward(read))
        names = ("log_prob", "entropy", "sum_p2", "sum_p2_log_p")
        return TokenStatistics(*(torch.cat([getattr(p, name) for p in parts]) for name in names))

    def _tokens(self, step: int, part: Rollouts, advantage: Tensor, rollout: Tensor, seen: TokenStatistics) -> Tokens:
        draws = streams.generator(self.seed, "token", step, self.updates).random(len(part.tokens))
        return Tokens(
            advantage,
            seen.log_prob.detach(),
            part.log_prob,
            seen.entropy.detach(),
            seen.sum_p2,
            seen.sum_p2_log_p,
            rollout,
            torch.from_numpy(draws).to(advantage),
            self.method.loss,
        )

    def _split(self, part: Rollouts) -> list[tuple[Rollouts, int, int]]:
        """Cut a minibatch between prompts so that each piece holds at most `tokens_per_pass` tokens (or one prompt)."""
        if len(part.tokens) + len(part.prompt_tokens) <= self.tokens_per_pass:
            return [(part, 0, len(part.tokens))]
        per_prompt = torch.zeros(part.prompts, dtype=torch.int64).index_add_(0, part.prompt.cpu(), part.length.cpu())
        pieces: list[tuple[Rollouts, int, int]] = []
        chosen: list[int] = []
        load = begin = 0
        for prompt, tokens in enumerate(per_prompt.tolist()):
            cost = tokens + int(part.prompt_length[prompt])
            if chosen and load + cost > self.tokens_per_pass:
                rows = part.select_prompts(torch.tensor(chosen, device=part.tokens.device))
                pieces.append((rows, begin, begin + len(rows.tokens)))
                begin, chosen, load = begin + len(rows.tokens), [], 0
            chosen.append(prompt)
            load += cost
        rows = part.select_prompts(torch.tensor(chosen, device=part.tokens.device))
        return [*pieces, (rows, begin, begin + len(rows.tokens))]

    def _step(self, step: int, loss: Tensor, metrics: Averages) -> None:
        with self.clock.phase("optimiser"):
            warm = min(1.0, (self.updates + 1) / max(1, self.config.warmup_steps))
            for group in self.optimiser.param_groups:
                group["lr"] = self.config.learning_rate * warm
            norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters().values(), self.config.gradient_clip)
            if not bool(torch.isfinite(norm + loss)):
                raise NumericalError(
                    f"step {step}, update {self.updates} of {type(self.method).__name__}: loss {float(loss)}, "
                    f"gradient norm {float(norm)}. Lower optimiser.learning_rate or look at the log-probabilities"
                )
            self.optimiser.step()
        self.updates += 1
        metrics.add("optim/loss", loss)
        metrics.add("optim/gradient_norm", norm)
        metrics.add("optim/learning_rate", torch.tensor(self.config.learning_rate * warm))


def _observe(tokens: Tokens, credit: TokenCredit, metrics: Averages) -> None:
    """Policy and modulation metrics of one update, token-weighted."""
    count = float(len(tokens.advantage))
    ratio = tokens.ratio
    metrics.add("policy/entropy_nats", tokens.entropy.mean(), count)
    metrics.add("policy/kl_old_nats", (ratio - 1 - (tokens.log_prob - tokens.old_log_prob)).mean(), count)
    metrics.maximum("policy/ratio_max", ratio.max())
    loss, advantage = tokens.loss, credit.advantage
    metrics.add("policy/clip_high_fraction", ((advantage > 0) & (ratio > 1 + loss.clip_high)).float().mean(), count)
    metrics.add("policy/clip_low_fraction", ((advantage < 0) & (ratio < 1 - loss.clip_low)).float().mean(), count)
    active = tokens.advantage != 0
    factor = torch.where(active, credit.advantage / torch.where(active, tokens.advantage, 1.0), 1.0)
    metrics.add(
        "modulation/factor_mean",
        factor.sum() / active.sum().clamp(min=1) if bool(active.any()) else factor.mean(),
        count,
    )
