"""What is trained, on what: the model, the rows, the clients, the adapters."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from fedhl.config.ranks import OneRank, RankByClient, RankList, RankRule, RankShares
from fedhl.strict import Strict


class ModelConfig(Strict):
    """The base model. It is frozen, and the same for every client."""

    source: str
    """A Hugging Face hub id, a local folder, a .gguf file, or `package:import_name/path/inside`."""
    revision: str | None = None
    """The branch, tag or commit of a model on the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type in which the frozen base weights are stored. Adapters are always float32."""
    four_bit: bool = False
    """Load the base weights in 4-bit NF4 through bitsandbytes (CUDA only)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: slower, with less memory."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The dropout probability inside the base model during training; null: what the checkpoint says. 0 is the
    fastest, and drops no layers either."""
    fresh_head: bool = False
    """Draw the classification head anew, even where the checkpoint has one. Otherwise the head of a
    checkpoint is kept, with its rows in the order of the data's labels, if it was trained for the same
    labels; if it was trained for others, it is refused."""


def text_encoding(name: str) -> str:
    """The name, if Python knows an encoding of text by it. Raises ValueError otherwise."""
    try:
        "a".encode(name)
    except (LookupError, UnicodeError, ValueError):
        raise ValueError(
            f"expected the name of a text encoding such as utf-8, latin-1 or cp1252, got {name!r}"
        ) from None
    return name


class HeldOut(Strict):
    """The rows that the global model is evaluated on: a part of `data.source`, or another source."""

    source: str | None = None
    """A file or hub id for the held-out rows alone."""
    split: str | None = None
    """A split of a data set on the hub."""
    count: PositiveInt | None = None
    """The number of held-out rows. From a source or split of its own the first rows are taken, otherwise
    rows of `data.source` are drawn."""
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share of the rows of `data.source` that is held out."""

    @model_validator(mode="after")
    def one_rule(self) -> HeldOut:
        if self.source is None and self.split is None:
            if (self.count is None) == (self.fraction is None):
                raise ValueError("give exactly one of count, fraction, or a source")
        elif self.fraction is not None:
            raise ValueError(
                "fraction is a share of data.source; beside a source or split, give count instead"
            )
        return self


class DataConfig(Strict):
    """The rows, and which of them the server keeps for evaluation."""

    source: str
    """A .jsonl, .json, .csv, .tsv (each also as .gz) or .parquet file, `package:import_name/path/inside`, or
    a hub id (`owner/name`, `owner/name:configuration`)."""
    split: str | None = None
    """The split of a data set on the hub; null: train."""
    where: dict[str, Any] = Field(default_factory=dict)
    """Use only the rows in which a field has this value, or one of these values:
    `{source: rotten_tomatoes}`. The rule also selects among the rows that clients bring, but not among those
    of `held_out.source`."""
    encoding: Annotated[str, AfterValidator(text_encoding)] = "utf-8"
    """The encoding of text files with rows, as Python names it: utf-8, latin-1, cp1252, utf-16, ... A byte
    order mark at the begin of a file is left out."""
    limit: PositiveInt | None = None
    """Use this number of rows, drawn at random by the run's seed; null: use all rows."""
    held_out: HeldOut | None = HeldOut(fraction=0.1)
    """The rows that no client gets, to evaluate the global model on; null: the server has no rows."""
    validation: PositiveInt | None = None
    """The number of further rows of `data.source` that no client gets. Settings are chosen by these rows, so
    that the held-out rows stay unseen; null: no such rows."""

    @field_validator("where")
    @classmethod
    def where_rule(cls, where: dict[str, Any]) -> dict[str, Any]:
        for field, wanted in where.items():
            values = wanted if isinstance(wanted, list) else [wanted]
            if not values or not all(isinstance(v, str | int | float) for v in values):
                raise ValueError(
                    f"expected a value of the field {field!r}, or a list of such values, got {wanted!r}"
                )
        return where


class IIDPartition(Strict):
    """All clients hold rows from the same distribution."""

    kind: Literal["iid"]
    clients: PositiveInt
    """The number of clients, which share the rows equally and at random. Their ids are client-0, client-1,
    ...; with more than ten clients, client-00, client-01, ..."""


class DirichletPartition(Strict):
    """Label skew: every client holds a mixture of labels of its own."""

    kind: Literal["dirichlet"]
    clients: PositiveInt
    """The number of clients."""
    alpha: PositiveFloat
    """The skew. The rows of each label are spread over the clients by Dirichlet(alpha): a small alpha spreads
    them very unevenly."""
    by: str | None = None
    """The field whose values are spread unevenly; null: the label."""
    min_examples: PositiveInt = 1
    """Draw the partition again until every client has at least this number of rows."""


class ColumnPartition(Strict):
    """Natural clients: a field says which client a row belongs to."""

    kind: Literal["by-column"]
    column: str
    """The field that holds the client's id. Each of its values makes one client."""


class LoRAConfig(Strict):
    """The adapters: which modules have one, of which rank, and how adapters start."""

    targets: list[str] | Literal["all-linear"] = "all-linear"
    """The names of the modules that get an adapter, e.g. [q_proj, v_proj]; `all-linear`: all linear
    layers but the output layer and those that cannot be adapted, which `fedhl check` names."""
    ranks: RankRule = OneRank(8)
    """One rank for all clients; a list with a rank per client, in the order of the clients' ids as text;
    `{shares: {4: 0.6, 64: 0.4}}` to draw the ranks; or `{clients: {asyncio: 4}, default: 8}` by client id."""
    alpha: PositiveFloat | str = "2r"
    """LoRA's alpha: a number, or a multiple of the rank such as `2r`. The scale is alpha / rank."""
    rslora: bool = False
    """Rank-stabilised LoRA: the scale is alpha / sqrt(rank)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The dropout probability before A during training."""
    start: str | None = None
    """The folder of a PEFT adapter to start from. Its rank is at most the largest of `ranks`; null: start
    from a new adapter."""

    # Checked before pydantic, which would report a mistake once for every member of a union.

    @field_validator("targets", mode="before")
    @classmethod
    def target_rule(cls, value: Any) -> Any:
        if value != "all-linear" and not (isinstance(value, list) and value):
            raise ValueError(
                f"expected a list of module names such as [query, value], or all-linear, got {value!r}"
            )
        return value

    @field_validator("alpha", mode="before")
    @classmethod
    def alpha_rule(cls, value: Any) -> Any:
        factor = value.removesuffix("r") if isinstance(value, str) else value
        try:
            good = value != factor or not isinstance(value, str)
            good = good and 0 < float(factor) < math.inf and not isinstance(value, bool)
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ValueError(
                f"expected a number above 0, or a multiple of the rank such as 2r, got {value!r}"
            )
        return value

    @field_validator("ranks", mode="before")
    @classmethod
    def rank_rule(cls, value: Any) -> RankRule:
        if isinstance(value, RankRule):
            return value
        if isinstance(value, dict) and set(value) == {"shares"}:
            return RankShares.model_validate(value)
        if isinstance(value, dict) and "clients" in value and set(value) <= {"clients", "default"}:
            return RankByClient.model_validate(value)
        ranks = value if isinstance(value, list) else [value]
        for rank in ranks:
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(
                    "expected ranks of at least 1: one for all, a list, {shares: {rank: share, ...}} or "
                    f"{{clients: {{id: rank}}, default: rank}}, got {rank!r}"
                )
        return (RankList if isinstance(value, list) else OneRank).model_validate(value)

    def alpha_of(self, rank: int) -> float:
        if isinstance(self.alpha, str):
            return float(self.alpha.removesuffix("r")) * rank
        return self.alpha

    def scale_of(self, rank: int) -> float:
        return self.alpha_of(rank) / (math.sqrt(rank) if self.rslora else rank)
