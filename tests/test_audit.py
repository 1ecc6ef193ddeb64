"""The audit of a results folder: it agrees as it was written, and a byte changed in any file is found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from analysis import plotting
from analysis.audit import audit
from analysis.report import write_report
from benchmark.cells import Cell
from benchmark.cli import app
from benchmark.compose import Plan, compose_study
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_json, dumps, read_rows
from benchmark.ledger import link
from benchmark.progress import Display
from benchmark.seal import MANIFEST, file_hash, sealed
from benchmark.study import plan_record, run_single
from benchmark.warmup import warm_up

STUDY = """\
study: audited
question: Does the audit see it?
scale: smoke
task: {task}
arms: [grpo, dapo, gvm]
seeds: [0]
overrides:
  policy: {{path: {policy}}}
  task: {{train_items: 24, eval_items_per_family: 4}}
  rollout: {{prompts_per_batch: 8, rollouts_per_prompt: 8, max_tokens: 12}}
  optimiser: {{learning_rate: 0.003, minibatches_per_batch: 2}}
  budget: {{currency: tokens_generated, amount: 1801}}
  evaluation: {{points: 2, samples: 2, final_samples: 4, k: [1]}}
"""
TASK = "task: {name: sums, mix: [{family: chain_sum, num_terms: [2, 2], num_digits: [1, 1]}]}"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real study of three small runs, as `rolloutbench study` leaves it, the mirror's state included."""
    folder = tmp_path_factory.mktemp("audited")
    (folder / "sums.yaml").write_text(TASK)
    (folder / "study.yaml").write_text(STUDY.format(task=folder / "sums.yaml", policy=folder / "policy"))
    plan: Plan = compose_study(str(folder / "study.yaml"), seeds=1)
    small = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 64}
    changes = {"path": None, "architecture": small, "warmup": {"steps": 150, "batch": 64}}
    first = plan.runs[0].model_dump(mode="json")
    made, _ = warm_up(type(plan.runs[0]).model_validate(first | {"policy": changes}), lambda *_: None)
    made.save(folder / "policy")
    out = folder / "results"
    cells = [Cell.of(out, config) for config in plan.runs]
    atomic_write_json(out / "plan.json", plan_record(plan, cells))
    for cell in cells:
        run_single(cell.config, cell.folder, display=Display())
        (cell.folder / "run.log").write_text("a warning of some library\n")
    (out / "workers.log").write_text("started\n")
    atomic_write_json(out / "mlflow_state.json", sealed({"store": "x", "key": "y", "cells": {}}))
    (out / ".mlflow_state.lock").touch()
    write_report(out)
    return out


@pytest.fixture
def study(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "study"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_folder_as_it_was_written_agrees_and_stays_as_it_is(original: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, file_hash(path)) for path in files_of(original)}
    found = CliRunner().invoke(app, ["audit", str(original)])
    assert found.exit_code == 0, found.output
    assert found.stdout.splitlines()[-1] == "agrees"
    assert before == {path: (path.stat().st_mtime_ns, file_hash(path)) for path in files_of(original)}
    done = audit(original)
    assert done.wrong == []
    assert any(line.startswith("3 runs: ") for line in done.checked)
    assert any("tables and" in line and "made again from the records" in line for line in done.checked)
    assert any("commit" in line for line in done.checked + done.lacks)


def test_a_single_run_agrees(original: Path) -> None:
    for run in sorted((original / "cells").iterdir()):
        # What a worker prints goes on until it ends; the study's manifest has its hash.
        assert audit(run).wrong == ["run.log: is not listed in result.json"]


def test_one_changed_byte_in_any_file_is_found(
    study: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """In every file, at its begin, middle and end; a file of no bytes gets one."""
    monkeypatch.setattr("analysis.audit._check_report", lambda *_: None)
    missed, count = [], 0
    for path in files_of(study):
        data = path.read_bytes()
        for place in sorted({0, len(data) // 2, len(data) - 1}) if data else [0]:
            byte = bytes([data[place] ^ 1]) if data else b" "
            path.write_bytes(data[:place] + byte + data[place + 1 :])
            count += 1
            if not any(path.name in line or path.parent.name in line for line in audit(study).wrong):
                missed.append((str(path.relative_to(study)), place))
        path.write_bytes(data)
    record_property("mutations", {"files": len(files_of(study)), "bytes": count, "missed": len(missed)})
    print(json.dumps({"files": len(files_of(study)), "bytes": count, "missed": len(missed)}))
    assert missed == []
    assert count > 2 * len(files_of(study))
    assert audit(study).wrong == []


def test_a_file_that_is_gone_or_came_is_found(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.audit._check_report", lambda *_: None)
    for path in files_of(study):
        if path.parent.name == "lease" or path.name.startswith((".mlflow", "mlflow")):
            continue  # who ran a cell, and how far the mirror is: no results
        kept = path.rename(study.parent / "kept")
        assert audit(study).wrong, path
        kept.rename(path)
    for name in ("notes.txt", "cells/notes.txt", "tables/extra.csv", ".progress.json.0-1-x.partial"):
        (study / name).write_text("x")
        assert any(name in line for line in audit(study).wrong), name
        (study / name).unlink()


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("listed", [True, False])
def test_a_run_in_the_folder_of_a_study_itself_is_named(study: Path, ended: bool, listed: bool) -> None:
    """Whether it ended or not, and also where a report has listed its files since."""
    run = next((study / "cells").glob("grpo-*"))
    left = [path for path in sorted(run.iterdir()) if ended or path.name != "result.json"]
    for path in left:
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, study / path.name)
    if listed:
        write_report(study)
    told = "is of a run, and a study's runs lie in cells/; move it away"
    found = audit(study)
    assert sorted(found.wrong) == sorted(f"{path.name}: {told}" for path in left)
    assert any(line.startswith("3 runs: ") for line in found.checked)


# --- what hashes that were made anew cannot hide ------------------------------------------------------------------


def reseal(study: Path) -> None:
    """What somebody does who knows of the hashes: all of them, but not the chain, are made anew."""
    for path in sorted(study.rglob("result.json")):
        value = json.loads(path.read_text())
        value["files"] = {name: file_hash(path.parent / name) for name in value["files"]}
        atomic_write_json(path, sealed(value))
    manifest = json.loads((study / MANIFEST).read_text())
    manifest["files"] = {name: file_hash(study / name) for name in manifest["files"]}
    atomic_write_json(study / MANIFEST, sealed(manifest))


def change_rows(path: Path, change: Callable[[list[dict[str, Any]]], object], chain: bool = False) -> None:
    rows = [dict(row) for row in read_rows(path)[0]]
    change(rows)
    head = ""
    for row in rows if chain else []:
        row.pop("hash")
        head = row["hash"] = link(head, row)
    path.write_text("".join(dumps(row) + "\n" for row in rows))


FORGERIES: dict[str, tuple[str, Callable[[list[dict[str, Any]]], object], bool, str]] = {
    "a row of the ledger changed": ("ledger.jsonl", lambda r: r[3].update(flops=1), False, "breaks the hash chain"),
    "a row of the ledger gone": ("ledger.jsonl", lambda r: r.pop(2), False, "breaks the hash chain"),
    "two rows swapped": ("ledger.jsonl", lambda r: r.insert(1, r.pop(2)), False, "breaks the hash chain"),
    "cheaper, chained anew": ("ledger.jsonl", lambda r: r[-2].update(flops=1), True, "add up to"),
    "a rollout without a fate": ("ledger.jsonl", lambda r: r[1].update(fate=None), True, "drawn"),
    "one more right answer": ("evaluation.jsonl", lambda r: r[-1].update(c=r[-1]["c"] + 1), False, "not to c"),
    "fewer samples": ("evaluation.jsonl", lambda r: r.pop(), False, "add up to"),
    "a step less": ("metrics.jsonl", lambda r: r.pop(), False, "does not hold the steps"),
    "another cost": ("metrics.jsonl", lambda r: r[0]["cost"].update(flops=7), False, "is not the ledger's"),
    "another allocation": ("allocation.jsonl", lambda r: r[0].update(histogram={"8": 7}), False, "gave 56 rollouts"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_accounts_that_do_not_add_up_are_found_though_all_hashes_fit(
    study: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("analysis.audit._check_report", lambda *_: None)
    name, change, chain, said = FORGERIES[case]
    cell = next((study / "cells").glob("grpo-*"))
    change_rows(cell / name, change, chain)
    reseal(study)
    wrong = audit(study).wrong
    assert any(said in line and cell.name in line for line in wrong), wrong
    assert not any("its bytes changed" in line or "does not have the hash that it states" in line for line in wrong)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("overshoot", 5, "overshoot = 5"),
        ("arm", "rloo", "arm is not the configuration's"),
        ("run_hash", "0" * 64, "does not have the run_hash"),
        ("data", {"train": "0", "evaluation": "0"}, "made again, are others"),
        ("planned", {"tokens_generated": 9}, "not the configuration's budget"),
    ],
)
def test_a_result_that_tells_something_else_is_found(
    study: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, said: str
) -> None:
    monkeypatch.setattr("analysis.audit._check_report", lambda *_: None)
    path = next((study / "cells").glob("dapo-*")) / "result.json"
    atomic_write_json(path, json.loads(path.read_text()) | {key: value})
    reseal(study)
    assert any(said in line for line in audit(study).wrong)


def test_a_table_and_a_figure_that_the_records_do_not_give_are_found(study: Path) -> None:
    changes = {"tables/main_table.csv": ("grpo", "dapo"), "figures/final_accuracy.svg": ("<g", "<g ")}
    for name, (old, new) in changes.items():
        (study / name).write_text((study / name).read_text().replace(old, new, 1))
    reseal(study)
    wrong = audit(study).wrong
    told = "is not what the records give; `rolloutbench report` makes it anew"
    assert sorted(wrong) == sorted(f"{name}: {told}" for name in changes)


def test_numbers_are_compared_even_with_a_report_of_other_code(study: Path) -> None:
    manifest = json.loads((study / MANIFEST).read_text())
    manifest["code"]["source_sha256"] = "0" * 64
    (study / "REPORT.md").write_text("in other words")
    table = study / "tables" / "main_table.csv"
    table.write_text(table.read_text().replace("grpo", "dapo", 1))
    atomic_write_json(study / MANIFEST, manifest)
    reseal(study)
    found = audit(study)
    assert [line.partition(":")[0] for line in found.wrong] == ["tables/main_table.csv"]
    assert any("written by other code" in line for line in found.lacks)


# --- older folders, and folders that are none ---------------------------------------------------------------------


def make_old(study: Path) -> None:
    """As a version without chains, seals and manifests left it."""
    (study / MANIFEST).unlink()
    for path in sorted(study.rglob("result.json")):
        value = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("files", "data", "code", "sha256")}
        atomic_write_json(path, value)
        change_rows(path.parent / "ledger.jsonl", lambda rows: [row.pop("hash") for row in rows])
    for lease in study.rglob("lease/*"):
        if lease.name.isdecimal():
            holder = json.loads(lease.read_text())
            holder.pop("sha256")
            lease.write_text(json.dumps(holder))


def test_results_of_an_older_version_are_read_and_what_they_lack_is_named(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_old(study)
    monkeypatch.setattr(plotting, "FORMATS", ("svg",))
    found = audit(study)
    assert found.wrong == []
    lacks = "\n".join(found.lacks)
    for what in ("no hashes of files", "no hash chain", "no hash of the problems", "no state of the code"):
        assert what in lacks
    cell = next((study / "cells").glob("grpo-*"))
    change_rows(cell / "ledger.jsonl", lambda rows: rows[1].update(rollouts=1))
    assert any("add up to" in line for line in audit(study).wrong)
    write_report(study)
    assert (study / MANIFEST).exists()


def test_what_is_unfinished_is_named_and_a_missing_manifest_is_wrong(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.audit._check_report", lambda *_: None)
    (study / MANIFEST).rename(study.parent / MANIFEST)
    assert any(line.startswith("manifest.json: is missing") for line in audit(study).wrong)
    (study.parent / MANIFEST).rename(study / MANIFEST)
    new = study / "cells" / "rloo-s0-01234567"
    new.mkdir()
    (new / "config.yaml").write_text("study: audited\n")
    found = audit(study)
    assert found.wrong == []
    assert any("1 run not finished: cells/rloo-s0-01234567" in line for line in found.lacks)


def test_folders_without_results_are_bad_input(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        result = CliRunner().invoke(app, ["audit", str(place)])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1


def test_a_folder_that_leads_elsewhere_is_not_opened(study: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of somebody")
    (study / "tables" / "secret.csv").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="is a link to"):
        audit(study)
    (study / "tables" / "secret.csv").unlink()
    os.mkfifo(study / "pipe")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        audit(study)
