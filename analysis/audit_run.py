"""Verification of one finished run: the chain of its ledger, its accounts, and the hashes of its configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from analysis.results import read_json
from benchmark.config import TaskConfig, canonical, identity
from benchmark.errors import InputError
from benchmark.jsonl import Row, dumps, read_rows
from benchmark.ledger import CURRENCIES, FATES, link
from benchmark.opening import stored_config
from benchmark.schema import digest
from benchmark.seal import CONFIG, RESULT

LEDGER = "ledger.jsonl"
MOST_PROBLEMS = 200_000
"""Problems of a task beyond which they are not made again: a folder must not keep its reader busy for ever."""
Wrong = Iterator[tuple[str, str]]


@dataclass
class RunFindings:
    """What was found in a run's folder.

    Attributes:
        wrong: file and what does not agree in it. lacks: what the run did not record.
        rows: of the ledger. data: hash of the problems by hash of the task. code: what made the run.
    """

    wrong: list[tuple[str, str]] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    rows: int = 0
    data: dict[str, str] = field(default_factory=dict)
    code: list[str] = field(default_factory=list)


def check_run(folder: Path) -> RunFindings:
    """Check a folder with a ``result.json`` that can be read; damage of other files is a finding, no exception."""
    found = RunFindings()
    try:
        result = read_json(folder / RESULT) or {}
        config = stored_config(folder / CONFIG)
        for name in (LEDGER, "evaluation.jsonl", "metrics.jsonl", "allocation.jsonl"):
            if not (folder / name).is_file():
                found.wrong.append((name, "is missing"))
                return found
        rows = read_rows(folder / LEDGER)[0]
        found.rows = len(rows)
        found.wrong += _chain(folder / LEDGER, rows, found)
        found.wrong += _accounts(rows, result)
        found.wrong += _evaluation(rows, read_rows(folder / "evaluation.jsonl")[0], result)
        found.wrong += _training(rows, folder, result)
        found.wrong += _hashes(config, result)
        _provenance(config, result, found)
    except InputError as error:
        found.wrong.append((Path(error.file or folder).name, str(error)))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        found.wrong.append((RESULT, f"a record of the run lacks what it should hold ({type(error).__name__}: {error})"))
    return found


def _chain(path: Path, rows: list[Row], found: RunFindings) -> Wrong:
    """Every row's hash covers it and the one before; its bytes are the canonical ones."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        yield LEDGER, "its last line is torn"
    if not any("hash" in row for row in rows):
        found.lacks.append("no hash chain in the ledger (made before there was one)")
        return
    head = ""
    for number, (row, line) in enumerate(zip(rows, data.split(b"\n"), strict=False)):
        plain = {key: value for key, value in row.items() if key != "hash"}
        head = link(head, plain)
        if row.get("hash") != head or row.get("row") != number or dumps(row).encode() != line:
            yield LEDGER, f"line {number + 1} breaks the hash chain"
            return


def _accounts(rows: list[Row], result: Mapping[str, Any]) -> Wrong:
    """Sums of rows equal the totals; drawn = trained + filtered + overflow + failed + probed = charged."""
    charged = [row for row in rows if row["event"] not in ("evaluation", "oracle")]
    spent = {name: sum(row[name] for row in charged) for name in CURRENCIES}
    for name, amount in spent.items():
        if result["spent"][name] != amount:
            yield RESULT, f"spent.{name} = {result['spent'][name]}, but the ledger's rows add up to {amount}"
    fates: Counter[str] = Counter()
    for row in rows:
        if row["fate"] is not None:
            fates[row["fate"]] += row["rollouts"]
    if unknown := set(fates) - set(FATES):
        yield LEDGER, f"no such fate: {', '.join(sorted(unknown))}"
    if {fate: result["drawn"].get(fate, 0) for fate in FATES} != {fate: fates[fate] for fate in FATES}:
        yield RESULT, f"drawn = {result['drawn']}, but the ledger has {dict(fates)}"
    if fates.total() != spent["rollouts"]:
        yield LEDGER, f"{spent['rollouts']} rollouts were charged, but their fates add up to {fates.total()}"
    oracle = {name: sum(row[name] for row in rows if row["event"] == "oracle") for name in CURRENCIES}
    if "oracle" in result and result["oracle"] != oracle:
        yield RESULT, "oracle is not the sum of the ledger's oracle rows"
    currency, planned = next(iter(result["planned"].items()))
    if spent[currency] - planned != result["overshoot"]:
        yield RESULT, f"overshoot = {result['overshoot']}, but {spent[currency]} of {planned} {currency} were spent"


def _evaluation(rows: list[Row], evaluated: list[Row], result: Mapping[str, Any]) -> Wrong:
    """Samples, verdicts and tokens of the evaluations are those that the ledger was charged for."""
    file = "evaluation.jsonl"
    ledger = [row for row in rows if row["event"] == "evaluation"]
    for name, key in (("rollouts", "n"), ("tokens_generated", "tokens")):
        wanted, there = sum(row[name] for row in ledger), sum(row[key] for row in evaluated)
        if wanted != there:
            yield file, f"its {key} add up to {there}, but the ledger has {wanted} {name} of evaluation"
    if result.get("evaluation_tokens") != sum(row["tokens_generated"] for row in ledger):
        yield RESULT, "evaluation_tokens is not the sum of the ledger's evaluation rows"
    for number, row in enumerate(evaluated, 1):
        verdicts = row["verdicts"]
        if sum(verdicts.values()) != row["n"] or verdicts.get("correct", 0) != row["c"]:
            yield file, f"line {number}: the verdicts do not add up to n, or not to c"
            return
    if evaluated and evaluated[-1]["cost"] != {name: result["spent"][name] for name in CURRENCIES}:
        yield file, "the final evaluation's cost is not what the run spent"


def _training(rows: list[Row], folder: Path, result: Mapping[str, Any]) -> Wrong:
    """One row of metrics and of allocation a step; costs are the ledger's at that moment; rollouts add up."""
    metrics, allocation = (read_rows(folder / name)[0] for name in ("metrics.jsonl", "allocation.jsonl"))
    for name, found in (("metrics.jsonl", metrics), ("allocation.jsonl", allocation)):
        if [row["step"] for row in found] != list(range(result["steps"])):
            yield name, f"does not hold the steps 0 to {result['steps'] - 1} once each"
            return
    spent, position = dict.fromkeys(CURRENCIES, 0), 0
    charged = [row for row in rows if row["event"] not in ("evaluation", "oracle")]
    for row, allocated in zip(metrics, allocation, strict=True):
        before = spent["rollouts"]
        probed = 0
        while position < len(charged) and charged[position]["step"] <= row["step"]:
            for name in CURRENCIES:
                spent[name] += charged[position][name]
            probed += charged[position]["rollouts"] * (charged[position]["fate"] == "probed")
            position += 1
        if row["cost"] != spent:
            yield "metrics.jsonl", f"the cost of step {row['step']} is not the ledger's"
            return
        given = sum(int(n) * prompts for n, prompts in allocated["histogram"].items())
        if given != spent["rollouts"] - before - probed:
            yield "allocation.jsonl", f"step {row['step']} gave {given} rollouts, the ledger has another number"
            return


def _hashes(config: Mapping[str, Any], result: Mapping[str, Any]) -> Wrong:
    """The configuration as stored has the hashes by which the run goes, and names the same run as its result."""
    seedless = {key: value for key, value in config.items() if key != "seed"}
    for key, value in (("run_hash", identity(config)), ("plan_hash", identity(seedless))):
        if result.get(key) != value:
            yield CONFIG, f"does not have the {key} of {RESULT}"
    for key in ("study", "arm", "seed", "scale"):
        if result.get(key) != config.get(key):
            yield RESULT, f"{key} is not the configuration's"
    if result["planned"] != {config["budget"]["currency"]: config["budget"]["amount"]}:
        yield RESULT, "planned is not the configuration's budget"


def _provenance(config: Mapping[str, Any], result: Mapping[str, Any], found: RunFindings) -> None:
    if "data" in result:
        found.data[digest(config["task"])] = digest(result["data"])
        again = _problems(canonical(config["task"]))
        if again is None:
            found.lacks.append("its problems were not made again: they are read from files, too many, or of old kinds")
        elif again != result["data"]:
            found.wrong.append((RESULT, "data: the task's problems, made again, are others"))
    else:
        found.lacks.append("no hash of the problems (made before there was one)")
    for code in result.get("code", []):
        if code["commit"] is None:
            found.lacks.append(f"no commit of the code: {code['git']}; its files: {code['source_sha256'][:12]}")
        else:
            state = ", with uncommitted changes" if code["dirty"] else ""
            found.code.append(f"made with commit {code['commit'][:12]}{state}, files {code['source_sha256'][:12]}")
    if len(result.get("code", [])) > 1:
        found.lacks.append("the code changed while the run was interrupted")
    if "code" not in result:
        found.lacks.append("no state of the code (made before it was recorded)")


@lru_cache(maxsize=16)
def _problems(task: str) -> dict[str, str] | None:
    """Hashes of the problems of a generated task; None for files, which a stranger's configuration may name freely."""
    from benchmark.problems import digest as problem_hash
    from benchmark.problems import load_task  # torch

    try:
        config = TaskConfig.model_validate_json(task)
    except ValidationError:
        return None
    count = config.train_items + config.eval_items_per_family * len(config.mix)
    if config.train_file is not None or count > MOST_PROBLEMS:
        return None
    train, evaluation = load_task(config)
    return {"train": problem_hash(train), "evaluation": problem_hash(evaluation)}
