"""A model with random weights and the suite's step on it: allocate, decode, verify, credit, modulate, update.

The runs learn a rule that is checked exactly: most tokens of an answer are even.
"""

# ruff: noqa: E402 (what stands in for scipy is there before the methods are imported)

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor

# DynaMO's allocation needs one function of scipy; nothing else may take the stand-in for it.
special: Any = types.ModuleType("scipy.special")
special.gammaln = np.vectorize(math.lgamma, otypes=[float])
STAND_IN = {} if importlib.util.find_spec("scipy") else {"scipy": types.ModuleType("scipy"), "scipy.special": special}
sys.modules |= STAND_IN

from baselines.grpo import GRPO
from benchmark.clock import Clock
from benchmark.decode import generate
from benchmark.groups import Groups, segment_sum
from benchmark.history import PromptHistory
from benchmark.losses import policy_loss, token_weights
from benchmark.method import TokenCredit, Tokens
from benchmark.rollouts import Rollouts
from benchmark.scoring import TokenStatistics, vocabulary_statistics
from benchmark.transformer import fuse
from methods.dynamo import DynaMO

for stand_in in STAND_IN:
    del sys.modules[stand_in]

ARMS = (GRPO, DynaMO)
# hidden, layers, heads, kv heads, mlp, vocabulary
SIZES = {
    "tiny": (64, 2, 4, 2, 128, 512),
    "0.1B": (768, 12, 12, 4, 2048, 32_000),
    "0.5B": (896, 24, 14, 2, 4864, 151_936),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a run: prompts and their tokens, rollouts of each, tokens of an answer, rows of a training pass."""

    prompts: int
    prompt_tokens: int
    group: int
    answer: int
    rows: int
    learning_rate: float


GPU_PLAN = Plan(64, 32, 8, 128, 64, 1e-5)
CPU_PLAN = Plan(16, 8, 8, 16, 64, 3e-3)


def make_model(size: str, device: torch.device) -> Any:
    """A Qwen2 decoder with random float32 weights."""
    import transformers

    hidden, layers, heads, kv_heads, mlp, vocabulary = SIZES[size]
    torch.manual_seed(0)
    settings = transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    made: Any = transformers.Qwen2ForCausalLM(settings)
    return made.float().to(device)


@dataclasses.dataclass
class Trained:
    """What a run left: accuracy of each step, tokens made, seconds of each phase."""

    accuracy: list[float]
    tokens: int
    phases: dict[str, float]


class Loop:
    """Steps of a method on a model made here: allocate, decode, verify, credit, modulate, update twice."""

    def __init__(self, method: GRPO, size: str, plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
        self.method, self.plan, self.device, self.dtype = method, plan, device, dtype
        self.model = make_model(size, device)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=plan.learning_rate, weight_decay=0.0, fused=True)
        self.clock = Clock(device)
        random = torch.Generator().manual_seed(2)
        shape = (plan.prompts, plan.prompt_tokens)
        self.prompt = torch.randint(SIZES[size][-1], shape, generator=random).to(device)
        self.history = PromptHistory(plan.prompts, method.half_life)

    def run(self, steps: int) -> Trained:
        """`steps` steps after one that is not timed."""
        accuracy, tokens = [], 0
        for step in range(steps + 1):
            if step == 1:
                self.clock.take()
            with self.clock.phase("other"):
                right, made = self.step(step)
            accuracy.append(right)
            tokens += made if step else 0
        return Trained(accuracy, tokens, self.clock.take())

    def step(self, step: int) -> tuple[float, int]:
        """Accuracy and tokens of one step."""
        plan, view = self.plan, self.history.view(range(self.plan.prompts))
        counts = self.method.allocate(view, plan.prompts * plan.group, np.random.default_rng(step))
        with self.clock.phase("decode"):
            rollouts = self.decode(counts, step)
        right = (rollouts.tokens.view(len(rollouts), -1) % 2 == 0).float().mean(1) > 0.5
        reward = right.float()
        groups = Groups(rollouts.prompt, plan.prompts, reward, rollouts.length, ~rollouts.finished, plan.answer, view)
        solved = segment_sum(reward, rollouts.prompt, plan.prompts).cpu().numpy().astype(np.float64)
        self.history.record(list(range(plan.prompts)), solved, counts.astype(np.float64))
        advantage = self.method.credit(groups)
        with torch.no_grad():
            # The decode loop rounds differently in bfloat16: ratios start from the pass that trains.
            rollouts = dataclasses.replace(rollouts, log_prob=self.score(rollouts).log_prob)
        for part in torch.arange(plan.prompts, device=self.device).tensor_split(2):
            self.update(rollouts.select_prompts(part), advantage[rollouts.rows_of(part)])
        return float((solved / counts.clip(1))[counts > 0].mean()), len(rollouts.tokens)

    @torch.no_grad()
    def decode(self, counts: Any, step: int) -> Rollouts:
        """The suite's decode loop on fused weights, ``counts`` answers a prompt."""
        weights = fuse(self.model)
        layers = tuple(_cast(layer, self.dtype) for layer in weights.layers)
        whole = dataclasses.replace(_cast(weights, self.dtype), layers=layers)
        random = torch.Generator().manual_seed(100 + step)
        uniforms = torch.rand(int(counts.sum()), self.plan.answer, generator=random).to(self.device)
        length = torch.full((self.plan.prompts,), self.plan.prompt_tokens, device=self.device)
        given = torch.from_numpy(counts).to(self.device)
        return generate(whole, self.prompt.flatten(), length, given, uniforms, max_tokens=self.plan.answer, ends=[-1])

    def score(self, part: Rollouts) -> TokenStatistics:
        """Statistics of every token, a few rows at a time; gradients flow where they are on."""
        pieces = [self.passed(part, rows) for rows in torch.arange(len(part)).split(self.plan.rows)]
        names = [field.name for field in dataclasses.fields(TokenStatistics)]
        return TokenStatistics(*(torch.cat([getattr(piece, name) for piece in pieces]) for name in names))

    def passed(self, part: Rollouts, rows: Tensor) -> TokenStatistics:
        """One forward pass of transformers in the dtype of the check, and the chunked pass over its head."""
        answers = part.tokens.view(len(part), -1)[rows]
        prompts = part.prompt_tokens.view(part.prompts, -1)[part.prompt[rows]]
        with self.clock.phase("forward"), torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            text = torch.cat([prompts, answers], 1)
            states = self.model.model(input_ids=text, use_cache=False).last_hidden_state
            states = states[:, prompts.shape[1] - 1 : -1].reshape(-1, states.shape[-1]).to(self.dtype)
        with self.clock.phase("forward"):
            return vocabulary_statistics(states, self.model.lm_head.weight.to(self.dtype), answers.flatten())

    def update(self, part: Rollouts, advantage: Tensor) -> None:
        """One optimiser step on a minibatch."""
        rollout = torch.repeat_interleave(torch.arange(len(part), device=self.device), part.length)
        credit, loss = TokenCredit(advantage[rollout]), self.method.loss
        if self.method.modulates:
            with torch.no_grad():
                seen = self.score(part)
            draws = torch.rand(len(rollout), device=self.device)
            credit = self.method.modulate(
                Tokens(
                    credit.advantage,
                    seen.log_prob,
                    part.log_prob,
                    seen.entropy,
                    seen.sum_p2,
                    seen.sum_p2_log_p,
                    rollout,
                    draws,
                    loss,
                    part.prompt[rollout],
                )
            )
        weights = token_weights(part, loss, self.plan.answer, credit.mask)
        self.optimiser.zero_grad(set_to_none=True)
        for rows in torch.arange(len(part)).split(self.plan.rows):
            here = slice(int(rows[0]) * self.plan.answer, (int(rows[-1]) + 1) * self.plan.answer)
            seen, local = self.passed(part, rows), TokenCredit(credit.advantage[here])
            total = policy_loss(seen.log_prob, seen.entropy, part.log_prob[here], weights[here], local, loss)
            with self.clock.phase("backward"):
                total.backward()  # type: ignore[no-untyped-call]
        with self.clock.phase("optimiser"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A dataclass with its tensors in `dtype`."""
    named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **{k: v.to(dtype) for k, v in named.items() if isinstance(v, Tensor)})
