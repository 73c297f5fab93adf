"""The configuration of a run: one YAML file, strictly checked before anything is loaded or trained."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveInt, ValidationInfo, model_validator

from fedhl.config.conduct import (
    ChannelConfig,
    CheckpointConfig,
    ComputeConfig,
    EvaluationConfig,
    FederationConfig,
    Participation,
    PrivacyConfig,
    RobustConfig,
    StopConfig,
    TasksConfig,
    TrainingConfig,
    WireConfig,
)
from fedhl.config.inputs import (
    ColumnPartition,
    DataConfig,
    DirichletPartition,
    IIDPartition,
    LoRAConfig,
    ModelConfig,
)
from fedhl.config.named import DEFAULT_METHOD, MethodConfig, WeightingConfig, named
from fedhl.strict import Strict
from fedhl.task import KINDS, Task

DRAFT = {"draft": True}
"""The validation context of a config whose method and weighting are known by name only: their classes, and
torch with them, are not imported. Such a config is good for a first look, and never for a run."""


class Config(Strict):
    """Everything that decides a run. `fedhl check CONFIG` shows what a config amounts to.

    It is checked in two steps: first by itself, and if nothing is wrong, with the classes of the method and
    the weighting, which complete their hyperparameters.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The name of the run, which is also the name of its folder: runs/NAME."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The seed from which every random draw of the run follows."""
    model: ModelConfig
    task: Annotated[Task, Field(discriminator="kind")]
    """What the model learns: the labels of texts, or completions of prompts."""
    data: DataConfig
    partition: Annotated[
        IIDPartition | DirichletPartition | ColumnPartition, Field(discriminator="kind")
    ]
    """Which client has which rows: drawn at random (iid, dirichlet), or by a field (by-column)."""
    lora: LoRAConfig = LoRAConfig()
    method: Annotated[MethodConfig, BeforeValidator(named)] = MethodConfig(name=DEFAULT_METHOD)
    """How the updates are combined and what the clients are sent, by name or as `{name: fedsvd, period: 4}`.
    [Which method to choose](methods.md#which-one)."""
    weighting: Annotated[WeightingConfig | None, BeforeValidator(named)] = None
    """How the clients are weighted, by name or as `{name: balanced, lam: 0.1}`; null: as in the method's
    paper (`fedhl methods` shows how). [Which weighting to choose](methods.md#weights)."""
    rounds: PositiveInt = 10
    """The number of times that the server and the clients exchange adapters."""
    stop: StopConfig | None = None
    """End before the last round, when nothing gets better or time is up; null: all rounds are done."""
    tasks: TasksConfig | None = None
    """Class-incremental learning: new labels arrive over time; null: all labels are there from the start."""
    participation: Participation = Participation(fraction=1.0)
    channel: ChannelConfig | None = None
    """An analog channel, for study, which adds up what the clients transmit at the same time; null: a digital
    channel without noise."""
    wire: WireConfig = WireConfig()
    robust: RobustConfig | None = None
    """Clip or refuse clients that move too far; null: all clients count as they are."""
    privacy: PrivacyConfig | None = None
    """Client-level differential privacy, which needs the extra `fedhl[dp]`; null: no privacy."""
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
        if raw.get("privacy"):  # the noise does not cover what clients report of themselves
            return raw
        evaluation = raw.get("evaluation") or {}
        if not isinstance(evaluation, dict):
            return raw
        return {**raw, "evaluation": {"client_fraction": 0.1} | evaluation}

    @model_validator(mode="after")
    def head_to_draw(self) -> Config:
        if self.model.fresh_head and not self.task.head:
            raise ValueError(
                f"model.fresh_head: {self.task.kind} trains no head; leave model.fresh_head out"
            )
        return self

    @model_validator(mode="after")
    def analog_payload(self) -> Config:
        narrow = {self.wire.payload, self.wire.download} - {"float32", None}
        if self.channel is not None and narrow:
            raise ValueError(
                f"wire: an analog channel transmits the numbers themselves, not {min(narrow)}; "  # pyright: ignore
                "leave out either wire or channel"
            )
        return self

    @model_validator(mode="after")
    def task_rounds(self) -> Config:
        if self.tasks is None:
            return self
        if self.stop is not None:
            raise ValueError("stop: a run over tasks has to reach its last task; leave stop out")
        if self.task.class_field is None:
            able = ", ".join(name for name, kind in KINDS.items() if kind.class_setting)
            raise ValueError(f"tasks: only {able} has labels that arrive over time")
        number = self.tasks.number
        if self.rounds % number:
            more = self.rounds + -self.rounds % number
            raise ValueError(
                f"rounds: {self.rounds} rounds cannot be shared equally by {number} tasks; "
                f"set rounds to a multiple of {number}, e.g. {more}"
            )
        return self

    @model_validator(mode="after")
    def privacy_rules(self) -> Config:
        if self.privacy is None:
            return self
        if self.weighting is not None and self.weighting.name != "uniform":
            raise ValueError(
                f"privacy: weighting {self.weighting.name!r} would let one client change the weights of "
                "other clients; leave the weighting out, or use weighting: uniform"
            )
        for name, given in (
            ("participation.stragglers", self.participation.stragglers),
            ("channel", self.channel),
            ("tasks", self.tasks),
            ("robust", self.robust),
        ):
            if given:
                raise ValueError(
                    f"privacy: {name} cannot go with privacy, since the bound on what one client can move "
                    f"would not hold; leave {name} out"
                )
        return self

    @model_validator(mode="after")
    def with_classes(self, info: ValidationInfo) -> Config:
        """The second step, which needs the classes of the method and the weighting."""
        if info.context == DRAFT:
            return self
        for name, value in (("method", self.method), ("weighting", self.weighting)):
            if value is not None:
                try:
                    whole = value.completed()
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
                object.__setattr__(self, name, whole)  # frozen from here on
        self.refuse_method()
        return self

    def refuse_method(self) -> None:
        """Raises ValueError for settings that the method does not go with."""
        from fedhl.method import Remembering
        from fedhl.server.channel import sends_products
        from fedhl.server.privacy import why_not

        method, name = self.method.build(), self.method.name
        if self.robust and self.robust.clip is not None and not sends_products(method):
            raise ValueError(
                f"robust.clip: method {name!r} combines factors, and scaling the factors does not scale "
                "their product; use method: fedhl_ef, fedhl or flexlora, or robust.reject, which goes with "
                "any method"
            )
        if self.model.four_bit and isinstance(method, Remembering):
            raise ValueError(
                f"model.four_bit: the clients of method {name!r} hold what they were sent in their base, "
                "and a 4-bit base cannot hold it; use method: fedhl, whose clients hold nothing"
            )
        if self.privacy and (reason := why_not(method)):
            raise ValueError(
                f"privacy: method {name!r} {reason}; use method: fedhl_ef, fedhl, fedhera or fed_plora"
            )

    @property
    def period(self) -> int:
        """The number of rounds of one task; without tasks, of the whole run."""
        return self.rounds // self.tasks.number if self.tasks else self.rounds

    @property
    def weighting_used(self) -> WeightingConfig:
        """The weighting that the config names, or else the method's own; with privacy, uniform."""
        if self.privacy is not None:
            return WeightingConfig(name="uniform")
        theirs = self.method.build().weighting
        return self.weighting or WeightingConfig(name=theirs).completed()
