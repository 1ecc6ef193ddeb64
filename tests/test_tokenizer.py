"""The small tokenizer: lossless, one token a word, and the same tokenizer after it was saved beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark.vocabulary import CHARACTERS, END, PAD, WORDS, build_tokenizer

TOKENIZER = build_tokenizer()
TEXTS = ["Compute 12+345-6.", "Solve 3*x+5=20.", r"47*6:40*6=240;7*6=42;240+42=282;\boxed{282}", r"\boxed{-7}"]
SYMBOLS = st.lists(st.sampled_from([*WORDS, *CHARACTERS]), max_size=30)


@given(SYMBOLS)
def test_every_text_of_its_symbols_comes_back_with_one_token_a_symbol(symbols: list[str]) -> None:
    text = "".join(symbols)
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert len(ids) == len(symbols)


def test_prompt_and_completion_join_as_ids() -> None:
    prompt, completion = TEXTS[0], TEXTS[2]
    assert TOKENIZER.encode(prompt) + TOKENIZER.encode(completion) == TOKENIZER.encode(prompt + completion)


def test_ids_fill_the_vocabulary() -> None:
    assert len(TOKENIZER) == 32
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(32))
    assert TOKENIZER.convert_ids_to_tokens([TOKENIZER.pad_token_id, TOKENIZER.eos_token_id]) == [PAD, END]


def test_padding_is_on_the_left_and_special_tokens_are_not_text() -> None:
    batch = TOKENIZER(TEXTS[:2], padding=True)
    first, second = (TOKENIZER.encode(text) for text in TEXTS[:2])
    pad = [TOKENIZER.pad_token_id] * (len(first) - len(second))
    assert batch["input_ids"] == [first, pad + second]
    assert batch["attention_mask"][1] == [0] * len(pad) + [1] * len(second)
    decoded = TOKENIZER.decode([*second, TOKENIZER.eos_token_id, *pad], skip_special_tokens=True)
    assert decoded == TEXTS[1]


@pytest.mark.parametrize("model", ["none", "Qwen2Config", "LlamaConfig"])
def test_saved_beside_a_model_it_comes_back_unchanged(model: str, tmp_path: Path) -> None:
    # AutoTokenizer picks the class by the model's type and rebuilds the tokenizer the way that class does.
    import transformers

    TOKENIZER.save_pretrained(tmp_path)
    if model != "none":
        config: Any = getattr(transformers, model)
        config(vocab_size=32, hidden_size=16, num_attention_heads=2, num_key_value_heads=1).save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded.encode(text) for text in TEXTS] == [TOKENIZER.encode(text) for text in TEXTS]
    assert [loaded.decode(loaded.encode(text)) for text in TEXTS] == TEXTS
    for name in ("pad_token_id", "eos_token_id", "padding_side"):
        assert getattr(loaded, name) == getattr(TOKENIZER, name)
    assert len(loaded) == len(TOKENIZER)
