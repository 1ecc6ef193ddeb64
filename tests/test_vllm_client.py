"""What a run does about vLLM before it samples from it: waiting, the exchange of weights, engines of other models."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import socket
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from benchmark import backend_vllm as client
from benchmark import preflight as checks
from benchmark.backend import Backend, make
from benchmark.backend_vllm import VLLMBackend
from benchmark.compose import compose_run
from benchmark.config import RolloutConfig
from benchmark.config_model import BackendConfig, VLLMConfig
from benchmark.draws import Pool
from benchmark.errors import InputError, Interrupted, RunError, StorageError
from benchmark.policy import Policy
from benchmark.vocabulary import build_tokenizer

Usage = namedtuple("Usage", "total used free")
DOC = Path(__file__).parent.parent / "docs" / "paper_scale.md"
VLLM = ("vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.platforms")


class Server:
    """Answers of a server by path; what is not there is a page of another program, with the status 404."""

    def __init__(self, port: int, answers: dict[str, Any]) -> None:
        self.asked: list[Any] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = answers.get(self.path, "<html>not here</html>")
                text = body if isinstance(body, str) else json.dumps(body)
                self.send_response(200 if self.path in answers else 404)
                self.end_headers()
                self.wfile.write(text.encode())

            def do_POST(self) -> None:
                asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.do_GET()

            def log_message(self, *_: object) -> None: ...

        self.http = HTTPServer(("127.0.0.1", port), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


Serve = Callable[[dict[str, Any]], Server]
GOOD = {"/health": "", "/v1/models": {"data": [{"id": "m"}]}, "/collective_rpc": {"results": ["", ""]}}
GOOD["/reset_prefix_cache"] = ""


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def serve(port: int) -> Iterator[Serve]:
    started: list[Server] = []

    def start(answers: dict[str, Any]) -> Server:
        started.append(Server(port, answers))
        return started[-1]

    yield start
    for server in started:
        server.close()


def policy(layers: int = 2, *, bias: bool = True) -> Policy:
    torch.manual_seed(0)
    settings = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": layers, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "vocab_size": len(build_tokenizer()), "tie_word_embeddings": True}
    kind: Any = (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)
    if not bias:
        kind = (transformers.LlamaConfig, transformers.LlamaForCausalLM)
    config, model = kind
    return Policy(model(config(**settings)).float(), build_tokenizer())


def engine(port: int, stop: Callable[[], bool] = lambda: False, **settings: Any) -> VLLMBackend:
    config = BackendConfig(name="vllm", vllm=VLLMConfig(url=f"http://127.0.0.1:{port}", **settings))
    made = make(policy(), config, "models/mine", stop)
    assert isinstance(made, VLLMBackend)
    return made


# -- waiting for a server


def test_a_server_that_starts_later_is_waited_for_and_that_is_said_once(
    port: int, serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            serve(GOOD)

    monkeypatch.setattr(client.time, "sleep", pause)
    engine(port).close()
    assert len(pauses) == 3
    (said,) = caplog.messages
    assert f"http://127.0.0.1:{port}" in said
    assert "up to 600 s (backend.vllm.start_seconds)" in said


def test_a_server_that_never_listens_is_told_with_address_key_and_command(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(client.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(client.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    with pytest.raises(InputError, match=r"refused for 7 s \(backend\.vllm\.start_seconds\)") as told:
        engine(port, start_seconds=7)
    assert clock[0] == 7
    assert f"backend.vllm.url = 'http://127.0.0.1:{port}'" in str(told.value)
    assert "python -m benchmark.vllm_server" in str(told.value)


def test_waiting_ends_when_the_run_is_asked_to_stop(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(client.time, "sleep", pauses.append)
    with pytest.raises(Interrupted):
        engine(port, lambda: len(pauses) == 2)
    assert len(pauses) == 2


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({}, "/health: <html>not here"),
        ({"/health": "<html>welcome"}, "/health: Expecting value"),
        ({"/health": "", "/v1/models": {"object": "list"}}, "/v1/models: what answers is no server of vLLM"),
    ],
)
def test_another_program_at_the_address_is_not_waited_for(
    port: int, serve: Serve, monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(client.time, "sleep", lambda _: pytest.fail("it waits"))
    serve(answers)
    with pytest.raises(InputError, match=rf"backend\.vllm\.url = '.*': {said}"):
        engine(port)


def test_what_is_no_address_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.time, "sleep", lambda _: pytest.fail("it waits"))
    config = BackendConfig(name="vllm", vllm=VLLMConfig(url="localhost/8000"))
    with pytest.raises(InputError, match=r"backend\.vllm\.url = 'localhost/8000': /health: unknown url type"):
        make(policy(), config)


def test_the_patience_for_a_server_does_not_change_what_a_run_is() -> None:
    plain, said = (
        compose_run("grpo", scale="smoke", options=options) for options in ([], ["backend.vllm.start_seconds=600"])
    )
    assert plain.run_hash == said.run_hash
    assert "start_seconds" not in plain.model_dump(mode="json")["backend"]["vllm"]


# -- the exchange of weights


def test_weights_go_through_memory_only_where_they_fit(
    port: int, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    free = {str(memory): 10**9, str(disk): 10**9}
    monkeypatch.setattr(client, "MEMORY", str(memory))
    monkeypatch.setattr(client.tempfile, "gettempdir", lambda: str(disk))
    monkeypatch.setattr(client.shutil, "disk_usage", lambda place: Usage(10**12, 0, free[str(place)]))
    serve(GOOD)
    for place in (memory, disk):
        made = engine(port)
        assert [len(list(folder.iterdir())) for folder in (memory, disk)] == [place == memory, place == disk]
        made.load_weights()
        made.load_weights()
        assert len(list(place.glob("weights-*/policy.safetensors"))) == 1
        made.close()
        free[str(memory)] = 64_000_000 // 1000
    free[str(disk)] = 0
    with pytest.raises(
        InputError, match=r"^backend\.vllm\.exchange: .*6\.4e-05 GB free in .*memory, 0 GB free in .*disk"
    ):
        engine(port)


def test_an_exchange_folder_without_room_is_told_with_needed_and_free_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SimpleNamespace(named_parameters=lambda: [("w", torch.empty(1_500_000_000, device="meta"))])
    size = sum(value.numel() for value in client._plain(model).values()) * torch.bfloat16.itemsize
    monkeypatch.setattr(client.shutil, "disk_usage", lambda _: Usage(10**12, 0, 64_000_000))
    with pytest.raises(InputError, match=r"backend\.vllm\.exchange = '.*': 0\.064 GB free in .* take 3 GB"):
        client._exchange(str(tmp_path), size)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_was_started_elsewhere_gets_the_whole_path(
    port: int, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared").mkdir()
    server = serve(GOOD)
    made = engine(port, exchange="shared")
    made.load_weights()
    assert Path(server.asked[0]["args"][0]).is_relative_to(tmp_path / "shared")
    made.close()


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_an_exchange_that_is_no_folder_is_told_by_its_key(port: int, tmp_path: Path, kind: str) -> None:
    place = tmp_path / kind
    if kind == "file":
        place.write_text("")
    with pytest.raises(InputError, match=rf"^backend\.vllm\.exchange = '{place}': .* is no folder to write to"):
        engine(port, exchange=str(place))


def test_a_folder_that_fills_up_is_a_storage_error(
    port: int, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr(client, "save_file", full)
    serve(GOOD)
    with pytest.raises(StorageError, match=rf"^{tmp_path}/.*No space left.*backend\.vllm\.exchange"):
        engine(port, exchange=str(tmp_path)).load_weights()


# -- engines of other models


class Stacked(torch.nn.Module):
    """An engine's model: names as vLLM's loaders see them, where q, k and v are one matrix, and the head is tied."""

    def __init__(self, of: Policy) -> None:
        super().__init__()
        named = dict(of.model.named_parameters())
        fused = {re.sub(r"[qkv]_proj", "qkv_proj", name): value for name, value in named.items()}
        for name, value in [*fused.items(), ("lm_head.weight", named["model.embed_tokens.weight"])]:
            self.register_parameter(name.replace(".", "/"), torch.nn.Parameter(value.detach().clone()))

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        found = ((name.replace("/", "."), value) for name, value in super().named_parameters())
        return ((name, value) for name, value in found if name != "lm_head.weight")

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str] | None:
        own, loaded = dict(self.named_parameters()), set()
        for name, value in weights:
            place = re.sub(r"[qkv]_proj", "qkv_proj", name)
            if place not in own and name.endswith(".bias"):
                continue
            if place not in own:
                raise ValueError(f"There is no module or parameter named {place!r}")
            assert "qkv" in place or own[place].shape == value.shape
            loaded.add(place)
        return loaded


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in VLLM:
        platform = SimpleNamespace(is_cpu=lambda: False)
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(utils=SimpleNamespace(), current_platform=platform))
    yield importlib.import_module("benchmark.vllm_worker")
    sys.modules.pop("benchmark.vllm_worker")


def told(worker: Any, served: Any, trained: Policy, folder: Path) -> str:
    """What a worker that holds `served` says to the weights of `trained`."""
    save_file(client.merged(trained.model, torch.float32), folder / "w")
    return load(worker, served, folder / "w")


def load(worker: Any, served: Any, file: Path) -> str:
    loader = worker.PolicyLoader()
    loader.model_runner = SimpleNamespace(model=served)
    said: str = loader.load_policy(str(file))
    return said


def test_a_worker_takes_the_weights_of_its_own_model(worker: Any, tmp_path: Path) -> None:
    assert told(worker, Stacked(policy()), policy(), tmp_path) == ""
    silent = SimpleNamespace(load_weights=lambda weights: [*weights] and None)
    assert told(worker, silent, policy(), tmp_path) == ""


def test_a_worker_names_what_the_file_does_not_have(worker: Any, tmp_path: Path) -> None:
    said = told(worker, Stacked(policy(3)), policy(2), tmp_path)
    assert said.startswith("the policy has no model.layers.2.input_layernorm.weight, model.layers.2.")
    assert said.endswith("(8 in all)")


def test_a_worker_names_what_it_does_not_have(worker: Any, tmp_path: Path) -> None:
    said = told(worker, Stacked(policy(2)), policy(3), tmp_path)
    assert re.match(r"it cannot take model\.layers\.2\.\S+ \(ValueError: There is no module or parameter named", said)
    said = told(worker, Stacked(policy(bias=False)), policy(), tmp_path)
    assert re.match(r"the engine has no model\.layers\.0\.self_attn\.\w+\.bias, .*\(6 in all\)", said)


def test_a_worker_names_the_tensor_of_another_shape_and_the_file_that_it_does_not_see(
    worker: Any, tmp_path: Path
) -> None:
    other = policy()
    other.model.model.embed_tokens.weight.data = torch.zeros(3, 24)
    said = told(worker, Stacked(policy()), other, tmp_path)
    assert said.startswith("it cannot take model.embed_tokens.weight (AssertionError")
    assert "backend.vllm.exchange" in load(worker, Stacked(policy()), tmp_path / "elsewhere")


def test_an_engine_of_another_model_is_refused_with_its_address_and_the_policy(
    port: int, serve: Serve, tmp_path: Path
) -> None:
    serve(GOOD | {"/collective_rpc": {"results": ["", "the policy has no model.layers.2.x (1 in all)"]}})
    with pytest.raises(InputError, match=r"the policy has no model\.layers\.2\.x") as refused:
        engine(port).load_weights()
    assert f"backend.vllm.url = 'http://127.0.0.1:{port}'" in str(refused.value)
    assert "benchmark.vllm_server models/mine, the model of policy.path" in str(refused.value)


@pytest.mark.parametrize("off", [0.0, 0.05, 0.2, float("nan")])
def test_a_sampler_whose_log_probabilities_are_not_the_trainers_is_refused(
    port: int, serve: Serve, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    serve(GOOD)
    backend, plain = engine(port), make(policy(), BackendConfig(name="transformers"))
    asked: list[Any] = []

    def generate(request: Any) -> Any:
        asked.append(request)
        batch = plain.generate(request)
        batch.log_prob.sub_(off)
        return batch

    monkeypatch.setattr(backend, "generate", generate)
    tokens = [torch.tensor([5, 6 + number % 3]) for number in range(11)]
    pool = Pool([], tokens, np.zeros(11, dtype=np.uint64))
    rollout = RolloutConfig(max_tokens=12)
    if off < checks.GAP_NATS:
        checks._check_engine(backend, pool, rollout)
    else:
        with pytest.raises(InputError, match=rf"sampled tokens are {off:.3g} nats off .* up to 0\.1") as refused:
            checks._check_engine(backend, pool, rollout)
        assert "backend.vllm.url" in str(refused.value)
        assert "policy.path" in str(refused.value)
    (request,) = asked
    assert (len(request.prompts), request.max_tokens, request.counts.sum()) == (8, 12, 8)
    backend.close()


def test_an_engine_that_does_not_wake_names_its_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class FakeLLM:
        error = RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:119")

        def __init__(self, **_: Any) -> None: ...

        def wake_up(self) -> None:
            raise self.error

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=dict, TokensPrompt=dict))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    config = BackendConfig(name="vllm", vllm=VLLMConfig(exchange=str(tmp_path)))
    backend: Backend = make(policy(), config, "somewhere")
    with pytest.raises(RunError, match=r"lower backend\.vllm\.memory_fraction"):
        backend.load_weights()
    FakeLLM.error = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        backend.load_weights()
    backend.close()


# -- the launches of the documentation


def devices(line: str) -> set[str]:
    found = re.search(r"CUDA_VISIBLE_DEVICES=([\d,]+) ", line)
    assert found, f"no GPUs of its own: {line}"
    return set(found[1].split(","))


LAUNCHES = [
    block.replace("\\\n", " ").splitlines()
    for block in re.findall(r"```console\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    if "backend.vllm.url=" in block
]


def test_there_are_launches() -> None:
    assert len(LAUNCHES) == 4


@pytest.mark.parametrize("block", LAUNCHES, ids=lambda block: shlex.split(block[-1])[1])
def test_launches_give_the_server_gpus_that_no_process_of_the_run_has(block: list[str]) -> None:
    (server,) = [line for line in block if "benchmark.vllm_server" in line]
    (run,) = [line for line in block if "backend.vllm.url=" in line]
    assert server.endswith("&")
    assert devices(server).isdisjoint(devices(run))
    spread = re.search(r"--tensor-parallel-size (\d+)", server)
    assert len(devices(server)) == (int(spread[1]) if spread else 1)
    processes = re.search(r"--num_processes (\d+)", run)
    assert len(devices(run)) == (int(processes[1]) if processes else 1)
    assert re.search(r"--port (\d+)", server)[1] == re.search(r"url=http://127\.0\.0\.1:(\d+)", run)[1]
