"""Where the metrics of a run go besides its folder: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from fedhl.config.named import named
from fedhl.errors import UserError
from fedhl.names import unknown
from fedhl.strict import Strict


class Tracker(Strict):
    """What all trackers have."""

    clients: bool = False
    """Track each client, too: its loss, weight, rank and own metrics. It cannot go with `privacy`."""


class TensorBoardTracker(Tracker):
    """TensorBoard: event files in the run folder. Needs the extra `fedhl[tensorboard]`."""

    name: Literal["tensorboard"]
    """Which tracker."""


class WandbTracker(Tracker):
    """Weights & Biases. Needs the extra `fedhl[wandb]`."""

    name: Literal["wandb"]
    """Which tracker."""
    run: Annotated[str, Field(min_length=1)] | None = None
    """The name of the run there; null: `name` of the config. `fedhl compare` gives each of its runs the name
    of its variant and its seed."""
    project: str = "fedhl"
    """The project."""
    entity: str | None = None
    """The user or team whose project it is; null: the default of your W&B account."""
    group: str | None = None
    """The group of the run; null: none. `fedhl compare` puts its runs into a group of the name of its
    folder."""
    mode: Literal["offline", "online"] = "offline"
    """offline: into the run folder, and nothing is sent until you call `wandb sync`. online: sent at once,
    with the API key of `wandb login`."""


class MLflowTracker(Tracker):
    """MLflow. Needs the extra `fedhl[mlflow]`."""

    name: Literal["mlflow"]
    """Which tracker."""
    run: Annotated[str, Field(min_length=1)] | None = None
    """The name of the run there; null: `name` of the config. `fedhl compare` gives each of its runs the name
    of its variant and its seed."""
    uri: str | None = None
    """The tracking URI, e.g. `http://localhost:5000`; null: files in the run folder."""
    experiment: Annotated[str, Field(min_length=1)] = "fedhl"
    """The experiment, which is made if there is none of this name."""

    @field_validator("uri")
    @classmethod
    def whole_uri(cls, uri: str | None) -> str | None:
        if uri is not None and uri != "databricks" and not re.match(r"[a-z][a-z0-9+.-]+:.", uri):
            raise ValueError(
                f"expected a URI, e.g. http://localhost:5000, got {uri!r}; leave uri out for files in the "
                "run folder"
            )
        return uri


AnyTracker = Annotated[
    TensorBoardTracker | WandbTracker | MLflowTracker, Field(discriminator="name")
]
TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MLflowTracker,
}


def check_installed(trackers: Iterable[AnyTracker]) -> None:
    """Raises UserError unless the packages of these trackers are installed, without importing them."""
    for name in (tracker.name for tracker in trackers):
        found = find_spec(name)
        if found is None or found.origin is None:  # some folder of that name is no package
            raise UserError(
                f"report_to: {name} is not installed; install it with `pip install 'fedhl[{name}]'`"
            )


def listed(value: Any) -> Any:
    """`report_to: wandb` is short for `report_to: [{name: wandb}]`; `none` and null are the empty list.

    Raises ValueError for a tracker that is unknown, has no name, or is given twice.
    """
    if value is None or value == "none":
        return []
    trackers = [named(one) for one in (value if isinstance(value, list) else [value])]
    if not all(isinstance(one, dict) for one in trackers):
        return value  # the field says what is wrong with such a value
    names = [str(one.get("name")) for one in trackers]
    for name in names:
        if name == "None":
            raise ValueError(f"a tracker has no name; give one of {', '.join(TRACKERS)}")
        if name not in TRACKERS:
            raise ValueError(unknown("tracker", name, TRACKERS))
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice; leave one out")
    return trackers
