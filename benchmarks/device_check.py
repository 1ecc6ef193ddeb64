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
import math
import platform
import resource
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from device_loop import ARMS, CPU_PLAN, GPU_PLAN, SIZES, Loop, Trained
from device_rates import bandwidth, decode_rates, matrix_rate

from benchmark.scoring import TokenStatistics, vocabulary_statistics

PEAKS = {"H200": (989, 4800), "H100": (989, 3350), "A100": (312, 2039), "L40S": (362, 864), "B200": (2250, 8000)}
"""Dense bf16 TFLOP/s and GB/s of data sheets (SXM boards), by a word of the device's name."""
TOLERANCE = 1e-4


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
    for method in (arm() for arm in ARMS):
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
