"""The configuration of a run: one YAML file, strictly checked before anything is loaded or trained."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from fedhl.config.conduct import FederationConfig, TasksConfig
from fedhl.config.inputs import (
    ColumnPartition,
    DataConfig,
    DirichletPartition,
    IIDPartition,
    ModelConfig,
)
from fedhl.config.settings import Settings
from fedhl.config.tracking import AnyTracker, listed
from fedhl.strict import Strict
from fedhl.task import KINDS, Kind, Task, kind_named


def with_own_kinds(schema: Any) -> None:
    """Have the schema for editors accept kinds from elsewhere, whose settings nobody here knows."""
    name = {"type": "string", "pattern": ":"}
    schema["oneOf"].append({"type": "object", "properties": {"kind": name}, "required": ["kind"]})


def of_kind(value: Any, handler: ValidatorFunctionWrapHandler) -> Kind:
    """The task, of a kind of fedhl's or of `package.module:Class`."""
    name = value.get("kind") if isinstance(value, dict) else None
    if not (isinstance(name, str) and ":" in name):
        return handler(value)
    try:
        return kind_named(name).model_validate(value)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError("; ".join(wrong)) from None


class Inputs(Strict):
    """What a run is made of."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The name of the run, which is also the name of its folder: runs/NAME."""
    model: ModelConfig
    task: Annotated[
        SerializeAsAny[Annotated[Task, Field(discriminator="kind")]],
        WrapValidator(of_kind),
        Field(json_schema_extra=with_own_kinds),
    ]
    """What the model learns: a label, several labels or a number for each text, completions of prompts,
    which of two answers is better, the label of an image, or [a kind of one's own](adding-a-kind.md),
    `kind: package.module:Class`."""
    data: DataConfig
    partition: Annotated[
        IIDPartition | DirichletPartition | ColumnPartition, Field(discriminator="kind")
    ]
    """Which client has which rows: drawn at random (iid, dirichlet), or by a field (by-column)."""
    tasks: TasksConfig | None = None
    """Class-incremental learning: new labels arrive over time; null: all labels are there from the start."""
    report_to: Annotated[list[AnyTracker], BeforeValidator(listed)] = Field(default_factory=list)
    """Trackers that are sent the metrics of every round, by name or as `{name: wandb, mode: online}`;
    [what is tracked](trackers.md). A run that is resumed may have other trackers."""
    federation: FederationConfig = FederationConfig()


class Config(Settings, Inputs):
    """Everything that decides a run. `fedhl check CONFIG` shows what a config amounts to."""

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
    def personal_rows(self) -> Config:
        if self.personal is None:
            return self
        if not self.evaluation.client_fraction:
            raise ValueError(
                "personal: a personal model is judged on its client's own held-out rows, and clients hold "
                "none out; set evaluation.client_fraction, e.g. to 0.2"
            )
        if self.tasks is not None:
            raise ValueError(
                "personal: where labels arrive over time, clients do not keep the rows of earlier tasks, on "
                "which a personal model would train; leave out either personal or tasks"
            )
        return self

    @model_validator(mode="after")
    def private_trackers(self) -> Config:
        for tracker in self.report_to if self.privacy else ():
            if tracker.clients:
                raise ValueError(
                    f"privacy: what clients report of themselves has no noise, and report_to would give it "
                    f"to {tracker.name}; leave clients: true out"
                )
        return self

    def unbounded(self) -> dict[str, Any]:
        return super().unbounded() | {"tasks": self.tasks}

    def refuse_method(self) -> None:
        from fedhl.method import FromBase, Remembering

        super().refuse_method()
        if not self.model.four_bit:
            return
        method = self.method.build()
        if isinstance(method, Remembering):
            raise ValueError(
                f"model.four_bit: the clients of method {self.method.name!r} hold what they were sent in "
                "their base, and a 4-bit base cannot hold it; use method: fedhl, whose clients hold nothing"
            )
        if isinstance(method, FromBase):
            raise ValueError(
                f"model.four_bit: method {self.method.name!r} starts from components of the base weights, "
                "which cannot be read in 4-bit; leave model.four_bit out, or use method: fedit"
            )

    @property
    def period(self) -> int:
        """The number of rounds of one task; without tasks, of the whole run."""
        return self.rounds // self.tasks.number if self.tasks else self.rounds
