"""Child processes that compare answers with math-verify, each under limits the parent enforces."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.errors import InputError
from benchmark.verdict import Verdict

START_S = 60.0  # seconds for a child to import math-verify on a busy machine
_SCRIPT = Path(__file__).with_name("verifier_worker.py")


class WorkerPool:
    """At most `workers` children, started when first needed and replaced when they hang or die."""

    def __init__(self, workers: int, timeout_s: float, memory_mb: int) -> None:
        self.size, self.timeout_s, self.memory_mb = workers, timeout_s, memory_mb
        self._workers: list[_Worker] = []

    def close(self) -> None:
        """End all children."""
        while self._workers:
            self._workers.pop().kill()

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts for (gold, answer) pairs, in order, one pair at a time in each child.

        A pair whose child dies is asked once more, in a new one: it may have died of what it had been asked before.

        Raises:
            InputError: a child cannot be started.
        """
        verdicts: list[Verdict] = [Verdict.ERROR] * len(pairs)
        waiting = deque(range(len(pairs)))
        again: set[int] = set()
        busy: dict[_Worker, int] = {}
        try:
            while waiting or busy:
                self._grow(len(waiting) + len(busy))
                for worker in self._workers:
                    if waiting and worker not in busy and worker.ready:
                        busy[worker] = waiting.popleft()
                        worker.ask(*pairs[busy[worker]])
                for worker in self._wait():
                    reply = worker.receive()
                    if worker in busy and reply is not None:
                        pair = busy.pop(worker)
                        verdicts[pair] = reply
                        if worker.dead:
                            self._drop(worker)
                        if worker.died and pair not in again:
                            again.add(pair)
                            waiting.appendleft(pair)
        except BaseException:  # an interrupted call must not leave answers for the next one
            self.close()
            raise
        return verdicts

    def _grow(self, wanted: int) -> None:
        for worker in [w for w in self._workers if w.ready and w.deadline is None and w.gone]:
            self._drop(worker)
        while len(self._workers) < min(self.size, wanted):
            self._workers.append(_Worker(self.timeout_s, self.memory_mb))

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()

    def _wait(self) -> list[_Worker]:
        """Workers that have something to say or have used up their time."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                if worker.deadline is not None:
                    selector.register(worker.output, selectors.EVENT_READ, worker)
            left = min((w.deadline for w in self._workers if w.deadline is not None), default=0.0)
            heard = [key.data for key, _ in selector.select(max(0.0, left - time.monotonic()))]
        now = time.monotonic()
        late = [w for w in self._workers if w.deadline is not None and w.deadline <= now and w not in heard]
        return heard + late


class _Worker:
    """One child process; says when it is ready, then answers one request at a time."""

    def __init__(self, timeout_s: float, memory_mb: int) -> None:
        self.timeout_s = timeout_s
        self.ready = self.dead = self.died = False  # dead: not to be asked again; died: by itself
        # -P keeps this folder off the child's import path; its own session keeps a Ctrl-C from reaching it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), str(memory_mb), str(2 * timeout_s + 5)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self.output = self._process.stdin, self._process.stdout
        self._heard = b""
        self.deadline: float | None = time.monotonic() + START_S

    def ask(self, gold: str, answer: str) -> None:
        """Send one pair; its time starts now.

        Two texts of `benchmark.verifier.LONGEST` characters take at most 48 kB as UTF-8, less than a pipe holds:
        the write returns at once even if the child has stopped reading.
        """
        self.deadline = time.monotonic() + self.timeout_s
        line = json.dumps([gold, answer], ensure_ascii=False) + "\n"
        try:
            self._input.write(line.encode("utf-8", "surrogatepass"))
            self._input.flush()
        except OSError:
            self.dead = True  # found dead by the next receive, which sees its output closed

    def receive(self) -> Verdict | None:
        """The verdict of the pair asked for; None if the child has only become ready, or said half a line.

        Raises:
            InputError: the child did not start.
        """
        chunk = self._read()
        self._heard += chunk or b""
        if chunk and not self._heard.endswith(b"\n"):
            return None
        self.deadline = None
        if not self.ready:
            self._check_start()
            return None
        if chunk:
            reply, self._heard = json.loads(self._heard), b""
            self.dead = reply == "memory"
            return _verdict(reply)
        self.dead, self.died = True, chunk is not None
        return Verdict.ERROR if self.died else Verdict.TIMEOUT

    def _read(self) -> bytes | None:
        """What the child has said; empty if it is gone, None if its time is up and it has said nothing."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            return os.read(self.output.fileno(), 65536) if selector.select(0) else None

    def _check_start(self) -> None:
        if self._heard == b'"ready"\n':
            self.ready, self._heard = True, b""
            return
        why = self._heard.decode(errors="replace").strip() or "it ended, or took too long"
        raise InputError(
            f"the process that runs math-verify does not start ({why})",
            remedy="Check that math-verify is installed, or raise memory_mb",
        )

    @property
    def gone(self) -> bool:
        """Whether the process has ended, for instance killed by the system while it was idle."""
        return self._process.poll() is not None

    def kill(self) -> None:
        """End the child at once."""
        self._process.kill()
        self._process.wait()
        for stream in (self._input, self.output):
            with contextlib.suppress(OSError):  # what was still buffered for a dead child
                stream.close()


def _verdict(reply: Any) -> Verdict:
    return Verdict(reply) if reply in set(Verdict) else Verdict.ERROR
