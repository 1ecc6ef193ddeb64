"""A worker of `tests/test_once.py`, on a host of any name: claims cells and runs them in steps it can be killed in.

``python once_worker.py STUDY CELLS HOST STALE``. A step appends one row to the cell's record; who resumes
goes on from the rows that are there, as a run does from its checkpoint. A lock on a file, which the kernel frees when
its holder dies, tells if two workers are ever inside one cell at the same time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import sys
import time
from pathlib import Path

STUDY, COUNT, HOST, STALE = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
socket.gethostname = lambda: HOST

from benchmark import cells  # noqa: E402 (the name of the host is read once)
from benchmark.cells import Cell, Lease, LeaseLostError, claim  # noqa: E402
from benchmark.config import RunConfig  # noqa: E402
from benchmark.errors import StorageError  # noqa: E402
from benchmark.jsonl import append_rows, atomic_write_json, read_rows, restart  # noqa: E402

STEPS = 4


def work(cell: Cell, lease: Lease) -> None:
    """One cell to its end; the result is a chain of hashes over its steps, so a lost or doubled step changes it."""
    path = cell.folder / "steps.jsonl"
    with lease.fence():
        record = restart(path, read_rows(path)[1], done=cell.folder / "result.json")
    rows = read_rows(path)[0]
    chain = rows[-1]["chain"] if rows else cell.run_hash
    for step in range(len(rows), STEPS):
        chain = hashlib.sha256(f"{chain} {step}".encode()).hexdigest()
        time.sleep(0.01)
        record.append([{"step": step, "chain": chain}])
    with lease.fence():
        record.check()
        atomic_write_json(cell.folder / "result.json", {"run_hash": cell.run_hash, "chain": chain})
    append_rows(STUDY / "finished.jsonl", [{"seed": cell.config.seed, "pid": os.getpid(), "host": HOST}])


def main() -> None:
    """Until every cell is done."""
    base = json.loads((STUDY / "base.json").read_text())
    left = [Cell.of(STUDY, RunConfig.model_validate({**base, "seed": seed})) for seed in range(COUNT)]
    while left := [cell for cell in left if cell.result() is None]:
        for cell in left:
            lease = claim(cell.folder, stale_after=STALE, heartbeat=STALE / 10)
            if lease is None:
                continue
            with lease:
                if cell.result() is not None:
                    continue
                inside = os.open(cell.folder / "inside", os.O_CREAT | os.O_RDWR)
                try:
                    fcntl.flock(inside, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    append_rows(STUDY / "violations.jsonl", [{"cell": cell.folder.name, "pid": os.getpid()}])
                try:
                    work(cell, lease)
                except (LeaseLostError, StorageError) as error:  # taken over while this process slept
                    append_rows(STUDY / "noticed.jsonl", [{"pid": os.getpid(), "error": str(error)}])
                finally:
                    os.close(inside)
            break
        else:
            time.sleep(0.02)


assert cells.machine().startswith(HOST)
main()
