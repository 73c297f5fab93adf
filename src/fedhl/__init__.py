"""fedhl: federated LoRA fine-tuning across clients that cannot share data nor afford the same rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhl.lazy import lazy

if TYPE_CHECKING:
    from fedhl import lora as lora
    from fedhl import method as method
    from fedhl import methods as methods
    from fedhl import weighting as weighting
    from fedhl.lora import LoRA, dense
    from fedhl.method import LAWS, Broadcast, Method, Traffic, Update
    from fedhl.methods import METHODS, get_method
    from fedhl.run.result import Result as Result
    from fedhl.run.simulate import simulate as simulate
    from fedhl.weighting import Cohort, get_weighting
    from fedhl.weightings import WEIGHTINGS

__version__ = "0.2.0"

__all__ = [
    "LAWS",
    "METHODS",
    "WEIGHTINGS",
    "Broadcast",
    "Cohort",
    "LoRA",
    "Method",
    "Traffic",
    "Update",
    "dense",
    "get_method",
    "get_weighting",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        **dict.fromkeys(("LoRA", "dense"), "fedhl.lora"),
        **dict.fromkeys(("LAWS", "Broadcast", "Method", "Traffic", "Update"), "fedhl.method"),
        **dict.fromkeys(("METHODS", "get_method"), "fedhl.methods"),
        **dict.fromkeys(("Cohort", "get_weighting"), "fedhl.weighting"),
        "WEIGHTINGS": "fedhl.weightings",
        "Result": "fedhl.run.result",
        "simulate": "fedhl.run.simulate",
        **{name: f"fedhl.{name}" for name in ("lora", "method", "methods", "weighting")},
    },
)
