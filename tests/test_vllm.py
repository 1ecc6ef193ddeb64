"""The real vLLM engine on a CPU: what it samples, that new weights reach it, and whole runs on it.

`nox -s tests_vllm`, which `tests_slow` ends with, installs it; elsewhere these tests are skipped. Tolerance:
log-probabilities of vLLM in float32 are within 1e-4 nats of the trainer's forward (seen: below 1e-5).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmark import preflight as checks
from benchmark.backend import Request, make
from benchmark.backend_vllm import VLLMBackend
from benchmark.compose import compose_run
from benchmark.config import RolloutConfig
from benchmark.config_model import BackendConfig, VLLMConfig
from benchmark.draws import Pool
from benchmark.errors import InputError
from benchmark.jsonl import read_rows
from benchmark.policy import Policy
from benchmark.run import run_cell

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow]

TOLERANCE = 1e-4
ROOT = Path(__file__).parent.parent
START_SECONDS = 400.0


@pytest.fixture(scope="module")
def model() -> Path:
    """A shipped policy: its embedding is tied to its head, which is where weight updates go wrong."""
    return next(path.parent for path in sorted((ROOT / "benchmark" / "policies").glob("*/config.json")))


def environment() -> dict[str, str]:
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        line = [sys.executable, "-m", "benchmark.vllm_server", str(model), *options]
        server = subprocess.Popen(line, env=environment(), stdout=file, stderr=file)
        try:
            end = time.monotonic() + START_SECONDS
            while time.monotonic() < end and server.poll() is None:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            else:
                pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


@pytest.fixture(scope="module", params=["colocated", "server"])
def backend(request: pytest.FixtureRequest, model: Path) -> Iterator[VLLMBackend]:
    settings: dict[str, Any] = {"eager": True, "max_model_len": 128}
    if request.param == "server":
        settings["url"] = request.getfixturevalue("url")
    config = BackendConfig(name="vllm", vllm=VLLMConfig(**settings))
    made = make(Policy.load(model, torch.device("cpu"), backend=config), config, model)
    assert isinstance(made, VLLMBackend)
    yield made
    made.close()


def asked(policy: Policy, temperature: float = 1.0, seed: int = 0) -> Request:
    prompts = [torch.tensor(ids) for ids in policy.encode(["Compute 12+34+5.", "Compute 3*4.", "Solve 3*x+2=11."])]
    counts = np.array([5, 0, 9])
    keys = np.arange(14, dtype=np.uint64) + np.uint64(1000 * seed)
    return Request(prompts, counts, keys, np.zeros(14, dtype=np.int64), 24, temperature)


def gap(backend: VLLMBackend, temperature: float = 1.0) -> float:
    """Largest difference of sampled and trained log-probabilities."""
    batch = backend.generate(asked(backend.policy, temperature))
    with torch.no_grad():
        return float((backend.score(batch, temperature).log_prob - batch.log_prob).abs().max())


def test_ragged_groups_with_finish_reasons(backend: VLLMBackend) -> None:
    backend.load_weights()
    batch = backend.generate(asked(backend.policy))
    assert torch.bincount(batch.prompt, minlength=3).tolist() == [5, 0, 9]
    assert int(batch.length.sum()) == len(batch.tokens) == len(batch.log_prob)
    ends = torch.cumsum(batch.length, 0) - 1
    assert torch.equal(batch.tokens[ends] == backend.policy.end, batch.finished)
    assert int((batch.tokens == backend.policy.end).sum()) == int(batch.finished.sum()) > 0
    assert torch.all(batch.length[~batch.finished] == 24)
    assert len({tuple(text) for text in batch.texts()}) > 4
    assert backend.usage.tokens_generated >= len(batch.tokens)


def test_any_id_that_ends_a_rollout_ends_one(backend: VLLMBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's own end, and the token that most rollouts begin with."""
    backend.load_weights()
    begun = [text[0] for text in backend.generate(asked(backend.policy)).texts()]
    first = max(set(begun), key=begun.count)
    monkeypatch.setitem(vars(backend.policy), "ends", (backend.policy.end, first))
    batch = backend.generate(asked(backend.policy))
    ends = torch.isin(batch.tokens, torch.tensor(backend.policy.ends))
    assert torch.equal(ends[torch.cumsum(batch.length, 0) - 1], batch.finished)
    assert int(ends.sum()) == int(batch.finished.sum())
    assert sum(text == [first] for text in batch.texts()) == begun.count(first)


def test_the_same_streams_sample_the_same_and_others_do_not(backend: VLLMBackend) -> None:
    backend.load_weights()
    first, again = (backend.generate(asked(backend.policy)).texts() for _ in range(2))
    assert first == again
    assert first != backend.generate(asked(backend.policy, seed=1)).texts()


def test_more_prompt_tokens_than_one_step_of_the_engine_reads(backend: VLLMBackend) -> None:
    """A prompt that is read in parts ends an engine on a CPU: its request's generator cannot be wound back."""
    backend.load_weights()
    ids = backend.policy.encode(["Compute " + "+".join(["12"] * 30) + "."])[0]
    assert 80 < len(ids) <= 104
    count = 16_384 // len(ids)
    keys = np.arange(count, dtype=np.uint64)
    request = Request([torch.tensor(ids)], np.array([count]), keys, np.zeros(count, dtype=np.int64), 8, 1.0)
    assert len(backend.generate(request)) == count


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_trainer(backend: VLLMBackend, temperature: float) -> None:
    backend.load_weights()
    assert gap(backend, temperature) < TOLERANCE


def test_new_weights_reach_every_part_of_the_model(backend: VLLMBackend) -> None:
    backend.load_weights()
    before = backend.generate(asked(backend.policy)).texts()
    kept = {name: value.detach().clone() for name, value in backend.policy.parameters().items()}
    random = torch.Generator().manual_seed(1)
    try:
        with torch.no_grad():
            for value in backend.policy.parameters().values():
                value.add_(0.1 * value.std() * torch.randn(value.shape, generator=random))
        assert gap(backend) > 100 * TOLERANCE, "the engine has the new weights before it was given them"
        backend.load_weights()
        assert gap(backend) < TOLERANCE
        assert backend.generate(asked(backend.policy)).texts() != before
    finally:
        with torch.no_grad():
            for name, value in backend.policy.parameters().items():
                value.copy_(kept[name])
    backend.load_weights()
    assert backend.generate(asked(backend.policy)).texts() == before


@pytest.mark.parametrize(("layers", "said"), [(-1, "the policy has no"), (1, "it cannot take")])
def test_a_server_of_another_depth_is_refused(url: str, model: Path, tmp_path: Path, layers: int, said: str) -> None:
    served = Policy.load(model, torch.device("cpu"))
    other, kept = served.model.config.to_dict(), served.model.state_dict()
    last = other["num_hidden_layers"] + layers
    settings = other | {"num_hidden_layers": last, "layer_types": None, "max_window_layers": last}
    made = type(served.model)(type(served.model.config)(**settings))
    made.load_state_dict({name: value for name, value in kept.items() if name in made.state_dict()}, strict=False)
    Policy(made, served.tokenizer).save(tmp_path / "other")
    more = {"policy.path": str(tmp_path / "other"), "backend.name": "vllm", "backend.vllm.url": url}
    config = compose_run("grpo", scale="smoke", options=[f"{key}={value}" for key, value in more.items()])
    with pytest.raises(InputError, match=rf"{said} model\.layers\.{min(last, last - layers)}\.") as refused:
        run_cell(config, tmp_path / "run")
    assert f"backend.vllm.url = '{url}'" in str(refused.value)
    assert f"{tmp_path / 'other'}, the model of policy.path" in str(refused.value)
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[0] == []


def test_a_server_that_reads_positions_otherwise_is_refused(backend: VLLMBackend) -> None:
    """Its parameters are those of the policy; only what it says of tokens tells."""
    prompts = [torch.tensor(ids) for ids in backend.policy.encode(["Compute 12+34+5.", "Solve 3*x+2=11."])]
    pool, rollout = Pool([], prompts, np.zeros(2, dtype=np.uint64)), RolloutConfig(max_tokens=24)
    backend.load_weights()
    checks._check_engine(backend, pool, rollout)
    frequencies = backend.policy.model.model.rotary_emb.inv_freq
    kept = frequencies.clone()
    try:
        frequencies.mul_(3)
        with pytest.raises(InputError, match=r"nats off the trainer's on average, where rounding makes up to 0\.1"):
            checks._check_engine(backend, pool, rollout)
    finally:
        frequencies.copy_(kept)


@pytest.mark.parametrize("form", ["colocated", "server"])
@pytest.mark.parametrize("arm", ["grpo", "dynamo"])
def test_a_whole_run(arm: str, form: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if (arm, form) == ("dynamo", "colocated"):
        pytest.skip("an engine takes a minute to start; one arm shows it")
    settings = {"name": "vllm", "vllm.eager": "true", "vllm.max_model_len": 128}
    if form == "server":
        settings["vllm.url"] = request.getfixturevalue("url")
    options = [f"--set=backend.{key}={value}" for key, value in settings.items()]
    line = ["run", arm, "--scale", "smoke", "--budget", "tokens_generated=9000", "--out", str(tmp_path / "run")]
    script = "from benchmark.cli import main; main()"
    subprocess.run([sys.executable, "-c", script, *line, *options], env=environment(), check=True, timeout=900)
    check(tmp_path / "run")


@pytest.mark.parametrize("divided", [False, True], ids=["whole weights", "divided weights"])
def test_two_processes_on_one_server(url: str, tmp_path: Path, *, divided: bool) -> None:
    settings = {"name": "vllm", "vllm.eager": "true", "vllm.max_model_len": 128, "vllm.url": url}
    options = [f"--set=backend.{key}={value}" for key, value in settings.items()]
    line = ["run", "dynamo", "--scale", "smoke", "--budget", "tokens_generated=9000", "--out", str(tmp_path / "run")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmark.cli"]
    asks = {"ACCELERATE_USE_FSDP": str(divided).lower(), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, *launcher, *line, *options], env=environment() | asks, check=True, timeout=900)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["processes"] == 2
    check(tmp_path / "run")


def check(run: Path) -> None:
    """The budget was kept, and the sampler had the trainer's weights at every step."""
    result = json.loads((run / "result.json").read_text())
    assert result["spent"]["tokens_generated"] == 9000
    assert result["overshoot"] == 0
    assert result["spent"]["tokens_scored"] > 0
    steps = [row["metrics"] for row in read_rows(run / "metrics.jsonl")[0]]
    trained = [row for row in steps if "optim/gradient_norm" in row]
    assert len(trained) >= 2
    for row in trained:
        # Only with renewed weights does the gap stay at rounding while the policy moves.
        assert 0 < row["policy/logprob_abs_diff"] < TOLERANCE
        assert row["policy/logprob_abs_diff_max"] < 10 * TOLERANCE
        assert row["policy/importance_truncated_fraction"] == 0
    assert max(row["policy/kl_old_nats"] for row in trained) > TOLERANCE
