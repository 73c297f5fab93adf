"""How a federation goes, whatever it trains on whatever rows."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveInt, ValidationInfo, model_validator

from fedhl.config.conduct import (
    ChannelConfig,
    CheckpointConfig,
    ComputeConfig,
    EvaluationConfig,
    Participation,
    PersonalConfig,
    PrivacyConfig,
    RobustConfig,
    StopConfig,
    TrainingConfig,
    WireConfig,
)
from fedhl.config.inputs import LoRAConfig
from fedhl.config.named import DEFAULT_METHOD, MethodConfig, WeightingConfig, named
from fedhl.strict import Strict

DRAFT = {"draft": True}
"""The validation context of a config whose method and weighting are known by name only: their classes, and
torch with them, are not imported. Such a config is good for a first look, and never for a run."""


class Settings(Strict):
    """What decides a federation beside its model and its rows.

    The settings are checked in two steps: first by themselves, and if nothing is wrong, with the classes of
    the method and the weighting, which complete their hyperparameters.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The seed from which every random draw of the run follows."""
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
    personal: PersonalConfig | None = None
    """A [personal model](personal.md) for each client at the end, evaluated on the client's own held-out rows
    (`evaluation.client_fraction`) beside the global model; null: none."""
    compute: ComputeConfig = ComputeConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def analog_payload(self) -> Settings:
        narrow = {self.wire.payload, self.wire.download} - {"float32", None}
        if self.channel is not None and narrow:
            raise ValueError(
                f"wire: an analog channel transmits the numbers themselves, not {min(narrow)}; "  # pyright: ignore
                "leave out either wire or channel"
            )
        return self

    @model_validator(mode="after")
    def privacy_rules(self) -> Settings:
        if self.privacy is None:
            return self
        if self.weighting is not None and self.weighting.name != "uniform":
            raise ValueError(
                f"privacy: weighting {self.weighting.name!r} would let one client change the weights of "
                "other clients; leave the weighting out, or use weighting: uniform"
            )
        for name, given in self.unbounded().items():
            if given:
                raise ValueError(
                    f"privacy: {name} cannot go with privacy, since the bound on what one client can move "
                    f"would not hold; leave {name} out"
                )
        return self

    @model_validator(mode="after")
    def personal_rules(self) -> Settings:
        if self.personal is None:
            return self
        if self.privacy is not None:
            raise ValueError(
                "personal: how personal models score would be reported without noise, and privacy does not "
                "cover that; leave out either personal or privacy"
            )
        if self.participation.pooled:
            raise ValueError(
                "personal: with participation.pooled one client has all rows, and nobody goes on alone; "
                "leave out either"
            )
        return self

    @model_validator(mode="after")
    def full_rules(self) -> Settings:
        if self.training.full and not self.participation.pooled:
            raise ValueError(
                "training.full: full fine-tuning is a baseline, for one client that has all rows; set "
                "participation.pooled: true, or leave training.full out"
            )
        return self

    def unbounded(self) -> dict[str, Any]:
        """The settings, by name, with which privacy has no bound on what one client can move."""
        return {
            "participation.stragglers": self.participation.stragglers,
            "channel": self.channel,
            "robust": self.robust,
        }

    @model_validator(mode="after")
    def with_classes(self, info: ValidationInfo) -> Settings:
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
        from fedhl.server.channel import sends_products
        from fedhl.server.privacy import why_not

        method, name = self.method.build(), self.method.name
        if self.robust and self.robust.clip is not None and not sends_products(method):
            raise ValueError(
                f"robust.clip: method {name!r} combines factors, and scaling the factors does not scale "
                "their product; use method: fedhl_ef, fedhl or flexlora, or robust.reject, which goes with "
                "any method"
            )
        exact = {"exact mean", "gauge"} <= method.laws and method.mixed_ranks
        if self.training.full and not (exact and method.starts == "whole"):
            raise ValueError(
                f"training.full: method {name!r} does not add the change of a whole weight to the model that "
                "the client started from; use method: flora"
            )
        if self.privacy and (reason := why_not(method)):
            raise ValueError(
                f"privacy: method {name!r} {reason}; use method: fedhl_ef, fedhl, fedhera or fed_plora"
            )

    @property
    def period(self) -> int:
        """The number of rounds over which the learning rate follows its schedule."""
        return self.rounds

    @property
    def weighting_used(self) -> WeightingConfig:
        """The weighting that the config names, or else the method's own; with privacy, uniform."""
        if self.privacy is not None:
            return WeightingConfig(name="uniform")
        if self.weighting is not None:
            return self.weighting
        return WeightingConfig(name=self.method.build().weighting).completed()
