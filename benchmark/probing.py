"""What a method may ask about prompts beyond counts: embeddings, gradient norms, agreement with trusted prompts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark.groups import segment_sum
from benchmark.layout import prompt_layout
from benchmark.rollout_gradients import gradients_and_head, places
from benchmark.rollouts import Rollouts
from benchmark.scoring import forward_hidden
from benchmark.transformer import Weights

Floats = NDArray[np.float64]
CHUNK = 64
"""Rollouts whose whole gradients exist at a time, or those of one prompt."""


@torch.no_grad()
def prompt_features(weights: Weights, prompts: list[Tensor]) -> Floats:
    """Mean over its tokens of the last hidden state of every prompt, (P, E)."""
    found = []
    for begin in range(0, len(prompts), 256):
        part = prompts[begin : begin + 256]
        length = torch.tensor([len(ids) for ids in part], device=part[0].device)
        hidden, _ = forward_hidden(weights, prompt_layout(torch.cat(part), length))
        owner = torch.repeat_interleave(torch.arange(len(part), device=length.device), length)
        total = hidden.new_zeros(len(part), hidden.shape[1]).index_add_(0, owner, hidden)
        found.append(total / length[:, None])
    return torch.cat(found).double().cpu().numpy()


def _parts(rollouts: Rollouts) -> Iterator[Tensor]:
    """Prompts in runs of at most `CHUNK` rollouts; those without a rollout are left out."""
    size = torch.bincount(rollouts.prompt, minlength=rollouts.prompts).tolist()
    chosen: list[int] = []
    load = 0
    for prompt, rows in enumerate(size):
        if chosen and load + rows > CHUNK:
            yield torch.tensor(chosen, device=rollouts.prompt.device)
            chosen, load = [], 0
        if rows:
            chosen.append(prompt)
            load += rows
    if chosen:
        yield torch.tensor(chosen, device=rollouts.prompt.device)


def gradient_norms(
    weights: Weights, rollouts: Rollouts, right: Tensor, block: str, temperature: float = 1.0
) -> tuple[Floats, Floats]:
    """Mean norm of grad log pi, and mean square of it, over every prompt's wrong and right rollouts; both (P, 2).

    Args:
        right: (R,) bool. block: ``embedding``, ``head`` or ``all``, see `benchmark.method.Probe`.
    """
    norm = torch.zeros(len(rollouts), dtype=torch.float64)
    for prompts in _parts(rollouts):
        gradient, head = gradients_and_head(weights, rollouts.select_prompts(prompts), temperature)
        if block == "embedding":
            gradient = gradient[:, places(weights)["embedding"]]
        norm[rollouts.rows_of(prompts).cpu()] = (head if block == "head" else gradient).norm(dim=1).double().cpu()
    kind = 2 * rollouts.prompt.cpu() + right.cpu().to(torch.int64)
    count = segment_sum(torch.ones_like(norm), kind, 2 * rollouts.prompts).clamp(min=1)
    means = [segment_sum(values, kind, 2 * rollouts.prompts) / count for values in (norm, norm**2)]
    return means[0].view(-1, 2).numpy(), means[1].view(-1, 2).numpy()


def halves(rollouts: Rollouts) -> Tensor:
    """2 * prompt + (0 or 1) of every rollout, (R,): even and odd rollouts of a prompt are groups of their own."""
    size = torch.bincount(rollouts.prompt, minlength=rollouts.prompts)
    number = torch.arange(len(rollouts), device=size.device) - (size.cumsum(0) - size)[rollouts.prompt]
    return 2 * rollouts.prompt + number % 2


def half_gradients(
    weights: Weights, rollouts: Rollouts, advantage: Tensor, temperature: float = 1.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Policy gradients, mean over a half of A grad log pi, of some prompts at a time: (prompts, (p, 2, D))."""
    half = halves(rollouts)
    share = advantage / segment_sum(torch.ones_like(advantage), half, 2 * rollouts.prompts)[half]
    for prompts in _parts(rollouts):
        rows = rollouts.rows_of(prompts)
        part = rollouts.select_prompts(prompts)
        gradient, _ = gradients_and_head(weights, part, temperature)
        local = 2 * part.prompt + half[rows] % 2
        result = gradient.new_zeros(2 * len(prompts), gradient.shape[1])
        yield prompts, result.index_add_(0, local, gradient * share[rows, None]).view(len(prompts), 2, -1)


def alignment(
    weights: Weights,
    rollouts: Rollouts,
    advantage: Tensor,
    trusted: Rollouts,
    trusted_advantage: Tensor,
    temperature: float = 1.0,
) -> Floats:
    """Agreement of every prompt's policy gradient g with the mean v of the trusted prompts', (P, 3).

        <g, v>,    <g, v> / (|g| |v|),    <g, v> / sqrt(<g_a, g_b> <v_a, v_b>)

    g is the mean of g_a and g_b, from the even and the odd rollouts. Noise in g makes |g| too large, so that the cosine
    is biased to 0; <g_a, g_b> is an unbiased estimate of |E g|^2 (Spearman's correction for attenuation). Where an
    estimate under the root is not positive, and where g or v is 0, the entry is 0.

    Args:
        advantage: (R,) of every rollout in its half. trusted, trusted_advantage: the same of the trusted prompts.
    """
    v = torch.zeros(0)
    for _, found in half_gradients(weights, trusted, trusted_advantage, temperature):
        v = found.sum(0) + (v if len(v) else 0.0)
    v = v / trusted.prompts
    mean = v.mean(0)
    result = np.zeros((rollouts.prompts, 3))
    for prompts, g in half_gradients(weights, rollouts, advantage, temperature):
        own = g.mean(1)
        inner = own @ mean
        plain = own.norm(dim=1) * mean.norm()
        signal = (g[:, 0] * g[:, 1]).sum(1).clamp(min=0) * torch.dot(v[0], v[1]).clamp(min=0)
        columns = [torch.where(d > 0, inner / d.clamp(min=1e-30), 0.0) for d in (plain, signal.sqrt())]
        result[prompts.cpu().numpy()] = torch.stack([inner, *columns], dim=1).double().cpu().numpy()
    return result
