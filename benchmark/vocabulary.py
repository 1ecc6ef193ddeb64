"""The tokenizer of the small scales: one token a character, and one for each fixed word."""

from __future__ import annotations

from typing import Any

WORDS = ("Compute ", "Solve ", "\\boxed{")
CHARACTERS = "0123456789+-*/=().,;:{} x?"
PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"


def build_tokenizer() -> Any:
    """A transformers tokenizer of 32 symbols, saved and loaded like any other; encoding is lossless."""
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    symbols = [PAD, END, UNKNOWN, *WORDS, *CHARACTERS]
    backend = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"Compute |Solve |\\boxed\{|."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    make: Any = transformers.PreTrainedTokenizerFast
    return make(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, padding_side="left"
    )
