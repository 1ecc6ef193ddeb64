"""From token statistics to a scalar: token weights, the clipped surrogate, regularisers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmark.groups import segment_sum
from benchmark.head import Head
from benchmark.method import Loss, TokenCredit
from benchmark.rollouts import Rollouts


def token_weights(batch: Rollouts, loss: Loss, max_tokens: int, mask: Tensor | None = None) -> Tensor:
    """Weight of every token in the loss of one update batch, (T,) float32.

    With w_r = 1, or mean(n) / n_r under ``prompt_weight="equal"`` (n_r: rollouts of r's prompt), and L_r tokens:

    - token_mean:       w_r / sum over tokens of w
    - sequence_mean:    w_r / (L_r sum over rollouts of w)
    - constant_length:  w_r / (max_tokens sum over rollouts of w)

    Tokens outside `mask` (T,) bool weigh 0 and count neither in a token sum nor in L_r.
    """
    device = batch.tokens.device
    rollout = torch.repeat_interleave(torch.arange(len(batch), device=device), batch.length)
    inside = torch.ones(len(rollout), device=device) if mask is None else mask.float()
    weight = torch.ones(len(batch), device=device)
    if loss.prompt_weight == "equal":
        size = segment_sum(weight, batch.prompt, batch.prompts)
        # Division by n_r first would round; with equal sizes the ratio is exactly 1.
        weight = (len(batch) / (size > 0).sum()) / size[batch.prompt]
    if loss.aggregation == "token_mean":
        token = weight[rollout] * inside
        return token / token.sum().clamp(min=1e-30)
    if loss.aggregation == "sequence_mean":
        length = segment_sum(inside, rollout, len(batch)).clamp(min=1)
        return (weight / length / weight.sum())[rollout] * inside
    return (weight / (max_tokens * weight.sum()))[rollout] * inside


def surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, loss: Loss) -> Tensor:
    """Per-token policy loss, (T,): PPO's clipped surrogate with optional dual clip, or the weighted log-likelihood.

    See `Loss` for the equations.
    """
    if loss.surrogate == "log_likelihood":
        return -advantage * log_prob
    ratio = torch.exp(log_prob - old_log_prob)
    plain = -advantage * ratio
    if not loss.clip:
        return plain
    clipped = torch.maximum(plain, -advantage * ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high))
    if loss.dual_clip is None:
        return clipped
    return torch.where(advantage < 0, torch.minimum(clipped, -advantage * loss.dual_clip), clipped)


def logit_losses(
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], head: Head, rollout_head: Head, advantage: Tensor
) -> Tensor:
    """`Method.logit_loss` of every token, (T,); logits exist for a chunk of rows at a time, backwards as well."""

    def of(rows: slice) -> Tensor:
        return loss(head.logits(rows), rollout_head.logits(rows), head.token[rows], advantage[rows])

    if len(head.rows) == 1:
        return of(head.rows[0])
    return torch.cat([checkpoint(of, rows, use_reentrant=False) for rows in head.rows])


def policy_loss(
    log_prob: Tensor,
    entropy: Tensor,
    old_log_prob: Tensor,
    weights: Tensor,
    credit: TokenCredit,
    loss: Loss,
    per_token: Tensor | None = None,
) -> Tensor:
    """The scalar loss of (part of) an update batch: sum over tokens of weight * per-token loss. All inputs (T,).

    `per_token` is the loss under ``surrogate="logits"``, which is no function of the other inputs.
    """
    if per_token is None:
        per_token = surrogate(log_prob, old_log_prob, credit.advantage, loss)
    if credit.kl_coefficient is not None:
        per_token = per_token + credit.kl_coefficient * (log_prob - old_log_prob).abs()
    if loss.entropy_coefficient:
        per_token = per_token - loss.entropy_coefficient * entropy
    return torch.dot(per_token, weights)
