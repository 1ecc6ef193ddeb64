"""Configuration files, data files and arguments with every kind of fault: one line that names it, nothing written.

Each fuzz has a short form and a long one (`nox -s tests_slow`).
"""

from __future__ import annotations

import copy
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from analysis.replay_log import load_counts
from benchmark.cli import app
from benchmark.compose import compose_run, compose_study, config_folder
from benchmark.errors import InputError
from benchmark.problems import load_jsonl
from benchmark.sweep_space import read_sweep
from benchmark.verifier import Verifier

FORMS = [pytest.param(80, id="short"), pytest.param(600, id="long", marks=pytest.mark.slow)]

HOSTILE: list[Any] = [None, True, -1, 0, 1, 3, 10**30, 0.5, -0.5, 1e308, float("inf"), float("nan"), "", " ", "grpo"]
HOSTILE += ["../../up", "a\nb", "é\u202e", "x" * 500, "1e-3", [], [1], [1, "a"], [[[]]], {}, {"a": 1}, {"name": 3}]
HOSTILE += [{"": {}}, "${x}", "!!python/object:x", "*a", "{", "- - -", "12:30", "2026-01-02", "0x10"]


def fuzz(examples: int, strategy: st.SearchStrategy[Any], body: Callable[[Any], None]) -> None:
    """Run `body` on `examples` values, the same ones every time."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    run = settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=checks)
    run(given(strategy)(body))()


def accepted(call: Callable[[], object], file: Path | None = None) -> bool:
    """Whether `call` takes its input; what it refuses, it refuses with an InputError of one line and a remedy."""
    refusal: InputError | None = None
    try:
        call()
    except InputError as error:
        refusal = error
    if refusal is None:
        return True
    said = str(refusal)
    assert "\n" not in said
    assert refusal.remedy
    assert refusal.file is not None or refusal.key is not None, said
    if file is not None and str(refusal.file) == str(file) and file.suffix == ".jsonl":
        assert refusal.line is not None or any(word in said for word in ("UTF-8", "no problems", "prompt")), said
    return False


# --- configuration files ------------------------------------------------------------------------------------------


def paths(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of mappings and lists."""
    if at:
        yield at
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths(value, (*at, key))


def spoiled(tree: Any, seed: int) -> Any:
    """`tree` with one to three faults: a value of another kind, a key that is wrong, missing, new or written twice."""
    rng = random.Random(seed)
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        places = list(paths(tree))
        if not places:
            break
        *parents, last = rng.choice(places)
        node = tree
        for part in parents:
            node = node[part]
        fault = rng.choice(["value", "value", "value", "rename", "drop", "add", "double"])
        if fault == "drop":
            del node[last]
        elif fault == "value" or isinstance(node, list):
            node[last] = copy.deepcopy(rng.choice(HOSTILE))
        elif fault == "rename":
            node[f"{last}{rng.choice(['s', '_', '.x', ' '])}"] = node.pop(last)
        else:
            node[rng.choice(["unknown", last, f"{last}.{last}"])] = copy.deepcopy(rng.choice(HOSTILE))
    return tree


def scrambled(data: bytes, seed: int) -> bytes:
    """`data` with bytes changed, cut out, doubled or put in, or in another encoding."""
    rng = random.Random(seed)
    if rng.random() < 0.15:
        return data.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "cp037"]))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        new = rng.choice(
            [b"", b"\xff", b"\x00", b":", b"\t", b"&a ", b"*a", b"[", b"{", b'"', b"!!python/name:os ", b"-"]
        )
        data = data[:at] + new + data[at + rng.randint(0, 5) :]
    return data


def shipped(kind: str, name: str) -> dict[str, Any]:
    return cast(dict[str, Any], yaml.safe_load((config_folder() / kind / f"{name}.yaml").read_text(encoding="utf-8")))


def small_study() -> dict[str, Any]:
    tree = shipped("studies", "main_table")
    tree["arms"] = [arm for arm in tree["arms"] if (arm if isinstance(arm, str) else arm["name"]) in ("grpo", "dynamo")]
    tree["claims"] = [c for c in tree["claims"] if {c["arm"], c["reference"]} <= {"grpo", "dynamo"}]
    return tree


def run_file() -> dict[str, Any]:
    return {
        "scale": "smoke",
        "method": {"name": "dynamo", "params": {"allocation": {"n_low": 2}}},
        "budget": {"amount": 9000},
    }


CONFIGS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[Path], object]]] = {
    "study": (small_study, lambda path: compose_study(str(path))),
    "scale": (lambda: shipped("scales", "small"), lambda path: compose_run("dynamo", scale=str(path))),
    "task": (lambda: shipped("tasks", "arithmetic"), lambda path: compose_run("grpo", task=str(path))),
    "sweep": (lambda: shipped("sweeps", "modulation"), read_sweep),
    "run": (run_file, lambda path: compose_run(None, file=path)),
}


@pytest.mark.parametrize("examples", FORMS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_spoiled_configuration_is_refused_with_its_place_or_fine(kind: str, examples: int, tmp_path: Path) -> None:
    make, read = CONFIGS[kind]
    tree, path = make(), tmp_path / "spoiled.yaml"
    seen: list[bool] = []

    def body(seed: int) -> None:
        path.write_text(yaml.safe_dump(spoiled(tree, seed), allow_unicode=True), encoding="utf-8")
        seen.append(accepted(lambda: read(path)))

    fuzz(examples, st.integers(0, 2**32), body)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert accepted(lambda: read(path))  # it is the faults that are refused
    assert seen.count(False) > len(seen) / 4


@pytest.mark.parametrize("examples", FORMS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_scrambled_configuration_is_refused_or_fine(kind: str, examples: int, tmp_path: Path) -> None:
    make, read = CONFIGS[kind]
    data, path = yaml.safe_dump(make()).encode(), tmp_path / "scrambled.yaml"

    def body(seed: int) -> None:
        path.write_bytes(scrambled(data, seed))
        accepted(lambda: read(path))

    fuzz(examples, st.integers(0, 2**32), body)


KEYS = ["rollout.temperature", "budget.amount", "evaluation.k", "task.mix", "policy.path", "method.allocation.n_low"]
KEYS += [
    "method.params",
    "optimiser.betas",
    "task.eval_files",
    "backend.vllm",
    "policy.lora.rank",
    "method",
    "",
    ".",
    "a.b",
]


@pytest.mark.parametrize("examples", FORMS)
def test_any_option_is_refused_or_fine(examples: int) -> None:
    values = st.one_of(st.sampled_from([json.dumps(value) for value in HOSTILE]), st.text(max_size=30))
    keys = st.one_of(st.sampled_from(KEYS), st.text(max_size=12))

    def body(given: list[str]) -> None:
        accepted(lambda: compose_run("dynamo", options=given))

    fuzz(examples, st.lists(st.builds("{}={}".format, keys, values), min_size=1, max_size=3), body)


# --- data files ---------------------------------------------------------------------------------------------------


class Trusting:
    """In the verifier's place, whose own fuzz tests are elsewhere: takes every answer."""

    answer_form = "any"

    def check_golds(self, golds: list[str]) -> list[int]:
        return []


ROWS = [{"id": f"set/{i}", "problem": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(6)]
VISITS = [{"id": f"set/{i}", "n_rollouts": 8, "correct": [i, 3, 5]} for i in range(6)]
DATA: dict[str, tuple[list[dict[str, Any]], Callable[[Path], object]]] = {
    "problems": (ROWS, lambda path: load_jsonl(path, "set", cast(Verifier, Trusting()))),
    "counts": (VISITS, load_counts),
}


@pytest.mark.parametrize("examples", FORMS)
@pytest.mark.parametrize("kind", DATA)
def test_a_spoiled_data_file_is_refused_with_its_line_or_fine(kind: str, examples: int, tmp_path: Path) -> None:
    rows, read = DATA[kind]
    path = tmp_path / "data.jsonl"

    def body(seed: int) -> None:
        rng = random.Random(seed)
        lines = [json.dumps(row, ensure_ascii=False) for row in spoiled(rows, seed)]
        for _ in range(rng.randint(0, 2)):
            lines.insert(
                rng.randrange(len(lines) + 1), rng.choice([*lines, "", "{", "[1]", "null", '{"id": 1}', "[" * 9999])
            )
        data = "\n".join([] if rng.random() < 0.02 else lines).encode("utf-8", "surrogatepass")
        path.write_bytes(scrambled(data, seed) if rng.random() < 0.4 else data)
        accepted(lambda: read(path), path)

    fuzz(examples, st.integers(0, 2**32), body)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert accepted(lambda: read(path))


# --- arguments ----------------------------------------------------------------------------------------------------

COMMANDS: dict[str, list[str]] = {
    "run": ["--out", "--scale", "--task", "--seed", "--budget", "--set", "--config"],
    "study": ["--scale", "--seeds", "--workers", "--budget", "--set", "--out"],
    "sweep": ["--trials", "--out", "--workers", "--storage"],
    "report": ["--readme"],
    "audit": ["--json"],
    "status": ["--watch", "--json"],
    "compare": ["--results", "--metric", "--json"],
    "replay": ["--json", "--out", "--arm", "--budget"],
    "replay-batch": [],
    "mirror": ["--rebuild", "--tracking-uri"],
    "check": ["--json"],
    "warmup": ["--scale", "--task", "--set"],
    "variance": ["--scale", "--seed", "--arm", "--fraction", "--rollouts", "--blocks", "--budget", "--set"],
    "figures": ["--notebook", "--source", "--set"],
}
WORDS = [
    "absent",
    "absent.yaml",
    "..",
    "",
    " ",
    "-1",
    "0",
    "1e9",
    "nan",
    "a=b",
    "=",
    "x:y",
    "a:b:c",
    "\x1b[2J",
    "é",
    "--",
    "-",
]
WORDS += [
    "grppo",
    "smoek",
    "pass_at_0",
    "tokens_generated=-5",
    "rollouts=1.5",
    "k=[",
    "http://",
    "\n",
    "a" * 300,
    "*",
    "~",
]


@contextmanager
def empty_folder() -> Iterator[Path]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


@pytest.mark.parametrize(
    "examples", [pytest.param(25, id="short"), pytest.param(150, id="long", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_any_argument_is_refused_in_words_and_leaves_nothing_behind(
    command: str, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line of arguments has at least one fault, since no results and no such files are there."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = st.one_of(st.sampled_from(WORDS), st.text(max_size=12))
    options = st.tuples(st.sampled_from([*COMMANDS[command], "--unknown"]), words)
    bad = {"warmup": ["--scale", "absent"], "variance": ["--scale", "absent"]}.get(command, [])

    def body(drawn: tuple[list[str], list[tuple[str, str]]]) -> None:
        arguments = [command, *bad, *drawn[0], *(part for option in drawn[1] for part in option)]
        if "--help" in arguments:
            return
        with empty_folder() as folder:
            result = CliRunner().invoke(app, arguments)
            assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
            assert result.exit_code == 2, (arguments, result.output)
            assert "Traceback" not in result.output
            assert result.stderr
            assert list(folder.iterdir()) == [], arguments

    fuzz(examples, st.tuples(st.lists(words, min_size=1, max_size=2), st.lists(options, max_size=3)), body)
