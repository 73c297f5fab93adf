"""A tokenizer of single characters."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]


def characters(template: str | None = None, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, but for the two tokens "\\n " and "ab"."""
    tokens = ["<pad>", "<bos>", "<eos>", *CHARACTERS, "\n ", "ab"]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab=vocab, merges=[("\n", " "), ("a", "b")]))
    backend.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    if adds_bos:
        backend.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer
