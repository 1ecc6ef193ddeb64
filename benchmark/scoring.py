"""One forward pass over a packed batch: log-probability, entropy and the sums that methods need, per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.layout import Layout, Tile, layout
from benchmark.rollouts import Rollouts
from benchmark.transformer import Weights, feed_forward, project_qkv, rms_norm, rope_tables

LOGITS = 1 << 25
"""Logits that exist at a time, 128 MiB in float32: 4,096 rows of up to 8,192 words, 220 rows of 150,000."""


@dataclass(frozen=True)
class TokenStatistics:
    """Per generated token, (T,) float32; `log_prob` and `entropy` carry gradients under autograd.

    Attributes:
        log_prob: log pi of the token.
        entropy: H = -sum_b pi_b log pi_b, nats.
        sum_p2: sum_b pi_b^2.
        sum_p2_log_p: sum_b pi_b^2 log pi_b.
    """

    log_prob: Tensor
    entropy: Tensor
    sum_p2: Tensor
    sum_p2_log_p: Tensor


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32, divided by the temperature."""
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature


def chunk_rows(words: int) -> int:
    """How many tokens' logits over `words` may exist at a time: at most 4,096, and at most `LOGITS` logits."""
    return max(1, min(4096, LOGITS // words))


def _log_softmax(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(tempered(F.linear(hidden, head), temperature), dim=-1)


class _VocabularyStatistics(torch.autograd.Function):
    """Statistics over the vocabulary in chunks of rows, so that float32 logits of a whole batch never exist.

    The backward recomputes each chunk. d log pi_a / dz = e_a - pi, dH / dz = -pi (log pi + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, rows: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result = torch.empty(4, len(targets), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(targets), rows):
            part = slice(begin, begin + rows)
            log_p = _log_softmax(hidden[part], head, temperature)
            p = log_p.exp()
            result[0, part] = log_p.gather(1, targets[part, None]).squeeze(1)
            weighted = p * log_p
            # 0 log 0 = 0: a probability that underflows has log p = -inf only for masked logits, never here.
            result[1, part] = -weighted.sum(-1)
            result[3, part] = torch.linalg.vecdot(weighted, p)
            result[2, part] = torch.linalg.vecdot(p, p)
        ctx.save_for_backward(hidden, head, targets, result[1])
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(sum_p2 := result[2].clone(), sum_p2_log_p := result[3].clone())
        ctx.set_materialize_grads(False)
        return result[0].clone(), result[1].clone(), sum_p2, sum_p2_log_p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, head, targets, entropy = ctx.saved_tensors
        grad_log_prob, grad_entropy = grads[0], grads[1]
        grad_hidden = torch.zeros_like(hidden)
        # Chunks add up in float32 whatever the head's precision; a frozen head costs nothing.
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for begin in range(0, len(targets), ctx.rows):
            part = slice(begin, begin + ctx.rows)
            log_p = _log_softmax(hidden[part], head, ctx.temperature)
            p = log_p.exp()
            grad = torch.zeros_like(p)
            if grad_log_prob is not None:
                grad = p * -grad_log_prob[part, None]
                grad.scatter_add_(1, targets[part, None], grad_log_prob[part, None])
            if grad_entropy is not None:
                grad -= p * (log_p + entropy[part, None]) * grad_entropy[part, None]
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            grad_hidden[part] = grad @ head
            if grad_head is not None and head.dtype == torch.float32:
                grad_head.addmm_(grad.t(), hidden[part])
            elif grad_head is not None:
                grad_head += grad.t() @ hidden[part]
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None, None, None


def vocabulary_statistics(
    hidden: Tensor, head: Tensor, targets: Tensor, *, temperature: float = 1.0, rows: int | None = None
) -> TokenStatistics:
    """Statistics of softmax(hidden @ head.T / temperature) at `targets`.

    Args:
        hidden: (T, d). head: (V, d). targets: (T,) int64.
        rows: rows whose logits exist at a time (memory: about 3 * rows * V floats); ``None`` is
            `chunk_rows`.
    """
    rows = rows or chunk_rows(len(head))
    values = _VocabularyStatistics.apply(hidden, head, targets, temperature, rows)  # type: ignore[no-untyped-call]
    return TokenStatistics(*values)


class _Unpad(torch.autograd.Function):
    """Rows `index` of a padded (slots, ...) tensor; each slot is read at most once, so the backward is a copy."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.slots = len(padded)
        return padded.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        (grad,) = grads
        return grad.new_zeros(ctx.slots, *grad.shape[1:]).index_copy_(0, index, grad), None


def attend(tile: Tile, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped-query attention of one tile; q (M, H, e), k and v (M, K, e) packed. Returns (answers, H * e)."""
    heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[2]
    share, rows, queries, keys = heads // kv_heads, tile.rows, tile.queries, tile.keys
    # F.embedding is index_select with the fast scatter-add backward that repeated prompt keys need.
    q_tile = F.embedding(tile.query, q.reshape(len(q), -1)).view(rows, queries, kv_heads, share, size)
    q_tile = q_tile.permute(0, 2, 3, 1, 4).reshape(rows * kv_heads, share * queries, size)
    kv = F.embedding(tile.key, torch.cat([k, v], dim=1).view(len(k), -1)).view(rows, keys, 2 * kv_heads, size)
    kv = kv.transpose(1, 2)
    k_tile = kv[:, :kv_heads].reshape(rows * kv_heads, keys, size)
    v_tile = kv[:, kv_heads:].reshape(rows * kv_heads, keys, size)
    scores = torch.bmm(q_tile * size**-0.5, k_tile.transpose(1, 2))
    scores.view(rows, kv_heads * share, queries, keys).add_(tile.bias)
    mixed = torch.bmm(torch.softmax(scores, dim=-1), v_tile)
    mixed = mixed.view(rows, heads, queries, size).transpose(1, 2).reshape(rows * queries, heads * size)
    result: Tensor = _Unpad.apply(mixed, tile.inverse)  # type: ignore[no-untyped-call]
    return result


def forward_hidden(
    weights: Weights, packed: Layout, keep_cache: bool = False
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Final normalised hidden states (M, d), and with `keep_cache` the keys and values (M, K, e) of every layer."""
    shape = weights.shape
    cos, sin = rope_tables(shape, packed.positions, packed.longest)
    x = F.embedding(packed.tokens, weights.embedding)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    cache = []
    for layer in weights.layers:
        q, k, v = project_qkv(x, layer, shape, cos, sin)
        if keep_cache:
            cache.append((k, v))
        answers = [attend(tile, q, k, v) for tile in packed.tiles]
        attended: Tensor = _Unpad.apply(torch.cat(answers), packed.order)  # type: ignore[no-untyped-call]
        x = feed_forward(x, attended, layer, shape)
    return rms_norm(x, weights.norm, shape.norm_eps), cache


def states(weights: Weights, batch: Rollouts, tile_rows: int = 48) -> Tensor:
    """Hidden states from which `weights` predict every generated token of `batch`, (T, d), in its token order."""
    packed = layout(batch, tile_rows)
    hidden, _ = forward_hidden(weights, packed)
    return F.embedding(packed.source, hidden)


def score(weights: Weights, batch: Rollouts, *, temperature: float = 1.0, tile_rows: int = 48) -> TokenStatistics:
    """Statistics of every generated token of `batch` under `weights`, (T,) each, in the batch's token order."""
    return vocabulary_statistics(states(weights, batch, tile_rows), weights.head, batch.tokens, temperature=temperature)
