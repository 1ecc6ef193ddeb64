"""Runs inside vLLM's workers (``worker_extension_cls``): takes over the policy's weights from a file.

A file serves an engine in this process, one spread over GPUs, and a server alike. vLLM's own ``reload_weights`` leaves
a tied output head stale; its CPU backend packs matrices when it loads them, after which none can be replaced.
"""

from __future__ import annotations

from typing import Any

import torch


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

    def load_policy(self, file: str) -> int:
        """Replace the weights by those of a safetensors file; returns how many tensors it held."""
        from safetensors.torch import load_file

        tensors = load_file(file)
        self.model_runner.model.load_weights(iter(tensors.items()))
        return len(tensors)
