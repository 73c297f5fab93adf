"""Loss exactly where it belongs, and no row that quietly teaches nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.characters import characters
from tokenizers.processors import TemplateProcessing

from fedhl.errors import UserError
from fedhl.task.causal import encode_chat, encode_completion
from fedhl.task.examples import IGNORED, Encoded, Example, collate
from fedhl.task.labelled import encode_texts
from fedhl.task.labels import label_ids

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


PLAIN, CHAT = characters(), characters(TEMPLATE)


def token_name(token_id: int) -> str:
    name = PLAIN.convert_ids_to_tokens(token_id)
    assert isinstance(name, str)
    return name


def halves(example: Example) -> list[tuple[str, str]]:
    """(token, its label as a token, or "" where there is no loss) for every position."""
    assert isinstance(example.labels, list) and len(example.labels) == len(example.input_ids)
    names = [token_name(i) for i in example.input_ids]
    labels = ["" if i == IGNORED else token_name(i) for i in example.labels]
    return list(zip(names, labels, strict=True))


def learned(example: Example) -> tuple[str, str]:
    """(all text, the text with loss); also checks that labels are the inputs themselves."""
    pairs = halves(example)
    assert all(label in ("", token) for token, label in pairs)
    return "".join(token for token, _ in pairs), "".join(label for _, label in pairs)


def test_completion_without_a_template() -> None:
    encoded = encode_completion(PLAIN, ["xy"], ["ab"], 100)
    assert [halves(e) for e in encoded.examples] == [
        [("x", ""), ("y", ""), ("ab", "ab"), ("<eos>", "<eos>")]
    ]
    assert (encoded.rows, encoded.truncated) == ([0], 0)
    with_bos = encode_completion(characters(adds_bos=True), ["xy"], ["z"], 100).examples[0]
    assert learned(with_bos) == ("<bos>xyz<eos>", "z<eos>")


def test_completion_in_the_chat_template() -> None:
    encoded = encode_completion(CHAT, ["xy", ""], ["z", ""], 100)
    assert [learned(e) for e in encoded.examples] == [
        ("<bos>[u]xy<eos>[a]z<eos>", "z<eos>"),
        ("<bos>[u]<eos>[a]<eos>", "<eos>"),
    ]


def test_no_token_spans_the_start_of_the_completion() -> None:
    # As one text this would be x, "\n ", y: the model would never see "\n" end a prompt.
    example = encode_completion(PLAIN, ["x\n"], [" y"], 100).examples[0]
    assert halves(example) == [
        ("x", ""), ("\n", ""), (" ", " "), ("y", "y"), ("<eos>", "<eos>")
    ]  # fmt: skip


printable = st.text(st.sampled_from(["a", "b", " ", "\n", "z"]), max_size=12)


@given(printable, printable)
def test_prompt_tokens_are_those_of_generation(prompt: str, completion: str) -> None:
    example = encode_completion(CHAT, [prompt], [completion], 1000).examples[0]
    text, loss = learned(example)
    head = CHAT.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    assert example.input_ids[: len(head)] == head
    assert loss == completion + "<eos>"
    assert text.endswith(loss)


def test_chat_learns_every_assistant_turn() -> None:
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, "012345", strict=True)]
    example = encode_chat(CHAT, [messages], 100).examples[0]
    assert halves(example) == [
        ("<bos>", ""), ("[", ""), ("s", ""), ("]", ""), ("0", ""), ("<eos>", ""),
        ("[", ""), ("u", ""), ("]", ""), ("1", ""), ("<eos>", ""),
        ("[", ""), ("a", ""), ("]", ""), ("2", "2"), ("<eos>", "<eos>"),
        ("[", ""), ("u", ""), ("]", ""), ("3", ""), ("<eos>", ""),
        ("[", ""), ("a", ""), ("]", ""), ("4", "4"), ("<eos>", "<eos>"),
        ("[", ""), ("u", ""), ("]", ""), ("5", ""), ("<eos>", ""),
    ]  # fmt: skip


def test_too_long_rows_lose_their_end_or_are_dropped() -> None:
    encoded = encode_completion(PLAIN, ["xy", "xyxyx", "xyxy", "x"], ["zzzz"] * 4, 5)
    assert [learned(e) for e in encoded.examples] == [
        ("xyzzz", "zzz"),
        ("xyxyz", "z"),
        ("xzzzz", "zzzz"),
    ]
    assert (encoded.rows, encoded.truncated) == ([0, 2, 3], 3)
    with pytest.raises(UserError, match=r"any of 2 rows: the shortest prompt has 5 tokens"):
        encode_completion(PLAIN, ["xyxyxy", "xyxyx"], ["z", "z"], 5)


def test_a_first_token_alone_is_nothing_to_learn() -> None:
    # Nothing precedes it, so the shifted loss would be a mean over no token: NaN.
    assert encode_completion(PLAIN, ["", "x"], ["", ""], 9).rows == [1]


def test_nothing_in_nothing_out() -> None:
    assert encode_completion(CHAT, [], [], 9) == Encoded([], [], 0)
    assert encode_texts(PLAIN, [[]], [], 9) == Encoded([], [], 0)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    rewriting = characters(
        "{% for m in messages %}{{ m['role'][0] }}{% if loop.last %}(think){% endif %}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(UserError, match=r"row 0 .*renders message 1 differently"):
        encode_chat(rewriting, [turn + turn], 100)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "expected a list of messages, got 'hello'"),
        ([], r"expected a list of messages"),
        ([{"role": "user"}], r"row 1 \(counted from 0\): message 0: expected .*'content'"),
        ([{"role": "user", "content": 3}], "message 0"),
        ([{"role": "user", "content": "x"}], r"no assistant message .*roles: user"),
        ([{"role": "assistant", "content": "x"}], "starts with the assistant"),
    ],
)
def test_bad_conversations(messages: list[dict[str, str]], message: str) -> None:
    fine = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(UserError, match=message):
        encode_chat(CHAT, [fine, messages], 100)


def test_bad_prompts() -> None:
    with pytest.raises(UserError, match=r"row 1 .*the completion is int 42, expected text"):
        encode_completion(PLAIN, ["x", "x"], ["y", 42], 9)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="no chat template"):
        encode_chat(PLAIN, [[{"role": "user", "content": "x"}]], 9)
    refusing = characters("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"row 0 .*refuses the row: roles must alternate"):
        encode_completion(refusing, ["x"], ["y"], 9)
    endless = characters()
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        encode_completion(endless, ["x"], ["y"], 9)


# classification


def test_classification() -> None:
    tokenizer = characters(adds_bos=True)
    encoded = encode_texts(tokenizer, [["xyz", "", "xxxxxxx"]], [1, 0, 1], 4)
    tokens = [tokenizer.convert_ids_to_tokens(e.input_ids) for e in encoded.examples]
    assert tokens == [["<bos>", "x", "y", "z"], ["<bos>"], ["<bos>", "x", "x", "x"]]
    assert [e.labels for e in encoded.examples] == [1, 0, 1]
    assert (encoded.rows, encoded.truncated) == ([0, 1, 2], 1)
    with pytest.raises(UserError, match=r"row 1 .*has no tokens"):
        encode_texts(PLAIN, [["x", ""]], [0, 1], 4)
    with pytest.raises(UserError, match=r"row 0 .*the text is NoneType"):
        encode_texts(PLAIN, [[None]], [0], 4)  # pyright: ignore[reportArgumentType]


def test_a_text_that_is_cut_keeps_the_token_at_its_end() -> None:
    tokenizer = characters()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    encoded = encode_texts(tokenizer, [["xyzxyz", "xy", "xyz"]], [0, 1, 0], 4)
    tokens = [tokenizer.convert_ids_to_tokens(e.input_ids) for e in encoded.examples]
    assert tokens == [["<bos>", "x", "y", "<eos>"]] * 3
    assert encoded.truncated == 2  # the second is as long without a cut


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "\x7f", "a\u2028b", "\ud83d"])
def test_labels_that_cannot_be_printed(name: str) -> None:
    with pytest.raises(UserError, match=r"row 1 .* the label '.*' has a control character"):
        label_ids(["a", name])


def test_label_ids() -> None:
    assert label_ids([10, 2, 2, 1]) == ([2, 1, 1, 0], ["1", "2", "10"])
    assert label_ids(["10", "2"]) == label_ids([10.0, 2]) == ([1, 0], ["2", "10"])
    assert label_ids(["pos", "neg", "pos"]) == ([1, 0, 1], ["neg", "pos"])
    assert label_ids(["pos"], known=["pos", "neg"]) == ([0], ["pos", "neg"])


@pytest.mark.parametrize(
    ("values", "known", "message"),
    [
        (["pos", "meh"], ["neg", "pos"], r"row 1 .*'meh', which was not in training.*neg, pos"),
        ([0, None], None, r"row 1 .*None is no class"),
        ([0, 0.5], None, r"row 1 .*0\.5 is no class"),
        ([["a"]], None, "one label expected"),
        (["a", "a"], None, r"all 2 rows have the same label \['a'\]"),
    ],
)
def test_bad_labels(values: list[object], known: list[str] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        label_ids(values, known)


# batches


def test_collate_pads_on_the_right() -> None:
    batch = collate([Example([5, 6, 7], [IGNORED, 6, 7]), Example([8], [8])], pad_id=9)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[IGNORED, 6, 7], [8, IGNORED, IGNORED]],
    }
    batch = collate([Example([5, 6], 1), Example([8], 0)], pad_id=9)
    assert batch["labels"].tolist() == [1, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
