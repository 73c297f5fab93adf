"""Tokens of a text that is cut in places, so that no token spans a cut and the text stays what it is."""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from fedhl.task.rows import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], cuts: Sequence[Sequence[int]]
) -> list[tuple[list[int], list[int]]]:
    """Token ids of each text, and its cuts (in characters) as positions in them.

    The tokens before a cut must be what the model sees when it generates from there. Usually
    those of the whole text are; where a token would span a cut (a newline before the cut merging
    with spaces after it), the pieces between the cuts are tokenised one after the other.
    Raises UserError for a text whose pieces have no tokens that are the text when they are put together.
    """
    whole = token_ids(tokenizer, texts)
    prefixes = [text[:c] for text, cs in zip(texts, cuts, strict=True) for c in cs]
    heads = iter(token_ids(tokenizer, prefixes))
    tokens: list[tuple[list[int], list[int]]] = []
    for row, (text, ids, places) in enumerate(zip(texts, whole, cuts, strict=True)):
        before = [next(heads) for _ in places]
        if all(ids[: len(head)] == head for head in before):
            tokens.append((ids, [len(head) for head in before]))
            continue
        ids, ends = [], []
        for start, end in pairwise([0, *places, len(text)]):
            ids = ids + continuation(tokenizer, ids, text[:start], text[start:end], row)
            ends.append(len(ids))
        tokens.append((ids, ends[:-1]))
    return tokens


def continuation(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], before: str, piece: str, row: int
) -> list[int]:
    """Tokens of `piece` that continue `ids`, the tokens of the text `before`.

    Alone, the piece may gain what a tokenizer puts at the begin of a text (the "▁" of SentencePiece, the
    blank of RoBERTa) or of a word (BERT). Behind some character that stays a token of its own it does not.
    What is right is what decodes to the text.
    """
    both = before + piece
    right = {both, decoded(tokenizer, token_ids(tokenizer, [both])[0])}
    contexts = dict.fromkeys(["", *reversed(before), *string.printable])
    for context in contexts:
        lead, more = token_ids(tokenizer, [context, context + piece])
        tail = more[len(lead) :]
        if more[: len(lead)] == lead and decoded(tokenizer, ids + tail) in right:
            return tail
    raise RowError(
        row,
        f"the tokenizer cannot part {before[-30:]!r} from the {piece[:30]!r} "
        "that the model shall learn, without a change of the text; move a blank or a line break from the end "
        "of the prompt to the begin of the completion, or the other way round",
    )


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of these tokens; the tokens themselves where the tokenizer has no rule to decode them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.decoder is None:
        return "".join(tokenizer.convert_ids_to_tokens(list(ids)))
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # verbose=False: texts beyond the model's length are cut later, a warning would mislead.
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
