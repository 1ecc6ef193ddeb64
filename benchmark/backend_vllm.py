"""Rollouts by vLLM, in this process or on a server; the training forward stays transformers'.

Each rollout has a seed of its own from its stream, so runs repeat where vLLM does; it does not promise equal samples
for other batch compositions, so arms share streams only in distribution. Log-probabilities are those after temperature.
vLLM's kernels round differently from the trainer's: the updater scores the batch anew, logs ``policy/logprob_abs_diff``
and weighs tokens by truncated importance sampling, where the method does not do so itself (`Method.anchor`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from benchmark import ranks, sharding, streams
from benchmark.backend import Request
from benchmark.backend_transformers import TransformersBackend
from benchmark.config_model import BackendConfig, VLLMConfig
from benchmark.errors import InputError, Interrupted, RunError, StorageError, storing
from benchmark.installing import install_line
from benchmark.policy import Policy
from benchmark.rollouts import Rollouts

CONCURRENT = 256  # requests on their way to a server
PATIENCE_SECONDS = 3600.0
HEALTH_SECONDS = 30.0  # for a server to say that it is there
MEMORY = "/dev/shm"
HEADER = 1 << 20  # bytes of a file of weights beside the weights, at most

_log = logging.getLogger("rolloutbench.vllm")


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
    def load(self, file: Path) -> list[str]:
        """Take over the weights in a safetensors file, and forget what was computed with the old ones.

        Returns:
            What went wrong in each of its workers, "" where nothing did.
        """

    def rest(self) -> None:  # noqa: B027 (a server keeps its GPUs)
        """Give memory back until the next `load`."""

    def close(self) -> None:  # noqa: B027
        """Release the engine."""


class VLLMBackend(TransformersBackend):
    """Samples from vLLM's copy of the policy, renewed before every batch."""

    def __init__(
        self, policy: Policy, config: BackendConfig, model: str, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__(policy, config)
        if ranks.size() > 1 and config.vllm.url is None:
            what = "one run in several processes samples from a server, not from an engine in each"
            remedy = "Start python -m benchmark.vllm_server MODEL, and give its address"
            raise InputError(what, key="backend.vllm.url", value=None, remedy=remedy)
        self.exact, self._source, self._dtype = False, model, getattr(torch, config.dtype)
        size = sum(value.numel() for value in _plain(policy.model).values()) * self._dtype.itemsize
        self._folder = _exchange(config.vllm.exchange, size + HEADER)
        self.engine = _Server(config.vllm, should_stop) if config.vllm.url else _Colocated(model, config)

    def load_weights(self) -> None:
        """See `Backend.load_weights`.

        Raises:
            InputError: the engine holds another model.
            StorageError: the weights' file cannot be written.
            RunError: the GPU has no room for the engine beside the trainer.
        """
        first = ranks.rank() == 0
        weights = merged(self.policy.model, self._dtype) if first or self.divided else {}
        if first:
            file = Path(self._folder.name).absolute() / "policy.safetensors"
            _write(weights, file)
            wrong = next(filter(None, self.engine.load(file)), None)
            if wrong:
                raise self.foreign(wrong)
        ranks.agree(None)  # the others wait for it

    def foreign(self, what: str) -> InputError:
        """The error for an engine that does not hold the model in training, as `what` shows."""
        url = self.config.vllm.url
        key, value = ("backend.vllm.url", url) if url else ("policy.path", self._source)
        remedy = f"Start it with python -m benchmark.vllm_server {self._source}, the model of policy.path"
        return InputError(
            f"the engine does not hold the policy in training: {what}", key=key, value=value, remedy=remedy
        )

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
            "stop_token_ids": list(self.policy.ends),
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
            what = f"vLLM is missing ({error})"
            raise InputError(what, key="backend.name", value="vllm", remedy=install_line("vllm")) from error
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

    def load(self, file: Path) -> list[str]:
        if self._sleeps:
            self._wake()
        wrong: list[str] = self._llm.collective_rpc("load_policy", args=(str(file),))
        self._llm.reset_prefix_cache()
        return wrong

    def _wake(self) -> None:
        # Torch keeps what a pass took, and vLLM takes its memory past torch.
        gc.collect()
        torch.cuda.empty_cache()
        try:
            self._llm.wake_up()
        except Exception as error:  # of which type depends on the process that the engine is in
            if "out of memory" not in str(error).lower():
                raise
            raise RunError(
                "vLLM does not fit the GPU beside weights and optimiser: lower backend.vllm.memory_fraction, "
                "or start python -m benchmark.vllm_server on other GPUs and set backend.vllm.url"
            ) from error

    def rest(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=2)

    def close(self) -> None:
        del self._llm


class _Server(Engine):
    """A server started by `benchmark.vllm_server`, once it answers; a big model takes minutes to start."""

    def __init__(self, config: VLLMConfig, should_stop: Callable[[], bool]) -> None:
        self._url = str(config.url).rstrip("/")
        if ranks.agree(ranks.rank() == 0 and self._wait(config.start_seconds, should_stop)):
            raise Interrupted
        found = self._ask("/v1/models", None)
        try:
            self._model = found["data"][0]["id"]
        except (KeyError, IndexError, TypeError) as error:
            raise self._unfit("/v1/models: what answers is no server of vLLM") from error

    def _wait(self, seconds: float, should_stop: Callable[[], bool]) -> bool:
        """Wait while nothing listens at the address; returns whether it was asked to stop."""
        end, told = time.monotonic() + seconds, False
        while True:
            try:
                self._ask("/health", None, HEALTH_SECONDS)
                return False
            except InputError as error:
                reason = getattr(error.__cause__, "reason", error.__cause__)
                if not isinstance(reason, ConnectionError):
                    raise
                if time.monotonic() >= end:
                    raise self._unfit(f"/health: {reason} for {seconds:g} s (backend.vllm.start_seconds)") from error
            if should_stop():
                return True
            if not told:
                told = True
                where = f"{self._url}, up to {seconds:g} s (backend.vllm.start_seconds)"
                _log.warning("waiting until the vLLM server listens at %s", where)
            time.sleep(1)

    def sample(self, prompts: list[list[int]], settings: list[dict[str, Any]]) -> list[Answer]:
        with ThreadPoolExecutor(CONCURRENT) as pool:
            return list(pool.map(self._one, prompts, settings))

    def load(self, file: Path) -> list[str]:
        wrong: list[str] = self._ask("/collective_rpc", {"method": "load_policy", "args": [str(file)]})["results"]
        self._ask("/reset_prefix_cache", {})
        return wrong

    def _one(self, prompt: list[int], settings: dict[str, Any]) -> Answer:
        body = {"model": self._model, "prompt": prompt, "return_token_ids": True, **settings}
        (choice,) = self._ask("/v1/completions", body)["choices"]
        return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"] == "stop")

    def _ask(self, path: str, body: dict[str, Any] | None, patience: float = PATIENCE_SECONDS) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=patience) as reply:
                text = reply.read()
            return json.loads(text) if text else None
        except (OSError, HTTPException, ValueError) as error:  # ValueError: no address, or a page instead of JSON
            said = error.read().decode(errors="replace")[:500] if isinstance(error, urllib.error.HTTPError) else error
            raise self._unfit(f"{path}: {said}") from error

    def _unfit(self, what: str) -> InputError:
        remedy = "Start it with python -m benchmark.vllm_server MODEL, or give its address"
        return InputError(what, key="backend.vllm.url", value=self._url, remedy=remedy)


def merged(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that sampling needs, by the names of the plain model: adapters merged, tied tensors once.

    They are copies off the device, which has to hold the engine's.
    """
    adapters = hasattr(model, "peft_config")
    if adapters:
        model.merge_adapter()
    try:
        return {
            name: sharding.kept(value).to("cpu", dtype, copy=True).contiguous() for name, value in _plain(model).items()
        }
    finally:
        if adapters:
            model.unmerge_adapter()


def _plain(model: Any) -> dict[str, Tensor]:
    """The parameters of the model without adapters, by its names, tied ones once."""
    named = (model.get_base_model() if hasattr(model, "peft_config") else model).named_parameters()
    return {name.replace(".base_layer.", "."): value for name, value in named if "lora_" not in name}


def _exchange(chosen: str | None, size: int) -> TemporaryDirectory[str]:
    """A folder with room for `size` bytes, in `chosen`, or in memory, or on disk: weights go through it once a step."""
    told = []
    for place in (chosen,) if chosen else (MEMORY, tempfile.gettempdir()):
        try:
            free = shutil.disk_usage(place).free
            if free >= size:
                return TemporaryDirectory(prefix="weights-", dir=place)
            told.append(f"{free / 1e9:.3g} GB free in {place}")
        except OSError as error:
            told.append(f"{place} is no folder to write to ({error.strerror})")
    remedy = "Name a folder with room that the engine sees too"
    what = f"{', '.join(told)}; the policy's weights take {size / 1e9:.3g} GB"
    raise InputError(what, key="backend.vllm.exchange", value=chosen, remedy=remedy)


def _write(weights: dict[str, Tensor], file: Path) -> None:
    """Write `weights` as safetensors in place of the last ones.

    Raises:
        StorageError: it cannot be written.
    """
    with storing(file):
        file.unlink(missing_ok=True)  # there is room for one
        try:
            save_file(weights, file)
        except SafetensorError as error:  # how safetensors says that the disk is full
            remedy = "Free some space there, or name another folder by backend.vllm.exchange"
            raise StorageError(file, str(error), remedy) from error
