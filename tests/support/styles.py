"""Small tokenizers in the styles of published ones, trained on a few words."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "a: no",
    "b: ok ok",
    "ab:\n no",
    "the cat sat; the dog ran.",
    "yes, no, ok!",
    "noon oboe",
] * 9
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|bot|>"]
CHAT = (
    "{% for m in messages %}<|{{ 'bot' if m.role == 'assistant' else 'user' }}|>{{ m.content }}</s>"
)
CHAT += "{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }} \n{% endfor %}"
LINES += "{% if add_generation_prompt %}assistant: {% endif %}"

STYLES = ["byte-level", "byte-level with a blank", "llama 2", "t5", "wordpiece"]
STYLES += [
    f"{model} {scheme}" for model in ("bpe", "unigram") for scheme in ("always", "first", "never")
]


@cache
def style(name: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer in the style of this name. It knows every printable character."""
    alphabet = [chr(code) for code in range(32, 127)] + ["\n"]
    known: dict[str, Any] = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": 400}
    first, _, scheme = name.partition(" ")
    if first == "wordpiece":
        rules = Tokenizer(models.WordPiece(unk_token="<unk>"))
        rules.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        rules.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(initial_alphabet=alphabet, **known)
    elif first == "byte-level":
        rules = Tokenizer(models.BPE())
        rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(scheme))
        rules.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **known)
    elif first == "llama":  # the blank comes from a normalizer, and the decoder takes it away
        rules = Tokenizer(models.BPE(unk_token="<unk>"))
        rules.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        rules.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(initial_alphabet=[*alphabet, "▁"], **known)
    else:
        scheme = scheme or "always"
        unigram = first in ("unigram", "t5")
        rules = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>"))
        space = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        rules.pre_tokenizer = space
        if first == "t5":  # blanks in a row are one, and those at an end are lost
            rules.normalizer = normalizers.Strip()
            rules.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
        rules.decoder = decoders.Metaspace(prepend_scheme=scheme)
        letters = [*alphabet, "▁"]
        trainer = (
            trainers.UnigramTrainer(initial_alphabet=letters, unk_token="<unk>", **known)
            if unigram
            else trainers.BpeTrainer(initial_alphabet=letters, **known)
        )
    rules.train_from_iterator(CORPUS, trainer)
    if first == "bpe":  # tokens of one word, but text that is not parted into words
        rules.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, **names)
    tokenizer.chat_template = template
    return tokenizer
