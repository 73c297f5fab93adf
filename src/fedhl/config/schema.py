"""The configuration of a run: one YAML file, strictly checked before anything is loaded or trained."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from fedhl.errors import UserError
from fedhl.method import Method
from fedhl.methods import METHODS, get_method
from fedhl.seeds import generator
from fedhl.server.channel import sends_products
from fedhl.server.privacy import why_not
from fedhl.server.robust import Guard, Median, Trimmed
from fedhl.weighting import WEIGHTINGS, Weighting, get_weighting


class Strict(BaseModel):
    """Unknown keys are errors, values do not change, and the text under a field is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def named(value: Any) -> Any:
    """`method: fedhl` is short for `method: {name: fedhl}`."""
    return {"name": value} if isinstance(value, str) else value


class Named(BaseModel):
    """A name and its hyperparameters, e.g. `{name: truncation, power: 2, epsilon: 0.001}`. All of them, also
    those that were left at their defaults: what a run folder says holds when a default has changed."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


def complete(value: Any, table: Mapping[str, type[Any]], get: Callable[..., Any]) -> Any:
    """`{name: ..., hyperparameters}` with those that were not given; a class from elsewhere is left as it is.
    Raises ValueError for an unknown name, an unknown hyperparameter or a value of the wrong type."""
    if not (isinstance(value, dict) and isinstance(value.get("name"), str)):
        return value  # what is wrong with it, the fields say
    given = {str(key): x for key, x in value.items() if key != "name"}
    if value["name"] not in table:
        get(value["name"], **given)
        return value
    cls = table[value["name"]]
    types = get_type_hints(cls)
    names = [field.name for field in fields(cls)]
    for key in (name for name in names if name in given):
        try:
            TypeAdapter(types[key]).validate_python(given[key], strict=True)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise ValueError(f"{key} should be {said}, got {given[key]!r}") from None
    built = get(value["name"], **given)
    return {"name": value["name"]} | {name: getattr(built, name) for name in names}


class MethodConfig(Named):
    """An aggregation method and its hyperparameters; `fedhl methods` lists them."""

    @model_validator(mode="before")
    @classmethod
    def known(cls, value: Any) -> Any:
        return complete(value, METHODS, get_method)

    def build(self) -> Method[Any]:
        return get_method(self.name, **self.hyperparameters)


class WeightingConfig(Named):
    """How clients are weighted, and its hyperparameters; `fedhl methods` lists them."""

    @model_validator(mode="before")
    @classmethod
    def known(cls, value: Any) -> Any:
        return complete(value, WEIGHTINGS, get_weighting)

    def build(self) -> Weighting:
        return get_weighting(self.name, **self.hyperparameters)


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


class ClassificationTask(Strict):
    """One label per text; the classification head is trained whole, beside the adapters."""

    kind: Literal["sequence-classification"]
    text: str = "text"
    """The field that holds the text."""
    label: str = "label"
    """The field that holds the label."""
    max_length: PositiveInt = 128
    """Longer texts are cut to this many tokens."""


class CausalTask(Strict):
    """A language model that learns completions of prompts, or the assistant's turns of chats."""

    kind: Literal["causal-lm"]
    prompt: str = "prompt"
    """The field that holds the prompt; no loss is taken on it."""
    completion: str = "completion"
    """The field that holds the completion; the loss is taken on its tokens only."""
    messages: str | None = None
    """A field of chat messages [{role, content}, ...] to use in place of prompt and completion."""
    max_length: PositiveInt = 512
    """Longer rows are cut to this many tokens."""


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
    where: dict[str, Any] = {}
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


class Participation(Strict):
    """Which clients take part in a round, drawn anew by the run's seed."""

    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """This share of the clients, at least one; all of them unless this or `count` is given."""
    count: PositiveInt | None = None
    """So many clients."""
    stragglers: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that a client is slow in a round and trains only its last layers, down to a depth drawn
    anew; each layer is averaged over those who returned it, bias-corrected."""
    layers: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    """Clients that train only some layers, by parts of their names: `{client-3: [layer.4, layer.5]}`."""

    @model_validator(mode="before")
    @classmethod
    def everyone(cls, given: Any) -> Any:
        if isinstance(given, dict) and not {"fraction", "count"} & set(given):
            return {**given, "fraction": 1.0}
        return given

    @model_validator(mode="after")
    def one_rule(self) -> Participation:
        if (self.fraction is None) == (self.count is None):
            raise ValueError("give exactly one of fraction and count")
        return self

    def rate(self, clients: int) -> float:
        """The probability that one of so many clients takes part in a round."""
        return min(1.0, self.count / clients) if self.count is not None else self.fraction or 1.0

    def size(self, clients: int) -> int:
        if self.count is not None:
            return min(self.count, clients)
        return max(1, round((self.fraction or 1.0) * clients))


class ChannelConfig(Strict):
    """Over-the-air computation: signals of all clients add up on the way, with the receiver's noise."""

    kind: Literal["air"]
    snr_db: Annotated[float, Field(allow_inf_nan=False)]
    """Signal-to-noise ratio, in decibels, of a client that transmits at power 1."""
    power: PositiveFloat = 1.0
    """The limit on each client's mean power per number; the weakest decides for all."""


class WireConfig(Strict):
    """What travels between the server and its clients."""

    payload: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    """The type of adapters on the wire, both ways; runs in one process round as the wire does. int8 has one
    step for each component of each factor. The head always travels as float32."""


class MedianRule(Strict):
    """Refuse clients who move much further than the others of the round."""

    kind: Literal["median"]
    factor: Annotated[float, Field(ge=1)] = 5.0
    """Refuse who moves more than so many times the median of those who arrived."""

    def build(self) -> Median:
        return Median(self.factor)


class TrimmedRule(Strict):
    """Refuse the clients who move furthest, honest or not."""

    kind: Literal["trimmed"]
    share: Annotated[float, Field(gt=0, lt=1)]
    """Refuse this share of those who arrived, rounded down."""

    def build(self) -> Trimmed:
        return Trimmed(self.share)


class RobustConfig(Strict):
    """What becomes of clients who move too far, by the norm of the change of their products, over all
    layers, and of their head. No privacy comes of it."""

    clip: PositiveFloat | None = None
    """Scale the change of each client down to this norm; null: do not clip."""
    reject: Annotated[MedianRule | TrimmedRule, Field(discriminator="kind")] | None = None
    """Refuse clients, before the others are clipped; null: none."""

    @model_validator(mode="after")
    def one_rule(self) -> RobustConfig:
        if self.clip is None and self.reject is None:
            raise ValueError("give clip, reject, or both")
        return self

    def build(self) -> Guard:
        return Guard(self.clip, self.reject and self.reject.build())


class PrivacyConfig(Strict):
    """Client-level differential privacy of all that leaves the server: docs/privacy.md says what that
    protects. In a round every client takes part with the probability q that `participation` gives, on
    its own, and counts for 1/(q N) of N; clients are weighted alike."""

    clip: PositiveFloat
    """Scale the change of each client, over all layers and the head, down to this norm."""
    noise: PositiveFloat
    """The noise multiplier: the standard deviation of the noise, in units of what one client can move."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """The δ at which ε is reported; well below 1 over the number of clients."""


class TrainingConfig(Strict):
    """What a client does in one round."""

    steps: PositiveInt | None = None
    """Optimizer steps per round, in place of `epochs`."""
    epochs: PositiveFloat | None = None
    """Passes over the client's rows per round, 1 unless given; may be a fraction."""
    batch_size: PositiveInt = 16
    """Rows per optimizer step."""
    accumulation: PositiveInt = 1
    """Split each batch into so many parts to save memory."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """A fresh optimizer starts every client round."""
    learning_rate: PositiveFloat = 1e-3
    """The peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls over the whole run, across rounds."""
    warmup_rounds: NonNegativeInt = 0
    """The learning rate rises linearly over so many rounds first."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay on the adapter and the head."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the gradient to this norm; null: do not clip."""

    @model_validator(mode="after")
    def one_rule(self) -> TrainingConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into accumulation={self.accumulation} parts"
            )
        return self

    def steps_for(self, examples: int) -> int:
        """Optimizer steps of one round on so many rows."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 1.0) * examples / min(self.batch_size, examples)))


class EvaluationConfig(Strict):
    """When the global model is evaluated, and on what beside the server's rows."""

    every: PositiveInt = 1
    """Evaluate after every so many rounds (and always after the last)."""
    batch_size: PositiveInt = 64
    """Rows per forward pass."""
    client_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each client's rows that it never trains on, to report the mean and the worst client. Unless
    given, 0.1 where the server has no rows (`data.held_out: null`) and without privacy, else 0."""


class ComputeConfig(Strict):
    """Where and how precisely to compute."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: forward passes run under autocast; the weights stay as they are."""
    threads: PositiveInt | None = None
    """CPU threads; results are reproducible for one number of threads."""


class TasksConfig(Strict):
    """New labels arrive over time: the rounds are shared out among tasks, one after the other. A task
    trains on the rows of its own labels, which compete only with each other; the head's rows of other
    labels stay as they are. The learning rate's schedule begins anew with each task."""

    count: Annotated[int, Field(ge=2)] | None = None
    """Split the labels into so many tasks, as equal as possible, in an order drawn by the run's seed."""
    groups: list[list[Any]] | None = None
    """Or the labels of each task, at least two, each label in one task: `[[cat, dog], [fern, oak]]`."""

    @field_validator("groups", mode="before")
    @classmethod
    def group_rule(cls, groups: Any) -> Any:
        if not isinstance(groups, list) or len(groups) < 2:
            raise ValueError(f"expected a list of at least two lists of labels, got {groups!r}")
        for group in groups:
            if not isinstance(group, list) or len(group) < 2:
                raise ValueError(f"expected at least two labels in every task, got {group!r}")
            if not all(isinstance(label, str | int) for label in group):
                raise ValueError(f"expected labels, got {group!r}")
        names = [str(label) for group in groups for label in group]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"label {twice[0]!r} is given twice")
        return groups

    @model_validator(mode="after")
    def one_rule(self) -> TasksConfig:
        if (self.count is None) == (self.groups is None):
            raise ValueError("give exactly one of count and groups")
        return self

    @property
    def number(self) -> int:
        return self.count or len(self.groups or ())


class CheckpointConfig(Strict):
    """What stays on disk."""

    keep: Annotated[int, Field(ge=2)] = 2
    """How many of the last checkpoints stay on disk, beside the best."""


class FederationConfig(Strict):
    """Clients on other machines (`fedhl serve`): whom the server waits for, and how long."""

    clients: PositiveInt | None = None
    """The first round begins when so many clients have reported; null: as many as the partition makes, if
    it says how many (by-column does not: then give it)."""
    minimum: PositiveInt = 1
    """Later rounds begin with at least so many clients there."""
    top_rank: PositiveInt = 256
    """A client that brings its own data and rank is refused with a larger one: it would cost the others."""
    deadline: PositiveFloat = 3600.0
    """Seconds that a round waits for its clients before it goes on without those that are missing."""


class Config(Strict):
    """Everything that decides a run. `fedhl check CONFIG` shows what it amounts to."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run's name, and its folder: runs/NAME."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The root of every random draw."""
    model: ModelConfig
    task: Annotated[ClassificationTask | CausalTask, Field(discriminator="kind")]
    """What is learnt: the labels of texts, or completions."""
    data: DataConfig
    partition: Annotated[
        IIDPartition | DirichletPartition | ColumnPartition, Field(discriminator="kind")
    ]
    """Which client has which rows: drawn (iid, dirichlet), or by a field (by-column)."""
    lora: LoRAConfig = LoRAConfig()
    method: Annotated[MethodConfig, BeforeValidator(named)] = MethodConfig(name="fedhl")
    """How updates are combined and what is sent back, by name or as `{name: fedsvd, period: 4}`;
    [which one](methods.md#which-one)."""
    weighting: Annotated[WeightingConfig | None, BeforeValidator(named)] = None
    """How clients are weighted, by name or as `{name: balanced, lam: 0.1}`; null: as the method's paper
    does (`fedhl methods` shows it). [Which one](methods.md#weights)."""
    rounds: PositiveInt = 10
    """How many times the server and the clients exchange adapters."""
    tasks: TasksConfig | None = None
    """Class-incremental: labels that arrive over time; null: all of them from the start."""
    participation: Participation = Participation(fraction=1.0)
    channel: ChannelConfig | None = None
    """An analog channel that adds up what the clients transmit at once, for study; null: a digital
    one, without noise."""
    wire: WireConfig = WireConfig()
    robust: RobustConfig | None = None
    """Clip or refuse clients who move too far; null: all count as they are."""
    privacy: PrivacyConfig | None = None
    """Client-level differential privacy, with the extra `fedhl[dp]`; null: none."""
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    compute: ComputeConfig = ComputeConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    federation: FederationConfig = FederationConfig()

    @model_validator(mode="before")
    @classmethod
    def somebody_evaluates(cls, raw: Any) -> Any:
        data = raw.get("data") if isinstance(raw, dict) else None
        if not isinstance(data, dict) or data.get("held_out", "by default") is not None:
            return raw
        if raw.get("privacy"):  # what clients report of themselves is not covered by it
            return raw
        evaluation = raw.get("evaluation") or {}
        if not isinstance(evaluation, dict):
            return raw
        return {**raw, "evaluation": {"client_fraction": 0.1} | evaluation}

    @model_validator(mode="after")
    def analog_payload(self) -> Config:
        if self.channel is not None and self.wire.payload != "float32":
            raise ValueError(
                f"wire.payload: an analog channel transmits the numbers themselves, not {self.wire.payload}; "
                "leave out wire or channel"
            )
        return self

    @model_validator(mode="after")
    def task_rounds(self) -> Config:
        if self.tasks is None:
            return self
        if not isinstance(self.task, ClassificationTask):
            raise ValueError("tasks: only sequence-classification has labels that arrive over time")
        number = self.tasks.number
        if self.rounds % number:
            more = self.rounds + -self.rounds % number
            raise ValueError(
                f"rounds: {self.rounds} rounds cannot be shared equally by {number} tasks; "
                f"set rounds to a multiple of {number}, e.g. {more}"
            )
        return self

    @model_validator(mode="after")
    def robust_method(self) -> Config:
        if self.robust is None or self.robust.clip is None:
            return self
        if not sends_products(self.method.build()):
            raise ValueError(
                f"robust.clip: method {self.method.name!r} combines factors, and scaling those does not "
                "scale their product; use method: fedhl or flexlora, or robust.reject, which goes with "
                "any method"
            )
        return self

    @model_validator(mode="after")
    def privacy_rules(self) -> Config:
        if self.privacy is None:
            return self
        if reason := why_not(self.method.build()):
            raise ValueError(
                f"privacy: method {self.method.name!r} {reason}; use method: fedhl, fedhera or fed_plora"
            )
        if self.weighting is not None and self.weighting.name != "uniform":
            raise ValueError(
                f"privacy: weighting {self.weighting.name!r} would let one client change the weights of "
                "others; leave it out, or use weighting: uniform"
            )
        for name, given in (
            ("participation.stragglers", self.participation.stragglers),
            ("channel", self.channel),
            ("tasks", self.tasks),
            ("robust", self.robust),
        ):
            if given:
                raise ValueError(
                    f"privacy: {name} cannot go with it, since the bound on what one client can move "
                    f"would not hold; leave {name} out"
                )
        return self

    @property
    def period(self) -> int:
        """The rounds of one task; without tasks, of the whole run."""
        return self.rounds // self.tasks.number if self.tasks else self.rounds

    @property
    def weighting_used(self) -> WeightingConfig:
        """The weighting that was named, or that of the method; with privacy, uniform."""
        if self.privacy is not None:
            return WeightingConfig(name="uniform")
        theirs = getattr(self.method.build(), "weighting", "examples")
        return self.weighting or WeightingConfig(name=theirs)


def assign_ranks(config: LoRAConfig, clients: Sequence[str], seed: int) -> dict[str, int]:
    """The rank of every client. Raises UserError if the rule does not fit these clients."""
    rule = config.ranks
    if isinstance(rule, int):
        return dict.fromkeys(clients, rule)
    if isinstance(rule, list):
        if len(rule) != len(clients):
            raise UserError(
                f"lora.ranks: the list has {len(rule)} ranks for {len(clients)} clients; give one per "
                f"client, one rank for all, or {{shares: {{4: 0.5, 16: 0.5}}}}"
            )
        return dict(zip(clients, rule, strict=True))
    if "shares" in rule:
        return draw_ranks(rule["shares"], clients, seed)
    by_client, default = rule["clients"], rule["default"]
    for name in by_client:
        if name not in clients:
            raise UserError(f"lora.ranks.clients: {unknown(name, clients, 'client')}")
    missing = [name for name in clients if name not in by_client]
    if missing and default is None:
        raise UserError(f"lora.ranks: client {missing[0]!r} has no rank; name it or give a default")
    return {name: by_client.get(name, default) for name in clients}


def draw_ranks(shares: Mapping[int, float], clients: Sequence[str], seed: int) -> dict[str, int]:
    """Ranks in these shares of the clients, to the nearest client, in an order drawn by the seed."""
    total = sum(shares.values())
    quotas = {rank: share / total * len(clients) for rank, share in sorted(shares.items())}
    counts = {rank: math.floor(quota) for rank, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda rank: counts[rank] - quotas[rank])
    for rank in by_remainder[: len(clients) - sum(counts.values())]:
        counts[rank] += 1
    ranks = [rank for rank, count in counts.items() for _ in range(count)]
    order = torch.randperm(len(ranks), generator=generator(seed, "ranks")).tolist()
    return {name: ranks[k] for name, k in zip(clients, order, strict=True)}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with `a.b=value` overrides. Raises UserError, naming the field."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    try:
        raw = yaml.load(text, Loader=ConfigLoader)
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"config file {path} must hold a mapping of settings, got {type(raw).__name__}"
        )
    for override in overrides:
        set_value(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from None


class ConfigLoader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, as everybody expects (YAML 1.1 reads a string), and a key that
    is given twice an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class ConfigDumper(yaml.SafeDumper):
    """Writes what `ConfigLoader` reads back: the text `1e-3` in quotes, odd line breaks escaped."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        odd = any(character in data for character in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if odd else None)


ConfigDumper.add_representer(str, ConfigDumper.represent_str)


for reader_or_writer in (ConfigLoader, ConfigDumper):
    reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def set_value(raw: dict[str, Any], override: str) -> None:
    """Apply `a.b=value` to a nested mapping; the value is YAML. Raises UserError if it is malformed."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override!r}: expected KEY=VALUE, e.g. --set training.steps=20")
    try:
        value = yaml.load(text, Loader=ConfigLoader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML: {error}") from None
    node: Any = raw
    *parents, last = key.strip().split(".")
    for depth, part in enumerate(parents):
        child = node.get(part)
        if isinstance(child, str) and part in ("method", "weighting"):
            child = named(child)
        if child is None and depth == 0 and part == "method":
            child = {"name": "fedhl"}
        if child is None and depth == 0 and part == "weighting":
            raise UserError(
                f"--set {override!r}: say which weighting has this setting: "
                f"weighting={{name: NAME, {last}: {text}}}"
            )
        if child is None:
            child = {}
        if not isinstance(child, dict):
            where = ".".join(parents[: depth + 1])
            raise UserError(
                f"--set {override!r}: {where} is a single value, not a group of settings"
            )
        node[part] = child
        node = child
    node[last] = value


def unknown(name: str, known: Sequence[str], what: str) -> str:
    """ "unknown WHAT 'name'; did you mean 'near'?" with the known names."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}{hint} (known: {', '.join(known)})"


KINDS: dict[str, tuple[type[Strict], ...]] = {
    "task": (ClassificationTask, CausalTask),
    "partition": (IIDPartition, DirichletPartition, ColumnPartition),
    "reject": (MedianRule, TrimmedRule),
}
"""The groups of settings that come in several kinds."""


def kinds(name: str) -> list[str]:
    return [get_args(member.model_fields["kind"].annotation)[0] for member in KINDS[name]]


def explain(error: ValidationError) -> str:
    """One line per mistake: the field, what was found, what is allowed."""
    return "\n  ".join(dict.fromkeys(explain_one(dict(item)) for item in error.errors()))


def explain_one(item: dict[str, Any]) -> str:
    unsaid = {"[key]", *(kind for name in KINDS for kind in kinds(name))}
    location = [str(part) for part in item["loc"] if part not in unsaid]
    field = ".".join(location) or "config"
    if item["type"] == "extra_forbidden":
        return f"{field}: {unknown(location[-1], siblings(item['loc']), 'key')}"
    if item["type"] == "missing":
        return f"{field}: required, but not given"
    if item["type"] in ("union_tag_not_found", "union_tag_invalid"):
        known = kinds(location[-1])
        got = item["input"].get("kind")
        if got is None:
            return f"{field}.kind: required, one of {', '.join(known)}"
        return f"{field}.kind: {unknown(str(got), known, 'kind')}"
    message = item["msg"].removeprefix("Value error, ")
    message = re.sub(r"a valid dictionary or instance of \w+", "a group of settings", message)
    message = message[0].lower() + message[1:]
    got = item.get("input")
    if item["type"] == "value_error" or isinstance(got, dict):
        return f"{field}: {message}"
    return f"{field}: {message}, got {got!r}"


def siblings(location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed beside the one at `location` (whose union members are named by their kind)."""
    model: Any = Config
    for part in location[:-1]:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            members = [model.model_fields[str(part)].annotation]
        else:  # a member of a union, named by its discriminator
            members = [
                member
                for member in get_args(model)
                if "kind" in getattr(member, "model_fields", {})
                and part in get_args(member.model_fields["kind"].annotation)
            ]
        model = next(iter(members), None)
        options = [m for m in get_args(model) if isinstance(m, type) and issubclass(m, BaseModel)]
        if len(options) == 1:
            model = options[0]
    return list(getattr(model, "model_fields", {}))


def dump_config(config: Config) -> str:
    data = config.model_dump(mode="json")
    data["weighting"] = config.weighting_used.model_dump(mode="json")
    return yaml.dump(data, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True)
