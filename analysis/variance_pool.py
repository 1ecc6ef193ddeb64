"""Pools of rollouts of a fixed batch of prompts on one frozen checkpoint, reduced to what a replay needs.

Per prompt a few hundred rollouts are drawn, scored and differentiated once; block by block only sums remain
(`BlockSums`), in three systems of coordinates:

- gradient:    every weight
- adam:        every weight divided by sqrt(v) + epsilon, v = beta v_run + (1 - beta) m: the preconditioned update
- last layer:  the head alone

v_run are the bias-corrected second moments of the run's optimiser, m the expected square of the next update's gradient.
Adam adds it before it divides; without it, weights that the run has hardly touched (rows of rare tokens) would have all
the variance.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.variance_allocators import Known
from analysis.variance_moments import BlockSums
from benchmark import streams
from benchmark.config import RolloutConfig
from benchmark.decode import generate
from benchmark.draws import Pool
from benchmark.groups import segment_sum
from benchmark.history import PromptHistory
from benchmark.policy import Policy
from benchmark.rollout_gradients import gradients_and_head, places
from benchmark.rollouts import Rollouts
from benchmark.transformer import Weights
from benchmark.verdict import reward
from benchmark.verifier import Verifier

Floats = NDArray[np.float64]
COORDINATES = ("gradient", "adam", "last layer")
ROLLOUTS_AT_ONCE = 64  # whose gradients exist together: 64 x D floats
PLAIN = ("length", "successes", "trials", "tokens", "surprisal", "norm", "square")
PROMPTS_AT_ONCE = 8  # whose rollouts are decoded together


@dataclass(frozen=True)
class Bench:
    """A checkpoint, a fixed batch of prompts and what is needed to draw from them."""

    policy: Policy
    rollout: RolloutConfig
    pool: Pool
    verifier: Verifier
    prompts: list[int]
    device: torch.device

    def draw(self, purpose: str, number: int, each: int, chosen: list[int] | None = None) -> tuple[Rollouts, Tensor]:
        """`each` rollouts of every prompt (or of those `chosen`) and their rewards (R,), from a stream of their own."""
        prompts = self.prompts if chosen is None else chosen
        keys = np.repeat(self.pool.stream_keys(purpose, number, 0, prompts), each)
        lanes = np.tile(np.arange(each), len(prompts))
        drawn = generate(
            self.policy.fused(),
            torch.cat([self.pool.tokens[p] for p in prompts]),
            torch.tensor([len(self.pool.tokens[p]) for p in prompts], device=self.device),
            torch.full((len(prompts),), each, device=self.device),
            torch.from_numpy(streams.uniforms(keys, lanes, self.rollout.max_tokens)).float().to(self.device),
            max_tokens=self.rollout.max_tokens,
            ends=self.policy.ends,
            temperature=self.rollout.temperature,
        )
        golds = [self.pool.items[prompts[p]].answer for p in drawn.prompt.tolist()]
        verdicts = self.verifier.verify_rollouts(golds, self.policy.decode(drawn.texts()), drawn.finished.tolist())
        return drawn, torch.tensor([reward(v) for v in verdicts], device=self.device)

    def split(self, purpose: str, each: int) -> list[tuple[Rollouts, Tensor]]:
        """`each` rollouts of every prompt, a batch a prompt, and which are right, (each,) bool."""
        result = []
        for begin in range(0, len(self.prompts), PROMPTS_AT_ONCE):
            chosen = self.prompts[begin : begin + PROMPTS_AT_ONCE]
            drawn, rewards = self.draw(purpose, 0, each, chosen)
            for place in range(len(chosen)):
                one = torch.tensor([place], device=self.device)
                result.append((drawn.select_prompts(one), rewards[drawn.rows_of(one)] > 0))
        return result


@dataclass(frozen=True)
class Adam:
    """State of the optimiser at a checkpoint: bias-corrected second moments (D,), and what its step does with them."""

    second_moment: Tensor
    beta: float = 0.999
    epsilon: float = 1e-8
    minibatches: int = 1

    def scale(self, square: Tensor) -> Tensor:
        """1 / (sqrt(v) + epsilon) of the next update, whose gradient has the expected square `square`, (D,)."""
        v = self.beta * self.second_moment.to(square) + (1 - self.beta) * square
        return 1 / (v.sqrt() + self.epsilon)


@dataclass(frozen=True)
class Statistics:
    """What is kept of the pools of P prompts at one checkpoint; V = 2 classes (wrong, right).

    Attributes:
        sums: block sums by coordinates. gram: (2 P, 2 P) by coordinates, products of the sums of G of every prompt and
            class over the whole pool. length: (P,) mean tokens of a rollout.
        successes, trials, tokens, surprisal: (P,) of the history sample. norm, square: (P, 2), see `Known`.
    """

    sums: dict[str, BlockSums]
    gram: dict[str, Floats]
    length: Floats
    successes: Floats
    trials: Floats
    tokens: Floats
    surprisal: Floats
    norm: Floats
    square: Floats

    @property
    def known(self) -> Known:
        """What a rule may read."""
        history = PromptHistory(len(self.length))
        history.record(range(len(self.length)), self.successes, self.trials, self.tokens, self.surprisal)
        return Known(history.view(range(len(self.length))), self.norm, self.square)

    def save(self, path: Path) -> None:
        """Write one file, whole or not at all."""
        arrays = {name: getattr(self, name) for name in PLAIN}
        for name in self.sums:
            arrays[f"gram/{name}"] = self.gram[name]
            arrays |= {f"{part}/{name}": getattr(self.sums[name], part) for part in ("count", "square", "product")}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            names = [name.removeprefix("gram/") for name in arrays if name.startswith("gram/")]
            sums = {n: BlockSums(*(arrays[f"{part}/{n}"] for part in ("count", "square", "product"))) for n in names}
            plain = [arrays[name] for name in PLAIN]
            return cls(sums, {n: arrays[f"gram/{n}"] for n in names}, *plain)


def measure_pools(
    bench: Bench,
    adam: Adam,
    *,
    rollouts: int,
    blocks: int,
    history: int,
    progress: Callable[[float], None] = lambda _: None,
) -> Statistics:
    """Draw and reduce the pools of every prompt of the bench; `progress` gets the number of prompts that are done.

    Args:
        adam: state of the run's optimiser.
        rollouts, blocks: of a prompt's pool; blocks divides rollouts. history: rollouts of the history sample.
    """
    with torch.no_grad():
        weights = bench.policy.fused()
    prompts, temperature = len(bench.prompts), bench.rollout.temperature
    pools = bench.split("variance pool", rollouts)
    lengths = [float(pool.length.double().mean()) for pool, _ in pools]
    square = _Square(bench.rollout.rollouts_per_prompt, float(np.mean(lengths)))
    for number, (pool, right) in enumerate(pools):
        square.add(weights, pool, right, temperature)
        progress(0.4 * (number + 1))
    scale = adam.scale(square.of_update(max(1, prompts // adam.minibatches)))
    parts = []
    for number, (pool, right) in enumerate(pools):
        parts.append(_prompt_sums(weights, pool, right, scale, blocks, temperature))
        progress(0.4 * prompts + 0.6 * (number + 1))
    samples = [_sample(weights, own, right, temperature) for own, right in bench.split("variance history", history)]
    counts = np.stack([part.count for part in parts])
    classes = {name: torch.cat([part.classes[name] for part in parts]) for name in COORDINATES[::2]}
    grams = {name: _gram(rows) for name, rows in classes.items()} | {"adam": _gram(classes["gradient"] * scale)}
    sums = {
        name: BlockSums(
            counts, np.stack([part.square[name] for part in parts]), np.stack([part.product[name] for part in parts])
        )
        for name in COORDINATES
    }
    successes, tokens, surprisal, norm, squares = (np.stack(column) for column in zip(*samples, strict=True))
    return Statistics(
        sums,
        {name: grams[name] for name in COORDINATES},
        np.array(lengths),
        successes,
        np.full(len(parts), float(history)),
        tokens,
        surprisal,
        norm,
        squares,
    )


class _Square:
    """Expected square of every coordinate of an update's gradient, (D,), prompt by prompt.

    With A_j = (r_j - p) / sqrt(p (1 - p)) over a whole pool, E g^2 = (sum_i mean A G)^2 + (1/n) sum_i mean A^2 G^2, up
    to the length normaliser: enough for the denominator of Adam.
    """

    def __init__(self, group: int, length: float) -> None:
        self.group, self.length, self.prompts = group, length, 0
        self.mean, self.noise = torch.zeros(()), torch.zeros(())

    def add(self, weights: Weights, pool: Rollouts, right: Tensor, temperature: float) -> None:
        """One prompt's pool."""
        p = right.float().mean()
        A = (right.float() - p) / (p * (1 - p)).sqrt().clamp(min=1e-6) / len(right)
        for rows in torch.split(torch.arange(len(pool), device=right.device), ROLLOUTS_AT_ONCE):
            G, _ = gradients_and_head(weights, _rows(pool, rows), temperature)
            self.mean = self.mean + A[rows] @ G
            self.noise = self.noise + (A[rows] ** 2 * len(right)) @ G.square_()
        self.prompts += 1

    def of_update(self, prompts: int) -> Tensor:
        """For an update of so many prompts, drawn from those that were added."""
        mean, noise = self.mean / self.prompts, self.noise / self.prompts
        return (mean**2 + noise / (self.group * prompts)) / self.length**2


@dataclass
class _Part:
    """One prompt: count (B, 2); by coordinates square (B, 2) and product (B, 2, B, 2); class sums of G, (2, D)."""

    count: NDArray[np.int64]
    square: dict[str, Floats]
    product: dict[str, Floats]
    classes: dict[str, Tensor]


def _prompt_sums(
    weights: Weights, pool: Rollouts, right: Tensor, scale: Tensor, blocks: int, temperature: float
) -> _Part:
    total = len(pool)
    cell = 2 * (torch.arange(total, device=right.device) * blocks // total) + right
    head_size = weights.head.numel()
    sums = torch.zeros(2 * blocks, len(scale), device=right.device)
    head_sums = torch.zeros(2 * blocks, head_size, device=right.device)
    norms = torch.zeros(len(COORDINATES), total, dtype=torch.float64, device=right.device)
    columns = torch.stack([torch.ones_like(scale), scale**2], dim=1)
    for rows in torch.split(torch.arange(total, device=right.device), ROLLOUTS_AT_ONCE):
        G, head = gradients_and_head(weights, _rows(pool, rows), temperature)
        member = torch.zeros(2 * blocks, len(rows), device=right.device)
        member[cell[rows], torch.arange(len(rows), device=right.device)] = 1.0
        sums.addmm_(member, G)
        head_sums.addmm_(member, head)
        norms[:2, rows] = (G.square_() @ columns).T.double()
        norms[2, rows] = head.square_().sum(1).double()
    square = {n: segment_sum(norms[i], cell, 2 * blocks) for i, n in enumerate(COORDINATES)}
    product = {"gradient": _gram(sums), "adam": _gram(sums * scale), "last layer": _gram(head_sums)}
    classes = {n: s.view(blocks, 2, -1).sum(0) for n, s in (("gradient", sums), ("last layer", head_sums))}
    shape = (blocks, 2)
    return _Part(
        torch.bincount(cell, minlength=2 * blocks).view(shape).cpu().numpy(),
        {n: value.view(shape).cpu().numpy() for n, value in square.items()},
        {n: value.reshape(shape + shape) for n, value in product.items()},
        classes,
    )


def _rows(pool: Rollouts, rows: Tensor) -> Rollouts:
    """A run of consecutive rollouts of one prompt."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    begin, end = int(pool.length[:first].sum()), int(pool.length[:last].sum())
    part = slice(first, last)
    return Rollouts(
        pool.prompt_tokens,
        pool.prompt_length,
        pool.prompt[part],
        pool.tokens[begin:end],
        pool.length[part],
        pool.log_prob[begin:end],
        pool.finished[part],
    )


def _gram(rows: Tensor) -> Floats:
    product: Floats = (rows @ rows.T).double().cpu().numpy()
    return product


def _sample(
    weights: Weights, sample: Rollouts, right: Tensor, temperature: float
) -> tuple[float, float, float, Floats, Floats]:
    """Successes, tokens, surprisal; mean norm and mean square (2,) of the embedding's gradient, wrong and right."""
    G, _ = gradients_and_head(weights, sample, temperature)
    norm = G[:, places(weights)["embedding"]].norm(dim=1).double()
    count = segment_sum(torch.ones_like(norm), right.long(), 2).clamp(min=1)
    means = [(segment_sum(value, right.long(), 2) / count).cpu().numpy() for value in (norm, norm**2)]
    return float(right.sum()), float(sample.length.sum()), float(-sample.log_prob.double().sum()), means[0], means[1]
