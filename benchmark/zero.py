"""What a launcher asks of DeepSpeed: gradients and moments divided among the processes of a run (ZeRO, stages 1 and 2).

``accelerate launch --use_deepspeed --zero_stage 2`` asks for it. Each of N processes holds all weights, 1 / N of
AdamW's moments beside a copy of the weights that they move, and at stage 2 1 / N of the gradients (Rajbhandari et al.,
arXiv 1910.02054). Of DeepSpeed's options only the stage counts: precision, clipping and learning rate are the run's.
`benchmark.optimiser` carries it out; `benchmark.sharding` divides the weights as well.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from benchmark.errors import InputError
from benchmark.installing import install_line

ASKED = "ACCELERATE_USE_DEEPSPEED"
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
OFFLOADS = ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE")
OTHER_STAGES = {
    "0": "Launch with --multi_gpu, which divides nothing",
    "3": "Launch with --use_fsdp instead of --use_deepspeed: it divides weights, gradients and moments",
}


def wanted() -> bool:
    """Whether the launcher asked for DeepSpeed and there is more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get(ASKED, "false").lower() == "true"


def stage() -> str:
    """The stage asked for, as the launcher writes it."""
    return os.environ.get(STAGE, "2")


def check() -> None:
    """Refuse what the launcher cannot have, before processes meet.

    Raises:
        InputError: DeepSpeed is missing, or was asked for something else than dividing gradients and moments.
    """
    if not wanted():
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError("it needs the package deepspeed", key=ASKED, value="true", remedy=install_line("deepspeed"))
    if path := os.environ.get(FILE, ""):
        remedy = "Launch with --zero_stage instead"
        raise InputError("a run writes DeepSpeed's configuration itself", key=FILE, value=path, remedy=remedy)
    if stage() not in ("1", "2"):
        remedy = OTHER_STAGES.get(stage(), "Launch with --zero_stage 1 or 2")
        raise InputError("a run divides by ZeRO's stages 1 and 2", key=STAGE, value=stage(), remedy=remedy)
    for name in OFFLOADS:
        if (device := os.environ.get(name, "none").lower()) != "none":
            remedy = "Launch without offloading"
            raise InputError("gradients and moments stay on the GPUs", key=name, value=device, remedy=remedy)
    tools = () if torch.cuda.is_available() else ("ninja", os.environ.get("CXX", "c++"))
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        what = f"on CPUs DeepSpeed compiles an operation, and there is no {' or '.join(missing)} on the PATH"
        remedy = "Install ninja and a C++ compiler, or leave DeepSpeed out"
        raise InputError(what, key=ASKED, value="true", remedy=remedy)
