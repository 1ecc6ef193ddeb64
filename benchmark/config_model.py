"""The schema of real language models: prompt template, adapters, and the backend that samples and scores."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from benchmark.schema import Count, Model, Positive, fault

START_SECONDS = 600.0  # a model of tens of billions of parameters, with its CUDA graphs


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


class TemplateConfig(Model):
    """How a problem becomes the text that the policy reads.

    Attributes:
        user: the user's words; ``{problem}`` is the problem.
        chat: apply the tokenizer's chat template to `system` and `user`.
        system: system message of the chat; the template's own by default.
        prefix: first words of the answer, given to the policy and put back before verification.
        answer: regular expression of the answer in generated text, for models that do not box: its first match is
            boxed before verification.
    """

    user: Annotated[str, Field(pattern=r"\{problem\}")] = "{problem}"
    chat: bool = False
    system: str | None = None
    prefix: str = ""
    answer: Annotated[str, AfterValidator(_expression)] | None = None


class LoRAConfig(Model):
    """Low-rank adapters on all linear layers (peft); the other weights stay as they are."""

    rank: Count = 16
    alpha: Count = 32


class VLLMConfig(Model):
    """vLLM in this process (``url: null``), or a server that shares the disk with this process.

    Attributes:
        url: address of a server started with ``python -m benchmark.vllm_server``.
        start_seconds: how long to wait for a server that does not listen yet.
        memory_fraction: share of the GPU that an engine in this process may take.
        tensor_parallel: GPUs of an engine in this process.
        max_model_len: longest prompt and answer; the model's own limit by default.
        eager: no CUDA graphs, no compilation.
        exchange: folder through which weights reach the engine; memory by default, or the disk's temporary folder where
            memory has no room. A server elsewhere needs one on a shared disk.
    """

    url: str | None = None
    # It decides nothing, so a run that leaves it alone has the identity of one without the key.
    start_seconds: Annotated[float, Field(ge=0, exclude_if=lambda seconds: seconds == START_SECONDS)] = START_SECONDS
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.4
    tensor_parallel: Count = 1
    max_model_len: Count | None = None
    eager: bool = False
    exchange: str | None = None


class BackendConfig(Model):
    """Where rollouts come from and how tokens are scored (`benchmark.backend`).

    Attributes:
        name: ``native`` for the Qwen2 / Llama family in float32, ``transformers`` for any causal LM, ``vllm`` for
            rollouts by vLLM and scoring by transformers.
        dtype: precision of forward passes; weights and optimiser stay in float32.
        tokens_per_pass: tokens whose activations exist at a time.
        rows_per_decode: rollouts that are decoded at a time (transformers).
        gradient_checkpointing: recompute activations in the backward pass.
        importance_cap: truncated importance sampling: where sampled and trained log-probabilities differ, tokens weigh
            min(pi_train / pi_sample, cap); null leaves them uncorrected. Not on top of a method's own weights
            (`Method.anchor`).
    """

    name: Literal["native", "transformers", "vllm"] = "native"
    dtype: Literal["float32", "bfloat16"] = "float32"
    tokens_per_pass: Count = 65_536
    rows_per_decode: Count = 256
    gradient_checkpointing: bool = False
    importance_cap: Positive | None = 2.0
    vllm: VLLMConfig = VLLMConfig()

    @model_validator(mode="after")
    def _native_is_plain(self) -> Self:
        if self.name == "native" and (self.dtype != "float32" or self.gradient_checkpointing):
            key = "dtype" if self.dtype != "float32" else "gradient_checkpointing"
            raise fault(key, "the native backend has float32 and no checkpointing", "Set backend.name: transformers")
        return self
