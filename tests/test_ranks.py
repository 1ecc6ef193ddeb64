"""One run in several processes: two make of a batch what one makes of it, and only the first writes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmark import ranks
from benchmark.backend import Request
from benchmark.errors import InputError
from benchmark.jsonl import read_rows

ROOT = Path(__file__).parent.parent
DRIVER = Path(__file__).with_name("ranks_driver.py")
ARMS = ["grpo", "entropy_loss", "dynamo", "kl_cov", "capo", "dppo_kl", "oblr_po"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--use_deepspeed", "--zero_stage", "2"]
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
ASKED = {
    "whole": {},
    "divided": {"ACCELERATE_USE_FSDP": "true"},
    "zero 1": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero 2": ZERO,
    "zero 2, adapters": ZERO,
}
"""What the launcher says of weights, gradients and moments."""


BACKENDS = {
    "whole": ("native", ARMS),
    "divided": ("transformers", ["grpo", "entropy_loss", "dynamo", "kl_cov"]),
    "zero 1": ("transformers", ["grpo", "entropy_loss", "kl_cov"]),
    "zero 2": ("native", ["grpo", "entropy_loss", "dynamo", "kl_cov", "dppo_kl"]),
    "zero 2, adapters": ("adapters", ["grpo", "kl_cov"]),
}
"""The backend and the arms that are compared."""
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None,
    reason="needs the extra deepspeed and a C++ compiler",
)


def launched(*ways: str) -> pytest.MarkDecorator:
    """Parametrises by what the launcher is asked for."""
    return pytest.mark.parametrize(
        "how", [pytest.param(way, marks=NEEDS_DEEPSPEED) if way.startswith("zero") else way for way in ways]
    )


def environment(how: str = "whole") -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""} | ASKED[how]


def python(arguments: list[str], how: str = "whole", *, fails: bool = False) -> str:
    line, env = [sys.executable, *arguments], environment(how)
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=900)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr


def test_a_process_alone_does_everything_itself() -> None:
    ranks.start()
    assert (ranks.rank(), ranks.size()) == (0, 1)
    assert ranks.agree("a") == "a"
    assert ranks.gather(3) == [3]
    assert ranks.divided(lambda a, b: [x + y for x, y in zip(a, b, strict=True)], [1, 2], [10, 20]) == [11, 22]
    values = torch.ones(2)
    ranks.add([values])
    assert values.tolist() == [1, 1]


def test_work_is_shared_about_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 3)
    owners = ranks.owners([5, 9, 1, 4, 4, 7])
    loads = [sum(c for c, o in zip([5, 9, 1, 4, 4, 7], owners, strict=True) if o == r) for r in range(3)]
    assert sorted(loads) == [9, 10, 11]


def test_a_part_of_a_request_keeps_the_streams_of_its_rollouts() -> None:
    prompts = [torch.tensor([n]) for n in range(4)]
    keys = np.arange(9, dtype=np.uint64)
    request = Request(prompts, np.array([2, 0, 4, 3]), keys, np.arange(9), 8, 1.0)
    part = request.part(1, 3)
    assert [p.item() for p in part.prompts] == [1, 2]
    assert part.keys.tolist() == part.lanes.tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "does not train through Megatron"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "Launch with --use_fsdp instead of --use_deepspeed"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "Launch with --multi_gpu"),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}, "Launch with --zero_stage"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "Launch without offloading"),
    ],
)
def test_a_launcher_that_asks_for_what_is_not_divided_so_is_refused(
    asked: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "there")
    for name, value in (asked | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=says):
        ranks.start()


def test_without_a_compiler_deepspeed_is_refused_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "there")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda tool: tool if tool == "ninja" else None)
    for name, value in (ZERO | {"WORLD_SIZE": "2", "CXX": "clang++"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"there is no clang\+\+ on the PATH"):
        ranks.start()


def test_without_deepspeed_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for name, value in (ZERO | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"pip install .*\[deepspeed\]"):
        ranks.start()


@pytest.mark.slow
@launched("whole", "divided", "zero 1", "zero 2", "zero 2, adapters")
def test_two_processes_make_the_loss_gradients_and_weights_of_one(tmp_path: Path, how: str) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    shared.mkdir()
    backend, arms = BACKENDS[how]
    python([str(DRIVER), backend, str(alone), *arms])
    python([*TWO, str(DRIVER), backend, str(shared), *arms], how)
    for arm in arms:
        for limit in (65_536, 16):
            one, first, second = alone / f"{arm}-{limit}-0", shared / f"{arm}-{limit}-0", shared / f"{arm}-{limit}-1"
            metrics = json.loads(one.with_suffix(".json").read_text())
            assert json.loads(first.with_suffix(".json").read_text()) == pytest.approx(metrics, rel=1e-5, abs=1e-6)
            expected, mine, theirs = (load_file(path.with_suffix(".weights")) for path in (one, first, second))
            # DeepSpeed has forgotten the gradient; the first moment is linear in it.
            kinds = {"exp_avg/": 1e-4, "exp_avg_sq/": 1e-7} | ({} if how.startswith("zero") else {"gradient/": 1e-3})
            for kind, least in kinds.items():
                close_by_norm(mine, {name: value for name, value in expected.items() if name.startswith(kind)}, least)
            assert {float(value) for name, value in mine.items() if name.startswith("step/")} == {2.0}
            weights = [name for name in expected if "/" not in name]
            shared_by_all = [*weights, *(name for name in mine if name.startswith("gradient/"))]
            assert all(torch.equal(mine[name], theirs[name]) for name in shared_by_all), arm
            close_where_gradients_are(mine, {name: expected[name] for name in weights})
            close_where_gradients_are(load_file(first.with_suffix(".later")), load_file(one.with_suffix(".later")))


def close_by_norm(mine: dict[str, Tensor], expected: dict[str, Tensor], least: float) -> None:
    """Each tensor differs by less than 1e-5 of the norm of all, which is above `least`."""
    norm = torch.stack([value.norm() for value in expected.values()]).norm()
    assert float(norm) > least
    for name, value in expected.items():
        assert float((mine[name] - value).norm() / norm) < 1e-5, name


def close_where_gradients_are(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """AdamW divides by the gradient's size: where that is rounding, so is the direction."""
    assert mine.keys() >= expected.keys()
    for name, value in expected.items():
        far = (mine[name] - value).abs() > 1e-6
        assert float(far.float().mean()) < 0.01, name


@pytest.mark.slow
@launched("whole", "divided", "zero 2")
def test_a_whole_run_in_two_processes(tmp_path: Path, how: str) -> None:
    for arm in ["dapo", "gvm"] if how == "whole" else ["dapo"]:
        line = ["benchmark.cli", "run", arm, "--scale", "smoke", "--budget", "tokens_generated=9000", "--out"]
        more = ["--set", "backend.name=transformers"] if how == "divided" else []
        python(["-m", *line, str(tmp_path / arm / "one"), *more])
        python([*(ACCELERATE if how == "zero 2" else TWO), "-m", *line, str(tmp_path / arm / "two"), *more], how)
        same_run(tmp_path / arm / "one", tmp_path / arm / "two")


def same_run(alone: Path, shared: Path) -> None:
    """A run of one process, and the same of two: equal accounts, about equal numbers, equally shaped weights."""
    one, two = (json.loads((path / "result.json").read_text()) for path in (alone, shared))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["spent"]["tokens_generated"] == 9000
    assert two["overshoot"] == 0
    (first, *_), (second, *_) = (read_rows(path / "metrics.jsonl")[0] for path in (alone, shared))
    assert second["metrics"] == pytest.approx(first["metrics"], rel=1e-3, abs=1e-4)
    rows = [read_rows(path / "ledger.jsonl")[0] for path in (alone, shared)]
    assert [r for r in rows[1] if r["step"] == 0] == [r for r in rows[0] if r["step"] == 0]
    assert [r["row"] for r in rows[1]] == list(range(len(rows[1]))), "written by one process"
    weights, others = (load_file(path / "policy" / "model.safetensors") for path in (alone, shared))
    assert {key: value.shape for key, value in weights.items()} == {key: value.shape for key, value in others.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "more", "says"),
    [
        ("divided", ["grpo"], "the native backend fuses whole weights"),
        ("divided", ["oblr_po", "--set", "backend.name=transformers"], "it reads head, signal"),
        pytest.param("zero 2", ["oblr_po"], "it reads head, signal", marks=NEEDS_DEEPSPEED),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path: Path, how: str, more: list[str], says: str) -> None:
    line = ["-m", "benchmark.cli", "run", *more, "--scale", "smoke", "--out", str(tmp_path / "run")]
    assert says in " ".join(python([*TWO, *line], how, fails=True).split())


@pytest.mark.slow
@launched("whole", "divided", "zero 2")
def test_a_run_of_two_processes_stops_when_told_and_goes_on(tmp_path: Path, how: str) -> None:
    out = tmp_path / "run"
    line = [*TWO, "-m", "benchmark.cli", "run", "dynamo", "--scale", "smoke", "--out", str(out)]
    line += ["--set", "backend.name=transformers"] if how == "divided" else []
    launcher = subprocess.Popen([sys.executable, *line], env=environment(how), stderr=subprocess.PIPE)
    end = time.monotonic() + 300
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert launcher.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    launcher.terminate()
    launcher.communicate(timeout=120)
    assert json.loads((out / "progress.json").read_text())["state"] == "interrupted"
    assert list((out / "checkpoint").glob("step-*.safetensors"))
    done = len(read_rows(out / "metrics.jsonl")[0])
    python(line, how)
    result = json.loads((out / "result.json").read_text())
    assert result["overshoot"] == 0
    assert result["steps"] == len(read_rows(out / "metrics.jsonl")[0]) > done >= 1
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")[0]] == list(range(result["steps"]))
