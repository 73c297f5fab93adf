"""fedhl: federated LoRA fine-tuning across clients that cannot share data nor afford the same rank."""

from __future__ import annotations

from fedhl.lora import LoRA, dense
from fedhl.method import LAWS, Broadcast, Method, Traffic, Update
from fedhl.methods import METHODS, get_method
from fedhl.weighting import WEIGHTINGS, Cohort, get_weighting

__version__ = "0.1.0"

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
