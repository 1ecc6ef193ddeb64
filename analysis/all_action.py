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

`rolloutbench experiment all_action` measures both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from analysis.experiment import Experiment, Measured
from analysis.formatting import counted, points
from analysis.jobs import Tell
from analysis.tables import Column, Table, Text
from analysis.variance_pool import Bench
from benchmark import streams
from benchmark.compose import compose_run
from benchmark.config import Count, RunConfig
from benchmark.draws import Pool
from benchmark.errors import InputError
from benchmark.policy import Policy, prepare_machine
from benchmark.problems import load_task
from benchmark.rollouts import Rollouts
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
def last_digit_chance(policy: Policy, drawn: Rollouts, answers: Sequence[str], temperature: float) -> Tensor:
    """q = pi(right last digit of the answer | everything before it) of every rollout, (R,); 0 where it is wrong before.

    Args:
        answers: the right answers of the P prompts.
        temperature: at which the rollouts were drawn.
    """
    weights = policy.fused()
    log_p = torch.log_softmax(states(weights, drawn) @ weights.head.T / temperature, -1)
    digit = dict(zip("0123456789", policy.tokenizer.convert_tokens_to_ids(list("0123456789")), strict=True))
    begin, q = 0, torch.zeros(len(drawn))
    for row, (ids, p) in enumerate(zip(drawn.texts(), drawn.prompt.tolist(), strict=True)):
        answer, text = answers[p], policy.pieces(ids)
        boxed = [place for place, piece in enumerate(text) if piece == "\\boxed{"]
        place = boxed[-1] + len(answer) if boxed else len(text)
        if place < len(text) and "".join(text[boxed[-1] + 1 : place]) == answer[:-1]:
            q[row] = log_p[begin + place, digit[answer[-1]]].exp()
        begin += len(ids)
    return q


def decided_at_answer(config: RunConfig, prompts: int, rollouts: int) -> tuple[dict[str, float], dict[str, int]]:
    """What the answer's last digit still decides, on the policy before RL.

    Returns:
        ``success`` p and ``reward_variance``, the mean p (1 - p) of a prompt; ``last_digit``, the mean over rollouts of
        q (1 - q) (`last_digit_chance`). And what was drawn, by currency.

    Raises:
        InputError: the policy is not of the suite's own vocabulary, in which a digit is a token.
    """
    if config.policy.path is not None:
        remedy = "Choose a scale that makes its policy"
        raise InputError("its digits are no tokens of their own", key="scale", value=config.scale, remedy=remedy)
    device = prepare_machine()
    policy = Policy.load(ensure_policy(config), device)
    train, _ = load_task(config.task)
    pool = Pool.of(train, policy, config.seed, device)
    with Verifier(answer_form=config.task.answer_form) as verifier:
        chosen = streams.generator(config.seed, "all actions").permutation(len(train))[:prompts].tolist()
        bench = Bench(policy, config.rollout, pool, verifier, chosen, device)
        drawn, reward = bench.draw("all actions", 0, rollouts)
    q = last_digit_chance(policy, drawn, [train[place].answer for place in chosen], config.rollout.temperature)
    p_hat = reward.view(len(chosen), rollouts).mean(1)
    variance = p_hat * (1 - p_hat) * rollouts / (rollouts - 1)
    found = {
        "success": float(p_hat.mean()),
        "reward_variance": float(variance.mean()),
        "last_digit": float((q * (1 - q)).mean()),
    }
    return found, {"rollouts": len(drawn), "tokens_generated": len(drawn.tokens)}


class AllAction(Experiment):
    """Both variances of `guessing`, by enumeration, and what the last digit decides on a real policy.

    Attributes:
        ways, answers, rollouts, sharpness: m, K and n of the tabular policy; nats, ascending, a row each.
        scale, options: of the policy before RL, as for `rolloutbench run`.
        prompts, rollouts_per_prompt: training prompts of a measurement, and rollouts of each.
        seeds: of the measurements on the policy, which draw prompts and rollouts of their own.
    """

    ways: Count = 2
    answers: Count = 4
    rollouts: Annotated[int, Field(ge=2)] = 4
    sharpness: Annotated[tuple[float, ...], Field(strict=False, min_length=1)]
    scale: str = "small"
    options: Annotated[tuple[str, ...], Field(strict=False)] = ()
    prompts: Count = 64
    rollouts_per_prompt: Annotated[int, Field(ge=2)] = 32
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]

    unit: ClassVar[str] = "rollouts"
    says_only: ClassVar[frozenset[str]] = Experiment.says_only | {"seeds"}

    def parts(self) -> dict[str, float]:
        """The tabular policy, and the real one once a seed."""
        return {"tabular": 1.0} | {
            f"policy_seed_{seed}": float(self.prompts * self.rollouts_per_prompt) for seed in self.seeds
        }

    def measure(self, part: str, tell: Tell) -> Measured:
        """Rows of a sharpness, or the one row of a seed."""
        if part != "tabular":
            seed = int(part.rpartition("_")[2])
            config = compose_run("grpo", scale=self.scale, seed=seed, options=self.options)
            found, spent = decided_at_answer(config, self.prompts, self.rollouts_per_prompt)
            tell(float(self.prompts * self.rollouts_per_prompt))
            return Measured([{"seed": seed, **found}], spent)
        rows = []
        for nats in self.sharpness:
            case = guessing(nats, self.ways, self.answers)
            sampled, summed = (case.moments(self.rollouts, all_actions=each)[1] for each in (False, True))
            chance = float(_softmax(case.answer)[0, 0])
            rows.append({"sharpness": nats, "preferred": chance, "sampled": sampled, "all_actions": summed})
        tell(1.0)
        return Measured(rows)

    def tables(self, rows: pd.DataFrame) -> list[Table]:
        """Variance of both estimates by sharpness; what the last digit decides by seed."""
        tabular, policy = self._split(rows)
        return [
            _table(
                "all_action_tabular",
                f"Variance of the gradient, tabular policy of {self.ways} ways and {self.answers} answers, "
                f"groups of {self.rollouts}",
                tabular[["preferred", "sampled", "all_actions", "ratio"]],
                ["preferred answer", "sampled", "all actions", "ratio"],
                "Traces of the covariance, exact. Below 1, summing the answers out has taken variance away.",
            ),
            _table(
                "all_action_policy",
                f"What the last digit of the answer decides, policy before RL at scale {self.scale}",
                policy,
                ["seed", "success", "p (1 - p)", "q (1 - q)", "share"],
                "q: chance of the right last digit after everything before it; share: of the reward's variance.",
            ),
        ]

    def findings(self, rows: pd.DataFrame) -> list[str]:
        """The range of the tabular ratio, and of the share."""
        tabular, policy = self._split(rows)
        first, last = tabular.iloc[0], tabular.iloc[-1]
        share = policy["share"]
        return [
            f"Tabular policy: all actions leave {points(first['ratio'])} % of the variance where the preferred answer "
            f"has a chance of {first['preferred']:.2f}, {points(last['ratio'])} % at {last['preferred']:.3f}.",
            f"Policy before RL: the last digit decides {points(share.mean())} % of the variance of the reward "
            f"({points(share.min())} to {points(share.max())} over {counted(len(share), 'seed')}). Summing it out can "
            "take at most this away; the rest is settled before.",
        ]

    @staticmethod
    def _split(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        own = rows["part"] == "tabular"
        tabular = rows[own][["sharpness", "preferred", "sampled", "all_actions"]]
        policy = rows[~own][["seed", "success", "reward_variance", "last_digit"]]
        return (
            tabular.assign(ratio=tabular["all_actions"] / tabular["sampled"]),
            policy.assign(share=policy["last_digit"] / policy["reward_variance"]),
        )


def _table(name: str, title: str, data: pd.DataFrame, columns: Sequence[str], note: str) -> Table:
    """Every number of `data` to three digits."""
    rows = [[Text(f"{value:.3g}") for value in row] for row in data.to_numpy(dtype=np.float64)]
    return Table(name, title, [Column(column) for column in columns], rows, data, [note])
