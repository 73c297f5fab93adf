"""The aggregation methods, one file each, and how to get one by name."""

from __future__ import annotations

from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

from fedhl.method import Method
from fedhl.methods.fed_plora import FedPLoRA
from fedhl.methods.fedex_lora import FedExLoRA
from fedhl.methods.fedhera import FedHera
from fedhl.methods.fedhl import FedHL
from fedhl.methods.fedit import FedIT
from fedhl.methods.fedsa_lora import FedSALoRA
from fedhl.methods.fedsvd import FedSVD
from fedhl.methods.ffa_lora import FFALoRA
from fedhl.methods.flexlora import FlexLoRA
from fedhl.methods.flora import FLoRA
from fedhl.methods.flora_na import FLoRANA
from fedhl.methods.florist import FLoRIST
from fedhl.methods.fslora import FSLoRA
from fedhl.methods.hetlora import HetLoRA
from fedhl.methods.hlora import HLoRA
from fedhl.methods.lora_a2 import LoRAA2
from fedhl.methods.lora_fair import LoRAFAIR
from fedhl.methods.rac_lora import RACLoRA
from fedhl.methods.raflora import RaFLoRA
from fedhl.methods.rbla import RBLA
from fedhl.methods.rolora import RoLoRA
from fedhl.methods.sd_lora import SDLoRA
from fedhl.names import build, construct

METHODS: dict[str, type[Any]] = {
    "fed_plora": FedPLoRA,
    "fedex_lora": FedExLoRA,
    "fedhera": FedHera,
    "fedhl": FedHL,
    "fedit": FedIT,
    "fedsa_lora": FedSALoRA,
    "fedsvd": FedSVD,
    "ffa_lora": FFALoRA,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "flora_na": FLoRANA,
    "florist": FLoRIST,
    "fslora": FSLoRA,
    "hetlora": HetLoRA,
    "hlora": HLoRA,
    "lora_a2": LoRAA2,
    "lora_fair": LoRAFAIR,
    "rac_lora": RACLoRA,
    "raflora": RaFLoRA,
    "rbla": RBLA,
    "rolora": RoLoRA,
    "sd_lora": SDLoRA,
}


CONTRACT = (
    "mixed_ranks",
    "laws",
    "init",
    "broadcast",
    "aggregate",
    "delta",
    "traffic",
)
"""What a method must have."""
OPTIONAL = ("weighting", "per_client", "starts", "reference")
"""What a method may leave out: then it has that of `fedhl.method.Method`."""


def get_method(name: str, **hyperparameters: Any) -> Method[Any]:
    """A method by name, or by `"package.module:Class"` for one that lives elsewhere; a class that does
    not inherit what it leaves out is given the defaults of `Method`.

    Raises ValueError for an unknown name (suggesting the nearest), a class that cannot be imported
    or is not a dataclass, and a hyperparameter that the method does not have.
    """
    if ":" not in name:
        return build("method", METHODS, name, hyperparameters)
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {name!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise ValueError(f"method {name!r} must be a dataclass that follows fedhl.method.Method")
    if missing := [part for part in CONTRACT if not hasattr(cls, part)]:
        raise ValueError(
            f"method {name!r} lacks {', '.join(missing)}; see fedhl.method.Method and "
            "docs/adding-a-method.md"
        )
    for part in OPTIONAL:
        if not hasattr(cls, part):
            setattr(cls, part, getattr(Method, part))
    return construct("method", name, cls, hyperparameters)
