"""How rounds go: who takes part, what travels, how clients train, what is evaluated and kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from fedhl.strict import Strict

if TYPE_CHECKING:
    from fedhl.server.robust import Guard, Median, Trimmed


class Participation(Strict):
    """Which clients take part in a round. The clients are drawn anew for every round, by the run's seed."""

    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The share of the clients that take part, at least one client. All clients take part if neither
    `fraction` nor `count` is given."""
    count: PositiveInt | None = None
    """The number of clients that take part."""
    only: Annotated[list[str], Field(min_length=1)] | None = None
    """The clients that take part at all; the others keep their rows to themselves. Rows, ranks and draws are
    as if all were there, so that `only: [client-3]` is client-3 alone. null: every client."""
    pooled: bool = False
    """Put the training rows of all clients into the hands of one, called `pooled`, who has the largest of
    their ranks and takes as many steps in a round as all of the round's clients: what training would reach
    if rows could be shared."""
    stragglers: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The probability that a client is slow in a round. A slow client trains only its last layers, down to a
    depth that is drawn anew; each layer is averaged over the clients that returned it, and the bias of that
    is corrected."""
    layers: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(default_factory=dict)
    """Clients that train only some layers, which are given by parts of the layers' names:
    `{client-3: [layer.4, layer.5]}`."""

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
        """The probability that a client takes part in a round, of this number of clients."""
        return min(1.0, self.count / clients) if self.count is not None else self.fraction or 1.0

    def size(self, clients: int) -> int:
        if self.count is not None:
            return min(self.count, clients)
        return max(1, round((self.fraction or 1.0) * clients))


class ChannelConfig(Strict):
    """Over-the-air computation: the signals of all clients add up on the way, and the receiver adds noise."""

    kind: Literal["air"]
    snr_db: Annotated[float, Field(allow_inf_nan=False)]
    """The signal-to-noise ratio, in decibels, of a client that transmits at power 1."""
    power: PositiveFloat = 1.0
    """The limit on each client's mean power per number. The client whose limit is reached first decides for
    all clients."""


Payload = Literal["float32", "float16", "bfloat16", "int8"]


class WireConfig(Strict):
    """What travels between the server and its clients."""

    payload: Payload = "float32"
    """The type in which adapters travel, in both directions. A run in one process rounds numbers in the same
    way. int8 has one step size for each component of each factor. The head always travels as float32."""
    download: Payload | None = None
    """The type in which adapters travel to the clients, if it is another one; null: the type of `payload`."""


class MedianRule(Strict):
    """Refuse the clients that move much further than the other clients of the round."""

    kind: Literal["median"]
    factor: Annotated[float, Field(ge=1)] = 5.0
    """Refuse a client whose change is more than this factor times the median change of the clients that
    arrived."""

    def build(self) -> Median:
        from fedhl.server.robust import Median

        return Median(self.factor)


class TrimmedRule(Strict):
    """Refuse the clients that move furthest, whether these clients are honest or not."""

    kind: Literal["trimmed"]
    share: Annotated[float, Field(gt=0, lt=1)]
    """This share of the clients that arrived is refused, rounded down to whole clients."""

    def build(self) -> Trimmed:
        from fedhl.server.robust import Trimmed

        return Trimmed(self.share)


class RobustConfig(Strict):
    """What happens to clients that move too far. How far a client moves is the norm of the change of its
    products, over all layers, and of its head together. This rule gives no privacy."""

    clip: PositiveFloat | None = None
    """Scale the change of a client down to this norm if it is larger; null: do not clip."""
    reject: Annotated[MedianRule | TrimmedRule, Field(discriminator="kind")] | None = None
    """Refuse some clients, before the other clients are clipped; null: refuse none."""
    rows: Annotated[float, Field(ge=1)] = 3.0
    """A client that reports more rows than this many times the median of the round counts with that many, in
    the mean of the head and in every weighting by rows: no client buys weight by a number that nobody can
    check."""

    @model_validator(mode="after")
    def one_rule(self) -> RobustConfig:
        if self.clip is None and self.reject is None:
            raise ValueError("give clip, reject, or both")
        return self

    def build(self) -> Guard:
        from fedhl.server.robust import Guard

        return Guard(self.clip, self.reject and self.reject.build(), self.rows)


class PrivacyConfig(Strict):
    """Client-level differential privacy of everything that leaves the server; docs/privacy.md says what that
    protects. Each of the N clients takes part in a round independently, with the probability q that
    `participation` gives, and counts with the weight 1/(q N): all clients are weighted alike."""

    clip: PositiveFloat
    """Scale the change of a client, over all layers and the head together, down to this norm if it is
    larger."""
    noise: PositiveFloat
    """The noise multiplier: the standard deviation of the noise, in units of the most that one client can
    move the sum."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """The δ for which ε is reported. It should be well below 1 / (number of clients)."""


class TrainingConfig(Strict):
    """What a client does in one round."""

    steps: PositiveInt | None = None
    """The number of optimizer steps per round, instead of `epochs`."""
    epochs: PositiveFloat | None = None
    """The number of passes over the client's rows per round, which may be a fraction. If neither `steps` nor
    `epochs` is given, there is one pass."""
    batch_size: PositiveInt = 16
    """The number of rows per optimizer step."""
    accumulation: PositiveInt = 1
    """The number of parts into which each batch is split, to save memory."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer of a client. Its state begins anew in every round."""
    learning_rate: PositiveFloat = 1e-3
    """The peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from the first round of the run to the last."""
    warmup_rounds: NonNegativeInt = 0
    """The number of rounds at the start in which the learning rate rises linearly to its peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the adapter and the head."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the gradient to this norm; null: do not clip."""
    full: bool = False
    """Full fine-tuning of the adapted layers, as a baseline: the client trains a change of each whole weight,
    in float32, and its adapters rest. The change begins at zero in every round, and weight decay pulls it
    back to zero. This needs `participation.pooled: true` and `method: flora`."""

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
        """The number of optimizer steps in one round on this number of rows."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 1.0) * examples / min(self.batch_size, examples)))


class EvaluationConfig(Strict):
    """When the global model is evaluated, and on which rows besides those of the server."""

    every: PositiveInt = 1
    """The number of rounds from one evaluation to the next. The last round is always evaluated."""
    batch_size: PositiveInt = 64
    """The number of rows per forward pass."""
    client_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of each client's rows that the client evaluates on and never trains on; the mean and the
    worst over the clients are reported. The default is 0.1 if the server has no rows (`data.held_out: null`)
    and there is no `privacy`, and 0 otherwise."""


class PersonalConfig(Strict):
    """Personal models: after the last round each client goes on alone from what it would be sent next, on its
    own rows, and keeps what comes of it. It trains as in a round, with the settings of `training` but for
    those given here, and at a constant learning rate."""

    steps: PositiveInt | None = None
    """The number of optimizer steps, instead of `epochs`."""
    epochs: PositiveFloat | None = None
    """The number of passes over the client's rows, which may be a fraction. If neither `steps` nor `epochs`
    is given, there is one pass."""
    learning_rate: PositiveFloat | None = None
    """The learning rate; null: that of `training`."""

    @model_validator(mode="after")
    def one_rule(self) -> PersonalConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self

    def training(self, rounds: TrainingConfig) -> TrainingConfig:
        """How a client trains its personal model, if it trains like `rounds` in a round."""
        return rounds.model_copy(
            update={
                "steps": self.steps,
                "epochs": self.epochs,
                "learning_rate": self.learning_rate or rounds.learning_rate,
                "schedule": "constant",
                "warmup_rounds": 0,
            }
        )


class StopConfig(Strict):
    """When a run ends before its last round. The learning rate follows the planned rounds all the same."""

    patience: PositiveInt | None = None
    """End when this number of evaluations in a row were no better than the best round before them; null:
    however long it takes. Rounds are judged as for the best round, on the held-out rows."""
    hours: PositiveFloat | None = None
    """End after the first round with which the rounds have taken this long, pauses not counted; null: no
    limit."""

    @model_validator(mode="after")
    def some_rule(self) -> StopConfig:
        if self.patience is None and self.hours is None:
            raise ValueError("give patience, hours or both")
        return self


class ComputeConfig(Strict):
    """Which device computes, and in which precision."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """The device; auto: the first of cuda, mps and cpu that this machine has."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """The precision of forward passes. With bfloat16, forward passes run under autocast, and the weights
    keep their type."""
    threads: PositiveInt | None = None
    """The number of CPU threads; null: what PyTorch chooses. Two runs are bit for bit the same only with the
    same number of threads."""
    cache_activations: bool = False
    """Compute the layers below the first adapted one once for each row, and keep in memory what leaves them,
    instead of computing them in every step and every evaluation. This needs `lora.targets` in the last layers
    only, and no dropout below these. [When it helps](performance.md#activations-computed-once)."""


class TasksConfig(Strict):
    """New labels arrive over time: the rounds are divided among tasks, one after the other. A task trains on
    the rows of its own labels, and these labels compete only with each other; the head's rows for all other
    labels stay as they are. The schedule of the learning rate begins anew with each task."""

    count: Annotated[int, Field(ge=2)] | None = None
    """The number of tasks. The labels are split among them as equally as possible, in an order drawn by the
    run's seed."""
    groups: list[list[Any]] | None = None
    """Instead of `count`, the labels of each task: `[[cat, dog], [fern, oak]]`. A task has at least two
    labels, and every label is in one task."""

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
    """Which checkpoints stay on disk."""

    keep: Annotated[int, Field(ge=2)] = 2
    """The number of the newest checkpoints that stay on disk. The best checkpoint stays in any case."""


class FederationConfig(Strict):
    """Clients on other machines (`fedhl serve`): which clients the server waits for, and for how long."""

    clients: PositiveInt | None = None
    """The number of clients that must have reported before the first round begins; null: `partition.clients`.
    A by-column partition does not say how many clients there are, and needs this number."""
    minimum: PositiveInt = 1
    """The number of clients that must be connected for a later round to begin."""
    top_rank: PositiveInt = 256
    """The largest rank that a client with its own data and its own rank may have. Clients of a larger rank
    are refused, since all other clients would bear the cost."""
    max_rows: PositiveInt = 1_000_000
    """The largest number of rows that a client with its own data may report. Clients that report more are
    refused: the number is the client's own word, and decides how much the client counts."""
    deadline: PositiveFloat = 3600.0
    """The number of seconds that a round waits for its clients. After that it goes on without the missing
    clients."""
