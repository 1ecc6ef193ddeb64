"""What this machine's GPU (or CPU) makes of the suite's passes: are they right, how fast, how much memory.

    python benchmarks/device_check.py [--size 0.5B] [--steps 8] [--no-compile] [--out FILE]

Prints Markdown for docs/performance.md. Needs torch and transformers only; it runs from a checkout that is not
installed. The model is made here with random weights (no download), and the runs of GRPO and DynaMO learn a rule that
is checked exactly: most tokens of an answer are even. Exit code 1: a result is wrong.
"""

# ruff: noqa: E402 (the checkout's packages are imported after its folder is on the path)

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import platform
import resource
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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

# hidden, layers, heads, kv heads, mlp, vocabulary
SIZES = {
    "tiny": (64, 2, 4, 2, 128, 512),
    "0.1B": (768, 12, 12, 4, 2048, 32_000),
    "0.5B": (896, 24, 14, 2, 4864, 151_936),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936),
}
PEAKS = {"H200": (989, 4800), "H100": (989, 3350), "A100": (312, 2039), "L40S": (362, 864), "B200": (2250, 8000)}
"""Dense bf16 TFLOP/s and GB/s of data sheets (SXM boards), by a word of the device's name."""
TOLERANCE = 1e-4


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


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median seconds of `work` after one run that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        start = now(device)
        work()
        taken.append(now(device) - start)
    return float(np.median(taken[1:]))


def now(device: torch.device) -> float:
    """Seconds, after everything that was asked of the device is done; CPU seconds on a CPU, as neighbours are busy."""
    return Clock(device).now()


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


# -- right ---------------------------------------------------------------------------------------------------------


def exactness(size: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest errors of the chunked pass against float64 on the same inputs: statistics, and gradients (relative)."""
    hidden, *_, vocabulary = SIZES[size]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(257, hidden, generator=random).to(device, dtype)
    head = (torch.randn(vocabulary, hidden, generator=random) * 3 / math.sqrt(hidden)).to(device, dtype)
    target = torch.randint(vocabulary, (257,), generator=random).to(device)
    weight = torch.randn(2, 257, generator=random).to(device)
    inputs = [x.clone().requires_grad_(), head.clone().requires_grad_()]
    seen = vocabulary_statistics(*inputs, target, rows=64)
    (weight[0] @ seen.log_prob + weight[1] @ seen.entropy).backward()
    exact = [x.double().requires_grad_(), head.double().requires_grad_()]
    log_p = F.log_softmax(exact[0] @ exact[1].t(), dim=-1)
    p, chosen = log_p.exp(), log_p.gather(1, target[:, None]).squeeze(1)
    entropy = -(p * log_p).sum(-1)
    (weight[0].double() @ chosen + weight[1].double() @ entropy).backward()
    true = (chosen, entropy, (p * p).sum(-1), (p * p * log_p).sum(-1))
    names = [field.name for field in dataclasses.fields(TokenStatistics)]
    errors = {
        name: float((getattr(seen, name) - value).detach().abs().max()) for name, value in zip(names, true, strict=True)
    }
    pairs = zip(("gradient of states", "gradient of head"), inputs, exact, strict=True)
    return errors | {name: float((a.grad - b.grad).norm() / b.grad.norm()) for name, a, b in pairs}  # type: ignore[operator,union-attr]


# -- fast ----------------------------------------------------------------------------------------------------------


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device)


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.empty(1 << (28 if device.type == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), device)


def decode_rates(model: Any, plan: Plan, device: torch.device, *, compiled: bool) -> dict[str, str]:
    """Tokens a second of greedy decoding with transformers: dynamic cache, compiled, and as a CUDA graph."""
    from transformers import DynamicCache, StaticCache

    random = torch.Generator().manual_seed(1)
    shape = (plan.prompts, plan.prompt_tokens)
    prompt = torch.randint(model.config.vocab_size, shape, generator=random).to(device)
    spare = 8  # steps that warm up

    def run(cache: Any, step: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        token = model(prompt, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        made = [token]
        for _ in range(spare):
            made.append(step(made[-1]).clone())
        start = now(device)
        for _ in range(plan.answer):
            made.append(step(made[-1]).clone())
        return plan.prompts * plan.answer / (now(device) - start), torch.cat(made, 1)

    def static() -> Any:
        return StaticCache(config=model.config, max_cache_len=plan.prompt_tokens + plan.answer + 2 * spare)

    def plain(cache: Any) -> Callable[[Tensor], Tensor]:
        return lambda token: model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)

    def graph(cache: Any) -> Callable[[Tensor], Tensor]:
        return _Graph(plain(cache), plan.prompts, device)

    ways: dict[str, tuple[Callable[[], Any], Callable[[Any], Callable[[Tensor], Tensor]]]] = {
        "transformers, dynamic cache": (lambda: DynamicCache(config=model.config), plain)
    }
    if compiled:
        ways["compiled, static cache"] = (static, lambda cache: torch.compile(plain(cache), dynamic=False))
    if device.type == "cuda":
        ways["CUDA graph, static cache"] = (static, graph)
    found, first = {}, None
    for name, (make, step) in ways.items():
        try:
            with torch.inference_mode():
                cache = make()
                rate, tokens = run(cache, step(cache))
        except Exception as error:  # what a compiler raises is of many kinds; the table tells
            found[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
            continue
        first = tokens if first is None else first
        found[name] = f"{rate:,.0f} tokens/s, {100 * float((tokens == first).float().mean()):.0f} % the same tokens"
    return found | ({} if device.type == "cuda" else {"CUDA graph, static cache": "needs a GPU"})


class _Graph:
    """A decoding step that the GPU replays without the CPU; captured at its third call."""

    def __init__(self, step: Callable[[Tensor], Tensor], rows: int, device: torch.device) -> None:
        self.step, self.calls = step, 0
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.out = self.token
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        self.calls += 1
        if self.calls < 3:
            return self.step(self.token)
        if self.calls == 3:
            with torch.cuda.graph(self.graph):  # type: ignore[no-untyped-call]
                self.out = self.step(self.token)
        self.graph.replay()  # type: ignore[no-untyped-call]
        return self.out


# -- a real run ----------------------------------------------------------------------------------------------------


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
        return generate(whole, self.prompt.flatten(), length, given, uniforms, max_tokens=self.plan.answer, end=-1)

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


# -- the report ----------------------------------------------------------------------------------------------------


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that torch held on the GPU, or that this process held."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def describe(loop: Loop, done: Trained, rate: float, copied: float, steps: int) -> list[str]:
    """Rows of one run: phases, and what its passes make of the device."""
    size = sum(p.numel() for p in loop.model.parameters())
    plan, total = loop.plan, sum(done.phases.values())
    read = done.tokens * (plan.prompt_tokens + plan.answer) / plan.answer
    passes = 3 if loop.method.modulates else 2  # the pass before the updates, one for modulation, the updates'
    trained = sum(done.phases.get(phase, 0.0) for phase in ("forward", "backward"))
    flops = read * size * (2 * passes + 4)
    weight_bytes = size * torch.finfo(loop.dtype).bits / 8
    streamed = steps * plan.answer * weight_bytes / done.phases["decode"]
    name = type(loop.method).__name__
    phases = ", ".join(f"{phase} {1000 * value / steps:.0f} ms" for phase, value in sorted(done.phases.items()))
    return [
        f"| {name}: step | {total / steps:.2f} s ({phases}) |",
        f"| {name}: generated tokens | {done.tokens / done.phases['decode']:,.0f} tokens/s decoding, "
        f"{done.tokens / trained:,.0f} training, {done.tokens / total:,.0f} overall |",
        f"| {name}: forward and backward | {flops / trained / 1e12:.3g} TFLOP/s, "
        f"{100 * flops / trained / rate:.0f} % of the matrix rate |",
        f"| {name}: decoding, weights read | {streamed / 1e9:.3g} GB/s, {100 * streamed / copied:.0f} % of a copy |",
        f"| {name}: accuracy, first and last step | {done.accuracy[0]:.3f}, {done.accuracy[-1]:.3f} |",
    ]


def check(size: str, steps: int, compiled: bool, device: torch.device) -> tuple[str, bool]:
    """The table, and whether all results are right."""
    gpu = device.type == "cuda"
    dtype, plan = (torch.bfloat16, GPU_PLAN) if gpu else (torch.float32, CPU_PLAN)
    name = torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()}, {torch.get_num_threads()} thread)"
    kind = str(dtype).removeprefix("torch.")
    errors = exactness(size, device, torch.float32)
    right = all(error < TOLERANCE for error in errors.values())
    rate, copied = matrix_rate(device, dtype), bandwidth(device)
    sheet = next((numbers for word, numbers in PEAKS.items() if word in name), None)
    lines = [
        f"`python benchmarks/device_check.py --size {size} --steps {steps}` on {name}, torch {torch.__version__}.",
        "" if gpu else "This is a CPU: times are seconds of one core, and say nothing about a GPU.",
        "",
        "| what | result |",
        "|---|---|",
        f"| chunked pass against float64, float32 | {'right' if right else 'WRONG'}: "
        + ", ".join(f"{key} {value:.1e}" for key, value in errors.items())
        + " |",
        f"| matrix rate, {kind} | {rate / 1e12:.3g} TFLOP/s"
        + (f", {100 * rate / 1e12 / sheet[0]:.0f} % of the data sheet's {sheet[0]}" if sheet else "")
        + " |",
        f"| memory bandwidth, copy | {copied / 1e9:.3g} GB/s"
        + (f", {100 * copied / 1e9 / sheet[1]:.0f} % of the data sheet's {sheet[1]}" if sheet else "")
        + " |",
    ]
    if gpu:
        rounded = ", ".join(f"{key} {value:.1e}" for key, value in exactness(size, device, dtype).items())
        lines.append(f"| chunked pass against float64, {kind} | {rounded} |")
    for method in (GRPO(), DynaMO()):
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        loop = Loop(method, size, plan, device, dtype)
        done = loop.run(steps)
        lines += describe(loop, done, rate, copied, steps)
        lines.append(f"| {type(method).__name__}: most memory | {peak_memory(device) / 1e9:.2f} GB |")
        right &= all(map(math.isfinite, done.accuracy))
        model = loop.model
        del loop
    rates = decode_rates(model.to(dtype).eval(), plan, device, compiled=compiled)
    lines += [f"| decode: {way} | {told} |" for way, told in rates.items()]
    return "\n".join(lines) + "\n", right


def main() -> None:
    """Check this device, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="0.5B" if device.type == "cuda" else "tiny")
    parser.add_argument("--steps", type=int, default=8, help="steps of each run that are timed (default 8)")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled decode out")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    if device.type == "cpu":
        torch.set_num_threads(1)
    text, right = check(options.size, max(1, options.steps), not options.no_compile, device)
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
