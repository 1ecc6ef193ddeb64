"""What a method decides. A method file holds these decisions and nothing else.

One training step asks, in order: `probe` (whether to sample before allocating), `select` (which prompts are drawn),
`allocate` (how many rollouts each prompt gets), `extend` (how many more, seeing the outcome), `keep` (which groups
train) and `keep_rollouts` (which of their rollouts), `credit` (one advantage per rollout), `modulate` (one advantage
per token), reads `loss` (clip range, aggregation, regularisers) as data, and asks `learning_rate`. Every decision has
the GRPO default, so a method states only what it changes. Decisions are pure: they see immutable views and return
arrays. What has to be computed for a decision beyond the usual is named in `needs`, and charged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark.groups import Groups
from benchmark.head import Head
from benchmark.history import HistoryView

Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]
Kind = Literal["baseline", "method", "control", "external"]
Change = Literal["allocation", "selection", "advantage", "token", "loss", "baseline", "optimiser"]
Need = Literal["head", "rollout_head", "signal"]
"""The output layer at every token; that of the policy that sampled (one more forward pass); half-batch gradients."""
Anchor = Literal["old", "rollout"]
"""The policy of the importance weights in a method's loss (`Method.anchor`)."""
SIGNAL_DECAY = 0.95
"""Of the running means of `Signal`: about the last twenty updates."""


@dataclass(frozen=True)
class Loss:
    """The policy-gradient loss as data.

    Per token, with ratio r = pi / pi_old and advantage A, the clipped surrogate of PPO (arXiv 1707.06347) is
    ``max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))``; for A < 0 it is capped at ``-A dual_clip``
    (dual clip, arXiv 1912.09729).

    Attributes:
        surrogate: ``clipped_ratio`` is the above; ``log_likelihood`` is ``-A log pi``, for methods whose `modulate`
            puts (detached) importance weights and trust regions into A; ``logits`` is `Method.logit_loss`.
        clip_low, clip_high: the clip range; ``clip=False`` uses the plain ratio.
        dual_clip: cap of the ratio where A < 0, or ``None``.
        aggregation: ``token_mean`` over all tokens of an update batch (DAPO, verl), ``sequence_mean`` (mean over
            rollouts of their token means, GRPO's paper), ``constant_length`` (sum over tokens / (rollouts x token
            limit), Dr. GRPO).
        prompt_weight: ``rollouts`` lets a prompt count by its number of rollouts n_i; ``equal`` weighs a rollout by
            mean(n) / n_i so that an uneven allocation does not change the objective.
        entropy_coefficient: c in ``L - c * mean entropy`` (same aggregation).
    """

    surrogate: Literal["clipped_ratio", "log_likelihood", "logits"] = "clipped_ratio"
    clip: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 10.0
    aggregation: Aggregation = "token_mean"
    prompt_weight: Literal["rollouts", "equal"] = "rollouts"
    entropy_coefficient: float = 0.0


@dataclass(frozen=True)
class Tokens:
    """Every generated token of one update batch, flat over rollouts. Tensors are (T,) and detached.

    Attributes:
        advantage: the rollout's advantage, repeated over its tokens.
        log_prob, old_log_prob: log pi of the sampled token under the current policy and, in the trainer's own
            arithmetic, under the weights that sampled.
        entropy: H of the current policy at the token, in nats, over the full vocabulary.
        sum_p2: sum_b pi_b^2.
        sum_p2_log_p: sum_b pi_b^2 log pi_b.
        rollout: which rollout of the update batch the token belongs to.
        uniform: one uniform draw per token from a keyed stream, for methods that pick tokens at random.
        loss: the loss the update will use (its clip range decides which tokens are clipped).
        prompt: which prompt of the update batch the token's rollout belongs to; all the same one where not given.
        head, rollout_head: the output layer of the current policy and, in the trainer's arithmetic, of the weights that
            sampled, for methods that name them in `needs`.
        rollout_log_prob: log mu, as the sampler told it. Another than `old_log_prob` only where the backend is not
            exact (vLLM, bfloat16 passes); the same where not given.
    """

    advantage: Tensor
    log_prob: Tensor
    old_log_prob: Tensor
    entropy: Tensor
    sum_p2: Tensor
    sum_p2_log_p: Tensor
    rollout: Tensor
    uniform: Tensor
    loss: Loss
    prompt: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    head: Head | None = None
    rollout_head: Head | None = None
    rollout_log_prob: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __post_init__(self) -> None:
        if len(self.rollout_log_prob) != len(self.old_log_prob):
            object.__setattr__(self, "rollout_log_prob", self.old_log_prob)
        if len(self.prompt) != len(self.rollout):
            object.__setattr__(self, "prompt", torch.zeros_like(self.rollout))

    @property
    def ratio(self) -> Tensor:
        """pi / pi_old, (T,)."""
        return torch.exp(self.log_prob - self.old_log_prob)

    @property
    def clipped(self) -> Tensor:
        """(T,) bool: the clip range stops the gradient of this token."""
        ratio = self.ratio
        high = (self.advantage > 0) & (ratio > 1 + self.loss.clip_high)
        low = (self.advantage < 0) & (ratio < 1 - self.loss.clip_low)
        return high | low


@dataclass(frozen=True)
class TokenCredit:
    """What `modulate` returns.

    Attributes:
        advantage: (T,) advantage per token; 0 removes a token's policy gradient but keeps it in the denominator.
        mask: (T,) bool, tokens that count at all (numerator and denominator); ``None`` keeps all.
        kl_coefficient: (T,) weight of the penalty |log pi - log pi_old| per token; ``None`` is 0 everywhere.
    """

    advantage: Tensor
    mask: Tensor | None = None
    kl_coefficient: Tensor | None = None


@dataclass(frozen=True)
class Signal:
    """Gradients g1, g2 of the two halves of an update's prompts, g = (g1 + g2) / 2, over all weights.

    Attributes:
        product: <g1, g2>, unbiased for |E g|^2, so it may be negative. square: |g|^2, of mean |E g|^2 + tr Cov(g).
        Both are exponential means over the updates so far, without the bias of their start; the newest counts
        1 - `SIGNAL_DECAY`.
    """

    product: float
    square: float


@dataclass(frozen=True)
class Probe:
    """Rollouts of every prompt that are drawn and verified before `allocate`, which reads their outcome.

    They have a random stream of their own, never train and do not enter the prompts' history.

    Attributes:
        rollouts: how many of every prompt of the draw, >= 1.
        charged: they count against the budget, as pre-sampling has to; ``False`` is an oracle, for controls: its
            rollouts are recorded in an account of their own, which the report names.
        candidates: it comes before `select` and covers every candidate; otherwise only the prompts selected.
        gradients: weights whose gradient norms fill ``history.probe_norm`` and ``probe_square``: the token
            ``embedding`` (a tied head included), the output ``head`` alone, or ``all``. One more forward and backward
            pass over the probe, charged.
        trusted: prompts of the pool, the same in every step, whose gradient fills ``history.probe_alignment``; as
            charged. Their groups and the probe's are credited by the method.
        trusted_rollouts: rollouts of each of them, drawn anew with every probe.
    """

    rollouts: int
    charged: bool = True
    candidates: bool = False
    gradients: Literal["embedding", "head", "all"] | None = None
    trusted: int = 0
    trusted_rollouts: int = 8

    def __post_init__(self) -> None:
        if self.rollouts < 1:
            raise ValueError(f"a probe of {self.rollouts} rollouts: at least 1")
        if self.trusted < 0 or (self.trusted and min(self.rollouts, self.trusted_rollouts) < 2):
            raise ValueError("alignment with trusted prompts needs at least 2 rollouts of every prompt: it splits them")


@dataclass(frozen=True)
class Rounds:
    """A draw in rounds: `extend` says after each what every prompt gets next. All of them are charged.

    Attributes:
        most: rounds of a draw, the first included, >= 1.
        first: mean rollouts a prompt of the first round, which `allocate` distributes; ``None`` is the protocol's.
    """

    most: int
    first: int | None = None

    def __post_init__(self) -> None:
        if self.most < 1 or (self.first is not None and self.first < 1):
            raise ValueError(f"{self.most} rounds, the first of {self.first} rollouts: at least 1")


@dataclass(frozen=True)
class Method:
    """GRPO's decisions with uniform allocation; subclasses override what they change.

    Class attributes describe the arm (`rolloutbench methods`): `family`, `kind`, `changes` (the main one first: reports
    group arms by it), `reference` (arXiv id) and `faithful_to` (what the file follows, and where it deviates). `engine`
    names who makes its steps, ``module:Class`` (`benchmark.engine`). `exchangeable` claims that `keep` and `credit` do
    not depend on the order of prompts and of their rollouts; `rolloutbench check` holds a method to it.

    `anchor` matters where a sampler's log-probabilities are not the trainer's. ``old``: importance weights start from
    `Tokens.old_log_prob`, and the update puts min(pi_old / mu, ``backend.importance_cap``) on every token. ``rollout``:
    `modulate` weighs by pi / mu with `Tokens.rollout_log_prob`, and nothing is put on top.
    """

    family: ClassVar[str] = ""
    kind: ClassVar[Kind] = "external"
    changes: ClassVar[tuple[Change, ...]] = ()
    reference: ClassVar[str] = ""
    faithful_to: ClassVar[str] = ""
    engine: ClassVar[str] = "benchmark.engine:Native"
    exchangeable: ClassVar[bool] = True
    anchor: ClassVar[Anchor] = "old"

    loss: Loss = field(default_factory=Loss)

    @property
    def max_draws(self) -> int:
        """Generation batches a step may draw while too few groups are kept (1: no dynamic sampling)."""
        return 1

    @property
    def half_life(self) -> float | None:
        """Visits after which a remembered outcome counts half; ``None`` remembers everything."""
        return None

    @property
    def probe(self) -> Probe | None:
        """Pre-sampling that `allocate` needs (``history.probe_successes`` of ``history.probe_trials``), or ``None``."""
        return None

    @property
    def features(self) -> bool:
        """Whether ``history.features`` holds an embedding of every prompt; one pass over the pool, charged.

        It is the mean over the prompt's tokens of the last hidden state of the policy before RL.
        """
        return False

    @property
    def candidates(self) -> int:
        """Prompts of the shared order that `select` sees for every prompt that is wanted."""
        return 1

    @property
    def recalls(self) -> bool:
        """Whether a group that trains and has no correct rollout gets the prompt's newest one from an earlier visit.

        It is scored by the policy that trains, which is charged, and is part of `Groups` in `credit`; the history and
        the count of rollouts leave it out.
        """
        return False

    @property
    def rounds(self) -> Rounds:
        """How often a draw may go on; one round is a draw that `extend` is not asked about."""
        return Rounds(1)

    def select(self, history: HistoryView, wanted: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """(C,) bool: which of C candidates, in the shared order, may be drawn.

        The first `wanted` of them are; those before a surplus one, and all where there is none, are passed over until
        the next epoch. Where fewer are chosen, the next candidates are looked at.
        """
        return np.ones(len(history), dtype=np.bool_)

    @property
    def needs(self) -> frozenset[Need]:
        """What `modulate`, `logit_loss` or `learning_rate` read beyond the usual; charged, and only then computed."""
        return frozenset()

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Rollouts n_i of every prompt of the batch, (P,) int64, summing to exactly `budget`.

        The default is uniform; a remainder goes to the first prompts, which the prompt order already shuffled.
        """
        prompts = len(history.trials)
        n = np.full(prompts, budget // prompts, dtype=np.int64)
        n[: budget % prompts] += 1
        return n

    def extend(self, groups: Groups, done: int) -> NDArray[np.int64]:
        """(P,) int64: rollouts that every prompt gets next, after `done` rounds with the outcome `groups`.

        Asked until `rounds` are done or nobody gets any. Where the budget cannot hold all, later prompts go without.
        """
        return np.zeros(groups.prompts, dtype=np.int64)

    def keep(self, groups: Groups) -> Tensor:
        """(P,) bool: the groups that train. Dropped groups stay charged."""
        return groups.size > 0

    def keep_rollouts(self, groups: Groups) -> Tensor:
        """(R,) bool: the rollouts that train, of groups that do; `credit` sees all. Dropped rollouts stay charged."""
        return torch.ones_like(groups.prompt, dtype=torch.bool)

    def credit(self, groups: Groups) -> Tensor:
        """(R,) float32: one advantage per rollout."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a rollout is credited")

    def modulate(self, tokens: Tokens) -> TokenCredit:
        """One advantage per token; the default repeats the rollout's."""
        return TokenCredit(tokens.advantage)

    def logit_loss(self, logits: Tensor, rollout_logits: Tensor, token: Tensor, advantage: Tensor) -> Tensor:
        """(t,) loss per token, differentiable in `logits`, under ``surrogate="logits"``; needs both heads.

        Args:
            logits, rollout_logits: (t, V) of the current policy and of the one that sampled, over the temperature.
            token: (t,) sampled ids. advantage: (t,), of `modulate`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss on logits")

    def learning_rate(self, signal: Signal) -> float:
        """Factor >= 0 on the configured learning rate of this update; asked only where `needs` names the signal."""
        return 1.0

    @property
    def modulates(self) -> bool:
        """Whether `modulate` reads statistics of the whole update batch (an extra pass where it is split)."""
        return type(self).modulate is not Method.modulate
