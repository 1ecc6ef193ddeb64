"""Counter-based random streams: common random numbers for every arm.

A draw is a pure function of a key and a counter, so nothing about the order in which arms consume randomness can
leak into their results: rollout j of a prompt at a step sees the same uniforms in every arm, whatever else was
sampled before it. Keys are 64-bit BLAKE2b hashes of readable parts; counters run through the SplitMix64 finaliser
(Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key(*parts: object) -> int:
    """64-bit key of a stream named by `parts`, for instance ``key(seed, "rollout", step, prompt_id)``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def uniforms(keys: NDArray[np.uint64], lanes: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Uniforms in [0, 1), shape (R, count); row i depends only on ``(keys[i], lanes[i])``.

    Args:
        keys: (R,) stream keys, for instance one per prompt.
        lanes: (R,) sub-stream numbers, for instance the rollout's index within its group.
        count: draws per row, for instance one per token position.
    """
    row = _mix(keys.astype(np.uint64) + (lanes.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    counters = (np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)[None, :]
    bits = _mix(row[:, None] + counters) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def generator(*parts: object) -> np.random.Generator:
    """A NumPy generator for host-side draws (shuffles, tie-breaks), keyed like every other stream."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))
