"""Classes of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import PositiveInt

from fedhl.task.examples import Encoded, Example, check_texts
from fedhl.task.kind import Kind
from fedhl.task.labels import label_names, named_labels
from fedhl.task.rows import Rows, column, located, refuse, shown, text_column

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class ClassificationTask(Kind):
    """One label per text. The classification head is trained whole, beside the adapters."""

    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str] = "SEQ_CLS"
    pipeline: ClassVar[str] = "text-classification"
    head: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    metric: ClassVar[str] = "accuracy"
    greater: ClassVar[bool] = True
    class_setting: ClassVar[str | None] = "label"

    kind: Literal["sequence-classification"]
    text: str = "text"
    """The field that holds the text."""
    label: str = "label"
    """The field that holds the label."""
    max_length: PositiveInt = 128
    """Longer texts are cut to this number of tokens."""

    @staticmethod
    def model_settings(labels: Sequence[str] | None) -> dict[str, Any]:
        if labels is None:  # as many as the checkpoint has
            return {}
        return {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }

    @staticmethod
    def score(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        from torch.nn.functional import cross_entropy

        loss = cross_entropy(logits, labels, reduction="none")
        return {"loss": loss, "accuracy": logits.argmax(-1) == labels}

    def check(self, rows: Rows, source: str) -> None:
        labels = column(rows, self.label, source)
        with located(rows, source):
            label_names(labels)  # one alone is enough for a client that has its own rows
        text_column(rows, self.text, source)

    def texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return (row[self.text],)

    def encode(
        self,
        rows: Rows,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str] | None,
    ) -> Encoded:
        ids, _ = named_labels(column(rows, self.label, source), rows, source, labels)
        texts = column(rows, self.text, source)
        with located(rows, source):
            return encode_classification(tokenizer, texts, ids, self.max_length)


def encode_classification(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    label_ids: Sequence[int],
    max_length: int,
) -> Encoded:
    """Texts with the tokenizer's special tokens, cut at `max_length`; one class id each."""
    if len(texts) != len(label_ids):
        raise ValueError(f"{len(texts)} texts but {len(label_ids)} labels")
    check_texts(texts, "text")
    if not texts:
        return Encoded([], [], 0)
    # verbose=False: a warning of texts beyond the model's length would mislead, since they are cut.
    encoded = list(tokenizer(list(texts), verbose=False)["input_ids"])
    long = [row for row, ids in enumerate(encoded) if len(ids) > max_length]
    if long:  # once more, so that special tokens at the end stay there
        texts_cut = [texts[row] for row in long]
        cut = tokenizer(texts_cut, truncation=True, max_length=max_length)["input_ids"]
        for row, ids in zip(long, cut, strict=True):
            encoded[row] = ids
    refuse(
        (row, f"the text {shown(texts[row])} has no tokens; fill it in or remove the row")
        for row, ids in enumerate(encoded)
        if not ids
    )
    examples = [Example(ids, label) for ids, label in zip(encoded, label_ids, strict=True)]
    return Encoded(examples, [*range(len(texts))], len(long))
