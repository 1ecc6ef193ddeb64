"""The tokenizer of the small scales: one token a character, and one for each fixed word."""

from __future__ import annotations

from typing import Any

WORDS = ("Compute ", "Solve ", "\\boxed{")
CHARACTERS = "0123456789+-*/=().,;:{} x?"
PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"


def build_tokenizer() -> Any:
    """A transformers tokenizer of 32 symbols, saved and loaded like any other; encoding is lossless.

    It is a byte-level BPE without merges whose words are added tokens, and not the plainer word-level model:
    ``AutoTokenizer`` rebuilds the tokenizer of every folder that holds a Qwen2 model as `Qwen2Tokenizer` and
    silently drops what that class cannot say. Other characters vanish when encoded.
    """
    from transformers import AddedToken, Qwen2Tokenizer

    symbols = [PAD, END, UNKNOWN, *WORDS, *CHARACTERS.replace(" ", "Ġ")]  # byte-level BPE's name of the space
    make: Any = Qwen2Tokenizer
    tokenizer = make(
        vocab={symbol: number for number, symbol in enumerate(symbols)},
        merges=[],
        unk_token=UNKNOWN,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return tokenizer
