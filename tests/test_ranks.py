"""One run in several processes: two make of a batch what one makes of it, and only the first writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmark import ranks
from benchmark.backend import Request
from benchmark.errors import InputError
from benchmark.jsonl import read_rows

ROOT = Path(__file__).parent.parent
DRIVER = Path(__file__).with_name("ranks_driver.py")
DIVISIBLE = ["grpo", "entropy_loss", "dynamo", "kl_cov"]
ARMS = ["grpo", "entropy_loss", "dynamo", "kl_cov", "capo", "dppo_kl", "oblr_po"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def environment(*, divided: bool = False) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    asked = {"ACCELERATE_USE_FSDP": "true"} if divided else {}
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""} | asked


def python(arguments: list[str], *, divided: bool = False, fails: bool = False) -> str:
    line, env = [sys.executable, *arguments], environment(divided=divided)
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


def test_a_launcher_that_would_divide_the_model_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="does not train through DeepSpeed"):
        ranks.start()


@pytest.mark.slow
@pytest.mark.parametrize("divided", [False, True], ids=["whole weights", "divided weights"])
def test_two_processes_make_the_loss_gradients_and_weights_of_one(tmp_path: Path, *, divided: bool) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    shared.mkdir()
    backend, arms = ("transformers", DIVISIBLE) if divided else ("native", ARMS)
    python([str(DRIVER), backend, str(alone), *arms])
    python([*TWO, str(DRIVER), backend, str(shared), *arms], divided=divided)
    for arm in arms:
        for limit in (65_536, 16):
            one, first, second = alone / f"{arm}-{limit}-0", shared / f"{arm}-{limit}-0", shared / f"{arm}-{limit}-1"
            metrics = json.loads(one.with_suffix(".json").read_text())
            assert json.loads(first.with_suffix(".json").read_text()) == pytest.approx(metrics, rel=1e-5, abs=1e-6)
            expected, mine = load_file(one.with_suffix(".weights")), load_file(first.with_suffix(".weights"))
            theirs = load_file(second.with_suffix(".weights"))
            norm = torch.stack([v.norm() for k, v in expected.items() if k.startswith("gradient/")]).norm()
            assert float(norm) > 1e-3
            for name, value in expected.items():
                assert torch.equal(mine[name], theirs[name]), (arm, name)
                if name.startswith("gradient/"):
                    assert float((mine[name] - value).norm() / norm) < 1e-5, (arm, name)
                else:
                    # AdamW divides by the gradient's size: where that is rounding, so is the direction.
                    far = (mine[name] - value).abs() > 1e-6
                    assert float(far.float().mean()) < 0.01, (arm, name)


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "divided"), [("dapo", False), ("gvm", False), ("dapo", True)])
def test_a_whole_run_in_two_processes(tmp_path: Path, arm: str, *, divided: bool) -> None:
    line = ["benchmark.cli", "run", arm, "--scale", "smoke", "--budget", "tokens_generated=9000", "--out"]
    more = ["--set", "backend.name=transformers"] if divided else []
    python(["-m", *line, str(tmp_path / "one"), *more])
    python([*TWO, "-m", *line, str(tmp_path / "two"), *more], divided=divided)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["spent"]["tokens_generated"] == 9000
    assert two["overshoot"] == 0
    (first, *_), (shared, *_) = (read_rows(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "two"))
    assert shared["metrics"] == pytest.approx(first["metrics"], rel=1e-3, abs=1e-4)
    rows = [read_rows(tmp_path / name / "ledger.jsonl")[0] for name in ("one", "two")]
    assert [r for r in rows[1] if r["step"] == 0] == [r for r in rows[0] if r["step"] == 0]
    assert [r["row"] for r in rows[1]] == list(range(len(rows[1]))), "written by one process"
    first, second = (load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("one", "two"))
    assert {key: value.shape for key, value in first.items()} == {key: value.shape for key, value in second.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["grpo"], "the native backend fuses whole weights"),
        (["oblr_po", "--set", "backend.name=transformers"], "it reads head, signal"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path: Path, more: list[str], says: str) -> None:
    line = ["-m", "benchmark.cli", "run", *more, "--scale", "smoke", "--out", str(tmp_path / "run")]
    assert says in " ".join(python([*TWO, *line], divided=True, fails=True).split())


@pytest.mark.slow
@pytest.mark.parametrize("divided", [False, True], ids=["whole weights", "divided weights"])
def test_a_run_of_two_processes_stops_when_told_and_goes_on(tmp_path: Path, *, divided: bool) -> None:
    out = tmp_path / "run"
    line = [*TWO, "-m", "benchmark.cli", "run", "dynamo", "--scale", "smoke", "--out", str(out)]
    line += ["--set", "backend.name=transformers"] if divided else []
    env = environment(divided=divided)
    launcher = subprocess.Popen([sys.executable, *line], env=env, stderr=subprocess.PIPE)
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
    python(line, divided=divided)
    result = json.loads((out / "result.json").read_text())
    assert result["overshoot"] == 0
    assert result["steps"] == len(read_rows(out / "metrics.jsonl")[0]) > done >= 1
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")[0]] == list(range(result["steps"]))
