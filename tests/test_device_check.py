"""The device check on this machine's CPU, with nothing but torch, transformers and numpy to import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "device_check.py"
PACKAGES = ("analysis", "baselines", "benchmark", "methods")
ALLOWED = {*PACKAGES, "device_loop", "device_rates", "numpy", "torch", "transformers"}
# An environment may lie in the checkout as well: only these folders are the suite's.
OWN = tuple(f"{SCRIPT.parent.parent / name}{os.sep}" for name in (*PACKAGES, SCRIPT.parent.name))
# Whatever the suite's own files import beyond the standard library and these is not there; transformers may find it.
ALONE = f"""
import importlib.util, runpy, sys
known = set(sys.stdlib_module_names) | {ALLOWED}

class Missing:
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame.f_code.co_filename.startswith({OWN!r}) and name.split(".")[0] not in known:
            raise ModuleNotFoundError(name)

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "scipy" else found(name, package)
sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_it_runs_with_torch_and_transformers_alone_and_says_that_this_is_a_cpu(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-c", ALONE, str(SCRIPT), "--steps", "8", "--no-compile", "--out", str(table)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    text = table.read_text(encoding="utf-8")
    assert done.stdout == text
    assert "This is a CPU" in text
    rows = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| "))
    assert rows["chunked pass against float64, float32"].startswith("right")
    for arm in ("GRPO", "DynaMO"):
        first, last = map(float, rows[f"{arm}: accuracy, first and last step"].split(", "))
        assert last > first + 0.1
        assert "decode" in rows[f"{arm}: step"]
        assert float(rows[f"{arm}: most memory"].removesuffix(" GB")) > 0.01
    assert rows["decode: CUDA graph, static cache"] == "needs a GPU"
    assert "tokens/s" in rows["decode: transformers, dynamic cache"]
