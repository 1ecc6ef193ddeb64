"""How fast a device multiplies, copies and decodes: the rates that `device_check` holds the suite's passes against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from device_loop import Plan
from torch import Tensor

from benchmark.clock import Clock


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
