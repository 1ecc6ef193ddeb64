"""What a verifier that flips verdicts does to allocators that feed the variance of outcomes, in closed form.

A prompt of success rate p shows p~ = p (1 - 2 e) + e under the flip rate e, so a dead prompt (p = 0 or 1), from which
nothing can be learned, shows variance e (1 - e). With P prompts, n_i rollouts each and leave-one-out advantages, the
noise of the estimate goes with sum_i p~_i (1 - p~_i) / n_i, over the prompts that train, while its mean shrinks by
1 - 2 e. ``python -m analysis.verifier_noise`` prints, for a pool of which half is dead, what share of the rollouts each
rule spends on the dead, and the noise it leaves, relative to uniform rollouts at the same e.

- standard deviation: n_i ~ sqrt(p~ (1 - p~)), Neyman's rule on what is seen
- variance: n_i ~ p~ (1 - p~), as released
- oracle: Neyman's rule over the prompts that are truly alive; the dead do not train

All know p~ exactly and have no bounds: what they do is the rule's doing, not the estimate's. `configs/studies/
verifier_noise.yaml` trains them with what they can know.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RATES = (0.0, 0.02, 0.1, 0.2)


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


def main() -> None:
    """Print the table."""
    names = list(weights(half_dead(), 0.0))
    print("half of the pool dead: share of rollouts on dead prompts / noise relative to uniform at the same rate")
    print("flip rate  mean shrinks to " + "".join(f"{name:>22}" for name in names))
    for rate in RATES:
        found = compare(half_dead(), rate)
        cells = "".join(f"{f'{share:.1%} / {noise:.3f}':>22}" for share, noise in found.values())
        print(f"{rate:<11}{1 - 2 * rate:<16.2f}{cells}")


if __name__ == "__main__":
    main()
