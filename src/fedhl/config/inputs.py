"""What is trained, on what: the model, the rows, the clients, the adapters."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from fedhl.strict import Strict


class ModelConfig(Strict):
    """The base model: frozen, the same for everyone."""

    source: str
    """A Hugging Face hub id, a local folder, a .gguf file, or `package:import_name/path/inside`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """How the frozen base weights are stored; adapters are always float32."""
    four_bit: bool = False
    """Load the base in 4-bit NF4 through bitsandbytes (CUDA only)."""
    gradient_checkpointing: bool = False
    """Trade compute for memory in the backward pass."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The base model's own dropout while training; null: as the checkpoint says. 0 is faster."""


class HeldOut(Strict):
    """Rows for evaluating the global model: another source, or a part of `data.source`."""

    source: str | None = None
    """A file or hub id of its own."""
    split: str | None = None
    """The split of a hub data set."""
    count: PositiveInt | None = None
    """So many rows (of `source`: the first so many)."""
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """This share of the rows of `data.source`."""

    @model_validator(mode="after")
    def one_rule(self) -> HeldOut:
        if self.source is None and self.split is None:
            if (self.count is None) == (self.fraction is None):
                raise ValueError("give exactly one of count, fraction, or a source")
        elif self.fraction is not None:
            raise ValueError(
                "fraction is a share of data.source; with a source of its own give count"
            )
        return self


class DataConfig(Strict):
    """The rows, and which of them the server keeps for evaluation."""

    source: str
    """A .jsonl, .json, .csv, .tsv (all also .gz) or .parquet file, `package:import_name/path/inside`, or a
    hub id (`owner/name`, `owner/name:configuration`)."""
    split: str | None = None
    """The split of a hub data set (train unless given)."""
    where: dict[str, Any] = Field(default_factory=dict)
    """Use only rows whose field has this value, or one of these: `{source: rotten_tomatoes}`. Also of the
    files that clients bring; a source of its own in held_out is taken whole."""
    limit: PositiveInt | None = None
    """Use so many rows, drawn at random by the run's seed."""
    held_out: HeldOut | None = HeldOut(fraction=0.1)
    """Rows kept from the clients to evaluate the global model; null if the server has no data."""
    validation: PositiveInt | None = None
    """So many more rows of `data.source` kept from the clients: settings are chosen by these, so that
    the held-out rows stay unseen."""

    @field_validator("where")
    @classmethod
    def where_rule(cls, where: dict[str, Any]) -> dict[str, Any]:
        for field, wanted in where.items():
            values = wanted if isinstance(wanted, list) else [wanted]
            if not values or not all(isinstance(v, str | int | float) for v in values):
                raise ValueError(
                    f"expected a value of the field {field!r} or a list of them, got {wanted!r}"
                )
        return where


class IIDPartition(Strict):
    """Every client holds rows of the same kind."""

    kind: Literal["iid"]
    clients: PositiveInt
    """How many clients share the rows equally and at random: client-0, client-1, ..., or, of more than ten,
    client-00, client-01, ..."""


class DirichletPartition(Strict):
    """Label skew: every client holds its own mixture of labels."""

    kind: Literal["dirichlet"]
    clients: PositiveInt
    """How many clients."""
    alpha: PositiveFloat
    """Skew: each label is spread over clients by Dirichlet(alpha); small is very uneven."""
    by: str | None = None
    """The field whose values are spread unevenly; the label unless given."""
    min_examples: PositiveInt = 1
    """Redraw until every client has so many rows."""


class ColumnPartition(Strict):
    """Natural clients: a field says whose a row is."""

    kind: Literal["by-column"]
    column: str
    """One client for each value of this field, which is its id."""


class LoRAConfig(Strict):
    """The adapters: where, how large, and how they start."""

    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Module names that get an adapter, e.g. [q_proj, v_proj], or all linear layers."""
    ranks: PositiveInt | list[PositiveInt] | dict[str | int, Any] = 8
    """One rank for all; a list with one per client (in the order of their ids as text); `{shares:
    {4: 0.6, 64: 0.4}}` to draw them; or `{clients: {asyncio: 4}, default: 8}` by client id."""
    alpha: PositiveFloat | str = "2r"
    """LoRA's alpha: a number, or proportional to the rank as in `2r`. The scale is alpha / rank."""
    rslora: bool = False
    """Rank-stabilised: the scale is alpha / sqrt(rank)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before A during training."""
    start: str | None = None
    """Folder of a PEFT adapter to start from, of at most the largest rank."""

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
    def rank_rule(cls, value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {"shares"}:
            return RankShares.model_validate(value).model_dump()
        if isinstance(value, dict) and "clients" in value and set(value) <= {"clients", "default"}:
            return RankByClient.model_validate(value).model_dump()
        ranks = value if isinstance(value, list) else [value]
        for rank in ranks:
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(
                    "expected ranks of at least 1: one for all, a list, {shares: {rank: share, ...}} or "
                    f"{{clients: {{id: rank}}, default: rank}}, got {rank!r}"
                )
        return value

    def alpha_of(self, rank: int) -> float:
        if isinstance(self.alpha, str):
            return float(self.alpha.removesuffix("r")) * rank
        return self.alpha

    def scale_of(self, rank: int) -> float:
        return self.alpha_of(rank) / (math.sqrt(rank) if self.rslora else rank)


class RankShares(Strict):
    """Ranks drawn for the clients, in these shares."""

    shares: Annotated[dict[PositiveInt, PositiveFloat], Field(min_length=1)]


class RankByClient(Strict):
    """Ranks by client id, and one for all others."""

    clients: dict[str, PositiveInt]
    default: PositiveInt | None = None
