"""What shows of a config before any row is read."""

from __future__ import annotations

from typing import Any

from fedhl.config import Config
from fedhl.config.settings import Settings
from fedhl.config.tracking import check_installed
from fedhl.errors import UserError
from fedhl.lora import initial
from fedhl.method import Method
from fedhl.server import accounting


def check_config(config: Config) -> None:
    """Raises UserError for mistakes that show before any row is read: an extra that is not installed, or a
    method whose results nobody could evaluate."""
    if config.privacy is not None:
        accounting.check_installed()
    check_installed(config.report_to)
    method, state = smallest(config)
    if method.delta(state) is None and not config.evaluation.client_fraction:
        raise UserError(
            f"method {config.method.name!r} has no global model, so that only the clients can evaluate; set "
            "evaluation.client_fraction, e.g. to 0.2"
        )


def smallest(config: Settings) -> tuple[Method[Any], Any]:
    """The method and its state for a layer of 2 x 2, from which its properties can be read."""
    method = config.method.build()
    return method, method.init(initial(2, 2, 1, 1.0, seed=0))


def clients_keep(config: Settings) -> bool:
    """Whether clients keep factors for themselves, without which the run cannot continue."""
    method, state = smallest(config)
    return bool(method.broadcast(state, 1, 1.0).keep)
