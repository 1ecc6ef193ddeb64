"""Loading and saving the policy: a transformers causal LM, its tokenizer and where it runs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from benchmark.errors import StorageError, storing
from benchmark.jsonl import PARTIAL, sync_folder
from benchmark.transformer import Shape, Weights, fuse


def prepare_machine(threads: int = 1) -> torch.device:
    """Settings every process of a run starts with; returns the device.

    One thread per process keeps results bit-reproducible and is faster than two on two busy cores. Products stay at
    full float32 precision: on CPU, lower ones select kernels that are built anew for every number of rows, and
    ragged batches have a new one each time. glibc keeps freed memory, since fresh pages cost more than small kernels.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("highest")
    if torch.cuda.is_available():
        return torch.device("cuda")
    with contextlib.suppress(OSError, AttributeError):  # not glibc: slower, not different
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    return torch.device("cpu")


@dataclass(frozen=True)
class Policy:
    """A model, its tokenizer and its fused view.

    Attributes:
        model: transformers causal LM of the Qwen2 / Llama family, on its device.
        tokenizer: its tokenizer, with an end-of-sequence token.
    """

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, path: str | Path, device: torch.device) -> Policy:
        """Read a local folder or a hub id: safetensors weights only, since a pickle can hold code.

        Raises:
            InputError: the architecture is not supported.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        quiet: Any = logging.disable_progress_bar
        quiet()  # seconds of work; the run has its own bar

        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
        model.to(device)
        Shape.of(model.config)
        return cls(model.train(), AutoTokenizer.from_pretrained(path))

    def save(self, path: Path) -> None:
        """Write model (safetensors) and tokenizer as a transformers folder, which is there whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        partial = path.with_name(f".{path.name}{PARTIAL}")
        with storing(path):
            for old in (partial, path):
                shutil.rmtree(old, ignore_errors=True)
            try:
                self.model.save_pretrained(partial)
                self.tokenizer.save_pretrained(partial)
            except SafetensorError as error:  # how safetensors says that the disk is full
                raise StorageError(path, str(error), "Free some space; the same command then goes on") from error
            for file in partial.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            sync_folder(partial)
            partial.replace(path)
            sync_folder(path.parent)

    def fused(self) -> Weights:
        """Fused weights; differentiable under autograd."""
        return fuse(self.model)

    def parameters(self) -> dict[str, Tensor]:
        """Trainable parameters by name, tied ones once."""
        return dict(self.model.named_parameters())

    @property
    def size(self) -> int:
        """Parameters that multiply a token: all of them, less an untied embedding."""
        total: int = sum(p.numel() for p in self.model.parameters())
        config = self.model.config
        untied = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        return total - int(untied)

    @property
    def end(self) -> int:
        """Id of the end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of each prompt, without special tokens."""
        ids: list[list[int]] = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, tokens: list[list[int]]) -> list[str]:
        """Text of each generated sequence, special tokens dropped."""
        texts: list[str] = self.tokenizer.batch_decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts
