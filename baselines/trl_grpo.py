"""Stock TRL (`trl.GRPOTrainer`) as arms: the field's GRPO beside the suite's, on the same account.

The fields below are arguments of `trl.GRPOConfig`; TRL computes everything. `credit` and `loss` say what it is expected
to compute, and a test holds TRL's advantages, loss and gradient against them. Where TRL has no equivalent it is said:
no dynamic sampling in `trl_dapo`; minibatches are cut from shuffled rollouts, not between prompts; the standard
deviation has 1e-4 added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from baselines.grpo import GRPO, normalised
from benchmark.groups import Groups
from benchmark.method import Change, Kind, Loss

LOSS_TYPES = {"token_mean": "bnpo", "sequence_mean": "grpo", "constant_length": "dr_grpo"}


@dataclass(frozen=True)
class TRLGRPO(GRPO):
    """GRPO by TRL, with the loss that the suite's `grpo` has.

    Attributes:
        scale_rewards: divide advantages by the standard deviation of the group, or not.
        batch_normaliser: ``token_mean`` divides by the mean tokens of a minibatch of the generation batch (TRL's
            ``loss_type="dapo"``) instead of those of the minibatch itself (``"bnpo"``).

    Raises:
        ValueError: TRL has no such loss.
    """

    family: ClassVar[str] = "group advantage"
    kind: ClassVar[Kind] = "external"
    changes: ClassVar[tuple[Change, ...]] = ()
    faithful_to: ClassVar[str] = "trl.GRPOTrainer as it is, loss_type bnpo"
    engine: ClassVar[str] = "benchmark.engine_trl:TRL"

    epsilon: float = 1e-4
    scale_rewards: Literal["group", "none"] = "group"
    batch_normaliser: bool = False

    def __post_init__(self) -> None:
        loss = self.loss
        if loss.surrogate != "clipped_ratio" or not loss.clip or loss.prompt_weight != "rollouts":
            raise ValueError("TRL has the clipped surrogate with prompts weighted by their rollouts only")
        if loss.entropy_coefficient or self.epsilon != 1e-4:
            raise ValueError("epsilon is fixed at 1e-4 by TRL, and its entropy bonus is averaged in another way")
        if self.batch_normaliser and loss.aggregation != "token_mean":
            raise ValueError("batch_normaliser belongs to token_mean")
        if loss.dual_clip is not None and loss.dual_clip < 1 + loss.clip_high:
            raise ValueError("TRL's dual_clip caps ratios of both signs: let it be at least 1 + clip_high")

    def credit(self, groups: Groups) -> Tensor:
        """(r - mean) / (std + 1e-4), or r - mean, (R,): what TRL computes itself."""
        return self._scaled(groups, groups.reward)

    def _scaled(self, groups: Groups, reward: Tensor) -> Tensor:
        return normalised(groups, reward, self.epsilon) if self.scale_rewards == "group" else groups.centred(reward)

    def grpo_config(self) -> Mapping[str, Any]:
        """Arguments of `trl.GRPOConfig`."""
        return {
            "loss_type": "dapo" if self.batch_normaliser else LOSS_TYPES[self.loss.aggregation],
            "epsilon": self.loss.clip_low,
            "epsilon_high": self.loss.clip_high,
            "delta": self.loss.dual_clip,
            "scale_rewards": self.scale_rewards,
            "beta": 0.0,
        }

    @property
    def overlong(self) -> tuple[float, float]:
        """No overlong penalty."""
        return 0.0, 0.0


@dataclass(frozen=True)
class TRLDAPO(TRLGRPO):
    """DAPO as far as TRL has it: Clip-Higher, its ``dapo`` loss, soft overlong punishment; no dynamic sampling."""

    family: ClassVar[str] = "dynamic sampling"
    changes: ClassVar[tuple[Change, ...]] = ("advantage", "loss")
    reference: ClassVar[str] = "2503.14476"
    faithful_to: ClassVar[str] = "trl.GRPOTrainer as it is, loss_type dapo; without dynamic sampling, which it lacks"

    loss: Loss = field(default_factory=lambda: Loss(clip_high=0.28))
    batch_normaliser: bool = True
    buffer_fraction: float = 0.2
    overlong_factor: float = 1.0

    def credit(self, groups: Groups) -> Tensor:
        """As GRPO, with TRL's soft overlong punishment added to the rewards."""
        buffer = int(self.buffer_fraction * groups.max_tokens)
        late = (groups.length - (groups.max_tokens - buffer)).float() / max(1, buffer)
        shaped = groups.reward - self.overlong_factor * late.clamp(0, 1)
        return self._scaled(groups, shaped)

    @property
    def overlong(self) -> tuple[float, float]:
        """Buffer as a share of the token limit, and weight of the penalty."""
        return self.buffer_fraction, self.overlong_factor
