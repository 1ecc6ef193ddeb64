"""Disks that are full, read-only or gone, and checkpoints and records that were damaged: nothing finished is lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from benchmark import checkpoint, jsonl
from benchmark import run as run_module
from benchmark.cells import LeaseLostError, claim
from benchmark.collect import Collector
from benchmark.config import ArchitectureConfig, RunConfig
from benchmark.errors import InputError, StorageError
from benchmark.jsonl import Record, append_rows, fingerprint, read_rows, restart
from benchmark.policy import Policy
from benchmark.run import Interrupted, Run, run_cell
from benchmark.study import run_single
from benchmark.warmup import new_policy

ROOT = Path(__file__).parent.parent
DETERMINISTIC = ("ledger.jsonl", "metrics.jsonl", "evaluation.jsonl", "allocation.jsonl", "policy/model.safetensors")


def make_config(policy: str) -> RunConfig:
    plain: dict[str, Any] = {
        "study": "test",
        "arm": "grpo",
        "seed": 3,
        "scale": "test",
        "policy": {"path": policy},
        "task": {
            "name": "sums",
            "mix": [{"family": "chain_sum", "num_terms": [2, 2], "num_digits": [1, 1]}],
            "train_items": 24,
            "eval_items_per_family": 4,
        },
        "rollout": {"prompts_per_batch": 4, "rollouts_per_prompt": 4, "max_tokens": 12},
        "budget": {"currency": "rollouts", "amount": 64},
        "evaluation": {"points": 2, "samples": 2, "final_samples": 2, "k": [1]},
        "method": {"name": "w_reinforce", "params": {}},
    }
    return RunConfig.model_validate(plain)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of four steps with an untrained policy."""
    folder = tmp_path_factory.mktemp("policy") / "policy"
    new_policy(ArchitectureConfig(hidden_size=32, layers=1, heads=2, kv_heads=1, mlp=64), 0).save(folder)
    return make_config(str(folder))


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run_cell(config, out)
    return out


def assert_equal(whole: Path, other: Path) -> None:
    for name in DETERMINISTIC:
        assert (whole / name).read_bytes() == (other / name).read_bytes(), name
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in other.iterdir() if p.name != "lease")


def stopped_after(config: RunConfig, out: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A run with a checkpoint after every step that was interrupted; its checkpoints, newest first."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > steps

    monkeypatch.setattr(run_module.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(run_module, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Interrupted):
        run_cell(config, out, should_stop=stop)
    monkeypatch.undo()
    return sorted((out / "checkpoint").iterdir(), reverse=True)


# --- checkpoints ----------------------------------------------------------------------------------------------


def test_two_checkpoints_are_kept_and_hold_everything(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stopped_after(config, tmp_path / "run", 3, monkeypatch)
    assert [path.name[:21] for path in found] == ["step-000003-point-001", "step-000002-point-001"]
    with safe_open(found[0], framework="pt") as opened:
        names = set(opened.keys())
        state = json.loads(opened.metadata()["state"])
    weights = {name.removeprefix("policy/") for name in names if name.startswith("policy/")}
    history = {"history/counts", "history/batches"}
    assert names == history | {f"{part}/{name}" for name in weights for part in ("policy", *moments())}
    ledger = tmp_path / "run" / "ledger.jsonl"
    assert state["records"]["ledger.jsonl"] == list(fingerprint(ledger))
    assert state["ledger"]["rows"] == len(read_rows(ledger)[0])
    assert {"step", "place", "points", "updates"} <= state.keys()  # what the keyed streams are counted by


def moments() -> list[str]:
    return [f"optimiser/{moment}" for moment in checkpoint.MOMENTS]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    config: RunConfig,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    out = tmp_path / "run"
    newest, before = stopped_after(config, out, 3, monkeypatch)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"flip": bytes(data), "cut": bytes(data[:-1]), "empty": b""}[damage])
    used: list[Path] = []
    load = checkpoint.load

    def spy(file: Path, *rest: Any) -> Any:
        used.append(file)
        return load(file, *rest)

    monkeypatch.setattr(checkpoint, "load", spy)
    with caplog.at_level(logging.WARNING):
        run_cell(config, out)
    assert used == [before]
    assert "damaged" in caplog.text
    assert_equal(whole, out)


def test_every_flipped_byte_of_a_checkpoint_is_found(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, before = stopped_after(config, tmp_path / "run", 2, monkeypatch)
    data = newest.read_bytes()
    for place in range(0, len(data), len(data) // 50):
        newest.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
        assert (checkpoint.latest(newest.parent) or (None,))[0] == before


@pytest.mark.parametrize("name", ["ledger.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_records_that_were_changed_behind_a_checkpoint_are_made_again(
    config: RunConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    out = tmp_path / "run"
    stopped_after(config, out, 3, monkeypatch)
    record = out / name
    data = bytearray(record.read_bytes())
    if damage == "gone":
        record.unlink()
    else:
        data[10] ^= 1
        record.write_bytes(bytes(data) if damage == "flip" else bytes(data[:-20]))
    run_cell(config, out)
    assert_equal(whole, out)


def test_a_process_killed_just_after_its_last_file_leaves_nothing_behind(
    config: RunConfig, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "checkpoint").mkdir()
    (out / "checkpoint" / "step-000001").touch()
    (out / ".progress.json.0123abcd-1-x.partial").touch()
    run_cell(config, out)
    assert_equal(whole, out)


# --- Ctrl-C ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_finishes_the_step_and_saves_twice_stops_at_once(
    config: RunConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    out, collect, after = tmp_path / "run", Collector.collect, []

    def pressed(self: Collector, step: int) -> Any:
        batch = collect(self, step)
        for _ in range(times if step == 1 else 0):
            signal.raise_signal(signal.SIGINT)
        after.append(step)
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "collect", pressed)
        if times == 1:
            assert run_single(config, out).interrupted
        else:
            with pytest.raises(KeyboardInterrupt):  # the command line makes exit code 130 of both
                run_single(config, out)
    assert after == ([0, 1] if times == 1 else [0])
    assert json.loads((out / "progress.json").read_text())["state"] == "interrupted"
    newest = max(path.name for path in (out / "checkpoint").iterdir())
    assert newest.startswith("step-000002" if times == 1 else "step-000000")
    assert not run_single(config, out).interrupted
    assert_equal(whole, out)


# --- records --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deleted", "replaced", "folder deleted"])
def test_a_record_notices_that_its_file_is_gone(tmp_path: Path, how: str) -> None:
    record = Record(tmp_path / "run" / "ledger.jsonl")
    record.path.parent.mkdir()
    record.append([{"row": 0}])
    if how == "folder deleted":
        shutil.rmtree(record.path.parent)
    else:
        record.path.unlink()
    if how == "replaced":
        append_rows(record.path, [{"row": 0}])
    with pytest.raises(StorageError, match="deleted or replaced while the run was writing"):
        record.append([{"row": 1}])
    assert not record.path.exists() or read_rows(record.path)[0] == [{"row": 0}]


def test_a_sleeper_cannot_write_into_the_record_of_the_next_owner(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    sleeper, heir = Record(path), Record(path)
    sleeper.append([{"row": 0}, {"row": 1}])
    restart(path, fingerprint(path)[0] // 2)
    heir.append([{"row": 1, "by": "heir"}])
    with pytest.raises(StorageError, match="replaced"):
        sleeper.append([{"row": 2}])
    assert read_rows(path)[0] == [{"row": 0}, {"row": 1, "by": "heir"}]


@pytest.mark.parametrize("moment", ["before", "while it writes"])
@pytest.mark.parametrize("size", [0, 10])
def test_a_sleeper_in_the_middle_of_a_restart_leaves_the_finished_record_of_its_heir_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, size: int
) -> None:
    """It had read how much to keep, and slept; meanwhile the heir took over and finished."""
    path, result, fsync = tmp_path / "ledger.jsonl", tmp_path / "result.json", os.fsync
    append_rows(path, [{"row": 0}])

    def heir() -> None:
        monkeypatch.setattr(jsonl.os, "fsync", fsync)
        restart(path, 10)
        append_rows(path, [{"row": 1}])
        result.touch()

    def sleep(descriptor: int) -> None:
        heir()
        fsync(descriptor)

    if moment == "before" or not size:
        heir()
    else:
        monkeypatch.setattr(jsonl.os, "fsync", sleep)
    with pytest.raises(StorageError, match="taken over by another process"):
        restart(path, size, done=result)
    assert read_rows(path)[0] == [{"row": 0}, {"row": 1}]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("size", [0, 10])
@pytest.mark.parametrize("begun", [True, False])
def test_a_sleeper_between_restart_and_its_first_row_does_not_write_into_the_record_of_its_heir(
    tmp_path: Path, size: int, begun: bool
) -> None:
    path = tmp_path / "ledger.jsonl"
    if begun:
        append_rows(path, [{"row": 0}])
    sleeper = restart(path, size)
    heir = restart(path, size)
    heir.append([{"row": 1}])
    whole = path.read_bytes()
    with pytest.raises(StorageError, match="deleted or replaced"):
        sleeper.append([{"row": 1, "by": "sleeper"}])
    assert path.read_bytes() == whole
    heir.append([{"row": 2}])


# --- full, read-only and vanished disks -----------------------------------------------------------------------

FAULTS = {errno.ENOSPC: "No space left", errno.EROFS: "Read-only", errno.EIO: "Input/output"}


@pytest.mark.parametrize("number", FAULTS)
@pytest.mark.parametrize("operation", [3, 17, 40, 61])
def test_a_disk_that_fails_ends_the_run_clearly_and_the_same_command_goes_on(
    config: RunConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: int, number: int
) -> None:
    """From some operation on, every write tears and every sync fails, as when a disk fills up."""
    out, done = tmp_path / "run", 0

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal done
            done += 1
            if done < operation:
                return original(*args)
            if len(args) > 1:
                original(args[0], bytes(args[1])[:7])
            raise OSError(number, os.strerror(number))

        return call

    with monkeypatch.context() as patch:
        patch.setattr(jsonl.os, "write", failing(os.write))
        patch.setattr(jsonl.os, "fsync", failing(os.fsync))
        with pytest.raises(StorageError, match=FAULTS[number]) as caught:
            run_cell(config, out)
    assert done >= operation
    assert str(out) in str(caught.value)
    assert not (out / "result.json").exists()
    run_cell(config, out)
    assert_equal(whole, out)


@pytest.mark.parametrize("everything", [True, False])
def test_a_folder_deleted_in_the_middle_ends_the_run_and_does_not_come_back(
    config: RunConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything: bool
) -> None:
    out, step = tmp_path / "run", Run.step_once

    def step_and_delete(self: Run) -> None:
        step(self)
        if self.step == 2:
            shutil.rmtree(out)
            if not everything:  # somebody makes the folder anew
                out.mkdir()

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step_once", step_and_delete)
        with pytest.raises(StorageError, match="deleted"):
            run_cell(config, out)
    assert not list(out.glob("*.jsonl")) or not everything
    assert not (out / "result.json").exists()
    run_cell(config, out)
    assert_equal(whole, out)


def test_a_run_that_was_taken_over_stops_without_touching_the_record(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a machine has slept for an hour; here the heir takes the lease between two steps."""
    out, step = tmp_path / "run", Run.step_once

    def step_and_lose(self: Run) -> None:
        step(self)
        (out / "lease" / "7").touch()

    monkeypatch.setattr(Run, "step_once", step_and_lose)
    with pytest.raises(LeaseLostError, match="new owner"):
        run_single(config, out)
    assert not list((out / "checkpoint").glob("step-000001*"))


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from benchmark.cli import main
sys.argv = ["rolloutbench", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize("limit", [3000, 30_000])
def test_the_command_says_which_file_cannot_be_written(config: RunConfig, tmp_path: Path, limit: int) -> None:
    """A real limit of the system on the size of files, below a record's or a checkpoint's."""
    command = ["run", "grpo", "--scale", "smoke", "--budget", "rollouts=512", "--out", str(tmp_path / "run")]
    options = ["--set", f"policy.path={config.policy.path}", "--set", "evaluation.final_samples=64"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *command, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "File too large" in line
    assert str(tmp_path / "run") in line
    assert "Results that were finished before are intact" in line


def test_a_folder_that_is_a_file_is_a_clear_error(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises((StorageError, InputError), match=r"Not a directory\. A file stands where a folder should be"):
        run_single(config, tmp_path / "run")
    with pytest.raises(StorageError):
        claim(tmp_path / "run" / "cell")
    assert (tmp_path / "run").read_text() == "not a folder"


def test_a_policy_is_saved_whole_or_not_at_all(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(str(config.policy.path), torch.device("cpu"))

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(policy.tokenizer, "save_pretrained", fail)
    with pytest.raises(StorageError, match="No space"):
        policy.save(tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("moment", ["begin", "checkpoint", "result"])
def test_a_run_that_slept_leaves_its_heirs_alone(config: RunConfig, whole: Path, tmp_path: Path, moment: str) -> None:
    """The heir takes over while the first run stands before its n-th fence, finishes, and keeps its bytes."""
    out = tmp_path / "run"
    lease = claim(out)
    assert lease is not None
    fences = {"begin": 1, "checkpoint": 2, "result": 4}[moment]
    passed = 0

    def fence() -> AbstractContextManager[None]:
        nonlocal passed
        passed += 1
        if passed == fences:
            os.utime(lease.path, (1.0, 1.0))
            heir = claim(out)
            assert heir is not None
            with heir:
                run_cell(config, out, fence=heir.fence)
        return lease.fence()

    with lease, pytest.raises(LeaseLostError):
        run_cell(config, out, should_stop=lambda: False, fence=fence)
    assert passed == fences
    assert_equal(whole, out)
