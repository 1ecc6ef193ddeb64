"""Answers that attack the verifier: none crashes it, holds it up, runs code or is taken for right by a trick."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmark import verifier_pool
from benchmark.verdict import Verdict
from benchmark.verifier import Verifier

sys.path.insert(0, str(Path(__file__).parent))
from hostile import GOLDS, KINDS, boxed, completions

WORKER = Path(verifier_pool.__file__).with_name("verifier_worker.py")
TIMEOUT = 0.5


def attack(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Verify `count` hostile completions with an innocent pair after each batch; verdicts by kind, and the time."""
    mark = folder / "MARK"
    verdicts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    begin = time.monotonic()
    stream = completions(count, seed, str(mark))
    with Verifier(workers=2, timeout_s=TIMEOUT) as made:
        while batch := list(itertools.islice(stream, 250)):
            found = made.verify(
                [*((gold, text) for _, gold, text in batch), ("1/2", boxed("0.5")), ("1/2", boxed("0.6"))]
            )
            assert found[-2:] == [Verdict.CORRECT, Verdict.WRONG]
            made._known.clear()
            for (kind, _, _), verdict in zip(batch, found, strict=False):
                verdicts[kind][verdict.value] += 1
    assert not mark.exists()
    assert list(folder.iterdir()) == []
    seconds = round(time.monotonic() - begin, 1)
    return {"completions": count, "seconds": seconds, "verdicts": {kind: dict(n) for kind, n in verdicts.items()}}


def test_hostile_completions_short(tmp_path: Path) -> None:
    found = attack(110, 0, tmp_path)
    assert sum(sum(each.values()) for each in found["verdicts"].values()) == 110


@pytest.mark.slow
def test_ten_thousand_hostile_completions(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    found = attack(11_000, 1, tmp_path)
    record_property("hostile", found)
    print(json.dumps(found, indent=1))
    assert sum(sum(each.values()) for each in found["verdicts"].values()) == 11_000
    assert set(found["verdicts"]["code injection"]) <= {"wrong", "no_answer", "timeout", "error"}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=1, timeout_s=TIMEOUT) as made:
        yield made


PIECES = st.sampled_from(
    [
        r"\boxed{",
        "}",
        "{",
        r"\frac",
        r"\sqrt",
        "^",
        "_",
        "7",
        "x",
        "=",
        ",",
        r"\text{or}",
        "$",
        "\\",
        "\0",
        "(",
        ")",
        "!",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gold=st.sampled_from(GOLDS),
    text=st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join), st.binary(max_size=40).map(repr)),
)
def test_fuzz(verifier: Verifier, gold: str, text: str) -> None:
    for completion in (text, boxed(text)):
        found = verifier.verify([(gold, completion), ("1/2", boxed("0.5"))])
        assert isinstance(found[0], Verdict)
        assert found[1] is Verdict.CORRECT
        assert found[0] is not Verdict.GOLD_UNPARSABLE


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gold=st.one_of(st.text(max_size=20), st.lists(PIECES, max_size=12).map("".join)))
def test_a_gold_that_cannot_be_read_makes_nothing_correct(verifier: Verifier, gold: str) -> None:
    """If a gold does not even verify itself, no answer to it is correct."""
    answers = ["7", "0", "x", r"\frac{1}{2}", gold.strip(), r"\text{or}", "{}"]
    if verifier.check_golds([gold]):
        assert Verdict.CORRECT not in verifier.verify([(gold, boxed(answer)) for answer in answers])


# --- one response, one answer ---------------------------------------------------------------------------------

SHOPPING = [
    "{a}, {b}",
    "{a}; {b}",
    "{a} or {b}",
    r"{a} \text{{ or }} {b}",
    r"{a} \text{{ (or {b})}}",
    r"{a} \lor {b}",
    r"\text{{either }} {a} \text{{ or }} {b}",
    r"{a} \text{{ if }} x=1, {b} \text{{ otherwise}}",
    "{a} {b}",
    r"{a} \quad {b}",
    "{a}={b}",
    "x={a}, x={b}",
    r"\{{{a},{b}\}}",
    r"[{a},{b}]",
    r"{a} \to {b}",
    r"{a} \approx {b}",
    r"{a} \\ {b}",
    r"{a}|{b}",
    "{a}/{b}",
    r"\begin{{pmatrix}}{a}\\{b}\end{{pmatrix}}",
]


@pytest.mark.parametrize("shape", SHOPPING)
def test_one_response_is_right_for_at_most_one_value(shape: str) -> None:
    with Verifier(timeout_s=20.0) as made:
        text = boxed(shape.format(a=31, b=47))
        found = made.verify([("31", text), ("47", text)])
    assert found.count(Verdict.CORRECT) <= 1
    if "or" in shape or "otherwise" in shape:
        assert found == [Verdict.WRONG, Verdict.WRONG]


def test_only_the_last_box_counts_and_an_open_one_takes_the_answer_away() -> None:
    with Verifier(answer_form="integer") as made:
        texts = [
            r"\boxed{1} \boxed{2}",
            r"\boxed{2} \boxed{1}",
            r"\boxed{2} \boxed{",
            r"\boxed{2} \boxed{}",
            r"\boxed{1, 2}",
        ]
        found = made.verify([("2", text) for text in texts])
    correct, wrong, none = Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER
    assert found == [correct, wrong, none, none, wrong]


# --- the child processes --------------------------------------------------------------------------------------


def test_a_child_cannot_write_start_or_connect(tmp_path: Path) -> None:
    """Were sympy's parser ever to run an answer as code, this is what the code would meet."""
    script = f"""
import runpy, sys, os
module = runpy.run_path({str(WORKER)!r})
module["_confine"]()
for attempt in (
    lambda: open({str(tmp_path / "a")!r}, "w"),
    lambda: os.system("touch {tmp_path / "b"}"),
    lambda: __import__("subprocess").run(["touch", {str(tmp_path / "c")!r}]),
    lambda: __import__("socket").socket(),
    lambda: os.remove({str(WORKER)!r}),
    lambda: os.fork(),
    lambda: os.kill(os.getppid(), 9),
    lambda: os.write(os.open({str(tmp_path / "d")!r}, os.O_CREAT | os.O_WRONLY), b"x"),
):
    try:
        attempt()
    except OSError:
        print("refused")
    else:
        print("allowed")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["refused"] * 8, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pair_whose_child_dies_of_an_earlier_one_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ask, kills = verifier_pool._Worker.ask, []

    def ask_and_kill_once(self: verifier_pool._Worker, gold: str, answer: str) -> None:
        if not kills:
            kills.append(answer)
            self._process.kill()
            self._process.wait()
        ask(self, gold, answer)

    monkeypatch.setattr(verifier_pool._Worker, "ask", ask_and_kill_once)
    with Verifier(timeout_s=20.0) as made:
        assert made.verify([("1/2", boxed("0.5")), ("1/2", boxed("2/4"))]) == [Verdict.CORRECT] * 2
    assert len(kills) == 1


ORPHAN = """
import sys, time
from benchmark.verifier import Verifier
made = Verifier(timeout_s=1.0)
made.verify([("1/2", r"\\\\boxed{0.5}")])
print(made._pool._workers[0]._process.pid, flush=True)
made.verify([("1/2", r"\\\\boxed{9^{9^{9^{9^{9}}}}}")] if sys.argv[1] == "busy" else [])
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_children_of_a_killed_process_end_by_themselves(state: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(WORKER.parent.parent)}
    with subprocess.Popen([sys.executable, "-c", ORPHAN, state], stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
