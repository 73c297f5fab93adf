"""The configuration of a run: one YAML file, strictly checked before anything is loaded or trained."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from fedhl.config.conduct import (
    ChannelConfig,
    CheckpointConfig,
    ComputeConfig,
    EvaluationConfig,
    FederationConfig,
    Participation,
    PrivacyConfig,
    RobustConfig,
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
from fedhl.config.named import MethodConfig, WeightingConfig, named
from fedhl.server.channel import sends_products
from fedhl.server.privacy import why_not
from fedhl.strict import Strict
from fedhl.task import KINDS, Task


class Config(Strict):
    """Everything that decides a run. `fedhl check CONFIG` shows what it amounts to."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run's name, and its folder: runs/NAME."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The root of every random draw."""
    model: ModelConfig
    task: Annotated[Task, Field(discriminator="kind")]
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
