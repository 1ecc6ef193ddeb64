"""Runs inside vLLM's workers (``worker_extension_cls``): takes over the policy's weights from a file.

A file serves an engine in this process, one spread over GPUs, and a server alike. vLLM's own ``reload_weights`` leaves
a tied output head stale; its CPU backend packs matrices when it loads them, after which none can be replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

SHOWN = 300  # letters of an error of vLLM, which may list every parameter


def _keep_matrices() -> None:
    """Let vLLM's CPU backend multiply by the weights themselves, so that new ones can be put in their place."""
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    def plain(layer: Any, remove_weight: bool = False) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    if current_platform.is_cpu():
        utils.dispatch_cpu_unquantized_gemm = plain


_keep_matrices()


class PolicyLoader:
    """Methods that vLLM adds to its workers."""

    model_runner: Any

    def load_policy(self, file: str) -> str:
        """Replace the weights by those of a safetensors file.

        Returns:
            What went wrong, "" where nothing did: a server turns exceptions into a bare error 500.
        """
        from safetensors.torch import load_file

        model, given = self.model_runner.model, file

        def each(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal given
            for given in tensors:
                yield given, tensors[given]

        try:
            tensors = load_file(file)
        except OSError as error:
            return f"it cannot read {file} ({error}); backend.vllm.exchange names a folder that both see"
        try:
            loaded = model.load_weights(each(tensors))
        except Exception as error:  # its loaders raise what they like, some without a word
            return f"it cannot take {given} ({type(error).__name__}: {str(error)[:SHOWN]})"
        # Models that do not tell what they loaded are left to the preflight, which compares log-probabilities.
        return "" if loaded is None else _difference(model, loaded, tensors)


def _difference(model: torch.nn.Module, loaded: set[str], given: Iterable[str]) -> str:
    """Parameters of the engine that got no weights, and tensors that it left out, in words."""
    missing = sorted({name for name, value in model.named_parameters() if value.numel()} - loaded)
    # vLLM leaves out a bias that the model does not have, and raises for all else.
    unknown = [] if any(name.endswith("bias") for name in loaded) else [n for n in given if n.endswith(".bias")]
    told = (("the policy has no", missing), ("the engine has no", unknown))
    return "; ".join(f"{what} {', '.join(names[:3])} ({len(names)} in all)" for what, names in told if names)
