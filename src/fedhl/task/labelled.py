"""Texts, or pairs of texts, about which something is said: a class, several labels, a number."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PositiveInt

from fedhl.task.examples import Encoded, Example, check_texts
from fedhl.task.rows import Rows, column, located, refuse, shown, text_column
from fedhl.task.texts import TextKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LabelledText(TextKind):
    """One text, or two, and what is said about it. The output layer is trained whole, beside the adapters."""

    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str | None] = "SEQ_CLS"
    pipeline: ClassVar[str] = "text-classification"
    head: ClassVar[bool] = True

    kind: str
    text: str = "text"
    """The field that holds the text."""
    second: str | None = None
    """The field of a second text, where the question is about a pair: a premise and a hypothesis, two
    sentences that may mean the same; null: there is one text."""
    label: str = "label"
    """The field that holds the label."""
    max_length: PositiveInt = 128
    """Longer texts are cut to this number of tokens; of a pair, the longer text loses tokens first."""

    @abstractmethod
    def targets(
        self, rows: Rows, source: str, labels: Sequence[str] | None
    ) -> Sequence[int | float | tuple[float, ...]]:
        """What the model shall say of each row. Raises UserError, naming the source, the row and the field,
        for a value that is none."""

    def fields(self) -> tuple[str, ...]:
        """The fields of the texts."""
        return (self.text,) if self.second is None else (self.text, self.second)

    def check(self, rows: Rows, source: str) -> None:
        column(rows, self.label, source)
        for field in self.fields():
            text_column(rows, field, source)

    def texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(row[field] for field in self.fields())

    def encode(
        self,
        rows: Rows,
        source: str,
        processor: PreTrainedTokenizerBase,
        labels: Sequence[str] | None,
    ) -> Encoded:
        targets = self.targets(rows, source, labels)
        texts = [column(rows, field, source) for field in self.fields()]
        with located(rows, source):
            return encode_texts(processor, texts, targets, self.max_length)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[str]],
    targets: Sequence[int | float | tuple[float, ...]],
    max_length: int,
) -> Encoded:
    """The texts of all rows, or their first and their second texts, with the tokenizer's special tokens, cut
    at `max_length`; one target each."""
    for part in texts:
        if len(part) != len(targets):
            raise ValueError(f"{len(part)} texts but {len(targets)} labels")
        check_texts(part, "text")
    if not targets:
        return Encoded([], [], 0)

    def ids_of(rows: Sequence[int], **settings: Any) -> list[Any]:
        some: list[Any] = [[part[row] for row in rows] for part in texts]
        found: Any = tokenizer(*some, **settings)
        # A model that tells the texts of a pair apart is told which token is of which text.
        kinds = found.get("token_type_ids") if len(texts) > 1 else None
        kinds = [None] * len(rows) if kinds is None else kinds
        return list(zip(found["input_ids"], kinds, strict=True))

    # verbose=False: a warning of texts beyond the model's length would mislead, since they are cut.
    encoded = ids_of(range(len(targets)), verbose=False)
    long = [row for row, (ids, _) in enumerate(encoded) if len(ids) > max_length]
    if long:  # once more, so that special tokens at the end stay there
        for row, cut in zip(
            long, ids_of(long, truncation=True, max_length=max_length), strict=True
        ):
            encoded[row] = cut
    refuse(
        (row, f"the text {shown(texts[0][row])} has no tokens; fill it in or remove the row")
        for row, (ids, _) in enumerate(encoded)
        if not ids
    )
    examples = [
        Example(ids, target, kinds) for (ids, kinds), target in zip(encoded, targets, strict=True)
    ]
    return Encoded(examples, [*range(len(targets))], len(long))
