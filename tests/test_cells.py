"""Claims on cells: one owner at a time, whatever dies, stalls or races."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import benchmark
from benchmark import cells
from benchmark.cells import LOCK, Cell, Lease, LeaseLostError, claim, claim_next, left_by, owner
from benchmark.config import RunConfig
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_json, atomic_write_text
from benchmark.layers import dump

LONG_AGO = time.time() - 3600


def config(arm: str = "grpo", seed: int = 0) -> RunConfig:
    return RunConfig.model_validate(
        {
            "study": "s",
            "arm": arm,
            "seed": seed,
            "scale": "small",
            "task": {"name": "sums", "mix": [{"family": "chain_sum"}]},
            "budget": {"amount": 100_000},
            "method": {"name": "grpo"},
        }
    )


def finish(cell: Cell) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(cell.folder / "result.json", {"run_hash": cell.run_hash})


def belongs_to(lease: Lease, **changes: object) -> None:
    """Rewrite who holds `lease`, as if another process had made it; its heartbeat stays where it is."""
    holder = json.loads(lease.path.read_text(encoding="utf-8"))
    stamp = lease.path.stat().st_mtime
    lease.path.write_text(json.dumps({**holder, **changes}), encoding="utf-8")
    os.utime(lease.path, (stamp, stamp))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# -- one lease -----------------------------------------------------------------------------------------------


def test_a_held_cell_is_refused_until_it_is_released(tmp_path: Path) -> None:
    first = claim(tmp_path)
    assert first is not None
    assert claim(tmp_path) is None
    assert (owner(tmp_path) or {})["pid"] == os.getpid()
    first.release()
    assert owner(tmp_path) is None
    second = claim(tmp_path)
    assert second is not None
    assert second.held
    assert not first.held
    second.release()


def test_an_owner_on_another_machine_is_dead_only_when_its_heartbeat_stops(tmp_path: Path) -> None:
    lease = claim(tmp_path, heartbeat=3600)
    assert lease is not None
    belongs_to(lease, machine="elsewhere", pid=dead_pid())
    assert claim(tmp_path, stale_after=60) is None
    os.utime(lease.path, (LONG_AGO, LONG_AGO))
    taken = claim(tmp_path, stale_after=60)
    assert taken is not None
    assert not lease.held
    assert taken.held


def test_a_dead_process_of_this_machine_loses_its_cell_at_once(tmp_path: Path) -> None:
    lease = claim(tmp_path, heartbeat=3600)
    assert lease is not None
    pid = dead_pid()
    belongs_to(lease, pid=pid)
    assert left_by(tmp_path, pid)
    assert claim(tmp_path, stale_after=3600) is not None


def test_a_reused_pid_does_not_keep_a_cell_for_ever(tmp_path: Path) -> None:
    lease = claim(tmp_path, heartbeat=3600)  # held by a live pid, ours, but without a heartbeat
    assert lease is not None
    os.utime(lease.path, (LONG_AGO, LONG_AGO))
    assert claim(tmp_path, stale_after=60) is not None


def test_the_heartbeat_keeps_a_lease_alive(tmp_path: Path) -> None:
    lease = claim(tmp_path, heartbeat=0.02)
    assert lease is not None
    os.utime(lease.path, (LONG_AGO, LONG_AGO))
    deadline = time.monotonic() + 10
    while lease.path.stat().st_mtime < LONG_AGO + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert claim(tmp_path, stale_after=60) is None
    lease.release()


def test_a_lease_file_without_content_is_judged_by_its_age(tmp_path: Path) -> None:
    (tmp_path / "lease").mkdir()
    path = tmp_path / "lease" / "0"
    path.touch()
    assert claim(tmp_path, stale_after=60) is None
    os.utime(path, (LONG_AGO, LONG_AGO))
    assert claim(tmp_path, stale_after=60) is not None


def test_a_late_verdict_of_staleness_cannot_take_the_cell_from_its_new_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = claim(tmp_path, heartbeat=3600)
    assert old is not None
    os.utime(old.path, (LONG_AGO, LONG_AGO))
    judge = cells._stale
    new: list[Lease | None] = []

    def slowly(lease: Path, after: float) -> bool:
        verdict = judge(lease, after)
        if not new:  # while this process dawdles after its verdict, another takes the cell over
            new.append(None)
            new[0] = claim(tmp_path, stale_after=60)
        return verdict

    monkeypatch.setattr(cells, "_stale", slowly)
    assert claim(tmp_path, stale_after=60) is None
    assert new[0] is not None
    assert new[0].held


def test_exactly_one_of_many_takes_a_stale_lease(tmp_path: Path) -> None:
    for round_number in range(25):
        folder = tmp_path / str(round_number)
        stale = claim(folder, heartbeat=3600)
        assert stale is not None
        os.utime(stale.path, (LONG_AGO, LONG_AGO))
        start, won = threading.Barrier(8), []

        def race(folder: Path = folder, start: threading.Barrier = start, won: list[Lease] = won) -> None:
            start.wait()
            if (lease := claim(folder, stale_after=60)) is not None:
                won.append(lease)

        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].release()


# -- cells ---------------------------------------------------------------------------------------------------


def test_claim_next_goes_in_order_past_done_skipped_and_held_cells(tmp_path: Path) -> None:
    four = [Cell.of(tmp_path, config(seed=seed)) for seed in range(4)]
    finish(four[0])
    held = claim(four[1].folder)
    assert held is not None
    found = claim_next(four, lambda cell: cell is four[2])
    assert found is not None
    assert found[0] is four[3]
    assert claim_next(four, lambda cell: cell is four[2]) is None


def test_a_cell_finished_between_look_and_claim_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell.of(tmp_path, config())

    def claim_after_the_other_finished(folder: Path, *, stale_after: float) -> Lease | None:
        finish(cell)
        return claim(folder, stale_after=stale_after)

    monkeypatch.setattr(cells, "claim", claim_after_the_other_finished)
    assert claim_next([cell], lambda _: False) is None
    assert owner(cell.folder) is None


def test_cells_of_different_runs_have_different_folders(tmp_path: Path) -> None:
    configs = [config(), config(seed=1), config(arm="other")]
    configs.append(configs[0].model_copy(update={"budget": configs[0].budget.model_copy(update={"amount": 99_999})}))
    folders = {Cell.of(tmp_path, each).folder for each in configs}
    assert len(folders) == 4
    assert all(each.run_hash[:8] in Cell.of(tmp_path, each).folder.name for each in configs)


def test_a_folder_with_another_run_is_never_used(tmp_path: Path) -> None:
    cell, other = Cell(config(), tmp_path), Cell(config(seed=1), tmp_path)
    cell.check()
    atomic_write_text(tmp_path / "config.yaml", dump(cell.config))
    cell.check()
    with pytest.raises(InputError, match="another configuration"):
        other.check()
    finish(cell)
    assert cell.result() is not None
    with pytest.raises(InputError, match="another configuration"):
        other.result()


def test_a_configuration_of_another_version_is_another_run(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "config.yaml", dump(config()) + "retired_key: 1\n")
    with pytest.raises(InputError, match="another configuration"):
        Cell(config(), tmp_path).check()


def test_a_failure_counts_for_its_invocation_only(tmp_path: Path) -> None:
    cell = Cell.of(tmp_path, config())
    cell.mark_failed("monday", "ValueError: no")
    assert cell.failure("monday") == "ValueError: no"
    assert cell.failure("tuesday") is None
    cell.clear_failure()
    assert cell.failure("monday") is None


# -- many processes, some of them killed ---------------------------------------------------------------------

WORKER = """
import json, os, sys, time
from pathlib import Path
import psutil
from benchmark.cells import Cell, claim_next
from benchmark.config import RunConfig
from benchmark.jsonl import append_rows, atomic_write_json

study, base = Path(sys.argv[1]), json.loads(sys.argv[2])
left = [Cell.of(study, RunConfig.model_validate({**base, "seed": seed})) for seed in range(50)]
while left := [cell for cell in left if cell.result() is None]:
    found = claim_next(left, lambda cell: False, stale_after=60)
    if found is None:
        time.sleep(0.02)
        continue
    cell, lease = found
    with lease:
        inside = cell.folder / "inside"
        if inside.exists() and psutil.pid_exists(pid := int(inside.read_text() or -1)):
            append_rows(study / "violations.jsonl", [{"cell": cell.folder.name, "pid": pid}])
        inside.write_text(str(os.getpid()))
        time.sleep(0.04)
        append_rows(study / "finished.jsonl", [{"seed": cell.config.seed}])
        atomic_write_json(cell.folder / "result.json", {"run_hash": cell.run_hash})
        inside.unlink()
"""


def test_racing_workers_run_each_cell_exactly_once_though_some_are_killed(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(benchmark.__path__[0]).parent)}
    base = json.dumps(config().model_dump(mode="json"))

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), base], env=env)

    def done() -> int:
        return len(list(tmp_path.glob("cells/*/result.json")))

    def kill_inside(workers: list[subprocess.Popen[bytes]]) -> Path | None:
        """Kills a worker that is certainly inside a cell (it is stopped before that is looked at); its cell."""
        for inside in tmp_path.glob("cells/*/inside"):
            with contextlib.suppress(OSError, ValueError):
                pid = int(inside.read_text())
                victim = next((worker for worker in workers if worker.pid == pid), None)
                if victim is None:
                    continue
                victim.send_signal(signal.SIGSTOP)
                while psutil.Process(pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                    time.sleep(0.001)
                unfinished = not (inside.parent / "result.json").exists()
                if unfinished and inside.exists() and inside.read_text() == str(pid):
                    victim.kill()
                    victim.wait()
                    workers.remove(victim)
                    return inside.parent
                victim.send_signal(signal.SIGCONT)
        return None

    killed: list[Path] = []
    deadline = time.monotonic() + 60
    workers = [start() for _ in range(4)]
    while done() < 50 and time.monotonic() < deadline:
        # Kills are spread over the progress.
        if len(killed) < 6 and done() > 7 * len(killed) and (cell := kill_inside(workers)):
            killed.append(cell)
            workers.append(start())
        time.sleep(0.002)
    codes = [worker.wait(timeout=20) for worker in workers]
    assert (done(), len(killed)) == (50, 6)
    assert codes == [0, 0, 0, 0]
    assert not (tmp_path / "violations.jsonl").exists()
    lines = (tmp_path / "finished.jsonl").read_text().splitlines()
    # A worker killed between its two last writes is the only way to finish a cell twice.
    seeds = [json.loads(line)["seed"] for line in lines]
    assert set(seeds) == set(range(50))
    assert len(seeds) <= 50 + len(killed)
    taken_over = {folder for folder in tmp_path.glob("cells/*") if len(list(folder.glob("lease/[0-9]*"))) > 2}
    assert set(killed) <= taken_over
    assert len(seeds) - 50 <= len(taken_over)


# -- the fence -----------------------------------------------------------------------------------------------


def overslept(folder: Path) -> tuple[Lease, Lease]:
    """A lease whose heartbeat stopped long ago, and its heir's."""
    sleeper = claim(folder)
    assert sleeper is not None
    os.utime(sleeper.path, (LONG_AGO, LONG_AGO))
    heir = claim(folder)
    assert heir is not None
    return sleeper, heir


def test_only_the_latest_owner_passes_the_fence(tmp_path: Path) -> None:
    sleeper, heir = overslept(tmp_path)
    with pytest.raises(LeaseLostError, match="new owner"), sleeper.fence():
        raise AssertionError("a sleeper was let in")
    with heir.fence(), sleeper:
        assert heir.held
    with heir.fence():  # as often as one likes
        pass
    assert (tmp_path / "lease" / LOCK).read_bytes() == b""


def test_an_heir_waits_for_a_sleeper_inside_the_fence(tmp_path: Path) -> None:
    sleeper = claim(tmp_path)
    assert sleeper is not None
    order: list[str] = []
    waiting = threading.Event()

    def inherit(heir: Lease) -> None:
        waiting.set()
        with heir.fence():
            order.append("heir")

    with sleeper.fence():
        os.utime(sleeper.path, (LONG_AGO, LONG_AGO))
        heir = claim(tmp_path)
        assert heir is not None
        thread = threading.Thread(target=inherit, args=[heir])
        thread.start()
        assert waiting.wait(10)
        thread.join(0.2)
        order.append("sleeper")
    thread.join(10)
    assert order == ["sleeper", "heir"]


def test_a_fence_without_locks_still_asks_whose_cell_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cells.fcntl, "flock", refuse)
    sleeper, heir = overslept(tmp_path)
    with heir.fence():
        pass
    with pytest.raises(LeaseLostError), sleeper.fence():
        raise AssertionError("a sleeper was let in")
