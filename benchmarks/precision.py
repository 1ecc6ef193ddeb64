"""How far log-probabilities and entropies of the same rollouts lie apart between backends and precisions.

    python benchmarks/precision.py [--prompts 64] [--rollouts 8]

Rollouts of the shipped policy are sampled by the native backend, and scored by it, by transformers in float32, and by
transformers with forward passes in bfloat16 over the same float32 weights (`backend.dtype`).
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmark.backend import Request, make
from benchmark.compose import compose_run
from benchmark.config_model import BackendConfig
from benchmark.draws import Pool
from benchmark.policy import Policy, prepare_machine
from benchmark.problems import load_task
from benchmark.warmup import ensure_policy

SCORERS = {
    "native, float32": BackendConfig(),
    "transformers, float32": BackendConfig(name="transformers"),
    "transformers, bfloat16": BackendConfig(name="transformers", dtype="bfloat16"),
}


def main() -> None:
    """Print a Markdown table: differences to the sampler's own log-probabilities, in nats, and of the entropies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rollouts", type=int, default=8)
    arguments = parser.parse_args()
    config = compose_run("grpo", scale="small")
    device = prepare_machine()
    policy = Policy.load(ensure_policy(config), device)
    pool = Pool.of(load_task(config.task)[0], policy, config.seed, device)
    prompts, each = list(range(arguments.prompts)), arguments.rollouts
    request = Request(
        [pool.tokens[i] for i in prompts],
        np.full(len(prompts), each, dtype=np.int64),
        np.repeat(pool.stream_keys("rollouts", 0, 0, prompts), each),
        np.tile(np.arange(each), len(prompts)),
        config.rollout.max_tokens,
        1.0,
    )
    with torch.no_grad():
        sampler = make(policy, BackendConfig())
        sampler.load_weights()
        batch = sampler.generate(request)
        exact = sampler.score(batch, 1.0)
        print(f"{len(batch)} rollouts, {len(batch.tokens)} tokens\n")
        print("| scored by | log-probability: mean, largest | ratio: least, largest | entropy: mean, largest |")
        print("| :-- | --: | --: | --: |")
        for name, settings in SCORERS.items():
            seen = make(policy, settings).score(batch, 1.0)
            apart, entropy = (seen.log_prob - batch.log_prob).double(), (seen.entropy - exact.entropy).abs().double()
            ratio = apart.exp()
            print(
                f"| {name} | {apart.abs().mean():.1e}, {apart.abs().max():.1e} "
                f"| {ratio.min():.5f}, {ratio.max():.5f} | {entropy.mean():.1e}, {entropy.max():.1e} |"
            )


if __name__ == "__main__":
    main()
