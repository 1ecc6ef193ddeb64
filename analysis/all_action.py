"""All-action gradient at the answer token: what Rao-Blackwellisation could take out of the policy gradient's variance.

A rollout is a prefix x ~ pi(x), m ways of working, and an answer a ~ pi(a | x) among K. Where the reward r(x, a) of
every answer is known (the verifier is asked K times; no token is generated), the sampled answer can be summed out:

    sampled      g = 1/n sum_j A_j (grad log pi(x_j) + grad log pi(a_j | x_j)),    A_j = r_j - mean of the other r
    all actions  g = 1/n sum_j B_j grad log pi(x_j) + sum_a r(x_j, a) grad pi(a | x_j),
                 B_j = q_j - mean of the other q,    q_j = sum_a r(x_j, a) pi(a | x_j)

the second is the mean of the first given all prefixes, so it has the same expectation and no more variance. `Tabular`
has a softmax table for every distribution, and both variances by enumeration of all groups of n rollouts.

`decided_at_answer` measures on a real policy what this can be worth: of the variance of the reward, the share
E[q (1 - q)] / (p (1 - p)) that is left when everything before the answer's last digit is known.

``python -m analysis.all_action`` prints both.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.variance_pool import Bench
from benchmark import streams
from benchmark.compose import compose_run
from benchmark.config import RunConfig
from benchmark.draws import Pool
from benchmark.policy import Policy, prepare_machine
from benchmark.problems import load_task
from benchmark.scoring import states
from benchmark.verifier import Verifier
from benchmark.warmup import ensure_policy

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tabular:
    """Policy and reward: `prefix` (m,) and `answer` (m, K) are logits, `reward` (m, K) is 0 or 1."""

    prefix: Floats
    answer: Floats
    reward: Floats

    @property
    def probabilities(self) -> tuple[Floats, Floats]:
        """pi(x), (m,), and pi(a | x), (m, K)."""
        return _softmax(self.prefix), _softmax(self.answer)

    @property
    def gradient(self) -> Floats:
        """The gradient of the expected reward, (m + m K,)."""
        pi, mu = self.probabilities
        q = (mu * self.reward).sum(1)
        answer = pi[:, None] * mu * (self.reward - q[:, None])
        return np.concatenate([pi * (q - pi @ q), answer.ravel()])

    def moments(self, rollouts: int, *, all_actions: bool) -> tuple[Floats, float]:
        """Mean (m + m K,) of the estimate from a group of `rollouts` >= 2, and the trace of its covariance."""
        pi, mu = self.probabilities
        chance = (pi[:, None] * mu).ravel()
        scores, values, own = self._terms(all_actions)
        mean, square = np.zeros(scores.shape[1]), 0.0
        for group in itertools.product(range(len(chance)), repeat=rollouts):
            chosen = list(group)
            value = values[chosen]
            advantage = value - (value.sum() - value) / (rollouts - 1)
            g = (advantage @ scores[chosen] + own[chosen].sum(0)) / rollouts
            weight = float(chance[chosen].prod())
            mean += weight * g
            square += weight * float(g @ g)
        return mean, square - float(mean @ mean)

    def _terms(self, all_actions: bool) -> tuple[Floats, Floats, Floats]:
        """Of every outcome (x, a): the score that an advantage multiplies, the value behind it, what is added."""
        pi, mu = self.probabilities
        m, K = mu.shape
        x, a = np.divmod(np.arange(m * K), K)
        prefix = np.eye(m)[x] - pi
        answer, own = np.zeros((m * K, m, K)), np.zeros((m * K, m, K))
        q = (mu * self.reward).sum(1)
        if all_actions:
            own[np.arange(m * K), x] = (mu * (self.reward - q[:, None]))[x]
            values = q[x]
        else:
            answer[np.arange(m * K), x] = np.eye(K)[a] - mu[x]
            values = self.reward[x, a]
        scores = np.concatenate([prefix, answer.reshape(m * K, -1)], axis=1)
        return scores, values, np.concatenate([np.zeros_like(prefix), own.reshape(m * K, -1)], axis=1)


def _softmax(logits: Floats) -> Floats:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    result: Floats = e / e.sum(-1, keepdims=True)
    return result


def guessing(sharpness: float, ways: int = 2, answers: int = 4) -> Tabular:
    """Ways of equal chance; each prefers one answer by `sharpness` nats, only the first way the right one, 0."""
    preferred = np.arange(ways) % answers
    reward = np.zeros((ways, answers))
    reward[:, 0] = 1.0
    return Tabular(np.zeros(ways), sharpness * np.eye(answers)[preferred], reward)


@torch.no_grad()
def decided_at_answer(config: RunConfig, *, prompts: int = 64, rollouts: int = 32) -> dict[str, float]:
    """What the answer's last digit still decides, on the policy before RL.

    Returns:
        ``success`` p and ``reward_variance``, the mean p (1 - p) of a prompt; ``last_digit``, the mean over rollouts of
        q (1 - q) where q = pi(right last digit | everything before it), 0 where the answer is wrong before it.
    """
    device = prepare_machine()
    policy = Policy.load(ensure_policy(config), device)
    train, _ = load_task(config.task)
    pool = Pool.of(train, policy, config.seed, device)
    with Verifier(answer_form=config.task.answer_form) as verifier:
        chosen = streams.generator(config.seed, "all actions").permutation(len(train))[:prompts].tolist()
        bench = Bench(policy, config.rollout, pool, verifier, chosen, device)
        drawn, reward = bench.draw("all actions", 0, rollouts)
    weights = policy.fused()
    log_p = torch.log_softmax(states(weights, drawn) @ weights.head.T / config.rollout.temperature, -1)
    digit = dict(zip("0123456789", policy.tokenizer.convert_tokens_to_ids(list("0123456789")), strict=True))
    begin, q = 0, torch.zeros(len(drawn))
    for row, (ids, p) in enumerate(zip(drawn.texts(), drawn.prompt.tolist(), strict=True)):
        answer, text = train[chosen[p]].answer, policy.pieces(ids)
        boxed = [place for place, piece in enumerate(text) if piece == "\\boxed{"]
        place = boxed[-1] + len(answer) if boxed else len(text)
        if place < len(text) and "".join(text[boxed[-1] + 1 : place]) == answer[:-1]:
            q[row] = log_p[begin + place, digit[answer[-1]]].exp()
        begin += len(ids)
    p_hat = reward.view(len(chosen), rollouts).mean(1)
    variance = p_hat * (1 - p_hat) * rollouts / (rollouts - 1)
    return {
        "success": float(p_hat.mean()),
        "reward_variance": float(variance.mean()),
        "last_digit": float((q * (1 - q)).mean()),
    }


def main() -> None:
    """Print the tabular ratios and the measurement at the default scale."""
    print("tabular policy, 2 ways x 4 answers, groups of 4: variance with all actions / with the sampled one")
    for sharpness in (0.0, 1.0, 2.0, 4.0, 8.0):
        case = guessing(sharpness)
        ratio = case.moments(4, all_actions=True)[1] / case.moments(4, all_actions=False)[1]
        p = _softmax(case.answer)[0, 0]
        print(f"  preferred answer {p:.4f}: {ratio:.3f}")
    found = decided_at_answer(compose_run("grpo"))
    share = found["last_digit"] / found["reward_variance"]
    print("policy before RL, scale small: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    print(f"share of the reward's variance that the answer's last digit decides: {share:.3f}")


if __name__ == "__main__":
    main()
