"""Completions of prompts, and the assistant's turns of chats.

Language models learn from the completion alone: every other token has label -100. Prompts are kept
whole and a row that is too long loses the end of its completion; a row whose prompt leaves room
for no completion token cannot be learned from and is dropped, which `Encoded.rows` shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import PositiveInt

from fedhl.errors import UserError
from fedhl.names import listed
from fedhl.task.examples import IGNORED, Encoded, Example, check_texts
from fedhl.task.pieces import tokenize
from fedhl.task.rows import RowError, Rows, column, located, refuse, shown, text_column
from fedhl.task.texts import TextKind, tokenised

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
Span = tuple[int, int]


class CausalTask(TextKind):
    """A language model that learns completions of prompts, or the assistant's turns in chats."""

    auto: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str | None] = "CAUSAL_LM"
    pipeline: ClassVar[str] = "text-generation"
    head: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    metric: ClassVar[str] = "loss"

    kind: Literal["causal-lm"]  # pyright: ignore[reportIncompatibleVariableOverride]
    prompt: str = "prompt"
    """The field that holds the prompt. The loss does not count the prompt's tokens."""
    completion: str = "completion"
    """The field that holds the completion. The loss counts the completion's tokens only."""
    messages: str | None = None
    """A field of chat messages [{role, content}, ...], to use instead of prompt and completion."""
    max_length: PositiveInt = 512
    """Longer rows are cut to this number of tokens."""

    @staticmethod
    def score(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        from torch.nn.functional import cross_entropy

        # each position predicts the next token
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        asked = labels != IGNORED
        return {"loss": cross_entropy(logits[asked], labels[asked], reduction="none")}

    @classmethod
    def usage(cls, named: bool, max_length: int | None) -> list[str]:
        return [
            tokenised(max_length),
            "tokens = model.eval().generate(**inputs, max_new_tokens=20, "
            "pad_token_id=tokenizer.pad_token_id)",
            "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
        ]

    def check(self, rows: Rows, source: str) -> None:
        if self.messages is not None:
            column(rows, self.messages, source)
            return
        text_column(rows, self.prompt, source)
        text_column(rows, self.completion, source)

    def texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        if self.messages is None:
            return row[self.prompt], row[self.completion]
        return tuple(str(m[key]) for m in row[self.messages] for key in ("role", "content"))

    def learnt(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        if self.messages is None:
            return (row[self.completion],)
        return tuple(m["content"] for m in row[self.messages] if m["role"] == "assistant")

    def encode(
        self,
        rows: Rows,
        source: str,
        processor: PreTrainedTokenizerBase,
        labels: Sequence[str] | None,
    ) -> Encoded:
        if self.messages is not None:
            conversations = column(rows, self.messages, source)
            with located(rows, source):
                return encode_chat(processor, conversations, self.max_length)
        prompts = column(rows, self.prompt, source)
        completions = column(rows, self.completion, source)
        with located(rows, source):
            return encode_completion(processor, prompts, completions, self.max_length)


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    max_length: int,
) -> Encoded:
    """Prompt and completion, with loss on the completion.

    With a chat template the prompt is a user message and the completion the assistant's answer,
    up to and including what the template puts at its end. Without one: beginning-of-text token
    if the tokenizer adds it, prompt, completion, end-of-text token.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
    check_texts(prompts, "prompt")
    check_texts(completions, "completion")
    pairs = list(zip(prompts, completions, strict=True))
    if tokenizer.chat_template:
        conversations = [
            [{"role": "user", "content": p}, {"role": "assistant", "content": c}] for p, c in pairs
        ]
        return encode_chat(tokenizer, conversations, max_length)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no end-of-text token, so a completion could never end")
    bos = [tokenizer.bos_token_id]
    if bos != tokenizer("")["input_ids"][:1]:
        bos = []
    tokens = tokenize(tokenizer, [p + c for p, c in pairs], [[len(p)] for p in prompts])
    masked = []
    for ids, (cut,) in tokens:
        ids = [*bos, *ids, eos]
        masked.append((ids, [(len(bos) + cut, len(ids))]))
    return _encoded(masked, max_length)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    max_length: int,
) -> Encoded:
    """Conversations in the model's chat template, with loss on every assistant turn.

    Message i is an assistant's: its tokens are those between the rendering of messages[:i] with
    the generation prompt and the rendering of messages[:i+1]. Both must be prefixes of the whole
    conversation, or the template is refused: it would mislabel tokens.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the model's tokenizer has no chat template; use prompt and completion fields instead "
            "of messages, or a chat model"
        )
    texts: list[str] = []
    spans: list[list[Span]] = []
    problems = map(problem_of, conversations)
    refuse((row, problem) for row, problem in enumerate(problems) if problem)
    for row, messages in enumerate(conversations):
        text, turns = _render_turns(tokenizer, messages, row)
        texts.append(text)
        spans.append(turns)
    cuts = [[cut for span in turns for cut in span] for turns in spans]
    tokens = tokenize(tokenizer, texts, cuts)
    return _encoded(
        [(ids, list(zip(c[::2], c[1::2], strict=True))) for ids, c in tokens], max_length
    )


def _encoded(rows: Iterable[tuple[list[int], list[Span]]], max_length: int) -> Encoded:
    """Label the tokens inside the spans, cut at `max_length`, drop rows with nothing to learn."""
    examples: list[Example] = []
    kept: list[int] = []
    truncated = 0
    starts: list[int] = []
    for row, (ids, spans) in enumerate(rows):
        starts.append(spans[0][0])
        labels = [IGNORED] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        labels = labels[:max_length]
        # The first token is predicted from nothing, so its label does not count.
        if all(label == IGNORED for label in labels[1:]):
            continue
        examples.append(Example(ids[:max_length], labels))
        kept.append(row)
        truncated += len(ids) > max_length
    if starts and not examples:
        raise UserError(
            f"max_length {max_length} leaves no room for a completion in any of {len(starts)} rows: "
            f"the shortest prompt has {min(starts)} tokens with its template; raise max_length"
        )
    return Encoded(examples, kept, truncated)


def _render_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], row: int
) -> tuple[str, list[Span]]:
    """The conversation as text, and where each assistant turn starts and ends in it."""
    text = _render(tokenizer, messages, row)
    spans: list[Span] = []
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = _render(tokenizer, messages[:i], row, add_generation_prompt=True)
        turn = text if i + 1 == len(messages) else _render(tokenizer, messages[: i + 1], row)
        if not (text.startswith(turn) and turn.startswith(head) and done <= len(head)):
            raise RowError(
                row,
                f"the chat template renders message {i} differently once the conversation goes on, so "
                "that the assistant's tokens cannot be told apart. Train on rows with one answer each "
                "(prompt and completion), or use a chat template whose output only grows",
            )
        done = len(turn)
        spans.append((len(head), done))
    return text, spans


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    row: int,
    add_generation_prompt: bool = False,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template raises what Python raises
        raise RowError(row, f"the model's chat template refuses the row: {error}") from error
    assert isinstance(text, str)
    return text


def problem_of(messages: Sequence[Message]) -> str:
    """Why these messages are no conversation to learn from; "" if they are one."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return f"expected a list of messages, got {shown(messages)}"
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            return (
                f"message {i}: expected {{'role': ..., 'content': ...}} with texts, "
                f"got {shown(message)}"
            )
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return f"no assistant message to learn from (roles: {listed(roles)})"
    if roles[0] == "assistant":
        return "the conversation starts with the assistant; put what it answers before it"
    return ""
