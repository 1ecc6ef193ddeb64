"""The forward pass of the Qwen2 / Llama family on a transformers model's own parameters.

transformers' modules are general; this forward does less: linear layers run on packed tokens (no padding), a prompt is
computed once for its whole group of rollouts, and query/key/value and gate/up products are fused. Both decoding and
training use the functions below, so sampled and scored log-probabilities agree to rounding; the tests hold them
against the transformers forward.

Shapes: M packed tokens, d hidden size, H query heads in K key/value heads (g = H / K), e head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.errors import InputError

SUPPORTED = ("qwen2", "llama")


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that the forward needs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read a transformers config.

        Raises:
            InputError: the architecture is outside the Qwen2 / Llama family or uses scaled rotary embeddings.
        """
        if config.model_type not in SUPPORTED:
            raise InputError(
                "the native engine does not know this architecture",
                key="policy.path: model_type",
                value=config.model_type,
                remedy=f"Use a model of one of {', '.join(SUPPORTED)}",
            )
        rope = dict(config.rope_parameters or {})
        if rope.get("rope_type", "default") != "default":
            raise InputError(
                "scaled rotary embeddings are not supported by the native engine",
                key="policy.path: rope_type",
                value=rope["rope_type"],
                remedy="Use a model with default rotary embeddings",
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            norm_eps=config.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]),
            vocabulary=config.vocab_size,
        )


@dataclass(frozen=True)
class LayerWeights:
    """One layer, with fused projections; matrices are (out, in)."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Weights:
    """All weights of a policy; differentiable when made under autograd."""

    shape: Shape
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor


def fuse(model: Any) -> Weights:
    """Fused weights of a transformers causal LM. Under autograd, gradients flow to the model's parameters."""
    layers = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = None if projections[0].bias is None else torch.cat([p.bias for p in projections])
        layers.append(
            LayerWeights(
                layer.input_layernorm.weight,
                torch.cat([p.weight for p in projections]),
                bias,
                attention.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                mlp.down_proj.weight,
            )
        )
    core = model.model
    return Weights(
        Shape.of(model.config),
        core.embed_tokens.weight,
        tuple(layers),
        core.norm.weight,
        model.lm_head.weight,
    )


class _RMSNorm(torch.autograd.Function):
    """RMS norm with a three-term backward; autograd of the composite formula keeps five (M, d) intermediates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        result: Tensor = (x * scale).mul_(weight)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = (grad * normed).sum(0)
        inner = grad * weight
        mean = (inner * normed).mean(-1, keepdim=True)
        return inner.sub_(normed.mul_(mean)).mul_(scale), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up on the fused (M, 2f) product; the backward recomputes silu instead of storing it."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        torch.mul(grad, silu, out=grad_up)
        # d silu / d gate = sigmoid + silu (1 - sigmoid)
        torch.mul(sigmoid.add_(silu.mul_(1 - sigmoid)), grad, out=grad_gate).mul_(up)
        return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x (M, d)."""
    result: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for the fused (M, 2f) product, (M, f)."""
    result: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return result


@lru_cache(maxsize=8)
def _rope_table(theta: float, dim: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    inverse = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inverse)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rope_tables(shape: Shape, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """cos and signed sin of the rotary angles at `positions` (M,) < `longest`, each (M, 1, e)."""
    cos, sin = _rope_table(shape.rope_theta, shape.head_dim, -(-longest // 256) * 256, positions.device)
    half = shape.head_dim // 2
    signed = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
    return cos[positions].unsqueeze(1), signed[positions].unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (M, heads, e); `sin` carries the sign of the rotated half."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, torch.cat([x[..., half:], x[..., :half]], dim=-1), sin)


def project_qkv(
    x: Tensor, layer: LayerWeights, shape: Shape, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (M, H, e) and keys (M, K, e), and values (M, K, e) of the residual stream x (M, d)."""
    qkv = F.linear(rms_norm(x, layer.attention_norm, shape.norm_eps), layer.qkv, layer.qkv_bias)
    rotated = (shape.heads + shape.kv_heads) * shape.head_dim
    qk = rotate(qkv[:, :rotated].view(len(x), -1, shape.head_dim), cos, sin)
    return qk[:, : shape.heads], qk[:, shape.heads :], qkv[:, rotated:].view(len(x), -1, shape.head_dim)


def feed_forward(x: Tensor, attended: Tensor, layer: LayerWeights, shape: Shape) -> Tensor:
    """Close a layer: output projection of `attended` (M, H e), residual, gated MLP, residual; (M, d)."""
    x = x + F.linear(attended, layer.out)
    gate_up = F.linear(rms_norm(x, layer.mlp_norm, shape.norm_eps), layer.gate_up)
    return x + F.linear(swiglu(gate_up), layer.down)
