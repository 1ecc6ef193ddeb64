"""Forgetting when the prompts change, and an EMA of the weights against it.

A policy is trained on one family of problems, then on another; both are evaluated before, between and after. Beside the
policy, an exponential mean of its weights is kept through the second phase, a step of it after every training step:

    ema <- decay ema + (1 - decay) weights,    ema = the weights at the beginning of the phase

The EMA is not trained on: it is a second candidate at no cost in rollouts. It must be judged on both families, since
standing still forgets nothing. ``python -m analysis.forgetting`` prints the table.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmark.compose import compose_run
from benchmark.config import RunConfig
from benchmark.run import Run
from benchmark.warmup import ensure_policy

Row = tuple[str, str, float]
"""When, family, pass@1."""


@dataclass
class Mean:
    """The exponential mean of some weights, bias included: it starts at `weights`."""

    weights: dict[str, Tensor]
    decay: float

    def update(self, now: dict[str, Tensor]) -> None:
        """One step of the mean."""
        for name, value in self.weights.items():
            value.lerp_(now[name].detach(), 1 - self.decay)


@contextmanager
def in_place(run: Run, weights: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the run's policy has other weights."""
    own = {name: value.detach().clone() for name, value in run.policy.parameters().items()}
    _put(run, weights)
    try:
        yield
    finally:
        _put(run, own)


@torch.no_grad()
def _put(run: Run, weights: dict[str, Tensor]) -> None:
    for name, parameter in run.policy.parameters().items():
        parameter.copy_(weights[name])


def accuracy(run: Run, samples: int) -> dict[str, float]:
    """pass@1 of every family."""
    rows, _ = run.evaluator.evaluate(samples)
    families = {str(row["family"]) for row in rows}
    return {
        family: float(np.mean([row["c"] / row["n"] for row in rows if row["family"] == family])) for family in families
    }


def forgetting(config: RunConfig, first: str, second: str, decays: Sequence[float], samples: int = 16) -> list[Row]:
    """Train on `first`, then on `second`, each for the budget of `config`; every family is evaluated at each moment.

    Args:
        config: a run whose task mixes both families; only its share of training items changes.
        decays: of the EMAs, a step.
    """
    found: list[Row] = []

    def look(run: Run, moment: str) -> None:
        found.extend((moment, family, value) for family, value in sorted(accuracy(run, samples).items()))

    start = ensure_policy(config)  # of the mix: one family alone would be warmed up for itself
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "first", Path(folder) / "second"
        with _opened(only(config, first, start), one) as run:
            look(run, "before")
            _train(run, [])
            look(run, f"after {first}")
            run.policy.save(one / "policy")
        with _opened(only(config, second, one / "policy"), two) as run:
            weights = run.policy.parameters().items()
            means = [Mean({name: value.detach().clone() for name, value in weights}, decay) for decay in decays]
            _train(run, means)
            look(run, f"then {second}")
            for mean in means:
                with in_place(run, mean.weights):
                    look(run, f"then {second}, EMA {mean.decay:g}")
    return found


def only(config: RunConfig, family: str, path: str | Path) -> RunConfig:
    """The same run from the policy at `path`, all training items of one family; evaluation stays on all of them."""
    mix = tuple(part.model_copy(update={"weight": 1.0 if part.name == family else 1e-9}) for part in config.task.mix)
    task = config.task.model_copy(update={"mix": mix})
    policy = config.policy.model_copy(update={"path": str(path)})
    return config.model_copy(update={"task": task, "policy": policy})


@contextmanager
def _opened(config: RunConfig, out: Path) -> Iterator[Run]:
    out.mkdir(parents=True)
    run = Run(config, out, lambda _: None)
    with run.verifier, contextlib.closing(run.backend), contextlib.closing(run):
        yield run


def _train(run: Run, means: Sequence[Mean]) -> None:
    while run.collector.remaining > 0:
        run.step_once()
        for mean in means:
            mean.update(run.policy.parameters())


def main() -> None:
    """Print pass@1 of every family at each moment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", default="sum_long")
    parser.add_argument("--second", default="products")
    parser.add_argument("--decay", type=float, action="append", help="repeatable; 0.9 and 0.98 a step")
    parser.add_argument("--tokens", type=int, default=160_000, help="generated tokens of each phase")
    asked = parser.parse_args()
    decays, options = asked.decay or [0.9, 0.98], [f"budget.amount={asked.tokens}"]
    rows = [
        row
        for seed in range(asked.seeds)
        for row in forgetting(compose_run("grpo", seed=seed, options=options), asked.first, asked.second, decays)
    ]
    moments = list(dict.fromkeys(moment for moment, _, _ in rows))
    families = sorted({family for _, family, _ in rows})
    print(f"pass@1 in percent, mean over {asked.seeds} seeds (smallest to largest)")
    print(f"{'':34}" + "".join(f"{family:>22}" for family in families))
    for moment in moments:
        cells = []
        for family in families:
            values = [100 * value for when, of, value in rows if (when, of) == (moment, family)]
            cells.append(f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        print(f"{moment:34}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
