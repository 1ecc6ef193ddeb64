"""What a verifier that flips verdicts does to allocators that feed the variance of outcomes, in closed form.

A prompt of success rate p shows p~ = p (1 - 2 e) + e under the flip rate e, so a dead prompt (p = 0 or 1), from which
nothing can be learned, shows variance e (1 - e). With P prompts, n_i rollouts each and leave-one-out advantages, the
noise of the estimate goes with sum_i p~_i (1 - p~_i) / n_i, over the prompts that train, while its mean shrinks by
1 - 2 e. `rolloutbench experiment label_noise` tells, for a pool of which half is dead, what share of the rollouts each
rule spends on the dead, and the noise it leaves, relative to uniform rollouts at the same e.

- standard deviation: n_i ~ sqrt(p~ (1 - p~)), Neyman's rule on what is seen
- variance: n_i ~ p~ (1 - p~), as released
- oracle: Neyman's rule over the prompts that are truly alive; the dead do not train

All know p~ exactly and have no bounds: what they do is the rule's doing, not the estimate's. `configs/studies/
verifier_noise.yaml` trains them with what they can know.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from analysis.experiment import Experiment, Measured
from analysis.formatting import points
from analysis.jobs import Tell
from analysis.tables import Column, Table, Text
from benchmark.config import Count, Fraction

Floats = NDArray[np.float64]


def observed(p: Floats, flip_rate: float) -> Floats:
    """The success rate that a verifier with this flip rate reports."""
    return p * (1 - 2 * flip_rate) + flip_rate


def weights(p: Floats, flip_rate: float) -> dict[str, Floats]:
    """What every rule's rollouts are proportional to, (P,)."""
    seen = observed(p, flip_rate)
    variance = seen * (1 - seen)
    deviation = np.sqrt(variance)
    alive = (p > 0) & (p < 1)
    return {
        "uniform": np.ones_like(p),
        "standard deviation": deviation,
        "variance": variance,
        "oracle": np.where(alive, deviation, 0.0),
    }


def compare(p: Floats, flip_rate: float) -> dict[str, tuple[float, float]]:
    """Of every rule: the share of rollouts on dead prompts, and the noise relative to uniform rollouts."""
    seen = observed(p, flip_rate)
    variance = seen * (1 - seen)
    dead = (p <= 0) | (p >= 1)
    uniform = float(len(p) * variance.sum())
    result = {}
    for name, w in weights(p, flip_rate).items():
        share = w / w.sum()
        trained = share > 0
        noise = float((variance[trained] / share[trained]).sum())
        result[name] = (float(share[dead].sum()), noise / uniform)
    return result


def half_dead(alive: int = 100) -> Floats:
    """Success rates: evenly spread over (0, 1) for `alive` prompts, as many dead ones, three of five unsolved."""
    spread = (np.arange(alive) + 0.5) / alive
    dead = (np.arange(alive) >= 3 * alive // 5).astype(np.float64)
    return np.concatenate([spread, dead])


class LabelNoise(Experiment):
    """Every rule on a pool of which half is dead, at every flip rate.

    Attributes:
        alive: prompts with success rates evenly spread over (0, 1); as many are dead.
    """

    flip_rates: Annotated[tuple[Fraction, ...], Field(strict=False, min_length=1)]
    alive: Count = 100

    def parts(self) -> dict[str, float]:
        """One closed form."""
        return {"closed_form": 1.0}

    def measure(self, part: str, tell: Tell) -> Measured:
        """A row a flip rate and rule."""
        rows = [
            {"flip_rate": rate, "rule": rule, "dead_share": share, "noise": noise}
            for rate in self.flip_rates
            for rule, (share, noise) in compare(half_dead(self.alive), rate).items()
        ]
        tell(1.0)
        return Measured(rows)

    def tables(self, rows: pd.DataFrame) -> list[Table]:
        """Both numbers, a row a flip rate."""
        rules = list(dict.fromkeys(rows["rule"]))
        numbers = zip(rows["flip_rate"], rows["rule"], rows["dead_share"], rows["noise"], strict=True)
        cells = {(rate, rule): f"{points(share)} % / {noise:.3f}" for rate, rule, share, noise in numbers}
        return [
            Table(
                "label_noise",
                "Share of the rollouts on dead prompts / noise relative to uniform rollouts at the same flip rate",
                [Column("flip rate"), Column("mean shrinks to"), *map(Column, rules)],
                [
                    [Text(f"{rate:g}"), Text(f"{1 - 2 * rate:g}"), *(Text(cells[rate, rule]) for rule in rules)]
                    for rate in self.flip_rates
                ],
                rows[["flip_rate", "rule", "dead_share", "noise"]],
                ["In closed form: rules know the success rate that they see, and have no bounds."],
            )
        ]

    def findings(self, rows: pd.DataFrame) -> list[str]:
        """By how much each rule lowers the noise of uniform rollouts, by flip rate."""
        noise = dict(zip(zip(rows["flip_rate"], rows["rule"], strict=True), rows["noise"], strict=True))
        lines = []
        for rule in ("standard deviation", "variance"):
            told = ", ".join(f"{points(1 - noise[rate, rule])} % at {rate:g}" for rate in self.flip_rates)
            lines.append(f"Gain over uniform rollouts by the {rule}: {told}.")
        return lines
