"""The decode loop: prompts are computed once, their keys and values shared by the group, finished rows dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.layout import prompt_layout
from benchmark.rollouts import Rollouts, starts
from benchmark.scoring import forward_hidden
from benchmark.transformer import LayerWeights, Shape, Weights, feed_forward, project_qkv, rms_norm, rope_tables

# Rows are compacted once this share of them is live: copying the cache costs about one step.
COMPACT_BELOW = 0.75


@dataclass
class _Cache:
    """Keys (rows * K, e, slots) and values (rows * K, slots, e) of the live rows, a layer each.

    Prompts are right-aligned. Keys are stored transposed: a slice of filled slots then multiplies without a copy.
    """

    keys: list[Tensor]
    values: list[Tensor]
    bias: Tensor  # (rows, 1, prompt slots): -inf on the padding before a prompt

    def select(self, rows: Tensor, used: int, kv_heads: int) -> None:
        self.bias = self.bias[rows]
        rows = (rows[:, None] * kv_heads + torch.arange(kv_heads, device=rows.device)).flatten()
        for store, slots in ((self.keys, 2), (self.values, 1)):
            for number, old in enumerate(store):
                new = old.new_empty(len(rows), *old.shape[1:])
                new.narrow(slots, 0, used).copy_(old.narrow(slots, 0, used)[rows])
                store[number] = new


def _prefill(
    weights: Weights, prompt_tokens: Tensor, prompt_length: Tensor, owner: Tensor, max_tokens: int
) -> tuple[Tensor, _Cache, int]:
    """Last hidden state of every prompt (P, d), and the cache of every rollout row."""
    packed = prompt_layout(prompt_tokens, prompt_length)
    hidden, layers = forward_hidden(weights, packed, keep_cache=True)
    width = int(prompt_length.max())
    column = torch.arange(width, device=prompt_tokens.device) - (width - prompt_length)[:, None]
    index = torch.where(column >= 0, starts(prompt_length)[:, None] + column, 0)
    bias = torch.zeros(column.shape, dtype=hidden.dtype, device=hidden.device).masked_fill_(column < 0, float("-inf"))

    def rows_of(packed_values: Tensor) -> Tensor:
        tile = packed_values[index].transpose(1, 2)[owner].flatten(0, 1)
        return torch.cat([tile, tile.new_empty(len(tile), max_tokens, tile.shape[2])], dim=1)

    keys = [rows_of(k).transpose(1, 2).contiguous() for k, _ in layers]
    cache = _Cache(keys, [rows_of(v) for _, v in layers], bias[owner][:, None, :])
    return hidden[packed.source], cache, width


def _attend_one(shape: Shape, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention of one new token a row: q (R, H, e), keys (R * K, e, s), values (R * K, s, e); returns (R, H e)."""
    share = shape.heads // shape.kv_heads
    grouped = q.reshape(len(q) * shape.kv_heads, share, shape.head_dim) * shape.head_dim**-0.5
    scores = torch.bmm(grouped, keys)
    scores.view(len(q), shape.heads, -1)[..., : bias.shape[-1]].add_(bias)
    return torch.bmm(torch.softmax(scores, dim=-1), values).view(len(q), -1)


def _decode_layer(
    x: Tensor, layer: LayerWeights, shape: Shape, tables: tuple[Tensor, Tensor], cache: _Cache, number: int, slot: int
) -> Tensor:
    q, k, v = project_qkv(x, layer, shape, *tables)
    keys, values = cache.keys[number], cache.values[number]
    keys[:, :, slot], values[:, slot] = k.flatten(0, 1), v.flatten(0, 1)
    attended = _attend_one(shape, q, keys[:, :, : slot + 1], values[:, : slot + 1], cache.bias)
    return feed_forward(x, attended, layer, shape)


def _next_hidden(weights: Weights, token: Tensor, position: Tensor, longest: int, cache: _Cache, slot: int) -> Tensor:
    """Hidden states (R, d) after reading one `token` (R,) a row; their keys and values go to `slot` of the cache."""
    shape = weights.shape
    cos, sin = rope_tables(shape, position, longest)
    x = F.embedding(token, weights.embedding)
    tables = (cos.to(x.dtype), sin.to(x.dtype))
    for number, layer in enumerate(weights.layers):
        x = _decode_layer(x, layer, shape, tables, cache, number, slot)
    return rms_norm(x, weights.norm, shape.norm_eps)


def sample(log_p: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sample per row: the first token whose cumulative probability exceeds the uniform, (R,) int64.

    Args:
        log_p: (R, V) log-probabilities. uniform: (R,) in [0, 1).
    """
    cumulative = log_p.exp().cumsum(-1)
    # Scaling by the last sum keeps a rounded-down total from sending a draw past the vocabulary.
    return (
        torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
        .squeeze(1)
        .clamp_(max=log_p.shape[1] - 1)
    )


def ended(token: Tensor, ends: Sequence[int]) -> Tensor:
    """Which ids of `token` (R,) are among `ends`, at least one, (R,) bool."""
    found = token == ends[0]
    for end in ends[1:]:
        found |= token == end
    return found


@torch.no_grad()
def generate(
    weights: Weights,
    prompt_tokens: Tensor,
    prompt_length: Tensor,
    counts: Tensor,
    uniforms: Tensor,
    *,
    max_tokens: int,
    ends: Sequence[int],
    temperature: float = 1.0,
) -> Rollouts:
    """Sample ``counts[i]`` rollouts of every prompt i.

    Args:
        prompt_tokens: flat ids of the prompts, (sum prompt_length,).
        prompt_length: (P,) int64, >= 1.
        counts: (P,) int64, >= 0; R = sum(counts).
        uniforms: (R, max_tokens) float32 in [0, 1), one draw per token position of each rollout.
        max_tokens: token limit of a rollout.
        ends: ids any of which ends a rollout (counted as a generated token), at least one.
        temperature: softmax temperature; log-probabilities are those of the tempered distribution.

    Returns:
        Rollouts ordered by prompt, then by rollout number.
    """
    shape, device = weights.shape, prompt_tokens.device
    owner = torch.repeat_interleave(torch.arange(len(prompt_length), device=device), counts)
    rows = len(owner)
    hidden, cache, width = _prefill(weights, prompt_tokens, prompt_length, owner, max_tokens)
    hidden = hidden[owner]
    first_position = prompt_length[owner]
    longest = int(prompt_length.max()) + max_tokens

    tokens = torch.zeros(rows, max_tokens, dtype=torch.int64, device=device)
    log_probs = torch.zeros(rows, max_tokens, dtype=torch.float32, device=device)
    length = torch.full((rows,), max_tokens, dtype=torch.int64, device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    row = torch.arange(rows, device=device)  # which rollout each cache row holds
    done = torch.zeros(rows, dtype=torch.bool, device=device)

    for step in range(max_tokens):
        logits = F.linear(hidden, weights.head).float()
        log_p = F.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
        token = sample(log_p, uniforms[row, step])
        tokens[row, step] = token
        log_probs[row, step] = log_p.gather(1, token[:, None]).squeeze(1)
        last = ended(token, ends) & ~done
        length[row[last]], finished[row[last]] = step + 1, True
        done |= last
        live = len(done) - int(done.sum())
        if live == 0 or step + 1 == max_tokens:
            break
        if live <= COMPACT_BELOW * len(done):
            alive = torch.nonzero(~done).flatten()
            cache.select(alive, width + step, shape.kv_heads)
            row, token, done = row[alive], token[alive], done[alive]
        hidden = _next_hidden(weights, token, first_position[row] + step, longest, cache, width + step)

    inside = torch.arange(max_tokens, device=device) < length[:, None]
    return Rollouts(prompt_tokens, prompt_length, owner, tokens[inside], length, log_probs[inside], finished)
