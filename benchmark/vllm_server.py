"""Start vLLM's own server so that a run elsewhere on this machine or disk can sample from it and renew its weights.

    python -m benchmark.vllm_server MODEL [vLLM options, e.g. --port 8000 --tensor-parallel-size 4]

It is vLLM's OpenAI server with the switches that training needs: development mode (new weights come through
``/collective_rpc``: let nobody else reach the port), full-softmax sampling, log-probabilities after temperature. It
listens on 127.0.0.1 unless ``--host`` names another address, and says where. On a CPU a prompt is never read in parts:
vLLM then winds the request's generator back, which generators of CPUs cannot do, and the engine ends.
"""

from __future__ import annotations

import itertools
import os
import sys

import torch

from benchmark.errors import InputError

SWITCHES = {
    "worker-extension-cls": "benchmark.vllm_worker.PolicyLoader",
    "logprobs-mode": "processed_logprobs",
    "generation-config": "vllm",
    "host": "127.0.0.1",
}


def command(arguments: list[str]) -> list[str]:
    """The command of the server for MODEL and options; an option given by the user goes first.

    Raises:
        InputError: no model is named.
    """
    if not arguments or arguments[0].startswith("-"):
        raise InputError("no model", key="MODEL", remedy="python -m benchmark.vllm_server MODEL [vLLM options]")
    given = {argument.removeprefix("--").partition("=")[0] for argument in arguments}
    extra = [part for name, value in SWITCHES.items() if name not in given for part in (f"--{name}", value)]
    if not torch.accelerator.is_available() and "enable-chunked-prefill" not in given:
        extra.append("--no-enable-chunked-prefill")
    # Not the `vllm` command: it asks for a distribution of that name, which the CPU build does not have.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *arguments, *extra]


def main() -> None:
    """Become the server."""
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    try:
        line = command(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
    given = [value for name, value in itertools.pairwise(line) if name == "--host"]
    print(f"vLLM is to listen on {given[0] if given else 'the address of --host'}", flush=True)
    os.execv(line[0], line)


if __name__ == "__main__":
    main()
