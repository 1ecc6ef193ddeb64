"""A study that trains while its tracking server and its mirror are killed; then, what the store lacks or has twice.

``python tests/mirror_crash_driver.py OUT [--postgres] [--server-kills N] [--mirror-kills N] [--seed N]`` prints a line
of JSON. Server and mirror are processes of their own and die of SIGKILL at random moments; the server is away for up
to three seconds. The runs are rows that a thread writes, every 50 ms one step of every run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mirror_files as files
import servers

from benchmark.mirror import Mirror

ARMS, STEP_SECONDS = ("grpo", "dapo", "dynamo"), 0.05


class Training(threading.Thread):
    """Writes rows until it is told to finish the runs.

    Attributes:
        worst: longest time that a step took, in seconds.
    """

    def __init__(self, study: Path) -> None:
        super().__init__()
        self.cells, self.ending, self.worst, self.steps = files.plan(study, ARMS), threading.Event(), 0.0, 0

    def run(self) -> None:
        for folder, resolved in self.cells:
            files.start(folder, resolved)
            files.append_rows(folder / "evaluation.jsonl", files.evaluation_rows(0, 0))
        while not self.ending.wait(STEP_SECONDS):
            begin = time.monotonic()
            for folder, _ in self.cells:
                files.step(folder, self.steps)
            self.steps += 1
            self.worst = max(self.worst, time.monotonic() - begin)
        for folder, _ in self.cells:
            files.finish(folder, self.steps)


def follow(uri: str, study: Path) -> None:
    """The mirror process: follow the files until all runs are done and the store has everything."""
    Mirror.patience = 0.0
    mirror = Mirror(uri, study, "table")
    while len(list(study.glob("cells/*/result.json"))) < len(ARMS):
        mirror.sync()
        time.sleep(0.2)
    while not mirror.close():
        time.sleep(0.2)


def lost_and_doubled(uri: str, twin: dict[str, Any]) -> dict[str, int]:
    """Points that the mirror lacks, and points beyond one of a key and step, against one made in peace."""
    points = lost = doubled = 0
    _, children = files.parent_and_children(uri, "table")
    for name, (expected, params, status) in twin.items():
        run = children[name]
        assert (run.data.params, run.info.status) == (params, status), name
        found = {}
        for key in run.data.metrics:
            history = files.client(uri).get_metric_history(run.info.run_id, key)
            found[key] = [(metric.step, metric.value) for metric in history]
        for key, history in expected.items():
            points += len(history)
            lost += len(set(history) - set(found.get(key, [])))
        doubled += sum(len(history) - len({step for step, _ in history}) for history in found.values())
        assert set(found) == set(expected), name
    assert set(children) == set(twin)
    return {"points": points, "lost": lost, "doubled": doubled}


def main(out: Path, postgres: bool, server_kills: int, mirror_kills: int, seed: int) -> dict[str, Any]:
    chance, study = random.Random(seed), out / "study"
    out.mkdir(parents=True, exist_ok=True)
    with _store(postgres, out) as store, servers.MlflowServer(store, out) as server:
        training = Training(study)
        training.start()
        mirror = _mirror(server.uri, study)
        kills = ["server"] * server_kills + ["mirror"] * mirror_kills
        chance.shuffle(kills)
        begun = time.monotonic()
        for victim in kills:
            # Often enough while it starts, opens the store, sends or waits.
            time.sleep(chance.uniform(0.5, 8.0))
            if victim == "server":
                server.kill()
                time.sleep(chance.uniform(0.0, 3.0))
                server.start()
            else:
                mirror.send_signal(signal.SIGKILL)
                mirror.wait()
                mirror = _mirror(server.uri, study)
        training.ending.set()
        training.join()
        assert mirror.wait() == 0
        seconds = time.monotonic() - begun
        peaceful = f"sqlite:///{out}/twin.db"
        (study / "mlflow_state.json").rename(out / "state.json")
        assert Mirror(peaceful, study, "table").close()
        (out / "state.json").replace(study / "mlflow_state.json")
        twin = files.content(peaceful, "table")
        found = lost_and_doubled(server.uri, twin)
        before = {run.info.run_id for run in files.runs(server.uri, "table")}
        command = ["mirror", "--rebuild", str(study), "--tracking-uri", server.uri]
        code = "from benchmark.cli import main; main()"
        subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.DEVNULL)
        assert not before & {run.info.run_id for run in files.runs(server.uri, "table")}
        rebuilt = lost_and_doubled(server.uri, twin)
    kinds = {"server_kills": server_kills, "mirror_kills": mirror_kills}
    steps = {"steps": training.steps, "worst_step_seconds": round(training.worst, 3), "seconds": round(seconds)}
    return {**kinds, **steps, **found, "rebuilt": rebuilt}


@contextlib.contextmanager
def _store(postgres: bool, out: Path) -> Iterator[str]:
    if not postgres:
        yield f"sqlite:///{out}/server.db"
        return
    binaries = servers.postgres_binaries()
    assert binaries is not None
    with servers.postgres(binaries) as uri:
        yield uri


def _mirror(uri: str, study: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--follow", uri, str(study)], stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    if sys.argv[1] == "--follow":
        follow(sys.argv[2], Path(sys.argv[3]))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--server-kills", type=int, default=2)
    parser.add_argument("--mirror-kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(json.dumps(main(given.out, given.postgres, given.server_kills, given.mirror_kills, given.seed)))
