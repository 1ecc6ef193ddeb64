"""Gradients of single rollouts, G_j = sum_t grad log pi(a_t | s_t), exactly, projected, or of the last layer alone.

Three ways to inner products K_ij = <G_i, G_j>, which the tests hold against each other and against autograd:

- full:        per-rollout gradients of every weight from the inputs x_t of a layer and the gradients d_t of its
               outputs, sum_t d_t x_t^T for a linear layer; no loop over tokens or rollouts
- last layer:  K_ij = sum_{t in i, s in j} <delta_t, delta_s> <h_t, h_s> with delta_t = (e_a - pi) / temperature and the
               hidden state h_t, without forming a gradient (a tied embedding counts as a head here)
- projected:   a count sketch of the full gradient (Charikar, Chen, Farach-Colton 2002), one of the sparse
               Johnson-Lindenstrauss maps: unbiased inner products, relative error of a squared norm about sqrt(2 / k)

Gradients are in the coordinates of `blocks`: the fused weights of the engine, a tied embedding once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark import streams
from benchmark.layout import Layout, layout
from benchmark.rollouts import Rollouts, ragged_index, starts
from benchmark.scoring import attend, score, vocabulary_statistics
from benchmark.transformer import LayerWeights, Weights, rms_norm, rope_tables, rotate, swiglu

TILE_ROWS = 48


def blocks(weights: Weights) -> dict[str, Tensor]:
    """The distinct weight tensors by name; their concatenation, flattened, orders the coordinates of a gradient."""
    named = {"embedding": weights.embedding}
    for number, layer in enumerate(weights.layers):
        named |= {f"{number}.{part.name}": getattr(layer, part.name) for part in fields(layer)}
    named |= {"norm": weights.norm}
    if not _tied(weights):
        named["head"] = weights.head
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def flatten(weights: Weights) -> Tensor:
    """All weights as one vector (D,), in the order of `blocks`."""
    return torch.cat([tensor.flatten() for tensor in blocks(weights).values()])


def places(weights: Weights) -> dict[str, slice]:
    """Where each block lies in a gradient of D coordinates."""
    result, end = {}, 0
    for name, tensor in blocks(weights).items():
        result[name] = slice(end, end := end + tensor.numel())
    return result


def _tied(weights: Weights) -> bool:
    return weights.head.data_ptr() == weights.embedding.data_ptr()


def alone(rollouts: Rollouts) -> Rollouts:
    """The same rollouts, each with a copy of its prompt, so that no two share a token."""
    own = ragged_index(rollouts.prompt, rollouts.prompt_length)
    return Rollouts(
        rollouts.prompt_tokens[own],
        rollouts.prompt_length[rollouts.prompt],
        torch.arange(len(rollouts), device=rollouts.prompt.device),
        rollouts.tokens,
        rollouts.length,
        rollouts.log_prob,
        rollouts.finished,
    )


@dataclass
class _Tape:
    """Every operation with weights of one forward pass: (block, input, output)."""

    entries: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    def embed(self, name: str, tokens: Tensor, weight: Tensor) -> Tensor:
        result = F.embedding(tokens, weight).requires_grad_()
        self.entries.append((name, tokens, result))
        return result

    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = F.linear(x, weight, bias)
        self.entries.append((name, x.detach(), result))
        return result

    def norm(self, name: str, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        unit = rms_norm(x, torch.ones_like(weight), eps)
        result = unit * weight
        self.entries.append((name, unit.detach(), result))
        return result


def _hidden(weights: Weights, packed: Layout, tape: _Tape) -> Tensor:
    """`benchmark.scoring.forward_hidden` with its operations on the tape."""
    shape = weights.shape
    cos, sin = rope_tables(shape, packed.positions, packed.longest)
    x = tape.embed("embedding", packed.tokens, weights.embedding)
    turned = (shape.heads + shape.kv_heads) * shape.head_dim
    for number, layer in enumerate(weights.layers):
        normed = tape.norm(f"{number}.attention_norm", x, layer.attention_norm, shape.norm_eps)
        qkv = tape.linear(f"{number}.qkv", normed, layer.qkv, layer.qkv_bias)
        qk = rotate(qkv[:, :turned].view(len(x), -1, shape.head_dim), cos, sin)
        v = qkv[:, turned:].view(len(x), -1, shape.head_dim)
        answers = torch.cat([attend(tile, qk[:, : shape.heads], qk[:, shape.heads :], v) for tile in packed.tiles])
        x = x + tape.linear(f"{number}.out", answers[packed.order], layer.out)
        normed = tape.norm(f"{number}.mlp_norm", x, layer.mlp_norm, shape.norm_eps)
        gate_up = tape.linear(f"{number}.gate_up", normed, layer.gate_up)
        x = x + tape.linear(f"{number}.down", swiglu(gate_up), layer.down)
    return tape.norm("norm", x, weights.norm, shape.norm_eps)


def rollout_gradients(weights: Weights, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
    """G_j of every rollout, (R, D) float32; memory is R * D floats and the activations of R rollouts.

    Args:
        weights: the policy; need not be differentiable. rollouts: of one or more prompts.
    """
    return gradients_and_head(weights, rollouts, temperature)[0]


def gradients_and_head(weights: Weights, rollouts: Rollouts, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`rollout_gradients`, and of them what flows through the head alone, (R, V * d)."""
    tape, each = _Tape(), alone(rollouts)
    plain = _detached(weights)
    packed = layout(each, TILE_ROWS)
    hidden = _hidden(plain, packed, tape)
    predicting = F.embedding(packed.source, hidden)
    total = vocabulary_statistics(predicting, plain.head, each.tokens, temperature=temperature).log_prob.sum()
    slopes = torch.autograd.grad(total, [output for _, _, output in tape.entries])
    rows = torch.arange(len(each), device=each.tokens.device)
    owner = torch.cat([rows.repeat_interleave(each.prompt_length), rows.repeat_interleave(each.length - 1)])
    where = places(weights)
    result = torch.zeros(len(each), next(reversed(where.values())).stop, device=each.tokens.device)
    grid, inside = _grid(owner, len(each))
    for (name, x, _), slope in zip(tape.entries, slopes, strict=True):
        if name == "embedding":
            table = torch.zeros(len(each) * len(weights.embedding), slope.shape[1], device=slope.device)
            table.index_add_(0, owner * len(weights.embedding) + x, slope)
            result[:, where[name]] = table.view(len(each), -1)
        elif name.endswith("norm"):
            result[:, where[name]] = torch.zeros_like(result[:, where[name]]).index_add_(0, owner, slope * x)
        else:
            result[:, where[name]] = _products(slope, x, grid, inside)
            if f"{name}_bias" in where:
                part = result[:, where[f"{name}_bias"]]
                part.copy_(torch.zeros_like(part).index_add_(0, owner, slope))
    delta = _delta(predicting.detach(), plain.head, each.tokens, temperature)
    grid, inside = _grid(rows.repeat_interleave(each.length), len(each))
    head = _products(delta, predicting.detach(), grid, inside)
    result[:, where["embedding" if _tied(weights) else "head"]] += head
    return result, head


def _detached(weights: Weights) -> Weights:
    """The same weights outside autograd: only gradients of activations are wanted."""

    def plain(layer: LayerWeights) -> LayerWeights:
        tensors = {part.name: getattr(layer, part.name) for part in fields(layer)}
        return replace(layer, **{name: tensor.detach() for name, tensor in tensors.items() if tensor is not None})

    layers = tuple(plain(layer) for layer in weights.layers)
    return Weights(weights.shape, weights.embedding.detach(), layers, weights.norm.detach(), weights.head.detach())


def _grid(owner: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Positions (R, L) of the tokens of every row, and whether a slot is one."""
    count = torch.bincount(owner, minlength=rows)
    order = torch.argsort(owner, stable=True)
    slot = torch.arange(int(count.max()), device=owner.device)
    inside = slot < count[:, None]
    return order[torch.where(inside, starts(count)[:, None] + slot, 0)], inside


def _products(slope: Tensor, x: Tensor, grid: Tensor, inside: Tensor) -> Tensor:
    """sum_t slope_t x_t^T of every row, flattened to (R, out * in)."""
    padded = slope[grid] * inside[..., None]
    return torch.bmm(padded.transpose(1, 2), x[grid]).flatten(1)


def _delta(hidden: Tensor, head: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """d log pi(a) / d (head h): (e_a - pi) / temperature, (T, V)."""
    p = torch.softmax(F.linear(hidden, head) / temperature, dim=-1)
    return (F.one_hot(tokens, len(head)) - p) / temperature


def reference_gradients(weights: Weights, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
    """The same as `rollout_gradients` by one backward pass a rollout: slow, and what the others are tested against.

    Args:
        weights: fused under autograd.
    """
    each, wanted = alone(rollouts), list(blocks(weights).values())
    total = score(weights, each, temperature=temperature).log_prob
    rows = [
        torch.autograd.grad(part.sum(), wanted, retain_graph=True) for part in torch.split(total, each.length.tolist())
    ]
    return torch.stack([torch.cat([piece.flatten() for piece in row]) for row in rows])


def last_layer_gram(weights: Weights, rollouts: Rollouts, temperature: float = 1.0, rows: int = 32) -> Tensor:
    """K (R, R) of the gradients of the head alone, exact, from pairs of tokens; `rows` rollouts at a time."""
    plain, each = _detached(weights), alone(rollouts)
    with torch.no_grad():
        packed = layout(each, TILE_ROWS)
        hidden = F.embedding(packed.source, _hidden(plain, packed, _Tape()))
    delta = _delta(hidden, plain.head, each.tokens, temperature)
    owner = torch.arange(len(each), device=each.tokens.device).repeat_interleave(each.length)
    result = torch.zeros(len(each), len(each), device=hidden.device)
    for part in _chunks(each, rows):
        pairs = (delta[part] @ delta.T) * (hidden[part] @ hidden.T)
        columns = torch.zeros(len(pairs), len(each), device=hidden.device).index_add_(1, owner, pairs)
        result.index_add_(0, owner[part], columns)
    return result


def _chunks(rollouts: Rollouts, rows: int) -> Iterator[slice]:
    ends = torch.cumsum(rollouts.length, 0)[rows - 1 :: rows].tolist()
    total = len(rollouts.tokens)
    bounds = [0, *ends] if ends and ends[-1] == total else [0, *ends, total]
    return (slice(a, b) for a, b in pairwise(bounds))


def sketch(gradients: Tensor, width: int, seed: int = 0) -> Tensor:
    """Count sketch of gradients (R, D) to (R, width): every coordinate goes to one place with a random sign.

    E<sketch x, sketch y> = <x, y>,   Var = (|x|^2 |y|^2 + <x, y>^2 - 2 sum_d x_d^2 y_d^2) / width
    """
    rng = streams.generator("count sketch", seed, width)
    place = torch.from_numpy(rng.integers(width, size=gradients.shape[1])).to(gradients.device)
    sign = torch.from_numpy(rng.choice([-1.0, 1.0], size=gradients.shape[1])).to(gradients)
    return torch.zeros(len(gradients), width).to(gradients).index_add_(1, place, gradients * sign)
