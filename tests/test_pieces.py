"""What a model learns after a prompt is the row's text, whatever a tokenizer does at the begin of a text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.styles import CHAT, LINES, STYLES, style
from transformers import PreTrainedTokenizerFast

from fedhl.errors import UserError
from fedhl.task.causal import encode_completion
from fedhl.task.examples import IGNORED
from fedhl.task.pieces import tokenize

LOSSLESS = [name for name in STYLES if name not in ("t5", "wordpiece")]
words = st.text(st.sampled_from("abnok:; \n"), max_size=8)


def alone(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    # a byte-level tokenizer leaves the blank that it put before the text
    blank = getattr(tokenizer.backend_tokenizer.pre_tokenizer, "add_prefix_space", False)
    return text.removeprefix(" ") if blank else text


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=60, deadline=None)
@given(prompt=words, completion=words, rest=words)
def test_the_pieces_are_the_text(name: str, prompt: str, completion: str, rest: str) -> None:
    tokenizer, text = style(name), prompt + completion + rest
    cuts = [len(prompt), len(prompt + completion)]
    try:
        ((ids, (start, end)),) = tokenize(tokenizer, [text], [cuts])
    except UserError as error:
        assert name not in LOSSLESS and "row 0 (counted from 0)" in str(error)
        return
    assert ids[:start] == alone(tokenizer, prompt)  # what the model sees when it generates
    for upto, part in ((end, prompt + completion), (len(ids), text)):
        got = text_of(tokenizer, ids[:upto])
        # What a tokenizer loses of a text (t5: blanks at its ends) it loses of the whole text.
        assert got in (part, text_of(tokenizer, alone(tokenizer, part)))
        if name in LOSSLESS and not part.startswith((" ", "\n")):
            assert got == part


@pytest.mark.parametrize("template", [None, CHAT, LINES], ids=["plain", "chat", "lines"])
@pytest.mark.parametrize("name", LOSSLESS)
def test_completions_after_prompts_that_end_in_a_blank(name: str, template: str | None) -> None:
    tokenizer = style(name, template)
    prompts, answers = ["a: ", "the dog ran.", "ab:\n", "no ok: "], ["no", " ok", "noon", "ok ok!"]
    pairs = [(prompt, answer) for prompt in prompts for answer in answers]
    encoded = encode_completion(tokenizer, [p for p, _ in pairs], [a for _, a in pairs], 99)
    assert encoded.rows == [*range(16)]
    for example, (prompt, answer) in zip(encoded.examples, pairs, strict=True):
        assert isinstance(example.labels, list)
        start = example.labels.count(IGNORED)
        assert example.labels[start:] == example.input_ids[start:]
        whole = text_of(tokenizer, example.input_ids)
        if template is None:
            assert whole == prompt + answer + "</s>"
        elif template == LINES:
            assert whole == f"user: {prompt} \nassistant: {answer} \n"
        else:
            assert f"{prompt}</s>" in whole and whole.endswith(f"{answer}</s>")
        # after the prompt the answer has no blank but its own
        learnt = whole.removeprefix(text_of(tokenizer, example.input_ids[:start]))
        assert answer in learnt
        if template != CHAT:
            assert learnt.startswith(answer)


def test_a_word_goes_on() -> None:
    tokenizer = style("wordpiece")
    ((ids, (start,)),) = tokenize(tokenizer, ["noon"], [[2]])
    assert tokenizer.convert_ids_to_tokens(ids) == ["no", "##on"]
    assert start == 1


def test_a_row_that_cannot_be_parted_is_refused() -> None:
    """BertPreTokenizer parts words at blanks and forgets them, so that "a" cannot go on with "#"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    known = {"<unk>": 0, "ab": 1, "a": 2, "b": 3}
    rules = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rules.decoder = decoders.WordPiece(cleanup=False)
    words = PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>", eos_token="<unk>")
    assert [e.input_ids for e in encode_completion(words, ["a "], ["b"], 9).examples] == [[2, 3, 0]]
    said = (
        r"row 1 (counted from 0): the tokenizer cannot part 'a' from the 'b' that the model shall"
    )
    with pytest.raises(UserError, match=re.escape(said)):
        encode_completion(words, ["a ", "a"], ["b", "b"], 9)
