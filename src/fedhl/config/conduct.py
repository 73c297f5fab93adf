"""How rounds go: who takes part, what travels, how clients train, what is evaluated and kept."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from fedhl.server.robust import Guard, Median, Trimmed
from fedhl.strict import Strict


class Participation(Strict):
    """Which clients take part in a round, drawn anew by the run's seed."""

    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """This share of the clients, at least one; all of them unless this or `count` is given."""
    count: PositiveInt | None = None
    """So many clients."""
    stragglers: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that a client is slow in a round and trains only its last layers, down to a depth drawn
    anew; each layer is averaged over those who returned it, bias-corrected."""
    layers: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(default_factory=dict)
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
