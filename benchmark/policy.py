"""Loading and saving the policy: a transformers causal LM, its tokenizer and where it runs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from benchmark import ranks, sharding
from benchmark.config_model import BackendConfig, LoRAConfig, TemplateConfig
from benchmark.errors import StorageError, storing
from benchmark.jsonl import PARTIAL, sync_folder
from benchmark.pretrained import complete, end_ids, load_model, render, turn_end
from benchmark.transformer import Shape, Weights, fuse


def prepare_machine(threads: int = 1) -> torch.device:
    """Settings every process of a run starts with; returns the device.

    One thread per process keeps results bit-reproducible and is faster than two on two busy cores. Products stay at
    full float32 precision: on CPU, lower ones select kernels that are built anew for every number of rows, and
    ragged batches have a new one each time. glibc keeps freed memory, since fresh pages cost more than small kernels.
    """
    ranks.start()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("highest")
    if torch.cuda.is_available():
        return ranks.device()
    with contextlib.suppress(OSError, AttributeError):  # not glibc: slower, not different
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    return torch.device("cpu")


@dataclass(frozen=True)
class Policy:
    """A model, its tokenizer and its fused view.

    Attributes:
        model: transformers causal LM, on its device.
        tokenizer: its tokenizer, with an end-of-sequence token.
        template: how a problem is put to it.
    """

    model: Any
    tokenizer: Any
    template: TemplateConfig = field(default_factory=TemplateConfig)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device,
        *,
        backend: BackendConfig | None = None,
        template: TemplateConfig | None = None,
        lora: LoRAConfig | None = None,
    ) -> Policy:
        """Read a local folder or a hub id: safetensors weights only, since a pickle can hold code.

        Raises:
            InputError: there is no such model, or the backend does not know its architecture.
        """
        from transformers import AutoTokenizer

        backend = backend or BackendConfig()
        model = load_model(path, device, backend, lora)
        if backend.name == "native":
            Shape.of(model.config)
        loaded = cls(model, AutoTokenizer.from_pretrained(path), template or TemplateConfig())
        if (ends := loaded.ends) != (loaded.end,):  # said where TRL reads it and `save` keeps it
            model.generation_config.eos_token_id = list(ends)
        for value in loaded.parameters().values():  # fresh adapters are random
            ranks.share(value.data, 0)
        if sharding.wanted():
            sharding.divide(model)
        return loaded

    def gathered(self) -> dict[str, Tensor] | None:
        """All weights by name, for the first process to save, if each process holds a part; all ask together."""
        if not sharding.divided(self.model):
            return None
        return {name: sharding.kept(value) for name, value in self.model.named_parameters()}

    def save(self, path: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write model (safetensors) and tokenizer as a transformers folder, which is there whole or not at all.

        Args:
            weights: those of `gathered`.

        Raises:
            StorageError: it cannot be written.
        """
        partial = path.with_name(f".{path.name}{PARTIAL}")
        with storing(path):
            for old in (partial, path):
                shutil.rmtree(old, ignore_errors=True)
            try:
                self.model.save_pretrained(partial, state_dict=weights)
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
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    @property
    def size(self) -> int:
        """Parameters that multiply a token: all of them, less an untied embedding."""
        total: int = sum(p.numel() for p in self.model.parameters())
        config = self.model.config
        untied = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        return total - int(untied)

    @property
    def vocabulary(self) -> int:
        """Words of the output head."""
        return len(self.model.get_output_embeddings().weight)

    @property
    def end(self) -> int:
        """Id of the end-of-sequence token, which written answers end with."""
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids any of which ends a rollout: `end`, those the model declares, and the one its chat turns end with."""
        also = [*end_ids(self.model), *(turn_end(self.tokenizer) if self.template.chat else [])]
        return tuple(dict.fromkeys([self.end, *also]))

    def render(self, prompt: str) -> str:
        """The text that the policy reads for a problem."""
        return render(self.tokenizer, self.template, prompt)

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of each prompt, without special tokens."""
        ids: list[list[int]] = self.tokenizer(list(map(self.render, prompts)), add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, tokens: list[list[int]]) -> list[str]:
        """Each answer as the verifier reads it, special tokens and the one that ends it dropped."""
        texts: list[str] = self.tokenizer.batch_decode(
            [ids[:-1] if ids and ids[-1] in self.ends else ids for ids in tokens],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return [complete(self.template, text) for text in texts]

    def pieces(self, tokens: list[int]) -> list[str]:
        """Text of each token by itself, special tokens by name."""
        texts: list[str] = self.tokenizer.batch_decode(
            [[token] for token in tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return texts
