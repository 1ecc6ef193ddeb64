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
LEAST_SIGNAL = 0.25
"""Share of a measured squared gradient that is taken for signal at least: correcting at most halves its norm."""


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


def group_gradients(
    weights: Weights, rollouts: Rollouts, credit: Tensor, temperature: float = 1.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Policy gradients of some prompts at a time, of the group, its even and its odd half: (prompts, (p, 3, D)).

    Each is the mean over its rollouts of A grad log pi, of one pass over all weights. Prompts without a rollout are
    left out.

    Args:
        credit: (R, 2) advantage A of every rollout in its group, and in its half of it (see `halves`).
    """
    half = halves(rollouts)
    one = torch.ones_like(credit[:, 0])
    whole = credit[:, 0] / segment_sum(one, rollouts.prompt, rollouts.prompts)[rollouts.prompt]
    split = credit[:, 1] / segment_sum(one, half, 2 * rollouts.prompts)[half]
    for prompts in _parts(rollouts):
        rows = rollouts.rows_of(prompts)
        part = rollouts.select_prompts(prompts)
        gradient, _ = gradients_and_head(weights, part, temperature)
        result = gradient.new_zeros(3 * len(prompts), gradient.shape[1])
        result.index_add_(0, 3 * part.prompt, gradient * whole[rows, None])
        result.index_add_(0, 3 * part.prompt + 1 + half[rows] % 2, gradient * split[rows, None])
        yield prompts, result.view(len(prompts), 3, -1)


def _signal(a: Tensor, b: Tensor) -> Tensor:
    """sqrt of <a, b>, at least `LEAST_SIGNAL` of |m|^2 with m = (a + b) / 2, of gradients (p, D); (p,)."""
    square = ((a + b) / 2).square().sum(1)
    return torch.maximum((a * b).sum(1), LEAST_SIGNAL * square).sqrt()


def alignment(
    weights: Weights,
    rollouts: Rollouts,
    credit: Tensor,
    trusted: Rollouts,
    trusted_credit: Tensor,
    temperature: float = 1.0,
) -> Floats:
    """Agreement of every prompt's policy gradient g with the mean v of the trusted prompts', (P, 3).

        <g, v>,    <g, v> / (|g| |v|),    <g', v'> / sqrt(max(<a, b>, c |g'|^2) max(<v_a, v_b>, c |v'|^2))

    g is credited within the group. Noise in it makes |g| too large, so that the cosine is biased to 0. The last column
    corrects for that (Spearman 1904, attenuation): a and b, from even and odd rollouts credited within their half, are
    independent, so <a, b> is an unbiased estimate of |E g'|^2, g' = (a + b) / 2; likewise v'. It may be anything down
    to below 0 by chance and never exceeds |g'|^2; c = `LEAST_SIGNAL` is the least share of that taken for signal,
    which bounds the correction to a factor 1 / c. An entry whose gradient or its v is 0 is 0; so is a prompt without a
    rollout.

    Args:
        credit: (R, 2) advantage of every rollout in its group, and in its half. trusted, trusted_credit: the same of
            the trusted prompts, one rollout at least.
    """
    v = torch.zeros(0)
    for _, found in group_gradients(weights, trusted, trusted_credit, temperature):
        v = found.sum(0) + (v if len(v) else 0.0)
    v = v / trusted.prompts
    result = np.zeros((rollouts.prompts, 3))
    for prompts, g in group_gradients(weights, rollouts, credit, temperature):
        inner, split = g[:, 0] @ v[0], g[:, 1:].mean(1) @ v[1:].mean(0)
        plain = g[:, 0].norm(dim=1) * v[0].norm()
        signal = _signal(g[:, 1], g[:, 2]) * _signal(v[None, 1], v[None, 2])
        ratios = [torch.where(d > 0, n / d.clamp(min=1e-30), 0.0) for n, d in ((inner, plain), (split, signal))]
        result[prompts.cpu().numpy()] = torch.stack([inner, *ratios], dim=1).double().cpu().numpy()
    return result
